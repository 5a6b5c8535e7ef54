"""Cores: what the attentions of a graph are."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from decoquant_compile.patterns.attention import AttentionCore, cores
from tests.graphs import BATCH, HEADS, SLOTS, cache, capture, queries


def cores_of(function, *args):
    recorder, _ = capture(function, *args)
    return cores(recorder.graphs[0].graph)


def test_defaults_are_read_from_the_schema():
    (core,) = cores_of(F.scaled_dot_product_attention, queries(heads=HEADS), cache(), cache())
    assert isinstance(core, AttentionCore)
    assert (core.mask, core.is_causal, core.scale, core.enable_gqa, core.form) == (None, False, None, False, "sdpa")
    assert [len(n.meta["val"].shape) for n in (core.query, core.key, core.value)] == [4, 4, 4]
    assert core.query.meta["val"].shape[2] == 1


def test_arguments_are_read_by_name_and_position():
    def function(q, k, v, mask):
        a = F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.5, enable_gqa=True)
        return a + F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1, enable_gqa=True)

    first, second = cores_of(function, queries(), cache(), cache(), torch.zeros(1, 1, 1, SLOTS))
    assert first.mask is not None
    assert (first.scale, first.is_causal, first.enable_gqa) == (0.5, False, True)
    assert second.mask is None
    assert (second.scale, second.is_causal) == (1.0, True)


@pytest.mark.parametrize("shape", [(1, SLOTS), (1, 1, SLOTS), (1, 1, 1, SLOTS), (BATCH, 4, 1, SLOTS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_that_broadcast_are_cores(shape, dtype):
    def function(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    (core,) = cores_of(function, queries(), cache(), cache(), torch.ones(shape).to(dtype))
    assert isinstance(core, AttentionCore)


def test_heads_as_many_as_keys_do_not_confuse_the_mask():
    def function(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask)

    q, k = torch.randn(1, SLOTS, 1, 4), torch.randn(1, SLOTS, SLOTS, 4)
    (core,) = cores_of(function, q, k, k.clone(), torch.ones(1, 1, 1, SLOTS, dtype=torch.bool))
    assert isinstance(core, AttentionCore)


def test_flex_attention_is_seen():
    blocks = create_block_mask(lambda b, h, q, k: k >= 0, None, None, 1, SLOTS, device="cpu")

    def function(q, k, v):
        return flex_attention(q, k, v, block_mask=blocks)

    (core,) = cores_of(function, queries(heads=HEADS), cache(), cache())
    assert core.form == "flex"


def test_a_router_is_no_attention():
    def function(q, k, v, w):
        attention = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        weights, chosen = F.linear(attention, w).softmax(-1).topk(2)
        return weights.sum() + chosen.sum()

    (core,) = cores_of(function, queries(), cache(), cache(), torch.randn(4, 8))
    assert isinstance(core, AttentionCore)


def test_softmax_without_values_is_no_attention():
    assert cores_of(lambda q, k: (q @ k.mT).softmax(-1).amax(), queries(heads=HEADS), cache()) == []
