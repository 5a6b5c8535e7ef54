"""Softmax spelled out: folded where it is one, along the last dim, in an attention."""

import pytest
import torch
import torch.nn.functional as F

from decoquant_compile.patterns import eager, softmax
from tests.graphs import CHANNELS, HEADS, SLOTS, capture, queries

K, V = torch.randn(2, HEADS, SLOTS, CHANNELS)


def quotient(x):
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def by_max(x):
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return e / e.sum(3, True)


def by_logarithms(x):
    return (x - x.logsumexp(-1, keepdim=True)).exp()


def of_logarithms(x):
    return F.log_softmax(x, -1).exp()


def folded(weigh, after=lambda w: w @ V):
    """(graph, result before, result after) of attention with weights `weigh(logits)`."""
    inputs = []

    def compiler(gm, example_inputs):
        inputs.append(example_inputs)
        return gm.forward

    recorder, _ = capture(lambda q: after(weigh(q @ K.mT * 0.3)), queries(heads=HEADS), compiler=compiler)
    (normal,) = recorder.graphs
    before = normal.gm(*inputs[0])
    softmax.fold(normal.graph)
    normal.gm.recompile()
    return normal.graph, before, normal.gm(*inputs[0])


def softmaxes(graph):
    return [node for node in graph.nodes if node.target in eager.SOFTMAX]


@pytest.mark.parametrize("weigh", [quotient, by_max, by_logarithms, of_logarithms])
def test_it_becomes_the_operator(weigh):
    graph, before, after = folded(weigh)
    (node,) = softmaxes(graph)
    assert eager.is_attention(node)
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    torch.testing.assert_close(after, before)


def another_maximum(x):
    e = (x - (x + 1).amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def another_sum(x):
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / (e + 1).sum(-1, keepdim=True)


def another_dim(x):
    e = (x - x.amax(-2, keepdim=True)).exp()
    return e / e.sum(-2, keepdim=True)


def two_dims(x):
    e = (x - x.amax((-1, -2), keepdim=True)).exp()
    return e / e.sum((-1, -2), keepdim=True)


def without_a_maximum(x):
    return x.exp() / x.exp().sum(-1, keepdim=True)


def upside_down(x):
    return (x.logsumexp(-1, keepdim=True) - x).exp()


@pytest.mark.parametrize("weigh", [another_maximum, another_sum, another_dim, two_dims, without_a_maximum, upside_down])
def test_near_misses_stay(weigh):
    graph, before, after = folded(weigh)
    assert not softmaxes(graph)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_what_weighs_no_values_stays():
    graph, before, after = folded(quotient, after=lambda w: w.sum())
    assert not softmaxes(graph)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
