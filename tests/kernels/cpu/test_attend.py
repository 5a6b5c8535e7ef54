"""Attention in C++ equals the reference."""

import dataclasses
import itertools
import math
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels.format import END, Format
from decoquant_compile.kernels.state import CacheState
from tests.kernels.cpu.cases import BITS, DTYPES, Attention, Source, Tokens, attention, fill

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 5e-3}


def relative(got, expected):
    """Error relative to the whole result, where that is no nan."""
    got, expected = (x.double().nan_to_num(nan=0.0) for x in (got, expected))
    error, size = float((got - expected).norm()), float(expected.norm())
    return error / size if error and size else error


def assert_equals_the_oracle(native, case):
    states = [state.buffer.clone() for state in (case.keys, case.values)]
    expected, got = case.expected(), case.result(native)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.is_contiguous()
    assert torch.equal(got.isnan(), expected.isnan())
    tolerance = TOLERANCE[got.dtype]
    if case.mask is not None and case.mask.dtype == torch.float16:
        tolerance = max(tolerance, 5e-3)  # logits near -65504 are multiples of 2 ** -8
    assert relative(got, expected) <= tolerance
    for state, before in zip((case.keys, case.values), states, strict=True):
        assert torch.equal(state.buffer, before)


@given(random=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_equals_the_oracle(native, random):
    assert_equals_the_oracle(native, attention(random))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 4000, 500))
def test_equals_the_oracle_in_a_long_sweep(native, start):
    for seed in range(start, start + 500):
        case = attention(Random(seed))
        try:
            assert_equals_the_oracle(native, case)
        except AssertionError as error:
            error.add_note(f"seed {seed}: {case}")
            raise


def example(
    count,
    *,
    seed=0,
    slots=200,
    batch=2,
    heads=2,
    groups=3,
    queries=1,
    bits=(4, 4),
    head_dim=64,
    value_dim=64,
    dtype=torch.bfloat16,
    sinks=4,
    window=32,
    new=1,
):
    """Caches with `count` tokens written at once and as many new ones as said behind them."""
    source = Source(Random(seed))
    keys, values = (
        CacheState.empty(Format(role, width, size, dtype, sinks, window), batch, heads, slots, "cpu")
        for role, width, size in (("key", bits[0], head_dim), ("value", bits[1], value_dim))
    )
    of_keys, of_values = (Tokens(source, batch, heads, size, dtype) for size in (head_dim, value_dim))
    if count:
        keys.write(of_keys.make(count), torch.arange(count))
        values.write(of_values.make(count), torch.arange(count))
    query = source.normal(batch, heads * groups, queries, head_dim).to(dtype)
    positions = torch.arange(count, count + new)
    return Attention(query, keys, values, of_keys.make(new), of_values.make(new), positions, length=slots)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 127, 128, 129])
def test_lengths_at_the_edges_of_tiles_and_blocks(native, bits, count):
    for slots in (200, count + 1):
        case = example(count, bits=(bits, bits), batch=1, queries=20, new=20, slots=slots)
        for queries, new in ((1, 0), (1, 1), (20, 0), (20, 20)):
            part = dataclasses.replace(
                case,
                query=case.query[:, :, :queries],
                key=case.key[:, :, :new],
                value=case.value[:, :, :new],
                positions=case.positions[:new],
            )
            assert_equals_the_oracle(native, part)
            assert_equals_the_oracle(native, dataclasses.replace(part, length=max(1, count)))


@pytest.mark.parametrize(("key_bits", "value_bits"), [(a, b) for a, b in itertools.product(BITS, BITS) if a != b])
def test_bits_of_keys_and_values_are_independent(native, key_bits, value_bits):
    assert_equals_the_oracle(native, example(150, bits=(key_bits, value_bits), dtype=torch.float32))


