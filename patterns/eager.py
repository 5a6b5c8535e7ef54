"""Attention spelled out: a softmax between two matrix products.

A sink (gpt-oss) is a learned logit of each query head beside those of the keys, without a value. It is spelled as a
column that joins the logits and is left out of the weights, or, as it takes the share 1 - p of every weight, as a
factor p = sigmoid(logsumexp(logits) - sink) of what comes out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from decoquant_compile.patterns.core import AttentionCore
from decoquant_compile.patterns.movement import (
    MOVEMENT,
    REGROUPING,
    Walk,
    constant,
    is_identity,
    moves,
    operand,
    peel,
    scaling,
    sliced,
)
from decoquant_compile.patterns.reject import Problem, Reason
from decoquant_compile.patterns.symbols import (
    Size,
    argument,
    computed,
    dtype,
    known,
    same_shape,
    shape,
)

aten = torch.ops.aten

SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
_PRODUCT = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
# What may stand between the first product and the softmax, and between the softmax and the second, besides pointwise
# operators, of something that is an attention although it may not be one that we can read.
_BETWEEN = {
    *MOVEMENT,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.dropout.default,
    aten.masked_fill.Tensor,
    aten.pad.default,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
}

_HIDDEN = -9000.0
"""A logit replaced by at most this has no weight beside others: conventions go from -10000 (-9984 in bfloat16)."""

_SHIFT = 1000.0
"""At most this is added to all logits: what is put in place of others must stay far below."""

_VERY_NEGATIVE = -1e30
"""Every logit vanishes in a sum with this or less: what is put in place of a logit can as well be added to it.

That matters to a query with nothing else to attend to, which weighs all columns with the same replacement alike. A
larger replacement that all of them share, as is usual, may be lowered to this, but not where it meets other masks."""


def is_attention(softmax: fx.Node) -> bool:
    """Whether a softmax turns products into weights of a product, as attention does and a router does not."""
    return bool(_leads_back(softmax.args[0]) and products_after(softmax))


def products_after(softmax: fx.Node) -> set[fx.Node]:
    """The matrix products that the weights of a softmax flow into."""
    return _products(list(softmax.users), back=False)


def computed_numbers(softmax: fx.Node) -> set[fx.Node]:
    """The numbers, not known before the graph runs, on the way from the product to the softmax of an attention."""
    passed: set[fx.Node] = set()
    _products([argument(softmax, "self")], back=True, seen=passed)
    inputs = {n for node in passed for n in node.all_input_nodes}
    return {n for n in inputs if isinstance(n.meta.get("val"), torch.SymFloat)}


def read(softmax: fx.Node) -> AttentionCore | Problem:
    """Read an attention around its softmax.

    The views, and the mask in one piece, that the attention needs are added to the graph where it has none; nothing in
    it uses them.

    Args:
        softmax: a node for which `is_attention` holds.
    """
    try:
        return _Reading(softmax).core()
    except _RefusedError as refused:
        return refused.problem


class _RefusedError(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.problem = Problem(reason, detail)


@dataclass(frozen=True)
class _Product:
    """A matrix product as Einstein sum: one letter for each dim."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    letters: tuple[str, str]
    out: str


_Rows: TypeAlias = tuple[Any, fx.Node, int]
"""What scales logits by a tensor that is the same for all keys: operator, tensor, dims of the logits."""


@dataclass(frozen=True)
class _Term:
    """Something added to the logits, or put in place of some, or a bound from below.

    Attributes:
        tensor: what is added, or where it replaces; broadcasts to logits of `rank` dims. None: a bound.
        rank: dims of the logits there.
        factor: of the tensor; or the value that replaces; or the bound.
        where: which elements of a boolean tensor are replaced; None: the tensor is added.
        half: the sum is in float16, where logits vanish in the least number.
        rows: what scales the logits afterwards, as in `_Logits`.
    """

    tensor: fx.Node | None
    rank: int
    factor: float
    where: bool | None = None
    half: bool = False
    rows: tuple[_Rows, ...] = ()


@dataclass(frozen=True)
class _Sink:
    """A column beside the logits of the keys.

    Attributes:
        tensor: broadcasts to logits of `rank` dims and one key.
        rank: dims of the logits there.
        factor: of the tensor.
    """

    tensor: fx.Node
    rank: int
    factor: float


