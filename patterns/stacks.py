"""Tensors that hold many caches along some dims, such as those of all layers: where a graph takes them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from decoquant_compile.patterns.symbols import argument, dtype, same_shape, shape

aten = torch.ops.aten

_LEAST_RANK = 4  # of a tensor of caches


@dataclass(frozen=True)
class Split:
    """How a graph uses one of its inputs: part by part along one dim, and writes to every part.

    Attributes:
        axis: the dim.
        selections: nodes that take a part out, each with the value that it takes: another node, or the number of the
            part as it was before the call.
        values: what each part becomes.
    """

    axis: int
    selections: tuple[tuple[fx.Node, fx.Node | int], ...]
    values: tuple[fx.Node, ...]


def split(buffer: fx.Node, value: fx.Node) -> Split | None:
    """Read a write into one of a graph's inputs as writes to all of its parts; None if it is something else.

    Args:
        buffer: the input.
        value: the tensor that it becomes.
    """
    writes = _writes(buffer, value)
    if not writes or len(shape(buffer)) < _LEAST_RANK:
        return None
    axis = argument(writes[0], "dim") % len(shape(buffer))
    size = shape(buffer)[axis]
    if not isinstance(size, int):
        return None
    latest: list[fx.Node | int] = list(range(size))
    selections: list[tuple[fx.Node, fx.Node | int]] = []
    for node, following in zip([buffer, *writes], [*writes, None], strict=True):
        for user in node.users:
            if user is following or (following is None and user.op == "output"):
                continue
            taken = _selected(user, axis, size)
            if taken is None:
                return None
            selections += [(selection, latest[number]) for selection, number in taken]
        if following is not None:
            part, index = argument(following, "src"), argument(following, "index")
            fits = same_shape(shape(part), (*shape(node)[:axis], *shape(node)[axis + 1 :]))
            if argument(following, "dim") % len(shape(node)) != axis or not isinstance(index, int) or not fits:
                return None
            if dtype(part) != dtype(buffer):
                return None
            latest[index % size] = part
    values = [x for x in latest if isinstance(x, fx.Node)]
    return Split(axis, tuple(selections), tuple(values)) if len(values) == size else None


def _writes(buffer: fx.Node, value: fx.Node) -> list[fx.Node]:
    """The chain of writes of whole parts that leads from an input to what it becomes; [] if there is none."""
    chain: list[fx.Node] = []
    while value is not buffer:
        if value.target is not aten.select_scatter.default:
            return []
        chain.append(value)
        before = argument(value, "self")
        assert isinstance(before, fx.Node)
        value = before
    return chain[::-1]


def _selected(user: fx.Node, axis: int, size: int) -> Sequence[tuple[fx.Node, int]] | None:
    """The nodes that take one part each, with its number, where a user of the whole does nothing else."""
    if user.target is aten.select.int:
        index = argument(user, "index")
        same = argument(user, "dim") % (len(shape(user)) + 1) == axis
        return [(user, index % size)] if same and isinstance(index, int) else None
    return None
