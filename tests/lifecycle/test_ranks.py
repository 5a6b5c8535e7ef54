"""Handles of caches that have no heads, or keys and values in one tensor, behave as the dense tensors did."""

import copy
import pickle

import pytest
import torch

import decoquant_compile
from decoquant_compile import CacheTensor, load, save
from decoquant_compile.handle import format_of, state_of
from decoquant_compile.kernels.format import Format
from decoquant_compile.takeover import Claim, take_over

LAYOUTS = {
    (0, (), 1, 2): (3, 8, 4),
    (0, (), 2, 1): (3, 4, 8),
    ((0, 1), 2, 3, 4): (2, 3, 2, 8, 4),
    (0, (1, 3), 2, 4): (3, 2, 8, 2, 4),
}
each_layout = pytest.mark.parametrize("dims", LAYOUTS)


def packed(dims, bits=16):
    dense = torch.randn(LAYOUTS[dims], generator=torch.Generator().manual_seed(0))
    tensor = dense.clone()
    take_over([Claim(tensor, dims, Format("key", bits, 4, torch.float32, 1, 2))], lengths=[None], masks=[None])
    assert type(tensor) is CacheTensor
    return tensor, dense


def tokens(t, dims):
    shape = list(t.shape)
    shape[dims[2]] = 2
    return torch.arange(float(torch.Size(shape).numel())).view(shape) / 8


@each_layout
def test_read(dims):
    handle, dense = packed(dims)
    assert handle.shape == dense.shape
    assert torch.equal(handle, dense)
    assert torch.equal(handle[1], dense[1])
    assert torch.equal(handle.sum(-1), dense.sum(-1))
    assert torch.equal(handle.unbind(0)[-1], dense.unbind(0)[-1])
    assert torch.equal(pickle.loads(pickle.dumps(handle)), dense)
    assert type(handle) is CacheTensor


WRITES = {
    "pointwise": lambda t, dims: t.add_(1),
    "tokens": lambda t, dims: t.index_copy_(dims[2], torch.tensor([6, 1]), tokens(t, dims)),
    "tokens from the end": lambda t, dims: t.index_copy_(dims[2] - t.dim(), torch.tensor([6, 1]), tokens(t, dims)),
    "sequences": lambda t, dims: t.index_copy_(0, torch.tensor([1]), torch.ones_like(t[:1])),
    "a view": lambda t, dims: t[1].select(dims[2] - 1, 3).fill_(7),
    "all": lambda t, dims: t.copy_(torch.arange(float(t.numel())).view(t.shape)),
    "nothing": lambda t, dims: t.mul_(1),
}


@pytest.mark.parametrize("name", WRITES)
@each_layout
def test_write(dims, name):
    handle, dense = packed(dims)
    WRITES[name](handle, dims)
    WRITES[name](dense, dims)
    assert type(handle) is CacheTensor
    assert torch.equal(handle, dense)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda t: t.clone(), lambda t: t.detach().clone()], ids=["deepcopy", "clone", "detach"]
)
@each_layout
def test_copies_are_independent(dims, copied):
    handle, dense = packed(dims)
    other = copied(handle)
    handle.add_(1)
    assert torch.equal(other, dense)
    assert torch.equal(handle, dense + 1)


@pytest.mark.parametrize("index", [[2, 0, 0], [1]])
@each_layout
def test_sequences_are_selected(dims, index):
    handle, dense = packed(dims)
    of = dims[0] if isinstance(dims[0], int) else dims[0][1]
    chosen = torch.tensor(index)
    got = handle.index_select(of, chosen)
    assert torch.equal(got, dense.index_select(of, chosen))
    assert (type(got) is CacheTensor) == isinstance(dims[0], int)
    if of == 0:
        assert torch.equal(handle[chosen], dense[chosen])
        assert torch.equal(handle.repeat_interleave(2, 0), dense.repeat_interleave(2, 0))


@each_layout
def test_restored(dims):
    handle, dense = packed(dims)
    assert decoquant_compile.restore(handle) is handle
    assert type(handle) is torch.Tensor
    assert torch.equal(handle, dense)


@each_layout
def test_zero_makes_it_dense(dims):
    handle, _ = packed(dims)
    handle.zero_()
    assert type(handle) is torch.Tensor
    assert not handle.any()


@each_layout
def test_only_the_same_layout_is_the_state(dims):
    handle, _ = packed(dims)
    assert state_of(handle, dims) is not None
    assert format_of(handle, dims) is not None
    assert state_of(handle, (dims[0], dims[1], dims[3], dims[2])) is None


@pytest.mark.parametrize("is_empty", [False, True])
@pytest.mark.parametrize("bits", [16, 4])
@each_layout
def test_saved_and_loaded(tmp_path, dims, bits, is_empty):
    handle, _ = packed(dims, bits)
    save([handle], tmp_path / "cache")
    (loaded,) = load([None if is_empty else torch.zeros(LAYOUTS[dims])], tmp_path / "cache")
    assert type(loaded) is CacheTensor
    assert loaded.shape == handle.shape
    assert torch.equal(loaded, handle)


@pytest.mark.parametrize("dims", [(0, (), 1, 1), ((0, 1), 2, 3, 4), (0, 1, 2, 3)])
def test_a_layout_that_does_not_fit_is_refused(dims):
    with pytest.raises(RuntimeError, match=r"whose batch, head, slot and channel are not dimensions"):
        take_over([Claim(torch.ones(3, 8, 4), dims, Format("key", 16, 4, torch.float32))], lengths=[None], masks=[None])
