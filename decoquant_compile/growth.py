"""Growing caches at run time: a call appends to what its handles show, and returns new ones."""

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from decoquant_compile.dims import BHSD, Dims, arranged
from decoquant_compile.handle import (
    JOINS,
    CacheTensor,
    Stretch,
    format_of,
    handle_of,
    internal,
    settle,
    state_of,
    stretch_of,
)
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState, GrowingState
from decoquant_compile.kernels.tiles import TILE
from decoquant_compile.takeover import ingest


@dataclass(frozen=True)
class Opened:
    """A state that a call is about to write to, for a cache that it returns.

    Attributes:
        state: a growing one, or one of the size of the cache.
        first: slot of the first token that the cache of before the call shows.
        shown: tokens that it shows.
        tokens: number of tokens to come; in a growing state they go behind those.
        length: slots of the cache after the call, the last ones.
    """

    state: CacheState
    first: int
    shown: int
    tokens: int
    length: int

    def handle(self, dims: Dims) -> Tensor:
        """The cache after the call, once the tokens are written."""
        if not isinstance(self.state, GrowingState):
            return handle_of(self.state, dims)
        self.state.end = self.first + self.shown + self.tokens
        return handle_of(self.state, dims, self.state.end - self.length, self.length)


def opened(
    tensor: Tensor | None,
    dims: Dims,
    form: Format,
    tokens: int,
    length: int,
    mask: tuple[Tensor, int] | None,
    taken: Container[int],
    empty: tuple[int, int, torch.device],
) -> Opened:
    """The content of a cache in a growing state with room for more.

    A handle that shows the newest tokens of its state is appended to in place. A copy is made of what an earlier one
    shows, and of what is dense. No tensor that the caller holds changes what it shows.

    Args:
        tensor: a handle, a view of one, a dense tensor; None or one without elements: there is no cache yet.
        dims: which of its dimensions is batch, head, slot, channel.
        form: how the tokens are to be stored.
        tokens: number of tokens to come.
        length: see `Opened`.
        mask: the attention mask of the call and the slot of its first column, see `take_over`; for a dense tensor.
        taken: ids of the states that may not be appended to in place.
        empty: batch, heads and device of a cache that is not there yet.
    """
    if tensor is None or tensor.numel() == 0:
        batch, heads, device = empty
        return Opened(GrowingState.with_room(form, batch, heads, tokens, device), 0, 0, tokens, length)
    stretch = stretch_of(tensor, dims)
    if stretch is None or stretch.state.format != form:
        dense = arranged(tensor.dense() if isinstance(tensor, CacheTensor) else tensor, dims)
        return _ingested(dense, form, tokens, length, mask)
    state = stretch.state
    is_full = state.end + tokens > state.slots
    if state.end != stretch.last or id(state) in taken or (is_full and stretch.first >= TILE):
        # What stands before the stretch is left behind: a sliding window moves to a new buffer once in a while.
        stretch = stretch.copied(tokens)
    else:
        state.reserve(tokens)
    return Opened(stretch.state, stretch.first, stretch.length, tokens, length)


def copied(
    tensor: Tensor,
    dims: Dims,
    form: Format,
    tokens: int,
    mask: tuple[Tensor, int] | None = None,
    length: int | None = None,
    *,
    unread: bool = False,
) -> Opened:
    """The content of a cache in a state of its own and of its size, for a call that returns it changed.

    Args:
        tensor: a handle, or a dense tensor; it stays what it is.
        dims: which of its dimensions is batch, head, slot, channel.
        form: how its tokens are to be stored.
        tokens: number of tokens to come.
        mask: see `opened`.
        length: see `take_over`.
        unread: whether the call reads nothing that is left over.
    """
    held = state_of(tensor, dims)
    if held is not None and held.format == form:
        return Opened(held.clone(), 0, 0, tokens, held.slots)
    dense = arranged(tensor.dense() if isinstance(tensor, CacheTensor) else tensor, dims)
    batch, heads, slots, _ = dense.shape
    state = CacheState.empty(form, batch, heads, slots, dense.device)
    ingest(dense, state, length, mask, unread=unread)
    return Opened(state, 0, slots, tokens, slots)