@pytest.mark.parametrize("groups", range(1, 13))
def test_every_group_size(native, groups):
    for queries in (1, 2, 5):
        assert_equals_the_oracle(native, example(150, groups=groups, queries=queries, new=queries))


@pytest.mark.parametrize("bits", [16, 4, 3])
def test_the_first_sequences_of_more(native, bits):
    for queries, new in ((1, 1), (40, 40)):
        case = example(150, batch=3, bits=(bits, bits), queries=queries, new=new, dtype=torch.float32)
        case.mask = torch.rand(3, 1, queries, case.length) < 0.7
        whole = case.result(native)
        for count in (1, 2, 3):
            part = case.of_first(count)
            assert_equals_the_oracle(native, part)
            torch.testing.assert_close(part.result(native), whole[:count], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [1, 2, 7, 24, 40, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("bits", [16, 5, 3])
def test_every_head_size(native, head_dim, bits):
    """Those of 5 and 3 bits pad channels to whole rows in the plane of one bit."""
    case = example(150, head_dim=head_dim, value_dim=head_dim, bits=(bits, bits), dtype=torch.float32)
    assert_equals_the_oracle(native, case)


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("bits", [16, 4])
def test_threads_change_nothing(native, threads, queries, bits):
    case = example(5000, slots=6000, bits=(bits, bits), batch=1, heads=1, queries=queries, dtype=torch.float32)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(case.result(native))
    # Sums over 5000 tokens in float32 round differently in parts
    assert relative(results[1], results[0]) <= 1e-5
    assert relative(results[2], results[0]) <= 1e-5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("queries", [2, 20])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(native, bits, bad, queries):
    case = example(150, bits=(bits, bits), queries=queries, new=queries)
    clean = case.result(native)
    case.query = case.query.clone()
    case.query[1, 2, 1, 5] = bad
    got = case.result(native)
    assert torch.equal(got.isnan(), case.expected().isnan())
    assert got[1, 2, 1].isnan().all()
    got[1, 2, 1] = clean[1, 2, 1]
    assert relative(got, clean) <= 5e-3


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("queries", [1, 20])
def test_masked_new_keys_may_be_anything(native, bits, queries):
    case = example(100, bits=(bits, bits), queries=queries, new=queries + 1, slots=200)
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    mask[..., 100] = False
    case.mask = mask
    clean = case.result(native)
    for bad in (math.nan, math.inf):
        case.key = case.key.clone()
        case.key[:, :, 0] = bad
        assert_equals_the_oracle(native, case)
        assert relative(case.result(native), clean) <= 5e-3


@pytest.mark.parametrize("queries", [1, 20])
def test_a_key_that_is_not_finite_spoils_the_result(native, queries):
    case = example(100, queries=queries, new=queries)
    case.key[1, 1, 0, 3] = math.nan
    got = case.result(native)
    assert torch.equal(got.isnan(), case.expected().isnan())
    assert got[1, 3:].isnan().all()


def test_new_tokens_off_the_axis_may_be_anything(native):
    case = example(100, new=3)
    case.positions = torch.tensor([-1, 100, 250])
    clean = case.result(native)
    for tensor in (case.key, case.value):
        tensor[:, :, 0::2] = math.nan
    assert torch.equal(case.result(native), clean)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("additive", [None, *DTYPES])
def test_queries_that_nothing_is_admitted_to_get_zeros(native, queries, additive):
    case = example(100, queries=queries, new=queries)
    mask = torch.rand(2, 1, queries, 200, generator=torch.manual_seed(0)) < 0.5
    mask[1, :, 0] = False
    if additive is not None:
        mask = torch.zeros(mask.shape, dtype=additive).masked_fill(~mask, -math.inf)
    case.mask = mask
    assert_equals_the_oracle(native, case)
    assert not case.result(native)[1, :, 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 20])
def test_sinks_take_their_share(native, dtype, queries):
    """Of queries too that nothing else is admitted to, or whose other logits vanish beside it."""
    case = example(100, queries=queries, new=queries, dtype=dtype)
    case.sink = torch.tensor([-torch.inf, -30.0, 0.0, 2.0, 1e4, 0.0])
    free, got = dataclasses.replace(case, sink=None).result(native), case.result(native)
    assert_equals_the_oracle(native, case)
    torch.testing.assert_close(got[:, :2], free[:, :2])
    assert not got[:, 4].any()
    mask = torch.rand(2, 1, queries, 200, generator=torch.manual_seed(0)) < 0.5
    mask[1, :, 0] = False
    least = torch.finfo(dtype).min
    for case.mask in (mask, *(torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, x) for x in (-math.inf, least))):
        assert_equals_the_oracle(native, case)
        assert not case.result(native)[1, 2:, 0].any()


