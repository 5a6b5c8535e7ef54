"""Writes in C++ leave the state that the reference leaves, up to rounding."""

import itertools
import math
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels import codec, reference, tiles
from decoquant_compile.kernels.cpu.native import _tables
from decoquant_compile.kernels.format import FITTED, NO_EPOCH, ORIGIN, START, TOTAL, Format
from decoquant_compile.kernels.state import CacheState
from tests.kernels.cpu.cases import BITS, DTYPES, HEAD_DIMS, Source, Tokens, Write, Writer

ROUNDED = ("average", "deviation", "energy", "weights", "means", "scales", "gains")
"""Sections that rounding may change, besides the codes."""


def sections(state):
    return state.format.layout(state.batch, state.heads, state.slots).views(state.buffer)


def codes(state):
    """uint8 ``[batch, heads, capacity, channels]``, padding included."""
    form = state.format
    channels = tiles.padded(form.role, form.bits, form.head_dim)
    slots = slice(0, tiles.capacity(state.slots))
    return tiles.read(sections(state).planes, slots, role=form.role, bits=form.bits, head_dim=channels)


def without_rounded(state):
    """The buffer without what rounding may change: header, rows, labels, epochs, copies, gaps between the sections."""
    copied = state.clone()
    views = sections(copied)
    for section in (*(getattr(views, name) for name in ROUNDED), *views.planes):
        section.zero_()
    if state.format.bits == 16:
        views.raw.nan_to_num_(nan=0.0)  # which nan it is depends on how a dtype was converted
    return copied.buffer


def steps_apart(a, b):
    """Number of steps between 16-bit floats, from one representable number to the next."""
    bits = [x.view(torch.int16).int() for x in (a, b)]
    a, b = (torch.where(x < 0, -(x & 0x7FFF), x) for x in bits)
    return (a - b).abs()


def read(state):
    return reference.dequantise(state.buffer, state.batch, state.heads, state.slots, state.format)


def exact(write, state):
    """The tokens of a write as the cache would hold them unencoded, zeros elsewhere."""
    form = state.format
    plain = CacheState.empty(
        Format(form.role, 16, form.head_dim, form.dtype), state.batch, state.heads, state.slots, "cpu"
    )
    sections(plain).header.copy_(sections(state).header)
    write.expected(plain)
    return reference._finite(read(plain)).double()


