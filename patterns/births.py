"""Caches that a call begins without: keys and values that its attention reads and that it returns."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from decoquant_compile.patterns import flow
from decoquant_compile.patterns.attention import readers
from decoquant_compile.patterns.cache import parse_returned
from decoquant_compile.patterns.movement import peel
from decoquant_compile.patterns.stacks import stacked
from decoquant_compile.patterns.symbols import FLOATS, computed, dtype, known, shape

aten = torch.ops.aten

_RANKS = range(3, 6)
_TABLE = 2
_SPLITTING = {
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int),
    *(aten.slice.Tensor, aten.select.int),
}


def begin(
    graph: fx.Graph, outputs: Collection[object], written: Collection[fx.Node] = (), held: Collection[fx.Node] = ()
) -> dict[fx.Node, fx.Node]:
    """Write keys and values that are returned as `cat(nothing, tokens)`, the form in which later calls write.

    Of each attention keys and values both are returned, alone or as parts of a stack, and nothing else uses them. Keys
    may be computed from what is returned slot by slot, such as by a rotation, but not by a linear layer: its input, the
    output of an encoder for one, need not be a cache.

    Args:
        graph: a normalised graph; it is changed in place and does the same.
        outputs: what it returns to its caller.
        written: what it writes to its inputs.
        held: its inputs that are caches.

    Returns:
        The caches, each with the tokens that stood in its place.
    """
    tokens: dict[fx.Node, fx.Node] = {}  # with what is returned of them
    for output in (x for x in dict.fromkeys(outputs) if isinstance(x, fx.Node) and x not in written):
        tokens |= {x: output for x in stacked(output) if _may_begin(x)}
    if not tokens:
        return {}
    reading = readers(graph)
    slots: dict[fx.Node, int] = {}
    read: dict[fx.Node, set[tuple[fx.Node, flow.Side]]] = {}
    for node, output in tokens.items():
        reached = {d: flow.attentions(node, d, reading, {node, output}) or set() for d in range(len(shape(node)))}
        dims = [d for d, found in reached.items() if found]
        # A single token may leave the dim open.
        alike = len(dims) == 1 and not _is_projected(node, reading) and not _is_older(node, held)
        if alike and (len({side for _, side in reached[dims[0]]}) == 1 or _is_split(node, output)):
            slots[node], read[node] = dims[0], reached[dims[0]]
    while partial := {node for node, found in read.items() if not _is_whole(found, read)}:
        for node in partial:
            del read[node]
    return {_cache(node, slots[node]): node for node in read}


def undo(births: dict[fx.Node, fx.Node], kept: Collection[fx.Node]) -> None:
    """Put the tokens back in the place of the caches that are not `kept`."""
    for cache, tokens in births.items():
        if cache not in kept:
            cache.replace_all_uses_with(tokens)
            cache.graph.erase_node(cache)


def _may_begin(node: fx.Node) -> bool:
    """Whether a returned tensor is made in this call, and is no cache by its form."""
    made = node.op == "call_function" and dtype(node) in FLOATS and len(shape(node)) in _RANKS
    return made and parse_returned(node) is None


def _is_split(node: fx.Node, output: fx.Node) -> bool:
    """Whether keys are one part of a tensor and values another: otherwise it may be any state that is attended to."""
    users = [user for user in node.users if user.op != "output" and user is not output]
    return all(user.target in _SPLITTING for user in users)


def _is_projected(node: fx.Node, reading: Collection[fx.Node]) -> bool:
    """Whether a product with an input of the graph, such as a weight, stands before an attention."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if user in seen or user in reading:
                continue
            seen.add(user)
            if user.target in flow.PRODUCTS:
                if user.target is aten.linear.default or any(
                    peel(x).source.op == "placeholder" for x in user.all_input_nodes
                ):
                    return True
            else:
                todo.append(user)
    return False


def _is_older(node: fx.Node, held: Collection[fx.Node]) -> bool:
    """Whether a tensor may hold tokens of calls before: it is made of an input that is, or might be, a cache.

    A table, such as for a rotation, has two dims at most.
    """
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        made = todo.pop()
        if made in seen or made.target in flow.PRODUCTS:
            continue
        seen.add(made)
        wide = dtype(made) in FLOATS and sum(not known(size == 1) for size in shape(made)) > _TABLE
        if made in held or (made.op == "placeholder" and wide):
            return True
        todo += made.all_input_nodes
    return False


def _is_whole(
    found: Collection[tuple[fx.Node, flow.Side]], read: dict[fx.Node, set[tuple[fx.Node, flow.Side]]]
) -> bool:
    """Whether keys and values of all attentions that read a tensor are returned."""
    returned = set().union(*read.values())
    sides: tuple[flow.Side, flow.Side] = ("key", "value")
    return all((attention, side) in returned for attention, _ in found for side in sides)


def _cache(tokens: fx.Node, dim: int) -> fx.Node:
    device = tokens.meta["val"].device
    with tokens.graph.inserting_after(tokens):
        nothing = computed(tokens.graph, aten.empty.memory_format, [0], dtype=dtype(tokens), device=device)
    with tokens.graph.inserting_after(nothing):
        cache = computed(tokens.graph, aten.cat.default, [nothing, tokens], dim)
    tokens.replace_all_uses_with(cache, delete_user_cb=lambda user: user is not cache)
    return cache
