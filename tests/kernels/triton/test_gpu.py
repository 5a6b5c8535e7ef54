"""The kernels on a GPU."""

import math
from random import Random

import pytest
import torch
from torch.nn import functional as F

import decoquant_compile
from decoquant_compile.kernels import ops
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState
from tests.kernels.cpu.cases import Write, Writer
from tests.kernels.cpu.test_attend import example, relative
from tests.kernels.cpu.test_store import assert_same, exact, run, tokens_of
from tests.kernels.triton.cases import BITS, attention
from tests.kernels.triton.test_attend import TOLERANCE

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(case):
    operands = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.operands]
    sink = None if case.sink is None else case.sink.to(DEVICE)
    return [*operands, case.keys.format.key(), case.values.format.key(), sink]


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_oracle(seed):
    case = attention(Random(seed))
    expected, got = case.expected(), ops.attend(*on_device(case)).cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    assert relative(got, expected) <= TOLERANCE[got.dtype]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_caches(bits, head_dim):
    case = example(3000, slots=4096, bits=(bits, bits), head_dim=head_dim, value_dim=head_dim, groups=4)
    assert relative(ops.attend(*on_device(case)).cpu(), case.expected()) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("bits", BITS)
def test_dequantise(bits):
    case = example(300, slots=400, bits=(bits, bits), head_dim=128, value_dim=128)
    for state in (case.keys, case.values):
        dense = state.read()
        operands = state.buffer.to(DEVICE), 2, 2, 400
        got = ops.dequantise(*operands, state.format.key()).cpu()
        torch.testing.assert_close(got, dense, atol=1e-5, rtol=2**-7)
        start = torch.tensor(200, device=DEVICE)
        part = ops.dequantise_stretch(*operands, 50, 150, state.format.key(), None, start).cpu()
        torch.testing.assert_close(part, dense[:, :, 250:], atol=1e-5, rtol=2**-7)


def test_captured_in_a_graph():
    """No synchronisation with the host: a step is captured once and replayed on a cache that has changed."""
    case, later = example(100, slots=400, bits=(4, 4)), example(300, slots=400, bits=(4, 4))
    operands = on_device(case)
    ops.attend(*operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attend(*operands)
    graph.replay()
    assert relative(out.cpu(), case.expected()) <= TOLERANCE[out.dtype]
    for to, source in zip(operands, on_device(later), strict=True):
        if isinstance(to, torch.Tensor):
            to.copy_(source)
    graph.replay()
    assert relative(out.cpu(), later.expected()) <= TOLERANCE[out.dtype]


class OnDevice:
    """Stands where `cases.Write` expects the C++ kernels: writes to a copy of the state on the device."""

    def store(self, state, new, positions, query, mask, slots, shift, first, key, rows=None):
        on = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in (state, new, positions, query, mask, rows)]
        ops.store(*on[:5], slots, shift, first, key, on[5])
        state.copy_(on[0])


def assert_writes_like_the_oracle(write, state):
    truth, expected = exact(write, state), state.clone()
    write.expected(expected)
    write.apply(OnDevice(), state)
    assert_same(state, expected, truth)


@pytest.mark.parametrize("seed", range(40))
def test_any_writes_equal_the_oracle(seed):
    writer = Writer(Random(seed))
    for _ in range(6):
        assert_writes_like_the_oracle(writer.write(), writer.state)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("role", "head_dim"), [("key", 128), ("value", 128), ("key", 256), ("value", 64)])
def test_a_prompt_and_then_tokens(role, head_dim, bits):
    """A chunk with the first fit in it, single tokens over the next refit, a chunk."""
    state = CacheState.empty(Format(role, bits, head_dim, torch.bfloat16), 2, 4, 1024, "cpu")
    new = tokens_of(state, 700)
    query = tokens_of(state, 700, seed=1).repeat(1, 2, 1, 1)
    for a, b in ((0, 200), *((t, t + 1) for t in range(200, 310)), (310, 700)):
        write = Write(new[:, :, a:b], run(a, b), query[:, :, a:b] if role == "key" else None)
        assert_writes_like_the_oracle(write, state)


LAYERS, BATCH, HEADS, GROUPS, HEAD_DIM, SLOTS = 2, 2, 2, 4, 64, 2048
WIDTH = HEADS * GROUPS * HEAD_DIM


def model(x, positions, weights, caches):
    """Layers of attention over static caches, written by position and read under a causal mask."""
    column = torch.arange(SLOTS, device=x.device)
    mask = column[None, :] <= positions[:, None]
    for projection, (keys, values) in zip(weights, caches, strict=True):
        q, k, v = (x @ projection).split((WIDTH, HEADS * HEAD_DIM, HEADS * HEAD_DIM), -1)
        q, k, v = (y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for y in (q, k, v))
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        out = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        x = x + out.transpose(1, 2).flatten(2)
    return x


