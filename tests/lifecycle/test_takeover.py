"""Taking cache tensors over, and giving them back."""

import ctypes
import mmap
from collections import UserDict, deque
from dataclasses import dataclass, field

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from decoquant_compile.handle import CacheTensor
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState
from decoquant_compile.takeover import Bytes, Claim, Obstructed, nbytes, obstacle, restore, take_over

BHSD = (0, 1, 2, 3)
SHAPE = (2, 3, 8, 4)


def claim(tensor, *, bits=16, dims=BHSD, role="key", sinks=1, window=2):
    return Claim(tensor, dims, Format(role, bits, tensor.shape[dims[3]], tensor.dtype, sinks, window))


def take(*tensors, lengths=None, masks=None, unread=(), **kwargs):
    none = [None] * len(tensors)
    take_over([claim(t, **kwargs) for t in tensors], lengths=lengths or none, masks=masks or none, unread=unread)


def packed(shape=SHAPE, **kwargs):
    tensor = torch.randn(shape)
    dense = tensor.clone()
    take(tensor, **kwargs)
    return tensor, dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)])
def test_content_and_references_survive(dims, dtype):
    dense = torch.randn(2, 3, 4, 5).to(dtype)
    tensor = dense.clone()
    module = torch.nn.Module()
    module.register_buffer("keys", tensor)
    assert obstacle(tensor, dims) is None
    take(tensor, dims=dims)
    assert module.keys is tensor
    assert type(tensor) is CacheTensor
    assert torch.equal(tensor, dense)
    assert restore(tensor) is tensor
    assert type(tensor) is Tensor
    assert torch.equal(tensor, dense)
    assert tensor.is_contiguous()
    assert not vars(tensor)
    tensor += 1
    assert torch.equal(tensor, dense + 1)
    take(tensor, dims=dims)
    assert torch.equal(tensor, dense + 1)


def test_memory_is_released():
    process = psutil.Process()
    caches = [torch.ones(1, 8, 8192, 128) for _ in range(4)]  # 32 MiB each
    dense = nbytes(caches)
    assert dense == Bytes(0, 128 << 20)
    before = process.memory_info().rss
    take(*caches, bits=4)
    held = nbytes(caches)
    assert held.dense == 0
    assert 0 < held.packed == held.total < 24 << 20
    freed = before - process.memory_info().rss
    assert freed > 64 << 20
    del caches


def alias(make):
    """A tensor and what keeps its memory in use elsewhere."""
    tensor = torch.randn(SHAPE)
    return tensor, make(tensor)


def in_use_for_backward(tensor):
    return tensor * torch.ones(4, requires_grad=True)


def based(base):
    return base.view(SHAPE), base


def siblings(base):
    return base.view(SHAPE), base.view(3, 64)


def exported(base):
    return base.view(SHAPE), torch.utils.dlpack.to_dlpack(base)


OBSTACLES = {
    "view": (lambda: alias(lambda t: t[1]), "shares its memory"),
    "detached": (lambda: alias(lambda t: t.detach()), "shares its memory"),
    "of a stack": (lambda: (torch.zeros(2, *SHAPE)[0], None), "cover its storage"),
    "base": (lambda: based(torch.zeros(192)), "shares its memory"),
    "sibling view": (lambda: siblings(torch.zeros(192)), "shares its memory"),
    "exported base": (lambda: exported(torch.zeros(192)), "shares its memory"),
    "dlpack": (lambda: alias(torch.utils.dlpack.to_dlpack), "shares its memory"),
    "saved for backward": (lambda: alias(in_use_for_backward), "shares its memory"),
    "autograd parameter": (lambda: (torch.nn.Parameter(torch.zeros(SHAPE)), None), "is a Parameter"),
    "numpy": (lambda: alias(lambda t: t.numpy()), "belongs to somebody else"),
    "from numpy": (lambda: (torch.from_numpy(torch.zeros(SHAPE).numpy().copy()), None), "belongs to somebody else"),
    "mapped": (lambda: (torch.frombuffer(mmap.mmap(-1, 768), dtype=torch.float32).view(SHAPE), None), "somebody else"),
    "shared": (lambda: (torch.zeros(SHAPE).share_memory_(), None), "belongs to somebody else"),
    "offset": (lambda: (torch.zeros(200)[8:].view(SHAPE), None), "cover its storage"),
    "larger storage": (lambda: (torch.zeros(200)[:192].view(SHAPE), None), "cover its storage"),
    "transposed": (lambda: (torch.zeros(SHAPE).transpose(1, 2), None), "not contiguous"),
    "expanded": (lambda: (torch.zeros(1, 1, 1, 4).expand(SHAPE), None), "not contiguous"),
    "gradient": (lambda: (torch.zeros(SHAPE, requires_grad=True), None), "requires grad"),
    "result of a gradient": (lambda: (torch.zeros(SHAPE, requires_grad=True) + 1, None), "requires grad"),
    "three dimensions": (lambda: (torch.zeros(SHAPE[1:]), None), "has shape"),
    "integers": (lambda: (torch.zeros(SHAPE, dtype=torch.long), None), "has dtype"),
    "float64": (lambda: (torch.zeros(SHAPE, dtype=torch.float64), None), "has dtype"),
    "float8": (lambda: (torch.zeros(SHAPE, dtype=torch.float8_e4m3fn), None), "has dtype"),
    "meta": (lambda: (torch.zeros(SHAPE, device="meta"), None), "on meta"),
    "sparse": (lambda: (torch.zeros(SHAPE).to_sparse(), None), "layout"),
    "empty": (lambda: (torch.zeros(0, 3, 8, 4), None), "empty"),
    "zero tensor": (lambda: (torch._efficientzerotensor(SHAPE), None), "lazy"),
    "functional": (lambda: (torch._to_functional_tensor(torch.zeros(SHAPE)), None), "functorch"),
    "handle": (lambda: (packed()[0], None), "packed already"),
    "view of a handle": (lambda: (packed()[0][:], None), "view of a packed cache"),
    "inherited": (lambda: (torch.zeros(SHAPE).as_subclass(Special), None), "is a Special"),
}


