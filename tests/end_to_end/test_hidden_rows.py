"""Queries that a mask hides from every key: padding, as a rule, whose results nobody reads; but they are results.

A mask of -inf leaves nothing: zeros, as `scaled_dot_product_attention` gives. A finite one, such as Hugging Face's, in
which every logit vanishes, leaves the average over all slots, those that were never written, zeros, among them.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.end_to_end.harness import assert_packed, packing

BATCH, HEADS, GROUPS, SLOTS, CHANNELS = 2, 2, 2, 40, 16
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def spelled_out(q, k, v, mask):
    k, v = (x.repeat_interleave(GROUPS, 1) for x in (k, v))
    logits = q @ k.mT * 0.25 + mask
    return F.softmax(logits, -1, dtype=torch.float32).to(q.dtype) @ v


def replaced(q, k, v, mask):
    k, v = (x.repeat_interleave(GROUPS, 1) for x in (k, v))
    logits = (q @ k.mT * 0.25).masked_fill(mask != 0, torch.finfo(q.dtype).min)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("hides", [torch.finfo, -math.inf])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("attend", [sdpa, spelled_out, replaced])
def test_hidden_queries(attend, dtype, hides):
    def function(qkv, keys, values, positions, mask):
        q, k, v = qkv.split((HEADS * GROUPS, HEADS, HEADS), 1)
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return attend(q, keys, values, mask)

    generator = torch.Generator().manual_seed(0)
    caches = [torch.zeros(BATCH, HEADS, SLOTS, CHANNELS, dtype=dtype) for _ in range(2)]
    dense = [cache.clone() for cache in caches]
    least = torch.finfo(dtype).min if hides is torch.finfo else hides
    with packing(bits=16):
        compiled = torch.compile(function, dynamic=False)
        for chunk in (range(20), range(20, 21), range(21, 22)):
            positions = torch.tensor(chunk)
            qkv = torch.randn(BATCH, HEADS * (GROUPS + 2), len(chunk), CHANNELS, generator=generator).to(dtype)
            mask = torch.zeros(BATCH, 1, len(chunk), SLOTS, dtype=dtype)
            mask.masked_fill_(torch.arange(SLOTS) > positions[:, None], least)
            mask[1, :, 0] = least
            got = compiled(qkv, *caches, positions, mask)
            expected = function(qkv, *dense, positions, mask)
            if attend is spelled_out and hides is not torch.finfo:  # nan, in which README.md differs
                expected = expected.nan_to_num(0.0)
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[dtype])
            assert bool(got[1, :, 0].any()) is (hides is torch.finfo or attend is replaced)
    assert_packed(caches)
