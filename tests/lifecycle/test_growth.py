"""Growing caches outside of compiled graphs: handles are snapshots of one state, and eager code goes on with them."""

import copy

import pytest
import torch

import decoquant_compile
from decoquant_compile import CacheTensor
from decoquant_compile.growth import levelled, opened
from decoquant_compile.handle import stretch_of
from decoquant_compile.kernels.format import Format

DIMS = (0, 1, 2, 3)
LAYOUTS = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3)]


def tokens(count, seed=0, batch=2):
    return torch.randn(batch, 3, count, 16, generator=torch.Generator().manual_seed(seed))


def laid_out(x, dims):
    return x.permute([dims.index(i) for i in range(4)])


def grown(x, *, dims=DIMS, bits=16, role="key"):
    """A handle that shows `x`, [B, H, S, D], with its dimensions in the order that `dims` undoes."""
    form = Format(role, bits, x.shape[3], x.dtype, 2, 8)
    count = x.shape[2]
    held = opened(None, dims, form, count, count, None, (), (*x.shape[:2], x.device))
    held.state.write(x, torch.arange(count))
    return held.handle(dims)


@pytest.mark.parametrize("dims", LAYOUTS)
def test_a_handle_shows_its_tokens(dims):
    x = tokens(70)
    handle = grown(x, dims=dims)
    assert type(handle) is CacheTensor
    assert handle.shape == laid_out(x, dims).shape
    assert torch.equal(handle + 0, laid_out(x, dims))


@pytest.mark.parametrize("dims", LAYOUTS)
def test_eager_concatenation_stays_packed_and_appends_in_place(dims):
    x = tokens(300)
    handle = grown(x[:, :, :10], dims=dims)
    state = handle._state
    slot = dims[2]
    for first in range(10, 300, 29):
        handle = torch.cat([handle, laid_out(x[:, :, first : first + 29], dims)], dim=slot)
        assert type(handle) is CacheTensor
        assert handle._state is state
    assert torch.equal(handle + 0, laid_out(x, dims))


def test_older_handles_keep_what_they_show():
    x = tokens(200)
    early = grown(x[:, :, :30])
    late = torch.cat([early, x[:, :, 30:]], 2)
    assert torch.equal(early + 0, x[:, :, :30])
    assert torch.equal(late + 0, x)


def test_two_continuations_of_one_prefix_are_independent():
    x, y = tokens(90), tokens(60, seed=1)
    prefix = grown(x[:, :, :40])
    one = torch.cat([prefix, x[:, :, 40:]], 2)
    other = torch.cat([prefix, y], 2)
    assert torch.equal(one + 0, x)
    assert torch.equal(other + 0, torch.cat([x[:, :, :40], y], 2))
    assert torch.equal(prefix + 0, x[:, :, :40])


@pytest.mark.parametrize(("first", "last"), [(0, 55), (0, 1), (3, 99), (70, 100)])
def test_a_slice_of_the_tokens_can_be_continued(first, last):
    x, y = tokens(100), tokens(20, seed=1)
    handle = grown(x)
    part = handle[:, :, first:last]
    more = torch.cat([part, y], 2)
    assert type(more) is CacheTensor
    assert torch.equal(more + 0, torch.cat([x[:, :, first:last], y], 2))
    assert torch.equal(handle + 0, x)


def test_what_is_no_slice_of_tokens_is_concatenated_densely():
    x = tokens(30)
    handle = grown(x)
    for part in (handle[:, :2], handle[..., :8], handle[:, :, ::2], handle[:1]):
        assert stretch_of(part, DIMS) is None
        new = torch.ones_like(part + 0)
        assert torch.equal(torch.cat([part, new], 2), torch.cat([part + 0, new], 2))
    assert torch.equal(torch.cat([handle, x], 0), torch.cat([x, x], 0))


@pytest.mark.parametrize("bits", [16, 4])
def test_in_place_writes_change_one_handle_alone(bits):
    x = tokens(80)
    handle = grown(x, bits=bits)
    twin, view = copy.deepcopy(handle), handle[:, :, 10:20]
    before = handle + 0
    handle.index_copy_(2, torch.tensor([79, 78]), x[:, :, :2])
    assert torch.equal((handle + 0)[:, :, [79, 78]], x[:, :, :2])
    view.fill_(3.0)
    assert torch.allclose((handle + 0)[:, :, 10:20], torch.tensor(3.0), atol=0 if bits == 16 else 0.8)
    assert torch.equal(twin + 0, before)