@pytest.mark.parametrize("queries", [1, 20])
def test_sinks_that_are_not_finite_spoil_their_head(native, queries):
    case = example(100, queries=queries, new=queries)
    case.sink = torch.tensor([0.0, math.nan, 0.0, 0.0, math.inf, 0.0])
    got = case.result(native)
    assert torch.equal(got.isnan(), case.expected().isnan())
    assert got[:, [1, 4]].isnan().all()
    assert not got[:, [0, 2, 3, 5]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 20])
def test_rows_whose_columns_are_all_the_least_number_are_uniform(native, dtype, queries):
    """So eager masks of padded queries are: not excluded, but all alike."""
    case = example(100, queries=queries, new=queries, slots=130, dtype=dtype)
    case.mask = torch.full((1, 1, 1, 130), torch.finfo(dtype).min, dtype=dtype)
    assert_equals_the_oracle(native, case)
    assert case.result(native).any()


@pytest.mark.parametrize("queries", [1, 20])
def test_masks_of_a_wider_dtype_keep_their_precision(native, queries):
    """Position biases of distant tokens are large, and bfloat16 knows them to within 1 only."""
    case = example(100, queries=queries, new=queries)
    case.mask = (-200 - torch.arange(200.0) / 7).expand(1, 1, queries, 200)
    assert_equals_the_oracle(native, case)
    case.mask = torch.full((1, 1, queries, 200), torch.finfo(torch.float32).min)
    assert_equals_the_oracle(native, case)


@pytest.mark.parametrize("masked", ["causal", "sliding", "padded", "random", None])
@pytest.mark.parametrize("bits", [16, 8, 3])
def test_so_many_queries_that_the_cache_may_be_dequantised(native, bits, masked):
    queries, count, slots = 520, 500, 1100
    case = example(count, bits=(bits, bits), queries=queries, new=queries, slots=slots)
    at, own = torch.arange(slots), torch.arange(count, count + queries)[:, None]
    causal = at <= own
    case.mask = {
        "causal": causal[None, None],
        "sliding": (causal & (at > own - 200))[None, None],
        "padded": causal & (at >= torch.tensor([0, 650])[:, None, None, None]),
        "random": torch.rand(2, 1, queries, slots, generator=torch.manual_seed(0)) < 0.5,
        None: None,
    }[masked]
    for sink in (None, torch.tensor([-torch.inf, -30.0, 0.0, 2.0, 1e4, 0.0])):
        case.sink = sink
        assert_equals_the_oracle(native, case)


@pytest.mark.parametrize("bits", [16, 4])
def test_keys_written_before_their_values(native, bits):
    """Writes of the two caches are two operators: in between the caches differ."""
    for slots in (101, 200):  # the ring of the keys turns, or not
        case = example(100, bits=(bits, bits), slots=slots, new=4)
        case.keys.write(case.key[:, :, :3], torch.arange(slots - 3, slots), shift=2 if slots == 101 else 0)
        header = [state.format.layout(2, 2, slots).views(state.buffer).header for state in (case.keys, case.values)]
        assert int(header[0][END]) != int(header[1][END])
        assert_equals_the_oracle(native, case)


