"""The attention of one decode step on a CUDA device: our kernels beside FlashAttention's.

Each arm is captured in a CUDA graph, as a compiled decode step is, so that what is timed is the device and not the
host; before each call a buffer larger than the device's caches is read, so that the KV cache comes from memory. Times
are those of CUDA events.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from decoquant_compile.bench.attention import WARM_UP, Arm, Settings, Shape, Step, compare, fill, read_bytes
from decoquant_compile.bench.timing import Row, interleave
from decoquant_compile.kernels.codec import Role
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState

DEVICE: Final = "cuda"

FAMILIES: Final = ("sdpa", "attend", "step", "read")
"""Of `attention.FAMILIES`; here `sdpa` is FlashAttention over grouped heads, without a mask, in bfloat16."""

_FLUSHED: Final = 4
"""A buffer of so many times the device's L2 is read before each call."""


class NoDeviceError(Exception):
    """There is no CUDA device."""


def require() -> None:
    """Checks that there is a device to measure.

    Raises:
        NoDeviceError: there is none, with what is expected.
    """
    if not torch.cuda.is_available():
        raise NoDeviceError(
            "expected a CUDA device that PyTorch can use (torch.cuda.is_available()), found none: install a build of "
            f"PyTorch for CUDA (this is {torch.__version__}) and the GPU's driver, or measure with --device cpu"
        )


def lack(nbytes: int) -> str:
    """Why `nbytes` cannot be allocated on the device; "" if they can."""
    free = torch.cuda.mem_get_info()[0]
    return "" if nbytes <= free else f"needs {nbytes / 2**30:.1f} GiB on the GPU, {free / 2**30:.1f} GiB are free"


