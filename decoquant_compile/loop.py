"""Attention over caches that are rebuilt a block of slots at a time: a loop in the graph, with a running softmax."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer

from decoquant_compile import _compat
from decoquant_compile.patterns import blocks
from decoquant_compile.patterns.blocks import RESIZED, Expansion
from decoquant_compile.patterns.core import AttentionCore
from decoquant_compile.patterns.movement import REGROUPING, operand
from decoquant_compile.patterns.symbols import shape

aten = torch.ops.aten

Recorded: TypeAlias = Any
"""A `fx.Proxy`: a node that records what is done with it. Type checkers do not know its operators."""

_CARRIED: Final = 4
"""Tensors that go from turn to turn: the number of the turn, the greatest logit, the sum of weights, that of values."""


class Part:
    """A part of a loop, its condition or its body, under construction: a graph of its own.

    Args:
        captured: nodes of the graph around that it takes; shared by both, and added to.
    """

    def __init__(self, captured: dict[fx.Node, None]) -> None:
        self._graph = fx.Graph()
        self._tracer = GraphAppendingTracer(self._graph)
        self._captured = captured
        self._inputs: dict[fx.Node, fx.Node] = {}
        self.carried = [self.proxy(self._graph.placeholder(f"carried_{i}")) for i in range(_CARRIED)]

    def proxy(self, node: fx.Node) -> Recorded:
        """What records what is done with a node, of either graph."""
        return fx.Proxy(node if node.graph is self._graph else self._take(node), self._tracer)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Recorded:
        """Call an operator on proxies, on nodes of either graph and on constants."""
        given: Any = (args, kwargs)
        args, kwargs = map_aggregate(given, lambda x: self.proxy(_node(x)) if isinstance(_node(x), fx.Node) else x)
        return self._tracer.create_proxy("call_function", target, args, kwargs)

    def _take(self, node: fx.Node) -> fx.Node:
        if node in self._inputs:
            return self._inputs[node]
        if _is_number(node) and node.op != "placeholder":
            # Inductor knows the symbols among the inputs of a loop, not those of which an input is computed.
            if "val" not in node.meta:
                return self._graph.node_copy(node, self._take)
            size = _compat.size_node(node.graph, node.meta["val"])
            return self._take(size) if isinstance(size, fx.Node) else self._graph.call_function(operator.index, (size,))
        self._captured.setdefault(node)
        with self._graph.inserting_after(self._graph.find_nodes(op="placeholder")[-1]):
            self._inputs[node] = self._graph.placeholder(f"taken_{node.name}")
        return self._inputs[node]

    def finish(self, result: Any) -> fx.GraphModule:
        """The module; once nothing more is captured."""
        last = self.carried[-1].node
        for node in self._captured:
            taken = self._take(node)
            last.append(taken)
            last = taken
        self._graph.output(map_aggregate(result, _node))
        self._graph.lint()
        return fx.GraphModule({}, self._graph)


def _is_number(node: fx.Node) -> bool:
    """Whether a node is a size, or computed from sizes."""
    if "val" in node.meta:
        return isinstance(node.meta["val"], torch.SymInt)
    computed = node.op == "call_function" and _compat.mutates(node.target) is None
    return computed and bool(node.all_input_nodes) and all(map(_is_number, node.all_input_nodes))


def _node(x: Any) -> Any:
    return x.node if isinstance(x, fx.Proxy) else x


Reader: TypeAlias = Callable[[Part, Recorded], Recorded]
"""Reads `blocks.LENGTH` slots of a cache in the body of a loop, from a slot on (int64 scalar), in the cache's dims."""


def attend(graph: fx.Graph, core: AttentionCore, expansion: Expansion, readers: Mapping[fx.Node, Reader]) -> fx.Node:
    """Put an attention into a graph, at its insertion point, that makes keys and values of one block at a time.

    Logits and sums are float32. The blocks at the end of a cache of which the mask shows nothing to any query are left
    out; a query that sees no key gets zeros.

    Args:
        graph: the graph, owned by a module.
        core: the attention, whose mask says all that is hidden.
        expansion: how its keys and values come from its caches.
        readers: those of the caches, by what the attention sees of them.

    Returns:
        Its result, ``[batch, query heads, queries, value channels]`` in the query's dtype.
    """
    outer = GraphAppendingTracer(graph)
    query: Recorded = fx.Proxy(core.query, outer)

    def size(node: fx.Node, dim: int) -> Any:
        number = _compat.size_node(graph, shape(node)[dim])
        return number if isinstance(number, int) else fx.Proxy(number, outer)

    rows = [size(core.query, dim) for dim in range(3)]
    channels, keys = size(core.value, 3), size(core.key, 2)
    wide = {"dtype": torch.float32}
    if core.sink is None:
        top, total = query.new_full((*rows, 1), -torch.inf, **wide), query.new_zeros((*rows, 1), **wide)
    else:  # a logit that has no value
        sink = fx.Proxy(core.sink, outer).float().reshape(1, -1, 1, 1)
        top, total = sink.expand((*rows, 1)).contiguous(), query.new_ones((*rows, 1), **wide)
    start = query.new_zeros((), dtype=torch.int64), top, total, query.new_zeros((*rows, channels), **wide)
    end = keys
    if core.mask is not None:
        mask: Recorded = fx.Proxy(core.mask, outer)
        shown = mask if core.mask.meta["val"].dtype == torch.bool else mask != -torch.inf
        shown = shown.reshape(-1, keys).any(0)
        end = (shown * query.new_ones(keys, dtype=torch.int64).cumsum(0)).amax(0)

    captured: dict[fx.Node, None] = {}
    condition, body = Part(captured), Part(captured)
    going = condition.call(operator.lt, condition.carried[0] * blocks.LENGTH, end)
    turned = _turn(graph, body, core, expansion, readers, keys)
    taken = [node.meta.get("val") for node in (core.query, *captured)]
    captured |= dict.fromkeys(_compat.symbol_inputs(graph, taken))
    attributes = []
    for kind, module in (("condition", condition.finish(going)), ("body", body.finish(turned))):
        name = f"decoquant_{kind}_{core.node.name}"
        setattr(graph.owning_module, name, module)
        attributes.append(graph.get_attr(name))
    arguments: Any = (*attributes, tuple(x.node for x in start), _apart(graph, captured))
    looped: Recorded = fx.Proxy(graph.call_function(_compat.WHILE_LOOP, arguments), outer)
    total, weighted = looped[2], looped[3]
    result = (weighted / total.masked_fill(total == 0, 1)).to(core.query.meta["val"].dtype)
    attended: fx.Node = result.node
    return attended


