"""States with room to grow: as one that was large enough from the start, and sections as what they were cut from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState, GrowingState

FORMATS = [(role, bits) for role in ("key", "value") for bits in (16, 8, 5, 4, 3, 2)]


def tokens(count, head_dim=16, seed=0):
    x = torch.randn(2, 2, count, head_dim, generator=torch.Generator().manual_seed(seed))
    x[:, :, 5::37] = 0
    return x


def append(state, new):
    state.reserve(new.shape[2])
    state.write(new, torch.arange(state.end, state.end + new.shape[2]))
    state.end += new.shape[2]


def shown(state, first=0):
    return state.read()[:, :, first : state.end]


@pytest.mark.parametrize(("role", "bits"), FORMATS)
def test_growing_changes_no_token(role, bits):
    form = Format(role, bits, 16, torch.float32, 2, 8)
    x = tokens(700)
    fixed, growing = CacheState.empty(form, 2, 2, 1024, "cpu"), GrowingState.with_room(form, 2, 2, 10, "cpu")
    first = 0
    for count in (10, 1, 1, 60, 100, 7, 120, 1, 400):
        new = x[:, :, first : first + count]
        fixed.write(new, torch.arange(first, first + count))
        append(growing, new)
        first += count
        assert torch.equal(fixed.read()[:, :, :first], shown(growing))
    assert 700 <= growing.slots <= 1152


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.integers(1, 150), min_size=1, max_size=5),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 90),
    st.integers(1, 90),
)
def test_a_section_shows_what_it_was_cut_from(form, counts, a, b, more, room):
    role, bits = form
    state = GrowingState.with_room(Format(role, bits, 16, torch.float32, 2, 8), 2, 2, 1, "cpu")
    for seed, count in enumerate(counts):
        append(state, tokens(count, seed=seed))
    first, last = sorted((round(a * state.end), round(b * state.end)))
    before = state.read()
    part = state.section(first, last, room)
    start = first % 64
    assert part.end - start == last - first
    assert part.slots >= part.end + room
    assert torch.equal(shown(part, start), before[:, :, first:last])
    assert not part.read()[:, :, part.end :].any()
    if more:  # and it can be appended to, and cut again
        new = tokens(more, seed=9)
        append(part, new)
        kept = shown(part, start)
        newest = kept[:, :, -min(more, 8) :]
        assert torch.equal(newest, new[:, :, -min(more, 8) :])
        again = part.section(start, part.end, 0)
        assert torch.equal(shown(again, start % 64), kept)
    assert torch.equal(state.read(), before)


def test_copies_know_how_far_they_go():
    state = GrowingState.with_room(Format("key", 4, 16, torch.float32, 2, 8), 2, 2, 1, "cpu")
    append(state, tokens(90))
    for copied in (state.clone(), state.select(torch.tensor([0, 1, 1]))):
        assert isinstance(copied, GrowingState)
        assert copied.end == 90
    assert state.dense_nbytes == 2 * 2 * 90 * 16 * 4
