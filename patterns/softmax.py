"""Softmax spelled out: exponentials over their sum become the operator, where they are the weights of an attention."""

from __future__ import annotations

import operator

import torch
from torch import fx

from decoquant_compile.patterns import eager
from decoquant_compile.patterns.movement import plain
from decoquant_compile.patterns.symbols import argument, computed, shape

aten = torch.ops.aten

_LOG_SOFTMAX = {aten.log_softmax.int, aten._log_softmax.default}


def fold(graph: fx.Graph) -> None:
    """Put softmax operators in place of what computes the weights of attentions by hand.

    Read are exponentials of numbers less their greatest, over their sum; and those of numbers less the logarithm of
    the sum of their exponentials. Along the last dim these are what the operator computes, up to rounding.

    Args:
        graph: of functional ATen operators.
    """
    folded = False
    for node in list(graph.nodes):
        logits = _quotient(node) or _exponential(node)
        if logits is None:
            continue
        with graph.inserting_before(node):
            softmax = computed(graph, aten.softmax.int, logits, -1)
        node.replace_all_uses_with(softmax)
        if eager.is_attention(softmax):
            folded = True
            continue
        softmax.replace_all_uses_with(node)
        graph.erase_node(softmax)
    if folded:
        graph.eliminate_dead_code()


def _quotient(node: fx.Node) -> fx.Node | None:
    """`x` of exp(x - max) / sum(exp(x - max))."""
    if node.target is not aten.div.Tensor:
        return None
    above, below = (plain(x) if isinstance(x, fx.Node) else None for x in node.args[:2])
    if above is None or below is None or above.target is not aten.exp.default or not _sums(below, above):
        return None
    less = plain(argument(above, "self"))
    pair = _difference(less)
    return pair[0] if pair is not None and _greatest(pair[1]) is pair[0] else None


def _exponential(node: fx.Node) -> fx.Node | None:
    """`x` of exp(x - logsumexp(x)), or of exp(log_softmax(x))."""
    if node.target is not aten.exp.default:
        return None
    inner = plain(argument(node, "self"))
    if inner.target in _LOG_SOFTMAX:
        whole = argument(inner, "dim") % len(shape(inner)) == len(shape(inner)) - 1
        same = inner.meta["val"].dtype == inner.args[0].meta["val"].dtype  # type: ignore[union-attr]
        return plain(argument(inner, "self")) if whole and same else None
    pair = _difference(inner)
    if pair is None or pair[1].target is not aten.logsumexp.default or not _along_last(pair[1]):
        return None
    return pair[0] if plain(argument(pair[1], "self")) is pair[0] else None


def _difference(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    if node.target is not aten.sub.Tensor or argument(node, "alpha") != 1:
        return None
    left, right = node.args[:2]
    return (plain(left), plain(right)) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def _sums(node: fx.Node, of: fx.Node) -> bool:
    """Whether a node is the sum of another along its last dim, which it keeps."""
    summed = node.target is aten.sum.dim_IntList and _along_last(node)
    return summed and plain(argument(node, "self")) is of and node.meta["val"].dtype == of.meta["val"].dtype


def _greatest(node: fx.Node) -> fx.Node | None:
    """Of what a node is the greatest element along the last dim, which it keeps."""
    if node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]
        return plain(argument(node, "self")) if node.target is aten.max.dim and _along_last(node) else None
    return plain(argument(node, "self")) if node.target is aten.amax.default and _along_last(node) else None


def _along_last(node: fx.Node) -> bool:
    """Whether a node reduces its operand's last dim alone, and keeps it."""
    rank, dims = len(shape(argument(node, "self"))), argument(node, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    return [d % rank for d in dims] == [rank - 1] and bool(argument(node, "keepdim"))
