"""Operations on a handle that torch.compile traces, in one graph."""

import threading
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import decoquant_compile
from decoquant_compile import CacheTensor, _compat
from decoquant_compile.kernels.format import Format
from decoquant_compile.takeover import Claim, take_over

HEADS, SLOTS, CHANNELS = 2, 8, 4

READS = {
    "unflatten": lambda t: t.unflatten(2, (HEADS, CHANNELS)),
    "unflatten by keyword": lambda t: t.unflatten(dim=-1, sizes=(HEADS, CHANNELS)),
    "torch.unflatten": lambda t: torch.unflatten(t, 2, (HEADS, CHANNELS)),
    "split": lambda t: torch.stack(t.split(CHANNELS, 2), 2),
    "torch.split": lambda t: torch.stack(torch.split(t, CHANNELS, dim=2), 2),
    "chunk": lambda t: torch.stack(t.chunk(HEADS, 2), 2),
    "view": lambda t: t.view(*t.shape[:2], HEADS, CHANNELS),
    "iterated": lambda t: torch.stack(list(t)).unflatten(2, (HEADS, CHANNELS)),
    "length": lambda t: t.view(len(t), SLOTS, HEADS, CHANNELS),
    "property": lambda t: t.mT.mT.view(1, SLOTS, HEADS, CHANNELS),
}


def compared(step, cache, twin, sizes, **how):
    """Calls of so many tokens each, compiled over `cache`, that give what they give plainly over `twin`."""
    torch.compiler.reset()
    in_place = lambda gm, example_inputs, config_patches=None: gm.forward
    with mock.patch.object(_compat, "compile_fx", in_place), decoquant_compile.enable(bits=16):
        compiled = torch.compile(step, **how)
        for tokens in sizes:
            call = torch.arange(tokens), torch.rand(1, tokens, HEADS * CHANNELS), torch.randn(1, HEADS, 2, CHANNELS)
            torch.testing.assert_close(compiled(cache, *call), step(twin, *call))
            yield tokens


@pytest.mark.parametrize("name", READS)
@torch.no_grad()
def test_one_graph(name):
    def step(cache, positions, new, query):
        cache.index_copy_(1, positions, new)
        keys = READS[name](cache).transpose(1, 2)
        return F.scaled_dot_product_attention(query, keys, keys)

    cache = torch.zeros(1, SLOTS, HEADS * CHANNELS)
    for _ in compared(step, cache, cache.clone(), (3, 1, 1), fullgraph=True):
        assert type(cache) is CacheTensor


POINTWISE = {
    "1 - t": lambda t: 1 - t,
    "1 / t": lambda t: 1 / (t + 9) + 1 / t.exp(),
    "2 ** t": lambda t: 2**t,
    "5 % t": lambda t: 5 % t,
    "5 // t": lambda t: 5 // t,
    "2 * t + 1": lambda t: 2 * t + 1,
    "t ** 2": lambda t: t**2,
    "t // 2": lambda t: t // 2,
    "t % 2": lambda t: t % 2,
    "x @ t": lambda t: torch.ones(3, SLOTS) @ t,
}


@pytest.mark.filterwarnings("ignore:decoquant_compile:UserWarning")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", POINTWISE)
@torch.no_grad()
def test_arithmetic(name, dynamic):
    def step(cache, positions, new, query):
        cache.index_copy_(1, positions, new)
        keys = cache.unflatten(2, (HEADS, CHANNELS)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, keys, keys), POINTWISE[name](cache).nan_to_num(0)

    cache = torch.rand(1, SLOTS, HEADS * CHANNELS) + 0.5
    take_over([Claim(cache, (0, (), 1, 2), Format("key", 16, 8, torch.float32, 1, 2))], lengths=[None], masks=[None])
    assert len(list(compared(step, cache, cache.dense(), (3, 1, 2), dynamic=dynamic))) == 3


