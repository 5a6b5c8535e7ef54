"""The kernels on a GPU."""

from random import Random

import pytest
import torch

from decoquant_compile.kernels import ops
from tests.kernels.cpu.test_attend import example, relative
from tests.kernels.triton.cases import BITS, attention
from tests.kernels.triton.test_attend import TOLERANCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(case):
    operands = [x.cuda() if isinstance(x, torch.Tensor) else x for x in case.operands]
    sink = None if case.sink is None else case.sink.cuda()
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
        got = ops.dequantise(state.buffer.cuda(), 2, 2, 400, state.format.key()).cpu()
        torch.testing.assert_close(got, dense, atol=1e-5, rtol=2**-7)


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
