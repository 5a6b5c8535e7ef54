"""A handle behaves as the dense tensor it replaced, or says why it cannot."""

import copy
import io
import multiprocessing.reduction
import pickle
import subprocess
import sys
import textwrap
from functools import partial
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode

from decoquant_compile import _storage
from decoquant_compile.handle import CacheTensor, Transients
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState
from decoquant_compile.takeover import Claim, restore, take_over

BHSD, BSHD = (0, 1, 2, 3), (0, 2, 1, 3)
B, H, S, D = SIZES = (2, 3, 8, 4)


def packed(dims=BHSD, bits=16, dtype=torch.float32, seed=0):
    """A handle and the dense tensor it replaced."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn([SIZES[dims.index(i)] for i in range(4)], generator=generator).to(dtype)
    dense[0].select(dims[2] - 1, S - 1).zero_()
    tensor = dense.clone()
    take_over([Claim(tensor, dims, Format("key", bits, D, dtype, 1, 2))], lengths=[None], masks=[None])
    assert type(tensor) is CacheTensor
    return tensor, dense


def same(a, b):
    """Equality of results of any structure."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def reads(monkeypatch):
    """Counts how often a state is read."""
    count = []
    read = CacheState.read
    monkeypatch.setattr(CacheState, "read", lambda self: (count.append(1), read(self))[1])
    return count


@pytest.fixture
def writes(monkeypatch):
    """Records (positions, rows) of each write to a state."""
    seen = []
    write = CacheState.write

    def record(self, new, positions, **kwargs):
        rows = kwargs.get("rows")
        seen.append((positions.tolist(), None if rows is None else rows.tolist()))
        write(self, new, positions, **kwargs)

    monkeypatch.setattr(CacheState, "write", record)
    return seen


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


READS = {
    "add": lambda t: t + 1,
    "radd": lambda t: 1 - t,
    "sum": lambda t: t.sum(),
    "matmul": lambda t: t @ t.mT,
    "cat": lambda t: torch.cat([t, t[:1]]),
    "stack": lambda t: torch.stack([t, t]),
    "sort": lambda t: tuple(t.sort()),
    "max": lambda t: t.max(-1).values,
    "equal": lambda t: torch.equal(t, t),
    "compare": lambda t: t > 0,
    "item": lambda t: t[1, 2, 2, 1].item(),
    "float": lambda t: float(t[1, 2, 2, 1]),
    "bool": lambda t: bool((t <= t.clone()).all()),
    "tolist": lambda t: t.tolist(),
    "iterate": lambda t: [x + 0 for x in t],
    "reversed": reversed,
    "contains": lambda t: 0.0 in t,
    "len": len,
    "to dtype": lambda t: t.to(torch.bfloat16),
    "half": lambda t: t.half(),
    "reshape": lambda t: t.reshape(-1) + 0,
    "flatten copy": lambda t: t.mT.reshape(-1),
    "where": lambda t: torch.where(t > 0, t, 0),
    "index": lambda t: t[torch.tensor([1, 0]), :, 2],
    "boolean index": lambda t: t[t > 0],
    "repeat": lambda t: t.repeat(1, 2, 1, 1),
    "foreach": lambda t: torch._foreach_add([t, t], 1),
    "operator": lambda t: torch.ops.aten.mul.Tensor(t, 2),
    "attention": lambda t: torch.nn.functional.scaled_dot_product_attention(t, t, t),
    "copy from": lambda t: torch.zeros(t.shape).copy_(t),
    "out": lambda t: torch.add(t, 1, out=torch.empty(t.shape)),
    "numpy": lambda t: np.asarray(t).tolist(),
    "numpy ufunc": lambda t: np.add(t, 1),
    "new_tensor": lambda t: t.new_tensor([1.0]),
    "new_full": lambda t: t.new_full((2,), t[1, 1, 1, 1]),
    "empty_like": lambda t: torch.empty_like(t).shape,
    "script": torch.jit.script(torch.nn.ReLU()),
    "autograd function": Double.apply,
    "vmap closure": lambda t: torch.vmap(lambda x: (t[0] * x).sum())(torch.arange(3.0)),
    "vmap unbatched": lambda t: torch.vmap(lambda x, y: y * x.sum(), in_dims=(None, 0))(t, torch.arange(3.0)),
    "grad closure": lambda t: torch.func.grad(lambda x: (t * x).sum())(torch.ones(1)),
    "backward through": lambda t: torch.autograd.grad((t * (x := torch.ones(1, requires_grad=True))).sum(), x)[0],
    "checkpoint": lambda t: torch.utils.checkpoint.checkpoint(lambda x: x * 2, t, use_reentrant=False),
    "nested containers": lambda t: torch.block_diag(*[t[0, 0], t[1, 1]]),
}


