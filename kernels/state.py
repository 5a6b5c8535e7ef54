"""The packed replacement of one cache tensor."""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from decoquant_compile.kernels import ops
from decoquant_compile.kernels.cpu import memory
from decoquant_compile.kernels.format import Format


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

    def read(self) -> Tensor:
        """The dense cache as attention sees it, ``[batch, heads, slots, head_dim]`` in ``format.dtype``."""
        return ops.dequantise(self.buffer, self.batch, self.heads, self.slots, self.format.key())

    def reset(self) -> None:
        """Forgets every token."""
        self.format.layout(self.batch, self.heads, self.slots).clear(self.buffer)

    def clone(self) -> Self:
        """An independent copy, still packed."""
        return copy.deepcopy(self)

    def select(self, index: Tensor) -> Self:
        """A new state with the rows `index`, int64 ``[n]`` over the batch, for beam search and repeated prompts."""
        selected = type(self).empty(self.format, len(index), self.heads, self.slots, self.buffer.device)
        source = self.format.layout(self.batch, self.heads, self.slots).views(self.buffer)
        target = self.format.layout(len(index), self.heads, self.slots).views(selected.buffer)
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with torch.inference_mode(mode=False):
            buffer = _zeros(self.nbytes, self.buffer.device).copy_(self.buffer)
        return type(self)(self.format, self.batch, self.heads, self.slots, buffer)
