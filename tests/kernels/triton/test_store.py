"""Writes by Triton kernels leave the state that the reference leaves, up to rounding: in the interpreter."""

import itertools
import math
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels import codec, reference
from decoquant_compile.kernels.format import FITTED, NO_EPOCH, START, TOTAL, Format
from decoquant_compile.kernels.state import CacheState
from decoquant_compile.kernels.triton import encode, store
from tests.kernels.cpu.cases import BITS, Write, Writer
from tests.kernels.cpu.test_store import assert_same, exact, run, sections, tokens_of, without_rounded
from tests.kernels.triton.interpret import interpreted

BLOCKS = store.Blocks(heads=4, tokens=32, looked=64, summed=32, tiles=2)
"""Large tiles: the interpreter takes as long for one number as for a thousand."""

QUICK = 8
"""Bits at which a token is encoded at one radius: for tests that are not about codes."""


class Interpreted:
    """Stands where `cases.Write` expects the C++ kernels."""

    def store(self, state, new, positions, query, mask, slots, shift, first, key, rows=None):
        form = Format.parse(key)
        assert store.unserved(state, new, query, mask, form) is None
        operands = state, new, positions, query, mask, slots, shift, first, form, rows
        store.store(*operands, wrap=interpreted, blocks=BLOCKS)


KERNELS = Interpreted()


def assert_writes_like_the_oracle(write, state):
    truth = exact(write, state)
    expected = state.clone()
    write.expected(expected)
    write.apply(KERNELS, state)
    assert_same(state, expected, truth)


def assert_any_writes_equal_the_oracle(random, count):
    writer = Writer(random)
    for _ in range(count):
        assert_writes_like_the_oracle(writer.write(), writer.state)


@given(random=st.randoms(use_true_random=False), count=st.integers(1, 3))
@settings(
    deadline=None,
    max_examples=4,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink takes minutes here
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_any_writes_equal_the_oracle(random, count):
    assert_any_writes_equal_the_oracle(random, count)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 400, 50))
def test_any_writes_equal_the_oracle_in_a_long_sweep(start):
    for seed in range(start, start + 50):
        try:
            assert_any_writes_equal_the_oracle(Random(seed), 6)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


def empty(bits, *, role="key", batch=1, heads=2, slots=100, head_dim=64, dtype=torch.bfloat16, sinks=2, window=8):
    return CacheState.empty(Format(role, bits, head_dim, dtype, sinks, window), batch, heads, slots, "cpu")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("role", "head_dim"), [("key", 128), ("value", 80)])
def test_every_width(bits, role, head_dim):
    """Chunk, token, chunk: the first fit, a refit, codes with both."""
    state = empty(bits, role=role, heads=1, head_dim=head_dim, dtype=torch.float32)
    new = tokens_of(state, 41)
    for a, b in ((0, 30), (30, 31), (31, 41)):
        assert_writes_like_the_oracle(Write(new[:, :, a:b], run(a, b)), state)


@pytest.mark.parametrize("head_dim", [1, 7, 24, 64, 256])
def test_other_head_sizes(head_dim):
    state = empty(4, heads=1, head_dim=head_dim)
    new = tokens_of(state, 31)
    assert_writes_like_the_oracle(Write(new[:, :, :30], run(0, 30)), state)
    assert_writes_like_the_oracle(Write(new[:, :, 30:], run(30, 31)), state)


@pytest.mark.parametrize(("role", "bits"), [("key", 4), ("value", 3)])
def test_a_prompt_token_by_token(role, bits):
    """First fit, refits as the tokens grow, then a new sequence over the old one."""
    state = empty(bits, role=role, slots=40, window=4)
    for turn in range(2):
        new = tokens_of(state, 14, seed=turn)
        query = tokens_of(state, 14, seed=2)
        for t in range(14):
            one = slice(t, t + 1)
            expected = state.clone()
            write = Write(new[:, :, one], torch.tensor([t]), query[:, :, one])
            write.expected(expected)
            write.apply(KERNELS, state)
            # Sums over one token have one order: but for those over channels, all is equal.
            assert torch.equal(without_rounded(state), without_rounded(expected))
            for name in ("average", "deviation"):
                assert torch.equal(getattr(sections(state), name), getattr(sections(expected), name))
            if torch.equal(sections(state).scales, sections(expected).scales):
                assert all(map(torch.equal, sections(state).planes, sections(expected).planes))
            state = expected
    assert len(sections(state).epochs.unique()) > 2
    assert not (sections(state).epochs == NO_EPOCH).all(1).any()


