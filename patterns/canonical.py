"""One spelling for what can be spelled in several ways."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from decoquant_compile.patterns.cache import is_birth
from decoquant_compile.patterns.movement import plain, sliced
from decoquant_compile.patterns.symbols import (
    argument,
    computed,
    dtype,
    guarded,
    known,
    number,
    same_shape,
    shape,
    size_of,
)

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


def _one_cat(cat: fx.Node) -> None:
    parts = argument(cat, "tensors")
    if len({len(shape(x)) for x in (cat, *parts)}) > 1:  # `cat` leaves out an empty tensor of one dim
        return
    if len(parts) == 3:
        _scatter(cat)
    elif len(parts) == 2:
        _end_of_whole(cat)


def _end_of_whole(cat: fx.Node) -> None:
    """The end of a tensor, and new slots, are the end of the tensor with these slots, where a graph has that, too."""
    (end, new), dim = argument(cat, "tensors"), argument(cat, "dim") % len(shape(cat))
    if end.target is not aten.slice.Tensor or argument(end, "dim") % len(shape(cat)) != dim:
        return
    source, span = argument(end, "self"), sliced(end)
    if span is None or not known(size_of(span.first) + shape(end)[dim] == shape(source)[dim]):
        return
    for whole in source.users:
        if whole.target is not aten.cat.default or not whole < cat or argument(whole, "dim") % len(shape(cat)) != dim:
            continue
        first, *rest = argument(whole, "tensors")
        if first is source and len(rest) == 1 and plain(rest[0]) is plain(new):
            with cat.graph.inserting_before(cat):
                view = computed(cat.graph, aten.slice.Tensor, whole, dim, span.first)
                same = computed(cat.graph, aten.clone.default, view, memory_format=torch.contiguous_format)
            _put(same, cat)
            return


def _scatter(cat: fx.Node) -> None:
    """A tensor whose slots before and behind some new ones are put around these is one that they are written to."""
    (before, new, behind), dim = argument(cat, "tensors"), argument(cat, "dim") % len(shape(cat))
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
    if not _join(scatter):
        _slide(scatter)


def _slide(scatter: fx.Node) -> None:
    """A tensor that is rolled and gets new slots where its first ones have gone is its end and these slots."""
    dim, base, new = argument(scatter, "dim") % len(shape(scatter)), plain(argument(scatter, "self")), _source(scatter)
    if base.target is not aten.roll.default or _is_written(scatter):  # a cache that is rolled in place has rules
        return
    source, shifts, dims = (argument(base, name) for name in ("self", "shifts", "dims"))
    size, tokens, span = shape(source)[dim], shape(new)[dim], sliced(scatter)
    if (
        len(shifts) == 1
        and [d % len(shape(scatter)) for d in dims] == [dim]
        and known(size_of(shifts[0]) == -tokens)
        and span is not None
        and known(size_of(span.first) + tokens == size)
        and dtype(new) == dtype(scatter)
        and (start := number(scatter.graph, tokens)) is not None
    ):
        with scatter.graph.inserting_before(scatter):
            end = computed(scatter.graph, aten.slice.Tensor, source, dim, start)
            slid = computed(scatter.graph, aten.cat.default, [end, new], dim)
        _put(slid, scatter)


def _put(new: fx.Node, old: fx.Node) -> None:
    """Put a node in the place of another one that holds the same, if it lies in memory in the same way."""
    if same_shape(new.meta["val"].stride(), old.meta["val"].stride()):
        old.replace_all_uses_with(new)
        old.graph.erase_node(old)


def _is_written(node: fx.Node) -> bool:
    """Whether a graph writes a value, or a copy of it, to one of its inputs."""
    values: Any = node.graph.output_node().args[0]
    return node in values[0] or any(user.target is aten.copy.default for user in node.users)


def _join(scatter: fx.Node) -> bool:
    """A longer tensor that gets old slots, and new ones behind them, is the two put together; whether it was one."""
    dim, base, new = argument(scatter, "dim") % len(shape(scatter)), plain(argument(scatter, "self")), _source(scatter)
    old = _grown(base, dim)
    if old is None or not dtype(old) == dtype(new) == dtype(scatter):
        return False
    held, tokens, start = shape(old)[dim], shape(new)[dim], size_of(argument(scatter, "start") or 0)
    is_joined = (
        argument(scatter, "step") == 1
        and (known(start == held) or known(start == -tokens))
        and same_shape(shape(scatter), (*shape(old)[:dim], held + tokens, *shape(old)[dim + 1 :]))
    )
    if is_joined:
        with scatter.graph.inserting_before(scatter):
            joined = computed(scatter.graph, aten.cat.default, [old, new], dim)
        scatter.replace_all_uses_with(joined)
        scatter.graph.erase_node(scatter)
    return is_joined


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
    aten.cat.default: _one_cat,
    aten.slice_scatter.default: _one_slice_scatter,
    **dict.fromkeys(_FILLED, _fill_by_itself),
}
