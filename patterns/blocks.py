"""Keys and values that are computed from a cache slot by slot, so that they can be made from a few slots at a time."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from decoquant_compile.patterns import flow
from decoquant_compile.patterns.core import AttentionCore
from decoquant_compile.patterns.movement import MOVEMENT, REGROUPING, operand, sliced
from decoquant_compile.patterns.symbols import argument, known, shape

aten = torch.ops.aten

_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
_JOINS = {aten.cat.default, aten.slice_scatter.default}
_ALONE = {
    *(aten.view_as_complex.default, aten.view_as_real.default),
    *(aten.stack.default, aten.unbind.int, operator.getitem),
    *flow.NORMS,
    *flow.REDUCTIONS,
}
_BATCHED = {aten.matmul.default, aten.bmm.default, aten.mm.default}
_NEW = {aten.empty, aten.empty_like, aten.new_empty, aten.zeros, aten.zeros_like, aten.new_zeros}
RESIZED = REGROUPING | {aten.expand.default, aten.copy.default}
"""Operators whose arguments name the sizes of their result."""

LENGTH = 128
"""Slots that are expanded at a time."""


@dataclass(frozen=True)
class Expansion:
    """How the keys and values of an attention come from its caches.

    Attributes:
        seen: the caches as they are read, with the dim of their slots.
        nodes: what is computed for each slot alone, in the graph's order, with the dim along which slots stand; of
            several results (a split) that of each.
        along: other tensors that have an element for each slot, with that dim.
    """

    seen: Mapping[fx.Node, int]
    nodes: Mapping[fx.Node, int]
    along: Mapping[fx.Node, int]

    @property
    def whole(self) -> set[fx.Node]:
        """Of `nodes`, slices that keep the first slots: for some slots alone they change nothing."""
        return {node for node, dim in self.nodes.items() if _cuts(node, dim)}

    @property
    def empty(self) -> set[fx.Node]:
        """Of `along`, new tensors that are zero, or not filled yet."""
        return set(filter(_is_new, self.along))

    @property
    def others(self) -> list[fx.Node]:
        """Whatever else the nodes take, but for caches."""
        own = self.nodes.keys() | self.seen.keys() | self.empty
        return [n for n in dict.fromkeys(n for node in self.nodes for n in operands(node)) if n not in own]


def is_long(core: AttentionCore) -> bool:
    """Whether an attention may have more keys than are expanded at a time."""
    keys = shape(core.key)[2]
    return not isinstance(keys, int) or keys > LENGTH


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes whose elements a node takes."""
    return [operand(node)] if node.target is aten.copy.default else node.all_input_nodes


def expansion(core: AttentionCore, seen: Mapping[fx.Node, int]) -> Expansion | None:
    """Read how the keys and values of an attention are computed from what it sees of its caches.

    Args:
        core: the attention.
        seen: the caches as they are read, with the dim of their slots.

    Returns:
        None where some slot's key or value takes more than what other tensors and that slot of the caches hold.
    """
    needed: set[fx.Node] = set()
    todo = [core.key, core.value]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += [] if node in seen else operands(node)
    slots = dict(seen)
    along: dict[fx.Node, int] = {}
    for node in core.node.graph.nodes:
        if node not in needed or node in seen or _is_new(node) or node.target is aten.sym_size.int:
            continue
        given = {n for n in operands(node) if n in slots}
        if not given:
            continue
        dims = {flow.follow(n, slots[n], node) for n in given}
        if len(dims) != 1 or (dim := dims.pop()) is None or not _is_alone(node, dim, given):
            return None
        slots[node] = dim
        for other, at in _along(node, dim, given):
            if along.setdefault(other, at) != at:
                return None
    if (slots.get(core.key), slots.get(core.value)) != (2, 2) or not needed.issuperset(seen):
        return None
    found = Expansion(dict(seen), {node: dim for node, dim in slots.items() if node not in seen}, along)
    # A loop takes no floating-point number that is an input of the graph.
    return None if any(isinstance(n.meta.get("val"), torch.SymFloat) for n in found.others) else found


def _is_new(node: fx.Node) -> bool:
    """Whether a node makes a tensor that depends on nothing but sizes."""
    return getattr(node.target, "overloadpacket", None) in _NEW


def _cuts(node: fx.Node, dim: int) -> bool:
    """Whether a node is a slice along a dim."""
    return node.target is aten.slice.Tensor and argument(node, "dim") % len(shape(node)) == dim


def _is_alone(node: fx.Node, dim: int, given: set[fx.Node]) -> bool:
    """Whether each slot of a result along `dim` is made from the same slot of the operands `given`."""
    target = node.target
    if target in _SPLITS or target in _JOINS:
        return argument(node, "dim") % len(shape(next(iter(given)))) != dim
    if _cuts(node, dim):
        span = sliced(node)
        return span is not None and span.first == 0
    if target is aten.einsum.default:
        return len(given) == 1 and _letter(node, dim) not in _other_letters(node, given)
    if target in _BATCHED:
        (left, right), rank = node.args[:2], len(shape(node))
        return len(given) == 1 and dim == (rank - 2 if left in given else rank - 1) and left is not right
    if target is aten.linear.default:
        return node.args[0] in given and len(given) == 1
    if target in MOVEMENT or target in _ALONE:
        return True
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _letter(node: fx.Node, dim: int) -> str:
    return str(argument(node, "equation")).replace(" ", "").partition("->")[2][dim]


def _other_letters(node: fx.Node, given: set[fx.Node]) -> str:
    letters = str(argument(node, "equation")).replace(" ", "").partition("->")[0].split(",")
    return "".join(x for x, n in zip(letters, argument(node, "tensors"), strict=True) if n not in given)


def _along(node: fx.Node, dim: int, given: set[fx.Node]) -> Iterator[tuple[fx.Node, int]]:
    """The other operands of a node that have an element for each slot, with the dim of it."""
    for other in operands(node):
        sizes = shape(other)
        if other in given or not sizes:
            continue
        if node.target in _JOINS:
            yield other, dim
        elif node.target is aten.stack.default:
            yield other, dim - (argument(node, "dim") % len(shape(node)) < dim)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
            at = dim - (len(shape(node)) - len(sizes))
            if at >= 0 and not known(sizes[at] == 1):
                yield other, at
