"""Cache tensors change hands: taken over into packed states, and given back."""

import types
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from decoquant_compile import _compat, _storage
from decoquant_compile.dims import Dims, Stacking, arranged, order
from decoquant_compile.handle import CacheTensor, Parts, adopt, handle_of, settle, stack_of, unpack
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState
from decoquant_compile.members import members

T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """One cache to take over.

    Attributes:
        tensor: the dense tensor; becomes a handle.
        dims: which dimension of the cache is batch, head, slot, channel.
        format: how its tokens are to be stored.
        stacking: how the tensor holds many caches; all of them are claimed, in order. None: it is the cache.
        part: which of them it is.
    """

    tensor: Tensor
    dims: Dims
    format: Format
    stacking: Stacking | None = None
    part: int = 0

    @property
    def whole_dims(self) -> Dims | None:
        """The dimensions of the tensor, as `obstacle` takes them."""
        return self.dims if self.stacking is None else None

    @property
    def cache(self) -> Tensor:
        """The cache: the tensor, or a view of it."""
        return self.tensor if self.stacking is None else self.stacking.apart(self.tensor)[self.part]


class Obstructed(RuntimeError):  # noqa: N818 - a condition, not a fault
    """Some cache tensors cannot be taken over; none was changed.

    Attributes:
        reasons: for each claim, why it cannot be taken over, or None if it could.
    """

    def __init__(self, reasons: Sequence[str | None]) -> None:
        self.reasons = tuple(reasons)
        found = [f"cache tensor {i}: {reason}" for i, reason in enumerate(reasons) if reason is not None]
        super().__init__("; ".join(found))


def obstacle(tensor: Tensor, dims: Dims | None) -> str | None:
    """Why a tensor cannot be taken over now: its memory could not be released, or somebody else would miss it.

    Args:
        tensor: a cache tensor.
        dims: which of its dimensions is batch, head, slot, channel; None for one that holds many caches.
    """
    if settle(tensor):
        return "is a view of a packed cache" if tensor._root is not None else "is packed already"
    if type(tensor) is not Tensor:
        return f"is a {type(tensor).__name__}, not a plain tensor"
    if _storage.is_wrapped(tensor):
        return "is a tensor of a functorch transform"
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return f"has layout {tensor.layout} on {tensor.device}, not strided memory"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has dtype {tensor.dtype}, not float32, bfloat16 or float16"
    if tensor.requires_grad:
        return "requires grad"
    if dims is not None and sorted(order(dims)) != list(range(tensor.dim())):
        return f"has shape {tuple(tensor.shape)}, whose batch, head, slot and channel are not dimensions {dims}"
    if tensor.numel() == 0:
        return f"is empty: shape {tuple(tensor.shape)}"
    if tensor.is_neg() or _compat.is_zero_tensor(tensor):
        return "is a lazy tensor"
    storage = tensor.untyped_storage()
    if not tensor.is_contiguous() or tensor.storage_offset() != 0 or storage.nbytes() != tensor.nbytes:
        return "is not contiguous or does not cover its storage exactly"
    if not storage.resizable() or storage.is_shared():
        return "has memory that belongs to somebody else (a NumPy array, a loaded file, a process); its clone() has not"
    if not _storage.is_sole_owner(tensor):
        return "shares its memory with another tensor (a view, a stacked buffer, an export, an autograd graph)"
    return None


def take_over(
    claims: Sequence[Claim],
    *,
    lengths: Sequence[int | None],
    masks: Sequence[tuple[Tensor, int] | None],
    unread: Collection[int] = (),
) -> list[CacheState]:
    """Move cache tensors into packed states, release their memory and make them handles; all of them or none.

    Slots that are all zero count as never written. At most one tensor's tokens are copied at a time, beside the packed
    states.

    Args:
        claims: the cache tensors.
        lengths: for each, the slot of the first token that is not in the cache yet; what stands from there on is left
            over from an earlier sequence. None means that every token belongs to the present one.
        masks: for each, the attention mask of the first compiled call, bool (True admits) or additive
            ``[batch | 1, heads | 1, queries | 1, length]``, with the slot of its column 0. Tells where left-padded
            sequences start. None means that there is no padding.
        unread: those, by number, of which the call reads nothing that is left over: it may be what the memory held
            before the tensor was allocated.

    Returns:
        The packed state of each.

    Raises:
        Obstructed: a tensor cannot be taken over; nothing was changed.
    """
    times = Counter((id(claim.tensor), claim.part) for claim in claims)
    reasons = [
        obstacle(claim.tensor, claim.whole_dims)
        or _misfit(claim)
        or ("is claimed twice" if times[id(claim.tensor), claim.part] > 1 else None)
        for claim in claims
    ]
    if any(reasons):
        raise Obstructed(reasons)
    states = [
        _ingest(claim, length, mask, unread=number in unread)
        for number, (claim, length, mask) in enumerate(zip(claims, lengths, masks, strict=True))
    ]
    handles: dict[int, tuple[Tensor, Tensor]] = {}  # by the tensor that is to become one
    stacks: dict[int, list[Tensor]] = {}
    for claim, state in sorted(zip(claims, states, strict=True), key=lambda pair: pair[0].part):
        handle = handle_of(state, claim.dims)
        if claim.stacking is not None:
            stacks.setdefault(id(claim.tensor), []).append(handle)
            if claim.part < claim.stacking.number - 1:
                continue
            handle = stack_of(Parts(claim.stacking, tuple(stacks[id(claim.tensor)])))
        handles[id(claim.tensor)] = (claim.tensor, handle)
    for tensor, handle in handles.values():
        adopt(tensor, handle)
    return states


