"""Movement of elements: views, expansions, slices and repetitions, as an algebra on dims."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import fx

from decoquant_compile.patterns.symbols import Int, Size, argument, dtype, known, number, same_shape, shape, size_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Repeat:
    """Elements repeated `factor` times along this part of a dim."""

    factor: Size


Atom = int | Repeat
"""A dim of the source, or a repetition."""


@dataclass(frozen=True)
class Span:
    """The stretch [first, first + length) of one dim of the source."""

    first: Int
    length: Size


@dataclass(frozen=True)
class Axes:
    """Where the elements of a moved tensor stand in its source.

    Attributes:
        dims: for each dim of the moved tensor, outermost first, the atoms whose row-major product it is. Atoms of
            size 1 are left out.
        spans: for each dim of the source, the stretch that is taken.
        dtypes: element types passed on the way, the source's first.
    """

    dims: tuple[tuple[Atom, ...], ...]
    spans: tuple[Span, ...]
    dtypes: tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class Walk:
    """A path of movement.

    Attributes:
        source: the node it starts from.
        axes: what it does.
        nodes: its nodes, from the source's user to the end.
        factor: what the elements are multiplied by on the way.
    """

    source: fx.Node
    axes: Axes
    nodes: tuple[fx.Node, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class _Part:
    atom: Atom
    size: Size


class _State:
    """Axes under construction, moving forward from `source`."""

    def __init__(self, source: fx.Node) -> None:
        sizes = shape(source)
        self.dims: list[list[_Part]] = [[] if known(n == 1) else [_Part(d, n)] for d, n in enumerate(sizes)]
        self.spans = [Span(0, n) for n in sizes]
        self.dtypes = [dtype(source)]

    def axes(self) -> Axes:
        dims = tuple(tuple(p.atom for p in parts) for parts in self.dims)
        return Axes(dims, tuple(self.spans), tuple(self.dtypes))


_Rule = Callable[[_State, fx.Node], bool]


def _keep(_: _State, node: fx.Node) -> bool:
    return same_device(node)


def _cast(state: _State, node: fx.Node) -> bool:
    to = dtype(node)
    if to is None or not to.is_floating_point or not same_device(node):
        return False
    if to != state.dtypes[-1]:
        state.dtypes.append(to)
    return True


def _regroup(state: _State, node: fx.Node) -> bool:
    """A row-major view: the same parts in the same order, distributed anew."""
    parts = [p for dim in state.dims for p in dim]
    dims: list[list[_Part]] = []
    for size in shape(node):
        dim: list[_Part] = []
        held: Size = 1
        while not known(held == size):
            if not parts:
                return False
            dim.append(parts.pop(0))
            held = held * dim[-1].size
        dims.append(dim)
    state.dims = dims
    return not parts


def _reorder(state: _State, order: Sequence[int]) -> bool:
    state.dims = [state.dims[d] for d in order]
    return True


def _transpose(state: _State, node: fx.Node) -> bool:
    order = list(range(len(state.dims)))
    a, b = argument(node, "dim0"), argument(node, "dim1")
    order[a], order[b] = order[b], order[a]
    return _reorder(state, order)


def _expand(state: _State, node: fx.Node) -> bool:
    sizes = shape(node)
    dims: list[list[_Part]] = [[] for _ in range(len(sizes) - len(state.dims))] + state.dims
    for d, size in enumerate(sizes):
        if not dims[d] and not known(size == 1):
            dims[d] = [_Part(Repeat(size), size)]
        elif dims[d] and not same_or_refused(reduce(operator.mul, [p.size for p in dims[d]]), size):
            return False
    state.dims = dims
    return True


def same_or_refused(size: Size, wanted: Size) -> bool:
    """Whether two sizes are equal or PyTorch refuses them: what is more than 1 is not repeated."""
    return known(size == wanted) or (not isinstance(size, int) and known(size > 1))


def _copy(state: _State, node: fx.Node) -> bool:
    return _expand(state, node) and _cast(state, node)


def _slice(state: _State, node: fx.Node) -> bool:
    span = sliced(node)
    if span is None:
        return False
    dim = argument(node, "dim") % len(state.dims)
    return _take(state, dim, span)


def _select(state: _State, node: fx.Node) -> bool:
    dim, index = argument(node, "dim") % len(state.dims), argument(node, "index")
    size = shape(operand(node))[dim]
    first = start_of(index, size, 1)
    if first is None or not _take(state, dim, Span(first, 1)):
        return False
    del state.dims[dim]
    return True


def _take(state: _State, dim: int, span: Span) -> bool:
    """Keep a stretch of a dim that is one dim of the source."""
    parts = state.dims[dim]
    if known(reduce(operator.mul, [p.size for p in parts], 1) == span.length):
        return True
    if len(parts) != 1 or not isinstance(parts[0].atom, int):
        return False
    atom = parts[0].atom
    before = state.spans[atom].first
    if before == 0:
        first = span.first
    elif isinstance(before, int) and isinstance(span.first, int):
        first = before + span.first
    elif span.first == 0:
        first = before
    else:
        return False
    state.spans[atom] = Span(first, span.length)
    state.dims[dim] = [] if known(span.length == 1) else [_Part(atom, span.length)]
    return True


def _repeat(state: _State, node: fx.Node) -> bool:
    """`Tensor.repeat`: whole copies one after the other."""
    factors = [size_of(f) for f in argument(node, "repeats")]
    dims: list[list[_Part]] = [[] for _ in range(len(factors) - len(state.dims))] + state.dims
    state.dims = [[*_repetition(f), *parts] for f, parts in zip(factors, dims, strict=True)]
    return True


def _repeat_interleave(state: _State, node: fx.Node) -> bool:
    dim = argument(node, "dim")
    if dim is None:
        return False
    state.dims[dim].extend(_repetition(size_of(argument(node, "repeats"))))
    return True


def _repetition(factor: Size) -> list[_Part]:
    return [] if known(factor == 1) else [_Part(Repeat(factor), factor)]


MOVEMENT: dict[object, _Rule] = {
    aten.alias.default: _keep,
    aten.clone.default: _keep,
    aten.contiguous.default: _keep,
    aten.detach.default: _keep,
    aten.lift_fresh_copy.default: _keep,
    aten._to_copy.default: _cast,
    aten.to.dtype: _cast,
    aten.type_as.default: _cast,
    aten.view.default: _regroup,
    aten._unsafe_view.default: _regroup,
    aten.reshape.default: _regroup,
    aten.unsqueeze.default: _regroup,
    aten.squeeze.default: _regroup,
    aten.squeeze.dim: _regroup,
    aten.squeeze.dims: _regroup,
    aten.flatten.using_ints: _regroup,
    aten.unflatten.int: _regroup,
    aten.transpose.int: _transpose,
    aten.permute.default: lambda state, node: _reorder(state, argument(node, "dims")),
    aten.t.default: lambda state, _: _reorder(state, range(len(state.dims))[::-1]),
    aten.expand.default: _expand,
    aten.copy.default: _copy,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.slice_scatter.default: _keep,
}
"""Operators that only move, repeat or drop elements. `copy` and a `slice_scatter` over all of its base are here too:
they give the elements of their second argument."""

REGROUPING = {target for target, rule in MOVEMENT.items() if rule is _regroup}
"""Row-major views: elements keep their order."""

_PERMUTING = {aten.transpose.int, aten.permute.default, aten.t.default}
_OVERWRITING = {aten.copy.default, aten.slice_scatter.default}


def operand(node: fx.Node) -> fx.Node:
    """The node whose elements a movement moves."""
    source = node.args[1 if node.target in _OVERWRITING else 0]
    assert isinstance(source, fx.Node)
    return source


def moves(node: fx.Node) -> bool:
    """Whether a node is movement, understood or not."""
    if node.op != "call_function" or node.target not in MOVEMENT:
        return False
    return node.target is not aten.slice_scatter.default or same_shape(shape(node), shape(operand(node)))


def peel(node: fx.Node, until: Container[fx.Node] = (), *, scaled: bool = False) -> Walk:
    """Walk back over movement.

    Args:
        node: where to start.
        until: nodes at which to stop although they are movement themselves.
        scaled: go on over multiplications by constants as well.

    Returns:
        The walk from its source: a node of `until`, the first node that is no movement, or the last one that is not
        understood.
    """
    path: list[tuple[fx.Node, float | None]] = []
    while node not in until:
        if moves(node):
            path.append((node, None))
            node = operand(node)
        elif scaled and (by := scaling(node)) is not None:
            path.append((node, by[1]))
            node = by[0]
        else:
            break
    state, nodes, factor = _State(node), list[fx.Node](), 1.0
    for step, by_factor in reversed(path):
        if by_factor is not None:
            nodes.append(step)
            factor *= by_factor
        elif MOVEMENT[step.target](state, step):
            nodes.append(step)
        else:
            node, state, nodes, factor = step, _State(step), [], 1.0
    return Walk(node, state.axes(), tuple(nodes), factor)


def regrouped(node: fx.Node, dim: int, view: fx.Node) -> int | None:
    """Which dim of a row-major view of `node` its `dim` is: one of the same size, with as many elements outside."""
    sizes, size, outside = shape(view), shape(node)[dim], math.prod(shape(node)[:dim])
    return next((d for d, n in enumerate(sizes) if known(n == size) and known(math.prod(sizes[:d]) == outside)), None)


def plain(node: fx.Node) -> fx.Node:
    """Walk back over movement that changes nothing: same elements, same places, same type."""
    while moves(node) and node.target not in _PERMUTING:
        source = operand(node)
        if not same_shape(shape(node), shape(source)) or dtype(node) != dtype(source) or not same_device(node):
            break
        node = source
    return node


def constant(value: object) -> float | None:
    """The number that an argument is wherever the graph runs, or that all elements of it are; None if it is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    node = plain(value)
    if node.target in {aten.full.default, aten.full_like.default}:
        return constant(argument(node, "fill_value"))
    if node.op != "get_attr":
        return None
    tensor = getattr(node.graph.owning_module, str(node.target))
    return float(tensor) if isinstance(tensor, torch.Tensor) and tensor.numel() == 1 else None


