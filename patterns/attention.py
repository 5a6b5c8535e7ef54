"""Attention cores: where queries, keys and values meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from decoquant_compile import _compat
from decoquant_compile.patterns.movement import MOVEMENT
from decoquant_compile.patterns.reject import Reason, Reject
from decoquant_compile.patterns.symbols import argument, dtype, known, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionCore:
    """One attention, as `torch.nn.functional.scaled_dot_product_attention` defines it.

    Attributes:
        node: its node.
        query: [batch, query heads, queries, channels].
        key: [batch, heads, keys, channels].
        value: [batch, heads, keys, value channels].
        mask: broadcasts to [batch, query heads, queries, keys], its last dim being exactly keys; boolean (True attends)
            or floating point (added to the logits). It may have fewer than 4 dims.
        is_causal: query i attends keys 0 to i.
        scale: factor of the logits; None is 1/sqrt(channels).
        enable_gqa: query heads follow one another in groups that share a key-value head.
        form: how the graph spells it.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool = False
    form: str = "sdpa"


SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
_PRODUCT = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
# What may stand between the logits and the softmax, and between the softmax and the values.
_ON_LOGITS = {
    *MOVEMENT,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.tanh.default,
    aten.where.self,
    aten.where.ScalarOther,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.cat.default,
}
_ON_WEIGHTS = {*MOVEMENT, aten.dropout.default, aten.mul.Tensor, aten.where.self, aten.where.ScalarOther}


def readers(graph: fx.Graph) -> set[fx.Node]:
    """The nodes at which attention weights are made or applied: what flows in there has been read by an attention."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and (node.target is SDPA or _is_flex(node)):
            found.add(node)
        elif node.target in SOFTMAX:
            found |= {node, *_products(list(node.users), _ON_WEIGHTS, back=False)}
    return found


def cores(graph: fx.Graph) -> list[AttentionCore | Reject]:
    """Every attention of a graph, in its order.

    Attention spelled as softmax between two products, and the `flex_attention` operator, are found and rejected.
    """
    found: list[AttentionCore | Reject] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is SDPA:
            found.append(_sdpa(node))
        elif _is_flex(node):
            found.append(Reject(Reason.ATTENTION_FORM, node.name, "flex_attention"))
        elif node.target in SOFTMAX and _between_products(node):
            found.append(Reject(Reason.ATTENTION_FORM, node.name, "softmax between two matrix products"))
    return found


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
    if mask is not None and (reject := _mask(core, mask)) is not None:
        return reject
    return core


def _mask(core: AttentionCore, mask: fx.Node) -> Reject | None:
    element = dtype(mask)
    if element is None or not (element == torch.bool or element.is_floating_point):
        return Reject(Reason.MASK_FORM, core.node.name, f"dtype {element}", core)
    sizes = shape(mask)
    full = (*shape(core.query)[:3], shape(core.key)[2])
    if not sizes or len(sizes) > 4:
        return Reject(Reason.MASK_FORM, core.node.name, f"{len(sizes)} dims", core)
    for axis, size, whole in zip((3, 2, 1, 0), sizes[::-1], full[::-1], strict=False):
        if not known(size == whole) and (axis == 3 or not known(size == 1)):
            decided = isinstance(size, int) and isinstance(whole, int)
            reason = Reason.MASK_FORM if decided else Reason.UNDECIDED_SIZE
            return Reject(reason, core.node.name, f"mask of shape {list(sizes)} for {list(full)}", core)
    return None


def _is_flex(node: fx.Node) -> bool:
    return _compat.higher_order_name(node.target) == "flex_attention"


def _between_products(softmax: fx.Node) -> bool:
    """Whether a softmax turns products into weights of a product, as attention does and a router does not."""
    logits = _products(softmax.all_input_nodes, _ON_LOGITS, back=True)
    return bool(logits and _products(list(softmax.users), _ON_WEIGHTS, back=False))


def _products(nodes: list[fx.Node], through: set[object], *, back: bool) -> set[fx.Node]:
    """The matrix products on the way back from, or forward to, some nodes."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _PRODUCT:
            found.add(node)
        elif node.target in through:
            todo += node.all_input_nodes if back else list(node.users)
    return found