def _apart(graph: fx.Graph, nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes, with copies of those that share memory with one before: no two inputs of a loop may."""
    storages: set[int] = set()
    found = []
    for node in nodes:
        value = node.meta.get("val")
        storage = _compat.storage_id(value) if isinstance(value, Tensor) else 0
        found.append(graph.call_function(aten.clone.default, (node,)) if storage in storages else node)
        storages |= {storage} - {0}
    return tuple(found)


def _turn(
    graph: fx.Graph,
    body: Part,
    core: AttentionCore,
    expansion: Expansion,
    readers: Mapping[fx.Node, Reader],
    keys: Any,
) -> tuple[Recorded, ...]:
    """One turn of the loop: what is carried after it."""
    turn, top, total, weighted = body.carried
    device = core.query.meta["val"].device
    first = turn * blocks.LENGTH
    column = first + body.call(aten.arange.default, blocks.LENGTH, device=device)
    hidden = body.call(operator.ge, column, keys)
    place = column.masked_fill(hidden, 0)
    made = {seen: readers[seen](body, first) for seen in expansion.seen}
    _expand(graph, body, expansion, made, place)
    # Of the zeros behind the end there may come anything, and no weight outdoes a nan.
    key, value = made[core.key].float(), made[core.value].float().masked_fill(hidden.unsqueeze(1), 0)
    heads, groups = shape(core.query)[1], 1
    if isinstance(heads, int) and isinstance(own := shape(core.key)[1], int):
        groups = heads // own
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = core.query.meta["val"].shape[-1] ** -0.5 if core.scale is None else core.scale
    logits = (body.proxy(core.query).float() @ key.transpose(-1, -2)) * scale
    if core.softcap is not None:
        logits = (logits / core.softcap).tanh() * core.softcap
    if core.mask is not None:
        mask = body.proxy(core.mask).index_select(-1, place)
        if core.mask.meta["val"].dtype == torch.bool:
            hidden = hidden | ~mask
        else:
            logits = logits + mask
    logits = logits.masked_fill(hidden, -torch.inf)
    highest = body.call(aten.maximum.default, top, logits.amax(-1, keepdim=True))
    level = highest.masked_fill(highest == -torch.inf, 0)
    weights, left = (logits - level).exp(), (top - level).exp()
    total = total * left + weights.sum(-1, keepdim=True)
    return turn + 1, highest, total, weighted * left + weights @ value


def _expand(graph: fx.Graph, body: Part, expansion: Expansion, made: dict[fx.Node, Recorded], place: Recorded) -> None:
    """Compute the nodes of an expansion for some slots; `made` has those of the caches, and gets them."""

    def sizes(node: fx.Node, slots: int) -> list[Any]:
        return [blocks.LENGTH if d == slots else _compat.size_node(graph, n) for d, n in enumerate(shape(node))]

    empty, whole = expansion.empty, expansion.whole
    for other, dim in expansion.along.items():
        if other in empty:
            value = other.meta["val"]
            made[other] = body.call(aten.zeros.default, sizes(other, dim), dtype=value.dtype, device=value.device)
        else:
            made[other] = body.proxy(other).index_select(dim, place)
    for node, dim in expansion.nodes.items():
        if node in whole:
            made[node] = made[operand(node)]
        elif node.target in RESIZED:
            target = aten.reshape.default if node.target in REGROUPING else aten.expand.default
            made[node] = body.call(target, made[operand(node)], sizes(node, dim)).to(node.meta["val"].dtype)
        else:
            given: Any = (node.args, node.kwargs)
            args, kwargs = map_aggregate(given, lambda x: made.get(x, x) if isinstance(x, fx.Node) else x)
            made[node] = body.call(node.target, *args, **kwargs)