@dataclass
class Captured:
    """A call as a CUDA graph.

    Attributes:
        call: what was captured; it keeps alive the memory that the graph works on.
        graph: of it.
    """

    call: Callable[[], object]
    graph: torch.cuda.CUDAGraph

    @classmethod
    def of(cls, call: Callable[[], object]) -> "Captured":
        """Capture a call that has run before, so that all of its kernels are compiled."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return cls(call, graph)

    def __call__(self) -> None:
        """Replay it."""
        self.graph.replay()


def peak_bytes(call: Callable[[], object], before: int) -> int:
    """Most bytes that stood allocated on the device during a call, beyond the `before` of others."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def clock() -> Callable[[Callable[[], object]], float]:
    """What times a call on the device, in seconds, with cold caches."""
    size = _FLUSHED * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    others = torch.zeros(max(size, 2**20) // 8, dtype=torch.int64, device=DEVICE)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(call: Callable[[], object]) -> float:
        # Read, not written: no dirty line waits to be written back. Meanwhile the host enqueues the rest.
        others.sum()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    return seconds


# ----------------------------------------------------------------------------------------------------------------- arms


@dataclass
class _Work:
    """An arm before it is captured: what to call, how many bytes that reads, and our error."""

    name: str
    call: Callable[[], object]
    nbytes: int
    error: float | None = None


def _step(shape: Shape, context: int) -> Step:
    step = Step.random(shape, context)
    names = "query", "key", "value", "positions", "mask"
    return replace(step, **{name: getattr(step, name).to(DEVICE) for name in names})


def dense(shape: Shape, context: int) -> Tensor:
    """Standard normal keys and values ``[2, batch, heads, context, head_dim]``, bfloat16."""
    sizes = (2, shape.batch, shape.heads, context, shape.head_dim)
    generator = torch.Generator(DEVICE).manual_seed(0)
    cache = torch.empty(sizes, dtype=torch.bfloat16, device=DEVICE)
    return cache.normal_(generator=generator)


def packed(shape: Shape, context: int, bits: int) -> tuple[CacheState, CacheState]:
    """Packed keys and values with `context` - 1 tokens, made on the CPU."""
    roles: tuple[Role, Role] = ("key", "value")
    generator = torch.Generator().manual_seed(0)
    states = []
    for role in roles:
        form = Format(role, bits, shape.head_dim, torch.bfloat16)
        state = CacheState.empty(form, shape.batch, shape.heads, context, "cpu")
        fill(state, context - 1, generator)
        states.append(CacheState(form, shape.batch, shape.heads, context, state.buffer.to(DEVICE)))
    return states[0], states[1]


def flash(query: Tensor, cache: Tensor) -> Tensor:
    """FlashAttention over grouped heads."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, cache[0], cache[1], enable_gqa=True)


def _read(buffer: Tensor) -> Callable[[], object]:
    flat = buffer.view(-1).view(torch.uint8)
    words = flat[: flat.numel() // 8 * 8].view(torch.int64)
    return words.sum


def _dense_work(step: Step, shape: Shape, context: int, families: tuple[str, ...]) -> Iterator[_Work]:
    cache = dense(shape, context)
    nbytes = shape.cache_bytes(context, torch.bfloat16)
    if "sdpa" in families:
        yield _Work("sdpa-bf16", lambda: flash(step.query, cache), nbytes)
    if "read" in families:
        yield _Work("read-bf16", _read(cache), nbytes)


def _packed_work(step: Step, shape: Shape, context: int, bits: int, families: tuple[str, ...]) -> Iterator[_Work]:
    key, value = packed(shape, context, bits)
    used = read_bytes(key) + read_bytes(value)

    def whole() -> Tensor:
        step.store(key, value)
        return step.attend(key, value)

    def both() -> None:
        for call in reads:
            call()

    if "attend" in families:
        room = not lack(2 * shape.cache_bytes(context, torch.bfloat16))
        error = step.error(key, value) if room else None
        yield _Work(f"attend-{bits}", lambda: step.attend(key, value), used, error)
    if "step" in families:
        yield _Work(f"step-{bits}", whole, used)
    if "read" in families:
        reads = [_read(state.buffer) for state in (key, value)]
        yield _Work(f"read-{bits}", both, key.nbytes + value.nbytes)


# ------------------------------------------------------------------------------------------------------------------ run


def _arms(
    kind: str, work: Callable[[], Iterator[_Work]], families: tuple[str, ...], needed: int
) -> Iterator[tuple[Arm, int | None]]:
    """Arms over one kind of cache, and the most bytes that each of them, its caches included, stood for."""
    if reason := lack(needed):
        yield from ((Arm(f"{family}-{kind}", note=reason), None) for family in families)
        return
    before = torch.cuda.memory_allocated()
    for one in work():
        try:
            peak = peak_bytes(one.call, before)
            call = Captured.of(one.call)
        except RuntimeError as error:  # of PyTorch's own kernels too: FlashAttention does not take every head size
            yield Arm(one.name, note=str(error).partition("\n")[0]), None
            continue
        yield Arm(one.name, call, one.nbytes, one.error), peak


@torch.no_grad()
def measure(shape: Shape, context: int, settings: Settings, tell: Callable[[str], object]) -> list[Row]:
    """Measures all arms at one context length; see `attention.measure`.

    Of the settings `bits`, `rounds` and those of `families` that are in `FAMILIES` count.
    """
    now = f"{shape.name}, {context} tokens"
    step = _step(shape, context)
    families = tuple(family for family in FAMILIES if family in settings.families)
    nbytes = shape.cache_bytes(context, torch.bfloat16)
    of_dense = tuple(family for family in families if family in ("sdpa", "read"))
    of_packed = tuple(family for family in families if family != "sdpa")
    arms: list[tuple[Arm, int | None]] = []
    if of_dense:
        tell(f"{now}: filling the dense cache")
        arms += _arms("bf16", partial(_dense_work, step, shape, context, families), of_dense, nbytes)
    for bits in sorted(settings.bits) if of_packed else ():
        tell(f"{now}: filling and checking {bits}-bit caches")
        work = partial(_packed_work, step, shape, context, bits, families)
        arms += _arms(str(bits), work, of_packed, nbytes)
    tell(now)
    calls = {arm.name: arm.call for arm, _ in arms if arm.call is not None}
    seconds = interleave(calls, rounds=settings.rounds, warm_up=WARM_UP, clock=clock())
    rows = [
        Row(shape.name, context, 0, arm.name, seconds.get(arm.name, []), arm.nbytes, arm.error, arm.note, peak=peak)
        for arm, peak in arms
    ]
    compare(rows)
    return rows
