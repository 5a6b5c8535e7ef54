"""Which attentions a dim of a tensor is followed to."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from decoquant_compile.patterns import flow
from decoquant_compile.patterns.attention import anchors, readers
from tests.graphs import BATCH, CHANNELS, HEADS, SLOTS, assemble, cache, capture, project, queries

T = torch.randn(HEADS, SLOTS, CHANNELS)


def sides(function, dim=2, tensor=None):
    """The operands that dim `dim` of the first argument of `function(tensor, queries)` indexes."""
    recorder, _ = capture(function, cache() if tensor is None else tensor, queries(heads=HEADS))
    graph = recorder.graphs[0].graph
    name = next(iter(inspect.signature(function).parameters))
    (start,) = (n for n in recorder.graphs[0].placeholders if recorder.graphs[0].source(n) == f"L['{name}']")
    found = flow.attentions(start, dim, readers(graph))
    if found is None:
        return None
    assert {anchor for anchor, _ in found} <= set(anchors(graph))
    return {side for _, side in found}


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def rotate(x):
    a, b = x.chunk(2, -1)
    return torch.cat([x * 0.5, torch.cat([-b, a], -1)], -1)[..., :CHANNELS] + T.sin()


@pytest.mark.parametrize(
    "prepare",
    [
        *(torch.exp, rotate, assemble, project, lambda x: F.layer_norm(x, (CHANNELS,))),
        lambda x: F.normalize(x, dim=-1),
        lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1).rsqrt(),
        lambda x: x - x.amax((1, 3))[:, None, :, None],
        lambda x: x[:, :, torch.arange(SLOTS).flip(0)],
        lambda x: x[:, :, torch.arange(2 * SLOTS).view(2, -1).flip(1) % SLOTS].select(2, 1),
    ],
)
def test_what_is_computed_for_each_slot_is_followed(prepare):
    assert sides(lambda c, q: attend(q, prepare(c), T[None])) == {"key"}
    assert sides(lambda c, q: attend(q, T[None].expand(BATCH, -1, -1, -1), prepare(c))) == {"value"}
    assert sides(lambda c, q: attend(q, prepare(c), prepare(c))) == {"key", "value"}


def test_an_attention_that_is_spelled_out():
    assert sides(lambda c, q: (q @ rotate(c).mT).softmax(-1) @ T) == {"key"}
    assert sides(lambda c, q: torch.einsum("bhqd,bhkd->bhqk", q, c).exp().softmax(-1) @ T) == {"key"}
    assert sides(lambda c, q: (q @ T.mT).softmax(-1) @ c.sin()) == {"value"}
    assert sides(lambda c, q: torch.einsum("bhqk,bhkd->bqhd", (q @ T.mT).softmax(-1), c)) == {"value"}


def test_what_masks_the_keys_is_the_attentions_own_affair():
    def masked(c, q):
        bias = F.linear(c, torch.ones(1, CHANNELS)).sin().transpose(2, 3)
        return F.scaled_dot_product_attention(q, T[None], c, bias)

    def masked_by_queries(c, q):
        bias = F.linear(c, torch.ones(SLOTS, CHANNELS)).sin()
        return F.scaled_dot_product_attention(*[T.expand(BATCH, -1, -1, -1)] * 3, bias)

    assert sides(masked) == {"value"}
    assert sides(masked_by_queries) is None


@pytest.mark.parametrize(
    "mix",
    [
        lambda c: torch.ones(SLOTS, SLOTS) @ c,
        lambda c: c.cumsum(2),
        lambda c: c / c.norm(dim=2, keepdim=True),
        lambda c: c[:, torch.arange(HEADS)[:, None], torch.arange(SLOTS)],
        lambda c: c.mean(2, keepdim=True).expand_as(c),
        lambda c: F.conv1d(c.flatten(0, 1).mT, torch.ones(CHANNELS, CHANNELS, 1)).mT.view(c.shape),
    ],
)
def test_what_mixes_slots_is_not(mix):
    assert sides(lambda c, q: attend(q, mix(c), mix(c))) is None


@pytest.mark.parametrize("use", [lambda c: c * 2, lambda c: c.sum(), lambda c: c.flatten(1, 2).sin().norm(dim=-1)])
def test_what_is_used_elsewhere_as_well_is_not(use):
    assert sides(lambda c, q: (attend(q, c.sin(), T[None]), use(c))) is None


def test_shapes_and_logits_may_be_used():
    def function(c, q):
        logits = q @ c.mT
        logits = logits - logits.amax(-1, keepdim=True)
        return logits.softmax(-1) @ T, logits, torch.zeros_like(c), c.shape[0]

    assert sides(function) == {"key"}


def test_other_dims_than_the_keys_are_not():
    assert sides(lambda c, q: attend(q, c, c), dim=1) is None
    assert sides(lambda c, q: attend(c, T[None], T[None])) is None
    assert sides(lambda c, q: (q @ c.mT).softmax(-2) @ c) == {"value"}


def test_a_state_of_a_convolution_reaches_no_attention():
    def function(state, q):
        x = (state * torch.ones(4)).sum(-1)  # over the slots, as a causal convolution does
        k = F.linear(x, torch.ones(CHANNELS, 3)).view(BATCH, 1, 1, CHANNELS).expand(BATCH, HEADS, 1, CHANNELS)
        return attend(q, k, k)

    assert sides(function, dim=2, tensor=torch.randn(BATCH, 3, 4)) is None
