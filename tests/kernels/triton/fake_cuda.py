"""What Inductor makes of a rewritten model for a CUDA device that is not there; prints the wrapper it generates.

Run in a process of its own: torch is made to believe in the device, and stays so. Nothing can run: the tensors are
fake, and the generated module is printed instead of loaded.
"""

import contextlib
import ctypes
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

CAPABILITY = (9, 0)
PROPERTIES = types.SimpleNamespace(
    name="fake", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, L2_cache_size=50 << 20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    gcnArchName="", is_integrated=0, is_multi_gpu_board=0, uuid="0",
)  # fmt: skip

# c10 asks for a device guard wherever functionalisation touches a tensor whose device says cuda.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""


class Driver:
    """As much of Triton's driver as Inductor asks for."""

    utils = types.SimpleNamespace(
        get_device_properties=lambda _: {
            "max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32,
            "sm_clock_rate": 1755000, "mem_clock_rate": 2619000, "mem_bus_width": 5120,
        }
    )  # fmt: skip

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda


def install():
    import torch._dynamo.device_interface as interface
    import torch._inductor.runtime.triton_helpers as helpers
    from torch._inductor.fx_passes import fuse_attention, pad_mm
    from torch.utils import _triton

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda _=None: PROPERTIES,
        "get_device_capability": lambda _=None: CAPABILITY,
        "is_bf16_supported": lambda *_, **__: True,
        "set_device": lambda _: None,
        "synchronize": lambda _=None: None,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "get_device_name": lambda _=None: PROPERTIES.name,
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
    }
    cuda = interface.CudaInterface
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
        if hasattr(cuda, name):
            setattr(cuda, name, staticmethod(answer))
    cuda.Worker.get_device_properties = staticmethod(lambda _=None: PROPERTIES)
    cuda.get_raw_stream = staticmethod(lambda _: 0)
    cuda.exchange_device = cuda.maybe_exchange_device = staticmethod(lambda _: 0)
    cuda.synchronize = staticmethod(lambda _=None: None)
    interface.get_cuda_stream = lambda _: 0
    torch.version.cuda = "13.0"
    activate = lambda: triton.runtime.driver.set_active(Driver())
    activate()
    helpers.set_driver_to_gpu = activate
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = lambda *_, **__: None  # they make tensors on the device
    for cached in (_triton.has_triton, _triton.triton_backend, _triton.triton_hash_with_backend):
        cached.cache_clear()

    torch_dir = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/guard.so"
        flags = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch_dir}/include", f"-L{torch_dir}/lib"]
        subprocess.run(["g++", *flags, "-x", "c++", "-", "-lc10", "-o", library], input=GUARD, text=True, check=True)
        ctypes.CDLL(library)


class Captured(BaseException):
    """The wrapper is generated; there is nothing to load it on."""


@contextlib.contextmanager
def captured():
    """Wrappers that Inductor generates."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    sources, compile_to_module = [], GraphLowering._compile_to_module

    def grab(graph):
        code = graph.codegen()[0]
        sources.append(getattr(code, "value", code))
        raise Captured

    GraphLowering._compile_to_module = grab
    try:
        with config.patch(compile_threads=1, force_disable_caches=True):
            yield sources
    finally:
        GraphLowering._compile_to_module = compile_to_module


LAYERS, BATCH, HEADS, GROUPS, HEAD_DIM, SLOTS = 2, 2, 2, 4, 64, 1024


def model(x, positions, mask, *tensors):
    """Layers of attention over static caches, written by position; weights and caches are `tensors`."""
    for weights, keys, values in zip(*(iter(tensors),) * 3, strict=True):
        q, k, v = (x @ weights).split((HEADS * GROUPS * HEAD_DIM, HEADS * HEAD_DIM, HEADS * HEAD_DIM), -1)
        q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for y in (q, k, v))
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        x = x + out.transpose(1, 2).flatten(2)
    return x


def main(dynamic):
    install()  # before the first torch.compile
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    import decoquant_compile  # noqa: F401

    width = HEADS * GROUPS * HEAD_DIM

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="cuda")

    mode, torch_empty = FakeTensorMode(), torch.empty

    def fake_empty(*args, **kwargs):
        """The backend makes small examples of its buffers outside of any mode, on the device."""
        with contextlib.nullcontext() if _get_current_dispatch_mode() else mode:
            return torch_empty(*args, **kwargs)

    torch.empty = fake_empty
    with mode, torch.no_grad(), captured() as sources:
        tensors = []
        for _ in range(LAYERS):
            caches = (empty(BATCH, HEADS, SLOTS, HEAD_DIM) for _ in range(2))
            tensors += [empty(width, width + 2 * HEADS * HEAD_DIM), *caches]
        positions, mask = empty(1, dtype=torch.int64), empty(BATCH, 1, 1, SLOTS, dtype=torch.bool)
        compiled = torch.compile(model, backend="decoquant", options={"bits": 4}, dynamic=dynamic)
        with contextlib.suppress(Captured):
            compiled(empty(BATCH, 1, width), positions, mask, *tensors)
    print(*sources)


if __name__ == "__main__":
    main(dynamic=sys.argv[1] == "dynamic")