def assert_same(got, expected, truth):
    """Two states after the same write to equal states; `truth` as of `exact`."""
    a, b = sections(got), sections(expected)
    assert torch.equal(without_rounded(got), without_rounded(expected))
    if got.format.bits == 16:
        assert torch.equal(a.raw.isnan(), b.raw.isnan())
        return
    for name in ("average", "deviation", "energy"):
        x, y = getattr(a, name), getattr(b, name)
        largest = float(y.abs().max()) if y.numel() else 0.0
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * largest, msg=lambda text, name=name: f"{name}: {text}")
    assert (steps_apart(a.weights, b.weights) <= 1).all()
    assert (steps_apart(a.scales, b.scales) <= 1).all()
    # A mean that cancels has few digits; its channel's spread is about 1 / scale.
    cancelled = (a.means.float() - b.means.float()).abs() <= 1e-3 / b.scales[:, : b.means.shape[1]].float()
    if b.means.numel():
        assert ((steps_apart(a.means, b.means) <= 1) | cancelled).all()

    assert torch.equal(a.gains < 0, b.gains < 0)
    same_fit = (a.scales == b.scales).all(-1).all(1)  # [batch, heads]
    if b.means.numel():
        same_fit &= (a.means == b.means).all(-1).all(1) & (a.weights == b.weights).all(-1)
    differ = codes(got) != codes(expected)
    assert not differ[:, :, got.slots :].any()
    # Codes under a gain of zero stand for zero, whatever they are. One code that rounding decided otherwise changes
    # those behind it, which make up for its error: what counts is how many tokens are concerned. Equal ones meet the
    # same tie (a token of equal channels has many), which torch's sums decide otherwise on another CPU.
    differ = (differ[:, :, : got.slots].any(-1) | (steps_apart(a.gains, b.gains) > 1)) & ((a.gains > 0) | (b.gains > 0))
    origin = int(b.header[ORIGIN])
    differ = differ[:, :, (origin + torch.arange(got.slots)) % got.slots]
    written = int(truth.any(-1).sum())
    apart = truth[differ & same_fit[..., None]]
    # Beside a token that is huge, float32 cannot tell small ones apart: those are equal, too.
    apart = (apart / (1e-6 * truth.abs().max().clamp_min(1e-30))).round()
    assert len(apart.unique(dim=0)) <= max(2, written // 1000)

    x, y = read(got).double(), read(expected).double()
    assert x.isfinite().all()
    typical = y.norm(dim=-1).amax((1, 2))[:, None, None].clamp_min(1e-30)
    alike = same_fit[..., None] & ~differ
    step = torch.finfo(got.format.dtype).eps + 2**-10  # of a number that is read, and of a gain
    assert ((x - y).norm(dim=-1)[alike] <= (step * typical).expand_as(alike)[alike]).all()
    # The others are read no worse.
    ours, theirs = (
        ((read - truth).norm(dim=-1) / typical)[~alike & truth.any(-1)].square().sum().sqrt() for read in (x, y)
    )
    assert ours <= 1.25 * theirs + 0.05


def assert_writes_like_the_oracle(native, write, state):
    truth = exact(write, state)
    expected = state.clone()
    write.expected(expected)
    write.apply(native, state)
    assert_same(state, expected, truth)


def assert_any_writes_equal_the_oracle(native, random, count):
    writer = Writer(random)
    for _ in range(count):
        assert_writes_like_the_oracle(native, writer.write(), writer.state)


@given(random=st.randoms(use_true_random=False), count=st.integers(1, 6))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_writes_equal_the_oracle(native, random, count):
    assert_any_writes_equal_the_oracle(native, random, count)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("bits", codec.CODED_BITS)
def test_tables_do_not_follow_the_default_dtype(bits, dtype):
    """They are made once and for all, and the C++ reads them as what they were meant to be."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        tables = _tables.__wrapped__(bits, 80)
    finally:
        torch.set_default_dtype(before)
    assert [table.dtype for table in tables] == [torch.int8, *[torch.float32] * (len(tables) - 1)]


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 4000, 500))
def test_any_writes_equal_the_oracle_in_a_long_sweep(native, start):
    for seed in range(start, start + 500):
        try:
            assert_any_writes_equal_the_oracle(native, Random(seed), 8)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


def empty(bits, *, role="key", batch=2, heads=2, slots=200, head_dim=64, dtype=torch.bfloat16, sinks=4, window=32):
    return CacheState.empty(Format(role, bits, head_dim, dtype, sinks, window), batch, heads, slots, "cpu")


def tokens_of(state, count, *, seed=0, dtype=None):
    form = state.format
    return Tokens(Source(Random(seed)), state.batch, state.heads, form.head_dim, dtype or form.dtype).make(count)


def run(first, stop):
    return torch.arange(first, stop)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("head_dim", [1, 2, 7, *HEAD_DIMS])
def test_every_width_and_head_size(native, bits, role, head_dim):
    state = empty(bits, role=role, head_dim=head_dim, dtype=torch.float32)
    new = tokens_of(state, 131)
    for a, b in ((0, 100), (100, 101), (101, 131)):
        assert_writes_like_the_oracle(native, Write(new[:, :, a:b], run(a, b)), state)


@pytest.mark.parametrize("bits", codec.CODED_BITS)
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_one_at_a_time_equals_one_chunk_given_the_same_fit(native, bits, role, head_dim):
    whole, parts = (empty(bits, role=role, head_dim=head_dim) for _ in range(2))
    new = tokens_of(whole, 190)
    for state in (whole, parts):
        Write(new[:, :, :60], run(0, 60)).apply(native, state)
        sections(state).rows[:, FITTED] = 10**6  # keeps this fit from being renewed
    Write(new[:, :, 60:], run(60, 190)).apply(native, whole)
    for t in range(60, 190):
        Write(new[:, :, t : t + 1], run(t, t + 1)).apply(native, parts)
    for name in ("average", "deviation"):  # whose sums depend on the order
        for state in (whole, parts):
            getattr(sections(state), name).zero_()
    assert torch.equal(whole.buffer, parts.buffer)


@pytest.mark.parametrize("bits", [16, 5, 4])
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_nothing(native, threads, bits, role, batch):
    states = [empty(bits, role=role, batch=batch, slots=1300) for _ in range(3)]
    new = tokens_of(states[0], 1300)
    query = tokens_of(states[0], 1300, seed=1)
    for state, count in zip(states, (1, 2, 5), strict=True):
        threads(count)
        Write(new[:, :, :1000], run(0, 1000), query[:, :, :1000]).apply(native, state)
        Write(new[:, :, 1000:], run(900, 1200), query[:, :, 1000:], shift=17).apply(native, state)
    assert torch.equal(states[0].buffer, states[1].buffer)
    assert torch.equal(states[0].buffer, states[2].buffer)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("role", ["key", "value"])
def test_degenerate_tokens(native, bits, dtype, role):
    state = empty(bits, role=role, batch=7, dtype=dtype, head_dim=24, slots=100)
    new = tokens_of(state, 90)
    large = torch.finfo(dtype).max
    new[0] = 3.0  # constant
    new[1, :, :, 5] = large / 2  # a huge channel
    new[2, :, 10:50:3, 2] = math.nan
    new[2, :, 11:50:3] = math.inf
    new[2, :, 12:50:3] = -large
    new[3] = torch.finfo(dtype).tiny
    new[4, :, 7:] = 0  # mostly zeros
    new[5, 0] = 0  # a dead head
    new[6, :, :, ::2] = -0.0
    for a, b in itertools.pairwise((0, 1, 30, 31, 90)):
        assert_writes_like_the_oracle(native, Write(new[:, :, a:b], run(a, b)), state)
    assert_writes_like_the_oracle(native, Write(torch.zeros_like(new[:, :, :20]), run(60, 80)), state)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**51, 2.0**70])
def test_queries_that_are_no_ordinary_numbers_are_left_out(native, bad):
    state = empty(4, dtype=torch.float32)
    new = tokens_of(state, 120)
    query = tokens_of(state, 120, seed=1).repeat(1, 2, 1, 1)
    query[1, 3, 50, 7] = bad
    query[0, :, 20:] = bad
    for a, b in ((0, 60), (60, 61), (61, 120)):
        assert_writes_like_the_oracle(native, Write(new[:, :, a:b], run(a, b), query[:, :, a:b]), state)
    assert sections(state).energy.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES])
@pytest.mark.parametrize("chunk", [100, 9, 1])
def test_left_padding(native, dtype, chunk):
    state = empty(4, batch=3)
    new = tokens_of(state, 100)
    padding = torch.tensor([0, 5, 70])
    new[2, :, :70] *= 100  # garbage
    mask = (torch.arange(200) >= padding[:, None, None])[:, None].expand(3, 1, 100, 200)
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    for a in range(0, 100, chunk):
        b = min(100, a + chunk)
        assert_writes_like_the_oracle(native, Write(new[:, :, a:b], run(a, b), mask=mask[:, :, a:b]), state)
    assert torch.equal(sections(state).rows[:, START], padding)
    assert torch.equal(sections(state).rows[:, TOTAL], 96 - padding)


def test_the_last_of_equal_positions_counts_and_negative_ones_are_dropped(native):
    for bits in BITS:
        state = empty(bits, batch=1, window=2)
        new = tokens_of(state, 120)
        positions = torch.randint(-5, 60, (120,), generator=torch.manual_seed(0))
        assert_writes_like_the_oracle(native, Write(new, positions), state)
        last = {p: t for t, p in enumerate(positions.tolist()) if p >= 0}
        got = read(state).float()
        exact = new[:, :, list(last.values())].float()
        error = (got[:, :, list(last)] - exact).norm() / exact.norm()
        assert error <= {16: 0, 8: 0.01, 5: 0.03, 4: 0.06, 3: 0.12, 2: 0.25}[bits]
        assert not got[:, :, [p for p in range(200) if p not in last]].any()
        before = state.buffer.clone()
        Write(new[:, :, :2], torch.tensor([-1, -7])).apply(native, state)
        assert torch.equal(state.buffer, before)


@pytest.mark.parametrize("bits", BITS)
def test_a_window_that_slides(native, bits):
    state = empty(bits, slots=70, window=8)
    new = tokens_of(state, 300)
    assert_writes_like_the_oracle(native, Write(new[:, :, :70], run(0, 70)), state)
    at = 70
    for count in (1, 1, 1, 3, 70, 1, 64, 65, 1):
        write = Write(new[:, :, at : at + count], run(70 - count, 70), shift=count)
        assert_writes_like_the_oracle(native, write, state)
        at += count
    for shift in (69, 70, 71, 1000):
        assert_writes_like_the_oracle(native, Write(new[:, :, :1], torch.tensor([0]), shift=shift), state)
        assert read(state)[:, :, 0].any()
        assert not read(state)[:, :, 70 - min(shift, 69) :].any()
    assert_writes_like_the_oracle(native, Write(new[:, :, :2], torch.tensor([-1, -1]), shift=1), state)
    assert not read(state).any()


@pytest.mark.parametrize("bits", codec.CODED_BITS)
def test_zeros_over_exact_copies(native, bits):
    """A zero has no copy, but the one it replaces must go."""
    state = empty(bits)
    assert_writes_like_the_oracle(native, Write(tokens_of(state, 100), run(0, 100)), state)
    positions = torch.tensor([2, 3, 95, 97])
    assert_writes_like_the_oracle(native, Write(torch.zeros(2, 2, 4, 64), positions), state)
    assert not read(state)[:, :, positions].any()


def test_no_free_parameter_set(native):
    state = empty(8, batch=1, slots=64, window=8)
    new = tokens_of(state, 64)
    Write(new[:, :, :20], run(0, 20)).apply(native, state)
    views = sections(state)
    sets = views.scales.shape[1]
    views.epochs[0, :sets] = torch.arange(sets, dtype=torch.uint8)  # every set is named
    before = views.scales.clone()
    assert_writes_like_the_oracle(native, Write(new[:, :, 20:], run(20, 64)), state)
    assert torch.equal(views.scales, before)
    # Set 3 belongs to a token that is about to go.
    assert_writes_like_the_oracle(native, Write(new[:, :, :1], torch.tensor([3])), state)


def test_a_prompt_token_by_token(native):
    """First fit, refits as the tokens grow, a new sequence over the old one."""
    state = empty(3, slots=150, window=8)
    for turn in range(2):
        new = tokens_of(state, 150, seed=turn)
        for t in range(150):
            assert_writes_like_the_oracle(native, Write(new[:, :, t : t + 1], torch.tensor([t])), state)
    assert len(sections(state).epochs.unique()) > 3
    assert not (sections(state).epochs == NO_EPOCH).all(1).any()


@pytest.mark.parametrize("bits", BITS)
def test_a_position_beyond_the_cache_changes_nothing(native, bits):
    state = empty(bits)
    new = tokens_of(state, 3)
    Write(new, run(0, 3)).apply(native, state)
    before = state.buffer.clone()
    for write in (Write(new, run(198, 201)), Write(new, torch.tensor([500, 0, 1]), shift=3)):
        with pytest.raises(
            IndexError, match=f"position {int(write.positions.max())} is outside the cache of 200 slots"
        ):
            write.apply(native, state)
        assert torch.equal(state.buffer, before)
