"""An average of bits: caches of one model in different widths."""

import math

import pytest
import torch

from decoquant_compile import Options
from decoquant_compile.allocate import Holding
from tests.end_to_end.harness import SMALL, assert_packed, distance, feed, packing, static_cache, tensors
from tests.end_to_end.models import hugging_face, prompts


def widths(cache):
    return [tensor._state.format.bits for tensor in tensors(cache)]


def average(cache):
    sizes = [math.prod(tensor.shape) for tensor in tensors(cache)]
    return sum(b * n for b, n in zip(widths(cache), sizes, strict=True)) / sum(sizes)


@pytest.mark.parametrize("bits", [2.5, 4.0])
def test_a_hybrid_model_holds_an_average(bits):
    model, ids = hugging_face("gemma3"), prompts(1, 60)
    expected = feed(model, ids, [60], static_cache(model))
    with packing(bits=bits, **SMALL) as session:
        forward = torch.compile(model.forward)
        cache = static_cache(model)
        got = feed(forward, ids, [40, 1, 9, *[1] * 10], cache)
        assert_packed(tensors(cache))
    assert bits - 0.5 < average(cache) <= bits
    holdings = [
        Holding(role, math.prod(tensor.shape))
        for layer in cache.layers
        for role, tensor in (("key", layer.keys), ("value", layer.values))
    ]
    assert widths(cache) == Options(bits=bits).widths(holdings)
    sliding, full = widths(cache)[:2], widths(cache)[2:]
    assert sum(sliding) >= sum(full)
    outcomes = {finding.detail for finding in session.report().findings}
    assert outcomes == {f"K{key} V{value}" for key, value in (sliding, full)}
    assert 1e-4 < distance(got, expected) < 4


def test_graphs_agree_on_widths_over_caches_of_other_lengths():
    # A graph that wants another width than the one a cache is held in would unpack and encode it again, at every step.
    model, ids = hugging_face("gemma3"), prompts(1, 30)
    with packing(bits=3.2, **SMALL):
        forward = torch.compile(model.forward)
        for slots in (64, 96, 64, 80):
            cache = static_cache(model, slots=slots)
            feed(forward, ids[:, :20], [20], cache)
            held = [tensor._state for tensor in tensors(cache)]
            feed(forward, ids[:, 20:], [1] * 10, cache)
            assert [tensor._state for tensor in tensors(cache)] == held


def test_an_average_is_met_after_the_equal_width():
    model, ids = hugging_face("gemma3"), prompts(1, 20)
    held = []
    for bits in (4, 4.0):
        with packing(bits=bits, **SMALL):
            cache = static_cache(model)
            feed(torch.compile(model.forward), ids, [20], cache)
        held.append(widths(cache))
    assert held[0] == [4, 4, 4, 4] != held[1]
