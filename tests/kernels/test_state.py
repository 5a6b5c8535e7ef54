"""The state against a dense model: any writes, shifts, resets; sequences, sinks, window, epochs."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels import codec, reference, tiles
from decoquant_compile.kernels.format import COUNT, END, FITTED, NO_EPOCH, ORIGIN, SET, START, TOTAL, UNSET, Format
from decoquant_compile.kernels.state import CacheState

COARSE = [8, 5, 4, 3, 2]


def state_of(bits, *, role="key", batch=1, heads=1, slots=64, head_dim=16, dtype=torch.float32, sinks=4, window=8):
    form = Format(role, bits, head_dim, dtype, sinks, window)
    return CacheState.empty(form, batch, heads, slots, "cpu")


def sections(state):
    return state.format.layout(state.batch, state.heads, state.slots).views(state.buffer)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got, expected):
    """Error of each token relative to the typical one."""
    return (got - expected).norm(dim=-1) / expected.norm(dim=-1).amax().clamp_min(1e-30)


class Dense:
    """What a cache is: a tensor."""

    def __init__(self, batch, heads, slots, head_dim, dtype):
        self.tensor = torch.zeros(batch, heads, slots, head_dim, dtype=dtype)

    def write(self, new, positions, shift, rows):
        slots = self.tensor.shape[2]
        moved = torch.zeros_like(self.tensor)
        moved[:, :, : max(0, slots - shift)] = self.tensor[:, :, min(shift, slots) :]
        for t, position in enumerate(positions.tolist()):
            for b in range(len(new)):
                if position >= 0 and (rows is None or rows[b, t]):
                    moved[b, :, position] = new[b, :, t]
        self.tensor = moved


@st.composite
def writes(draw, slots, batch):
    """Writes in any order, overlapping, with drops and duplicates, shifts, zero tokens and left-out rows."""
    out = []
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(("run", "run", "one", "any")))
        if kind == "any":
            positions = draw(st.lists(st.integers(-2, slots - 1), min_size=1, max_size=slots))
        else:
            first = draw(st.integers(0, slots - 1))
            positions = range(first, first + 1 if kind == "one" else draw(st.integers(first + 1, slots)))
        positions = torch.tensor(list(positions))
        rows = None
        if draw(st.integers(0, 3)) == 0:
            rows = torch.rand(batch, len(positions), generator=torch.manual_seed(draw(st.integers(0, 99)))) < 0.7
        shift = draw(st.sampled_from((0, 0, 0, 1, 3, slots + 1)))
        out.append((positions, shift, rows, draw(st.integers(0, 2**31)), draw(st.integers(0, 3)) == 0))
    return out


@given(
    st.data(),
    st.sampled_from((16, 8)),
    st.sampled_from(("key", "value")),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 40),
    st.sampled_from(((4, 8), (0, 2), (2, 0), (0, 0), (4, 64))),
    st.sampled_from((torch.float32, torch.bfloat16)),
)
@settings(deadline=None, max_examples=150)
def test_any_writes_equal_a_dense_cache(data, bits, role, batch, heads, slots, kept, dtype):
    state = state_of(bits, role=role, batch=batch, heads=heads, slots=slots, dtype=dtype, sinks=kept[0], window=kept[1])
    dense = Dense(batch, heads, slots, 16, dtype)
    for positions, shift, rows, seed, zeros in data.draw(writes(slots, batch)):
        new = (normal(batch, heads, len(positions), 16, seed=seed) + 1).to(dtype)
        if zeros:
            new[:, :, ::2] = 0
        state.write(new, positions, shift=shift, rows=rows)
        dense.write(new, positions, shift, rows)
        got = state.read()
        assert got.dtype == dtype
        if bits == 16:
            assert torch.equal(got, dense.tensor)
        else:
            # Sets fitted on one or two tokens (no sinks, no window) are the worst; a lost token would be off by 1
            limit = 0.1 if min(kept) else 0.6
            assert (relative(got.float(), dense.tensor.float()) <= limit).all()
            assert not got[(dense.tensor == 0).all(-1)].any()
            if kept[1] and rows is None:  # the newest tokens are exact
                newest = [p for p in dict.fromkeys(reversed(positions.tolist())) if p >= 0]
                absolute = {p: int(sections(state).header[ORIGIN]) + p for p in newest}
                size = min(kept[1], slots)
                newest = [p for i, p in enumerate(newest) if all(
                    (absolute[p] - absolute[q]) % size or not dense.tensor[b, :, q].any()
                    for q in newest[:i] for b in range(batch)
                )]  # fmt: skip
                assert torch.equal(got[:, :, newest], dense.tensor[:, :, newest])


@pytest.mark.parametrize("bits", COARSE)
@pytest.mark.parametrize("role", ["key", "value"])
def test_a_cache_shorter_than_sinks_and_window_is_exact(bits, role):
    new = normal(2, 3, 13, 16)
    state = state_of(bits, role=role, batch=2, heads=3)
    for t in range(12):
        state.write(new[:, :, t : t + 1], torch.tensor([t]))
        assert torch.equal(state.read()[:, :, : t + 1], new[:, :, : t + 1])
    assert (sections(state).rows[:, FITTED] == UNSET).all()
    state.write(new[:, :, 12:], torch.tensor([12]))
    assert (sections(state).rows[:, FITTED] == 9).all()  # all but the sinks
    got = state.read()
    assert torch.equal(got[:, :, :4], new[:, :, :4])
    assert torch.equal(got[:, :, 5:13], new[:, :, 5:])
    assert not torch.equal(got[:, :, 4], new[:, :, 4])
    assert (relative(got[:, :, 4], new[:, :, 4]) < 0.7).all()


@pytest.mark.parametrize("bits", COARSE)
def test_sinks_and_window_are_exact_after_a_long_prompt(bits):
    new = normal(1, 2, 50, 16)
    state = state_of(bits, heads=2)
    state.write(new, torch.arange(50))
    got = state.read()
    assert torch.equal(got[:, :, :4], new[:, :, :4])
    assert torch.equal(got[:, :, 42:50], new[:, :, 42:])
    assert not got[:, :, 50:].any()
    between = (got[:, :, 4:42] - new[:, :, 4:42]).square().mean()
    assert 0 < between < {8: 1e-3, 5: 0.01, 4: 0.02, 3: 0.06, 2: 0.2}[bits]


def test_stored_tokens_follow_the_codec():
    """The state adds nothing of its own: statistics without sinks, `codec.weights`, `codec.fit` and `codec.encode`."""
    new = normal(1, 2, 50, 16) * torch.arange(1, 17) + 3
    query = normal(1, 4, 50, 16, seed=1) * torch.arange(16, 0, -1)
    state = state_of(4, heads=2)
    state.write(new, torch.arange(50), query=query)
    x = new[:, :, 4:]
    weight = codec.weights(query[:, :, 4:].square().unflatten(1, (2, 2)).sum((2, 3)))
    parameters = codec.fit(x.mean(2), x.var(2, correction=0), weight, role="key")
    stored = sections(state)
    torch.testing.assert_close(stored.weights[0], weight[0], rtol=2**-7, atol=0)
    torch.testing.assert_close(stored.means[:, 0], parameters.mean, rtol=2**-7, atol=0)
    torch.testing.assert_close(stored.scales[:, 0], parameters.scale, rtol=2**-7, atol=0)
    used = codec.Parameters(stored.means[:, 0, :, None], stored.scales[:, 0, :, None])
    codes, gains = codec.encode(new, used, stored.weights[:, :, None], role="key", bits=4)
    read = tiles.read(stored.planes, slice(0, 50), role="key", bits=4, head_dim=16)
    assert torch.equal(read, codes)
    assert torch.equal(stored.gains[:, :, :50], gains)


@given(
    st.sampled_from(COARSE), st.lists(st.integers(41, 119), max_size=5, unique=True), st.sampled_from(("key", "value"))
)
@settings(deadline=None, max_examples=30)
def test_chunks_equal_one_write_given_the_same_fit(bits, cuts, role):
    new = normal(2, 2, 120, 16)
    whole, parts = (state_of(bits, role=role, batch=2, heads=2, slots=128) for _ in range(2))
    for state in (whole, parts):
        state.write(new[:, :, :40], torch.arange(40))
        sections(state).rows[:, FITTED] = 10**6  # keeps this fit from being renewed
    whole.write(new[:, :, 40:], torch.arange(40, 120))
    bounds = [40, *sorted(cuts), 120]
    for a, b in itertools.pairwise(bounds):
        parts.write(new[:, :, a:b], torch.arange(a, b))
    assert torch.equal(whole.read(), parts.read())
    for a, b in zip(sections(whole).planes, sections(parts).planes, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_chunked_prompts_are_as_good_as_whole_ones(chunk):
    new = normal(1, 2, 200, 32) * torch.linspace(0.1, 10, 32) + torch.linspace(-9, 9, 32)
    errors = []
    for size in (200, chunk):
        state = state_of(4, heads=2, slots=256, head_dim=32)
        for at in range(0, 200, size):
            state.write(new[:, :, at : at + size], torch.arange(at, min(200, at + size)))
        got = state.read()[:, :, :200]
        errors.append(((got - new) / torch.linspace(0.1, 10, 32)).square().mean())
    assert errors[1] < errors[0] * 1.6


@pytest.mark.parametrize("padding", [1, 5, 30])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("chunk", [64, 9, 1])
def test_a_left_padded_row_is_its_unpadded_self(padding, additive, chunk):
    length = 40
    new = normal(2, 2, padding + length, 16) + 0.5
    new[1, :, :padding] = 1000 * normal(2, padding, 16, seed=1)  # garbage
    real = torch.ones(2, 1, 1, padding + length, dtype=torch.bool)
    real[1, ..., :padding] = False
    mask = torch.where(real, 0.0, torch.finfo(torch.bfloat16).min).bfloat16() if additive else real
    padded = state_of(8, batch=2, heads=2, slots=80)
    alone = state_of(8, batch=1, heads=2, slots=80)
    for at in range(0, padding + length, chunk):
        stop = min(at + chunk, padding + length)
        padded.write(new[:, :, at:stop], torch.arange(at, stop), mask=mask)
        low = max(at, padding)
        if stop > low:
            alone.write(new[1:, :, low:stop], torch.arange(low - padding, stop - padding))
    columns = [TOTAL, FITTED]
    assert sections(padded).rows[:, START].tolist() == [0, padding]
    if chunk == 1 or padding % chunk == 0:  # else the chunks are others
        assert torch.equal(sections(padded).rows[1, columns], sections(alone).rows[0, columns])
    got, expected = padded.read()[1, :, padding : padding + length], alone.read()[0, :, :length]
    kept = [*range(4), *range(length - 8, length)]
    assert torch.equal(got[:, kept], expected[:, kept])
    assert torch.equal(got[:, kept], new[1][:, [padding + k for k in kept]])
    assert (relative(got, new[1, :, padding:]) < 0.02).all()
    garbage = padded.read()[1, :, :padding]
    assert (relative(garbage, new[1, :, :padding]) < 0.5).all()


def test_a_short_left_padded_row_is_exact():
    new = normal(2, 1, 40, 16)
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1, ..., :30] = False
    state = state_of(2, batch=2)
    state.write(new, torch.arange(40), mask=mask)
    assert torch.equal(state.read()[1, :, 30:40], new[1, :, 30:])
    assert sections(state).rows[:, FITTED].tolist() == [36, UNSET]


def test_right_padding_enters_no_statistics():
    new = normal(1, 1, 40, 16)
    new[:, :, 30:] = 1e4
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    mask[..., 30:] = False
    state = state_of(8)
    state.write(new, torch.arange(40), mask=mask)
    assert sections(state).rows[0, [START, TOTAL]].tolist() == [0, 26]


def test_mask_columns_start_at_first():
    new = normal(1, 1, 20, 16)
    mask = torch.ones(1, 1, 1, 30, dtype=torch.bool)
    mask[..., :13] = False
    for first, start in ((0, 13), (-10, 3), (-20, 0)):
        state = state_of(8)
        state.write(new, torch.arange(20), mask=mask, first=first)
        assert int(sections(state).rows[0, START]) == start


def test_a_sequence_starts_at_the_first_position_without_a_mask():
    state = state_of(4)
    state.write(normal(1, 1, 30, 16), torch.arange(10, 40))
    assert int(sections(state).rows[0, START]) == 10
    assert torch.equal(state.read()[:, :, 10:14], normal(1, 1, 30, 16)[:, :, :4])


def test_refits_when_the_tokens_have_grown_by_half():
    state = state_of(4, slots=512)
    fits = []
    new = normal(1, 1, 400, 16)
    for t in range(400):
        state.write(new[:, :, t : t + 1], torch.tensor([t]))
        fitted = int(sections(state).rows[0, FITTED])
        if not fits or fits[-1] != fitted:
            fits.append(fitted)
    assert fits == [UNSET, 9, 14, 21, 32, 48, 72, 108, 162, 243, 365]
    # Tokens name the set of their time; the four sinks are not counted
    first = torch.tensor([3 + fit for fit in fits[2:]])
    expected = torch.searchsorted(first, torch.arange(400), right=True)
    assert torch.equal(sections(state).epochs[0, :400].long(), expected)


def test_each_fit_halves_the_weight_of_what_came_before():
    state = state_of(4, slots=256, heads=2)
    new = normal(1, 2, 200, 16) * torch.linspace(0.5, 2, 16)
    new[:, :, 44:] += torch.linspace(-20, 20, 16)
    query = normal(1, 4, 200, 16, seed=1) * torch.linspace(2, 0.5, 16)
    query[:, :, 120:] *= torch.linspace(1, 9, 16)
    share = torch.zeros(0)
    count = 0
    for number, (a, b) in enumerate(((0, 44), (44, 120), (120, 200))):  # 40, 76 and 80 tokens besides the sinks
        state.write(new[:, :, a:b], torch.arange(a, b), query=query[:, :, a:b])
        share = torch.cat((share, torch.ones(b - max(4, a))))
        count += b - max(4, a)
        tokens, asked = new[0, :, 4:b], query[0, :, 4:b].unflatten(0, (2, 2))
        mean = (tokens * share[:, None]).sum(1) / count
        deviation = ((tokens - mean[:, None]).square() * share[:, None]).sum(1)
        energy = (asked.square() * share[:, None]).sum((1, 2))
        parameters = codec.fit(mean, deviation / count, codec.weights(energy), role="key")
        share, count = share / 2, count - count // 2

        stored = sections(state)
        assert stored.rows[0, [SET, TOTAL, FITTED, COUNT]].tolist() == [number, b - 4, b - 4, count]
        torch.testing.assert_close(stored.average[0], mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stored.deviation[0], deviation / 2, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stored.energy[0], energy / 2, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stored.weights[0], codec.weights(energy), rtol=2**-7, atol=0)
        torch.testing.assert_close(stored.means[0, number], parameters.mean, rtol=2**-7, atol=2**-10)
        torch.testing.assert_close(stored.scales[0, number], parameters.scale, rtol=2**-7, atol=0)


def test_halves_of_an_odd_count_round_up():
    """So that a count of one stays one, and never falls to zero."""
    state = state_of(4, slots=64, sinks=0, window=0)
    for t, (total, count) in enumerate(((1, 1), (2, 1), (3, 1), (4, 2), (5, 2))):
        state.write(normal(1, 1, 1, 16, seed=t), torch.tensor([t]))
        assert sections(state).rows[0, [TOTAL, COUNT]].tolist() == [total, count]


def test_tokens_of_another_kind_take_over():
    state = state_of(4, slots=512)
    state.write(normal(1, 1, 44, 16), torch.arange(44))
    late = normal(1, 1, 400, 16, seed=1) + 100
    for t in range(400):
        state.write(late[:, :, t : t + 1], torch.tensor([44 + t]))
    stored = sections(state)
    # All halved: 40 tokens of old weigh less than one of 400
    torch.testing.assert_close(
        stored.means[0, stored.rows[0, SET]].float(), torch.full((1, 16), 100.0), rtol=0.01, atol=0
    )
    assert (relative(state.read()[:, :, 300:444], late[:, :, 256:]) < 0.02).all()


def test_overwriting_uses_the_current_set():
    state = state_of(8, slots=128)
    state.write(normal(1, 1, 40, 16), torch.arange(40))
    state.write(normal(1, 1, 40, 16, seed=1) + 100, torch.arange(40, 80))
    state.write(normal(1, 1, 2, 16, seed=2) + 100, torch.tensor([10, 11]))
    assert sections(state).epochs[0, [9, 10, 11, 12]].tolist() == [0, 1, 1, 0]


def test_queries_count_until_others_outweigh_them():
    query = normal(1, 1, 40, 16) * torch.tensor([10.0] + [0.1] * 15)
    state = state_of(4, slots=512)
    state.write(normal(1, 1, 40, 16), torch.arange(40), query=query)
    stored = sections(state)
    first = stored.weights.clone()
    assert first[0, 0, 0] > 10 * first[0, 0, 1]
    state.write(normal(1, 1, 40, 16, seed=1), torch.arange(40, 80))  # a fit without queries
    assert int(stored.rows[0, SET]) == 1
    assert torch.equal(stored.weights, first)
    state.write(normal(1, 1, 80, 16, seed=2), torch.arange(80, 160), query=2 * query.flip(-1).repeat(1, 1, 2, 1))
    assert int(stored.rows[0, SET]) == 2
    assert stored.weights[0, 0, 15] > 10 * stored.weights[0, 0, 0] > 10 * stored.weights[0, 0, 1]


@pytest.mark.parametrize("role", ["key", "value"])
def test_weights_and_queries_are_for_keys(role):
    state = state_of(4, role=role)
    state.write(normal(1, 1, 40, 16), torch.arange(40))
    weights = sections(state).weights
    assert weights.shape == (1, 1 if role == "key" else 0, 16)
    assert (weights == 1).all()  # none were seen
    state.write(normal(1, 1, 24, 16), torch.arange(40, 64), query=normal(1, 1, 24, 16))
    assert (weights != 1).any(-1).all()


def test_weights_change_with_the_set_only():
    state = state_of(4, slots=256)
    state.write(normal(1, 1, 44, 16), torch.arange(44), query=normal(1, 1, 44, 16))
    stored = sections(state)
    before = stored.weights.clone()
    other = normal(1, 1, 100, 16, seed=1) * torch.linspace(0, 5, 16)
    state.write(normal(1, 1, 19, 16), torch.arange(44, 63), query=other[:, :, :19])  # 59 of 60
    assert int(stored.rows[0, FITTED]) == 40
    assert torch.equal(stored.weights, before)
    state.write(normal(1, 1, 1, 16), torch.tensor([63]), query=other[:, :, 19:20])
    assert int(stored.rows[0, FITTED]) == 60
    assert not torch.equal(stored.weights, before)


def test_a_fit_of_padding_weighs_all_channels_alike():
    new, query = normal(2, 1, 60, 16), normal(2, 1, 60, 16, seed=1) * torch.linspace(0, 5, 16)
    mask = torch.ones(2, 1, 1, 60, dtype=torch.bool)
    mask[1, ..., :38] = False
    state = state_of(8, batch=2)
    state.write(new[:, :, :40], torch.arange(40), query=query[:, :, :40], mask=mask)
    stored = sections(state)
    assert stored.rows[:, FITTED].tolist() == [36, UNSET]
    assert int(stored.rows[1, SET]) == 0
    assert (stored.weights[1] == 1).all()
    assert not (stored.weights[0] == 1).all()
    assert (relative(state.read()[1, :, :38], new[1, :, :38]) < 0.02).all()
    state.write(new[:, :, 40:], torch.arange(40, 60), query=query[:, :, 40:], mask=mask)
    assert int(stored.rows[1, FITTED]) == 18
    assert not (stored.weights[1] == 1).all()


@pytest.mark.parametrize("kept", [(4, 8), (0, 8), (0, 0), (8, 0), (8, 1)])
def test_sets_suffice_for_a_full_cache(kept):
    """Token by token and twice in a row: every fit finds a free set."""
    state = state_of(4, slots=256, sinks=kept[0], window=kept[1])
    new = normal(1, 1, 256, 16)
    stored = sections(state)
    for _ in range(2):
        due = None
        for t in range(256):
            state.write(new[:, :, t : t + 1], torch.tensor([t]))
            total, fitted = stored.rows[0, [TOTAL, FITTED]].tolist()
            if fitted > 0:
                due = math.ceil(1.5 * fitted)
                assert total < due or fitted == total
        assert due is not None


def test_sets_are_recycled_in_a_sliding_cache():
    state = state_of(4, slots=32, sinks=0, window=4)
    sets = sections(state).scales.shape[1]
    seen, fits = [], set()
    tokens = normal(1, 1, 5000, 16)
    state.write(tokens[:, :, :32], torch.arange(32))
    at = 32
    while at < 5000:
        size = min(16, 5000 - at)
        state.write(tokens[:, :, at : at + size], torch.arange(32 - size, 32), shift=size)
        at += size
        seen.append(int(sections(state).rows[0, SET]))
        fits.add(int(sections(state).rows[0, FITTED]))
    assert len(fits) > sets
    assert max(seen) < sets
    assert (relative(state.read(), tokens[:, :, -32:]) < 0.3).all()


def test_without_a_free_set_the_old_one_is_kept():
    state = state_of(8, slots=64)
    state.write(normal(1, 1, 20, 16), torch.arange(20))
    stored = sections(state)
    sets = stored.scales.shape[1]
    stored.epochs[0, :sets] = torch.arange(sets, dtype=torch.uint8)  # every set is named
    before = stored.scales.clone(), stored.weights.clone(), int(stored.rows[0, COUNT])
    state.write(normal(1, 1, 40, 16, seed=1), torch.arange(20, 60), query=normal(1, 1, 40, 16))
    assert torch.equal(stored.scales, before[0])
    assert torch.equal(stored.weights, before[1])
    assert int(stored.rows[0, COUNT]) == before[2] + 40  # a fit that did not take place halves nothing
    assert int(stored.rows[0, FITTED]) == 16
    assert (relative(state.read()[:, :, 20:60], normal(1, 1, 40, 16, seed=1)) < 0.1).all()


def test_writing_slot_zero_begins_a_new_sequence():
    state = state_of(8, batch=2, slots=64)
    old, new = normal(2, 1, 60, 16), 50 * normal(2, 1, 20, 16, seed=1)
    state.write(old, torch.arange(60))
    rows = torch.tensor([[True], [False]]).expand(2, 20)
    state.write(new, torch.arange(20), rows=rows)
    stored = sections(state)
    assert stored.rows[:, TOTAL].tolist() == [16, 56]
    got = state.read()
    assert torch.equal(got[0, :, :4], new[0, :, :4])
    assert (relative(got[0, :, :20], new[0]) < 0.05).all()
    assert (relative(got[0, :, 20:60], old[0, :, 20:]) < 0.05).all()  # old tokens stay until overwritten
    assert torch.equal(got[1, :, 52:60], old[1, :, 52:])
    assert int(stored.header[END]) == 60


def test_the_next_prompt_on_a_full_cache_token_by_token():
    state = state_of(8, slots=64)
    first, second = normal(1, 1, 64, 16), 9 * normal(1, 1, 64, 16, seed=1)
    state.write(first, torch.arange(64))
    for t in range(64):
        state.write(second[:, :, t : t + 1], torch.tensor([t]))
        got = state.read()
        if t < 12:
            assert torch.equal(got[:, :, : t + 1], second[:, :, : t + 1])
        assert (relative(got[:, :, : t + 1], second[:, :, : t + 1]) < 0.1).all()
        if t < 63:
            assert (relative(got[:, :, t + 1 :], first[:, :, t + 1 :]) < 0.1).all()


def test_clearing_the_tail_keeps_the_window():
    """Cropping writes zeros; they need no exact copy and evict none."""
    state = state_of(2)
    new = normal(1, 1, 60, 16)
    state.write(new[:, :, :30], torch.arange(30))
    state.write(torch.zeros(1, 1, 34, 16), torch.arange(30, 64))
    got = state.read()
    assert torch.equal(got[:, :, 22:30], new[:, :, 22:30])
    assert not got[:, :, 30:].any()
    state.write(torch.zeros(1, 1, 5, 16), torch.arange(25, 30))
    assert torch.equal(state.read()[:, :, 22:25], new[:, :, 22:25])
    assert not state.read()[:, :, 25:].any()


@pytest.mark.parametrize("bits", [16, *COARSE])
def test_a_sliding_window_moves_without_touching_codes(bits):
    state = state_of(bits, slots=16, window=4)
    new = normal(1, 1, 60, 16)
    state.write(new[:, :, :16], torch.arange(16))
    for t in range(16, 60):
        state.write(new[:, :, t : t + 1], torch.tensor([15]), shift=1)
        got = state.read()
        expected = new[:, :, t - 15 : t + 1]
        assert torch.equal(got if bits == 16 else got[:, :, -4:], expected if bits == 16 else expected[:, :, -4:])
        assert (relative(got, expected) < 0.8).all()
    assert int(sections(state).header[ORIGIN]) == 44
    state.write(new[:, :, :1], torch.tensor([3]), shift=100)
    got = state.read()
    assert torch.equal(got[:, :, 3], new[:, :, 0])
    assert got.count_nonzero() == new[:, :, 0].count_nonzero()


@pytest.mark.parametrize("bits", COARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("role", ["key", "value"])
def test_degenerate_tokens_never_read_as_nan(bits, dtype, role):
    new = normal(6, 2, 60, 16).to(dtype)
    large = torch.finfo(dtype).max
    new[0] = 3.0  # constant
    new[1, :, :, 5] = large / 2  # a huge channel
    new[2, :, 10:50:3, 2] = float("nan")
    new[2, :, 11:50:3] = float("inf")
    new[2, :, 12:50:3] = -large
    new[3] = torch.finfo(dtype).tiny
    new[4, :, 7:] = 0  # mostly zeros
    new[5, 0] = 0  # a dead head
    state = state_of(bits, role=role, batch=6, heads=2, dtype=dtype)
    for at, size in ((0, 1), (1, 29), (30, 30)):
        state.write(new[:, :, at : at + size], torch.arange(at, at + size))
        got = state.read()
        assert got.isfinite().all()
    assert (relative(got[0, :, :60].float(), new[0].float()) < 0.7).all()
    assert not got[4, :, 7:].any()
    assert not got[5, 0].any()
    stored = sections(state)
    # The largest float16 is an ordinary number, the largest bfloat16 is not
    assert int(stored.rows[2, TOTAL]) == 56 - (27 if dtype == torch.float16 else 40)
    assert stored.scales.isfinite().all()
    assert (stored.scales > 0).all()


def test_non_finite_tokens_do_not_spoil_the_others():
    new = normal(1, 1, 60, 16)
    dirty = new.clone()
    dirty[:, :, 10:50:3] = float("inf")
    state = state_of(8)
    state.write(dirty, torch.arange(60))
    clean = [t for t in range(60) if not (10 <= t < 50 and t % 3 == 1)]
    assert (relative(state.read()[:, :, clean], new[:, :, clean]) < 0.05).all()


def test_large_writes_are_encoded_in_blocks(monkeypatch):
    new = normal(2, 2, 500, 16)
    states = []
    for elements in (2**21, 2 * 2 * 16 * 64):
        monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", elements)
        state = state_of(4, batch=2, heads=2, slots=512)
        state.write(new, torch.arange(500))
        states.append(state.read())
    assert ((states[0] - states[1]).abs() > 1e-6).float().mean() < 0.01  # a mean may round to its neighbour


def test_clone_select_reset():
    state = state_of(4, batch=3, heads=2)
    new = normal(3, 2, 40, 16)
    state.write(new, torch.arange(40))
    before = state.read()
    for copied in (state.clone(), copy.deepcopy(state)):
        copied.write(new[:, :, :1] + 1, torch.tensor([50]))
        assert torch.equal(state.read(), before)
        assert not torch.equal(copied.read()[:, :, :40], before[:, :, :40])  # its window moved on
        assert copied.format == state.format
    index = torch.tensor([2, 0, 0, 1])
    picked = state.select(index)
    assert picked.batch == 4
    assert torch.equal(picked.read(), before[index])
    more = normal(4, 2, 20, 16, seed=1)
    picked.write(more, torch.arange(40, 60))
    assert torch.equal(picked.read()[:, :, 52:60], more[:, :, 12:])
    assert torch.equal(state.read(), before)
    state.reset()
    assert not state.read().any()
    assert torch.equal(state.buffer, state_of(4, batch=3, heads=2).buffer)


def test_nbytes_is_that_of_the_buffer():
    state = state_of(4, slots=2048, head_dim=128, dtype=torch.bfloat16, window=64)
    assert state.nbytes == state.buffer.numel()
    assert state.nbytes < 0.34 * 2048 * 128 * 2


def test_states_work_across_inference_mode():
    with torch.inference_mode():
        state = state_of(4)
        state.write(normal(1, 1, 30, 16), torch.arange(30))
        copied = state.clone()
    copied.write(normal(1, 1, 1, 16), torch.tensor([30]))
    state.write(normal(1, 1, 1, 16), torch.tensor([30]))
    assert torch.equal(state.read(), copied.read())


def test_writes_record_no_gradient():
    state = state_of(4)
    state.write(normal(1, 1, 30, 16).requires_grad_(), torch.arange(30))
    assert not state.read().requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": torch.arange(62, 65)}, IndexError, "position 64 is outside the cache of 64 slots"),
        ({"new": torch.zeros(1, 1, 3, 8)}, ValueError, r"new must be \[1, 1, tokens, 16\]|new must be .* 16\]"),
        ({"new": torch.zeros(2, 1, 3, 16)}, ValueError, r"new must be \[1, 1, tokens, 16\], got \(2, 1, 3, 16\)"),
        ({"positions": torch.arange(2)}, ValueError, r"positions must be int64 \[3\], got torch.int64 \(2,\)"),
        ({"positions": torch.arange(3).int()}, ValueError, "got torch.int32"),
        ({"shift": -1}, ValueError, "shift must not be negative, got -1"),
        ({"query": torch.zeros(1, 2, 4, 16)}, ValueError, "query must be"),
        ({"mask": torch.ones(1, 3, 8)}, ValueError, "mask must be"),
        ({"rows": torch.ones(1, 2, dtype=torch.bool)}, ValueError, r"rows must be bool \[1, 3\]"),
    ],
)
def test_wrong_arguments_are_named_and_change_nothing(change, error, message):
    state = state_of(4)
    before = state.buffer.clone()
    with pytest.raises(error, match=message):
        state.write(**{"new": torch.ones(1, 1, 3, 16), "positions": torch.arange(3)} | change)
    assert torch.equal(state.buffer, before)


def test_every_readable_token_has_a_code_or_a_copy():
    """The invariant behind it all, after a mixture of writes."""
    generator = torch.manual_seed(0)
    state = state_of(8, batch=2, slots=24, sinks=2, window=4)
    for step in range(200):
        size = int(torch.randint(1, 7, (), generator=generator))
        first = int(torch.randint(0, 24 - size, (), generator=generator))
        shift = int(torch.randint(0, 12, (), generator=generator) == 0)
        rows = torch.rand(2, size, generator=generator) < 0.8
        state.write(normal(2, 1, size, 16, seed=step), torch.arange(first, first + size), shift=shift, rows=rows)
        stored = sections(state)
        origin = int(stored.header[ORIGIN])
        copies = torch.cat((stored.window_positions, stored.sink_positions), 1)
        for row in range(2):
            for slot in range(24):
                index = (origin + slot) % 24
                if stored.gains[row, 0, index] >= 0 and stored.epochs[row, index] == NO_EPOCH:
                    assert origin + slot in copies[row]
    assert math.isfinite(float(state.read().sum()))
