"""Caches in which each sequence is written at positions of its own: requests of different lengths share a batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.end_to_end.harness import SMALL, assert_packed, distance, noise, packing, shown

BATCH, HEADS, SLOTS, CHANNELS, GROUPS = 3, 2, 48, 16, 2


class Ragged(nn.Module):
    """One layer; queries are [batch, heads, tokens, channels], positions [batch, tokens]."""

    def __init__(self, write, shape=(BATCH, HEADS, SLOTS, CHANNELS)):
        super().__init__()
        self.write = write
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(self, q, k, v, positions):
        mask = (torch.arange(SLOTS) <= positions[..., None])[:, None]
        keys, values = self.write(self.keys, k, positions), self.write(self.values, v, positions)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def heads_first(cache, new, positions):
    cache[torch.arange(BATCH)[:, None], :, positions] = new.transpose(1, 2)
    return cache


def slots_first(cache, new, positions):
    cache[torch.arange(BATCH).unsqueeze(1), positions] = new.transpose(1, 2)
    return cache.transpose(1, 2)


def batch_second(cache, new, positions):
    cache[positions, torch.arange(BATCH)[:, None]] = new.transpose(1, 2)
    return cache.permute(1, 2, 0, 3)


def flat_heads(cache, new, positions):
    cache[torch.arange(BATCH)[:, None], positions] = new.transpose(1, 2).flatten(2)
    return cache.unflatten(2, (HEADS, CHANNELS)).transpose(1, 2)


def scattered(cache, new, positions):
    return cache.scatter_(2, positions[:, None, :, None].expand_as(new), new)


def one_token(cache, new, positions):
    if new.shape[2] > 1:
        return heads_first(cache, new, positions)
    cache[torch.arange(BATCH), :, positions[:, 0]] = new[:, :, 0]
    return cache


WRITES = {
    heads_first: (BATCH, HEADS, SLOTS, CHANNELS),
    slots_first: (BATCH, SLOTS, HEADS, CHANNELS),
    batch_second: (SLOTS, BATCH, HEADS, CHANNELS),
    flat_heads: (BATCH, SLOTS, HEADS * CHANNELS),
    scattered: (BATCH, HEADS, SLOTS, CHANNELS),
    one_token: (BATCH, HEADS, SLOTS, CHANNELS),
}

# The first slots of each call, by sequence, and its tokens; the second sequence begins anew midway.
CALLS = [((0, 0, 0), 9), ((9, 4, 7), 1), ((10, 5, 8), 1), ((11, 6, 9), 6), ((17, 0, 15), 6), ((23, 6, 21), 1)]


def calls():
    generator = torch.Generator().manual_seed(0)
    for starts, tokens in CALLS:
        positions = torch.tensor(starts)[:, None] + torch.arange(tokens)
        q, k, v = (
            torch.randn(BATCH, heads, tokens, CHANNELS, generator=generator) for heads in (HEADS * GROUPS, HEADS, HEADS)
        )
        yield q, k, v, positions


@pytest.mark.parametrize(
    ("write", "bits"),
    [
        (heads_first, 16),
        *((write, 4) for write in WRITES),
        *(pytest.param(write, 16, marks=pytest.mark.slow) for write in WRITES if write is not heads_first),
    ],
)
@torch.no_grad()
def test_each_sequence_is_written_at_its_own_positions(write, bits):
    """At 16 bits it is the dense cache; at 4 bits the one that the handles show, with the call's own tokens exact."""
    model, twin = (Ragged(write, WRITES[write]) for _ in range(2))
    with packing(bits=bits, **SMALL) as session:
        compiled = torch.compile(model)
        for call in calls():
            before = twin if bits == 16 else shown(model)
            assert distance(compiled(*call), before(*call)) < noise(bits)
        assert_packed([model.keys, model.values])
    if bits == 16:
        torch.testing.assert_close(shown(model).keys, twin.keys)
    assert {(f.form, f.outcome) for f in session.report().findings} == {("sdpa, rebuilt", "rewritten")}


@torch.no_grad()
def test_a_dense_cache_is_taken_over_whatever_its_lengths():
    model, twin = Ragged(heads_first), Ragged(heads_first)
    first, *others = calls()
    first[-1][1] = torch.arange(20, 29)  # beyond what the next call writes
    for each in (model, twin):
        each(*first)
    with packing(bits=16, **SMALL):
        compiled = torch.compile(model)
        for call in others[:3]:
            assert distance(compiled(*call), twin(*call)) < noise(16)
        assert_packed([model.keys, model.values])
    torch.testing.assert_close(shown(model).keys, twin.keys)


@torch.no_grad()
def test_caches_that_calls_create_and_return():
    """The first call makes them of zeros, the others of those before; sequences have positions of their own."""

    def function(q, k, v, positions, caches):
        if caches is None:
            caches = [torch.zeros(BATCH, HEADS, SLOTS, CHANNELS) for _ in range(2)]
        places = positions[:, None, :, None].expand_as(k)
        keys, values = (cache.scatter(2, places, new) for cache, new in zip(caches, (k, v), strict=True))
        mask = (torch.arange(SLOTS) <= positions[..., None])[:, None]
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True), [keys, values]

    ours = theirs = None
    with packing(bits=16, **SMALL):
        compiled = torch.compile(function)
        for call in calls():
            got, ours = compiled(*call, ours)
            expected, theirs = function(*call, theirs)
            assert distance(got, expected) < noise(16)
            assert_packed(ours)
    torch.testing.assert_close(shown(ours)[0], theirs[0])
