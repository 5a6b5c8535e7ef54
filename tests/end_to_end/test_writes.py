"""Ways to write a cache by hand: each gives what the dense model gives."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.end_to_end.harness import NOISE, SMALL, assert_packed, distance, noise, packing, shown, write_forms
from tests.end_to_end.models import SLOTS, CacheModel, prompts, steps


def attend(layer, q, keys, values, mask):
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def scatter(cache, positions, tokens):
    cache.scatter_(2, positions.view(1, 1, -1, 1).expand_as(tokens), tokens)


def where(cache, positions, tokens):
    cache.copy_(torch.where((torch.arange(SLOTS) == positions).view(1, 1, SLOTS, 1), tokens, cache))


def blend(cache, positions, tokens):
    hot = (torch.arange(SLOTS) == positions).view(1, 1, SLOTS, 1).to(tokens.dtype)
    cache.mul_(1 - hot).add_(hot * tokens)


def put(cache, positions, tokens):
    cache[:, positions] = tokens


def first_sequences(cache, positions, tokens):
    cache[: tokens.shape[0]].index_copy_(2, positions, tokens)


def first_sequences_put(cache, positions, tokens):
    cache[: tokens.shape[0], :, positions] = tokens


def channels_before_slots(cache, positions, tokens):
    cache[:, :, :, positions] = tokens


ONE_BY_ONE, CHUNKS = [1] * 6, [30, 1, 7, 1, 1, 20, 1]
WRITES = {
    # write: (chunks, form, dims of the cache)
    scatter: (CHUNKS, "scatter", (0, 1, 2, 3)),
    where: (ONE_BY_ONE, "where", (0, 1, 2, 3)),
    blend: (ONE_BY_ONE, "where", (0, 1, 2, 3)),
    put: (CHUNKS, "index_put", (0, 2, 1, 3)),
    channels_before_slots: (CHUNKS, "index_put", (0, 1, 3, 2)),
    first_sequences: (CHUNKS, "index_copy", (0, 1, 2, 3)),
    first_sequences_put: (CHUNKS, "index_put", (0, 1, 2, 3)),
}


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_at_16_bits_it_is_the_dense_model(write):
    chunks, form, order = WRITES[write]
    model = CacheModel(attend, write=write, order=order, batch=3 if write.__name__.startswith("first_sequences") else 2)
    twin = copy.deepcopy(model)
    with packing(bits=16) as session:
        forward = torch.compile(model.forward)
        for call in steps(prompts(2, sum(chunks)), chunks):
            assert distance(forward(*call), twin(*call)) < NOISE
        assert_packed(model.caches)
    assert write_forms(session) == {form}
    assert {f.form for f in session.report().findings} == {"sdpa"}


@torch.no_grad()
def test_a_part_of_the_batch_leaves_the_rest():
    model = CacheModel(attend, write=first_sequences, batch=3)
    with packing(bits=4, **SMALL):
        forward = torch.compile(model.forward)
        for call in steps(prompts(3, sum(CHUNKS)), CHUNKS):
            forward(*call)
        for call in steps(prompts(2, sum(CHUNKS), seed=1), CHUNKS):
            before = shown(model)
            got, after = forward(*call), shown(model)
            for now, expected in zip(after.caches, before.caches, strict=True):
                assert torch.equal(now[2], expected[2])
            assert distance(got, after(*call)) < noise(4)  # it writes what is read exactly
        assert_packed(model.caches)


@torch.no_grad()
def test_a_window_that_moves_by_what_overflows():
    """Pointers count in Python; a window that is not full gets several tokens more than it has room for."""
    slots = 16

    def model(q, k, v, held: int, cache):
        tokens = k.shape[2]
        if (over := held + tokens - slots) > 0:
            for x in cache:
                x[:, :, :-over] = x[:, :, over:].clone()
            held -= over
        for x, new in zip(cache, (k, v), strict=True):
            x[:, :, held : held + tokens] = new
        end = held + tokens
        causal = torch.ones(tokens, end, dtype=torch.bool).tril(held)
        return F.scaled_dot_product_attention(q, cache[0][:, :, :end], cache[1][:, :, :end], causal)

    cache, twin = ([torch.zeros(2, 2, slots, 16) for _ in range(2)] for _ in range(2))
    held = 0
    with packing(bits=16) as session:
        compiled = torch.compile(model)
        for tokens in (12, 2, 3, 1, 5):
            call = [torch.randn(2, 2, tokens, 16) for _ in range(3)]
            assert distance(compiled(*call, held, cache), model(*call, held, twin)) < NOISE
            assert all(torch.equal(x.dense(), y) for x, y in zip(cache, twin, strict=True))
            held = min(held + tokens, slots)
    assert write_forms(session) == {"slice", "roll"}


class Counting(torch.nn.Module):
    """The next slot is a buffer that each call moves, as in Flax ports and torchtune's cache."""

    def __init__(self, move):
        super().__init__()
        self.move = move
        self.register_buffer("index", torch.zeros((), dtype=torch.int64))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, 2, SLOTS, 16))

    def forward(self, q, k, v):
        positions = self.index + torch.arange(k.shape[2])
        self.keys[:, :, positions], self.values[:, :, positions] = k, v
        self.move(self, k.shape[2])
        return F.scaled_dot_product_attention(q, self.keys, self.values, torch.arange(SLOTS) <= positions[:, None])


def by_operator(module, tokens):
    module.index += tokens


def by_method(module, tokens):
    module.index.add_(tokens)


def by_assignment(module, tokens):
    module.index = module.index + tokens


@pytest.mark.parametrize("move", [by_operator, by_method, by_assignment])
@torch.no_grad()
def test_a_counter_beside_the_cache(move):
    model = Counting(move)
    twin = copy.deepcopy(model)
    with packing(bits=16) as session:
        forward = torch.compile(model)
        for tokens in (7, 1, 1, 4):
            call = [torch.randn(2, 2, tokens, 16) for _ in range(3)]
            assert distance(forward(*call), twin(*call)) < NOISE
            assert torch.equal(model.index, twin.index)
    assert write_forms(session) == {"index_put"}
