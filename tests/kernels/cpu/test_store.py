"""Writes in C++ leave the state that the reference leaves, up to rounding."""

import dataclasses
import itertools
import math
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels import codec, tiles
from decoquant_compile.kernels.format import FITTED, Format
from decoquant_compile.kernels.state import CacheState
from tests.kernels.cpu.cases import DTYPES, Source, Tokens, Write, Writer

ROUNDED = ("average", "deviation", "energy", "means", "scales", "gains")
"""Sections that rounding may change; those of codes aside."""


def sections(state):
    return state.format.layout(state.batch, state.heads, state.slots).views(state.buffer)


def codes(state):
    """uint8 ``[batch, heads, capacity, channels]``, padding included."""
    form = state.format
    channels = tiles.padded(form.role, form.bits, form.head_dim)
    slots = slice(0, tiles.capacity(state.slots))
    return tiles.read(sections(state).planes, slots, role=form.role, bits=form.bits, head_dim=channels)


def integral(state):
    """The buffer without what rounding may change: headers, labels, epochs, exact copies, gaps between sections."""
    copied = state.clone()
    views = sections(copied)
    for name in ROUNDED:
        getattr(views, name).zero_()
    for plane in views.planes:
        plane.zero_()
    if state.format.bits == 16:
        views.raw.nan_to_num_(nan=0.0)  # which nan it is depends on how a dtype was converted
        assert torch.equal(views.raw.isnan(), sections(state).raw.isnan()) or sections(state).raw.isnan().any()
    return copied.buffer


def steps_apart(a, b):
    """How many representable numbers lie between 16-bit floats."""
    ordered = []
    for x in (a, b):
        number = x.view(torch.int16).int()
        ordered.append(torch.where(number < 0, -(number & 0x7FFF), number))
    return (ordered[0] - ordered[1]).abs()


def assert_same(got, expected, count):
    """Two states after one write of at most `count` tokens to equal states."""
    a, b = sections(got), sections(expected)
    assert torch.equal(integral(got), integral(expected))
    if got.format.bits == 16:
        assert torch.equal(a.raw.isnan(), b.raw.isnan())
        return
    for name in ("average", "deviation", "energy"):
        x, y = getattr(a, name), getattr(b, name)
        size = float(y.abs().max()) if y.numel() else 0.0
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * size, msg=lambda text, name=name: f"{name}: {text}")
    assert (steps_apart(a.scales, b.scales) <= 1).all()
    spread = b.scales[:, : b.means.shape[1]].float().reciprocal() if b.means.numel() else b.means.float()
    near = (a.means.float() - b.means.float()).abs() <= 1e-3 * spread  # of a mean that cancels
    assert ((steps_apart(a.means, b.means) <= 1) | near).all()

    assert torch.equal(a.gains < 0, b.gains < 0)
    if torch.equal(a.scales, b.scales) and torch.equal(a.means, b.means):
        differ = codes(got) != codes(expected)
        channels = differ.shape[-1]
        written = count * got.batch * got.heads * channels
        assert int(differ.sum()) <= max(2, written // 1000)
        same = ~differ.any(-1)[:, :, : got.slots]
        assert (steps_apart(a.gains, b.gains)[same] <= 1).all()
    x, y = (state.read_by_reference().double() for state in (Read(got), Read(expected)))
    assert x.isfinite().all()
    size = y.norm(dim=-1).amax((1, 2), keepdim=True)[..., None].clamp_min(1e-30)
    assert ((x - y) / size).norm(dim=-1).square().mean() <= 0.03**2


@dataclasses.dataclass
class Read:
    state: CacheState

    def read_by_reference(self):
        from decoquant_compile.kernels import reference

        state = self.state
        return reference.dequantise(state.buffer, state.batch, state.heads, state.slots, state.format)


def assert_any_writes_equal_the_oracle(native, random, count):
    writer = Writer(random)
    got = writer.state
    for _ in range(count):
        write = writer.write()
        expected = got.clone()
        write.expected(expected)
        write.apply(native, got)
        assert_same(got, expected, len(write.positions))


@given(random=st.randoms(use_true_random=False), count=st.integers(1, 6))
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_any_writes_equal_the_oracle(native, random, count):
    assert_any_writes_equal_the_oracle(native, random, count)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 4000, 500))
def test_any_writes_equal_the_oracle_in_a_long_sweep(native, start):
    for seed in range(start, start + 500):
        try:
            assert_any_writes_equal_the_oracle(native, Random(seed), 8)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