@torch.no_grad()
def test_a_frame_that_is_left_to_python():
    """Dynamo looks at every function that is called from there, ours too."""

    @torch.compiler.disable(recursive=False)
    def lengths(t):
        return t.shape[1], t.size(1), t.mT.shape[2], t.dim()

    cache = torch.rand(1, SLOTS, HEADS * CHANNELS)
    expected = lengths(cache)
    take_over([Claim(cache, (0, (), 1, 2), Format("key", 16, 8, torch.float32, 1, 2))], lengths=[None], masks=[None])
    torch.compiler.reset()
    compiled = torch.compile(lambda t: (lengths(t), t.shape[0]), backend=decoquant_compile.decoquant_backend)
    assert compiled(cache) == (expected, 1)


NORM = torch.nn.RMSNorm(CHANNELS)

IN_PYTHON = {  # functions that ask again whether an argument is of a subclass
    "F.pad": lambda t: F.pad(t, (0, 0, 0, 1))[:, :, :-1],
    "RMSNorm": NORM,
    "F.rms_norm": lambda t: F.rms_norm(t, (CHANNELS,)),
    "norm": lambda t: t / t.norm(dim=-1, keepdim=True),
    "torch.norm": lambda t: t / torch.norm(t, p=2, dim=-1, keepdim=True),
    "F.normalize": lambda t: F.normalize(t, dim=-1),
    "F.layer_norm": lambda t: F.layer_norm(t, (CHANNELS,)),
    "F.threshold": lambda t: F.threshold(t, 0.1, 0.0),
    "einsum": lambda t: torch.einsum("bhsd,de->bhse", t, torch.eye(CHANNELS)),
    "iterated": lambda t: torch.stack(list(t)),
}


@pytest.mark.parametrize("write", ["index_copy", "setitem"])
@pytest.mark.parametrize("name", IN_PYTHON)
@torch.no_grad()
def test_functions_in_python_after_a_write(name, write):
    def step(cache, positions, new, query):
        new = new.unflatten(2, (HEADS, CHANNELS)).transpose(1, 2)
        if write == "index_copy":
            cache.index_copy_(2, positions, new)
        else:
            cache[:, :, positions] = new
        keys = IN_PYTHON[name](cache)
        return F.scaled_dot_product_attention(query, keys, keys)

    cache = torch.rand(1, HEADS, SLOTS, CHANNELS) + 0.1
    for _ in compared(step, cache, cache.clone(), (3, 1, 1), fullgraph=True):
        assert type(cache) is CacheTensor


@torch.no_grad()
def test_a_handle_is_used_while_another_thread_compiles():
    """`torch.compiler.is_compiling` is a flag of the process."""

    def step(cache, positions, new, query):
        cache.index_copy_(1, positions, new)
        keys = cache.unflatten(2, (HEADS, CHANNELS)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, keys, keys)

    cache, entered, may_go = torch.zeros(1, SLOTS, HEADS * CHANNELS), threading.Event(), threading.Event()

    def slow(gm, example_inputs):
        entered.set()
        assert may_go.wait(60)
        return gm.forward

    twin, compiled = cache.clone(), torch.compile(step, backend="decoquant", options={"bits": 16})

    def call(tokens):
        given = torch.arange(tokens), torch.rand(1, tokens, HEADS * CHANNELS), torch.randn(1, HEADS, 2, CHANNELS)
        torch.testing.assert_close(compiled(cache, *given), step(twin, *given))

    torch.compiler.reset()
    for tokens in (3, 1, 1):
        call(tokens)
    other = threading.Thread(target=lambda: torch.compile(lambda x: x + 1, backend=slow)(torch.ones(3)))
    other.start()
    try:
        assert entered.wait(60)
        call(1)
        assert torch.equal(cache + 1, twin + 1)
        assert torch.equal(cache[:, :2].clone(), twin[:, :2])
    finally:
        may_go.set()
        other.join()