class Special(Tensor):
    pass


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacle(name):
    make, reason = OBSTACLES[name]
    tensor, _keep = make()
    assert reason in obstacle(tensor, BHSD)
    kind, good = type(tensor), torch.ones(SHAPE)
    with pytest.raises(Obstructed, match=reason) as error:
        take_over(
            [claim(good), Claim(tensor, BHSD, Format("key", 16, 4, torch.float32))],
            lengths=[None] * 2,
            masks=[None] * 2,
        )
    assert error.value.reasons[0] is None
    assert reason in error.value.reasons[1]
    assert type(tensor) is kind
    assert type(good) is Tensor
    assert bool((good == 1).all())


def test_functorch_wrapper_is_an_obstacle():
    seen = []
    torch.vmap(lambda t: (seen.append(obstacle(t, BHSD)), t)[1])(torch.zeros(2, *SHAPE))
    assert "functorch" in seen[0]


def test_what_is_no_obstacle():
    tensor = torch.zeros(SHAPE)
    storage = tensor.untyped_storage()
    references = [tensor, {"x": tensor}]
    view = tensor[1]
    del view
    assert obstacle(tensor, BHSD) is None
    with torch.inference_mode():
        assert obstacle(torch.zeros(SHAPE), BHSD) is None
    take(tensor)
    assert storage.nbytes() == tensor.nbytes
    assert references[0] is tensor
    with pytest.raises(RuntimeError):
        storage.data_ptr()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(192).view(SHAPE),
        lambda: torch.zeros(1, *SHAPE)[0],
        lambda: torch.zeros(1, *SHAPE[1:]).repeat_interleave(2, dim=0),
        lambda: torch.zeros(SHAPE).transpose(1, 2).transpose(1, 2).contiguous(),
    ],
)
def test_view_of_a_tensor_that_is_gone(make):
    tensor = make()
    assert tensor._base is not None
    tensor.fill_(2)
    take(tensor)
    assert tensor._base is None
    assert not tensor._is_view()
    assert bool((tensor == 2).all())
    fake = FakeTensorMode().from_tensor(tensor)
    assert fake.shape == SHAPE
    restore(tensor).add_(1)
    assert bool((tensor == 3).all())


def test_restored_and_cleared_tensors_can_be_taken_again():
    tensor, dense = packed()
    view = tensor[1]
    restore(tensor)
    assert "shares its memory" in obstacle(tensor, BHSD)
    with pytest.raises(Obstructed):
        take(tensor)
    assert torch.equal(view, dense[1])
    del view
    take(tensor)
    tensor.zero_()
    assert obstacle(tensor, BHSD) is None
    tensor += 1
    take(tensor)
    assert bool((tensor == 1).all())


