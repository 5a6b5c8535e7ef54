"""Selections: some sequences, or a stretch of slots, of what a graph is given or returns in place of the whole."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import fx

from decoquant_compile.patterns.cache import CacheWrite, parse_returned
from decoquant_compile.patterns.movement import operand
from decoquant_compile.patterns.symbols import FLOATS, Int, argument, dtype, same_shape, same_value, shape

aten = torch.ops.aten

Kind: TypeAlias = Literal["slice", "index_select", "index"]

_RANKS = range(3, 6)
_INDICES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Selection:
    """How a node takes a part of a tensor along one dim, with all dims left.

    Attributes:
        kind: "slice", or by an index of one dim; with "index" a negative one counts from the end.
        dim: the dim.
        values: start and end of the slice, None where it is open; or the index.
    """

    kind: Kind
    dim: int
    values: tuple[Int | None, ...]

    @property
    def is_slice(self) -> bool:
        """Whether it takes a stretch."""
        return self.kind == "slice"


def read(node: fx.Node) -> Selection | None:
    """The selection that a node is; None if it is none."""
    if node.target is aten.slice.Tensor and argument(node, "step") == 1:
        bounds = argument(node, "start"), argument(node, "end")
        return Selection("slice", argument(node, "dim") % len(shape(node)), bounds)
    if node.target is aten.index_select.default and len(shape(argument(node, "index"))) == 1:
        return Selection("index_select", argument(node, "dim") % len(shape(node)), (argument(node, "index"),))
    if node.target is aten.index.Tensor:
        given = [(dim, index) for dim, index in enumerate(argument(node, "indices")) if index is not None]
        if len(given) == 1 and len(shape(given[0][1])) == 1 and dtype(given[0][1]) in _INDICES:
            return Selection("index", given[0][0], (given[0][1],))
    return None


def taken(
    graph: fx.Graph, kept: Container[fx.Node], held: Container[fx.Node] = ()
) -> Iterator[tuple[fx.Node, fx.Node, Selection]]:
    """The inputs of which a graph uses a selection alone, each with the node that selects.

    Args:
        graph: a normalised graph. Nodes that select the same become one.
        kept: inputs to leave out.
        held: inputs that are caches; of others a selection counts only if the graph appends to it.
    """
    for given in graph.find_nodes(op="placeholder"):
        if given in kept or not _may_be_cache(given):
            continue
        while whole := next((user for user in given.users if _is_whole(user)), None):
            whole.replace_all_uses_with(given)
            graph.erase_node(whole)
        nodes, selection = _uses(given, given.users)
        if selection is not None and (given in held or any(map(_is_continued, nodes))):
            yield given, _merged(nodes), selection


def reordered(written: Iterable[fx.Node], kept: Container[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node, Selection]]:
    """The inputs that a graph writes to of which it uses a selection by index alone, with the node that selects.

    Args:
        written: inputs that the graph writes to.
        kept: inputs to leave out.
    """
    for given in written:
        if given in kept or not _may_be_cache(given):
            continue
        users = (n for n in given.users if n.target is not aten.copy.default or n.args[1] is given)  # not copied over
        nodes, selection = _uses(given, users)
        if selection is not None and not selection.is_slice and same_shape(shape(nodes[0]), shape(given)):
            yield given, _merged(nodes), selection


def returned(output: fx.Node) -> tuple[fx.Node, list[Selection]]:
    """What a result of a graph is selected from, and the selections in their order: none, where it is no selection."""
    node, chain = output, list[Selection]()
    while _may_be_cache(node):
        if _is_whole(node):
            node = operand(node)
        elif not isinstance(parse_returned(node), CacheWrite) and (selection := read(node)) is not None:
            node = operand(node)
            chain.insert(0, selection)
        else:
            break
    # Of what is used in slices alone, keys and values are slices, as of a product that is all of them.
    is_cut = all(user.target is aten.slice.Tensor for user in node.users) and any(x.is_slice for x in chain)
    may_grow = node.target is aten.cat.default or len(shape(node)) > _RANKS[0]  # three dims: states of a model, mostly
    return (node, chain) if may_grow and not is_cut else (output, [])


def _uses(given: fx.Node, users: Iterable[fx.Node]) -> tuple[list[fx.Node], Selection | None]:
    """The nodes that use the content of an input, and the selection that they are, if they are the same."""
    nodes = [user for user in users if user.target is not aten.sym_size.int]
    if not nodes or nodes[0].args[0] is not given or not all(same_value(nodes[0], node) for node in nodes):
        return nodes, None
    return nodes, read(nodes[0])


def _merged(nodes: Sequence[fx.Node]) -> fx.Node:
    """One node in place of several that compute the same."""
    first, *others = nodes
    for other in others:
        other.replace_all_uses_with(first)
        other.graph.erase_node(other)
    return first


def _is_continued(node: fx.Node) -> bool:
    """Whether a selection, or a selection of it, is what a graph appends to."""
    return any(
        argument(user, "tensors")[0] is node
        if user.target is aten.cat.default
        else (_is_whole(user) or read(user) is not None) and _is_continued(user)
        for user in node.users
    )


def _is_whole(node: fx.Node) -> bool:
    """Whether a node is a slice of all there is, as indexing makes for each open dim."""
    is_view = node.target in (aten.slice.Tensor, aten.alias.default)
    return is_view and same_shape(shape(node), shape(operand(node)))


def _may_be_cache(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and len(value.shape) in _RANKS and value.dtype in FLOATS