@dataclass
class _Logits:
    """What happens to the product of queries and keys before the softmax, gathered from the softmax backwards."""

    factor: float = 1.0
    softcap: float | None = None
    terms: list[_Term] = field(default_factory=list)  # the last applied first
    rows: list[_Rows] = field(default_factory=list)  # the last applied first
    sink: _Sink | None = None

    def scale(self, factor: float) -> None:
        self.factor *= factor

    def scale_rows(self, target: Any, tensor: fx.Node, rank: int) -> None:
        self.rows.append((target, tensor, rank))

    def shift(self, value: float) -> None:
        """A softmax does not see what is added to all."""
        if self.softcap is not None or self.sink is not None or not abs(value * self.factor) <= _SHIFT:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{value:g} is added to the logits")

    def shift_rows(self, node: fx.Node) -> None:
        """Nor what is added to all of a query, however large, unless something else follows."""
        if self.softcap is not None or self.sink is not None or self.rows or self.terms:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} moves the logits before they are masked, or capped")

    def join(self, tensor: fx.Node, rank: int) -> None:
        if self.softcap is not None or self.sink is not None or self.rows or self.terms:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{tensor} joins the logits before they are masked, or capped")
        self.sink = _Sink(tensor, rank, self.factor)

    def cap(self, node: fx.Node) -> None:
        """`a * tanh(b * x)` is a softcap of `|a|` over logits `a * b * x`."""
        if self.softcap is not None or self.rows or not 0 < abs(self.factor) < math.inf:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} is not scaled by one number, or not the only one")
        self.softcap = abs(self.factor)

    def add(self, node: fx.Node, tensor: fx.Node, factor: float) -> None:
        self._uncapped(tensor)
        half = dtype(node) == dtype(tensor) == torch.float16
        self.terms.append(_Term(tensor, len(shape(node)), self.factor * factor, half=half, rows=tuple(self.rows)))

    def replace(self, tensor: fx.Node, rank: int, value: float, where: bool) -> None:
        self._uncapped(tensor)
        value *= self.factor
        if not (value <= (_VERY_NEGATIVE if self.rows else _HIDDEN) and self.factor > 0):
            raise _RefusedError(Reason.MASK_FORM, f"masked logits become {value:g}, which does not hide them")
        value = value if value >= torch.finfo(torch.float32).min else -math.inf
        self.terms.append(_Term(tensor, rank, value, where, rows=tuple(self.rows)))

    def bound(self, node: fx.Node, rank: int, value: float) -> None:
        """A bound too low for logits is one for what masks them."""
        self._uncapped(node)
        value *= self.factor
        if self.rows or not (value <= _VERY_NEGATIVE and self.factor > 0):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} bounds the logits by {value:g}")
        self.terms.append(_Term(None, rank, value))

    def _uncapped(self, tensor: fx.Node) -> None:
        if self.softcap is not None:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{tensor} masks logits that are capped")


