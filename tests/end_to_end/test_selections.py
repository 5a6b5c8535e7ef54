"""Sequences or slots of a growing cache that a graph selects itself: beams reordered, tokens rolled back, windows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import decoquant_compile
from decoquant_compile import CacheTensor
from tests.end_to_end.harness import NOISE, SMALL, distance, noise, packing

BATCH, HEADS, KV_HEADS, CHANNELS, WIDTH, WINDOW = 3, 4, 2, 16, 32, 11


def rolled_back(cache, beams, length):
    return cache[:, :, :length]


def window(cache, beams, length):
    return cache[:, :, -WINDOW:]


def reordered(cache, beams, length):
    return cache.index_select(0, beams)


def indexed(cache, beams, length):
    return cache[beams]


def both(cache, beams, length):
    return cache[beams][:, :, :length]


def cut_then_indexed(cache, beams, length):
    return cache[:, :, :length][beams]


def from_the_end(cache, beams, length):
    return cache[beams - BATCH]


def chosen(cache, beams, length):
    """By an index that is computed."""
    return cache.index_select(0, (beams + 1) % BATCH)


def unchanged(cache, beams, length):
    return cache


SELECTIONS = [rolled_back, window, reordered, indexed, both, cut_then_indexed, from_the_end, chosen]


class Model(nn.Module):
    def __init__(self, before=unchanged, after=unchanged):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = before, after
        heads = (HEADS, KV_HEADS, KV_HEADS)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, h * CHANNELS) for h in heads)

    def forward(self, x, past, beams, length: int):
        q, k, v = (f(x).unflatten(2, (-1, CHANNELS)).transpose(1, 2) for f in self.projections)
        if past is not None:
            old = [self.before(cache, beams, length) for cache in past]
            k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return out, [self.after(cache, beams, length + x.shape[1]) for cache in (k, v)]


# Tokens of each call, and how many of those before it are rolled back.
CALLS = [(14, 0), (1, 0), (1, 1), (3, 2), (1, 0), (1, 0), (1, 3), (1, 0)]


@torch.no_grad()
def conversation(step):
    """The result and the cache of each call of `step(x, past, beams, length)`."""
    generator = torch.Generator().manual_seed(0)
    past, found = None, []
    for tokens, back in CALLS:
        x = torch.randn(BATCH, tokens, WIDTH, generator=generator) * 2
        beams = torch.randint(BATCH, (BATCH,), generator=generator)
        length = (0 if past is None else past[0].shape[2]) - back
        out, past = step(x, past, beams, length)
        found.append((out, past))
    return found


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    ("selection", "dynamic"), [*((selection, None) for selection in SELECTIONS), (rolled_back, True), (indexed, True)]
)
def test_at_16_bits_it_is_the_dense_model(selection, place, dynamic):
    model = Model(**{place: selection})
    with packing(bits=16):
        found = conversation(torch.compile(model, dynamic=dynamic))
    for (out, past), (expected, dense) in zip(found, conversation(model), strict=True):
        assert distance(out, expected) < NOISE
        assert all(isinstance(cache, CacheTensor) for cache in past)
        assert all(torch.equal(cache.dense(), other) for cache, other in zip(past, dense, strict=True))


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("selection", [window, both])
def test_at_4_bits_it_is_what_a_handle_gives_between_calls(selection, place):
    inside, outside = Model(**{place: selection}), Model()

    with packing(bits=4, **SMALL):
        found = conversation(torch.compile(inside))
    with packing(bits=4, **SMALL):
        compiled = torch.compile(outside)

        def step(x, past, beams, length):
            if past is not None and place == "before":
                past = [selection(cache, beams, length) for cache in past]
            out, past = compiled(x, past, beams, length)
            after = length + x.shape[1]
            return out, [selection(cache, beams, after) if place == "after" else cache for cache in past]

        expected = conversation(step)
    for (out, past), (other, caches) in zip(found, expected, strict=True):
        assert distance(out, other) < noise(4)
        assert all(distance(a.dense(), b.dense()) < noise(4) for a, b in zip(past, caches, strict=True))


@pytest.mark.parametrize("place", ["before", "after"])
@torch.no_grad()
def test_sequences_that_are_no_first_dim(place):
    """Slots, sequences, heads, channels."""

    class SlotsFirst(Model):
        def forward(self, x, past, beams, length: int):
            q, k, v = (f(x).unflatten(2, (-1, CHANNELS)).transpose(0, 1) for f in self.projections)
            if past is not None:
                old = [cache[:, beams] if place == "before" else cache for cache in past]
                k, v = torch.cat([old[0], k]), torch.cat([old[1], v])
            mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            out = F.scaled_dot_product_attention(*(t.permute(1, 2, 0, 3) for t in (q, k, v)), mask, enable_gqa=True)
            return out, [cache[:, beams] if place == "after" else cache for cache in (k, v)]

    model = SlotsFirst()
    with packing(bits=16):
        found = conversation(torch.compile(model))
    for (out, past), (expected, dense) in zip(found, conversation(model), strict=True):
        assert distance(out, expected) < NOISE
        assert all(isinstance(cache, CacheTensor) for cache in past)
        assert all(torch.equal(cache.dense(), other) for cache, other in zip(past, dense, strict=True))


@torch.no_grad()
def test_the_cache_that_is_selected_from_stays_what_it_is():
    model = Model(before=reordered)
    with packing(bits=16):
        compiled = torch.compile(model)
        x = torch.randn(BATCH, 9, WIDTH)
        _, past = compiled(x, None, torch.arange(BATCH), 1)
        before = [cache.dense() for cache in past]
        one, first = compiled(x[:, :1], past, torch.tensor([2, 2, 0]), 1)
        two, second = compiled(x[:, :1], past, torch.tensor([0, 1, 2]), 1)
    assert all(torch.equal(cache.dense(), dense) for cache, dense in zip(past, before, strict=True))
    for out, caches, beams in ((one, first, [2, 2, 0]), (two, second, [0, 1, 2])):
        expected, dense = model(x[:, :1], before, torch.tensor(beams), 1)
        assert distance(out, expected) < NOISE
        assert all(torch.equal(a.dense(), b) for a, b in zip(caches, dense, strict=True))


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_index_that_the_graph_changes_afterwards(place):
    class Changing(Model):
        def forward(self, x, past, beams, length: int):
            out, past = super().forward(x, past, beams, length)
            beams.add_(1).remainder_(BATCH)
            return (out, beams), past

    model = Changing(**{place: indexed})
    with packing(bits=16):
        found = conversation(torch.compile(model))
    for ((out, _), past), ((expected, _), dense) in zip(found, conversation(model), strict=True):
        assert distance(out, expected) < NOISE
        assert all(torch.equal(cache.dense(), other) for cache, other in zip(past, dense, strict=True))


@torch.no_grad()
def test_an_index_that_comes_from_another_cache():
    one, two = Model(), Model()

    def step(x, past, others):
        beams = torch.arange(BATCH) if others is None else others[0][:, 0, 0, 0].argsort()
        out, past = one(x, past if past is None else [cache[beams] for cache in past], beams, 0)
        other, others = two(2 * x, others, beams, 0)
        return out + other, past, others

    torch.compiler.reset()
    with decoquant_compile.enable(bits=16) as session:
        compiled, given, expected = torch.compile(step), (None, None), (None, None)
        for tokens in (9, 1, 1, 1):
            x = torch.randn(BATCH, tokens, WIDTH)
            got, *given = compiled(x, *given)
            want, *expected = step(x, *expected)
            assert distance(got, want) < NOISE
            for caches, dense in zip(given, expected, strict=True):
                assert all(torch.equal(a.dense(), b) for a, b in zip(caches, dense, strict=True))
    assert all(finding.rewritten for graph in session.report().graphs for finding in graph.findings)


def with_one_more(cache, beams, length):
    return torch.cat([cache[beams], cache[:, :, :1]], 2)


def other_heads(cache, beams, length):
    return cache.flip(0)[:, torch.tensor([1, 0])]


def fewer_channels(cache, beams, length):
    """Whatever stands in the place of the channels left out."""
    return F.pad(cache[..., 1:], (1, 0))


@pytest.mark.filterwarnings("ignore:decoquant_compile")
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("selection", [with_one_more, other_heads, fewer_channels])
def test_what_is_no_selection_of_sequences_or_slots_stays_in_the_graph(selection, place):
    model = Model(**{place: selection})
    torch.compiler.reset()
    with decoquant_compile.enable(bits=16):
        found = conversation(torch.compile(model))
    for (out, past), (expected, dense) in zip(found, conversation(model), strict=True):
        assert distance(out, expected) < NOISE
        assert all(distance(cache.clone(), other) < NOISE for cache, other in zip(past, dense, strict=True))


def copied(cache, beams):
    cache.copy_(cache[beams])


def assigned(cache, beams):
    cache[:] = cache.index_select(0, beams)


def from_the_end_in_place(cache, beams):
    cache.copy_(cache[beams - BATCH])


def heads_swapped(cache, beams):
    cache.copy_(cache[:, (beams[:KV_HEADS] > 1).long()])


class Static(Model):
    """Buffers whose sequences each call reorders before it writes."""

    def __init__(self, reorder):
        super().__init__()
        self.reorder = reorder
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(BATCH, KV_HEADS, SLOTS, CHANNELS))

    def forward(self, x, positions, beams):
        q, k, v = (f(x).unflatten(2, (-1, CHANNELS)).transpose(1, 2) for f in self.projections)
        for cache, new in ((self.keys, k), (self.values, v)):
            self.reorder(cache, beams)
            cache.index_copy_(2, positions, new)
        mask = torch.arange(SLOTS) <= positions[:, None]
        return F.scaled_dot_product_attention(q, self.keys, self.values, mask, enable_gqa=True)


SLOTS = 24


@torch.no_grad()
def in_place(model, step):
    generator = torch.Generator().manual_seed(0)
    length, found = 0, []
    for tokens, _ in CALLS:
        x = torch.randn(BATCH, tokens, WIDTH, generator=generator) * 2
        beams = torch.randint(BATCH, (BATCH,), generator=generator)
        out = step(x, torch.arange(length, length + tokens), beams)
        found.append((out, model.keys.clone(), model.values.clone()))
        length += tokens
    return found


@pytest.mark.parametrize("reorder", [copied, assigned, from_the_end_in_place])
@pytest.mark.parametrize("bits", [16, 8])
def test_static_caches_are_reordered_in_place(reorder, bits):
    model, dense = Static(reorder), Static(reorder)
    with packing(bits=bits, **SMALL) as session:
        found = in_place(model, torch.compile(model))
    assert isinstance(model.keys, CacheTensor)
    assert {finding.outcome for graph in session.report().graphs for finding in graph.findings} == {"rewritten"}
    for (out, keys, values), (expected, *caches) in zip(found, in_place(dense, dense), strict=True):
        assert distance(out, expected) < (NOISE if bits == 16 else 0.05)
        if bits == 16:
            assert torch.equal(keys.dense(), caches[0])
            assert torch.equal(values.dense(), caches[1])


def test_reordering_in_place_moves_codes_as_they_are():
    """As a handle does between calls."""
    inside, outside = Static(copied), Static(lambda cache, beams: None)

    def step(x, positions, beams):
        if isinstance(outside.keys, CacheTensor):
            outside.keys, outside.values = outside.keys[beams], outside.values[beams]
        return compiled(x, positions, beams)

    with packing(bits=4, **SMALL):
        found = in_place(inside, torch.compile(inside))
    with packing(bits=4, **SMALL):
        compiled = torch.compile(outside)
        expected = in_place(outside, step)
    for (out, *caches), (other, *others) in zip(found, expected, strict=True):
        assert torch.equal(out, other)
        assert all(torch.equal(cache.dense(), dense.dense()) for cache, dense in zip(caches, others, strict=True))


@pytest.mark.filterwarnings("ignore:decoquant_compile")
def test_another_dim_reordered_in_place_stays_in_the_graph():
    model, dense = Static(heads_swapped), Static(heads_swapped)
    torch.compiler.reset()
    with decoquant_compile.enable(bits=16):
        found = in_place(model, torch.compile(model))
    assert not isinstance(model.keys, CacheTensor)
    for got, expected in zip(found, in_place(dense, dense), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:decoquant_compile")
def test_a_call_that_must_run_dense_reorders_once():
    model, dense = Static(copied), Static(copied)
    held = model.keys.view(-1)  # its memory cannot be given up
    torch.compiler.reset()
    with decoquant_compile.enable(bits=16):
        found = in_place(model, torch.compile(model))
    assert held.data_ptr() == model.keys.data_ptr()
    for (out, *_), (expected, *_) in zip(found, in_place(dense, dense), strict=True):
        assert distance(out, expected) < NOISE
