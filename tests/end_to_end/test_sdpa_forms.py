"""Ways in which models call attention over a cache: masks, scales, groups of query heads."""

import math

import pytest
import torch
from torch.nn import functional as F

from decoquant_compile import restore
from tests.end_to_end.harness import SMALL, assert_packed, noise, packing

BATCH, HEADS, GROUPS, SLOTS, CHANNELS = 2, 2, 2, 32, 16

FORMS = {}


def form(attend, *masks):
    """Register attention over cached keys and values; each mask is made from the positions of the queries."""
    for mask in masks or (no_mask,):
        FORMS[f"{attend.__name__}-{mask.__name__}"] = attend, mask
    return attend


def no_mask(positions):
    return None


def causal(positions):
    return (torch.arange(SLOTS) <= positions[:, None])[None, None]


def one_row(positions):
    """The same for every query, as for a single token."""
    return (torch.arange(SLOTS) <= positions.max())[None, None, None]


def per_sequence(positions):
    """The second sequence starts at slot 3."""
    start = torch.tensor([0, 3])[:, None, None, None]
    admitted = causal(positions) & (torch.arange(SLOTS) >= start)
    return admitted | (torch.arange(SLOTS) == positions[:, None])


def never_written(positions):
    """Admits slots without a token, which a dense cache reads as zeros."""
    return torch.ones(1, 1, len(positions), SLOTS, dtype=torch.bool)


def nothing(positions):
    """The first query of the first sequence attends to nothing."""
    admitted = causal(positions).repeat(BATCH, 1, 1, 1)
    admitted[0, :, 0] = False
    return admitted


def bias(positions):
    """Other for each head, and very small where nothing is to be seen."""
    distances = (positions[:, None] - torch.arange(SLOTS)).abs()
    slopes = torch.tensor([0.5, 0.25, 0.1, -0.1])[:, None, None]
    return (-slopes * distances)[None].masked_fill(~causal(positions), torch.finfo(torch.float32).min)


def two_dims(positions):
    return causal(positions)[0, 0]


def three_dims(positions):
    return bias(positions)[0]


def infinite(positions):
    return torch.zeros(1, 1, len(positions), SLOTS).masked_fill(~causal(positions), -math.inf)


def infinite_everywhere(positions):
    """No query of the second sequence attends to anything."""
    mask = infinite(positions).repeat(BATCH, 1, 1, 1)
    mask[1] = -math.inf
    return mask


def smallest_everywhere(positions):
    """Hugging Face's additive mask of a query that attends to nothing: all slots count alike."""
    return torch.full((BATCH, 1, len(positions), SLOTS), torch.finfo(torch.float32).min)


def enable_gqa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


form(enable_gqa, no_mask, causal, one_row, per_sequence, never_written, nothing)
form(enable_gqa, two_dims, three_dims)
form(enable_gqa, bias, infinite, infinite_everywhere, smallest_everywhere)


def explicit_scale(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=0.7)


form(explicit_scale, no_mask, causal, bias)


def repeat_interleave(q, k, v, mask):
    k, v = k.repeat_interleave(GROUPS, dim=1), v.repeat_interleave(GROUPS, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


form(repeat_interleave, causal)


def expand_and_reshape(q, k, v, mask):
    k, v = (t[:, :, None].expand(-1, -1, GROUPS, -1, -1).reshape(BATCH, -1, SLOTS, CHANNELS) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


form(expand_and_reshape, causal, bias)


def is_causal(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


form(is_causal)


def is_causal_over_the_prompt(q, k, v, mask):
    k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


form(is_causal_over_the_prompt)


@pytest.mark.parametrize("name", FORMS)
def test_attention_is_that_over_the_content_of_the_cache(name):
    """At 16 bits over the dense cache; at 4 bits over the one that the handles show."""
    attend, make_mask = FORMS[name]

    def function(qkv, keys, values, positions, mask):
        q, k, v = qkv.split((HEADS * GROUPS, HEADS, HEADS), 1)
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return attend(q, keys, values, mask)

    # From the second on, each call leaves slots between the tokens and the end that were never written.
    chunks = [range(12), range(12, 15), range(15, 16), range(16, 22), range(24, 25)]
    for bits in (16, 4):
        generator = torch.Generator().manual_seed(0)
        caches = [torch.zeros(BATCH, HEADS, SLOTS, CHANNELS) for _ in range(2)]
        dense = [cache.clone() for cache in caches]
        with packing(bits=bits, **SMALL):
            compiled = torch.compile(function)
            for chunk in chunks:
                qkv = torch.randn(BATCH, HEADS * (GROUPS + 2), len(chunk), CHANNELS, generator=generator)
                qkv[:, : HEADS * GROUPS] *= 2
                positions = torch.tensor(chunk)
                mask = make_mask(positions)
                got = compiled(qkv, *caches, positions, mask)
                if bits != 16:  # the call's own tokens are written again, exactly
                    dense = [restore(cache.clone()) for cache in caches]
                expected = function(qkv, *dense, positions, mask)
                torch.testing.assert_close(got, expected, rtol=0, atol=noise(bits))
        assert_packed(caches)


@pytest.mark.parametrize("write", ["index_copy", "append"])
def test_several_attentions_share_a_cache(write):
    """One of them depends on the other; where tokens are appended, both read the cache as it was before."""
    slots = 12

    def function(qkv, keys, values, positions, mask):
        q, k, v = qkv.split((HEADS * GROUPS, HEADS, HEADS), 1)
        if write == "index_copy":
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            k, v = keys, values
        else:
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            keys.copy_(k[:, :, -slots:])
            values.copy_(v[:, :, -slots:])
        one = enable_gqa(q, k, v, mask)
        return one, explicit_scale(one + q, k, v, mask.flip(1))

    for bits in (16, 4):
        generator = torch.Generator().manual_seed(0)
        caches = [torch.randn(BATCH, HEADS, slots, CHANNELS, generator=generator) for _ in range(2)]
        dense = [cache.clone() for cache in caches]
        with packing(bits=bits, sinks=1, window=2) as session:
            compiled = torch.compile(function)
            for tokens in (3, 2):
                qkv = torch.randn(BATCH, HEADS * (GROUPS + 2), tokens, CHANNELS, generator=generator)
                length = slots if write == "index_copy" else slots + tokens
                mask = torch.rand(1, HEADS * GROUPS, tokens, length, generator=generator) < 0.7
                positions = torch.arange(slots - tokens, slots)
                before = [restore(cache.clone()) for cache in caches] if tokens == 2 and bits != 16 else dense
                got = compiled(qkv, *caches, positions, mask)
                if bits != 16 and tokens == 3:
                    continue  # the caches were encoded in this call
                expected = function(qkv, *before, positions, mask)
                torch.testing.assert_close(got, expected, rtol=0, atol=noise(bits))
        assert_packed(caches)
        assert len(session.report().caches) == 2
