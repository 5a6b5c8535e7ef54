"""Attention in Triton, interpreted, equals the reference."""

import dataclasses
import math
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels import reference
from tests.kernels.cpu.cases import Source, Tokens
from tests.kernels.cpu.test_attend import example, relative
from tests.kernels.triton.cases import BITS, attend, attention, dequantise

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def assert_equals_the_oracle(case):
    expected, got = case.expected(), attend(case)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.is_contiguous()
    assert torch.equal(got.isnan(), expected.isnan())
    assert relative(got, expected) <= TOLERANCE[got.dtype]


def small(count, **kwargs):
    return example(count, **{"batch": 1, "heads": 1, "groups": 4, **kwargs})


sweep = settings(
    deadline=None, max_examples=5, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@given(random=st.randoms(use_true_random=False))
@sweep
def test_equals_the_oracle(random):
    assert_equals_the_oracle(attention(random))


@given(
    sink=st.lists(st.floats(-100, 100, width=32) | st.just(-math.inf), min_size=4, max_size=4).map(torch.tensor),
    softcap=st.sampled_from((None, 20.0)),
    queries=st.integers(1, 5),  # of which those of one head share its sink
)
@sweep
def test_any_sink_equals_the_oracle(sink, softcap, queries):
    case = small(70, queries=queries, new=queries, slots=80, dtype=torch.float32)
    assert_equals_the_oracle(dataclasses.replace(case, sink=sink, softcap=softcap))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 320, 40))
def test_equals_the_oracle_in_a_long_sweep(start):
    for seed in range(start, start + 40):
        case = attention(Random(seed))
        try:
            assert_equals_the_oracle(case)
        except AssertionError as error:
            error.add_note(f"seed {seed}: {case}")
            raise


@pytest.mark.parametrize("bits", BITS)
def test_every_width(bits):
    """For 16 bits and fewer, of a cache of 130 tokens with a ragged last tile."""
    assert_equals_the_oracle(small(130, bits=(bits, bits), head_dim=128, value_dim=128, slots=192, dtype=torch.float16))


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65])
def test_lengths_at_the_edges_of_tiles(count):
    assert_equals_the_oracle(small(count, slots=count + 1, dtype=torch.float32))


def test_a_prompt_chunk_over_history():
    assert_equals_the_oracle(small(100, queries=7, new=7, groups=3))


def test_the_first_sequences_of_more():
    assert_equals_the_oracle(small(70, batch=3).of_first(2))


def test_several_parameter_sets():
    case = small(0, slots=400, sinks=0, window=1, dtype=torch.float32)
    source = Source(Random(1))
    for state in (case.keys, case.values):
        tokens = Tokens(source, 1, 1, 64, torch.float32)
        for at in range(80):
            state.write(tokens.make(1) * (1 + at), torch.tensor([at]))
        sections = state.format.layout(1, 1, 400).views(state.buffer)
        assert len(sections.epochs[0, :80].unique()) > 5
    case.positions = torch.tensor([80])
    assert_equals_the_oracle(case)


@pytest.mark.parametrize("turned", ["end", "ring"])
def test_keys_written_before_their_values(turned):
    """Writes of the two caches are two operators: in between the caches differ."""
    case = small(100, slots=101 if turned == "ring" else 200, new=4, dtype=torch.float32)
    slots = case.keys.slots
    case.keys.write(case.key[:, :, :3], torch.arange(slots - 3, slots), shift=2 if turned == "ring" else 0)
    assert_equals_the_oracle(case)


def test_inline_assembly_changes_no_bit():
    for bits in (3, 4, 5):
        case = small(60, bits=(bits, bits), head_dim=32, value_dim=32, slots=64, window=8)
        assert torch.equal(attend(case, ptx=True), attend(case, ptx=False))


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("additive", [False, True])
def test_a_sink_joins_the_softmax(softcap, additive):
    case = small(100, dtype=torch.float32, slots=110)
    mask = torch.rand(1, 1, 1, 110, generator=torch.manual_seed(1)) < 0.9
    mask[..., 101:] = False
    case.mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if additive else mask
    case.softcap = softcap
    sink = torch.tensor([0.5, -2.0, 4.0, -math.inf])
    keys = reference.dequantise(case.keys.buffer, 1, 1, 110, case.keys.format)
    keys[:, :, 100:101] = case.key
    logits = case.query[:, :, 0] @ keys[0, 0].T / 8
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    total = logits[0].masked_fill(~mask[0, 0], -math.inf).logsumexp(-1)
    share = (total - torch.logaddexp(total, sink)).exp()
    expected = case.expected() * share[None, :, None, None]
    case.sink = sink
    assert relative(attend(case), expected) <= 1e-3


@pytest.mark.parametrize("additive", [False, True])
def test_a_sink_where_nothing_else_is_admitted(additive):
    case = small(100, dtype=torch.float32)
    case.mask = torch.full((1, 1, 1, 200), -math.inf) if additive else torch.zeros(1, 1, 1, 200, dtype=torch.bool)
    case.sink = torch.tensor([0.5, -math.inf, 4.0, 0.0])
    assert not attend(case).any()


def test_a_query_that_is_not_finite_spoils_its_own_row_only():
    case = small(100)
    clean = attend(case)
    case.query = case.query.clone()
    case.query[0, 2, 0, 5] = math.nan
    got = attend(case)
    assert got[0, 2].isnan().all()
    got[0, 2] = clean[0, 2]
    assert torch.equal(got, clean)


def test_nothing_admitted_gives_zeros():
    case = small(100)
    case.mask = torch.zeros(1, 1, 1, 200, dtype=torch.bool)
    assert not attend(case).any()
    assert not attend(dataclasses.replace(case, length=0, mask=None)).any()


@pytest.mark.parametrize(("bits", "head_dim"), [*((bits, 64) for bits in BITS), (4, 24), (3, 80), (5, 128)])
def test_dequantise(bits, head_dim):
    case = small(90, bits=(bits, bits), head_dim=head_dim, value_dim=head_dim, slots=100)
    for state in (case.keys, case.values):
        dense = reference.dequantise(state.buffer, 1, 1, state.slots, state.format)
        # One rounding to bfloat16 apart at most
        torch.testing.assert_close(dequantise(state), dense, atol=1e-5, rtol=2**-7)
        for first, length, start in ((7, 40, None), (60, 50, 5), (0, 33, 88)):
            part = reference.dequantise(state.buffer, 1, 1, state.slots, state.format, first + (start or 0), length)
            got = dequantise(state, first, length, None if start is None else torch.tensor(start))
            torch.testing.assert_close(got, part, atol=1e-5, rtol=2**-7)