@pytest.mark.parametrize("reorder", [lambda h, i: h.index_select(0, i), lambda h, i: h[i, ...]])
def test_beams_are_reordered_packed(reorder):
    x, y = tokens(50), tokens(50, seed=1)
    early = grown(x)
    late = torch.cat([early, y], 2)
    for handle, dense in ((late, torch.cat([x, y], 2)), (early, x)):
        index = torch.tensor([1, 1, 0])
        chosen = reorder(handle, index)
        assert type(chosen) is CacheTensor
        assert torch.equal(chosen + 0, dense[index])
        more = torch.cat([chosen, dense[index]], 2)
        assert torch.equal(more + 0, torch.cat([dense[index], dense[index]], 2))


def test_restore_and_bytes():
    x = tokens(200)
    early = grown(x[:, :, :60], bits=4)
    late = torch.cat([early, x[:, :, 60:]], 2)
    assert decoquant_compile.nbytes([early, late]).packed == late._state.nbytes
    shown = late + 0
    decoquant_compile.restore(early)
    assert type(early) is torch.Tensor
    assert type(late) is CacheTensor
    assert torch.equal(late + 0, shown)
    assert torch.equal(torch.cat([early, x], 2)[:, :, 60:], x)


@pytest.mark.parametrize(("batch", "heads", "count"), [(1, 1, 1), (1, 1, 90), (1, 3, 5), (2, 1, 128)])
def test_restore_gives_memory_of_the_right_size(batch, heads, count):
    x = torch.randn(batch, heads, count, 16)
    handle = grown(x)
    assert torch.equal(decoquant_compile.restore(copy.deepcopy(handle)), x)
    assert decoquant_compile.restore(handle).untyped_storage().nbytes() == x.nbytes
    assert torch.equal(handle, x)


def test_a_window_that_slides_leaves_old_tokens_behind():
    x = tokens(1000)
    handle = grown(x[:, :, :40])
    for t in range(40, 1000):
        handle = torch.cat([handle, x[:, :, t : t + 1]], 2)[:, :, -40:]
    assert torch.equal(handle + 0, x[:, :, -40:])
    root = handle if handle._root is None else handle._root
    assert root._state.slots <= 256


def test_keys_and_values_from_different_calls_are_brought_into_step():
    x = tokens(300)
    form = {role: Format(role, 16, 16, torch.float32) for role in ("key", "value")}
    empty = (2, 3, x.device)
    key = torch.cat([grown(x[:, :, :200]), x[:, :, 200:]], 2)[:, :, 100:250]
    value = grown(x[:, :, 100:250], role="value")
    pair = [
        opened(tensor, DIMS, form[role], 7, 157, None, (), empty) for role, tensor in (("key", key), ("value", value))
    ]
    for held in levelled(*pair):
        assert torch.equal(held.state.read()[:, :, held.first : held.first + 150], x[:, :, 100:250])
    key, value = levelled(*pair)
    assert (key.state.slots, key.first) == (value.state.slots, value.first)
    assert key.state.end + 7 <= key.state.slots


def test_one_state_is_not_appended_to_twice_in_a_call():
    x = tokens(30)
    handle = grown(x)
    form = handle._state.format
    first = opened(handle, DIMS, form, 1, 31, None, set(), (2, 3, x.device))
    second = opened(handle[:, :, :], DIMS, form, 1, 31, None, {id(first.state)}, (2, 3, x.device))
    assert first.state is handle._state
    assert second.state is not first.state


@pytest.mark.parametrize("bits", [16, 4])
def test_saved_and_loaded_it_grows_on(tmp_path, bits):
    x, y = tokens(90), tokens(30, seed=1)
    early = grown(x, bits=bits)
    late = torch.cat([early, y], 2)
    decoquant_compile.save({"early": early, "part": late, "other": torch.cat([early, x], 2)}, tmp_path / "cache")
    for fresh in ({"early": None, "part": None, "other": None}, {"early": None, "part": torch.zeros(2, 3, 120, 16)}):
        if "other" not in fresh:
            fresh["other"] = torch.zeros(2, 3, 180, 16)
        loaded = decoquant_compile.load(fresh, tmp_path / "cache")
        assert torch.equal(loaded["early"] + 0, early + 0)
        assert torch.equal(loaded["part"] + 0, late + 0)
        more = torch.cat([loaded["part"], y], 2)
        assert type(more) is CacheTensor
        assert torch.equal(more[:, :, -8:] + 0, y[:, :, -8:])
