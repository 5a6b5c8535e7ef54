"""Models that spell attention out, as Hugging Face's do with `attn_implementation="eager"`, and hand-written ones."""

import math

import pytest
import torch
from torch.nn import functional as F

from decoquant_compile import restore
from tests.end_to_end.harness import (
    NOISE,
    SMALL,
    assert_packed,
    distance,
    feed,
    noise,
    packing,
    static_cache,
    tensors,
)
from tests.end_to_end.models import hugging_face, prompts

NAMES = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_neox", "opt", "bloom", "gpt_oss", "granite_swa")
NORMAL = {("llama", 16), ("gemma2", 16), ("gpt_neox", 8), ("bloom", 16), ("gpt_oss", 16)}
SLIDING = {"mistral", "gemma2", "gemma3", "gpt_oss", "granite_swa"}
"""The slow sweep has all pairs."""

LOSS = 0.03
"""Standard deviations of the logits, root mean square, at 8 bits."""


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        pytest.param(name, bits, marks=[] if (name, bits) in NORMAL else pytest.mark.slow)
        for name in NAMES
        for bits in (16, 8)
    ],
)
def test_logits_are_those_of_the_dense_model(name, bits):
    model, ids = hugging_face(name, "eager"), prompts(1, 60)
    # Sliding windows (24) are passed by several tokens, then by one at a time.
    chunks = [20, 1, 9, 1, 1] if name in SLIDING else [12, 1, 9, 1]
    mask = torch.ones_like(ids) if name == "opt" else None  # without one it breaks the graph to count tokens
    expected = feed(model, ids, chunks, static_cache(model), mask=mask)
    with packing(bits=bits, **SMALL) as session:
        cache = static_cache(model)
        got = feed(torch.compile(model.forward), ids, chunks, cache, mask=mask)
        assert_packed(tensors(cache))
    assert {finding.form for finding in session.report().findings} <= {"eager", "eager, own tokens only"}
    if bits == 16:
        assert distance(got, expected) < NOISE
    else:
        # Two tokens are left that are neither sinks nor in the window nor written by the chunk that reads them.
        assert 1e-5 < float((got - expected).square().mean().sqrt() / expected.std()) < LOSS


def test_the_softcap_bends_the_logits():
    """Without it, equal logits would say nothing of it."""
    ids = prompts(1, 20)
    capped, free = (hugging_face("gemma2", "eager", **change) for change in ({}, {"attn_logit_softcapping": None}))
    logits, other = (feed(model, ids, [20], static_cache(model)) for model in (capped, free))
    assert distance(other, logits) > 1e3 * NOISE


BATCH, HEADS, GROUPS, SLOTS, CHANNELS = 2, 2, 2, 32, 16

FORMS = {}


def form(function):
    """Register attention over cached keys and values, with a boolean mask."""
    FORMS[function.__name__] = function
    return function


def repeat(*tensors):
    return (x.repeat_interleave(GROUPS, dim=1) for x in tensors)


@form
def boolean_mask(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT / math.sqrt(CHANNELS)).masked_fill(~mask, -math.inf).softmax(-1) @ v


@form
def finite_mask(q, k, v, mask):
    """A query that attends to nothing weighs all slots alike."""
    k, v = repeat(k, v)
    mask = mask.clone()
    mask[1, :, 0] = False
    return torch.where(mask, q @ k.mT * 0.3, torch.tensor(-1e9)).softmax(-1) @ v


@form
def capped_with_a_bias(q, k, v, mask):
    k, v = repeat(k, v)
    logits = 5 * torch.tanh(q @ (k * 0.5).mT / 5)
    bias = -torch.arange(HEADS * GROUPS)[:, None, None] * torch.arange(SLOTS).flip(0) * 0.1
    return (logits + bias + torch.where(mask, 0.0, torch.finfo(q.dtype).min)).softmax(-1) @ v


@form
def grouped(q, k, v, mask):
    q = q.unflatten(1, (HEADS, GROUPS))
    logits = torch.einsum("bkgqd,bksd->bkgqs", q, k).masked_fill(~mask[:, :, None], -1e4)
    return torch.einsum("bkgqs,bksd->bqkgd", logits.softmax(-1), v).flatten(2)