def _misfit(claim: Claim) -> str | None:
    cache = claim.cache
    held = (cache.shape[claim.dims[3]], cache.dtype)
    wanted = (claim.format.head_dim, claim.format.dtype)
    return None if held == wanted else f"has channels and dtype {held}, but its format says {wanted}"


def _ingest(claim: Claim, length: int | None, mask: tuple[Tensor, int] | None, *, unread: bool) -> CacheState:
    """A packed state with the content of a dense tensor."""
    with torch.inference_mode(mode=False), torch.no_grad():
        dense = arranged(claim.cache, claim.dims)
        batch, heads, slots, _ = dense.shape
        state = CacheState.empty(claim.format, batch, heads, slots, dense.device)
        ingest(dense, state, length, mask, unread=unread)
    return state


def ingest(
    dense: Tensor, state: CacheState, length: int | None, mask: tuple[Tensor, int] | None, *, unread: bool = False
) -> None:
    """Write the tokens of a dense cache to an empty state; all-zero ones count as never written.

    Args:
        dense: ``[batch, heads, slots, channels]``.
        state: of at least so many slots.
        length: see `take_over`.
        mask: see `take_over`.
        unread: what is left over is not read, and has no part in what is fitted for the others.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        if _is_blank(dense):  # as a prefill finds it
            return
        written = (dense.amax((1, 3)) != 0) | (dense.amin((1, 3)) != 0)  # [B, S], without a mask of the tensor's size
        positions = written.any(0).nonzero()[:, 0]
        parts = [positions]
        if length is not None:  # left-overs first: the window keeps what was written last
            parts = [positions[positions >= length], positions[positions < length]]
        for part in parts if unread else [torch.cat(parts)]:
            if len(part):
                admitted, first = (None, 0) if mask is None else mask
                state.begin()
                state.write(dense.index_select(2, part), part, mask=admitted, first=first, rows=written[:, part])


def _is_blank(tensor: Tensor) -> bool:
    """Whether a tensor is quickly seen to be all zeros; another one may be, too."""
    if (
        not tensor.numel()
        or not tensor.is_contiguous()
        or tensor.nbytes % torch.int64.itemsize
        or tensor.storage_offset()
    ):
        return False
    words = tensor.view(-1).view(torch.int64)
    return not bool(words.amax()) and not bool(words.amin())


def restore(cache: T) -> T:
    """Give a cache its dense tensors back, with the content that attention sees.

    Args:
        cache: a tensor, a module, a Hugging Face `Cache`, or any object that holds tensors in containers and
            attributes.

    Returns:
        The same object; each packed tensor in it is a plain tensor again, under the same identity.

    Raises:
        TypeError: the object holds no tensor.
    """
    for tensor in _tensors(cache):
        if isinstance(tensor, CacheTensor):
            unpack(tensor)
    return cache


@dataclass(frozen=True)
class Bytes:
    """Memory held by tensors.

    Attributes:
        packed: bytes of the states of packed cache tensors.
        dense: bytes of the storages of all other tensors.
    """

    packed: int
    dense: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.packed + self.dense


def nbytes(cache: object) -> Bytes:
    """Bytes that a cache really holds, counted from its live tensors, each storage once.

    Args:
        cache: as for `restore`.

    Raises:
        TypeError: the object holds no tensor.
    """
    packed: dict[int, int] = {}
    dense: dict[int, int] = {}
    for tensor in _tensors(cache):
        root = tensor if not isinstance(tensor, CacheTensor) or tensor._root is None else tensor._root
        if isinstance(root, CacheTensor):
            packed.update({id(state): state.nbytes for state in root.states()})
        elif root.layout == torch.strided and root.device.type != "meta":
            dense[_compat.storage_id(root)] = root.untyped_storage().nbytes()
    return Bytes(sum(packed.values()), sum(dense.values()))


def holds_tensors(value: object) -> bool:
    """Whether any tensor is reachable from an object."""
    try:
        next(_tensors(value))
    except TypeError:
        return False
    return True


_OPAQUE = (str, bytes, int, float, complex, type, types.ModuleType, types.FunctionType, torch.dtype, torch.device)


def _tensors(root: object) -> Iterator[Tensor]:
    """Every tensor reachable from an object through built-in containers and attributes, once each.

    Raises:
        TypeError: there is none.
    """
    seen: dict[int, object] = {}  # keeps what a property made alive, so that an id stays its own
    stack = [root]
    found = False
    while stack:
        item = stack.pop()
        if item is None or isinstance(item, _OPAQUE) or id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            found = True
            yield item
        else:
            stack.extend(member.value for member in members(item))
    if not found:
        raise TypeError(f"expected a tensor, or an object that holds tensors, got a {type(root).__name__} without any")