def shown(tensor: object, dims: Dims, form: Format, *, grows: bool) -> Opened:
    """What a handle shows, to be read alone.

    Args:
        tensor: the handle.
        dims: which of its dimensions is batch, head, slot, channel.
        form: how its tokens are stored.
        grows: whether its state is a growing one.

    Raises:
        ValueError: the graph was compiled for a handle of another kind.
    """
    if format_of(tensor, dims) == form:
        if grows and (stretch := stretch_of(tensor, dims)) is not None:
            return Opened(stretch.state, stretch.first, stretch.length, 0, stretch.length)
        if not grows and (state := state_of(tensor, dims)) is not None:
            return Opened(state, 0, state.slots, 0, state.slots)
    raise ValueError("a cache that is only read is packed in another way than when the graph was compiled")


def _ingested(dense: Tensor, form: Format, tokens: int, length: int, mask: tuple[Tensor, int] | None) -> Opened:
    batch, heads, shown, _ = dense.shape
    state = GrowingState.with_room(form, batch, heads, shown + tokens, dense.device)
    ingest(dense, state, None, mask)
    state.end = shown
    return Opened(state, 0, shown, tokens, length)


def levelled(key: Opened, value: Opened) -> tuple[Opened, Opened]:
    """The same with keys and values in the same slots of states of one size, as attention wants them.

    They are from the start, unless a caller puts together what does not come from the same calls.
    """
    for moved in (_moved, _rebuilt):
        if _place(key) == _place(value):
            break
        room = max(key.state.slots, value.state.slots)
        key, value = moved(key, room), moved(value, room)
    return key, value


def _place(opened: Opened) -> tuple[int, int]:
    return opened.state.slots, opened.first


def _moved(opened: Opened, room: int) -> Opened:
    assert isinstance(opened.state, GrowingState)
    moved = Stretch(opened.state, opened.first, opened.shown).copied(opened.tokens, room)
    return replace(opened, state=moved.state, first=moved.first)


def _rebuilt(opened: Opened, _: int) -> Opened:
    dense = opened.state.read()[:, :, opened.first : opened.first + opened.shown]
    return _ingested(dense, opened.state.format, opened.tokens, opened.length, None)


def _cat(tensors: object, dim: int = 0, *, out: object = None) -> Any:
    """``torch.cat`` of a growing cache and dense tokens along the slots, which eager code may append too."""
    if out is not None or not isinstance(tensors, list | tuple) or not tensors or not settle(tensors[0]):
        return NotImplemented
    handle, new = tensors[0], tensors[1:]
    dims = getattr(handle if handle._root is None else handle._root, "_dims", BHSD)
    stretch = stretch_of(handle, dims)
    if stretch is None or dim not in (dims[2], dims[2] - handle.dim()) or not new:
        return NotImplemented
    for x in new:
        if not isinstance(x, Tensor) or x.dim() != handle.dim() or x.requires_grad:
            return NotImplemented
        same = all(x.shape[d] == handle.shape[d] for d in range(x.dim()) if d != dims[2])
        if x.dtype != handle.dtype or x.device != handle.device or not same:
            return NotImplemented
    with internal():
        dense = arranged(torch.cat([x.dense() if isinstance(x, CacheTensor) else x for x in new], dim), dims)
        batch, heads, tokens, _ = dense.shape
        length = stretch.length + tokens
        held = opened(handle, dims, stretch.state.format, tokens, length, None, (), (batch, heads, dense.device))
        last = held.first + held.shown
        held.state.write(dense, torch.arange(last, last + tokens, device=dense.device))
        return held.handle(dims)


JOINS.update(dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat))
