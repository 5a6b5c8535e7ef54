"""Attention of a prompt's tokens to each other, in the blocks that a mask allows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from decoquant_compile.kernels.cpu import prompt

DTYPES = (torch.bfloat16, torch.float32)


def causal(queries, tokens=None, window=None):
    """``[1, 1, queries, tokens]``: to the last queries of so many tokens."""
    tokens = queries if tokens is None else tokens
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    return mask[None, None, tokens - queries :]


def operands(queries, tokens, *, batch=1, dtype=torch.float32, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    sizes = (4, queries), (2, tokens), (2, tokens)
    return [torch.randn(batch, heads, n, head_dim, generator=generator).to(dtype) for heads, n in sizes]


def attend(native, query, key, value, mask, sink=None):
    tokens = key.shape[2]
    return prompt.attend(
        query, key, value, torch.arange(tokens), mask, 0.25, 0, tokens, sink, native.extents
    )  # fmt: skip


def expected(query, key, value, mask):
    """The result and the logarithms of the sums, in float64."""
    key, value = (x.double().repeat_interleave(2, 1) for x in (key, value))
    scores = (query.double() @ key.mT * 0.25).masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num() @ value, scores.logsumexp(-1)


# -------------------------------------------------------------------------------------------------------------- extents


@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 40))
def test_extents(native, seed, batch, heads, queries, tokens):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, queries, tokens)
    mask = torch.rand(shape, generator=generator) < torch.rand(batch, heads, queries, 1, generator=generator) ** 4
    mask[..., 0, : int(torch.randint(tokens + 1, (), generator=generator))] = True
    at = torch.arange(tokens).expand(shape)
    begin = at.masked_fill(~mask, tokens).amin(-1)
    end = (at + 1).masked_fill(~mask, 0).amax(-1)
    unbroken = bool((mask.sum(-1) == (end - begin).clamp_min(0)).all())
    apart = mask.new_zeros(batch, heads, queries, 2 * tokens)
    apart[..., ::2] = mask
    for form in (mask, mask.mT.contiguous().mT, apart[..., ::2], torch.cat((mask, mask), -1)[..., :tokens]):
        got = native.extents(form)
        assert torch.equal(got.begin, begin)
        assert torch.equal(got.end, end)
        assert got.unbroken is unbroken


def test_extents_of_a_row_for_all(native):
    got = native.extents(torch.tensor([False, True, True, False]).expand(2, 3, 5, 4))
    assert got.begin.shape == (2, 3, 5)
    assert (got.begin == 1).all()
    assert (got.end == 3).all()
    assert got.unbroken


# --------------------------------------------------------------------------------------------------------------- blocks


MASKS = {
    "causal": causal(1100),
    "sliding": causal(1100, window=200),
    "narrow": causal(1100, window=1),
    "the last queries": causal(600, tokens=1100),
    "all": torch.ones(1, 1, 1, 1100, dtype=torch.bool),
    "one row for all": torch.arange(1100)[None, None, None] % 3 == 0,
    "none": torch.zeros(1, 1, 1100, 1100, dtype=torch.bool),
    "padded": causal(1100) & torch.tensor([0, 600])[:, None, None, None].le(torch.arange(1100)),
    "documents": (torch.arange(1100)[:, None] // 300 == torch.arange(1100) // 300)[None, None],
    "of each head": torch.rand(1, 4, 700, 700, generator=torch.Generator().manual_seed(1)) < 0.3,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MASKS)
def test_equals_masked_attention(native, name, dtype):
    mask = MASKS[name]
    queries = mask.shape[2] if mask.shape[2] > 1 else 1100
    query, key, value = operands(queries, mask.shape[3], batch=mask.shape[0], dtype=dtype)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)  # heads of a token side by side, as projections are
    got = attend(native, query, key, value, mask)
    out, sums = expected(query, key, value, mask)
    assert got.out.dtype == dtype
    assert got.out.is_contiguous()
    assert got.sums.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.out.double(), out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.sums.double(), sums, atol=tolerance, rtol=tolerance)


def test_causal_attention_is_torch_s_own(native):
    query, key, value = operands(700, 700, dtype=torch.bfloat16)
    got = attend(native, query, key, value, causal(700))
    own = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.25, enable_gqa=True)
    assert torch.equal(got.out, own)


@pytest.mark.parametrize("name", ["sliding", "documents"])
def test_columns_that_a_block_does_not_need_are_not_read(native, name):
    """A nan there would show, as it does where a block needs its column."""
    mask = MASKS[name]
    query, key, value = operands(1100, 1100)
    bad = value.clone()
    bad[:, :, 0] = math.nan
    got, clean = attend(native, query, key, bad, mask), attend(native, query, key, value, mask)
    assert torch.equal(got.out[:, :, 1024:], clean.out[:, :, 1024:])
    assert got.out[:, :, :512].isnan().any()


def test_a_sink_takes_its_share_in_each_block(native):
    query, key, value = operands(1100, 1100)
    sink = torch.tensor([-math.inf, 0.0, 3.0, 50.0])
    mask = MASKS["sliding"]
    got = attend(native, query, key, value, mask, sink)
    out, sums = expected(query, key, value, mask)
    whole = torch.logaddexp(sums, sink.double()[:, None])
    torch.testing.assert_close(got.out.double(), out * (sums - whole).exp()[..., None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.sums.double(), whole, atol=1e-5, rtol=1e-5)


def test_queries_that_nothing_is_admitted_to_get_zeros_whatever_is_masked(native):
    query, key, value = operands(40, 40)
    mask = causal(40)
    mask[..., :3, :] = False
    value[:, :, 20] = math.nan
    for sink in (None, torch.zeros(4)):
        got = attend(native, query, key, value, mask, sink)
        assert not got.out[:, :, :3].any()
        assert (got.sums[:, :, :3] == (-math.inf if sink is None else 0.0)).all()


def test_an_infinite_value_is_no_nan_beside_a_sink(native):
    query, key, value = operands(40, 40)
    value[:, :, 5, 3] = math.inf
    got = attend(native, query, key, value, causal(40), torch.zeros(4))
    assert (got.out[:, :, 5:, 3] == math.inf).all()


def test_what_torch_s_kernel_cannot_do(native):
    query, key, value = operands(20, 20)
    mask = causal(20)
    assert attend(native, query, key, value, mask) is not None
    assert attend(native, query.bfloat16(), key, value, mask) is None
    assert attend(native, query, key, value[..., :8], mask) is None
    assert attend(native, query, key, value, mask.double()) is None
    assert attend(native, query, key, value, torch.zeros(1, 1, 20, 20).masked_fill(~mask, -1e30) - 1e30) is None
    assert attend(native, query, key, value, mask, torch.tensor([0.0, math.nan, 0.0, 0.0])) is None


# -------------------------------------------------------------------------------------------------------------- history


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("at", [0, 300])
def test_history(native, name, at, monkeypatch):
    """Stretches of a cache on both sides of the new tokens."""
    monkeypatch.setattr(prompt, "_STRETCH", 250 * MASKS[name].shape[0] * 2 * 2 * 16 * 4)  # 250 tokens
    mask = MASKS[name]
    queries = mask.shape[2] if mask.shape[2] > 1 else 1100
    query, key, value = operands(queries, mask.shape[3], batch=mask.shape[0])
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    new = slice(at, at + 200)
    held = [x.clone() for x in (key, value)]
    for x in held:
        x[:, :, new] = math.nan  # what is new counts, not what stands in its place
    asked = []

    def read(low, high):
        asked.append((low, high))
        return tuple(x[:, :, low:high] for x in held)

    positions, length = torch.arange(new.start, new.stop), mask.shape[3]
    of_new = key[:, :, new], value[:, :, new]
    got = prompt.attend(query, *of_new, positions, mask, 0.25, 0, length, None, native.extents, read)
    out, sums = expected(query, key, value, mask)
    assert got.out.is_contiguous()
    torch.testing.assert_close(got.out.double(), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.sums.double(), sums, atol=1e-5, rtol=1e-5)
    assert all(high - low <= 250 for low, high in asked)
    assert (name == "none") is not bool(asked)


def test_history_that_no_query_is_admitted_is_not_read(native):
    mask = causal(100, tokens=10_000, window=300)
    query, key, value = operands(100, 10_000)
    asked = []

    def read(low, high):
        asked.append((low, high))
        return key[:, :, low:high], value[:, :, low:high]

    new = slice(9_900, 10_000)
    prompt.attend(
        query, key[:, :, new], value[:, :, new], torch.arange(9_900, 10_000), mask, 0.25, 0, 10_000, None,
        native.extents, read,
    )  # fmt: skip
    assert asked == [(9_601, 9_900)]