def test_caches_that_differ_in_their_exact_tokens(native):
    case = example(120, window=16)
    case.keys.write(case.key, torch.tensor([60]))  # ends stay the same, the window of the keys does not
    assert_equals_the_oracle(native, case)
    case.values.write(case.value, torch.tensor([3]))
    assert_equals_the_oracle(native, case)


def test_keys_are_zero_where_values_are_not(native):
    for bits in BITS:
        case = example(0, bits=(bits, bits), dtype=torch.float32)
        key, value = (torch.randn(2, 2, 150, 64, generator=torch.manual_seed(seed)) for seed in (0, 1))
        key[:, :, 30:60] = 0
        key[:, 0, 90:100] = 0
        value[:, :, 50:80] = 0
        case.keys.write(key, torch.arange(150))
        case.values.write(value, torch.arange(150))
        case.positions = torch.tensor([150])
        assert_equals_the_oracle(native, case)
        case.key, case.value = torch.zeros_like(case.key), torch.ones_like(case.value)
        assert_equals_the_oracle(native, case)


def test_many_parameter_sets_in_one_block(native):
    case = example(0, slots=4000, batch=1, sinks=0, window=1)
    source = Source(Random(1))
    for state in (case.keys, case.values):
        tokens = Tokens(source, 1, 2, 64, torch.bfloat16)
        for at in range(100):
            state.write(tokens.make(1) * (1 + at), torch.tensor([at]))
        sections = state.format.layout(1, 2, 4000).views(state.buffer)
        assert len(sections.epochs[0, :100].unique()) > 5
    case.positions = torch.tensor([100])
    for length in (100, 101, 4000):
        assert_equals_the_oracle(native, dataclasses.replace(case, length=length))


@pytest.mark.parametrize("cache", DTYPES)
@pytest.mark.parametrize("query", [*DTYPES, torch.float64])
@pytest.mark.parametrize("new", [*DTYPES, torch.float64])
def test_every_mixture_of_dtypes(native, cache, query, new):
    for queries in (1, 20):
        case = example(80, slots=100, dtype=cache, queries=queries, new=queries)
        case.query, case.key, case.value = case.query.to(query), case.key.to(new), case.value.to(new)
        assert_equals_the_oracle(native, case)


def test_no_tokens_no_queries_no_axis(native):
    for count in (0, 100):
        case = example(count, new=0)
        assert_equals_the_oracle(native, case)
        for empty in (
            dataclasses.replace(case, length=0),
            dataclasses.replace(case, query=case.query[:, :, :0]),
            dataclasses.replace(case, query=case.query[:, :0]),
        ):
            got = empty.result(native)
            assert got.shape == empty.expected().shape
            assert not got.any()


@pytest.mark.parametrize("bits", [8, 2])
def test_copies_that_left_the_cache_are_not_seen(native, bits):
    """Two sinks have; columns before the cache are zeros and not these."""
    case = example(64, slots=64, bits=(bits, bits), new=2)
    case.keys.write(case.key, torch.tensor([62, 63]), shift=2)
    case.values.write(case.value, torch.tensor([62, 63]), shift=2)
    case.positions = torch.tensor([62, 63])
    assert_equals_the_oracle(native, dataclasses.replace(case, first=-3, length=67))


def test_rings_that_turned_many_times(native):
    case = example(0, slots=130, dtype=torch.float32)
    source = Source(Random(2))
    of_keys, of_values = (Tokens(source, 2, 2, 64, torch.float32) for _ in range(2))
    fill(source, case.keys, case.values, of_keys, of_values)
    for turn in range(60):
        for state, tokens in ((case.keys, of_keys), (case.values, of_values)):
            state.write(tokens.make(7), torch.arange(123, 130), shift=7)
        if turn % 7 == 0:
            case.positions = torch.tensor([129])
            assert_equals_the_oracle(native, case)
