"""Caches that are stored packed and rebuilt in each call: what reads them is no attention that is rewritten."""

import copy
from itertools import accumulate

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

import decoquant_compile
from decoquant_compile.coverage.idioms import HEAD_DIM, LAYERS, Decoder, Handwritten, Idiom
from decoquant_compile.patterns import blocks
from tests.end_to_end import models
from tests.end_to_end.harness import (
    NOISE,
    SMALL,
    assert_packed,
    distance,
    noise,
    packing,
    shown,
    static_cache,
    tensors,
    write_forms,
)
from tests.end_to_end.models import CHANNELS, HEADS, KV_HEADS, SLOTS, CacheModel, hugging_face, prompts, rotated, steps

CHUNKS = [30, 1, 7, 1, 1, 20, 1]


def rotary_after_the_cache(layer, q, keys, values, mask):
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    return F.scaled_dot_product_attention(q, rotated(keys, torch.arange(SLOTS)), values, mask)


def latent(layer, q, keys, values, mask):
    """Keys and values are linear maps of both caches, as in multi-head latent attention."""
    both = torch.cat([keys, values], -1).transpose(1, 2).flatten(2)
    k, v = layer.up(both).view(*both.shape[:2], HEADS, -1).transpose(1, 2).chunk(2, -1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def weights_are_used_twice(layer, q, keys, values, mask):
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    weights = (q @ keys.mT * 0.25).masked_fill(~mask, -1e9).softmax(-1)
    return weights @ values * weights.amax(-1, keepdim=True)


def sink(layer, q, keys, values, mask):
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    logits = (q @ keys.mT * 0.25).masked_fill(~mask, -1e9)
    return torch.cat([logits, logits[..., :1] * 0 + 1], -1).softmax(-1)[..., :-1] @ values


def tiled_heads(layer, q, keys, values, mask):
    keys, values = (x.repeat(1, HEADS // KV_HEADS, 1, 1) for x in (keys, values))
    return F.scaled_dot_product_attention(q, keys, values, mask)


def chosen_blocks(layer, q, keys, values, mask):
    """The queries see the blocks of keys whose greatest elements they like best."""
    limits = keys.unflatten(2, (-1, 8)).amax(3).repeat_interleave(HEADS // KV_HEADS, 1)
    best = (q @ limits.mT).amax(2, keepdim=True).topk(4).indices
    seen = torch.zeros(*q.shape[:2], 1, SLOTS // 8).scatter(3, best, 1.0).repeat_interleave(8, 3) > 0
    seen = mask & (seen | (torch.arange(SLOTS) >= SLOTS - 8) | (torch.arange(SLOTS) < 8))
    return F.scaled_dot_product_attention(q, keys, values, seen, enable_gqa=True)


def bias_by_values(layer, q, keys, values, mask):
    bias = torch.tanh(values.transpose(1, 2).flatten(2) @ layer.up.weight[:HEADS, : values.shape[1] * CHANNELS].T)
    bias = bias.transpose(1, 2)[:, :, None].masked_fill(~mask, -1e9)
    return F.scaled_dot_product_attention(q, keys, values, bias, enable_gqa=True)


@pytest.fixture
def whole(request, monkeypatch):
    """Whether caches are rebuilt as a whole; otherwise, where keys and values allow it, 16 slots at a time."""
    if request.param:  # else a length that the compiler does not know is taken for a great one
        monkeypatch.setattr(blocks, "is_long", lambda _: False)
    else:
        monkeypatch.setattr(blocks, "LENGTH", 16)
    return request.param


def assert_in_blocks(session, whole):
    """What is rebuilt by blocks says so, and is."""
    details = {finding.detail.endswith("in blocks") for finding in session.report().findings}
    assert details == {not whole}


READS = [rotary_after_the_cache, latent, weights_are_used_twice, sink, tiled_heads, chosen_blocks, bias_by_values]


def forms(session):
    return {finding.form for finding in session.report().findings}


@pytest.mark.parametrize(
    ("read", "whole"),
    [*((read, True) for read in READS), (rotary_after_the_cache, False), (latent, False)],
    indirect=["whole"],
)
@torch.no_grad()
def test_at_16_bits_it_is_the_dense_model(read, whole):
    model = CacheModel(read)
    twin = copy.deepcopy(model)
    with packing(bits=16) as session:
        forward = torch.compile(model.forward)
        for call in steps(prompts(1, sum(CHUNKS)), CHUNKS):
            assert distance(forward(*call), twin(*call)) < NOISE
        assert_packed(model.caches)
    assert all(form.endswith("rebuilt") for form in forms(session))
    assert_in_blocks(session, whole or read in (weights_are_used_twice, sink))


@pytest.mark.parametrize(
    ("order", "whole"),
    [((0, 1, 2, 3), True), ((0, 2, 1, 3), False), ((2, 0, 1, 3), True), ((2, 0, 1, 3), False), ((0, 1, 3, 2), False)],
    indirect=["whole"],
)
@torch.no_grad()
def test_it_is_the_dense_model_over_the_cache_that_the_handles_show(order, whole):
    """The call's own tokens are read exactly: the twin writes them again."""
    model = CacheModel(rotary_after_the_cache, order=order)
    with packing(bits=3, **SMALL) as session:
        forward = torch.compile(model.forward)
        for call in steps(prompts(1, sum(CHUNKS)), CHUNKS):
            before = shown(model)
            assert distance(forward(*call), before(*call)) < noise(3)
        assert_packed(model.caches)
    assert forms(session) == {"sdpa, rebuilt"}
    assert_in_blocks(session, whole)


@pytest.mark.parametrize(
    ("attention", "bits", "whole"),
    [("sdpa", 16, True), pytest.param("eager", 16, False, marks=pytest.mark.slow), ("sdpa", 4, False)],
    indirect=["whole"],
)
@torch.no_grad()
def test_latent_attention_of_hugging_face(attention, bits, whole):
    model, ids = hugging_face("deepseek_v3", attention), prompts(1, 9 + sum(CHUNKS))
    with packing(bits=bits, **SMALL) as session:
        forward, cache = torch.compile(model.forward), static_cache(model, early=False)
        model(input_ids=ids[:, :9], past_key_values=cache)
        twin = copy.deepcopy(cache)
        for number, tokens in enumerate(ids[:, 9:].split(CHUNKS, 1)):
            got = forward(input_ids=tokens, past_key_values=cache).logits
            expected = model(input_ids=tokens, past_key_values=twin).logits
            if bits == 16 or number:  # the first call reads what it packs
                assert distance(got, expected) < noise(bits), number
            twin = twin if bits == 16 else shown(cache)
        assert_packed(tensors(cache))
    assert_in_blocks(session, whole)


@pytest.mark.parametrize(
    ("attention", "bits"),
    [*(pytest.param(name, 16, marks=pytest.mark.slow) for name in ("sdpa", "eager")), ("sdpa", 4)],
)
@torch.no_grad()
def test_latent_attention_over_growing_caches(attention, bits, monkeypatch):
    monkeypatch.setattr(blocks, "LENGTH", 16)
    model = hugging_face("deepseek_v3", attention)
    chunks = [20, *[1] * 8, 5, *[1] * 12]
    ids = prompts(1, sum(chunks))
    cache, at = DynamicCache(config=model.config), 0
    with packing(bits=bits, **SMALL) as session:
        forward = torch.compile(model.forward)
        for tokens in ids.split(chunks, 1):
            twin = shown(cache) if at else DynamicCache(config=model.config)
            got = forward(input_ids=tokens, past_key_values=cache).logits
            expected = model(input_ids=tokens, past_key_values=twin).logits
            assert distance(got, expected) < noise(bits), at
            at += tokens.shape[1]
            assert tensors(cache)[0].shape == tensors(twin)[0].shape
            assert_packed(tensors(cache))
    assert write_forms(session) == {"cat"}


@torch.no_grad()
def test_latent_attention_over_caches_that_the_prefill_creates():
    model, ids = hugging_face("deepseek_v3"), prompts(1, 26)
    cache, twin = static_cache(model, early=False), static_cache(model, early=False)
    with packing(bits=16, **SMALL):
        forward = torch.compile(model.forward)
        for tokens in ids.split([20, 1, 1, 4], 1):
            got = forward(input_ids=tokens, past_key_values=cache).logits
            expected = model(input_ids=tokens, past_key_values=twin).logits
            assert distance(got, expected) < NOISE
            assert_packed(tensors(cache))


@pytest.mark.parametrize("bits", [16, 3])
@torch.no_grad()
def test_a_growing_cache_whose_keys_are_rotated_after_every_read(bits):
    """Its tokens come before its heads; an older version of it stays what it is. Of a token of zeros it makes nan."""

    def step(q, k, v, past):
        k, v = (torch.cat([old, new], 1) for old, new in zip(past, (k, v), strict=True))
        turned, values = rotated(k.transpose(1, 2), torch.arange(k.shape[1])), v.transpose(1, 2)
        if bits == 16:  # codes may give a zero, too
            values = values * (values / values)
        return F.scaled_dot_product_attention(q.transpose(1, 2), turned, values), (k, v)

    def tokens(count):
        return [torch.randn(2, count, HEADS, CHANNELS) for _ in range(3)]

    past = tuple(torch.randn(2, 20, HEADS, CHANNELS) for _ in range(2))
    with packing(bits=bits, **SMALL):
        compiled = torch.compile(step)
        _, past = compiled(*tokens(1), past)
        for count in (1, 1, 3, 1, 1):
            new = tokens(count)
            expected, _ = step(*new, [x.dense() for x in past])
            got, after = compiled(*new, past)
            assert distance(got, expected) < noise(bits)
            if bits == 16:  # else what an older handle shows has left the window
                other, _ = compiled(*tokens(count), past)
                again, _ = compiled(*new, past)
                assert distance(other, expected) > 0.1
                assert distance(again, expected) < NOISE
            past = after
            assert_packed(past)


@pytest.mark.parametrize("grows", [False, True])
@torch.no_grad()
def test_a_cache_that_a_call_only_reads(grows):
    """As in cross-attention, here with a rotary embedding after it."""

    def first(q, k, v, keys, values):
        if grows:
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        else:
            keys.index_copy_(2, torch.arange(20), k), values.index_copy_(2, torch.arange(20), v)
        return F.scaled_dot_product_attention(q, keys, values), (keys, values) if grows else ()

    def later(q, keys, values):
        return F.scaled_dot_product_attention(q, rotated(keys, torch.arange(keys.shape[2])), values)

    q, k, v = (torch.randn(1, HEADS, 20, CHANNELS) for _ in range(3))
    caches = [torch.randn(1, HEADS, 24, CHANNELS) for _ in range(2)]
    with packing(bits=3, **SMALL):
        _, grown = torch.compile(first)(q, k, v, *caches)
        caches = grown or caches
        compiled = torch.compile(later)
        for _ in range(4):
            q = torch.randn(1, HEADS, 1, CHANNELS)
            assert distance(compiled(q, *caches), later(q, *(x.dense() for x in caches))) < noise(3)
            assert_packed(caches)


def peak(call):
    """Bytes that a call holds at most."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in changes))


@pytest.mark.parametrize("whole", [True], indirect=True)
@torch.no_grad()
def test_one_layer_is_dense_at_a_time(monkeypatch, whole):
    monkeypatch.setattr(models, "SLOTS", 4096)
    peaks = []
    for layers in (2, 5):
        model = CacheModel(tiled_heads, layers=layers)
        with packing(bits=4, **SMALL):
            forward = torch.compile(model.forward)
            for at in (0, 1, 2):
                forward(prompts(1, 1), torch.tensor([at]))
            peaks.append(peak(lambda: forward(prompts(1, 1), torch.tensor([3]))))  # noqa: B023
            assert_packed(model.caches)
    layer = 2 * KV_HEADS * models.SLOTS * CHANNELS * 4
    assert peaks[0] > layer  # else it measures nothing
    assert peaks[1] - peaks[0] < 3 * layer / 2


@torch.no_grad()
def test_a_block_is_dense_at_a_time(monkeypatch):
    """What a call takes does not grow with the cache: keys and values of all slots would."""
    peaks = []
    for slots in (4096, 16384):
        monkeypatch.setattr(models, "SLOTS", slots)
        model = CacheModel(latent)
        with packing(inductor={}, bits=4, **SMALL) as session:
            forward = torch.compile(model.forward)
            for at in (0, 1, slots - 2):
                forward(prompts(1, 1), torch.tensor([at]))
            peaks.append(peak(lambda: forward(prompts(1, 1), torch.tensor([slots - 1]))))  # noqa: B023
            assert_packed(model.caches)
        assert_in_blocks(session, whole=False)
    dense = HEADS * (16384 - 4096) * CHANNELS * 4
    assert peaks[1] - peaks[0] < dense / 8


@pytest.mark.parametrize(
    ("idiom", "bits", "whole"),
    [
        ("Paired", 16, True),
        pytest.param("Paired", 4, False, marks=pytest.mark.slow),
        ("FlatHeads", 4, True),
        ("Latent", 4, True),
    ],
    indirect=["whole"],
)
@torch.no_grad()
def test_caches_of_three_and_five_dims(idiom, bits, whole):
    subject, chunks = Handwritten(idiom), [7, 1, 5, 1, 1]
    twin, cache = copy.deepcopy(subject), subject.cache("own")
    with packing(bits=bits, sinks=1, window=2) as session:
        forward = torch.compile(subject.model)
        for ids in prompts(1, sum(chunks)).split(chunks, 1):
            before = {**cache}
            twin.model = shown(subject.model)
            got = subject.step(forward, cache, ids)
            assert distance(got, twin.step(twin.model, before, ids)) < noise(bits)
        assert_packed([buffer for name, buffer in subject.model.named_buffers() if name != "mask"])
    assert all(form.endswith("rebuilt") for form in forms(session))
    assert_in_blocks(session, whole)


class FlatGrowing(Idiom):
    """Growing caches [B, S, H * D]."""

    def attend(self, q, k, v, call):
        cache = tuple(x.flatten(2) for x in (k, v))
        if call.cache is not None:
            cache = tuple(torch.cat(both, 1) for both in zip(call.cache, cache, strict=True))
        q, k, v = (x.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for x in (q.flatten(2), *cache))
        mask = call.mask[..., : k.shape[2]]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2), cache


@pytest.mark.parametrize(
    ("bits", "whole"), [pytest.param(16, True, marks=pytest.mark.slow), (4, False)], indirect=["whole"]
)
@torch.no_grad()
def test_growing_caches_of_three_dims(bits, whole):
    model, caches, at = Decoder(FlatGrowing), [None] * LAYERS, 0
    with decoquant_compile.enable(bits=bits, sinks=1, window=2):
        forward = torch.compile(model)
        for number, ids in enumerate(prompts(1, 14).split([7, 1, 1, 3, 1, 1], 1)):
            places = torch.arange(at, at + ids.shape[1])
            expected, _ = model(ids, places, at, shown(caches) if at else caches)
            got, caches = forward(ids, places, at, caches)
            if bits == 16 or number > 1:  # the second call reads what it packs
                assert distance(got, expected) < noise(bits)
            at += ids.shape[1]
        assert_packed([tensor for layer in caches for tensor in layer])


@torch.no_grad()
def test_scales_of_codes_are_no_caches():
    """Packed, one channel would take more memory than it has."""

    def model(q, k, v, positions, codes, scales):
        for code, scale, new in zip(codes, scales, (k, v), strict=True):
            size = new.abs().amax(-1, keepdim=True) / 127
            code[:, :, positions], scale[:, :, positions] = (new / size).round().to(torch.int8), size
        keys, values = (code * scale for code, scale in zip(codes, scales, strict=True))
        mask = torch.arange(keys.shape[2]) <= positions[:, None]
        return F.scaled_dot_product_attention(q, keys, values, mask)

    codes = [torch.zeros(1, 2, 32, 16, dtype=torch.int8) for _ in range(2)]
    scales = [torch.zeros(1, 2, 32, 1) for _ in range(2)]
    torch.compiler.reset()
    with pytest.warns(UserWarning, match="no attention was rewritten"), decoquant_compile.enable(bits=8):
        torch.compile(model)(*(torch.randn(1, 2, 3, 16) for _ in range(3)), torch.arange(3), codes, scales)
    assert {type(x) for x in (*codes, *scales)} == {torch.Tensor}


@torch.no_grad()
def test_a_number_of_the_model_between_cache_and_attention_keeps_it_whole():
    """With dynamic shapes it is an input of the graph, which no loop takes."""

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.keys, self.values = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
            self.number = 2.378

        def forward(self, q, x, memory):
            memory = torch.cat([memory, x], 1)
            k, v = (
                y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (self.keys(memory) / self.number, self.values(memory))
            )
            return (q @ k.mT).softmax(-1) @ v, memory

    model, memory, twin = Scaled(), torch.zeros(1, 0, 32), torch.zeros(1, 0, 32)
    with packing(bits=16) as session:
        compiled = torch.compile(model, dynamic=True)
        for tokens in (12, 2, 3):
            q, x = torch.randn(1, 2, tokens, 16), torch.randn(1, tokens, 32)
            expected, twin = model(q, x, twin)
            got, memory = compiled(q, x, memory)
            assert distance(got, expected) < NOISE
    assert {f.form for f in session.report().findings} == {"eager, rebuilt"}
