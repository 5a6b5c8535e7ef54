"""The `flex_attention` operator: its functions of score and positions as scale, softcap and mask.

A score function and a mask function are graphs on scalars: the score, the numbers of batch, head, query and key, and
tensors from outside. They are evaluated here for all positions at once, by the same operators on tensors that broadcast
to [batch, query heads, queries, keys]. A block mask admits a position if its block is listed as full, or listed and
admitted by the mask function (`torch.nn.attention.flex_attention.BlockMask`).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from decoquant_compile import _compat
from decoquant_compile.patterns.core import AttentionCore
from decoquant_compile.patterns.movement import constant, operand, same_device
from decoquant_compile.patterns.reject import Problem, Reason
from decoquant_compile.patterns.symbols import Int, Size, argument, computed, dtype, known, shape, size_of

aten = torch.ops.aten


def is_flex(node: fx.Node) -> bool:
    """Whether a node is the operator."""
    return _compat.higher_order_name(node.target) == "flex_attention"


def read(node: fx.Node) -> AttentionCore | Problem:
    """Read an attention.

    The mask that it needs is added to the graph; nothing in it uses that.

    Args:
        node: the operator.
    """
    try:
        return _core(node)
    except _RefusedError as refused:
        return refused.problem


class _RefusedError(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.problem = Problem(reason, detail)


def _core(node: fx.Node) -> AttentionCore | Problem:
    arguments: Any = (*node.args, (), ())[:9]
    query, key, value, score_mod, blocks, scale, options, score_others, mask_others = arguments
    results = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if len(results) != 1 or len(node.users) != 1:
        return Problem(Reason.WEIGHTS_ESCAPE, f"{node} returns more than the attention, such as sums of its weights")
    if not isinstance(scale, int | float):
        return Problem(Reason.ATTENTION_FORM, f"scale is computed: {scale}")
    if options.get("SKIP_MASK_SCORE", False):
        return Problem(Reason.ATTENTION_FORM, "SKIP_MASK_SCORE")
    with node.graph.inserting_before(node):
        grid = _Grid(node.graph, (*shape(query)[:3], shape(key)[2]), query.meta["val"].device)
        score = grid.score(score_mod, score_others)
        mask = grid.mask(blocks, mask_others, score)
    factor, cap = scale * score.factor, None if score.outer is None else abs(score.outer)
    if score.outer is not None:  # outer * tanh(factor * x)
        factor *= score.outer
    return AttentionCore(results[0], query, key, value, mask, False, factor, True, "flex", cap)


@dataclass(frozen=True)
class _Score:
    """`factor * score`, or `outer * tanh(factor * score)`, plus terms, where conditions hold; else -inf.

    Attributes:
        factor: of the score.
        outer: of the hyperbolic tangent; None: there is none.
        terms: tensors that are added, each with a factor.
        conditions: boolean tensors.
    """

    factor: float = 1.0
    outer: float | None = None
    terms: tuple[tuple[fx.Node, float], ...] = ()
    conditions: tuple[fx.Node, ...] = ()

    def scaled(self, by: float) -> _Score:
        if by < 0 and self.conditions:
            raise _RefusedError(Reason.MASK_FORM, f"what is hidden by -inf is scaled by {by:g}")
        terms = tuple((tensor, factor * by) for tensor, factor in self.terms)
        if self.outer is None:
            return _Score(self.factor * by, None, terms, self.conditions)
        return _Score(self.factor, self.outer * by, terms, self.conditions)


@dataclass(frozen=True)
class _At:
    """A scalar at every position: a tensor of 4 dims that broadcasts to all positions."""

    tensor: fx.Node


@dataclass(frozen=True)
class _Taken:
    """A tensor from outside with numbers for its first dims, each a scalar at every position."""

    tensor: fx.Node
    indices: tuple[fx.Node, ...]


# Scalars of one value that are made like another scalar, and tensors of one value.
_MADE: dict[object, int] = {
    aten.new_ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.zeros_like.default: 0,
}
_FILLED: dict[object, int] = {aten.ones.default: 1, aten.zeros.default: 0}
_MOVES = {
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
}
# Without the tag of pointwise operators, though of scalars they make scalars.
_SCALAR = {
    *_MOVES,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
    aten.floor_divide.default,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar}
_SCALING = {*_PRODUCTS, aten.div.Tensor, aten.div.Scalar}
_SUMS = {aten.add.Tensor, aten.add.Scalar}
_REVERSED = {aten.rsub.Tensor, aten.rsub.Scalar}
_ADDING = {*_SUMS, *_REVERSED, aten.sub.Tensor, aten.sub.Scalar}
_CHOOSING = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}


class _Grid:
    """All positions of an attention; nodes are added at the graph's insertion point."""

    def __init__(self, graph: fx.Graph, sizes: tuple[Size, ...], device: torch.device) -> None:
        self.graph, self.sizes, self.device = graph, sizes, device
        self.numbers = tuple(self._number(axis) for axis in range(4))

    def _size(self, size: Size) -> Int:
        if isinstance(size, int):
            return size
        try:
            node = _compat.size_node(self.graph, size)
        except LookupError as error:
            raise _RefusedError(Reason.UNDECIDED_SIZE, str(error)) from None
        if isinstance(node, fx.Node):
            node.meta.setdefault("val", size)
        return node

    def _number(self, axis: int) -> fx.Node:
        """The number of batch, head, query or key at each position."""
        node = computed(self.graph, aten.arange.default, self._size(self.sizes[axis]), device=self.device)
        return self._raised(node, [-1 if d == axis else 1 for d in range(4)])

    def _raised(self, node: fx.Node, sizes: list[int]) -> fx.Node:
        return computed(self.graph, aten.view.default, node, sizes)

    def score(self, function: fx.Node, others: tuple[Any, ...]) -> _Score:
        """What a score function makes of a score."""
        numbers = [_At(node) for node in self.numbers]
        made = self._run(function, [_Score(), *numbers, *others])
        if not isinstance(made, _Score):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{function} does not depend on the score")
        for finite in (made.factor, made.outer or 1.0):
            if not 0 < abs(finite) < math.inf:
                raise _RefusedError(Reason.ATTENTION_FORM, f"{function} scales by {finite}")
        return made

    def mask(self, blocks: tuple[Any, ...], others: tuple[Any, ...], score: _Score) -> fx.Node | None:
        """The positions that a block mask and the conditions on the score admit, with what is added to the score."""
        numbers = [_At(node) for node in self.numbers]
        made = self._run(blocks[-1], [*numbers, *others])
        admitted = None if constant(made) == 1 else self._tensor(made)
        if admitted is not None and dtype(admitted) != torch.bool:
            raise _RefusedError(Reason.MASK_FORM, f"{blocks[-1]} is {dtype(admitted)}")
        listed = self._listed(blocks[2], blocks[3], blocks[-3:-1])
        if listed is not None:
            admitted = self._both(admitted, listed)
            if blocks[4] is not None:
                full = self._listed(blocks[4], blocks[5], blocks[-3:-1])
                admitted = None if full is None else computed(self.graph, aten.logical_or.default, admitted, full)
        for condition in score.conditions:
            admitted = self._both(admitted, condition)
        added: fx.Node | None = None
        for term, factor in score.terms:
            scaled = computed(self.graph, aten.to.dtype, term, torch.float32)
            if factor != 1:
                scaled = computed(self.graph, aten.mul.Tensor, scaled, factor)
            added = scaled if added is None else computed(self.graph, aten.add.Tensor, added, scaled)
        if added is None:
            mask = admitted
        elif admitted is None:
            mask = added
        else:
            hidden = computed(self.graph, aten.logical_not.default, admitted)
            nothing = computed(self.graph, aten.full.default, [], -math.inf, dtype=torch.float32, device=self.device)
            mask = computed(self.graph, aten.where.self, hidden, nothing, added)
        if mask is None or known(shape(mask)[3] == self.sizes[3]):
            return mask
        return computed(self.graph, aten.expand.default, mask, [-1, -1, -1, self._size(self.sizes[3])])

    def _both(self, left: fx.Node | None, right: fx.Node) -> fx.Node:
        return right if left is None else computed(self.graph, aten.logical_and.default, left, right)

    def _listed(self, counts: fx.Node, indices: fx.Node, block: tuple[Int, Int]) -> fx.Node | None:
        """Whether the block of each position is listed for its queries; None: all are.

        Args:
            counts: [batch | 1, heads | 1, query blocks], number of listed key blocks.
            indices: [batch | 1, heads | 1, query blocks, key blocks], theirs first.
            block: queries and keys of a block.
        """
        sizes = shape(indices)
        blocks = sizes[-1]
        covered = [
            known(n * size_of(of) >= whole) for n, of, whole in zip(sizes[2:], block, self.sizes[2:], strict=True)
        ]
        if not all(covered):
            raise _RefusedError(Reason.UNDECIDED_SIZE, f"{list(sizes)} blocks of {block} for {list(self.sizes)}")
        if known(blocks == 1) and _all_are(counts, 1) and _all_are(indices, 0):
            return None
        order = computed(self.graph, aten.arange.default, self._size(blocks), device=self.device)
        counts = computed(self.graph, aten.unsqueeze.default, counts, -1)
        mine = computed(self.graph, aten.to.dtype, computed(self.graph, aten.lt.Tensor, order, counts), torch.int32)
        # What is not listed may be any number.
        places = computed(self.graph, aten.to.dtype, indices, torch.int64)
        places = computed(self.graph, aten.remainder.Scalar, places, self._size(blocks))
        none = computed(self.graph, aten.zeros_like.default, mine)
        found = computed(self.graph, aten.scatter_add.default, none, -1, places, mine)
        found = computed(self.graph, aten.gt.Scalar, found, 0)
        at: list[fx.Node] = []
        for axis in range(2):
            if not known(sizes[axis] == 1) and not known(sizes[axis] == self.sizes[axis]):
                raise _RefusedError(Reason.MASK_FORM, f"block mask of {list(sizes[:2])} for {list(self.sizes[:2])}")
            if known(sizes[axis] == 1):
                at.append(computed(self.graph, aten.full.default, [], 0, dtype=torch.int64, device=self.device))
            else:
                at.append(self.numbers[axis])
        pairs = zip(self.numbers[2:], block, strict=True)
        at += (computed(self.graph, aten.floor_divide.Scalar, number, size) for number, size in pairs)
        return computed(self.graph, aten.index.Tensor, found, at)

    # --------------------------------------------------------------------------------------------- functions on scalars

    def _run(self, function: fx.Node, arguments: list[Any]) -> Any:
        """What a graph on scalars returns: a `_Score`, an `_At`, or a value that is the same at all positions."""
        module: Any = getattr(function.graph.owning_module, str(function.target))
        values: dict[fx.Node, Any] = dict(zip(module.graph.find_nodes(op="placeholder"), arguments, strict=True))
        for node in module.graph.nodes:
            if node.op == "get_attr":
                values[node] = self._constant(getattr(module, str(node.target)), node)
            elif node.op == "call_function":
                values[node] = self._step(node, values)
        result: Any = module.graph.output_node().args[0]
        return values[result[0] if isinstance(result, list | tuple) else result]

    def _constant(self, tensor: object, node: fx.Node) -> fx.Node:
        if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} is a tensor of many numbers")
        sizes, number = list(tensor.shape), tensor.item()
        return computed(self.graph, aten.full.default, sizes, number, dtype=tensor.dtype, device=self.device)

    def _step(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        inside = [values[n] for n in node.all_input_nodes]
        if any(isinstance(x, _Score) for x in inside):
            return self._on_score(node, values)
        varies = any(isinstance(x, _At | _Taken) for x in inside)
        if varies and node.target is aten.index.Tensor:
            return self._take(node, values)
        if varies and node.target in _MADE and shape(node) == ():
            number, kind = _MADE[node.target], dtype(node)
            return computed(self.graph, aten.full.default, [], number, dtype=kind, device=self.device)
        pointwise = node.target in _SCALAR or torch.Tag.pointwise in getattr(node.target, "tags", ())
        if node.target is aten.to.dtype_layout and not same_device(node):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} goes to another device")
        if _compat.is_random(node.target) or (varies and not (pointwise and shape(node) == ())):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} is no function of single positions")

        def given(n: fx.Node) -> Any:
            value = values[n]
            number = isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), torch.Tensor)
            return self._tensor(value) if varies and not number and not isinstance(value, int | float) else value

        args, kwargs = fx.map_arg((node.args, node.kwargs), given)
        made = computed(self.graph, node.target, *args, **kwargs)
        return _At(made) if varies else made

    def _tensor(self, value: Any) -> fx.Node:
        """A scalar as a tensor of 4 dims, so that types are promoted as among scalars."""
        if isinstance(value, _At):
            return value.tensor
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor) or shape(value) != ():
            raise _RefusedError(Reason.ATTENTION_FORM, f"{value} is not one number for each position")
        return self._raised(value, [1, 1, 1, 1])

    def _take(self, node: fx.Node, values: dict[fx.Node, Any]) -> _At | _Taken:
        """Numbers for the first dims of a tensor from outside."""
        source, indices = values[argument(node, "self")], argument(node, "indices")
        taken = source if isinstance(source, _Taken) else _Taken(source, ())
        if not isinstance(taken.tensor, fx.Node) or any(index is None for index in indices):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} takes more than one number for each position")
        taken = _Taken(taken.tensor, (*taken.indices, *(self._tensor(values[index]) for index in indices)))
        if len(taken.indices) < len(shape(taken.tensor)):
            return taken
        return _At(computed(self.graph, aten.index.Tensor, taken.tensor, list(taken.indices)))

    def _on_score(self, node: fx.Node, values: dict[fx.Node, Any]) -> _Score:
        """What a step makes of the score."""
        if node.target in _MOVES and (element := dtype(node)) is not None and element.is_floating_point:
            return values[operand(node)]
        if node.target is aten.neg.default:
            return values[operand(node)].scaled(-1)
        if node.target is aten.tanh.default:
            score = values[operand(node)]
            if score.outer is None and not score.terms and not score.conditions:
                return _Score(score.factor, 1.0)
        elif node.target in _CHOOSING:
            return self._chosen(node, values)
        elif node.target in _ADDING | _SCALING:
            left, right = self._given(node, values)[:2]
            if node.target in _REVERSED:
                left, right = right, left
            score, other = (left, right) if isinstance(left, _Score) else (right, left)
            number = constant(other)
            first = score is left
            if isinstance(other, _Score):
                pass
            elif node.target in _SCALING and number and (first or node.target in _PRODUCTS):
                return score.scaled(number if node.target in _PRODUCTS else 1 / number)
            elif node.target in _ADDING and argument(node, "alpha") == 1:
                minus = node.target not in _SUMS
                score = score if first or not minus else score.scaled(-1)
                term = self._added(other)
                return replace(score, terms=(*score.terms, (term, -1.0 if first and minus else 1.0)))
        raise _RefusedError(Reason.ATTENTION_FORM, f"{node} is another function of the score than factor, tanh and sum")

    @staticmethod
    def _given(node: fx.Node, values: dict[fx.Node, Any]) -> list[Any]:
        return [values[x] if isinstance(x, fx.Node) else x for x in node.args]

    def _added(self, value: Any) -> fx.Node:
        if isinstance(value, int | float):
            value = computed(self.graph, aten.full.default, [], value, dtype=torch.float32, device=self.device)
        return self._tensor(value)

    def _chosen(self, node: fx.Node, values: dict[fx.Node, Any]) -> _Score:
        """The score where a condition holds, and nothing, -inf, elsewhere."""
        condition, left, right = self._given(node, values)
        score, other = (left, right) if isinstance(left, _Score) else (right, left)
        if isinstance(condition, _Score) or constant(other) != -math.inf:
            raise _RefusedError(Reason.MASK_FORM, f"{node} puts something else than -inf in place of the score")
        where = self._tensor(condition)
        if score is right:
            where = computed(self.graph, aten.logical_not.default, where)
        return replace(score, conditions=(*score.conditions, where))


def _all_are(node: object, value: int) -> bool:
    """Whether a tensor is known to hold one number."""
    return constant(node) == value or (isinstance(node, fx.Node) and _FILLED.get(node.target) == value)
