"""`CacheTensor`: a cache tensor whose 16-bit memory is gone; eager code keeps working on its packed state."""

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, GetSetDescriptorType
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from decoquant_compile import _compat, _storage
from decoquant_compile.dims import BHSD, Dims, Stacking, arranged, laid_out, shape_of
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState, GrowingState
from decoquant_compile.kernels.tiles import TILE

_RESTORE = "decoquant_compile.restore(cache) gives the 16-bit tensor back"
_BITWISE = {2: torch.int16, 4: torch.int32}


class CacheTensor(Tensor):
    """A cache tensor, or a view of one, whose content is held packed.

    An existing tensor becomes a handle by its class, so that every reference to it stays valid (`adopt`). Its metadata
    are those of the dense tensor and its storage holds no memory. Eager operations run on a dense transient; what they
    change in it is stored, token by token. Views share the storage of their root and write through to it. `clone`,
    `deepcopy` and a selection over the batch stay packed; pickles hold the dense tensor. What would need the memory
    itself (`data_ptr`, `numpy`, DLPack, `resize_` ...) raises a `RuntimeError`.

    Code that reaches the memory without PyTorch's Python dispatch (`torch.tensor(handle)`, `torch.func.grad` over it,
    C++ extensions) reads NaN on Linux CPUs and cannot write.
    """

    _state: CacheState | None = None
    """Packed content; None for a view or a stack. A `GrowingState` may belong to many handles, each a stretch of it."""
    _first: int = 0
    """Slot, in a `GrowingState`, of the first token."""
    _dims: Dims = BHSD
    _parts: "Parts | None" = None
    """Of a stack, a tensor that holds many caches: a handle for each."""
    _root: Tensor | None = None
    """The cache tensor that a view looks into: a handle, or plain again after `restore`."""
    dense_calls: int = 0
    """How many compiled calls needed this cache dense."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` as if on the dense tensor; while torch.compile traces, on the handle's metadata."""
        if torch.compiler.is_compiling() and _compat.compiles_here():
            _require_own_backend()
            if (function := _bound(func)) is not None:
                return functools.partial(function, *args)
            with _compat.no_subclass_dispatch():
                if type(func) is FunctionType:
                    args, kwargs = _compat.tree_map(_plainly, (args, kwargs or {}))
                return func(*args, **(kwargs or {}))
        caller = sys._getframe(1).f_globals.get("__name__")
        return _call(caller, func, tuple(args), dict(kwargs or {}))

    def dense(self) -> Tensor:
        """A dense copy of the present content, of the same shape and dtype, contiguous unless this is a view."""
        return Transients().lower(self)

    def store_changes(self, before: Tensor, after: Tensor) -> None:
        """Store the tokens in which `after` differs, bit by bit, from `before`, an earlier `dense()` of this handle."""
        if self._root is not None:
            transients = Transients()
            target = transients.lower(self)
            with internal():
                target.copy_(torch.where(_bits(before) != _bits(after), after.detach(), target))
            transients.commit()
            return
        if self._parts is not None:
            apart = self._parts.stacking.apart
            for part, old, new in zip(self._parts.handles, apart(before), apart(after), strict=True):
                part.store_changes(old, new)
            return
        state = _own(self)
        with internal():
            after = arranged(after.detach(), self._dims)
            changed = (_bits(after) != _bits(arranged(before, self._dims))).any(-1).any(1)  # [B, S]
            positions = changed.any(0).nonzero()[:, 0]
            if len(positions):
                rows = changed[:, positions]
                new = after.index_select(2, positions)
                state.write(new, positions + self._first, rows=None if bool(rows.all()) else rows)

    def states(self) -> list[CacheState]:
        """The packed states of a whole handle: one, or those of all caches that it holds."""
        if self._parts is not None:
            return [state for part in self._parts.handles for state in part.states()]
        return [] if self._state is None else [self._state]

    def set_(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused, as all that needs the memory; PyTorch does not pass it to `__torch_function__`."""
        raise _refusal("set_")

    def as_subclass(self, cls: Any) -> Any:
        """Itself as what it is, which Dynamo asks of a view that a graph returns; refused for the same reason else."""
        if cls is CacheTensor:
            return self
        raise _refusal("as_subclass")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """A NumPy array of the content; read-only unless `copy`, since a dense tensor would share its memory."""
        if copy is False:
            raise ValueError(f"the array of a packed cache is always a copy; {_RESTORE}")
        array = self.dense().numpy()
        array = array if dtype is None else array.astype(dtype, copy=False)
        array.flags.writeable = bool(copy)
        return array

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the dense tensor, which loads without this package."""
        return self.dense().contiguous().__reduce_ex__(protocol)

    def __copy__(self) -> Tensor:
        """A tensor over the same content, as for any tensor."""
        return self.detach()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        del tensor_contents  # reading would unpack the whole cache
        shape = f"shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}"
        if self._root is not None:
            root = repr(self._root) if isinstance(self._root, CacheTensor) else "a dense tensor"
            return f"CacheTensor(view, {shape}, of={root})"
        if self._parts is not None:
            nbytes = sum(state.nbytes for state in self.states())
            return f"CacheTensor({shape}, caches={len(self._parts.handles)}, nbytes={nbytes})"
        state = self._state
        assert state is not None
        return f"CacheTensor({shape}, role={state.format.role}, bits={state.format.bits}, nbytes={state.nbytes})"


_HELD = ("_state", "_first", "_dims", "_parts")
"""Attributes of a whole handle."""


@dataclass(frozen=True)
class Parts:
    """The caches of a stack.

    Attributes:
        stacking: where they stand in it.
        handles: of each, whole.
    """

    stacking: Stacking
    handles: tuple[Any, ...]

    def dense(self) -> Tensor:
        """The content of the stack."""
        return self.stacking.together([part.dense() for part in self.handles])

    def clone(self) -> "Parts":
        """Independent copies, still packed."""
        return Parts(self.stacking, tuple(_clone(part) for part in self.handles))


def adopt(tensor: Tensor, handle: Tensor) -> None:
    """Make a dense tensor a handle of what `handle`, of its shape and dtype, holds; its memory goes with `handle`."""
    with _compat.no_subclass_dispatch():
        _storage.exchange(tensor, handle.untyped_storage())
    tensor.__class__ = CacheTensor
    tensor.__dict__.update({name: value for name, value in handle.__dict__.items() if name in _HELD})


def parts_of(tensor: object, stacking: Stacking) -> tuple[Tensor, ...] | None:
    """The handles of the caches that a whole handle holds in this way; None for anything else."""
    if not isinstance(tensor, CacheTensor) or tensor._parts is None or tensor._parts.stacking != stacking:
        return None
    return tensor._parts.handles


def state_of(tensor: object, dims: Dims) -> CacheState | None:
    """The packed content of a whole handle whose dimensions have the roles `dims`; None for anything else.

    What a `GrowingState` holds is never the content of one handle alone: see `stretch_of`.
    """
    if not isinstance(tensor, CacheTensor) or tensor._state is None or isinstance(tensor._state, GrowingState):
        return None
    return tensor._state if _same_dims(tensor, tensor._dims, dims) else None


def _same_dims(tensor: Tensor, ours: Dims, theirs: Dims) -> bool:
    return ours == theirs or all(
        a == b or (isinstance(a, int) and isinstance(b, int) and tensor.shape[a] == tensor.shape[b] == 1)
        for a, b in zip(ours, theirs, strict=True)
    )


@dataclass(frozen=True)
class Stretch:
    """What a handle shows of a growing cache: the slots ``[first, first + length)`` of `state`."""

    state: GrowingState
    first: int
    length: int

    @property
    def last(self) -> int:
        """The slot behind it."""
        return self.first + self.length

    def copied(self, tokens: int = 0, room: int = 0) -> "Stretch":
        """The same tokens in a state of their own, with room for `tokens` more, and for `room` in all."""
        return Stretch(self.state.section(self.first, self.last, tokens, room), self.first % TILE, self.length)


def stretch_of(tensor: object, dims: Dims) -> Stretch | None:
    """The stretch that a handle, or a view that only cuts off slots, shows of a growing cache; None for anything else.

    Args:
        tensor: anything.
        dims: which of its dimensions is batch, head, slot, channel.
    """
    if not settle(tensor):
        return None
    root = tensor if tensor._root is None else tensor._root
    if not isinstance(root, CacheTensor) or not isinstance(root._state, GrowingState):
        return None
    if tensor.dim() != root.dim() or not _same_dims(tensor, root._dims, dims):
        return None
    slot = dims[2]
    with _compat.no_subclass_dispatch():
        length, step = tensor.shape[slot], root.stride(slot)
        skipped, rest = divmod(int(tensor.storage_offset()), step)
        whole = all(tensor.shape[d] == root.shape[d] for d in range(root.dim()) if d != slot)
        in_place = all(tensor.stride(d) == root.stride(d) for d in range(root.dim()) if tensor.shape[d] > 1)
        if tensor.dtype != root.dtype or rest or not whole or not in_place or skipped + length > root.shape[slot]:
            return None
    return Stretch(root._state, root._first + skipped, length)


def is_whole(tensor: object) -> TypeGuard[CacheTensor]:
    """Whether a tensor is a handle and no view of one."""
    return isinstance(tensor, CacheTensor) and tensor._root is None


def format_of(tensor: object, dims: Dims) -> Format | None:
    """The format that a handle, or a view of a growing one, is held in; None for anything else."""
    held = state_of(tensor, dims) or stretch_of(tensor, dims)
    if held is None:
        return None
    return held.state.format if isinstance(held, Stretch) else held.format


def _own(handle: CacheTensor) -> CacheState:
    """The state of a whole handle, to write to: a growing one is copied, since other handles may show it too."""
    state = handle._state
    assert state is not None
    if isinstance(state, GrowingState):
        stretch = stretch_of(handle, handle._dims)
        assert stretch is not None
        own = stretch.copied()
        handle._state, handle._first = own.state, own.first
        return own.state
    return state


def _content(root: CacheTensor) -> Tensor:
    """What a whole handle shows, [batch, heads, slots, channels]."""
    state = root._state
    assert state is not None
    with _compat.no_subclass_dispatch():
        length = root.shape[root._dims[2]]
    return state.read()[:, :, root._first : root._first + length]


def replace(handle: CacheTensor, other: Tensor) -> None:
    """Give a whole handle the content of another one of its shape, or of a dense tensor."""
    with internal():
        if not isinstance(other, CacheTensor):
            _store(handle, other)
            return
        for state, source in zip(handle.states(), other.states(), strict=True):
            state.buffer.copy_(source.buffer)


def unpack(handle: CacheTensor) -> None:
    """Make a handle a plain tensor with its present content again; for a view, make its root one too."""
    root = handle if handle._root is None else handle._root
    if isinstance(root, CacheTensor):
        with internal():
            _give_memory(root, root.dense().untyped_storage())
    if root is not handle:
        settle(handle)


def _give_memory(root: CacheTensor, storage: torch.UntypedStorage) -> None:
    with _compat.no_subclass_dispatch():
        _storage.exchange(root, storage)
    for name in (*_HELD, "dense_calls"):
        root.__dict__.pop(name, None)
    root.__class__ = Tensor  # type: ignore[assignment]


def settle(tensor: object) -> TypeGuard[CacheTensor]:
    """Whether `tensor` is a handle; a view whose root is plain again becomes plain here, over the same memory."""
    if not isinstance(tensor, CacheTensor):
        return False
    if tensor._root is not None and not isinstance(tensor._root, CacheTensor):
        del tensor._root
        tensor.__class__ = Tensor  # type: ignore[assignment]
        return False
    return True


def _reset(root: CacheTensor) -> None:
    """A cleared cache is dense again, so that the next compiled call takes it over afresh."""
    _give_memory(root, _storage.zeros(root.nbytes, root.device))


class Transients:
    """Dense stand-ins for the handles of one call: lower the arguments, run the call, commit, lift the results.

    Handles over one cache share one transient, so that aliases stay aliases during the call.
    """

    def __init__(self) -> None:
        self._roots: dict[int, tuple[CacheTensor, Tensor, int]] = {}  # with the transient's version, by its storage
        self._dense: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}  # stand-in and its facts, by the handle's id
        self._handles: dict[int, CacheTensor] = {}  # by the stand-in's id

    def lower(self, value: Any) -> Any:
        """A dense tensor for a handle; any other value as it is."""
        if not settle(value):
            return value
        if (mode := _compat.fake_mode()) is not None:
            with _compat.no_subclass_dispatch():
                return mode.from_tensor(value)
        if id(value) not in self._dense:
            dense = self._read(value) if value._root is None else _alias(self.lower(value._root), value)
            self._dense[id(value)] = dense, _facts(dense)
            self._handles[id(dense)] = value
        return self._dense[id(value)][0]

    def _read(self, root: CacheTensor) -> Tensor:
        with internal():  # a transient of inference mode would not count its versions
            if root._parts is not None:
                dense = root._parts.dense().contiguous()
            else:
                dense = laid_out(_content(root), root._dims).contiguous()
            shared = any(_compat.storage_id(dense) == _compat.storage_id(state.buffer) for state in root.states())
            if shared or dense.is_inference() or dense.untyped_storage().nbytes() != dense.nbytes:
                dense = dense.clone()
        self._roots[_compat.storage_id(dense)] = (root, dense, _compat.version(dense))
        return dense

    @property
    def roots(self) -> list[CacheTensor]:
        """The caches that were read."""
        return [root for root, *_ in self._roots.values()]

    def commit(self, *, counted: bool = True) -> None:
        """Store what the call changed.

        Args:
            counted: every write raised the version of its tensor. It does not in a compiled graph that writes to a
                tensor's `data`.

        Raises:
            RuntimeError: the call changed more of a tensor than its content: shape, memory or gradients. Nothing is
                stored.
        """
        if any(_facts(dense) != facts for dense, facts in self._dense.values()):
            raise RuntimeError(
                "a packed cache cannot change its shape or memory or record gradients (is torch.no_grad() missing?); "
                f"{_RESTORE}"
            )
        for root, dense, version in self._roots.values():
            if _compat.version(dense) != version:
                _store(root, dense)
            elif not counted:
                root.store_changes(root.dense(), dense)

    def lift(self, value: Any) -> Any:
        """The handle for its stand-in, a view of the handle for what aliases the stand-in, any other value as it is."""
        if not isinstance(value, Tensor):
            return value
        if (handle := self._handles.get(id(value))) is not None:
            return handle
        root, dense, *_ = self._roots.get(_compat.storage_id(value), (None, None))
        if root is None:
            return value
        if _compat.is_wrapped(value) or value.is_conj() or value.is_neg():
            raise RuntimeError(f"a packed cache has no views of this kind ({type(value).__name__}); {_RESTORE}")
        assert dense is not None
        return _as_view(_alias(root, value), root)


