"""`flex_attention`: what is read of its functions of score and positions is what the operator computes."""

import math
import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from decoquant_compile.patterns.attention import AttentionCore, cores
from decoquant_compile.patterns.reject import Reason, Reject
from tests.graphs import BATCH, CHANNELS, GROUPS, HEADS, SLOTS, capture
from tests.patterns.test_eager import Values, attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

QUERIES = 3
ALL = HEADS * GROUPS

torch.manual_seed(0)
SEEN = torch.rand(BATCH, SLOTS) < 0.7
OFFSET = torch.tensor(5)
BIAS = torch.randn(BATCH, 1, QUERIES, SLOTS)
SLOPES = torch.rand(ALL).bfloat16()
DOCUMENT = torch.arange(SLOTS) // 5


def anywhere(b, h, i, j):
    return b.new_ones((), dtype=torch.bool)


def causal(b, h, i, j):
    return j <= i + OFFSET


def padded(b, h, i, j):
    return causal(b, h, i, j) & SEEN[b, j]


def sliding_for_some_heads(b, h, i, j):
    return causal(b, h, i, j) & ((j + 4 > i + OFFSET) | (h % 2 == 0))


def sliding_as_in_hugging_face(b, h, i, j):
    window = (j > i + OFFSET - 4).to(b.device)
    return b.new_ones((), dtype=torch.bool) & window & causal(b, h, i, j).to(b.device)


def of_one_document(b, h, i, j):
    return DOCUMENT[i + OFFSET] == DOCUMENT[j]


def nothing_for_one_query(b, h, i, j):
    return i != 1


def same(score, b, h, i, j):
    return score


def scaled(score, b, h, i, j):
    return -score / 4 * 3


def capped(score, b, h, i, j):
    return torch.tanh(score * -0.5 / 2) * 2


def capped_with_a_bias(score, b, h, i, j):
    """As Hugging Face's for Gemma 2."""
    score = 3.0 * torch.tanh(score / 3.0)
    return score + BIAS[b][0][i][j]


def alibi(score, b, h, i, j):
    return (1 - (score * 0.5 + SLOPES[h] * (j - i))) * 2


def hidden(score, b, h, i, j):
    return torch.where(j <= i + 2, score, -float("inf")) + torch.where(j == 3, -math.inf, 0.0)


MASKS = (
    anywhere,
    causal,
    padded,
    sliding_for_some_heads,
    sliding_as_in_hugging_face,
    of_one_document,
    nothing_for_one_query,
)
SCORES = (same, scaled, capped, capped_with_a_bias, alibi, hidden)


def block_mask(mask, block=8):
    with warnings.catch_warnings(action="ignore"):
        return create_block_mask(mask, BATCH, ALL, QUERIES, SLOTS, device="cpu", BLOCK_SIZE=block)


def read(score, mask, *, blocks=None, **how):
    """The attentions of a graph, and what it and its nodes compute; a graph computes by mask function alone."""

    def function(q, k, v, block_mask):
        return flex_attention(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=True, **how)

    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(BATCH, heads, tokens, CHANNELS, generator=generator)
        for heads, tokens in ((ALL, QUERIES), (HEADS, SLOTS), (HEADS, SLOTS))
    )
    inputs = []

    def compiler(gm, example_inputs):
        inputs.append(example_inputs)
        return gm.forward

    recorder, _ = capture(function, q, k, v, blocks or block_mask(mask), compiler=compiler)
    (normal,) = recorder.graphs
    found = cores(normal.graph)
    values = Values(normal.gm)
    values.run(*inputs[0])
    return found, values


@pytest.mark.parametrize(
    ("score", "mask"), [*((same, mask) for mask in MASKS), *((score, padded) for score in SCORES), (alibi, anywhere)]
)
def test_what_is_read_is_what_the_operator_computes(score, mask):
    (core,), values = read(score, mask, scale=0.3)
    assert isinstance(core, AttentionCore), core
    assert core.form == "flex"
    got, whole = attention(core, values)
    torch.testing.assert_close(got.nan_to_num(0.0), whole, rtol=0, atol=2e-6)


def test_blocks_decide_where_they_are_listed():
    """Full ones admit all, partial ones what the mask function does, others nothing."""
    partial = torch.tensor([[0, 3, 1, 2]]).expand(BATCH, 1, 1, 4).int(), torch.tensor([[[1]], [[2]]]).int()
    full = torch.tensor([[2, 99, -1, 2]]).expand(BATCH, 1, 1, 4).int(), torch.tensor([[[1]], [[0]]]).int()
    blocks = BlockMask.from_kv_blocks(
        partial[1], partial[0], full[1], full[0], BLOCK_SIZE=(8, 4), mask_mod=padded, seq_lengths=(QUERIES, SLOTS)
    )
    (core,), values = read(same, padded, blocks=blocks)
    admitted = padded(torch.arange(BATCH)[:, None, None, None], 0, torch.arange(QUERIES)[:, None], torch.arange(SLOTS))
    block = torch.arange(SLOTS) // 4
    first = (admitted[0] & (block == 0)) | (block == 2)
    second = admitted[1] & ((block == 0) | (block == 3))
    expected = torch.stack((first, second))
    assert torch.equal(values.env[core.mask].expand(expected.shape), expected)


def test_a_symbolic_length():
    def function(q, k, v, blocks):
        return flex_attention(q, k, v, score_mod=alibi, block_mask=blocks, enable_gqa=True)

    q, k, v = (torch.randn(BATCH, heads, SLOTS, CHANNELS) for heads in (ALL, HEADS, HEADS))
    recorder, _ = capture(function, q[:, :, :QUERIES], k, v, block_mask(padded), dynamic=True)
    (core,) = cores(recorder.graphs[0].graph)
    assert isinstance(core, AttentionCore), core
    assert isinstance(core.mask.meta["val"].shape[3], torch.SymInt)


def squared(score, b, h, i, j):
    return score * score


def bent(score, b, h, i, j):
    return torch.relu(score)


def scaled_by_a_tensor(score, b, h, i, j):
    return score * SLOPES[h]


def capped_after_a_bias(score, b, h, i, j):
    return torch.tanh(score + h)


def small_instead(score, b, h, i, j):
    return torch.where(j <= i, score, -5.0)


def turned_round(score, b, h, i, j):
    return -torch.where(j <= i, score, -math.inf)


def constant_score(score, b, h, i, j):
    return BIAS[b, 0, i, j]


@pytest.mark.parametrize(
    ("score", "reason", "detail"),
    [
        (squared, Reason.ATTENTION_FORM, "another function of the score"),
        (bent, Reason.ATTENTION_FORM, "another function of the score"),
        (scaled_by_a_tensor, Reason.ATTENTION_FORM, "another function of the score"),
        (capped_after_a_bias, Reason.ATTENTION_FORM, "another function of the score"),
        (small_instead, Reason.MASK_FORM, "something else than -inf"),
        (turned_round, Reason.MASK_FORM, "scaled by -1"),
        (constant_score, Reason.ATTENTION_FORM, "does not depend on the score"),
    ],
)
def test_what_is_not_read_says_why(score, reason, detail):
    (reject,), _ = read(score, causal)
    assert isinstance(reject, Reject), reject
    assert (reject.reason, detail in reject.detail) == (reason, True), reject


def test_sums_of_the_weights_are_not_ours_to_give():
    (reject,), _ = read(same, causal, return_aux=AuxRequest(lse=True))
    assert isinstance(reject, Reject), reject
    assert reject.reason is Reason.WEIGHTS_ESCAPE