def test_claims_that_do_not_fit():
    tensor, other = torch.ones(SHAPE), torch.ones(SHAPE)
    with pytest.raises(Obstructed, match="claimed twice") as error:
        take(tensor, other, tensor)
    assert error.value.reasons[1] is None
    for wrong in (Format("key", 16, 5, torch.float32), Format("key", 16, 4, torch.bfloat16)):
        with pytest.raises(Obstructed, match="its format says"):
            take_over([Claim(tensor, BHSD, wrong)], lengths=[None], masks=[None])
    with pytest.raises(Obstructed, match="are not dimensions"):
        take_over([Claim(tensor, (0, 1, 1, 3), Format("key", 16, 4, torch.float32))], lengths=[None], masks=[None])
    with pytest.raises(ValueError, match="zip"):
        take_over([claim(tensor)], lengths=[], masks=[None])
    assert type(tensor) is type(other) is Tensor
    assert bool((tensor == 1).all())


@pytest.mark.parametrize("broken", ["write", "handle_of"])
def test_failure_half_way_changes_nothing(monkeypatch, broken):
    calls = []

    def failing(original):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise MemoryError
            return original(*args, **kwargs)

        return call

    tensors = [torch.randn(SHAPE) for _ in range(4)]
    dense = [t.clone() for t in tensors]
    if broken == "write":
        monkeypatch.setattr(CacheState, "write", failing(CacheState.write))
    else:
        from decoquant_compile import takeover

        monkeypatch.setattr(takeover, "handle_of", failing(takeover.handle_of))
    with pytest.raises(MemoryError):
        take(*tensors)
    assert all(type(t) is Tensor for t in tensors)
    assert all(map(torch.equal, tensors, dense))
    take(*tensors)
    assert all(map(torch.equal, tensors, dense))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_inference_mode(inference, later):
    with torch.inference_mode(inference):
        tensor = torch.ones(SHAPE)
        take(tensor, bits=8)
    with torch.inference_mode(later):
        tensor[:, :, 2] = 3
        assert torch.allclose(tensor[:, :, 2], torch.tensor(3.0), rtol=0.02)
        tensor.clone()[:, :, 1] = 2
        restore(tensor)
        assert bool((tensor[:, :, 0] > 0).all())


# Ingest


def writes_of(monkeypatch):
    seen = []
    write = CacheState.write

    def record(self, new, positions, **kwargs):
        seen.append((positions.tolist(), kwargs))
        write(self, new, positions, **kwargs)

    monkeypatch.setattr(CacheState, "write", record)
    return seen


def test_only_written_slots_are_ingested(monkeypatch):
    seen = writes_of(monkeypatch)
    tensor = torch.zeros(SHAPE)
    tensor[0, :, 1:4] = 1
    tensor[1, 1, 2, 3] = float("nan")
    tensor[1, 0, 5] = -1
    take(tensor)
    positions, kwargs = seen[0]
    assert positions == [1, 2, 3, 5]
    assert kwargs["rows"].tolist() == [[True, True, True, False], [False, True, False, True]]
    seen.clear()
    take(torch.zeros(SHAPE))
    assert not seen


def test_left_overs_are_kept_but_older(monkeypatch):
    seen = writes_of(monkeypatch)
    dense = torch.randn(1, 2, 12, 16)
    tensor = dense.clone()
    take(tensor, lengths=[5], bits=2, sinks=1, window=3)
    assert seen[0][0] == [5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4]
    assert torch.equal(tensor[:, :, 2:5], dense[:, :, 2:5])  # the window
    assert torch.equal(tensor[:, :, :1], dense[:, :, :1])  # the sinks
    assert not torch.equal(tensor[:, :, 1], dense[:, :, 1])
    assert bool(tensor[:, :, 5:].any(-1).all())


@pytest.mark.parametrize("size", [1e-3, 1e2, 1e6, 1e30, float("nan")])
def test_what_the_memory_held_before_spoils_no_token(size):
    dense = torch.randn(2, 2, 60, 16)
    tensor = torch.cat([dense, torch.randn(2, 2, 40, 16) * size], 2)
    rest = tensor[:, :, 60:].clone()
    take(tensor, lengths=[60], unread={0}, bits=8, sinks=1, window=2)
    assert (tensor[:, :, :60] - dense).norm() < 0.02 * dense.norm()
    if size <= 1e6:  # it is kept, too
        assert (tensor[:, :, 60:] - rest).norm() < 0.02 * rest.norm()


@pytest.mark.parametrize("additive", [False, True])
def test_left_padding(additive):
    """The first real token of each row is its sink, whatever stands before it."""
    dense = torch.randn(2, 2, 12, 16)
    tensor = dense.clone()
    admitted = torch.arange(12) >= torch.tensor([[3], [0]])
    mask = admitted[:, None, None].expand(2, 1, 4, 12)
    mask = torch.where(mask, 0.0, float("-inf")) if additive else mask
    take(tensor, lengths=[12], masks=[(mask, 0)], bits=2, sinks=2, window=2)
    assert torch.equal(tensor[0, :, 3:5], dense[0, :, 3:5])
    assert torch.equal(tensor[1, :, :2], dense[1, :, :2])
    assert not torch.equal(tensor[0, :, :2], dense[0, :, :2])