class Decoding:
    """The model with its weights and caches on the device."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        columns = WIDTH + 2 * HEADS * HEAD_DIM
        self.weights = [
            (torch.randn(WIDTH, columns, generator=generator) / math.sqrt(WIDTH)).to(DEVICE, torch.bfloat16)
            for _ in range(LAYERS)
        ]
        self.caches = [
            [torch.zeros(BATCH, HEADS, SLOTS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
            for _ in range(LAYERS)
        ]
        self.inputs = torch.randn(BATCH, 600, WIDTH, generator=generator).to(DEVICE, torch.bfloat16)

    def tensors(self):
        return [cache for pair in self.caches for cache in pair]

    @torch.no_grad()
    def decode(self, forward, chunks):
        """Outputs of all tokens, fed in chunks."""
        rows, at = [], 0
        for size in chunks:
            positions = torch.arange(at, at + size, device=DEVICE)
            out = forward(self.inputs[:, at : at + size].clone(), positions, self.weights, self.caches)
            rows.append(out.clone())  # a graph's next replay writes there again
            at += size
        return torch.cat(rows, 1)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_compiled_model(bits, mode):
    """Many steps, so that graphs are warmed up, recorded and replayed: what they tell is what the eager model tells."""
    torch.compiler.reset()
    chunks = [300, *(1,) * 40]
    expected = Decoding().decode(model, chunks)
    plain = Decoding()
    with decoquant_compile.enable(bits=bits, mode=mode) as session:
        step = torch.compile(model, dynamic=False)
        got = plain.decode(step, chunks)
    assert all(finding.rewritten for finding in session.report().findings)
    assert all(isinstance(cache, decoquant_compile.CacheTensor) for cache in plain.tensors())
    assert got.isfinite().all()
    # The prompt is attended exactly, tokens behind it by their codes.
    assert relative(got[:, :300].cpu(), expected[:, :300].cpu()) <= 2e-2
    assert relative(got[:, 300:].cpu(), expected[:, 300:].cpu()) <= (2e-2 if bits == 16 else 0.15)


def test_replayed_graphs_tell_what_launches_tell():
    """The same numbers to the bit, with CUDA graphs and without."""
    chunks = [300, *(1,) * 40]
    outputs = []
    for mode in (None, "reduce-overhead"):
        torch.compiler.reset()
        with decoquant_compile.enable(bits=4, mode=mode):
            outputs.append(Decoding().decode(torch.compile(model, dynamic=False), chunks))
    assert torch.equal(*outputs)


def test_steps_are_captured():
    """With `mode="reduce-overhead"` no step is left out of the graphs."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    with decoquant_compile.enable(bits=4, mode="reduce-overhead", fullgraph=True):
        decoding, step = Decoding(), torch.compile(model, dynamic=False)
        decoding.decode(step, [300, *(1,) * 8])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            decoding.decode(step, [300, 1])
    assert counters["inductor"]["cudagraph_skips"] == 0
    names = [event.key for event in profile.key_averages()]
    assert any("GraphLaunch" in name for name in names), names


def test_no_dense_cache_is_made():
    """Neither held, nor for a moment: of a step, and of the take-over beyond the cache that is taken over."""
    slots = 2**16
    shape = (1, HEADS, slots, HEAD_DIM)
    dense = 2 * math.prod(shape) * 2  # keys and values of a layer, in bfloat16

    def layer(q, k, v, positions, keys, values):
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    torch.compiler.reset()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    caches = [torch.randn(shape, device=DEVICE).bfloat16() for _ in range(2)]
    q = torch.randn(1, HEADS * GROUPS, 1, HEAD_DIM, device=DEVICE).bfloat16()
    k, v = (torch.randn(1, HEADS, 1, HEAD_DIM, device=DEVICE).bfloat16() for _ in range(2))
    positions = torch.tensor([slots - 1], device=DEVICE)
    with torch.no_grad(), decoquant_compile.enable(bits=4) as session:
        step = torch.compile(layer, dynamic=False)
        step(q, k, v, positions, *caches)
        step(q, k, v, positions, *caches)
        assert all(finding.rewritten for finding in session.report().findings)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - base
        torch.cuda.reset_peak_memory_stats()
        step(q, k, v, positions, *caches)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - base
    assert held < 0.35 * dense
    assert peak < 0.5 * dense
