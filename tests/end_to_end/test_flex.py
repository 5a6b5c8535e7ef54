"""Models that call `flex_attention` over their cache."""

import math
import warnings

import pytest
import torch
from torch._inductor import config as inductor_config
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import decoquant_compile
from decoquant_compile import restore
from decoquant_compile._compat import ATEN_KERNELS
from tests.end_to_end.harness import NOISE, SMALL, assert_packed, distance, feed, noise, packing, static_cache, tensors
from tests.end_to_end.models import hugging_face, prompts

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

BATCH, HEADS, GROUPS, SLOTS, CHANNELS = 2, 2, 2, 32, 16
SLOPES = torch.tensor([0.5, 0.25, 0.1, -0.1])


def same(score, b, h, i, j):
    return score


def capped_with_a_bias(score, b, h, i, j):
    return 5 * torch.tanh(score / 5) + SLOPES[h] * j


def hidden(score, b, h, i, j):
    return torch.where((j % 3 == 0) | (j > 18), score, -math.inf) * 0.5


@pytest.mark.parametrize("score", [same, capped_with_a_bias, hidden])
def test_attention_is_that_over_the_content_of_the_cache(score):
    """At 16 bits over the dense cache; at 4 bits over the one that the handles show."""

    def function(q, k, v, keys, values, positions, blocks):
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return flex_attention(q, keys, values, score_mod=score, block_mask=blocks, enable_gqa=True)

    starts = torch.tensor([0, 3])
    for bits in (16, 4):
        generator = torch.Generator().manual_seed(0)
        caches = [torch.zeros(BATCH, HEADS, SLOTS, CHANNELS) for _ in range(2)]
        dense = [cache.clone() for cache in caches]
        first = torch.zeros((), dtype=torch.int64)
        results = []

        def mask(b, h, i, j, first=first):
            """The second sequence starts at slot 3."""
            return (j <= i + first) & ((j >= starts[b]) | (j == i + first))

        with packing(bits=bits, **SMALL) as session:
            compiled = torch.compile(function, dynamic=False)
            for chunk in (range(20), range(20, 21), range(21, 22)):
                positions = torch.tensor(chunk)
                first.fill_(chunk.start)
                with warnings.catch_warnings(action="ignore"):
                    blocks = create_block_mask(mask, BATCH, None, len(chunk), SLOTS, device="cpu", BLOCK_SIZE=8)
                q, k, v = (
                    torch.randn(BATCH, heads, len(chunk), CHANNELS, generator=generator)
                    for heads in (HEADS * GROUPS, HEADS, HEADS)
                )
                got = compiled(q, k, v, *caches, positions, blocks)
                if bits != 16:  # the call's own tokens are written again, exactly
                    dense = [restore(cache.clone()) for cache in caches]
                results.append((got, (q, k, v, *(x.clone() for x in dense), positions, blocks)))
                if bits == 16:
                    for cache, new in zip(dense, (k, v), strict=True):
                        cache.index_copy_(2, positions, new)
        for (got, arguments), first_slot in zip(results, (0, 20, 21), strict=True):  # it compiles itself
            first.fill_(first_slot)
            torch.testing.assert_close(got, function(*arguments), rtol=0, atol=noise(bits))
        assert_packed(caches)
        assert {finding.form for finding in session.report().findings} == {"flex"}


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_logits_are_those_of_the_dense_model(name):
    model, ids = hugging_face(name, "flex_attention"), prompts(1, 60)
    chunks = [12, 1, 1]
    expected = feed(model, ids, chunks, static_cache(model))
    torch.compiler.reset()
    with inductor_config.patch(ATEN_KERNELS), decoquant_compile.enable(bits=16, **SMALL) as session:
        cache = static_cache(model)
        got = feed(torch.compile(model.forward), ids, chunks, cache)
        assert_packed(tensors(cache))
    findings = session.report().findings
    assert findings
    assert all(finding.rewritten and finding.form == "flex" for finding in findings)
    assert distance(got, expected) < NOISE


@torch.no_grad()
def test_growing_caches():
    """Lengths of keys and values are symbols of their own, which nothing but the attention compares."""

    def function(q, k, v, keys, values):
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return flex_attention(q, keys, values, enable_gqa=True), keys, values

    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(BATCH, HEADS, 12, CHANNELS, generator=generator) for _ in range(2)]
    sizes = HEADS * GROUPS, HEADS, HEADS
    calls = [[torch.randn(BATCH, n, 1, CHANNELS, generator=generator) for n in sizes] for _ in range(4)]
    results, caches = [], first
    with packing(bits=16, **SMALL) as session:
        compiled = torch.compile(function)
        for new in calls:
            result, *caches = compiled(*new, *caches)
            results.append(result)
            assert_packed(caches)
    assert {(finding.form, finding.write) for finding in session.report().findings} == {("flex", "cat")}
    caches = first
    for new, result in zip(calls, results, strict=True):  # it compiles itself
        expected, *caches = function(*new, *caches)
        torch.testing.assert_close(result, expected, rtol=0, atol=noise(16))