@pytest.mark.parametrize("role", ["key", "value"])
def test_codes_of_other_tokens_stay(role):
    """Tokens of values share bytes with their neighbours."""
    for bits in codec.CODED_BITS:
        state = empty(bits, role=role, heads=1, window=0, sinks=0)
        new = tokens_of(state, 70)
        Write(new, run(0, 70)).expected(state)
        before = [plane.clone() for plane in sections(state).planes]
        sections(state).rows[:, FITTED] = 10**6  # keeps the fit from being renewed
        Write(new[:, :, 30:31], torch.tensor([30])).apply(KERNELS, state)
        Write(new[:, :, 20:25], torch.tensor([20, 21, 22, 23, 24])).apply(KERNELS, state)
        assert all(map(torch.equal, before, sections(state).planes))


@pytest.mark.parametrize(
    ("dtype", "role", "bits"),
    [(torch.float32, "value", 8), (torch.bfloat16, "key", 4), (torch.float16, "value", 3)],
)
def test_degenerate_tokens(dtype, role, bits):
    state = empty(bits, role=role, batch=7, dtype=dtype, head_dim=24, slots=60)
    new = tokens_of(state, 50)
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
    for a, b in itertools.pairwise((0, 1, 30, 31, 32, 50)):
        assert_writes_like_the_oracle(Write(new[:, :, a:b], run(a, b)), state)
    assert_writes_like_the_oracle(Write(torch.zeros_like(new[:, :, :9]), run(30, 39)), state)


@pytest.mark.parametrize("bad", [math.nan])
def test_queries_that_are_no_ordinary_numbers_are_left_out(bad):
    state = empty(4, dtype=torch.float32, batch=2)
    new = tokens_of(state, 40)
    query = tokens_of(state, 40, seed=1).repeat(1, 2, 1, 1)
    query[1, 3, 20, 7] = bad
    query[0, :, 20:] = bad
    for a, b in ((0, 20), (20, 21), (21, 40)):
        assert_writes_like_the_oracle(Write(new[:, :, a:b], run(a, b), query[:, :, a:b]), state)
    assert sections(state).energy.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [40, 19])
def test_left_padding(dtype, chunk):
    state = empty(QUICK, batch=3)
    new = tokens_of(state, 41)
    padding = torch.tensor([0, 5, 30])
    new[2, :, :30] *= 100  # garbage
    mask = (torch.arange(60) >= padding[:, None, None])[:, None].expand(3, 1, 41, 60)
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    for a in (*range(0, 40, chunk), 40):
        b = min(41 if a == 40 else 40, a + chunk)
        assert_writes_like_the_oracle(Write(new[:, :, a:b], run(a, b), mask=mask[:, :, a:b]), state)
    assert torch.equal(sections(state).rows[:, START], padding)
    assert torch.equal(sections(state).rows[:, TOTAL], (39 - padding))


@pytest.mark.parametrize("bits", [16, QUICK])
def test_a_ring_turns(bits):
    state = empty(bits, slots=20)
    new = tokens_of(state, 60)
    assert_writes_like_the_oracle(Write(new[:, :, :20], run(0, 20)), state)
    for t in range(20, 26):
        assert_writes_like_the_oracle(Write(new[:, :, t : t + 1], torch.tensor([19]), shift=1), state)
    assert_writes_like_the_oracle(Write(new[:, :, 26:40], run(6, 20), shift=14), state)
    assert_writes_like_the_oracle(Write(new[:, :, 40:60], run(0, 20), shift=50), state)
    assert_writes_like_the_oracle(Write(new[:, :, :1], torch.tensor([0]), shift=21), state)