@form
def heads_in_the_batch(q, k, v, mask):
    k, v = (x.flatten(0, 1) for x in repeat(k, v))
    bias = torch.zeros(BATCH * HEADS * GROUPS, 1, SLOTS)
    logits = torch.baddbmm(bias, q.flatten(0, 1), k.mT, alpha=0.3).view(BATCH, HEADS * GROUPS, -1, SLOTS)
    weights = F.softmax(logits.masked_fill(~mask, torch.finfo(q.dtype).min), -1, dtype=torch.float32)
    return torch.bmm(weights.flatten(0, 1), v)


@form
def queries_before_heads(q, k, v, mask):
    k, v = (x.transpose(1, 2) for x in repeat(k, v))
    logits = torch.einsum("bshd,bthd->bsht", q.transpose(1, 2), k) * 0.3
    logits = logits + torch.where(mask, 0.0, -1e30).transpose(1, 2)
    return torch.einsum("bsht,bthd->bshd", logits.softmax(-1), v)


@form
def sinks_beside_capped_logits(q, k, v, mask):
    k, v = repeat(k, v)
    logits = (5 * torch.tanh(q @ k.mT / 5)).masked_fill(~mask, torch.finfo(q.dtype).min)
    sinks = torch.arange(HEADS * GROUPS).float()[:, None, None].expand(BATCH, -1, q.shape[2], 1)
    logits = torch.cat([logits, sinks], -1)
    return (logits - logits.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


@form
def one_more_in_the_sum(q, k, v, mask):
    k, v = repeat(k, v)
    return F.pad((q @ k.mT).masked_fill(~mask, -math.inf), (1, 0)).softmax(-1)[..., 1:] @ v


@pytest.mark.parametrize("name", FORMS)
def test_attention_is_that_over_the_content_of_the_cache(name):
    """At 16 bits over the dense cache; at 4 bits over the one that the handles show."""
    attend = FORMS[name]

    def function(q, k, v, keys, values, positions, mask):
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return attend(q, keys, values, mask)

    for bits in (16, 4):
        generator = torch.Generator().manual_seed(0)
        caches = [torch.zeros(BATCH, HEADS, SLOTS, CHANNELS) for _ in range(2)]
        dense = [cache.clone() for cache in caches]
        with packing(bits=bits, **SMALL):
            compiled = torch.compile(function, dynamic=False)
            for chunk in (range(20), range(20, 21), range(21, 22)):
                positions = torch.tensor(chunk)
                q, k, v = (
                    torch.randn(BATCH, heads, len(chunk), CHANNELS, generator=generator)
                    for heads in (HEADS * GROUPS, HEADS, HEADS)
                )
                # The second sequence starts at slot 3.
                starts = torch.tensor([0, 3])[:, None, None, None]
                mask = (torch.arange(SLOTS) <= positions[:, None]) & (torch.arange(SLOTS) >= starts)
                mask |= torch.arange(SLOTS) == positions[:, None]
                got = compiled(q, k, v, *caches, positions, mask)
                if bits != 16:  # the call's own tokens are written again, exactly
                    dense = [restore(cache.clone()) for cache in caches]
                expected = function(q, k, v, *dense, positions, mask)
                torch.testing.assert_close(got, expected, rtol=0, atol=noise(bits))
        assert_packed(caches)


def test_one_graph_serves_caches_of_any_length():
    def function(q, k, v, keys, values, positions, mask):
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return boolean_mask(q, keys, values, mask)

    with packing(bits=16) as session:
        compiled = torch.compile(function)
        for slots in (32, 40, 56):
            caches = [torch.randn(BATCH, HEADS, slots, CHANNELS) for _ in range(2)]
            dense = [cache.clone() for cache in caches]
            q = torch.randn(BATCH, HEADS * GROUPS, 1, CHANNELS)
            k, v = (torch.randn(BATCH, HEADS, 1, CHANNELS) for _ in range(2))
            at, mask = torch.tensor([slots - 1]), torch.rand(BATCH, 1, 1, slots) < 0.5
            got = compiled(q, k, v, *caches, at, mask)
            torch.testing.assert_close(got, function(q, k, v, *dense, at, mask), rtol=0, atol=NOISE)
            assert_packed(caches)
    assert len(session.report().graphs) == 2
