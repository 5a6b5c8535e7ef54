"""Attention of the tokens of a prompt to each other and, where they are many, to those of the cache.

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

_STRETCH: Final = 32 << 20
"""Bytes of keys and values that are dequantised at a time."""

Read = Callable[[int, int], tuple[Tensor, Tensor]]
"""Keys and values of the columns ``[low, high)``."""


class Dense(NamedTuple):
    """Attention to some tokens."""

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
    read: Read | None = None,
) -> Dense | None:
    """Attention to the new tokens, to a sink and, given how to read it, to the rest of the cache, if torch can do it.

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
        read: gives keys and values of columns of the cache; they are like `key` and `value`.
    """
    tokens = len(positions)
    if tokens == 0 or query.dtype != key.dtype or key.dtype != value.dtype or key.shape != value.shape:
        return None
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return None  # torch's kernel would round it
    if sink is not None and not bool((sink < math.inf).all()):  # nan as well
        return None
    column = int(positions[0]) - first
    end = column + tokens
    together = torch.equal(positions, torch.arange(first + column, first + end))
    if not together or first + column < 0 or column < 0 or end > length:
        return None

    def fresh(low: int, high: int) -> tuple[Tensor, Tensor]:
        return key[:, :, low - column : high - column], value[:, :, low - column : high - column]

    parts: list[tuple[int, int, Read]] = [(column, end, fresh)]
    if read is not None:
        step = max(1, _STRETCH // (key[:, :, 0].nbytes + value[:, :, 0].nbytes))
        parts += [(low, high, read) for low, high in (*_stretches(0, column, step), *_stretches(end, length, step))]
    found: Dense | None = None
    for low, high, operands in parts:
        part = _attend_columns(query, mask, scale, extents, low, high, operands)
        if part is None:
            return None
        found = part if found is None else _merge(found, part)
    assert found is not None
    if sink is not None:
        found = _merge(found, Dense(torch.zeros_like(found.out), sink[:, None].expand(found.sums.shape)))
    return Dense(found.out.to(query.dtype), found.sums)


def _stretches(low: int, high: int, step: int) -> Iterator[tuple[int, int]]:
    for at in range(low, high, step):
        yield at, min(at + step, high)


def _attend_columns(
    query: Tensor,
    mask: Tensor | None,
    scale: float,
    extents: Callable[[Tensor], Extents],
    low: int,
    high: int,
    operands: Read,
) -> Dense | None:
    """Attention to the columns ``[low, high)`` alone; None if its sums cannot be merged with others."""
    queries = query.shape[2]
    blocks, admitted = [_Block(slice(0, queries), slice(0, high - low))], None
    if mask is not None:
        part = mask[..., low:high]
        if part.dtype == torch.bool:
            part = part.expand(-1, -1, queries, -1)
            reach = extents(part)
            admitted = reach.begin < reach.end
            blocks = list(_blocks(part, reach, query.dtype))
        else:
            admitted = (part > -math.inf).any(-1)
            blocks = [blocks[0]._replace(mask=part)]
    if not blocks:
        sums = query.new_full(query.shape[:3], -math.inf, dtype=torch.float32)
        return Dense(query.new_zeros(query.shape), sums)
    start = min(block.columns.start for block in blocks)
    key, value = operands(low + start, low + max(block.columns.stop for block in blocks))
    found = [_attend_block(query, key, value, block, start, scale) for block in blocks]
    if blocks[0].queries == slice(0, queries):
        out, sums = (x.contiguous() for x in found[0])
    else:
        out, sums = query.new_zeros(query.shape), query.new_zeros(query.shape[:3], dtype=torch.float32)
        for block, (of_block, its_sums) in zip(blocks, found, strict=True):
            out[:, :, block.queries], sums[:, :, block.queries] = of_block, its_sums
    if not bool((sums.abs() < _LARGEST_SUM).all()):  # nan as well
        return None
    if admitted is not None and not admitted.all():
        out = out.masked_fill(~admitted[..., None], 0.0)  # a value that is masked may be nan
        sums = sums.masked_fill(~admitted, -math.inf)
    return Dense(out, sums)


def _merge(one: Dense, other: Dense) -> Dense:
    """Attention to the tokens of both, in float32."""
    more = (other.sums - one.sums).nan_to_num(0.0)[..., None]  # nan: nothing is admitted in either
    out = one.out * (-more).sigmoid() + other.out * more.sigmoid()
    return Dense(out, torch.logaddexp(one.sums, other.sums))


def _attend_block(
    query: Tensor, key: Tensor, value: Tensor, block: _Block, start: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The keys and values are those of the columns from `start` on."""
    columns = slice(block.columns.start - start, block.columns.stop - start)
    return flash_attention_cpu(
        query[:, :, block.queries], key[:, :, columns], value[:, :, columns], block.mask, scale, causal=block.causal
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