def _store(root: CacheTensor, dense: Tensor) -> None:
    """Make `dense` the content of a whole handle."""
    with internal():
        if bool(dense.any()):
            root.store_changes(root.dense(), dense)
        else:
            _reset(root)


def _alias(base: Tensor, like: Tensor) -> Tensor:
    """The view of contiguous `base` that lies in its memory as `like` lies in that of its own base."""
    with _compat.no_subclass_dispatch(), internal():
        flat = base.view(-1)
        if like.dtype != base.dtype:
            flat = flat.view(like.dtype)
        return flat.as_strided(like.size(), like.stride(), like.storage_offset())


def _as_view(tensor: Tensor, root: Tensor) -> Tensor:
    """Make a tensor over the storage of `root` a handle, if `root` is one."""
    if isinstance(root, CacheTensor):
        tensor.__class__ = CacheTensor
        assert isinstance(tensor, CacheTensor)
        tensor._root = root
    return tensor


def dense_shape(state: CacheState, dims: Dims, length: int | None = None) -> torch.Size:
    """Shape of the tensor that a state, or `length` slots of a growing one, stands for."""
    sizes = (state.batch, state.heads, state.slots if length is None else length, state.format.head_dim)
    return torch.Size(shape_of(sizes, dims))


def handle_of(state: CacheState, dims: Dims, first: int = 0, length: int | None = None) -> Tensor:
    """A new handle, a contiguous tensor by its metadata; no dense memory is allocated.

    Args:
        state: its content.
        dims: which of its dimensions is to be batch, head, slot, channel.
        first: with a growing state, the slot of its first token.
        length: with a growing state, the number of its slots.
    """
    shape = dense_shape(state, dims, length)
    dtype, device = state.format.dtype, state.buffer.device
    handle = _blank(shape, dtype, device, _reserved(state, device, 1))
    handle._state, handle._dims, handle._first = state, dims, first
    return handle