@pytest.mark.parametrize("bits", [16, QUICK])
def test_rows_that_are_not_written(bits):
    state = empty(bits, batch=3, window=3)
    new = tokens_of(state, 25)
    rows = torch.rand(3, 25, generator=torch.manual_seed(0)) < 0.6
    rows[2] = False
    assert_writes_like_the_oracle(Write(new[:, :, :24], run(0, 24), rows=rows[:, :24]), state)
    assert_writes_like_the_oracle(Write(new[:, :, 24:], run(24, 25), rows=rows[:, 24:]), state)


@pytest.mark.parametrize("bits", [16, QUICK])
def test_the_last_of_equal_positions_counts_and_negative_ones_are_dropped(bits):
    state = empty(bits, window=2)
    new = tokens_of(state, 50)
    positions = torch.randint(-5, 30, (50,), generator=torch.manual_seed(0))
    assert_writes_like_the_oracle(Write(new, positions), state)
    before = state.buffer.clone()
    Write(new[:, :, :2], torch.tensor([-1, -7])).apply(KERNELS, state)
    Write(new[:, :, :1], torch.tensor([-1])).apply(KERNELS, state)
    assert torch.equal(state.buffer, before)


def test_no_free_parameter_set():
    state = empty(8, slots=64)
    new = tokens_of(state, 64)
    Write(new[:, :, :20], run(0, 20)).expected(state)
    views = sections(state)
    sets = views.scales.shape[1]
    views.epochs[0, :sets] = torch.arange(sets, dtype=torch.uint8)  # every set is named
    before = views.scales.clone()
    assert_writes_like_the_oracle(Write(new[:, :, 20:], run(20, 64)), state)
    assert torch.equal(views.scales, before)
    # Set 3 belongs to a token that is about to go.
    assert_writes_like_the_oracle(Write(new[:, :, :1], torch.tensor([3])), state)


@pytest.mark.parametrize("bits", [16, QUICK])
def test_a_position_beyond_the_cache_changes_nothing(bits):
    """The device cannot raise an exception; with assertions it stops, without them it must not write elsewhere."""
    state = empty(bits)
    new = tokens_of(state, 3)
    Write(new, run(0, 3)).expected(state)
    before = state.buffer.clone()
    for write in (Write(new, torch.tensor([98, 99, 100])), Write(new[:, :, :1], torch.tensor([100]), shift=3)):
        write.apply(KERNELS, state)
        assert torch.equal(state.buffer, before)


def test_tables_are_those_of_the_codec():
    cpu = torch.device("cpu")
    for bits in (2, 3, 4, 5):
        table = slice(2**bits - 4, 2 ** (bits + 1) - 4)
        assert encode.ENTRIES.value[table] == tuple(codec.lookup(torch.arange(2**bits).byte(), bits).tolist())
        assert encode.THRESHOLDS.value[table][:-1] == tuple(codec.thresholds(bits, cpu).tolist())
    for bits in codec.CODED_BITS:
        assert encode.RADII.value[bits] == tuple(codec.radii_table(bits, cpu).tolist())
    for odd in range(3, 17, 2):
        assert encode.cosine_table(odd) == tuple(codec.cosines(odd, cpu).flatten().tolist())
    for dtype, masked in store._MASKED.items():
        assert torch.tensor(reference._MASKED, dtype=dtype).item() == masked


def test_what_the_kernels_do_not_serve():
    state = empty(4)
    new = tokens_of(state, 2)

    def why(new=new, query=None, mask=None, form=state.format):
        return store.unserved(state.buffer, new, query, mask, form)

    assert why() is None
    assert (
        why(form=Format("key", 4, 34, torch.bfloat16)) == "the head size 34 has an odd factor above 16 or is above 512"
    )
    assert why(new=new[:, :, :0]) == "there is no token to write"
    assert why(query=new.double()) == "queries are torch.float64"
    assert why(mask=torch.zeros(1, 1, 2, 9, dtype=torch.float64)) == "the mask is torch.float64"