class _Reading:
    """One attention being read.

    Logits and weights have their queries and keys last (an Einstein sum may have another order), after 1 leading dim
    (batches and heads in one), 2 (batches, heads) or 3 (batches, key-value heads, query heads of each).
    """

    def __init__(self, softmax: fx.Node) -> None:
        self.softmax = softmax
        self.graph = softmax.graph
        self.path: list[fx.Node] = []  # the softmax, what it is made from, and its weights
        self.logits = _Logits()
        self.beside: list[fx.Node] = []  # what else is made of the logits and accounted for
        self.order: list[int] = []  # of the dims of the logits, where queries are not the last but one

    def core(self) -> AttentionCore:
        axis, rank = argument(self.softmax, "dim"), len(shape(self.softmax))
        if axis % rank != rank - 1:
            raise _RefusedError(Reason.ATTENTION_FORM, f"softmax over dim {axis} of {rank}")
        first = self._back()
        weights, second = self._forward()
        node = self._scaled_by_sink(second)
        ours = {*self.path, *self.beside, second.node}
        for made in (*self.path, *self.beside):
            if others := [user for user in _users(made) if user not in ours and user is not node]:
                raise _RefusedError(Reason.WEIGHTS_ESCAPE, f"{made} is used by {others[0]}")
        key_side = 0 if first.out[-1] in first.letters[0] else 1
        self._set_order(first, 1 - key_side)
        self._set_heads()
        with self.graph.inserting_before(second.node):
            query = self._query(first, 1 - key_side)
            key, shared = self._key(first, key_side)
            value, result = self._value(second, weights)
            mask = self._mask()
            sink = self._sink()
        if node is not second.node and result:
            raise _RefusedError(Reason.LAYOUT, f"{node} scales another order of dims")
        if dtype(query) != dtype(node):
            result = (*result, (aten.to.dtype, (dtype(node),)))
        capped = self.logits.softcap
        scale = self.logits.factor
        if not math.isfinite(scale):
            raise _RefusedError(Reason.ATTENTION_FORM, f"the logits are scaled by {scale}")
        return AttentionCore(node, query, key, value, mask, False, scale, shared, "eager", capped, sink, result)

    # -------------------------------------------------------------------------------------------------- along the path

    def _back(self) -> _Product:
        """From the softmax to the product of queries and keys."""
        self.path.append(self.softmax)
        node = self.softmax.args[0]
        assert isinstance(node, fx.Node)
        while node.target not in _PRODUCT:
            self.path.append(node)
            node = self._before(node)
        self.path.append(node)
        if node.target is aten.baddbmm.default:
            beta, alpha = argument(node, "beta"), argument(node, "alpha")
            if not isinstance(beta, int | float) or not isinstance(alpha, int | float):
                raise _RefusedError(Reason.ATTENTION_FORM, f"{node} scales by {beta} and {alpha}")
            if beta != 0:
                self.logits.add(node, argument(node, "self"), beta)
            self.logits.scale(alpha)
        return _product(node)

    def _before(self, node: fx.Node) -> fx.Node:
        """What a step on the way of the logits is made from."""
        rank = len(shape(node))
        if _keeps_pairs(node):
            return operand(node)
        if (by := scaling(node)) is not None:
            source, factor = by
            self.logits.scale(factor)
            return source
        if node.target in {aten.mul.Tensor, aten.div.Tensor}:
            source, other = self._sides(node, ordered=node.target is aten.div.Tensor)
            if (
                not isinstance(other, fx.Node)
                or dtype(other) is None
                or (shape(other) and not known(shape(other)[-1] == 1))
            ):
                raise _RefusedError(Reason.ATTENTION_FORM, f"the logits are scaled by {other}")
            self.logits.scale_rows(node.target, other, rank)
        elif node.target in {aten.add.Tensor, aten.sub.Tensor}:
            minus = node.target is aten.sub.Tensor
            source, other = self._sides(node, ordered=minus or argument(node, "alpha") != 1)
            alpha = argument(node, "alpha")
            if not isinstance(alpha, int | float):
                raise _RefusedError(Reason.ATTENTION_FORM, f"{node} scales by {alpha}")
            if (shift := constant(other)) is not None:
                self.logits.shift(-shift if minus else shift)
            elif maximum := _row_maximum(other, source):
                self.logits.shift_rows(node)
                self.beside += maximum
            elif isinstance(other, fx.Node):
                self.logits.add(node, other, -alpha if minus else alpha)
            else:
                raise _RefusedError(Reason.ATTENTION_FORM, f"{other} is added to the logits")
        elif node.target in {aten.cat.default, aten.pad.default, aten.constant_pad_nd.default}:
            return self._joined(node)
        elif node.target is aten.tanh.default:
            source = operand(node)
            self.logits.cap(node)
        elif node.target in {aten.max.other, aten.maximum.default, aten.clamp_min.default}:
            source, other = self._sides(node, ordered=False)
            if (value := constant(other)) is None:
                raise _RefusedError(Reason.ATTENTION_FORM, f"{node} bounds the logits by {other}")
            self.logits.bound(node, rank, value)
        elif node.target in {aten.masked_fill.Scalar, aten.masked_fill.Tensor}:
            source = argument(node, "self")
            self._replaced(node, argument(node, "mask"), argument(node, "value"), where=True)
        elif node.target in {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}:
            chosen, other = argument(node, "self"), argument(node, "other")
            back = isinstance(chosen, fx.Node) and bool(_leads_back(chosen))
            source, value = (chosen, other) if back else (other, chosen)
            self._replaced(node, argument(node, "condition"), value, where=not back)
        else:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} stands between the product and the softmax")
        if not isinstance(source, fx.Node) or not same_shape(shape(source), shape(node)):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} has more elements than the logits that it is made from")
        return source

    def _sides(self, node: fx.Node, *, ordered: bool) -> tuple[fx.Node, object]:
        """The operand that is the logits, and the other."""
        left, right = node.args[:2]
        back = [isinstance(x, fx.Node) and bool(_leads_back(x)) for x in (left, right)]
        if all(back):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} joins two products")
        if back[1] and ordered:
            raise _RefusedError(Reason.ATTENTION_FORM, f"the logits are the second operand of {node}")
        logits, other = (right, left) if back[1] else (left, right)
        assert isinstance(logits, fx.Node)
        return logits, other

    def _replaced(self, node: fx.Node, mask: fx.Node, by: object, *, where: bool) -> None:
        value = constant(by)
        if value is None:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} puts {by} in place of logits")
        self.logits.replace(mask, len(shape(node)), value, where)

    def _joined(self, node: fx.Node) -> fx.Node:
        """The logits that a sink joins as their first or last column."""
        rank = len(shape(node))
        if node.target is not aten.cat.default:
            return self._padded(node)
        parts = argument(node, "tensors")
        logits = [part for part in parts if _leads_back(part)]
        if len(parts) != 2 or len(logits) != 1 or argument(node, "dim") % rank != rank - 1:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} joins more than logits and a sink")
        self.sink_first = parts[1] is logits[0]
        sink = parts[0 if self.sink_first else 1]
        if not known(shape(sink)[-1] == 1):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} joins {shape(sink)[-1]} columns to the logits")
        self.logits.join(sink, rank)
        return logits[0]

    def _padded(self, node: fx.Node) -> fx.Node:
        """The logits beside which a padding puts a number: a sink of all heads."""
        pad, value, mode = argument(node, "pad"), argument(node, "value"), "constant"
        if node.target is aten.pad.default:
            mode = argument(node, "mode")
        if mode != "constant" or pad[2:] != [0] * len(pad[2:]) or pad[:2] not in ([0, 1], [1, 0]):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} joins more than logits and a sink")
        self.sink_first = pad[0] == 1
        with self.graph.inserting_before(node):
            device = node.meta["val"].device
            sink = computed(self.graph, aten.full.default, [1], value or 0.0, dtype=torch.float32, device=device)
        self.logits.join(sink, len(shape(node)))
        return operand(node)

    def _leaves_sink_out(self, node: fx.Node) -> bool:
        """Whether a node takes all weights but those of the sink."""
        if node.target is not aten.slice.Tensor or argument(node, "dim") % len(shape(node)) != len(shape(node)) - 1:
            return False
        span = sliced(node)
        one_less = known(shape(node)[-1] + 1 == shape(operand(node))[-1])
        return span is not None and one_less and span.first == int(self.sink_first)

    def _forward(self) -> tuple[fx.Node, _Product]:
        """From the softmax to the product of weights and values."""
        weights = self.softmax
        whole = self.logits.sink is not None
        while True:
            users = _users(weights)
            if len(users) != 1:
                raise _RefusedError(Reason.WEIGHTS_ESCAPE, f"{weights} is used by {', '.join(u.name for u in users)}")
            node = users[0]
            if node.target in _PRODUCT and node.target is not aten.baddbmm.default:
                if whole:
                    raise _RefusedError(Reason.ATTENTION_FORM, f"{self.logits.sink} has a value")
                return weights, _product(node)
            if whole and self._leaves_sink_out(node):
                whole = False
                self.path.append(node)
                weights = node
                continue
            if node.target is aten.dropout.default:  # one that does nothing is not in a normal graph
                raise _RefusedError(Reason.DROPOUT, f"{node} of {argument(node, 'p')}")
            if not _keeps_pairs(node):
                raise _RefusedError(Reason.ATTENTION_FORM, f"{node} stands between the softmax and the values")
            self.path.append(node)
            weights = node

    def _scaled_by_sink(self, second: _Product) -> fx.Node:
        """The node that scales the product by `sigmoid(logsumexp(logits) - sink)`; the product if there is none."""
        scaled = _users(second.node)
        if len(scaled) != 1 or scaled[0].target is not aten.mul.Tensor:
            return second.node
        left, right = scaled[0].args
        share: Any = right if left is second.node else left
        of_share = peel(share) if isinstance(share, fx.Node) else None
        if of_share is None or of_share.source.target is not aten.sigmoid.default:
            return second.node
        of_sigmoid = peel(operand(of_share.source))
        difference = of_sigmoid.source
        if difference.target is not aten.sub.Tensor or not all(isinstance(x, fx.Node) for x in difference.args):
            return second.node
        of_difference, sink = peel(operand(difference)), argument(difference, "other")
        sums, logits, rank = of_difference.source, self.path[1], len(shape(self.softmax))
        if sums.target is not aten.logsumexp.default or operand(sums) is not logits:
            return second.node
        walks = of_share, of_sigmoid, of_difference
        fits = (
            same_shape(shape(share), (*shape(logits)[:-1], 1))
            and same_shape(shape(scaled[0]), shape(second.node))
            and same_shape(shape(difference), shape(operand(difference)))
        )
        if not fits or self.logits.sink is not None or not all(_in_order(walk) for walk in walks):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{scaled[0]} scales by what is not the share of a sink")
        if len(shape(sums)) < rank:
            with self.graph.inserting_before(second.node):
                sink = computed(self.graph, aten.unsqueeze.default, sink, -1)
        self.logits.sink = _Sink(sink, rank, 1.0)
        self.beside += [sums, difference, of_share.source, *(node for walk in walks for node in walk.nodes)]
        return scaled[0]

    # -------------------------------------------------------------------------------------------------------- the dims

    def _set_order(self, first: _Product, side: int) -> None:
        """Find the dim of the queries: those that only the query has, and the last but one if there is a choice."""
        out, key = first.out, first.letters[1 - side]
        mine = [letter for letter in out[:-1] if letter in first.letters[side] and letter not in key]
        if out[-2] in mine or first.node.target is not aten.einsum.default:
            self.order = list(range(len(out)))
            return
        if len(mine) != 1 or any(len(shape(node)) != len(out) for node in self.path):
            raise _RefusedError(Reason.ATTENTION_FORM, f"the order of the dims of {first.node} is not understood")
        at = out.index(mine[0])
        self.order = [*(d for d in range(len(out) - 1) if d != at), at, len(out) - 1]

    def _set_heads(self) -> None:
        """Number of batches, heads, and query heads of each key-value head, from the logits and weights on the way."""
        self.batch: Size = 0
        self.heads: Size = 0
        self.split: tuple[Size, Size] | None = None
        seen = False
        for node in self.path:
            sizes = self._ordered_sizes(node)
            if len(sizes) not in (3, 4, 5):
                raise _RefusedError(Reason.ATTENTION_RANK, f"{node} has {len(sizes)} dims")
            if len(sizes) == 3:
                continue
            heads = sizes[1] if len(sizes) == 4 else sizes[1] * sizes[2]
            if not seen:
                seen, self.batch, self.heads = True, sizes[0], heads
            split = (sizes[1], sizes[2]) if len(sizes) == 5 else self.split
            fits = known(sizes[0] == self.batch) and known(heads == self.heads)
            if not fits or (self.split is not None and not same_shape(self.split, split or ())):
                raise _RefusedError(Reason.LAYOUT, f"{node} splits batches and heads in another way")
            self.split = split
        if not seen:
            raise _RefusedError(Reason.ATTENTION_RANK, f"{self.softmax} has 3 dims")

    def _ordered_sizes(self, node: fx.Node) -> tuple[Size, ...]:
        sizes = shape(node)
        return tuple(sizes[d] for d in self.order) if len(sizes) == len(self.order) else sizes

    def _leading(self, first: _Product) -> str:
        return "".join(first.out[d] for d in self.order[:-2])

    def _query(self, first: _Product, side: int) -> fx.Node:
        leading, letters = self._leading(first), first.letters[side]
        contracted = self._contracted(first)
        query = self._arrange(first.operands[side], letters, leading + first.out[self.order[-2]] + contracted)
        sizes = shape(first.node)
        if len(leading) + 2 != len(letters) or not same_shape(
            shape(query)[:-1], tuple(sizes[d] for d in self.order[:-1])
        ):
            raise _RefusedError(Reason.LAYOUT, f"queries of shape {list(shape(query))} for {list(sizes)}")
        query = self._unfold(query, whole=True)
        for target, tensor, rank in self.logits.rows:
            query = computed(self.graph, target, query, self._four_dims(tensor, rank))
        return query

    def _key(self, first: _Product, side: int) -> tuple[fx.Node, bool]:
        letters = self._leading(first) + first.out[-1] + self._contracted(first)
        key = self._arrange(first.operands[side], first.letters[side], letters)
        self._check_leading(key, [shape(first.node)[d] for d in self.order[:-2]])
        return self._unfold(key), len(shape(key)) == 5

    def _value(self, second: _Product, weights: fx.Node) -> tuple[fx.Node, tuple[tuple[Any, tuple[Any, ...]], ...]]:
        """The values, and how the product's own shape is made."""
        sides = [i for i in (0, 1) if second.operands[i] is weights]
        if len(sides) != 1:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{second.node} is not a product of weights and values")
        mine, theirs = second.letters[sides[0]], second.letters[1 - sides[0]]
        straight = list(range(len(mine)))
        order = self.order if len(mine) == len(self.order) else straight
        *leading, query, key = (mine[d] for d in order)
        channels = [letter for letter in second.out if letter not in mine]
        if key in second.out or key not in theirs or query in theirs or len(channels) != 1:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{second.node} is not a product of weights and values")
        made = [*leading, query, channels[0]]
        if sorted(made) != sorted(second.out) or not set(theirs) <= {*leading, key, channels[0]}:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{second.node} sums over more than the keys")
        value = self._arrange(second.operands[1 - sides[0]], theirs, "".join([*leading, key, channels[0]]))
        self._check_leading(value, list(self._ordered_sizes(weights)[:-2]))
        result: list[tuple[Any, tuple[Any, ...]]] = []
        if len(leading) == 1:
            result.append((aten.flatten.using_ints, (0, 1)))
        elif len(leading) == 3:
            assert self.split is not None
            result.append((aten.unflatten.int, (1, self._sizes(*self.split))))
        if made != list(second.out):
            result.append((aten.permute.default, ([made.index(letter) for letter in second.out],)))
        return self._unfold(value), tuple(result)

    def _contracted(self, first: _Product) -> str:
        summed = [x for x in first.letters[0] if x in first.letters[1] and x not in first.out]
        lost = [x for x in {*first.letters[0], *first.letters[1]} if x not in first.out]
        if len(summed) != 1 or summed != lost:
            raise _RefusedError(Reason.ATTENTION_FORM, f"{first.node} is not a product over channels")
        return summed[0]

    # --------------------------------------------------------------------------------------------- views and the mask

    def _arrange(self, node: fx.Node, letters: str, wanted: str) -> fx.Node:
        """Bring dims into an order; those that a tensor lacks get size 1."""
        present = [letter for letter in wanted if letter in letters]
        if len(present) != len(letters):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node} has dims that the attention has not")
        order = [letters.index(letter) for letter in present]
        if order != sorted(order):
            node = computed(self.graph, aten.permute.default, node, order)
        for at, letter in enumerate(wanted):
            if letter not in letters:
                node = computed(self.graph, aten.unsqueeze.default, node, at)
        return node

    def _check_leading(self, node: fx.Node, whole: list[Size]) -> None:
        """Keys and values are as many as the logits' heads, or fewer and broadcast."""
        sizes = shape(node)[:-2]
        fits = [known(a == b) for a, b in zip(sizes, whole, strict=True)]
        if len(whole) == 3:
            fine = fits[0] and (known(sizes[2] == 1) or (fits[1] and fits[2]))
        else:
            fine = fits[0] and (all(fits) or known(sizes[1] == 1))
        if not fine:
            raise _RefusedError(Reason.LAYOUT, f"{node} of shape {list(shape(node))} for {list(whole)}")

    def _unfold(self, node: fx.Node, *, whole: bool = False) -> fx.Node:
        """Make the leading dims batches and heads.

        Args:
            node: with 1, 2 or 3 leading dims.
            whole: the third is never left out: these are queries.
        """
        if len(shape(node)) == 3:
            return computed(self.graph, aten.unflatten.int, node, 0, self._sizes(self.batch, self.heads))
        if len(shape(node)) == 5:
            if not whole and known(shape(node)[2] == 1):
                return computed(self.graph, aten.squeeze.dim, node, 2)
            return computed(self.graph, aten.flatten.using_ints, node, 1, 2)
        return node

    @staticmethod
    def _sizes(outer: Size, inner: Size) -> list[int]:
        """Sizes of a dim in two, as constants."""
        if isinstance(inner, int):
            return [-1, inner]
        if isinstance(outer, int):
            return [outer, -1]
        raise _RefusedError(Reason.UNDECIDED_SIZE, f"{outer} times {inner} in one dim")

    def _four_dims(self, node: fx.Node, rank: int) -> fx.Node:
        """A tensor that broadcasts to logits of a rank as one that broadcasts to [batch, heads, queries, keys]."""
        if len(shape(node)) <= 1:
            return node
        if rank == len(self.order) and self.order != sorted(self.order):
            while len(shape(node)) < rank:
                node = computed(self.graph, aten.unsqueeze.default, node, 0)
            node = computed(self.graph, aten.permute.default, node, self.order)
        sizes = shape(node)
        if rank == 3 and len(sizes) == 3 and not known(sizes[0] == 1):
            return computed(self.graph, aten.unflatten.int, node, 0, self._sizes(self.batch, self.heads))
        if rank == 5 and len(sizes) >= 3:
            while len(shape(node)) < rank:
                node = computed(self.graph, aten.unsqueeze.default, node, 0)
            sizes = shape(node)
            if known(sizes[1] == 1) and known(sizes[2] == 1):
                return computed(self.graph, aten.squeeze.dim, node, 2)
            assert self.split is not None
            if not all(isinstance(n, int) for n in self.split):
                raise _RefusedError(Reason.UNDECIDED_SIZE, f"{self.split} heads in {node}")
            node = computed(self.graph, aten.expand.default, node, [-1, *self.split, -1, -1])
            return computed(self.graph, aten.flatten.using_ints, node, 1, 2)
        return node

    def _sink(self) -> fx.Node | None:
        """One logit for each query head."""
        sink = self.logits.sink
        if sink is None:
            return None
        node = self._four_dims(sink.tensor, sink.rank)
        while len(shape(node)) < 4:
            node = computed(self.graph, aten.unsqueeze.default, node, 0)
        batch, _, query, _ = peel(node).axes.dims
        if any(isinstance(atom, int) for atom in (*batch, *query)):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{sink.tensor} is another sink for each batch or query")
        for dim in (0, 1, 1):
            node = computed(self.graph, aten.select.int, node, dim, 0)
        if known(shape(node)[0] == 1) and not known(self.heads == 1):
            if not isinstance(self.heads, int):
                raise _RefusedError(Reason.UNDECIDED_SIZE, f"{self.heads} heads share {sink.tensor}")
            node = computed(self.graph, aten.expand.default, node, [self.heads])
        if dtype(node) != torch.float32:
            node = computed(self.graph, aten.to.dtype, node, torch.float32)
        return node if sink.factor == 1 else computed(self.graph, aten.mul.Tensor, node, sink.factor)

    def _mask(self) -> fx.Node | None:
        """All terms in one."""
        terms = self.logits.terms
        large = {t.factor for t in terms if t.where is not None and t.factor > _VERY_NEGATIVE}
        if len(large) > 1 or (large and any(t.where is None for t in terms)):
            raise _RefusedError(Reason.MASK_FORM, f"{max(large):g} in place of logits meets another mask")
        if len(terms) == 1 and terms[0].tensor and terms[0].where is not None and terms[0].factor == -math.inf:
            mask = self._four_dims(terms[0].tensor, terms[0].rank)
            return computed(self.graph, aten.logical_not.default, mask) if terms[0].where else mask
        made: fx.Node | None = None
        for term in reversed(terms):
            if term.tensor is None:
                if made is not None:
                    made = computed(self.graph, aten.clamp_min.default, made, term.factor)
                continue
            tensor = self._four_dims(term.tensor, term.rank)
            element = dtype(tensor)
            if term.where is None:
                if element is None or not element.is_floating_point:
                    raise _RefusedError(Reason.MASK_FORM, f"{term.tensor} of {element} is added to the logits")
                if term.half:
                    least = computed(self.graph, aten.eq.Scalar, tensor, torch.finfo(torch.float16).min)
                    tensor = computed(self.graph, aten.to.dtype, tensor, torch.float32)
                    tensor = computed(self.graph, aten.masked_fill.Scalar, tensor, least, _VERY_NEGATIVE)
                if term.factor != 1:
                    tensor = computed(self.graph, aten.mul.Tensor, tensor, term.factor)
                tensor = self._scaled(tensor, term.rows)
                made = tensor if made is None else computed(self.graph, aten.add.Tensor, made, tensor)
                continue
            if element != torch.bool:
                raise _RefusedError(Reason.MASK_FORM, f"{term.tensor} of {element} chooses logits")
            if not term.where:
                tensor = computed(self.graph, aten.logical_not.default, tensor)
            if made is None:
                made = computed(self.graph, aten.zeros_like.default, tensor, dtype=torch.float32)
            elif dtype(made) != torch.float32:
                made = computed(self.graph, aten.to.dtype, made, torch.float32)
            number = min(term.factor, _VERY_NEGATIVE)
            if term.rows and number > -math.inf:
                device = tensor.meta["val"].device
                fill = computed(self.graph, aten.full.default, [1], number, dtype=torch.float32, device=device)
                made = computed(self.graph, aten.where.self, tensor, self._scaled(fill, term.rows), made)
            else:
                made = computed(self.graph, aten.masked_fill.Scalar, made, tensor, number)
        return made

    def _scaled(self, node: fx.Node, rows: Sequence[_Rows]) -> fx.Node:
        """What is added to the logits, or put in their place, before they are scaled."""
        for target, tensor, rank in reversed(rows):
            if dtype(node) != torch.float32:
                node = computed(self.graph, aten.to.dtype, node, torch.float32)
            node = computed(self.graph, target, node, self._four_dims(tensor, rank))
        return node