def stack_of(parts: Parts) -> Tensor:
    """A new handle of many caches."""
    first, number = parts.handles[0], len(parts.handles)
    with _compat.no_subclass_dispatch():
        like = [torch.empty(part.shape, device="meta") for part in parts.handles]
        dtype, device = first.dtype, first.device
    shape = parts.stacking.together(like).shape
    handle = _blank(shape, dtype, device, _reserved(first.states()[0], device, number))
    handle._parts = parts
    return handle


def _blank(shape: torch.Size, dtype: torch.dtype, device: torch.device, reserved: _storage.Reserved) -> CacheTensor:
    """A handle by its metadata alone."""
    with internal():
        storage = reserved.storage(shape.numel() * dtype.itemsize)
        tensor = torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape)  # type: ignore[call-overload]
    tensor.__class__ = CacheTensor
    handle: CacheTensor = tensor
    return handle


_RESERVED: WeakKeyDictionary[CacheState, _storage.Reserved] = WeakKeyDictionary()


def _reserved(state: CacheState, device: torch.device, number: int) -> _storage.Reserved:
    """Addresses for the handles of a state, or of so many like it: to map them anew for each handle would take long."""
    nbytes = dense_shape(state, BHSD).numel() * state.format.dtype.itemsize * number
    reserved = _RESERVED.get(state)
    if reserved is None or reserved.nbytes < nbytes:
        reserved = _RESERVED[state] = _storage.Reserved(nbytes, device)
    return reserved


