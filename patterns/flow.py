"""Where the slots of a cache go: a dim of a tensor, followed through a graph to the attentions that sum over it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from decoquant_compile.patterns.movement import MOVEMENT, REGROUPING, operand, peel, regrouped
from decoquant_compile.patterns.symbols import argument, dtype, known, shape

aten = torch.ops.aten

Side: TypeAlias = Literal["key", "value"]

_KEEPING = {
    # Of their first argument, every element of the result with the same index along the dim.
    *(aten.index_copy.default, aten.index_put.default, aten.scatter.src),
    *(aten.index_select.default, aten.gather.default, aten.roll.default, aten.flip.default, aten.pad.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.dropout.default),
    *(aten.view_as_complex.default, aten.view_as_real.default),
}
_PAIRING = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
_SHAPED = {
    *(aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like),
    *(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full),
}
REDUCTIONS = {
    *(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.var.correction),
    *(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim),
}
"""Operators that sum up along some dims, and keep those of size 1 or drop them."""

NORMS = {aten.layer_norm.default, aten.rms_norm.default}
_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
_ORDERING = {
    *(aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable),
    *(aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim),
}
_JUMPING = {
    *(aten.sign.default, aten.sgn.default, aten.heaviside.default, aten.frac.default, aten.nan_to_num.default),
    *(aten.floor.default, aten.ceil.default, aten.trunc.default, aten.round.default, aten.round.decimals),
    *(aten.fmod.Tensor, aten.fmod.Scalar, aten.remainder.Tensor, aten.remainder.Scalar),
    *(aten.floor_divide.default, aten.floor_divide.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode),
}


def attentions(
    start: fx.Node, dim: int, readers: dict[fx.Node, fx.Node], returned: Container[fx.Node] = ()
) -> set[tuple[fx.Node, Side]] | None:
    """The attentions whose keys or values stand along a dim, where nothing else uses its elements.

    Followed are movement, pointwise operators, products that do not sum over the dim, and what else keeps it: whatever
    is computed for each slot alone, from one cache or several. So states of convolutions and recurrences, which are
    also written in place, are no caches. What becomes of logits is the attention's own affair.

    Args:
        start: the tensor.
        dim: which of its dims to follow.
        readers: the nodes at which attention weights are made or applied, each with the attention it belongs to.
        returned: what the graph may return: the tensor after its write.

    Returns:
        Attentions, each with the operand that the dim indexes; None where another use was found.
    """
    found: set[tuple[fx.Node, Side]] = set()
    seen: set[tuple[fx.Node, int, bool]] = set()
    todo = [(start, dim, False)]
    while todo:
        node, dim, multiplied = todo.pop()
        if (node, dim, multiplied) in seen:
            continue
        seen.add((node, dim, multiplied))
        for user in node.users:
            if (attention := readers.get(user)) is not None and (sides := _sides(node, dim, user)):
                found |= {(attention, side) for side in sides}
            elif (to := follow(node, dim, user)) is not None:
                todo.append((user, to, multiplied or user.target in _PAIRING))
            elif user in readers and _masks(node, dim, user):
                continue
            elif not (multiplied or _ignores(node, user) or (user.op == "output" and node in returned)):
                return None
    return found


def decides(start: fx.Node, readers: Container[fx.Node]) -> bool:
    """Whether a graph might act on exact elements of a tensor: it compares, rounds or counts them, or we know not.

    Sums and functions of numbers that are a little off are a little off, and the greatest few of them are nearly as
    great; but what is 0 in the tensor would be another element than before.

    Args:
        start: the tensor.
        readers: as of `attentions`; what an attention makes of the tensor is not followed.
    """
    seen: set[fx.Node] = set()
    todo = [start]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in seen or user in readers or user.op == "output" or _ignores(node, user):
                continue
            seen.add(user)
            made, part = user.meta.get("val"), user.target is operator.getitem
            if not part and (getattr(user.target, "namespace", None) != "aten" or user.target in _JUMPING):
                return True
            several = isinstance(made, list | tuple)
            if several or (isinstance(made, torch.Tensor) and (made.is_floating_point() or made.is_complex())):
                todo.append(user)
            elif (node.target if part else user.target) not in _ORDERING:
                return True
    return False


def _ignores(node: fx.Node, user: fx.Node) -> bool:
    """Whether a user of `node` does not look at its elements."""
    if getattr(user.target, "overloadpacket", None) in _SHAPED or user.target is aten.sym_size.int:
        return True
    return user.target is aten.copy.default and user.args[1] is not node


def _masks(node: fx.Node, dim: int, reader: fx.Node) -> bool:
    """Whether a tensor masks an attention, along its keys."""
    fused = reader.target not in _SOFTMAX and reader.target not in PRODUCTS
    return fused and dim == len(shape(node)) - 1 and node not in reader.args[:3] and node in reader.args[3:4]


def _sides(node: fx.Node, dim: int, reader: fx.Node) -> set[Side]:
    """The operands of an attention that a dim of `node` indexes, at a node that reads it."""
    if reader.target in _SOFTMAX:
        return {"key"} if argument(reader, "dim") % len(shape(node)) == dim else set()
    if reader.target in PRODUCTS:
        return {"value"} if _product(node, dim, reader) is _SUMMED else set()
    if dim != len(shape(node)) - 2:
        return set()
    operands: dict[Side, object] = dict(zip(("key", "value"), reader.args[1:3], strict=True))
    return {side for side, tensor in operands.items() if tensor is node}


def follow(node: fx.Node, dim: int, user: fx.Node) -> int | None:
    """The dim of `user` along which the elements of `node` stand that stood along `dim`; None if there is none."""
    target, rank = user.target, len(shape(node))
    if user.op != "call_function":
        return None
    if target in _RULES:
        return _RULES[target](node, dim, user)
    if target in _KEEPING:
        return dim if user.args[0] is node else None
    if target in PRODUCTS:
        to = _product(node, dim, user)
        return to if isinstance(to, int) else None
    if target in MOVEMENT:
        if operand(user) is not node:
            return None
        if target in REGROUPING:
            return regrouped(node, dim, user)
        walk = peel(user, until={node})
        places = [d for d, atoms in enumerate(walk.axes.dims) if atoms == (dim,)] if walk.source is node else []
        return places[0] if places else None
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        to = dim + len(shape(user)) - rank
        return to if to >= 0 and known(shape(user)[to] == shape(node)[dim]) else None
    return None


_SUMMED = "summed"
_To: TypeAlias = int | str | None


def _product(node: fx.Node, dim: int, user: fx.Node) -> _To:
    """Where a dim of an operand of a matrix product goes: a dim of the result, or `_SUMMED`."""
    return PRODUCTS[user.target](node, dim, user)


def _linear(node: fx.Node, dim: int, user: fx.Node) -> _To:
    if user.args[0] is not node:
        return None
    return _SUMMED if dim == len(shape(node)) - 1 else dim


def _matmul(node: fx.Node, dim: int, user: fx.Node, first: int = 0) -> _To:
    left, right = user.args[first : first + 2]
    rank, out = len(shape(node)), len(shape(user))
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if left is right or min(len(shape(left)), len(shape(right))) < 2:
        return None
    summed = rank - 1 if node is left else rank - 2
    if node not in (left, right):
        return None
    return _SUMMED if dim == summed else dim + out - rank


def _einsum(node: fx.Node, dim: int, user: fx.Node) -> _To:
    equation, tensors = str(argument(user, "equation")).replace(" ", ""), argument(user, "tensors")
    inputs, _, out = equation.partition("->")
    places = [letters for letters, tensor in zip(inputs.split(","), tensors, strict=True) if tensor is node]
    if len(places) != 1 or not places[0].isalpha() or "->" not in equation or "." in out:
        return None
    return out.index(places[0][dim]) if places[0][dim] in out else _SUMMED


PRODUCTS: dict[object, Callable[[fx.Node, int, fx.Node], _To]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.baddbmm.default: lambda node, dim, user: _matmul(node, dim, user, 1),
    aten.addmm.default: lambda node, dim, user: _matmul(node, dim, user, 1),
    aten.einsum.default: _einsum,
}
"""Where a dim of an operand of each matrix product goes."""


def _same(_: fx.Node, dim: int, __: fx.Node) -> int:
    return dim


def _norm(node: fx.Node, dim: int, user: fx.Node) -> int | None:
    within = len(argument(user, "normalized_shape"))
    return dim if user.args[0] is node and dim < len(shape(node)) - within else None


def _reduced(node: fx.Node, dim: int, user: fx.Node) -> int | None:
    summed = argument(user, "dim")
    taken = {d % len(shape(node)) for d in ([summed] if isinstance(summed, int) else summed or range(len(shape(node))))}
    if user.args[0] is not node or dim in taken:
        return None
    return dim if argument(user, "keepdim") else dim - sum(d < dim for d in taken)


def _indexed(node: fx.Node, dim: int, user: fx.Node) -> int | None:
    """Slots that a table names, [sequences, slots] as well: its dims stand in place of the one that is indexed."""
    given = [(d, index) for d, index in enumerate(argument(user, "indices")) if index is not None]
    if argument(user, "self") is not node or len(given) != 1 or not shape(given[0][1]):
        return None
    if dtype(given[0][1]) not in (torch.int64, torch.int32):  # of booleans, each takes a dim
        return None
    at, rank = given[0][0], len(shape(given[0][1]))
    return dim + rank - 1 if at <= dim else dim


def _item(_: fx.Node, dim: int, user: fx.Node) -> int | None:
    return dim if shape(user) else None


def _stack(_: fx.Node, dim: int, user: fx.Node) -> int:
    return dim + (argument(user, "dim") % len(shape(user)) <= dim)


def _unbind(node: fx.Node, dim: int, user: fx.Node) -> int | None:
    taken = argument(user, "dim") % len(shape(node))
    return None if taken == dim else dim - (taken < dim)


def _select_scatter(node: fx.Node, dim: int, user: fx.Node) -> int:
    return dim if user.args[0] is node else _stack(node, dim, user)


_RULES: dict[object, Callable[[Any, int, fx.Node], int | None]] = {
    aten.cat.default: _same,
    aten.stack.default: _stack,
    aten.unbind.int: _unbind,
    aten.select_scatter.default: _select_scatter,
    operator.getitem: _item,
    aten.slice.Tensor: _same,
    aten.slice_scatter.default: _same,
    aten.index.Tensor: _indexed,
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(REDUCTIONS, _reduced),
}