def _product(node: fx.Node) -> _Product:
    if node.target is aten.einsum.default:
        equation, tensors = str(argument(node, "equation")).replace(" ", ""), argument(node, "tensors")
        inputs, arrow, out = equation.partition("->")
        letters = inputs.split(",")
        words = (*letters, out)
        if len(letters) != 2 or not arrow or any(not w.isalpha() or len(set(w)) != len(w) for w in words):
            raise _RefusedError(Reason.ATTENTION_FORM, f"{node}: {equation}")
        alone = [{x for x in word if x not in other + out} for word, other in (letters, letters[::-1])]
        tensors = [_without(*of) for of in zip(tensors, letters, alone, strict=True)]
        letters = ["".join(x for x in word if x not in lone) for word, lone in zip(letters, alone, strict=True)]
        if len(out) < 3:
            raise _RefusedError(Reason.ATTENTION_RANK, f"{node} has {len(out)} dims")
        return _Product(node, (tensors[0], tensors[1]), (letters[0], letters[1]), out)
    left, right = node.args[1:3] if node.target is aten.baddbmm.default else node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    ranks = len(shape(left)), len(shape(right))
    if min(ranks) < 2 or max(ranks) > 5:
        raise _RefusedError(Reason.ATTENTION_RANK, f"{node} is a product of {ranks[0]} and {ranks[1]} dims")
    outer = "uvw"[: max(ranks) - 2]
    mine, theirs = (outer[len(outer) + 2 - rank :] for rank in ranks)
    return _Product(node, (left, right), (mine + "ij", theirs + "jk"), outer + "ik")


