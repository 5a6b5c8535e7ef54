"""One spelling for what can be spelled in several ways."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from decoquant_compile.patterns.cache import is_birth
from decoquant_compile.patterns.movement import plain, sliced
from decoquant_compile.patterns.symbols import argument, computed, dtype, guarded, known, same_shape, shape, size_of

aten = torch.ops.aten


def fold(graph: fx.Graph) -> None:
    """Bring a normalised graph to the spellings that the rules know; it is changed in place and does the same."""
    for target, rule in _RULES.items():
        for node in list(graph.find_nodes(op="call_function", target=target)):
            rule(node)
    graph.eliminate_dead_code()


def _select_each(unbind: fx.Node) -> None:
    """The results of an `unbind` are views of one part each."""
    source, dim = argument(unbind, "self"), argument(unbind, "dim")
    for item in list(unbind.users):
        if item.target is operator.getitem:
            item.target, item.args = aten.select.int, (source, dim, item.args[1])


def _widen_indices(put: fx.Node) -> None:
    """Indices have 64 bits; the operator takes 32 as well."""
    indices = argument(put, "indices")
    short = {x for x in indices if isinstance(x, fx.Node) and dtype(x) == torch.int32}
    with put.graph.inserting_before(put):
        wide = {x: computed(put.graph, aten.to.dtype, x, torch.int64) for x in short}
    if wide:
        put.update_arg(1, [wide.get(x, x) for x in indices])


def _scatter(cat: fx.Node) -> None:
    """A tensor whose slots before and behind some new ones are put around these is one that they are written to."""
    parts, dim = argument(cat, "tensors"), argument(cat, "dim") % len(shape(cat))
    if len(parts) != 3:
        return
    before, new, behind = parts
    if len({len(shape(x)) for x in (cat, *parts)}) > 1:  # `cat` leaves out an empty tensor of one dim
        return
    if before.target is not aten.slice.Tensor or behind.target is not aten.slice.Tensor:
        return
    source = argument(before, "self")
    if source.op != "placeholder" or not source.meta["val"].is_contiguous():  # the result has the strides of `source`
        return
    ends = [(argument(x, "dim") % len(shape(cat)), argument(x, "step")) for x in (before, behind)]
    if argument(behind, "self") is not source or ends != [(dim, 1), (dim, 1)] or dtype(new) != dtype(source):
        return
    start, stop = argument(before, "end"), argument(behind, "start")
    size, length = shape(source)[dim], shape(before)[dim]
    if (
        argument(before, "start") in (None, 0)
        and known(shape(cat)[dim] == size)
        and start is not None
        and stop is not None
        and known(size_of(start) == length)
        and known(size_of(stop) == length + shape(new)[dim])
        and known(size_of(stop) + shape(behind)[dim] == size)
    ):
        with cat.graph.inserting_before(cat):
            written = computed(cat.graph, aten.slice_scatter.default, source, new, dim, start, stop)
        cat.replace_all_uses_with(written)
        cat.graph.erase_node(cat)


def _guard_slice(scatter: fx.Node) -> None:
    """Guard what the operator demands or decides when it runs: on which side of zero it starts, and that sizes fit.

    Where a tensor is indexed, Dynamo does.
    """
    start, dim = argument(scatter, "start"), argument(scatter, "dim") % len(shape(scatter))
    sizes = enumerate(zip(shape(argument(scatter, "src")), shape(scatter), strict=True))
    for condition in (size_of(start or 0) >= 0, *(mine == whole for d, (mine, whole) in sizes if d != dim)):
        guarded(condition)


def _one_slice_scatter(scatter: fx.Node) -> None:
    _guard_slice(scatter)
    _join(scatter)


def _join(scatter: fx.Node) -> None:
    """A longer tensor that gets old slots, and new ones behind them, is the two put together."""
    dim, base, new = argument(scatter, "dim") % len(shape(scatter)), plain(argument(scatter, "self")), _source(scatter)
    old = _grown(base, dim)
    if old is None or not dtype(old) == dtype(new) == dtype(scatter):
        return
    held, tokens, start = shape(old)[dim], shape(new)[dim], size_of(argument(scatter, "start") or 0)
    if (
        argument(scatter, "step") == 1
        and (known(start == held) or known(start == -tokens))
        and same_shape(shape(scatter), (*shape(old)[:dim], held + tokens, *shape(old)[dim + 1 :]))
    ):
        with scatter.graph.inserting_before(scatter):
            joined = computed(scatter.graph, aten.cat.default, [old, new], dim)
        scatter.replace_all_uses_with(joined)
        scatter.graph.erase_node(scatter)


def _grown(node: fx.Node, dim: int) -> fx.Node | None:
    """What a tensor begins with, along a dim, where the rest of it is still to be filled."""
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):  # filled or not: all of it is written
        pad = argument(node, "pad")
        before, others = pad[::2], [n for i, n in enumerate(pad[1::2]) if i != len(shape(node)) - 1 - dim]
        source = argument(node, "self")
        return source if not any(n != 0 for n in (*before, *others)) else None
    if node.target is aten.slice_scatter.default and is_birth(plain(argument(node, "self"))):
        span = sliced(node)
        along = argument(node, "dim") % len(shape(node)) == dim
        return _source(node) if along and span is not None and span.first == 0 else None
    return None


def _source(scatter: fx.Node) -> fx.Node:
    """What a `slice_scatter` puts in place: of `copy` what is copied, if it does not cast."""
    source: fx.Node = argument(scatter, "src")
    if source.target is aten.copy.default:
        copied: fx.Node = argument(source, "src")
        if dtype(copied) == dtype(source) and same_shape(shape(copied), shape(source)):
            return copied
    return source


def _fill_by_itself(like: fx.Node) -> None:
    """A new tensor of a given size takes only dtype and device of another, which need not be computed for that."""
    source, target = like.args[0], _FILLED[like.target]
    assert isinstance(source, fx.Node)
    if source.op == "placeholder":
        return
    value = like.meta["val"]
    values = [argument(like, "fill_value")] if like.target is aten.new_full.default else []
    with like.graph.inserting_before(like):
        made = computed(
            like.graph,
            target,
            argument(like, "size"),
            *values,
            dtype=value.dtype,
            device=value.device,
            pin_memory=False,
        )
    like.replace_all_uses_with(made)
    like.graph.erase_node(like)


_FILLED: dict[Any, Any] = {
    aten.new_ones.default: aten.ones.default,
    aten.new_zeros.default: aten.zeros.default,
    aten.new_full.default: aten.full.default,
    aten.new_empty.default: aten.empty.memory_format,
}

_RULES: dict[Callable[..., Any], Callable[[fx.Node], None]] = {
    aten.unbind.int: _select_each,
    aten.index_put.default: _widen_indices,
    aten.cat.default: _scatter,
    aten.slice_scatter.default: _one_slice_scatter,
    **dict.fromkeys(_FILLED, _fill_by_itself),
}
