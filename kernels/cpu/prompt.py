"""Attention of the tokens of a prompt to each other, before they are merged with those of the cache.

Torch's own flash attention does it: it has no rival on CPUs where many queries meet many keys in 16 bits. What a mask
leaves out, it leaves out only where it is told so; here it is.
"""

import math
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from decoquant_compile._compat import flash_attention_cpu

_LARGEST_SUM: Final = 1e4
"""Larger logarithms of sums are too coarse to merge by (a mask adds the least number everywhere); nan may come of a
key that is masked."""

_BLOCK: Final = 512
"""Queries that are attended together where a mask leaves columns out: as fast as all at once."""


class Dense(NamedTuple):
    """Attention to new tokens, and to a sink, alone."""

    out: Tensor
    """``[batch, query_heads, queries, head_dim]``, contiguous."""
    sums: Tensor
    """Logarithms of the sums of the softmax, float32 ``[batch, query_heads, queries]``; -inf: nothing is admitted."""


class Extents(NamedTuple):
    """Where the rows of a mask ``[batch, heads, queries, tokens]`` admit tokens."""

    begin: Tensor
    """int64 ``[batch, heads, queries]``: the first token; `tokens` where there is none."""
    end: Tensor
    """int64 ``[batch, heads, queries]``: the one behind the last token; 0 where there is none."""
    unbroken: bool
    """Whether every row admits all tokens in between."""


class _Block(NamedTuple):
    """Queries, and the columns that they are attended with."""

    queries: slice
    columns: slice
    mask: Tensor | None = None
    """Additive, of these queries and columns; None: all are admitted."""
    causal: bool = False
    """Each query is admitted the columns up to its own."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    scale: float,
    first: int,
    length: int,
    sink: Tensor | None,
    extents: Callable[[Tensor], Extents],
) -> Dense | None:
    """Attention to the new tokens, and to a sink, alone, if torch's kernel can do it.

    Args:
        query: ``[batch, query_heads, queries, head_dim]``.
        key: ``[batch, heads, tokens, head_dim]``.
        value: as `key`.
        positions: of the tokens, int64 ``[tokens]``.
        mask: bool or additive ``[batch | 1, query_heads | 1, queries | 1, length]``, its column 0 at slot `first`.
        scale: of the logits.
        first: see `mask`.
        length: see `mask`.
        sink: logits beside those of the keys, without values, float32 ``[query_heads]``.
        extents: finds those of a mask.
    """
    queries, tokens = query.shape[2], len(positions)
    if tokens == 0 or query.dtype != key.dtype or key.dtype != value.dtype or key.shape != value.shape:
        return None
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return None  # torch's kernel would round it
    if sink is not None and not bool((sink < math.inf).all()):  # nan as well
        return None
    column = int(positions[0]) - first
    together = torch.equal(positions, torch.arange(first + column, first + column + tokens))
    if not together or first + column < 0 or column < 0 or column + tokens > length:
        return None
    admitted = None
    blocks = [_Block(slice(0, queries), slice(0, tokens))]
    if mask is not None:
        part = mask[..., column : column + tokens]
        if part.dtype == torch.bool:
            part = part.expand(-1, -1, queries, -1)
            reach = extents(part)
            admitted = reach.begin < reach.end
            blocks = list(_blocks(part, reach, query.dtype))
        else:
            admitted = (part > -math.inf).any(-1)
            blocks = [blocks[0]._replace(mask=part)]
    if len(blocks) == 1 and blocks[0].queries == slice(0, queries):
        out, sums = _attend_block(query, key, value, blocks[0], scale)
        out, sums = out.contiguous(), sums.contiguous()
    else:
        out, sums = query.new_zeros(query.shape), query.new_zeros(query.shape[:3], dtype=torch.float32)
        for block in blocks:
            out[:, :, block.queries], sums[:, :, block.queries] = _attend_block(query, key, value, block, scale)
    if not bool((sums.abs() < _LARGEST_SUM).all()):  # nan as well
        return None
    if admitted is not None:
        sums = sums.masked_fill(~admitted, -math.inf)
    if sink is not None:
        share = sink[:, None]
        out = torch.where((sums > -math.inf)[..., None], out * (sums - share).sigmoid()[..., None], 0.0).to(out.dtype)
        sums = torch.logaddexp(sums, share)
    return Dense(out, sums)


def _attend_block(query: Tensor, key: Tensor, value: Tensor, block: _Block, scale: float) -> tuple[Tensor, Tensor]:
    of_queries, of_columns = (slice(None), slice(None), block.queries), (slice(None), slice(None), block.columns)
    return flash_attention_cpu(
        query[of_queries], key[of_columns], value[of_columns], block.mask, scale, causal=block.causal
    )


def _blocks(mask: Tensor, reach: Extents, dtype: torch.dtype) -> Iterator[_Block]:
    """The blocks that a mask, bool ``[batch, heads, queries, tokens]``, lets attention be done in.

    Queries that are in none of them are admitted nothing.
    """
    queries, tokens = mask.shape[2:]
    begin, end, unbroken = reach
    if unbroken and queries == tokens and not begin.any() and bool((end == torch.arange(1, queries + 1)).all()):
        yield _Block(slice(0, queries), slice(0, tokens), causal=True)
        return
    for at in range(0, queries, _BLOCK):
        rows = slice(at, min(at + _BLOCK, queries))
        low, high = int(begin[:, :, rows].min()), int(end[:, :, rows].max())
        if low >= high:
            continue
        block = _Block(rows, slice(low, high))
        if not (unbroken and bool((begin[:, :, rows] == low).all()) and bool((end[:, :, rows] == high).all())):
            zero, minus = (torch.tensor(x, dtype=dtype) for x in (0.0, -math.inf))
            block = block._replace(mask=torch.where(mask[:, :, rows, low:high], zero, minus))
        yield block