def _without(tensor: fx.Node, letters: str, alone: Collection[str]) -> fx.Node:
    """A tensor without dims that an Einstein sum takes from it alone, which are of size 1: one key-value head."""
    dims = [d for d, letter in enumerate(letters) if letter in alone]
    if not all(known(shape(tensor)[d] == 1) for d in dims):
        raise _RefusedError(Reason.ATTENTION_FORM, f"an einsum sums {tensor} over more than the channels")
    for dim in reversed(dims):
        with tensor.graph.inserting_after(tensor):
            tensor = computed(tensor.graph, aten.squeeze.dim, tensor, dim)
    return tensor


def _row_maximum(node: object, logits: object) -> list[fx.Node]:
    """The nodes that compute the maximum over the keys of some logits, if `node` is that."""
    found: list[fx.Node] = []
    while isinstance(node, fx.Node) and moves(node) and same_shape(shape(node), shape(operand(node))):
        found.append(node)
        node = operand(node)
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0:
        found.append(node)
        node = node.args[0]
        of_max = isinstance(node, fx.Node) and node.target is aten.max.dim
    else:
        of_max = isinstance(node, fx.Node) and node.target is aten.amax.default
    if not of_max or not isinstance(node, fx.Node) or node.args[0] is not logits:
        return []
    dims, rank = argument(node, "dim"), len(shape(operand(node)))
    last = [d % rank for d in (dims if isinstance(dims, list) else [dims])] == [rank - 1]
    return [*found, node] if last and argument(node, "keepdim") else []