@pytest.mark.parametrize("dims", [BHSD, BSHD])
@pytest.mark.parametrize("name", READS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:__array_wrap__:DeprecationWarning")
def test_read(name, dims):
    handle, dense = packed(dims)
    result = READS[name](handle)
    assert same(result, READS[name](dense))
    assert not any(type(x) is CacheTensor for x in (result if isinstance(result, tuple | list) else [result]))
    assert type(handle) is CacheTensor
    assert torch.equal(handle, dense)


WRITES = {
    "add_": lambda t: t.add_(1),
    "iadd": lambda t: t.__iadd__(1),
    "mul_ self": lambda t: t.mul_(t),
    "masked_fill_": lambda t: t.masked_fill_(t > 0.5, 7),
    "normal_": lambda t: t.normal_(generator=torch.Generator().manual_seed(1)),
    "fill_": lambda t: t.fill_(2),
    "clamp_": lambda t: t.clamp_(-0.5, 0.5),
    "copy_": lambda t: t.copy_(torch.arange(float(t.numel())).view(t.shape)),
    "copy_ broadcast": lambda t: t.copy_(torch.arange(4)),
    "copy_ of itself": lambda t: t.copy_(t.flip(2)),
    "index_copy_ dim 2": lambda t: t.index_copy_(2, torch.tensor([2, 0]), source(t, 2)),
    "index_copy_ dim 1": lambda t: t.index_copy_(-3, torch.tensor([2, 0]), source(t, 1)),
    "index_copy_ scalar index": lambda t: t.index_copy_(2, torch.tensor(1), source(t, 2)[:, :, :1]),
    "index_copy_ keywords": lambda t: t.index_copy_(dim=2, index=torch.tensor([1]), source=source(t, 2)[:, :, :1]),
    "index_put_": lambda t: t.index_put_((torch.tensor([0]), torch.tensor([1])), torch.ones(())),
    "scatter_": lambda t: t.scatter_(2, torch.zeros(t.shape, dtype=torch.long), 3.0),
    "out": lambda t: torch.add(torch.ones(t.shape), 1, out=t),
    "operator": lambda t: torch.ops.aten.add_.Tensor(t, torch.ones(4)),
    "init": lambda t: torch.nn.init.constant_(t, 0.5),
}


def source(t, dim):
    shape = list(t.shape)
    shape[dim] = 2
    return torch.arange(float(np.prod(shape))).view(shape) / 8


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dims", [BHSD, BSHD])
@pytest.mark.parametrize("name", WRITES)
def test_write(name, dims, inference):
    handle, dense = packed(dims)
    with torch.inference_mode(inference):
        assert WRITES[name](handle) is handle
        WRITES[name](dense)
        assert type(handle) is CacheTensor
        assert torch.equal(handle, dense)


WRITES_WITHOUT_RESULT = {
    "item": lambda t: t.__setitem__((0, 1, 2, 3), 5.0),
    "slice": lambda t: t.__setitem__((slice(None), slice(None), slice(2, 5)), 1.5),
    "tensor index": lambda t: t.__setitem__((slice(None), slice(None), torch.tensor([4, 1])), torch.arange(4.0)),
    "boolean": lambda t: t.__setitem__(t < 0, -1.0),
    "foreach": lambda t: torch._foreach_add_([t], 1),
    "view": lambda t: t[1, :, 3:].add_(1),
    "view of view": lambda t: t.transpose(0, 1)[1:].unsqueeze(0)[..., 1].mul_(3),
    "data": lambda t: t.data.add_(1),
    "detach": lambda t: t.detach()[0].fill_(4),
    "reshape": lambda t: t.reshape(-1)[5:9].zero_(),
    "unbind": lambda t: [x.add_(i) for i, x in enumerate(t.unbind(0))],
    "split": lambda t: t.split(1, dim=1)[1].add_(1),
    "operator view": lambda t: torch.ops.aten.slice.Tensor(t, 2, 1, 3).add_(1),
    "integer view": lambda t: t.view(torch.int32)[0].zero_(),
    "expand": lambda t: t.unsqueeze(0).expand(1, *t.shape)[0, 0].add_(1),
    "diagonal": lambda t: t.diagonal(dim1=-2, dim2=-1).add_(1),
    "copy into slice": lambda t: t[:, 1:].copy_(t[:, :-1].clone() + t[:, 1:]),
    "overlap": lambda t: t[1].copy_(t[0]),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WRITES_WITHOUT_RESULT)
def test_write_through(name, inference):
    handle, dense = packed()
    with torch.inference_mode(inference):
        WRITES_WITHOUT_RESULT[name](handle)
        WRITES_WITHOUT_RESULT[name](dense)
        assert type(handle) is CacheTensor
        assert torch.equal(handle, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_what_changed_is_stored(writes, dtype):
    """Encoding a token again would add error, so an untouched one is left alone."""
    handle, _ = packed(dtype=dtype)
    writes.clear()
    handle[1, 2, 3, 0] = 9
    handle[:, :, 5] += 1
    handle.copy_(handle + 0)
    changed = handle.dense()
    changed[0, :, 6] = 2
    handle.copy_(changed)
    assert writes == [([3], [[False], [True]]), ([5], None), ([6], [[True], [False]])]


def test_metadata_and_views_read_nothing(reads):
    handle, dense = packed()
    for name in (
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "requires_grad",
        "grad",
        "is_leaf",
        "nbytes",
        "itemsize",
    ):
        assert getattr(handle, name) == getattr(dense, name)
    for name in ("size", "stride", "dim", "numel", "element_size", "storage_offset", "is_contiguous", "__len__"):
        assert getattr(handle, name)() == getattr(dense, name)()
    assert hash(handle) == id(handle)
    assert handle[1, :, 2:].stride() == dense[1, :, 2:].stride()
    view = handle.transpose(1, 2)[..., None, 1:].data
    assert type(view) is CacheTensor
    assert "bits=16" in repr(handle)
    assert "view" in f"{view}"
    assert type(torch.zeros_like(handle)) is Tensor
    assert not reads


def test_view_is_never_stale():
    handle, dense = packed()
    views = [lambda t: t[:, :, 2:4], lambda t: t.reshape(-1), lambda t: t.data[1].mT, lambda t: t[torch.tensor(1)]]
    ours, theirs = [v(handle) for v in views], [v(dense) for v in views]
    for t in (handle, dense):
        t.index_copy_(2, torch.tensor([2, 3]), source(t, 2))
        t[1] += 1
    for ours_view, theirs_view in zip(ours, theirs, strict=True):
        assert torch.equal(ours_view, theirs_view)
    restore(handle)
    handle.mul_(2)
    dense.mul_(2)
    for ours_view, theirs_view in zip(ours, theirs, strict=True):
        assert torch.equal(ours_view, theirs_view)
        assert type(ours_view) is Tensor
    ours[0].fill_(3)
    theirs[0].fill_(3)
    assert torch.equal(handle, dense)
    assert ours[0].data_ptr() == handle[:, :, 2:4].data_ptr()


def test_zero_makes_the_cache_plain():
    for clear in (lambda t: t.zero_(), torch.zero_, lambda t: t.mul_(0), lambda t: t[:].fill_(0)):
        handle, _ = packed()
        view = handle[:, :, 3]
        clear(handle)
        assert type(handle) is Tensor
        assert handle.untyped_storage().resizable()
        assert not handle.any()
        assert not hasattr(handle, "_state")
        handle[:, :, 3] = 1
        assert bool((view == 1).all())


COPIES = {
    "clone": lambda t: t.clone(),
    "torch.clone": torch.clone,
    "deepcopy": copy.deepcopy,
    "index_select": lambda t: t.index_select(0, torch.tensor([1, 1, 0])),
    "index_select int32": lambda t: torch.index_select(t, 0, torch.tensor([1], dtype=torch.int32)),
    "getitem": lambda t: t[torch.tensor([1, 0]), ...],
    "getitem slices": lambda t: t[torch.tensor([1, 0]), :, :],
    "repeat_interleave": lambda t: t.repeat_interleave(3, dim=0),
    "repeat_interleave tensor": lambda t: torch.repeat_interleave(t, torch.tensor([1, 2]), dim=0),
}


@pytest.mark.parametrize("dims", [BHSD, BSHD])
@pytest.mark.parametrize("name", COPIES)
def test_copy_stays_packed_and_independent(name, dims, reads):
    handle, dense = packed(dims)
    result = COPIES[name](handle)
    assert not reads
    assert type(result) is CacheTensor
    expected = COPIES[name](dense)
    assert result.shape == expected.shape
    assert result.stride() == expected.stride()
    handle.add_(1)
    assert torch.equal(result, expected)
    result.add_(5)
    assert torch.equal(result, expected + 5)
    assert torch.equal(handle, dense + 1)
    restore(result)
    assert torch.equal(result, expected + 5)


def test_selection_that_is_not_a_batch():
    handle, dense = packed()
    for f in (
        lambda t: t.index_select(1, torch.tensor([2])),
        lambda t: t.index_select(0, torch.tensor([], dtype=torch.long)),
        lambda t: t.repeat_interleave(2, dim=1),
        lambda t: t.repeat_interleave(2),
        lambda t: t[torch.tensor([1]), :, 2:3],
        lambda t: t[1:].index_select(0, torch.tensor([0])),
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda t: t[1:].clone(),
    ):
        assert type(f(handle)) is Tensor
        assert torch.equal(f(handle), f(dense))
    for wrong in (lambda t: t.index_select(0, torch.tensor([2])), lambda t: t[torch.tensor([5])]):
        with pytest.raises(IndexError):
            wrong(handle)


def test_wrong_calls_raise_as_on_the_dense_tensor():
    handle, dense = packed()
    for wrong in (
        lambda t: t.index_copy_(2, torch.tensor([S]), source(t, 2)[:, :, :1]),
        lambda t: t.index_copy_(2, torch.tensor([-1]), source(t, 2)[:, :, :1]),
        lambda t: t.index_copy_(2, torch.tensor([0, 1, 2]), source(t, 2)),
        lambda t: t.index_copy_(2, torch.tensor([0, 1]), source(t, 2).half()),
        lambda t: t.copy_(torch.zeros(3)),
        lambda t: t.view(7),
        lambda t: t[0, 0, 0, 0, 0],
        lambda t: t.add_(torch.ones(7)),
        lambda t: t.clone(1, 2),
        lambda t: t.backward(),
    ):
        with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises
            wrong(dense)
        with pytest.raises(expected.type) as got:
            wrong(handle)
        assert str(got.value) == str(expected.value)
    assert torch.equal(handle, dense)


def test_writes_of_a_transform_raise_as_on_the_dense_tensor():
    handle, dense = packed()
    batched = torch.ones(2, B, H, 1, D)
    for wrong in (
        lambda t: torch.vmap(lambda x: t.index_copy_(2, torch.tensor([1]), x))(batched),
        lambda t: torch.vmap(t.copy_)(batched),
        lambda t: torch.func.grad(lambda x: t.mul_(x).sum())(torch.ones(1)),
    ):
        with pytest.raises(RuntimeError) as expected:
            wrong(dense.clone())
        with pytest.raises(RuntimeError) as got:
            wrong(handle)
        assert str(got.value) == str(expected.value)
        assert torch.equal(handle, dense)


def test_deepcopy_keeps_aliases_and_attributes():
    handle, dense = packed()
    handle.note = ["x"]
    both = copy.deepcopy({"root": handle, "view": handle[1], "again": handle})
    assert both["root"] is both["again"]
    assert both["root"] is not handle
    assert both["root"].note == ["x"]
    assert both["root"].note is not handle.note
    both["view"].fill_(2)
    assert torch.equal(both["root"], torch.stack([dense[0], torch.full_like(dense[1], 2)]))
    assert torch.equal(handle, dense)


def test_shallow_copy_shares_content():
    handle, dense = packed()
    copy.copy(handle).add_(1)
    assert torch.equal(handle, dense + 1)


def test_saved_tensors_are_dense_and_need_no_package():
    handle, dense = packed()
    module = torch.nn.Module()
    module.register_buffer("keys", handle)
    assert module.keys is handle
    for thing, get in (
        (handle, lambda x: x),
        (handle[1], lambda x: x),
        ({"a": handle}, lambda x: x["a"]),
        (module.state_dict(), lambda x: x["keys"]),
    ):
        file = io.BytesIO()
        torch.save(thing, file)
        file.seek(0)
        loaded = get(torch.load(file, weights_only=True))
        assert type(loaded) is Tensor
        assert torch.equal(loaded, get(thing))
    assert type(pickle.loads(pickle.dumps(handle))) is Tensor
    assert torch.equal(pickle.loads(pickle.dumps(handle)), dense)
    assert torch.equal(pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(handle)), dense)
    module.load_state_dict({"keys": dense + 1})
    assert torch.equal(handle, dense + 1)
    assert type(handle) is CacheTensor


def test_conversion():
    handle, dense = packed()
    assert handle.to("cpu") is handle
    assert handle.float() is handle
    assert handle.contiguous() is handle
    assert type(handle.to(torch.float64)) is Tensor
    assert type(handle.to("cpu", copy=True)) is Tensor
    assert handle.requires_grad_(False) is handle
    assert handle.dense().data_ptr() != handle.dense().data_ptr()
    assert torch.equal(handle[:, 1].dense(), dense[:, 1])


def test_numpy_array_is_a_read_only_copy():
    handle, dense = packed()
    array = np.asarray(handle)
    assert not array.flags.writeable
    np.testing.assert_array_equal(array, dense.numpy())
    own = np.array(handle, dtype=np.float64)
    own += 1
    assert own.dtype == np.float64
    with pytest.raises(ValueError, match=r"decoquant_compile\.restore"):
        np.array(handle, copy=False)
    assert torch.equal(handle, dense)


REFUSED = {
    "data_ptr": lambda t: t.data_ptr(),
    "untyped_storage": lambda t: t.untyped_storage(),
    "storage": lambda t: t.storage(),
    "numpy": lambda t: t.numpy(),
    "numpy force": lambda t: t.numpy(force=True),
    "from_dlpack": torch.from_dlpack,
    "numpy from_dlpack": np.from_dlpack,
    "cuda array": lambda t: t.__cuda_array_interface__,
    "share_memory_": lambda t: t.share_memory_(),
    "set_": lambda t: t.set_(torch.zeros(3)),
    "set_ operator": lambda t: torch.ops.aten.set_.source_Tensor(t, torch.zeros(3)),
    "resize_": lambda t: t.resize_(3),
    "set data": lambda t: setattr(t, "data", torch.zeros(3)),
    "transpose_": lambda t: t.transpose_(0, 1),
    "transpose_ operator": lambda t: torch.ops.aten.transpose_(t, 0, 1),
    "unsqueeze_": lambda t: t.unsqueeze_(0),
    "as_strided_": lambda t: t.as_strided_((1,), (1,)),
    "resizing out": lambda t: torch.add(torch.ones(3, 2), 1, out=t),
    "requires_grad_": lambda t: t.requires_grad_(),
    "set requires_grad": lambda t: setattr(t, "requires_grad", True),
    "parameter": torch.nn.Parameter,
    "gradient": lambda t: t.add_(torch.ones(1, requires_grad=True)),
    "gradient copy": lambda t: t.copy_(torch.ones(1, requires_grad=True)),
    "as_subclass": lambda t: t.as_subclass(torch.nn.Parameter),
    "apply_": lambda t: t.apply_(lambda x: x + 1),
    "vmap": torch.vmap(lambda x: x + 1),
    "vmap last": torch.vmap(lambda x: x + 1, in_dims=-1),
    "view in transform": lambda t: torch.func.grad(lambda x: (t[0] * x).sum())(torch.ones(1)),
    "conjugate view": lambda t: torch.view_as_complex(t.unflatten(-1, (2, 2))).conj(),
}


@pytest.mark.parametrize("part", ["whole", "view"])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_refused(name, part):
    handle, dense = packed()
    target = handle if part == "whole" else handle[:]
    with pytest.raises(RuntimeError, match=r"decoquant_compile\.restore"):
        REFUSED[name](target)
    assert type(handle) is CacheTensor
    assert torch.equal(target, dense)
    assert not handle.requires_grad
    restore(handle)
    assert torch.equal(handle, dense)


def test_swap_tensors_moves_the_content_along():
    handle, dense = packed()
    other = torch.ones(3)
    torch.utils.swap_tensors(handle, other)
    assert type(handle) is Tensor
    assert torch.equal(handle, torch.ones(3))
    assert torch.equal(other, dense)
    assert torch.equal(restore(other), dense)


def test_transients_keep_aliases_in_one_call():
    handle, dense = packed()
    transients = Transients()
    whole, part = transients.lower(handle), transients.lower(handle[1])
    assert transients.lower(handle) is whole
    part.fill_(3)
    assert bool((whole[1] == 3).all())
    assert torch.equal(handle, dense)
    transients.commit()
    dense[1] = 3
    assert torch.equal(handle, dense)
    assert transients.lift(whole) is handle
    assert type(transients.lift(whole[0])) is CacheTensor


@pytest.mark.parametrize("get", [lambda t: t, lambda t: t[:, :, 2:5]], ids=["whole", "view"])
def test_store_changes(get, writes):
    handle, dense = packed()
    writes.clear()
    target = get(handle)
    before = target.dense()
    after = before.clone()
    after[1, :, 2] = 4
    handle[0, 0, 0] = 8  # meanwhile, elsewhere
    target.store_changes(before, after)
    get(dense)[1, :, 2] = 4
    dense[0, 0, 0] = 8
    assert torch.equal(handle, dense)
    assert len(writes) == 2


# Compilers and fake tensors


def _own(graphs, gm, examples, **kwargs):
    graphs.append([type(x) for x in examples])
    return lambda *args: (args[1] * 2,)


_own._decoquant_backend = True


def _step(t, x):
    t.index_copy_(2, torch.tensor([1]), x)
    return (t[:, :, :4].transpose(1, 2).to(x.dtype) * 2).sum() + x


@pytest.mark.parametrize("inference", [False, True])
def test_own_backend_traces_a_handle(inference):
    torch._dynamo.reset()
    graphs = []
    fn = torch.compile(_step, backend=partial(_own, graphs), fullgraph=True)
    with torch.inference_mode(inference):
        for seed in range(2):
            handle, dense = packed(seed=seed)
            torch._dynamo.mark_static_address(handle)
            fn(handle, torch.ones(B, H, 1, D))
            assert torch.equal(handle, dense)  # tracing touches nothing
    assert len(graphs) == 1
    assert CacheTensor in graphs[0]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_other_backend_is_refused_at_trace_time(fullgraph):
    torch._dynamo.reset()
    fn = torch.compile(_step, backend="eager", fullgraph=fullgraph)
    handle, dense = packed()
    x = torch.ones(B, H, 1, D)
    with pytest.raises(Exception, match=r"decoquant_compile\.restore"):
        fn(handle, x)
    assert torch.equal(handle, dense)
    assert torch.equal(fn(restore(handle), x), _step(dense, x))


def test_fake_tensors():
    handle, dense = packed()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        fake = copy.deepcopy([handle])[0]
    assert type(fake) is FakeTensor
    assert fake.shape == handle.shape
    with mode:
        for f in (lambda t: t + 1, lambda t: t.clone(), lambda t: t[1:], copy.deepcopy, lambda t: t.zero_()):
            assert type(f(handle)) is FakeTensor
    assert torch.equal(handle, dense)


# What PyTorch's Python dispatch does not see

BYPASS = """
    import os, warnings
    import torch
    from decoquant_compile.handle import CacheTensor
    from decoquant_compile.kernels.format import Format
    from decoquant_compile.takeover import Claim, restore, take_over
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # forked children have no pool
    t = torch.randn(2, 3, 600, 64)
    dense = t.clone()
    take_over([Claim(t, (0, 1, 2, 3), Format("key", 16, 64, t.dtype))], lengths=[None], masks=[None])
    off = torch._C.DisableTorchFunctionSubclass
    def disabled(f):
        with off():
            return f(t)
    paths = {
        "tensor": lambda: torch.tensor(t),
        "as_tensor": lambda: torch.as_tensor(t, dtype=torch.float64),
        "asarray": lambda: torch.asarray(t, copy=True),
        "legacy": lambda: torch.FloatTensor(t),
        "make_subclass": lambda: torch.Tensor._make_subclass(torch.Tensor, t),
        "nested": lambda: torch.nested.nested_tensor([t[0], t[1]]).values() * 1,
        "dlpack": lambda: torch.utils.dlpack.to_dlpack(t),
        "functionalize": lambda: torch.func.functionalize(lambda x: x + 1)(t),
        "grad": lambda: torch.func.grad(lambda x: (x * x).sum())(t),
        "jvp": lambda: torch.func.jvp(lambda x: x * 2, (t,), (torch.ones(t.shape),)),
        "batched": lambda: torch._C._functorch._add_batch_dim(t, 0, 1) + 1,
        "trace": lambda: torch.jit.trace(lambda x: x + 1, (t,)),
        "read": lambda: disabled(lambda x: x + 1),
        "sum": lambda: disabled(lambda x: x.sum()),
        "linear": lambda: disabled(lambda x: x @ x.mT),
        "to": lambda: disabled(lambda x: x.to(torch.bfloat16)),
        "write": lambda: disabled(lambda x: x.zero_()),
        "write slice": lambda: disabled(lambda x: x[1].add_(1)),
        "index_copy": lambda: disabled(lambda x: x.index_copy_(2, torch.tensor([0]), torch.ones(2, 3, 1, 64))),
        "storage": lambda: disabled(lambda x: x.untyped_storage().fill_(0)),
        "resize": lambda: disabled(lambda x: x.untyped_storage().resize_(0)),
        "numpy": lambda: disabled(lambda x: x.numpy()),
        "pointer": lambda: disabled(lambda x: x.data_ptr()),
        "save": lambda: disabled(lambda x: x.untyped_storage().tolist()[:4]),
        "inductor": lambda: torch.compile(lambda x: x + 1)(t),
    }
    def child(path):
        try:
            result = path()
            if isinstance(result, torch.Tensor) and type(result) is not CacheTensor:
                assert bool(result.isnan().any()), result
        except (RuntimeError, torch.jit.TracingCheckError, torch._dynamo.exc.TorchDynamoException):
            pass
        assert torch.equal(t, dense)
        assert torch.equal(restore(t), dense)

    for name, path in paths.items():
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(path)
                code = 0
            finally:
                os._exit(code)
        print(name, os.waitpid(pid, 0)[1], sep="=", flush=True)
"""
PATHS = [line.split('"')[1] for line in BYPASS.splitlines() if line.startswith('        "')]


@pytest.fixture(scope="module")
def outcomes():
    """Exit status of each path, each in a process of its own."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(BYPASS)], capture_output=True, text=True, check=True)
    return dict(line.split("=") for line in done.stdout.splitlines() if "=" in line), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reading released memory is caught on Linux only")
@pytest.mark.parametrize("path", PATHS)
def test_bypass_neither_crashes_nor_reads_garbage(path, outcomes):
    status, errors = outcomes
    assert status[path] == "0", errors


# Storages


@pytest.mark.parametrize("nbytes", [1, 100, 4096, 10_000, (4 << 20) + 1, 9 << 20])
def test_zeros_are_zero_in_memory_that_was_used(nbytes):
    for _ in range(3):
        dirty = torch.full((nbytes,), 7, dtype=torch.uint8)
        del dirty
        storage = _storage.zeros(nbytes, torch.device("cpu"))
        tensor = torch.empty(0, dtype=torch.uint8).set_(storage)
        assert len(tensor) == nbytes
        assert not tensor.any()
        tensor.fill_(7)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_zeros_and_released_storages_take_no_memory():
    process = psutil.Process()
    before = process.memory_info().rss
    zeros = _storage.zeros(256 << 20, torch.device("cpu"))
    released = _storage.Reserved(256 << 20, torch.device("cpu")).storage(256 << 20)
    assert zeros.nbytes() == released.nbytes() == 256 << 20
    assert process.memory_info().rss - before < 32 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.skipif(sys.platform != "linux", reason="a null pointer elsewhere")
def test_released_memory_reads_as_nan_and_refuses_writes(dtype):
    n = 9 << 20
    storage = _storage.Reserved(n, torch.device("cpu")).storage(n)
    tensor = torch.empty(0, dtype=dtype).set_(storage, 0, (n // dtype.itemsize,))
    assert bool(tensor.isnan().all())
    with pytest.raises(RuntimeError):
        tensor.zero_()
    with pytest.raises(RuntimeError):
        tensor[5:].data_ptr()


def test_devices_without_nan_pages(monkeypatch):
    monkeypatch.setattr(_storage, "sys", SimpleNamespace(platform="other", getrefcount=sys.getrefcount))
    handle, dense = packed()
    handle[0, 0] += 1
    dense[0, 0] += 1
    assert torch.equal(handle[:, 0], dense[:, 0])
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError):
        handle.zero_()
    assert torch.equal(handle.clone(), dense)
    assert torch.equal(restore(handle), dense)
    again, _ = packed()
    again.zero_()
    again += 1
    assert type(again) is Tensor
    assert bool((again == 1).all())


def test_address_space_exhausted(monkeypatch):
    monkeypatch.setattr(_storage, "_CHUNK", 1 << 12)
    monkeypatch.setattr(_storage, "_libc", lambda: SimpleNamespace(mmap=lambda *_: -1))
    with pytest.raises(OSError, match="cannot map 8192 bytes"):
        _storage.Reserved(8192, torch.device("cpu")).storage(8192)