def test_mask_of_a_later_slot():
    dense = torch.randn(1, 1, 12, 16)
    tensor = dense.clone()
    mask = torch.tensor([False, True, True])[None, None, None]
    take(tensor, masks=[(mask, 4)], bits=2, sinks=1, window=1)
    assert torch.equal(tensor[:, :, 5], dense[:, :, 5])
    assert not torch.equal(tensor[:, :, 0], dense[:, :, 0])


@settings(deadline=None, max_examples=30)
@given(
    bits=st.sampled_from((8, 5, 4, 3, 2)),
    role=st.sampled_from(("key", "value")),
    used=st.integers(0, 40),
    length=st.none() | st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_error_of_a_taken_cache(bits, role, used, length, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(2, 2, 40, 32, generator=generator)
    dense[:, :, used:] = 0
    tensor = dense.clone()
    take(tensor, bits=bits, role=role, lengths=[length], sinks=4, window=4)
    error = (tensor - dense).square().mean()
    assert error <= dense.square().mean() * {8: 1e-4, 5: 0.006, 4: 0.02, 3: 0.07, 2: 0.25}[bits]
    assert not tensor[:, :, used:].any()


# restore and nbytes over object graphs


@dataclass(slots=True)
class Layer:
    keys: Tensor
    values: Tensor
    name: str = "layer"
    self_reference: object = None


@dataclass
class Holder:
    layers: list = field(default_factory=list)


def graph():
    keys, values, ring, deep = (packed()[0] for _ in range(4))
    layer = Layer(keys, values)
    layer.self_reference = layer
    module = torch.nn.Module()
    module.register_buffer("ring", ring)
    module.child = torch.nn.Linear(2, 2)
    chain = [deep]
    for _ in range(5000):  # deeper than Python's stack
        chain = [chain]
    holder = Holder(
        [layer, {"module": module}, (chain, deque([keys])), {1, "x"}, UserDict(a=values), None, 3.5, range(10**12)]
    )
    return holder, [keys, values, ring, deep], module


def test_restore_walks_any_object():
    holder, handles, _ = graph()
    dense = [h.dense() for h in handles]
    assert restore(holder) is holder
    assert all(type(h) is Tensor for h in handles)
    assert all(map(torch.equal, handles, dense))
    assert restore(holder) is holder


def test_nbytes_counts_each_memory_once():
    holder, handles, module = graph()
    weights = sum(p.nbytes for p in module.child.parameters())
    states = sum(h._state.nbytes for h in handles)
    assert nbytes(holder) == Bytes(states, weights)
    assert nbytes([handles[0], handles[0][1], handles[0].data]) == Bytes(handles[0]._state.nbytes, 0)
    restore(handles[0])
    mixed = [handles[0], handles[0][1:], handles[1]]
    assert nbytes(mixed) == Bytes(handles[1]._state.nbytes, handles[0].nbytes)
    assert nbytes(mixed).total == handles[1]._state.nbytes + handles[0].nbytes
    assert nbytes([torch.zeros(3, device="meta"), torch.zeros(3).to_sparse()]) == Bytes(0, 0)


def test_restore_of_a_view_restores_its_cache():
    tensor, dense = packed()
    view = tensor[1]
    assert restore(view) is view
    assert type(tensor) is type(view) is Tensor
    view.zero_()
    assert torch.equal(tensor[0], dense[0])
    assert not tensor[1].any()


def test_hugging_face_cache():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    cache = transformers.StaticCache(config=config, max_cache_len=16)
    new = torch.randn(2, 2, 5, 8)
    for layer in range(2):
        cache.update(new, new + 1, layer)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    dense = [t.clone() for t in tensors]
    take(*tensors)
    assert nbytes(cache).dense < 64  # the lengths
    cache.update(new, new - 1, 0)
    assert torch.equal(cache.layers[0].keys[:, :, 5:10], new)
    assert torch.equal(cache.layers[0].values[:, :, 5:10], new - 1)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[1].keys, dense[2].flip(0))
    assert type(cache.layers[1].keys) is CacheTensor
    assert restore(cache) is cache
    assert type(cache.layers[1].keys) is Tensor
    cache.reset()
    assert not cache.layers[0].keys.any()


@pytest.mark.parametrize("empty", [None, 3, "cache", [], {}, object(), torch.nn.ReLU(), ctypes])
def test_no_tensor(empty):
    for function in (restore, nbytes):
        with pytest.raises(TypeError, match=f"got a {type(empty).__name__} without any"):
            function(empty)
