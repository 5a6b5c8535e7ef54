"""Caches in memory that was not cleared: slots that nothing has written hold anything, and harm nobody."""

import pytest
import torch
from torch.nn import functional as F

from decoquant_compile.kernels.state import CacheState
from tests.end_to_end.harness import SMALL, distance, packing

BATCH, HEADS, SLOTS, CHANNELS = 2, 2, 64, 32


def by_slice(q, k, v, start: int, cache):
    """What is written is read, as a prefix."""
    end = start + k.shape[2]
    for x, new in zip(cache, (k, v), strict=True):
        x[:, :, start:end] = new
    causal = torch.ones(k.shape[2], end, dtype=torch.bool).tril(start)
    return F.scaled_dot_product_attention(q, cache[0][:, :, :end], cache[1][:, :, :end], causal)


def by_index(q, k, v, start, cache):
    """All slots are read, behind a mask."""
    positions = start + torch.arange(k.shape[2])
    for x, new in zip(cache, (k, v), strict=True):
        x.index_copy_(2, positions, new)
    return F.scaled_dot_product_attention(q, *cache, torch.arange(SLOTS) <= positions[:, None])


def rebuilt(q, k, v, start: int, cache):
    """Keys that are turned after they are read."""
    end = start + k.shape[2]
    for x, new in zip(cache, (k, v), strict=True):
        x[:, :, start:end] = new
    turned = cache[0][:, :, :end] * torch.arange(end)[:, None].cos()
    causal = torch.ones(k.shape[2], end, dtype=torch.bool).tril(start)
    return F.scaled_dot_product_attention(q, turned, cache[1][:, :, :end], causal)


def first_sequences(q, k, v, start: int, cache):
    """Of a cache with room for more."""
    end = start + k.shape[2]
    for x, new in zip(cache, (k, v), strict=True):
        x[:1, :, start:end] = new[:1]
    causal = torch.ones(k.shape[2], end, dtype=torch.bool).tril(start)
    return F.scaled_dot_product_attention(q[:1], cache[0][:1, :, :end], cache[1][:1, :, :end], causal)


def returned(q, k, v, start, cache):
    """The cache is not written in place but made anew."""
    positions = start + torch.arange(k.shape[2])
    cache[:] = [x.index_copy(2, positions, new) for x, new in zip(cache, (k, v), strict=True)]
    return F.scaled_dot_product_attention(q, *cache, torch.arange(SLOTS) <= positions[:, None])


def calls(model):
    generator, start = torch.Generator().manual_seed(0), 0
    for tokens in [30, *[1] * 10]:
        qkv = [torch.randn(BATCH, HEADS, tokens, CHANNELS, generator=generator) for _ in range(3)]
        yield *qkv, torch.tensor(start) if model in (by_index, returned) else start
        start += tokens


@pytest.mark.parametrize("model", [by_slice, by_index, rebuilt, first_sequences, returned])
@pytest.mark.parametrize("size", [1e2, 1e6])
@torch.no_grad()
def test_after_an_eager_prefill(model, size):
    held = [torch.randn(BATCH, HEADS, SLOTS, CHANNELS) * size for _ in range(2)]
    cache, twin = ([x.clone() for x in held] for _ in range(2))
    with packing(bits=8, **SMALL):
        compiled = torch.compile(model)
        for number, call in enumerate(calls(model)):
            got, expected = (compiled if number else model)(*call, cache), model(*call, twin)
            assert distance(got, expected) < 0.1


def ring(q, k, v, start, cache):
    """All slots are read."""
    positions = (start + torch.arange(k.shape[2])) % SLOTS
    for x, new in zip(cache, (k, v), strict=True):
        x.index_copy_(2, positions, new)
    return F.scaled_dot_product_attention(q, *cache)


def masked_ring(q, k, v, start, cache):
    """So are they here once it has turned."""
    positions = (start + torch.arange(k.shape[2])) % SLOTS
    for x, new in zip(cache, (k, v), strict=True):
        x.index_copy_(2, positions, new)
    return F.scaled_dot_product_attention(q, *cache, (torch.arange(SLOTS) <= start)[None])


@pytest.mark.parametrize(("model", "writes"), [(by_index, 2), (ring, 1), (masked_ring, 1)])
@torch.no_grad()
def test_a_ring_that_has_turned_is_fitted_as_a_whole(model, writes, monkeypatch):
    """What stands behind the tokens that it writes is older, not anything."""
    seen, write = [], CacheState.write

    def record(self, new, positions, **kwargs):
        seen.append(positions.tolist())
        write(self, new, positions, **kwargs)

    monkeypatch.setattr(CacheState, "write", record)
    cache = [torch.randn(1, HEADS, SLOTS, CHANNELS) for _ in range(2)]
    place = 10
    with packing(bits=4):
        call = [torch.randn(1, HEADS, 1, CHANNELS) for _ in range(3)]
        torch.compile(model)(*call, torch.tensor(place if model is by_index else SLOTS + place), cache)
    assert seen[:writes] == seen[writes:]
    older, newer = list(range(place, SLOTS)), list(range(place))
    assert seen[:writes] == ([older, newer] if writes == 2 else [older + newer])
