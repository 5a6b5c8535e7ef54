"""Sizes and arguments of ATen nodes; equalities are decided without adding a guard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from decoquant_compile import _compat

FLOATS = {torch.float32, torch.bfloat16, torch.float16}
"""Element types of a cache."""

Size = int | torch.SymInt
Int = int | fx.Node
"""A constant, or a node whose value is a SymInt."""


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for every run of this graph; undecided is False."""
    return _compat.statically_known_true(condition)


def guarded(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds, which is a guard of the graph from now on; undecidable is False."""
    if isinstance(condition, torch.SymBool):
        return _compat.is_backed(condition) and bool(condition)  # asking adds the guard
    return condition


def shape(node: fx.Node) -> tuple[Size, ...]:
    """Sizes of a node's tensor; empty where it has none (a SymInt, a tuple)."""
    value = node.meta.get("val")
    return tuple(map(_compat.settled, value.shape)) if isinstance(value, torch.Tensor) else ()


def dtype(node: fx.Node) -> torch.dtype | None:
    """Element type of a node's tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def size_of(value: Int) -> Size:
    """The number that an `Int` stands for."""
    if not isinstance(value, fx.Node):
        return value
    return _compat.settled(value.meta["val"])


def same_shape(a: tuple[Size, ...], b: tuple[Size, ...]) -> bool:
    """Whether two shapes are equal for every run of this graph."""
    return len(a) == len(b) and all(known(x == y) for x, y in zip(a, b, strict=True))


def as_int(size: Size, graph: fx.Graph) -> Int | None:
    """A size as something that a node can take as an argument: a constant, or the graph input that carries it."""
    size = _compat.settled(size)
    if isinstance(size, int):
        return size
    if (carrier := _compat.carriers(graph).get(size.node.expr)) is not None:
        return carrier
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and known(value == size):
            return node
    return None


def number(graph: fx.Graph, size: Size) -> Int | None:
    """A size as a constant, or computed at the graph's insertion point; None if no inputs carry its symbols."""
    try:
        made = _compat.size_node(graph, size)
    except LookupError:
        return None
    if isinstance(made, fx.Node):
        made.meta.setdefault("val", size)
    return made


def inputs_behind(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The inputs of a graph that nodes are computed from."""
    todo = list(nodes)
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return {node for node in seen if node.op == "placeholder"}


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an ATen call by its name in the schema, given or default."""
    for position, declared in enumerate(_compat.arguments_of(node.target)):
        if declared.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, declared.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def computed(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node at the graph's insertion point, with its value's metadata."""
    node = graph.call_function(target, args, kwargs)
    with _compat.faking(graph):
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
    return node


def same_value(a: object, b: object) -> bool:
    """Whether two arguments hold the same value: the same node, equal sizes, or the same pure computation."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        if a is b:
            return True
        x, y = a.meta.get("val"), b.meta.get("val")
        if isinstance(x, torch.SymInt) and isinstance(y, torch.SymInt):
            return known(x == y)
        pure = a.op == b.op == "call_function" and not a.is_impure() and not _compat.is_random(a.target)
        return pure and a.target == b.target and same_value(a.args, b.args) and same_value(a.kwargs, b.kwargs)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b
