"""Attention over packed caches equals dense attention over what they read as."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels import codec, reference
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(
    *, batch=1, heads=1, slots=64, key_bits=4, value_bits=4, head_dim=16, value_dim=16, dtype=torch.float32, **kept
):
    key = Format("key", key_bits, head_dim, dtype, **kept)
    value = Format("value", value_bits, value_dim, dtype, **kept)
    return tuple(CacheState.empty(form, batch, heads, slots, "cpu") for form in (key, value))


def attend(
    keys, values, query, key, value, positions, mask=None, scale=None, first=0, length=None, sink=None, softcap=None
):
    return reference.attend(
        query, keys.buffer, values.buffer, key, value, positions, mask, scale, softcap, keys.slots, first,
        keys.slots if length is None else length, keys.format, values.format, sink,
    )  # fmt: skip


def dense_attend(keys, values, query, key, value, positions, mask=None, scale=None, first=0, length=None, sink=None):
    """The definition: dense caches, new tokens put in place, softmax in float64, a column for the sink."""
    length = keys.slots if length is None else length
    axes = []
    for state, new in ((keys, key), (values, value)):
        axis = torch.zeros(*new.shape[:2], length, new.shape[3], dtype=torch.float64)
        read = state.read().double()
        for a in range(length):
            if 0 <= first + a < state.slots:
                axis[:, :, a] = read[:, :, first + a]
        for t, position in enumerate(positions.tolist()):
            if position >= 0 and 0 <= position - first < length:
                axis[:, :, position - first] = new[:, :, t].double()
        axes.append(axis.repeat_interleave(query.shape[1] // new.shape[1], 1))
    logits = query.double() @ axes[0].mT * (query.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.double()
    column = logits.new_full(logits.shape[:3], -math.inf) if sink is None else sink[:, None].expand(logits.shape[:3])
    weights = torch.cat((logits, column[..., None]), -1).softmax(-1)[..., :-1].nan_to_num(0.0)
    return (weights @ axes[1]).to(query.dtype)


@st.composite
def cases(draw):
    batch, heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    slots, head_dim, value_dim = (
        draw(st.integers(1, 50)),
        draw(st.sampled_from((8, 12, 16))),
        draw(st.sampled_from((8, 10))),
    )
    bits = st.sampled_from((16, *codec.CODED_BITS))
    keys, values = pair(
        batch=batch,
        heads=heads,
        slots=slots,
        key_bits=draw(bits),
        value_bits=draw(bits),
        head_dim=head_dim,
        value_dim=value_dim,
        sinks=draw(st.sampled_from((0, 2))),
        window=draw(st.sampled_from((0, 3, 64))),
    )
    seed = draw(st.integers(0, 2**31))
    generator = torch.manual_seed(seed)
    for step in range(draw(st.integers(0, 4))):
        size = draw(st.integers(1, slots))
        at = draw(st.integers(0, slots - size))
        shift = draw(st.sampled_from((0, 0, 1, 2)))
        rows = None if draw(st.booleans()) else torch.rand(batch, size, generator=generator) < 0.7
        for state, width in ((keys, head_dim), (values, value_dim)):
            new = normal(batch, heads, size, width, seed=seed + step) + step
            new[:, :, :: draw(st.sampled_from((3, 100)))] = 0
            state.write(new, torch.arange(at, at + size), shift=shift, rows=rows)
    queries, tokens = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    first = draw(st.integers(-3, slots))
    length = draw(st.integers(1, slots + 5))
    positions = torch.tensor(
        draw(st.lists(st.integers(-1, slots + 4), min_size=tokens, max_size=tokens)), dtype=torch.int64
    )
    query = normal(batch, heads * groups, queries, head_dim, seed=seed + 10)
    key, value = (
        normal(batch, heads, tokens, head_dim, seed=seed + 11),
        normal(batch, heads, tokens, value_dim, seed=seed + 12),
    )
    mask = None
    kind = draw(st.sampled_from(("none", "bool", "float")))
    if kind != "none":
        shape = [draw(st.sampled_from((1, n))) for n in (batch, heads * groups, queries)]
        mask = torch.rand(*shape, length, generator=generator) < draw(st.sampled_from((0.1, 0.7)))
        if kind == "float":
            low = draw(st.sampled_from((-math.inf, -1e4, torch.finfo(torch.bfloat16).min)))
            mask = torch.where(mask, torch.randn(mask.shape, generator=generator), low)
    scale = draw(st.sampled_from((None, 0.3)))
    sink = draw(st.sampled_from((None, 2 * torch.randn(heads * groups, generator=generator))))
    return keys, values, query, key, value, positions, mask, scale, first, length, sink


@given(cases(), st.sampled_from((2**24, 1)), st.sampled_from((2**21, 64)))
@settings(deadline=None, max_examples=100)
def test_equals_dense_attention_over_what_is_read(case, logit_elements, block_elements):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_LOGIT_ELEMENTS", logit_elements)
        patch.setattr(reference, "_BLOCK_ELEMENTS", block_elements)
        got = attend(*case)
    expected = dense_attend(*case)
    assert got.is_contiguous()
    # Float32 additive masks of a large size leave few bits to the logits
    torch.testing.assert_close(
        got, expected, atol=2e-3 if case[6] is not None and case[6].is_floating_point() else 2e-4, rtol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    keys, values = pair(batch=2, heads=2, slots=128, dtype=dtype)
    new = normal(2, 2, 100, 16).to(dtype)
    for state in (keys, values):
        state.write(new, torch.arange(100))
    query = normal(2, 4, 3, 16).to(dtype)
    args = (keys, values, query, new[:, :, :3], new[:, :, :3], torch.arange(100, 103))
    got = attend(*args, length=103)
    assert got.dtype == dtype
    torch.testing.assert_close(got, dense_attend(*args, length=103), atol=0.02, rtol=0.02)


def test_each_row_uses_its_own_sets():
    keys, values = pair(batch=2, slots=128, sinks=0, window=4)
    for state in (keys, values):
        state.write(torch.stack((normal(1, 20, 16), 100 + normal(1, 20, 16))), torch.arange(20))
        rows = torch.tensor([[True], [False]]).expand(2, 60)
        state.write(normal(2, 1, 60, 16) - 5, torch.arange(20, 80), rows=rows)
        state.write(normal(2, 1, 10, 16) + 3, torch.arange(80, 90))
    args = (keys, values, normal(2, 2, 1, 16), normal(2, 1, 1, 16), normal(2, 1, 1, 16), torch.tensor([90]))
    torch.testing.assert_close(attend(*args), dense_attend(*args), atol=1e-3, rtol=1e-3)


def test_new_tokens_replace_what_the_state_holds_and_are_exact():
    keys, values = pair(slots=32, key_bits=2, value_bits=2, sinks=0, window=0)
    old, new = normal(1, 1, 32, 16), normal(1, 1, 32, 16, seed=1)
    for state in (keys, values):
        state.write(old, torch.arange(32))
    query = normal(1, 2, 4, 16, seed=2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, new, new, enable_gqa=True)
    torch.testing.assert_close(attend(keys, values, query, new, new, torch.arange(32)), expected)


def test_the_state_as_it_was_or_as_it_is_gives_the_same_for_new_tokens():
    new = normal(1, 2, 40, 16)
    results = []
    for write_first in (False, True):
        keys, values = pair(heads=2, sinks=0, window=64)
        for state in (keys, values):
            state.write(new[:, :, :39], torch.arange(39))
        if write_first:
            for state in (keys, values):
                state.write(new[:, :, 39:], torch.tensor([39]))
        results.append(
            attend(keys, values, normal(1, 2, 1, 16), new[:, :, 39:], new[:, :, 39:], torch.tensor([39]), length=40)
        )
    torch.testing.assert_close(results[0], results[1])


def test_never_written_slots_are_zeros_that_softmax_sees():
    keys, values = pair(slots=10)
    value = torch.ones(1, 1, 1, 16)
    out = attend(keys, values, torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16), value, torch.tensor([0]))
    torch.testing.assert_close(out, torch.full((1, 1, 1, 16), 0.1))


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, 2, 64, dtype=torch.bool), torch.full((1, 1, 1, 64), -math.inf)])
def test_a_query_that_may_see_nothing_gets_zeros(mask):
    keys, values = pair()
    for state in (keys, values):
        state.write(normal(1, 1, 40, 16), torch.arange(40))
    out = attend(keys, values, normal(1, 2, 2, 16), *[normal(1, 1, 2, 16)] * 2, torch.arange(40, 42), mask)
    assert not out.any()


def test_dropped_tokens_have_no_influence():
    keys, values = pair()
    for state in (keys, values):
        state.write(normal(1, 1, 40, 16), torch.arange(40))
    nothing = torch.full((1, 1, 2, 16), math.nan)
    query = normal(1, 1, 1, 16)
    expected = attend(keys, values, query, *[normal(1, 1, 0, 16)] * 2, torch.arange(0))
    assert torch.equal(attend(keys, values, query, nothing, nothing, torch.tensor([-1, 99])), expected)


def test_an_empty_axis_gives_zeros():
    keys, values = pair()
    out = attend(keys, values, normal(1, 2, 3, 16), *[normal(1, 1, 0, 16)] * 2, torch.arange(0), length=0)
    assert torch.equal(out, torch.zeros(1, 2, 3, 16))


def test_decoding_follows_full_precision():
    """From a prompt to a full cache, token by token, against attention over the raw tokens."""
    head_dim, slots = 64, 190
    keys, values = pair(heads=2, slots=slots, key_bits=8, value_bits=8, head_dim=head_dim, value_dim=head_dim)
    key = normal(1, 2, slots, head_dim) * torch.linspace(0.2, 3, head_dim) + torch.linspace(-3, 3, head_dim)
    value, query = normal(1, 2, slots, head_dim, seed=1), normal(1, 4, slots, head_dim, seed=2)
    for at, size in ((0, 100), (100, 60), *((t, 1) for t in range(160, slots))):
        block = slice(at, at + size)
        positions = torch.arange(at, at + size)
        mask = torch.ones(1, 1, slots, slots, dtype=torch.bool).tril()[:, :, block]
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, block], key, value, attn_mask=mask, enable_gqa=True
        )
        out = attend(keys, values, query[:, :, block], key[:, :, block], value[:, :, block], positions, mask)
        assert (out - expected).norm() < 0.02 * expected.norm()
        keys.write(key[:, :, block], positions, query=query[:, :, block], mask=mask)
        values.write(value[:, :, block], positions, mask=mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": torch.zeros(1, 3, 1, 16)},
            r"query must be \[1, a multiple of 2, queries, 16\], got \(1, 3, 1, 16\)",
        ),
        ({"query": torch.zeros(1, 2, 1, 8)}, "query must be"),
        ({"value": torch.zeros(1, 2, 1, 8)}, r"value must be \[1, 2, 1, 16\], got \(1, 2, 1, 8\)"),
        ({"positions": torch.arange(2)}, r"positions must be \[1\], got \(2,\)"),
        ({"mask": torch.zeros(1, 1, 1, 63)}, r"mask must be .*, 64\], got \(1, 1, 1, 63\)"),
        ({"mask": torch.zeros(1, 1, 64)}, "mask must be"),
        ({"sink": torch.zeros(2)}, r"sink must be \[4\], got \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    keys, values = pair(heads=2)
    args = {
        "query": torch.zeros(1, 4, 1, 16),
        "key": torch.zeros(1, 2, 1, 16),
        "value": torch.zeros(1, 2, 1, 16),
        "positions": torch.tensor([0]),
        "mask": None,
    }
    attend(keys, values, **args)
    with pytest.raises(ValueError, match=message):
        attend(keys, values, **(args | change))


def test_the_first_sequences_attend_as_among_all():
    keys, values = pair(batch=3, heads=2)
    for state, seed in ((keys, 0), (values, 1)):
        state.write(normal(3, 2, 40, 16, seed=seed), torch.arange(40))
    query, new = normal(3, 4, 2, 16, seed=2), (normal(3, 2, 2, 16, seed=3), normal(3, 2, 2, 16, seed=4))
    states = keys.buffer, values.buffer
    rest = torch.arange(40, 42), None, None, None, 64, 0, 42, keys.format, values.format, None
    whole = reference.attend(query, *states, *new, *rest)
    for count in (1, 2):
        part = reference.attend(query[:count], *states, *(x[:count] for x in new), *rest, 3)
        torch.testing.assert_close(part, whole[:count], atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="2 sequences attend to caches of 1"):
        reference.attend(query[:2], *states, *(x[:2] for x in new), *rest, 1)


def test_formats_in_the_wrong_place_are_refused():
    keys, values = pair()
    with pytest.raises(ValueError, match="the formats of a key and of a value cache"):
        attend(values, keys, *[normal(1, 1, 1, 16)] * 3, torch.tensor([0]))
