"""Inputs that hold many caches, as one tensor for all layers: the graph gets each of these as an input of its own."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from decoquant_compile import _compat
from decoquant_compile.dims import Stacking
from decoquant_compile.handle import parts_of
from decoquant_compile.normalize import Normal
from decoquant_compile.patterns.stacks import Split, split


@dataclass(frozen=True)
class Stack:
    """One input that was taken apart.

    Attributes:
        index: its position among Dynamo's inputs.
        first: position of its first cache among the inputs of the graph by now; the others follow.
        stacking: where the caches stand in it.
    """

    index: int
    first: int
    stacking: Stacking

    @property
    def positions(self) -> range:
        """Positions of its caches among the inputs of the graph."""
        return range(self.first, self.first + self.stacking.number)


def unstack(normal: Normal, whole: Collection[int] = ()) -> tuple[Stack, ...]:
    """Take apart every input that the graph writes part by part, along one dim or several.

    Args:
        normal: the graph; it is changed in place. Inputs that stand for single caches come behind those it has; an
            input that is taken apart stays, without users.
        whole: positions of inputs to leave as they are.

    Returns:
        What was taken apart, in the order of the inputs.
    """
    inputs = normal.placeholders
    found: list[tuple[int, fx.Node, Stacking]] = []
    for value, buffer in normal.mutations:
        index, parts, axes, counts = inputs.index(buffer), [buffer], list[int](), list[int]()
        splits = [split(buffer, value) if index not in whole else None]
        while (same := _uniform(splits)) is not None:
            axes.append(same[0].axis)
            counts.append(len(same[0].values))
            whole_parts, parts = parts, [p for part, of in zip(parts, same, strict=True) for p in _apart(normal, part, of)]
            for part in whole_parts if len(axes) > 1 else ():
                normal.graph.erase_node(part)
            values = {target: value for value, target in normal.mutations}
            splits = [split(part, values[part]) for part in parts]
        if axes:
            found.append((index, parts[0], Stacking(tuple(axes), tuple(counts))))
    inputs = normal.placeholders
    return tuple(Stack(index, inputs.index(first), stacking) for index, first, stacking in found)


def _uniform(splits: Sequence[Split | None]) -> list[Split] | None:
    """What was read of all parts of an input, if all are taken apart along one dim."""
    found = [x for x in splits if x is not None]
    return found if len(found) == len(splits) and len({x.axis for x in found}) == 1 else None


def with_parts(args: Sequence[Any], stacks: Sequence[Stack]) -> Sequence[Any]:
    """The inputs of a graph that was taken apart: Dynamo's, then each cache's handle, or None where it is none yet."""
    if not stacks:
        return args
    parts: list[Any] = []
    for stack in stacks:
        held = parts_of(args[stack.index], stack.stacking)
        parts += [None] * stack.stacking.number if held is None else held
    return [*args, *parts]


def _apart(normal: Normal, buffer: fx.Node, of: Split) -> list[fx.Node]:
    """Put inputs in the place of one."""
    graph, parts = normal.graph, list[fx.Node]()
    for number in range(len(of.values)):
        last = graph.find_nodes(op="placeholder")[-1]
        with graph.inserting_after(last):
            part = graph.placeholder(f"{buffer.name}_{number}")
        with _compat.faking(graph):
            part.meta["val"] = buffer.meta["val"].select(of.axis, number)
        _compat.add_part_source(part, buffer, f"[{':, ' * of.axis}{number}]")
        parts.append(part)
    for selection, value in of.selections:
        selection.replace_all_uses_with(parts[value] if isinstance(value, int) else value)
    written = list(zip(of.values, parts, strict=True))
    normal.mutations = [pair for pair in normal.mutations if pair[1] is not buffer] + written
    graph.eliminate_dead_code()
    return parts
