"""The packed replacement of one cache tensor, and of one that grows."""

import copy
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor

from decoquant_compile.kernels import ops
from decoquant_compile.kernels.cpu import memory
from decoquant_compile.kernels.format import NO_EPOCH, SET, START, UNSET, Format, Sections
from decoquant_compile.kernels.tiles import TILE

_GROWTH: Final = 1.5
"""A full cache that grows gets room for so many times its tokens: each token is copied twice on average."""

_LEAST_ROOM: Final = 128


def _zeros(nbytes: int, device: torch.device | str) -> Tensor:
    if torch.device(device).type == "cpu":
        return memory.zeros(nbytes)
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


@dataclass(eq=False)
class CacheState:
    """A packed cache ``[batch, heads, slots, head_dim]``: one buffer and what is needed to read it.

    Attributes:
        format: how tokens are stored.
        batch: rows.
        heads: KV heads.
        slots: size along the sequence.
        buffer: uint8 ``[nbytes]``, contiguous; the operators take it as ``state``.
    """

    format: Format
    batch: int
    heads: int
    slots: int
    buffer: Tensor

    @classmethod
    def empty(cls, format: Format, batch: int, heads: int, slots: int, device: torch.device | str) -> Self:  # noqa: A002
        """A fresh cache: every slot never written, reads as zeros."""
        layout = format.layout(batch, heads, slots)
        with torch.inference_mode(mode=False):  # later writes may come from within or without inference mode
            buffer = _zeros(layout.nbytes, device)
            layout.mark_empty(buffer)
        return cls(format, batch, heads, slots, buffer)

    def write(
        self,
        new: Tensor,
        positions: Tensor,
        *,
        shift: int = 0,
        query: Tensor | None = None,
        mask: Tensor | None = None,
        first: int = 0,
        rows: Tensor | None = None,
    ) -> None:
        """Writes tokens; see `reference.store` for the arguments.

        Raises:
            IndexError: a position of at least `slots`.
            ValueError: a tensor of the wrong shape or dtype.
        """
        if new.shape[:2] != (self.batch, self.heads):
            raise ValueError(
                f"new must be [{self.batch}, {self.heads}, tokens, {self.format.head_dim}], got {tuple(new.shape)}"
            )
        key = self.format.key()
        ops.store(self.buffer, new, positions, query, mask, self.slots, shift, first, key, rows)

    def begin(self) -> None:
        """Lets the next write begin a new sequence in its rows; the tokens that are held stay."""
        self.sections().rows[:, START] = UNSET

    def read(self) -> Tensor:
        """The dense cache as attention sees it, ``[batch, heads, slots, head_dim]`` in ``format.dtype``."""
        return ops.dequantise(self.buffer, self.batch, self.heads, self.slots, self.format.key())

    def reset(self) -> None:
        """Forgets every token."""
        self.format.layout(self.batch, self.heads, self.slots).clear(self.buffer)

    def sections(self) -> Sections:
        """Typed views of the buffer."""
        return self.format.layout(self.batch, self.heads, self.slots).views(self.buffer)

    def clone(self) -> Self:
        """An independent copy, still packed."""
        return copy.deepcopy(self)

    def select(self, index: Tensor) -> Self:
        """A new state with the rows `index`, int64 ``[n]`` over the batch, for beam search and repeated prompts."""
        selected = copy.copy(self)
        selected.batch = len(index)
        fresh = CacheState.empty(self.format, selected.batch, self.heads, self.slots, self.buffer.device)
        selected.buffer = fresh.buffer
        source, target = self.sections(), selected.sections()
        with torch.inference_mode(mode=False):
            target.header.copy_(source.header)
            for name in source._fields:
                if name not in ("header", "planes"):
                    getattr(target, name).copy_(getattr(source, name).index_select(0, index))
            for to, of in zip(target.planes, source.planes, strict=True):
                to.copy_(of.index_select(0, index))
        return selected

    @property
    def nbytes(self) -> int:
        """Bytes held, of the live buffer."""
        return self.buffer.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense tensor that it stands for."""
        return self.batch * self.heads * self._tokens * self.format.head_dim * self.format.dtype.itemsize

    @property
    def _tokens(self) -> int:
        return self.slots

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = copy.copy(self)
        with torch.inference_mode(mode=False):
            copied.buffer = _zeros(self.nbytes, self.buffer.device).copy_(self.buffer)
        return copied


@dataclass(eq=False)
class GrowingState(CacheState):
    """A packed cache with room to grow: `slots` is its room, the newest token stands in slot ``end - 1``.

    Tokens are only ever appended, so that a stretch of slots holds the same tokens for good. What changes is that a
    token which leaves the window is read from its code from then on.

    Attributes:
        end: slot behind the newest token.
    """

    end: int = 0

    @property
    def _tokens(self) -> int:
        return self.end

    @classmethod
    def with_room(
        cls,
        format: Format,  # noqa: A002
        batch: int,
        heads: int,
        tokens: int,
        device: torch.device | str,
    ) -> Self:
        """An empty cache that `tokens` fit into."""
        return cls.empty(format, batch, heads, _room(tokens, format), device)

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more; all others keep their slots."""
        if self.end + tokens > self.slots:
            larger = self.section(0, self.end, tokens)
            self.slots, self.buffer = larger.slots, larger.buffer

    def section(self, first: int, last: int, tokens: int, room: int = 0) -> Self:
        """A copy of the slots ``[first, last)`` with room for `tokens` more, and for `room` in all.

        Whole tiles are copied, with a few older tokens: slot `first` becomes slot ``first % TILE``.
        """
        base = first // TILE * TILE
        source = self.sections()
        with torch.inference_mode(mode=False):
            origin, end = source.header.tolist()
            origin += base
            position = origin + torch.arange(last - base, device=self.buffer.device)  # slots of both are rings of them
            at = position % self.slots
            sets = _used_sets(source, at)
            size = (self.format, self.batch, self.heads)
            room = max(room, _room(last - base + tokens, self.format))
            copied = self.empty(*size, room, self.buffer.device)
            if sets.sum(1).max() > copied.sections().scales.shape[1]:
                copied = self.empty(*size, max(room, self.slots), self.buffer.device)
            copied.end = last - base
            target = copied.sections()
            target.header.copy_(torch.tensor([origin, min(end, origin + copied.end)]))
            to = position % copied.slots
            tile = position[::TILE] // TILE
            for new, old in zip(target.planes, source.planes, strict=True):
                each = old.shape[2] * TILE // self.slots  # rows of the plane in a tile
                row = (tile[:, None] * each + torch.arange(each, device=tile.device)).flatten()
                new[:, :, row % new.shape[2]] = old[:, :, row % old.shape[2]]
            if self.format.bits == 16:
                target.raw[:, :, to] = source.raw[:, :, at]
                return copied
            number = sets.long().cumsum(1) - 1  # of each set in the copy
            epochs = source.epochs[:, at]
            renumbered = number.gather(1, epochs.long().clamp_max(number.shape[1] - 1)).to(torch.uint8)
            target.epochs[:, to] = torch.where(epochs == NO_EPOCH, epochs, renumbered)
            target.gains[:, :, to] = source.gains[:, :, at]
            row, old_set = sets.nonzero(as_tuple=True)
            for name in ("scales", "means") if self.format.role == "key" else ("scales",):
                getattr(target, name)[row, number[row, old_set]] = getattr(source, name)[row, old_set]
            for name in ("rows", "average", "deviation", "weights", "energy", "sinks", "window"):
                getattr(target, name).copy_(getattr(source, name))
            fitted = target.rows[:, SET]
            fitted.copy_(torch.where(fitted < 0, fitted, number.gather(1, fitted.clamp_min(0)[:, None])[:, 0]))
            for name in ("sink_positions", "window_positions"):
                labels = getattr(source, name)
                getattr(target, name).copy_(labels.masked_fill(labels >= origin + copied.end, UNSET))
        return copied


def _used_sets(sections: Sections, at: Tensor) -> Tensor:
    """Parameter sets that some token at the ring indices `at`, or the row itself, names: bool ``[batch, sets]``."""
    batch, sets = sections.scales.shape[:2]
    used = torch.zeros(batch, 256, dtype=torch.bool, device=at.device)  # NO_EPOCH is 255
    used.scatter_(1, sections.epochs[:, at if sets else at[:0]].long(), value=True)
    used.scatter_(1, sections.rows[:, SET, None].clamp_min(0), value=True)
    return used[:, :sets]


def _room(tokens: int, form: Format) -> int:
    room = max(_LEAST_ROOM, form.sinks + form.window, int(tokens * _GROWTH))
    return -(-room // TILE) * TILE
