"""A cache that one graph writes several times, and reads after each: chunks of a prompt, decode steps unrolled."""

import copy

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from tests.end_to_end.harness import NOISE, SMALL, assert_packed, distance, noise, packing, shown

SLOTS, HEADS, KV_HEADS, CHANNELS, VOCAB = 64, 4, 2, 32, 50
WIDTH = HEADS * CHANNELS


def by_index(cache, positions, tokens):
    cache.index_copy_(2, positions, tokens)


def by_slice(cache, positions, tokens):
    cache[:, :, positions] = tokens


class Attention(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write = write
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * CHANNELS) for _ in range(2))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, KV_HEADS, SLOTS, CHANNELS))

    def forward(self, x, positions):
        q, k, v = (f(x).unflatten(2, (-1, CHANNELS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        self.write(self.keys, positions, k)
        self.write(self.values, positions, v)
        mask = torch.arange(SLOTS) <= positions[:, None]
        y = F.scaled_dot_product_attention(q, self.keys, self.values, mask, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, write=by_index):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(Attention(write) for _ in range(2))
        for parameter in self.parameters():
            parameter.data *= 2

    @property
    def caches(self):
        return [cache for layer in self.layers for cache in (layer.keys, layer.values)]

    def step(self, ids, positions):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x, positions)
        return self.head(x)


class Chunked(Model):
    """A prompt in chunks."""

    def forward(self, ids, positions):
        pairs = zip(ids.split(5, 1), positions.split(5), strict=True)
        return torch.cat([self.step(*pair) for pair in pairs], 1)


class Drafting(Model):
    """Two tokens more, which later calls overwrite."""

    def forward(self, ids, positions):
        logits = [self.step(ids, positions)]
        for further in (1, 2):
            token = logits[-1][:, -1:].argmax(-1)
            logits.append(self.step(token, positions[-1:] + further))
        return torch.cat(logits, 1)


@pytest.mark.parametrize("write", [by_index, by_slice])
@pytest.mark.parametrize("kind", [Chunked, Drafting])
@torch.no_grad()
def test_at_16_bits_it_is_the_dense_model(kind, write):
    model = kind(write)
    twin = copy.deepcopy(model)
    ids, at = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(1)), 0
    with packing(bits=16):
        forward = torch.compile(model)
        for tokens in (13, 1, 1, 1, 7, 1):
            call = ids[:, at : at + tokens], torch.arange(at, at + tokens)
            assert distance(forward(*call), twin(*call)) < NOISE
            at += tokens
        assert_packed(model.caches)
    for cache, expected in zip(model.caches, twin.caches, strict=True):
        assert distance(cache.dense(), expected) < NOISE


class OwnFirst(Model):
    """The first chunk attends to its own tokens alone, as prompts do in Mistral's code."""

    def forward(self, ids, positions):
        first, rest = ids[:, :5], ids[:, 5:]
        x = self.embedding(first)
        for layer in self.layers:
            q, k, v = (f(x).unflatten(2, (-1, CHANNELS)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
            layer.write(layer.keys, positions[:5], k)
            layer.write(layer.values, positions[:5], v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + layer.out(y.transpose(1, 2).flatten(2))
        return torch.cat([self.head(x), self.step(rest, positions[5:])], 1)


@torch.no_grad()
def test_a_chunk_that_attends_to_its_own_tokens():
    model = OwnFirst()
    twin = copy.deepcopy(model)
    with packing(bits=16):
        forward = torch.compile(model)
        for tokens in (13, 9):
            call = torch.randint(VOCAB, (2, tokens)), torch.arange(tokens)
            assert distance(forward(*call), twin(*call)) < NOISE
    for cache, expected in zip(model.caches, twin.caches, strict=True):
        assert distance(cache.dense(), expected) < NOISE


@pytest.mark.parametrize("kind", [Chunked, Drafting])
@torch.no_grad()
def test_at_4_bits_a_step_reads_what_the_step_before_stored(kind):
    """Each compiled call is the same as its steps one by one, in as many compiled calls."""
    model, alone = kind(), kind()
    ids, at = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1)), 0
    with packing(bits=4, **SMALL):
        forward, step = torch.compile(model), torch.compile(alone.step)
        for tokens in (25, 1, 1, 10, 1):
            call = ids[:, at : at + tokens], torch.arange(at, at + tokens)
            alone.step = step
            assert distance(forward(*call), alone(*call)) < 10 * noise(4)
            at += tokens
        for cache, other in zip(model.caches, alone.caches, strict=True):
            assert distance(cache.dense(), other.dense()) < 10 * noise(4)


class Growing(nn.Module):
    """Several tokens one by one, each appended to keys and values that the caller hands in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * CHANNELS) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def forward(self, keys, values, *parts):
        outs = []
        for part in parts:
            q, k, v = (f(part).unflatten(2, (-1, CHANNELS)).transpose(1, 2) for f in (self.q, self.k, self.v))
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - q.shape[2])
            outs.append(F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True))
        return torch.cat(outs, 2), keys, values


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_a_cache_that_grows_several_times_in_a_call(dynamic):
    model = Growing()
    cache = [torch.randn(2, KV_HEADS, 7, CHANNELS) for _ in range(2)]
    dense = [x.clone() for x in cache]
    with packing(bits=16) as session:
        forward = torch.compile(model, dynamic=dynamic)
        for tokens, steps in ((4, 2), (4, 2), (3, 3), (1, 1), (9, 3)):
            before, earlier = dense, cache
            parts = torch.randn(2, tokens, WIDTH).chunk(steps, 1)
            out, *cache = forward(*cache, *parts)
            expected, *dense = model(*dense, *parts)
            assert distance(out, expected) < NOISE
            assert all(torch.equal(a.dense(), b) for a, b in zip(cache, dense, strict=True))
            for a, b in zip(earlier, before, strict=True):
                assert torch.equal(shown(a), b)
        assert_packed(cache)
    assert {finding.write for graph in session.report().graphs for finding in graph.findings} == {"cat"}


@torch.no_grad()
def test_a_growing_step_reads_what_the_step_before_stored():
    model = Growing()
    at_once = one_by_one = [torch.randn(2, KV_HEADS, 40, CHANNELS) for _ in range(2)]
    with packing(bits=4, **SMALL):
        forward = torch.compile(model)
        for _ in range(4):
            parts = torch.randn(2, 3, WIDTH).split(1, 1)
            out, *at_once = forward(*at_once, *parts)
            outs = []
            for part in parts:
                other, *one_by_one = forward(*one_by_one, part)
                outs.append(other)
            assert distance(out, torch.cat(outs, 2)) < noise(4)
            assert all(distance(a.dense(), b.dense()) < noise(4) for a, b in zip(at_once, one_by_one, strict=True))


@pytest.mark.parametrize("grows", [False, True])
@torch.no_grad()
def test_the_compiled_graph_makes_no_copy_of_a_state(grows):
    model = Growing() if grows else Chunked()
    if grows:
        call = [*(torch.randn(2, KV_HEADS, 7, CHANNELS) for _ in range(2)), *torch.randn(2, 6, WIDTH).chunk(3, 1)]
    else:
        call = [torch.zeros(2, 15, dtype=torch.int64), torch.arange(15)]
    with packing(bits=4):
        _, codes = run_and_get_code(torch.compile(model), *call)
    code = "".join(codes)
    assert code.count("torch.ops.decoquant.store_in_turn_v1.default(") == 3 * 2 * (1 if grows else len(model.layers))
    assert "torch.uint8" not in code.partition("def get_args")[0].partition("def call")[2]