def _users(node: fx.Node) -> list[fx.Node]:
    """What reads the elements of a node: to ask for its size does not."""
    return [user for user in node.users if user.target is not aten.sym_size.int]


def _in_order(walk: Walk) -> bool:
    """Whether a walk only casts, and adds or drops dims of size 1."""
    return is_identity(replace(walk, axes=replace(walk.axes, dtypes=walk.axes.dtypes[:1])))


def _keeps_pairs(node: fx.Node) -> bool:
    """Whether a node moves logits or weights at most from one leading dim to another, or casts them."""
    if not moves(node) or (element := dtype(node)) is None or not element.is_floating_point:
        return False
    before, after = shape(operand(node)), shape(node)
    if node.target in REGROUPING:
        return same_shape(before[-2:], after[-2:])
    return node.target in _SAME_PLACES and same_shape(before, after)


_SAME_PLACES = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.type_as.default,
    aten.expand.default,
    aten.slice.Tensor,
}


def _leads_back(node: object) -> set[fx.Node]:
    return _products([node], back=True) if isinstance(node, fx.Node) else set()


def _products(nodes: list[fx.Node], *, back: bool, seen: set[fx.Node] | None = None) -> set[fx.Node]:
    """The matrix products on the way back from, or forward to, some nodes; `seen` gets what lies on it."""
    found: set[fx.Node] = set()
    seen = set() if seen is None else seen
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _PRODUCT:
            found.add(node)
        elif node.target in _BETWEEN or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            todo += node.all_input_nodes if back else list(node.users)
    return found
