"""Tensors that hold many caches along some dims, such as those of all layers: where a graph takes them apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from decoquant_compile.patterns.symbols import argument, computed, dtype, same_shape, shape

aten = torch.ops.aten

_LEAST_RANK = 4  # of a tensor of caches


@dataclass(frozen=True)
class Split:
    """How a graph uses one of its inputs: part by part along one dim; it makes every part anew.

    Attributes:
        axis: the dim.
        selections: nodes that take a part out, each with the value that it takes: another node, or the number of the
            part as it was before the call.
        values: what each part becomes.
    """

    axis: int
    selections: tuple[tuple[fx.Node, fx.Node | int], ...]
    values: tuple[fx.Node, ...]

    @property
    def parts(self) -> set[fx.Node]:
        """The nodes that hold a part before or after."""
        return {*self.values, *(selection for selection, _ in self.selections)}


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
        taken = parts_taken(node, axis, size, following, is_result=following is None)
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
    return Split(axis, tuple(selections), tuple(values)) if len(set(values)) == size else None


def gathered(output: fx.Node) -> tuple[fx.Node, Split] | None:
    """Read a result of a graph as parts that are made from those of an input, with that input.

    Args:
        output: the result: `torch.stack` of what grew.
    """
    if output.target is not aten.stack.default or len(shape(output)) < _LEAST_RANK:
        return None
    axis, values = argument(output, "dim") % len(shape(output)), argument(output, "tensors")
    sources = [_continued(value) for value in values]
    buffer = sources[0]
    if buffer is None or any(source is not buffer for source in sources):
        return None
    size = shape(buffer)[axis] if len(shape(buffer)) == len(shape(output)) else None
    if not isinstance(size, int) or not size == len(values) == len(set(values)):
        return None
    before, after = parts_taken(buffer, axis, size), parts_taken(output, axis, size, is_result=True)
    if before is None or after is None:
        return None
    selections = (*before, *((selection, values[number]) for selection, number in after))
    return buffer, Split(axis, selections, tuple(values))


def stacked(output: fx.Node) -> list[fx.Node]:
    """The tensors of which a result is the stack; it alone where it is none."""
    return list(argument(output, "tensors")) if output.target is aten.stack.default else [output]


def distribute(output: fx.Node) -> fx.Node:
    """Write stacked new tokens that are concatenated to a stack as a stack of concatenations, which `gathered` reads.

    Args:
        output: a result of a graph.

    Returns:
        The result, a new one where it was such a concatenation.
    """
    parts = list(argument(output, "tensors")) if output.target is aten.cat.default else []
    if len(parts) != 2 or parts[0].op != "placeholder" or parts[1].target is not aten.stack.default:
        return output
    rank, (buffer, new) = len(shape(output)), parts
    axis, dim, tokens = argument(new, "dim") % rank, argument(output, "dim") % rank, argument(new, "tensors")
    size = shape(buffer)[axis]
    if axis == dim or not isinstance(size, int) or size != len(tokens) or dtype(buffer) != dtype(new):
        return output
    if parts_taken(buffer, axis, size, output) is None or parts_taken(output, axis, size, is_result=True) is None:
        return output
    graph = output.graph
    with graph.inserting_before(output):
        olds = [computed(graph, aten.select.int, buffer, axis, i) for i in range(len(tokens))]
        pairs = zip(olds, tokens, strict=True)
        cats = [computed(graph, aten.cat.default, list(pair), dim - (dim > axis)) for pair in pairs]
        whole = computed(graph, aten.stack.default, cats, axis)
    output.replace_all_uses_with(whole)
    graph.erase_node(output)
    return whole


def _continued(value: fx.Node) -> fx.Node | None:
    """The input of whose part a value is made."""
    while value.op == "call_function" and value.target in _CONTINUING:
        first = value.args[0]
        first = first[0] if isinstance(first, list | tuple) else first
        assert isinstance(first, fx.Node)
        value = first
    return value if value.op == "placeholder" else None


_CONTINUING = {
    *(aten.stack.default, aten.cat.default, aten.select.int, aten.slice.Tensor),
    *(aten.index_copy.default, aten.index_put.default, aten.slice_scatter.default, aten.scatter.src),
}
"""Operators whose first tensor, or first of several, is an older state of the result."""


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


def parts_taken(
    node: fx.Node, axis: int, size: int, following: fx.Node | None = None, *, is_result: bool = False
) -> list[tuple[fx.Node, int]] | None:
    """The nodes that take one part each out of a node, with its number; None if it is used in another way, too.

    Args:
        node: the whole.
        axis: the dim of the parts.
        size: how many they are.
        following: another user that is allowed.
        is_result: the graph's result is such a user.
    """
    found = []
    for user in node.users:
        if user is following or (is_result and user.op == "output"):
            continue
        if user.target is not aten.select.int or argument(user, "dim") % len(shape(node)) != axis:
            return None
        index = argument(user, "index")
        if not isinstance(index, int):
            return None
        found.append((user, index % size))
    return found
