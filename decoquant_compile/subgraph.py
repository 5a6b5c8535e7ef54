"""Parts of a graph that run on their own, before it."""

from collections.abc import Sequence

import torch
from torch import fx

from decoquant_compile.patterns.symbols import Int

aten = torch.ops.aten

# It would repeat the work of the model.
_HEAVY = {
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.scaled_dot_product_attention.default,
    aten.softmax.int,
    aten.embedding.default,
}
_NODES = 512


def is_heavy(node: fx.Node) -> bool:
    """Whether computing a node is the work of a model."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        if n.target in _HEAVY or len(seen) > _NODES:
            return True
        seen.add(n)
        todo += n.all_input_nodes
    return False


def cut(
    gm: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[Int]
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The part of a graph that computes `outputs`, and which of `inputs` it takes."""
    needed: set[fx.Node] = set()
    todo = [x for x in outputs if isinstance(x, fx.Node)]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[x] if isinstance(x, fx.Node) else x for x in outputs))
    return fx.GraphModule(gm, graph), tuple(i for i, node in enumerate(inputs) if node in needed)
