"""Writes that are spelled in unusual ways: functional ones of slices, indices of 32 bits, conversions of nothing."""

import pytest
import torch
from torch.nn import functional as F

from decoquant_compile import CacheTensor
from tests.end_to_end.harness import NOISE, SMALL, packing, write_forms

SLOTS, HEADS, CHANNELS, BATCH = 64, 2, 16, 3


def attention(q, keys, values, mask=None):
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def project(x):
    """Queries, keys and values of hidden states ``[batch, tokens, 4 * HEADS * CHANNELS]``."""
    parts = x.unflatten(-1, (4 * HEADS, CHANNELS)).transpose(1, 2)
    return parts[:, : 2 * HEADS], parts[:, 2 * HEADS : 3 * HEADS], parts[:, 3 * HEADS :]


def slice_scatter(x, at, mask, cache):
    q, *new = project(x)
    keys, values = (torch.slice_scatter(c, n, 2, at, at + n.shape[2]) for c, n in zip(cache, new, strict=True))
    return attention(q, keys, values, mask), (keys, values)


def slots_around(x, at, mask, cache):
    q, *new = project(x)
    keys, values = (
        torch.cat([c[:, :, :at], n, c[:, :, at + n.shape[2] :]], 2) for c, n in zip(cache, new, strict=True)
    )
    return attention(q, keys, values, mask), (keys, values)


def short_indices(x, at, mask, cache):
    q, *new = project(x)
    positions = torch.arange(at, at + q.shape[2], dtype=torch.int32)
    for c, n in zip(cache, new, strict=True):
        c[:, :, positions] = n
    return attention(q, *cache, mask), cache


def short_indices_of_sequences(x, at, mask, cache):
    q, *new = project(x)
    lengths = torch.zeros(BATCH, dtype=torch.int32) + at
    for c, n in zip(cache, new, strict=True):
        c[torch.arange(BATCH), :, lengths] = n[:, :, 0]
    return attention(q, *cache, mask), cache


def converted(x, at, mask, cache):
    q, *new = project(x)
    for c, n in zip(cache, new, strict=True):
        c.to(n.dtype)[:, :, at : at + n.shape[2]] = n.type_as(c)
    return attention(q, *(c.type_as(q) for c in cache), mask), cache


def converted_stack(x, at, mask, cache):
    q, k, v = project(x)
    keys, values = cache.unbind(0)
    keys, values = torch.cat((keys.type_as(k), k), 2), torch.cat((values.to(v.dtype), v), 2)
    return attention(q, keys, values, mask[..., : keys.shape[2]]), torch.stack((keys, values))


CHUNKS, ONE_BY_ONE = [20, 1, 1, 7, 1, 1, 1], [1] * 12
MODELS = {
    slice_scatter: ("slice", "sdpa", CHUNKS),
    slots_around: ("slice", "sdpa", CHUNKS),
    short_indices: ("index_put", "sdpa", CHUNKS),
    short_indices_of_sequences: ("index_put", "sdpa, rebuilt", ONE_BY_ONE),
    converted: ("slice", "sdpa", CHUNKS),
    converted_stack: ("cat", "sdpa", CHUNKS),
}


def fresh(model):
    if model is converted_stack:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(2, BATCH, HEADS, 5, CHANNELS, generator=generator)
    return tuple(torch.zeros(BATCH, HEADS, SLOTS, CHANNELS) for _ in range(2))


def calls(chunks, held):
    """Hidden states, first position and mask of each call."""
    generator, at = torch.Generator().manual_seed(0), held
    for tokens in chunks:
        positions = torch.arange(at, at + tokens)
        hidden = torch.randn(BATCH, tokens, 4 * HEADS * CHANNELS, generator=generator)
        yield hidden, at, (torch.arange(SLOTS) <= positions[:, None])[None, None]
        at += tokens


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_at_16_bits_it_is_the_dense_model(model):
    write, form, chunks = MODELS[model]
    cache, twin = fresh(model), fresh(model)
    with packing(bits=16) as session:
        compiled = torch.compile(model)
        for call in calls(chunks, 5 if model is converted_stack else 0):
            expected, twin = model(*call, twin)
            got, cache = compiled(*call, cache)
            torch.testing.assert_close(got, expected, atol=NOISE, rtol=NOISE)
            for mine, theirs in [(cache, twin)] if model is converted_stack else zip(cache, twin, strict=True):
                assert isinstance(mine, CacheTensor)
                torch.testing.assert_close(mine.dense(), theirs, atol=0, rtol=0)
    assert write_forms(session) == {write}
    assert {finding.form for finding in session.report().findings} == {form}


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_at_few_bits(model):
    chunks = [30 if MODELS[model][2] is CHUNKS else 1, *[1] * 12]
    cache, twin = fresh(model), fresh(model)
    with packing(bits=8, **SMALL):
        compiled = torch.compile(model)
        for call in calls(chunks, 5 if model is converted_stack else 0):
            expected, twin = model(*call, twin)
            got, cache = compiled(*call, cache)
            assert (got - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("at", [SLOTS, -SLOTS - 1, 3 * SLOTS])
@torch.no_grad()
def test_an_index_outside_of_the_cache_is_refused(at):
    """It must not wrap around to another slot."""

    def put(x, positions, mask, cache):
        q, *new = project(x)
        for c, n in zip(cache, new, strict=True):
            c[:, :, positions] = n
        return attention(q, *cache, mask)

    cache = fresh(put)
    compiled = torch.compile(put, backend="decoquant", options={"bits": 16})
    torch.compiler.reset()
    for x, first, mask in calls([1, 1], 0):
        compiled(x, torch.tensor([first]), mask, cache)
    compiled(x, torch.tensor([-1]), mask, cache)
    assert cache[0][:, :, -1].any()
    held = cache[0].dense()
    with pytest.raises(IndexError, match="outside the cache"):
        compiled(x, torch.tensor([at]), mask, cache)
    assert torch.equal(cache[0].dense(), held)