@contextlib.contextmanager
def internal() -> Iterator[None]:
    """Run our own tensor work as plain eager code, whatever modes and transforms the caller is in."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),  # nothing of ours requires grad; views made without it would restrict the caller
        _compat.no_torch_function(),
        _compat.no_transforms(),
        _compat.no_modes(),
    ):
        yield


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITWISE.get(tensor.element_size(), torch.uint8))


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.requires_grad,
        _compat.storage_id(tensor),
    )


# Compiling


def _bound(func: Any) -> Callable[..., Any] | None:
    """The function to bind where Dynamo asks a handle for a method that is written in Python, which it cannot bind."""
    if getattr(func, "__name__", None) != "__get__" or type(getattr(func, "__self__", None)) is not FunctionType:
        return None
    function = getattr(torch, func.__self__.__name__, None)
    return function if callable(function) else None


def _plainly(x: Any) -> Any:
    """What a graph gets of a handle for a function that is written in Python.

    Such a function asks again whether there is a subclass, and Dynamo says yes, even within `no_subclass_dispatch`.
    """
    return torch.ops.aten.alias.default(x) if isinstance(x, CacheTensor) else x


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _require_own_backend() -> bool:
    """Refuse, at trace time, a compiler that does not know handles: its graph would read freed memory."""
    if any(getattr(compiler, "_decoquant_backend", False) for compiler in _compat.compilers_in_use()):
        return True
    raise _compat.tracing_error(
        f"a cache tensor in this graph is packed by decoquant_compile, but the backend is another one; {_RESTORE}"
    )


# Eager calls


def applied(func: Callable[..., Any], tensor: Tensor, *args: Any) -> Any:
    """What eager code gets of `func` on a tensor, which may be a handle, also within a compiled call.

    There, Dynamo has switched `__torch_function__` off, and a handle has no memory to read.
    """
    return _call(__name__, func, (tensor, *args), {}) if isinstance(tensor, CacheTensor) else func(tensor, *args)


# In a frame that Dynamo has left to Python it would take this for one to compile, and `is_compiling` for true.
_compat.never_a_frame(CacheTensor.__torch_function__)
_compat.keep_class(CacheTensor)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _call(caller: object, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `func`, called by the module `caller`.

    Dynamo would compile this too, piece by piece, where it gave up the code that called it.
    """
    first = args[0] if args else None
    handle = first if settle(first) else None
    if func in (Tensor.size, Tensor.dim) and caller == _compat.VMAP_MODULE:  # its next step is C++
        raise RuntimeError(f"vmap reads the memory of its arguments, and this cache is packed; {_RESTORE}")
    if func in _METADATA or (func is Tensor.untyped_storage and caller == _compat.FAKE_MODULE):
        with _compat.no_subclass_dispatch():
            return func(*args, **kwargs)
    if isinstance(handle, CacheTensor):
        if func in _REFUSED:
            owner = getattr(func, "__self__", None)  # of the accessors of properties
            raise _refusal(getattr(owner, "__name__", func.__name__))
        if _compat.fake_mode() is not None:
            if func is Tensor.__deepcopy__:  # of the fake tensor would look at its memory
                return Transients().lower(handle)
        elif not _compat.in_transform():  # a transform must see the operation
            if func in _VIEWS or (func is Tensor.__getitem__ and _is_basic(args[1])):
                return _view(func, handle, args, kwargs)
            if (special := _SPECIAL.get(func)) is not None:
                result = _try(special, args, kwargs)
                if result is not NotImplemented:
                    return result
    elif func in JOINS and _compat.fake_mode() is None and not _compat.in_transform():
        result = _try(JOINS[func], args, kwargs)
        if result is not NotImplemented:
            return result
    transients = Transients()
    args, kwargs = _compat.tree_map(transients.lower, (args, kwargs))
    result = func(*args, **kwargs)
    transients.commit()
    return _compat.tree_map(transients.lift, result)