def scaling(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The tensor that a node multiplies, or divides, by a constant, and the factor."""
    if node.target not in {aten.mul.Tensor, aten.div.Tensor}:
        return None
    sides = [(node.args[0], node.args[1])]
    if node.target is aten.mul.Tensor:
        sides.append((node.args[1], node.args[0]))
    for source, other in sides:
        factor = constant(other)
        if factor is None or not isinstance(source, fx.Node):
            continue
        if same_shape(shape(source), shape(node)) and dtype(source) == dtype(node):
            if node.target is aten.mul.Tensor:
                return source, factor
            return None if factor == 0 else (source, 1 / factor)
    return None


def is_identity(walk: Walk) -> bool:
    """Whether a walk only adds or drops dims of size 1."""
    sizes = shape(walk.source)
    order = [atom for dim in walk.axes.dims for atom in dim]
    whole = all(known(s.length == n) for s, n in zip(walk.axes.spans, sizes, strict=True))
    return whole and len(walk.axes.dtypes) == 1 and order == [d for d, n in enumerate(sizes) if not known(n == 1)]


def sliced(node: fx.Node) -> Span | None:
    """The stretch that a `slice` (or the one that a `slice_scatter`) with step 1 takes of its dim; None if unclear."""
    if argument(node, "step") != 1:
        return None
    whole = node.args[0]
    part = node.args[1] if node.target is aten.slice_scatter.default else node
    assert isinstance(whole, fx.Node)
    assert isinstance(part, fx.Node)
    dim = argument(node, "dim")
    size, length = shape(whole)[dim], shape(part)[dim]
    start = argument(node, "start")
    first = 0 if known(size == length) else start_of(start, size, length)
    if first is None and isinstance(start, int) and start < 0 and known(size + start >= 0):
        with node.graph.inserting_before(node):
            first = number(node.graph, size + start)
    return None if first is None else Span(first, length)


def start_of(start: Int | None, size: Size, length: Size) -> Int | None:
    """The first index of a slice, as the operator clamps and wraps it; None if that is not known."""
    if start is None:
        return 0
    value = size_of(start)
    # A start behind the end is clamped; a slice that is not empty does not start there.
    if known(value >= 0) and (known(length >= 1) or known(value <= size)):
        return start
    if isinstance(start, int) and isinstance(size, int) and -size <= start < 0:
        return size + start
    return None


def same_device(node: fx.Node) -> bool:
    """Whether a movement leaves its operand's elements on their device."""
    here, there = node.meta.get("val"), operand(node).meta.get("val")
    return isinstance(here, torch.Tensor) and isinstance(there, torch.Tensor) and here.device == there.device
