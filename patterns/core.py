"""What an attention is, however the graph spells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from decoquant_compile.patterns.reject import Problem, Reason
from decoquant_compile.patterns.symbols import dtype, known, shape


@dataclass(frozen=True)
class AttentionCore:
    """One attention, as `torch.nn.functional.scaled_dot_product_attention` defines it, with a softcap and a sink.

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
        softcap: logits become `softcap * tanh(logits / softcap)` before the mask; None leaves them.
        sink: float32 [query heads], a logit of each head beside those of the keys, as they are after the mask; it joins
            the sum of the softmax and has no value. None: there is none.
        result: what makes the value of `node` of [batch, query heads, queries, value channels] in the query's dtype:
            operators, each with its arguments after the first.
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
    softcap: float | None = None
    sink: fx.Node | None = None
    result: tuple[tuple[Any, tuple[Any, ...]], ...] = ()


def mask_problem(core: AttentionCore) -> Problem | None:
    """What is wrong with an attention's mask; None if nothing is."""
    mask = core.mask
    if mask is None:
        return None
    element = dtype(mask)
    if element is None or not (element == torch.bool or element.is_floating_point):
        return Problem(Reason.MASK_FORM, f"dtype {element}")
    sizes = shape(mask)
    full = (*shape(core.query)[:3], shape(core.key)[2])
    if not sizes or len(sizes) > 4:
        return Problem(Reason.MASK_FORM, f"{len(sizes)} dims")
    for axis, size, whole in zip((3, 2, 1, 0), sizes[::-1], full[::-1], strict=False):
        if not known(size == whole) and (axis == 3 or not known(size == 1)):
            decided = isinstance(size, int) and isinstance(whole, int)
            reason = Reason.MASK_FORM if decided else Reason.UNDECIDED_SIZE
            return Problem(reason, f"mask of shape {list(sizes)} for {list(full)}")
    return None