def _refusal(name: str) -> RuntimeError:
    return RuntimeError(f"{name} needs the memory of this cache tensor, which is packed; {_RESTORE}")


def _view(func: Callable[..., Any], handle: CacheTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A view needs no content: it is taken of the released storage, which the root and its views share."""
    root = handle if handle._root is None else handle._root
    with _compat.no_subclass_dispatch():
        result = func(*args, **kwargs)
    return _compat.tree_map(lambda tensor: _as_view(tensor, root), result)


def _try(special: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        bound = inspect.signature(special).bind(*args, **kwargs)
    except TypeError:  # the dense tensor will say what is wrong
        return NotImplemented
    return special(*bound.args, **bound.kwargs)


def _whole(handle: CacheTensor, dim: object) -> int | None:
    """The role of dimension `dim` of a whole handle (0 batch, 1 head, 2 slot, 3 channel), else None."""
    rank = handle.dim()
    if handle._state is None or type(dim) is not int or not -rank <= dim < rank or dim % rank not in handle._dims:
        return None
    return handle._dims.index(dim % rank)


def _is_batch(handle: CacheTensor, dim: object) -> bool:
    """Whether `dim` is that of the sequences, of a whole handle or of a stretch of a growing one."""
    root = handle if handle._root is None else handle._root
    if not isinstance(root, CacheTensor) or _whole(root, dim) != 0:
        return False
    return handle._root is None or stretch_of(handle, root._dims) is not None


def _selection(handle: CacheTensor, index: object) -> Any:
    """A new handle with the sequences `index`, for an index that the state understands."""
    root = handle if handle._root is None else handle._root
    assert isinstance(root, CacheTensor)
    state, dims = root._state, root._dims
    assert state is not None
    if not isinstance(index, Tensor) or isinstance(index, CacheTensor) or index.dim() != 1 or index.numel() == 0:
        return NotImplemented
    if index.dtype not in (torch.int64, torch.int32) or index.device != handle.device:
        return NotImplemented
    with internal():
        if int(index.min()) < 0 or int(index.max()) >= state.batch:
            return NotImplemented
        if (stretch := stretch_of(handle, dims)) is None:
            return handle_of(state.select(index.long()), dims)
        if stretch.state.end != stretch.last:  # what others have appended since is not part of it
            stretch = stretch.copied()
        return handle_of(stretch.state.select(index.long()), dims, stretch.first, stretch.length)


def _zero_(handle: CacheTensor) -> Any:
    if handle._root is not None:
        return NotImplemented
    _reset(handle)
    return handle


def _copy_(handle: CacheTensor, source: object, non_blocking: bool = False) -> Any:
    if handle._root is not None or not isinstance(source, Tensor) or source.requires_grad:
        return NotImplemented
    dense: Tensor = Transients().lower(source)
    trailing = zip(reversed(dense.shape), reversed(handle.shape), strict=False)
    if dense.dim() > handle.dim() or any(n not in (1, m) for n, m in trailing):
        return NotImplemented
    with internal():
        _store(handle, dense.to(handle.device, handle.dtype, non_blocking=non_blocking).expand(handle.shape))
    return handle


def _index_copy_(handle: CacheTensor, dim: int, index: object, source: object) -> Any:
    if _whole(handle, dim) != 2 or not isinstance(source, Tensor) or not isinstance(index, Tensor):
        return NotImplemented
    shape = list(handle.shape)
    shape[dim] = index.numel()
    if index.dim() != 1 or index.numel() == 0 or index.dtype != torch.int64 or source.requires_grad:
        return NotImplemented
    if (
        list(source.shape) != shape
        or source.dtype != handle.dtype
        or not index.device == source.device == handle.device
    ):
        return NotImplemented
    new: Tensor = Transients().lower(source)
    positions: Tensor = Transients().lower(index)
    with internal():
        if int(positions.min()) < 0 or int(positions.max()) >= handle.shape[dim]:
            return NotImplemented
        state = _own(handle)
        state.write(arranged(new, handle._dims), positions + handle._first)
    return handle


def _index_select(handle: CacheTensor, dim: int, index: object) -> Any:
    if handle._parts is not None and type(dim) is int and -handle.dim() <= dim < handle.dim():
        inner = handle._parts.stacking.dim_of(dim % handle.dim())
        chosen = [NotImplemented if inner is None else _index_select(x, inner, index) for x in handle._parts.handles]
        if any(x is NotImplemented for x in chosen):
            return NotImplemented
        return stack_of(Parts(handle._parts.stacking, tuple(chosen)))
    return _selection(handle, index) if _is_batch(handle, dim) else NotImplemented


def _getitem(handle: CacheTensor, index: object) -> Any:
    """``handle[sequences]`` and ``handle[sequences, ...]`` select over the batch."""
    first, *rest = index if isinstance(index, tuple) and index else (index,)
    if (
        not _is_batch(handle, 0)
        or any(item is not ... and item != slice(None) for item in rest)
        or len(rest) >= handle.dim()
    ):
        return NotImplemented
    return _selection(handle, first)


def _repeat_interleave(
    handle: CacheTensor, repeats: object, dim: int | None = None, *, output_size: int | None = None
) -> Any:
    if not _is_batch(handle, dim) or not isinstance(repeats, int | Tensor) or isinstance(repeats, CacheTensor):
        return NotImplemented
    batch = torch.arange(handle.shape[dim or 0], device=handle.device)
    return _selection(handle, batch.repeat_interleave(repeats, output_size=output_size))


def _clone(handle: CacheTensor, *, memory_format: torch.memory_format = torch.preserve_format) -> Any:
    if not is_whole(handle) or memory_format not in (torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    with internal():
        if handle._parts is not None:
            return stack_of(handle._parts.clone())
        if (stretch := stretch_of(handle, handle._dims)) is not None:  # whoever writes to it copies it first
            return handle_of(stretch.state, handle._dims, stretch.first, stretch.length)
        return handle_of(handle.states()[0].clone(), handle._dims)


def _deepcopy(handle: CacheTensor, memo: dict[int, Any]) -> Any:
    if id(handle) in memo:
        return memo[id(handle)]
    if handle._root is not None:
        root = copy.deepcopy(handle._root, memo)
        result = _as_view(_alias(root, handle), root)
    else:
        result = _clone(handle)
    memo[id(handle)] = result
    own = {k: copy.deepcopy(v, memo) for k, v in handle.__dict__.items() if k not in (*_HELD, "_root")}
    result.__dict__.update(own)
    return result


def _requires_grad(handle: CacheTensor, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise RuntimeError(f"a packed cache cannot record gradients (is torch.no_grad() missing?); {_RESTORE}")
    return handle


def _base(handle: CacheTensor) -> Any:
    """None for a whole handle, even if it was a view of a tensor that nobody else knows of."""
    with _compat.no_subclass_dispatch():
        return None if handle._root is None else _compat.base_of(handle)


def _is_view(handle: CacheTensor) -> bool:
    with _compat.no_subclass_dispatch():
        return handle._root is not None and _compat.is_view(handle)


def _format(handle: CacheTensor, spec: str) -> Any:
    return NotImplemented if handle.dim() == 0 else object.__format__(handle, spec)


def _is_basic(index: object) -> bool:
    """Whether indexing gives a view."""
    return all(
        item is None
        or item is ...
        or type(item) is int
        or (
            isinstance(item, slice)
            and all(bound is None or type(bound) is int for bound in (item.start, item.stop, item.step))
        )
        for item in (index if isinstance(index, tuple) else (index,))
    )


def _functions(names: str) -> set[Callable[..., Any]]:
    """The methods of `Tensor` and the functions of `torch` with these names."""
    return {getattr(owner, name) for name in names.split() for owner in (Tensor, torch) if hasattr(owner, name)}


_TENSOR_PROPERTIES = {"_base", "data", "real", "imag", "T", "H", "mT", "mH"}

JOINS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Functions of a sequence of tensors that do better than to read all of them; `NotImplemented` if they cannot."""

# Need no content.
_METADATA = (
    _compat.PRIVATE_METADATA
    | _functions(
        "size stride dim ndimension numel nelement element_size storage_offset is_contiguous dim_order get_device "
        "is_floating_point is_complex is_signed is_inference is_conj is_neg is_same_size is_coalesced "
        "__len__ __hash__ __dlpack_device__ "
        "empty_like zeros_like ones_like rand_like randn_like new_empty new_zeros new_ones"
    )
    | {
        descriptor.__get__
        for name, descriptor in vars(Tensor.__base__).items()
        if isinstance(descriptor, GetSetDescriptorType) and name not in _TENSOR_PROPERTIES
    }
)

# Need the memory, or change more than the content.
_REFUSED = (
    _functions(
        "data_ptr untyped_storage storage numpy __dlpack__ share_memory_ apply_ map_ map2_ "
        "resize_ resize_as_ t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ as_strided_"
    )
    | _compat.PRIVATE_MEMORY
    | {Tensor.data.__set__, Tensor.__cuda_array_interface__.__get__}  # type: ignore[attr-defined]
)

# Always give views.
_VIEWS = _functions(
    "view view_as transpose swapaxes swapdims permute movedim moveaxis unsqueeze squeeze narrow select expand "
    "expand_as unbind split chunk unflatten detach diagonal unfold"
) | {Tensor.data.__get__}  # type: ignore[attr-defined]

_SPECIAL: dict[Callable[..., Any], Callable[..., Any]] = {
    function: special
    for names, special in {
        "zero_": _zero_,
        "copy_": _copy_,
        "index_copy_": _index_copy_,
        "index_select": _index_select,
        "__getitem__": _getitem,
        "repeat_interleave": _repeat_interleave,
        "clone": _clone,
        "__deepcopy__": _deepcopy,
        "requires_grad_": _requires_grad,
        "__format__": _format,
    }.items()
    for function in _functions(names)
} | {
    Tensor.requires_grad.__set__: _requires_grad,  # type: ignore[attr-defined]
    _compat.BASE_GETTER: _base,
    _compat.IS_VIEW: _is_view,
}
