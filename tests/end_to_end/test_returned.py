"""Caches that are written in place and returned as well, as code does that would rather be functional."""

import pytest
import torch
from torch.nn import functional as F

from decoquant_compile import CacheTensor
from tests.end_to_end.harness import NOISE, SMALL, packing

SLOTS, HEADS, CHANNELS = 64, 2, 16


def attention(q, keys, values, mask):
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def index_copy(q, k, v, positions, mask, cache):
    keys, values = (c.index_copy_(2, positions, x) for c, x in zip(cache, (k, v), strict=True))
    return attention(q, keys, values, mask), (keys, values)


def assigned(q, k, v, positions, mask, cache):
    keys, values = cache
    keys[:, :, positions] = k
    values[:, :, positions] = v
    return attention(q, keys, values, mask), cache


def returned_twice(q, k, v, positions, mask, cache):
    out, (keys, values) = index_copy(q, k, v, positions, mask, cache)
    return out, (keys, values), keys, values


def only_keys(q, k, v, positions, mask, cache):
    out, (keys, _) = index_copy(q, k, v, positions, mask, cache)
    return out, (keys, cache[1])


def scaled(q, k, v, positions, mask, cache):
    """Keys whose codes attention cannot read: rebuilt."""
    keys, values = (c.index_copy_(2, positions, x) for c, x in zip(cache, (k, v), strict=True))
    return attention(q, keys * torch.arange(CHANNELS), values, mask), (keys, values)


MODELS = [index_copy, assigned, returned_twice, only_keys, scaled]


def fresh():
    return tuple(torch.zeros(2, HEADS, SLOTS, CHANNELS) for _ in range(2))


def calls(chunks):
    """Queries, keys, values, positions and mask of each call."""
    generator, at = torch.Generator().manual_seed(0), 0
    for tokens in chunks:
        normal = [torch.randn(2, h, tokens, CHANNELS, generator=generator) for h in (2 * HEADS, HEADS, HEADS)]
        positions = torch.arange(at, at + tokens)
        at += tokens
        yield *normal, positions, (torch.arange(SLOTS) <= positions[:, None])[None, None]


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_what_is_returned_is_the_cache(model):
    chunks = [20, 1, 1, 7, 1, 1]
    cache, twin = fresh(), fresh()
    first = cache
    with packing(bits=16):
        compiled = torch.compile(model)
        for call in calls(chunks):
            expected, twin, *_ = model(*call, twin)
            got, cache, *again = compiled(*call, cache)
            torch.testing.assert_close(got, expected, atol=NOISE, rtol=NOISE)
            for mine, given, theirs in zip(cache, first, twin, strict=True):
                assert mine is given
                assert isinstance(mine, CacheTensor)
                torch.testing.assert_close(mine.dense(), theirs, atol=0, rtol=0)
            assert all(x is y for x, y in zip(again, cache, strict=False))


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_at_few_bits(model):
    cache, twin = fresh(), fresh()
    with packing(bits=8, **SMALL) as session:
        compiled = torch.compile(model)
        for call in calls([30, *[1] * 10]):
            expected, twin, *_ = model(*call, twin)
            got, cache, *_ = compiled(*call, cache)
            assert ((got - expected).norm() / expected.norm()) < 0.05
    assert {finding.form for finding in session.report().findings} == {"sdpa, rebuilt" if model is scaled else "sdpa"}


@torch.no_grad()
def test_a_cache_that_cannot_be_taken_over_is_returned_dense():
    cache, twin = fresh(), fresh()
    views = [x.view(-1) for x in cache]  # somebody would miss the memory
    torch.compiler.reset()
    compiled = torch.compile(index_copy, backend="decoquant")
    for call in calls([5, 1]):
        with pytest.warns(UserWarning, match="stays dense"):  # once for each graph
            got, cache = compiled(*call, cache)
        expected, twin = index_copy(*call, twin)
        torch.testing.assert_close(got, expected, atol=NOISE, rtol=NOISE)
        assert all(type(x) is torch.Tensor for x in cache)
        assert all(torch.equal(a.view(-1), b) for a, b in zip(cache, views, strict=True))
