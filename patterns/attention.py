"""Attention cores: where queries, keys and values meet."""

from __future__ import annotations

import torch
from torch import fx

from decoquant_compile.patterns import eager, flex
from decoquant_compile.patterns.core import AttentionCore, mask_problem
from decoquant_compile.patterns.reject import Problem, Reason, Reject
from decoquant_compile.patterns.symbols import argument, inputs_behind, shape

__all__ = ["SDPA", "AttentionCore", "anchors", "computed_scales", "cores", "readers"]

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default


def readers(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The nodes at which attention weights are made or applied: what flows in there has been read by an attention.

    Returns:
        Each with the anchor of its attention; it may be no anchor of `anchors` where no attention was recognised.
    """
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if _is_fused(node):
            found[node] = node
        elif node.target in eager.SOFTMAX:
            found |= dict.fromkeys((node, *eager.products_after(node)), node)
    return found


def anchors(graph: fx.Graph) -> list[fx.Node]:
    """One node of every attention, in the graph's order: its operator, or the softmax of one that is spelled out."""
    return [n for n in graph.nodes if _is_fused(n) or (n.target in eager.SOFTMAX and eager.is_attention(n))]


def computed_scales(graph: fx.Graph) -> set[fx.Node]:
    """The inputs of a graph that numbers are made of which scale logits."""
    softmaxes = (node for node in anchors(graph) if node.target in eager.SOFTMAX)
    return inputs_behind(n for node in softmaxes for n in eager.computed_numbers(node))


def cores(graph: fx.Graph) -> list[AttentionCore | Reject]:
    """Every attention of a graph, one for each of its `anchors`.

    Reading an attention that is no SDPA may add nodes to the graph that nothing in it uses.
    """
    return [_core(node) for node in anchors(graph)]


def _core(node: fx.Node) -> AttentionCore | Reject:
    if node.target is SDPA:
        return _sdpa(node)
    return _judged(node, flex.read(node) if flex.is_flex(node) else eager.read(node))


def _sdpa(node: fx.Node) -> AttentionCore | Reject:
    def arg(name: str) -> object:
        return argument(node, name)

    query, key, value, mask, scale = (arg(name) for name in ("query", "key", "value", "attn_mask", "scale"))
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    assert mask is None or isinstance(mask, fx.Node)
    if isinstance(scale, int):
        scale = float(scale)
    if not isinstance(scale, float | None):
        return Reject(Reason.ATTENTION_FORM, node.name, f"scale is computed: {scale}")
    core = AttentionCore(node, query, key, value, mask, bool(arg("is_causal")), scale, bool(arg("enable_gqa")))
    if arg("dropout_p") != 0:
        return Reject(Reason.DROPOUT, node.name, f"dropout_p={arg('dropout_p')}", core)
    if ranks := {len(shape(n)) for n in (query, key, value)} - {4}:
        return Reject(Reason.ATTENTION_RANK, node.name, f"{ranks.pop()} dims", core)
    return _with_mask(core)


def _judged(node: fx.Node, core: AttentionCore | Problem) -> AttentionCore | Reject:
    return Reject(core.reason, node.name, core.detail) if isinstance(core, Problem) else _with_mask(core)


def _with_mask(core: AttentionCore) -> AttentionCore | Reject:
    problem = mask_problem(core)
    return core if problem is None else Reject(problem.reason, core.node.name, problem.detail, core)


def _is_fused(node: fx.Node) -> bool:
    return node.op == "call_function" and (node.target is SDPA or flex.is_flex(node))
