"""Random caches, attentions and writes from any `random.Random`: hypothesis', which shrinks, or one with a seed."""

import math
from dataclasses import dataclass, replace
from random import Random
from typing import Self

import torch
from torch import Tensor

from decoquant_compile.kernels import codec, reference
from decoquant_compile.kernels.cpu.native import Kernels
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState

BITS = (16, *codec.CODED_BITS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (16, 24, 40, 64, 80, 96, 128, 192, 256)
SLOTS = (1, 40, 63, 64, 65, 127, 128, 129, 300, 513)


class Source:
    """Random numbers and tensors."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.choice, self.randint = random.choice, random.randint
        self.generator = torch.Generator().manual_seed(random.randint(0, 2**31))

    def chance(self, percent: int) -> bool:
        return self.randint(1, 100) <= percent

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=self.generator)

    def laid_out(self, x: Tensor) -> Tensor:
        """The same tensor with other strides; what lies in the gaps must not be read."""
        kind = self.choice(("contiguous", "contiguous", "transposed", "padded", "stepped"))
        if kind == "contiguous":
            return x
        if kind == "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        gap = ~x if x.dtype == torch.bool else torch.full_like(x, math.nan)
        return torch.cat((x, gap), -1)[..., : x.shape[-1]] if kind == "padded" else torch.stack((x, gap), -1)[..., 0]


class Tokens:
    """Tokens of one head size, each channel with its own mean and spread."""

    def __init__(self, source: Source, batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.source, self.shape, self.dtype = source, (batch, heads, 1, head_dim), dtype
        self.mean = 3 * source.normal(*self.shape)
        self.spread = source.normal(*self.shape).exp()

    def make(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        batch, heads, _, head_dim = self.shape
        new = self.source.normal(batch, heads, count, head_dim) * self.spread + self.mean
        return new.to(dtype or self.dtype)


def fill(source: Source, keys: CacheState, values: CacheState, of_keys: Tokens, of_values: Tokens) -> int:
    """Writes both caches in chunks: several fits, zeros, rows left out, rings that turned. Returns the next slot."""
    batch, heads, slots = keys.batch, keys.heads, keys.slots

    def write(count: int, at: int, shift: int = 0) -> None:
        rows = source.uniform(batch, count) < 0.8 if source.chance(20) else None
        query = source.normal(batch, heads, count, keys.format.head_dim) if source.chance(50) else None
        for state, tokens in ((keys, of_keys), (values, of_values)):
            new = tokens.make(count)
            if source.chance(25):  # keys and values apart
                new[:, :, source.randint(0, 2) :: 3] = 0
            asked = query if state is keys else None
            reference.store(
                state.buffer, new, torch.arange(at, at + count), asked, None, slots, shift, 0, state.format, rows
            )

    end = source.choice((slots, slots, source.randint(0, slots), 0))
    at = 0
    while at < end:
        count = min(end - at, source.choice((1, 7, 60, 200, 700)))
        write(count, at)
        at += count
    if end == slots:
        for _ in range(source.choice((0, 0, 1, 5))):
            count = min(slots, source.choice((1, 1, 3, 70)))
            write(count, slots - count, shift=count)
    return end


@dataclass
class Attention:
    """Operands of an attention."""

    query: Tensor
    keys: CacheState
    values: CacheState
    key: Tensor
    value: Tensor
    positions: Tensor
    mask: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    first: int = 0
    length: int = 0
    sink: Tensor | None = None
    sequences: int | None = None

    def of_first(self, count: int) -> Self:
        """The same for the first sequences alone."""
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[:count]
        query, key, value = (x[:count] for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, mask=mask, sequences=self.keys.batch)

    @property
    def operands(self) -> tuple:
        return (
            self.query, self.keys.buffer, self.values.buffer, self.key, self.value, self.positions, self.mask,
            self.scale, self.softcap, self.keys.slots, self.first, self.length,
        )  # fmt: skip

    def expected(self) -> Tensor:
        return reference.attend(*self.operands, self.keys.format, self.values.format, self.sink, self.sequences)

    def result(self, native: Kernels) -> Tensor:
        formats = self.keys.format.key(), self.values.format.key()
        return native.attend(*self.operands, *formats, self.sink, self.sequences)


def mask_of(source: Source, batch: int, heads: int, queries: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """A mask that broadcasts somewhere, or None."""
    kind = source.choice(("none", "bool", "causal", "additive", "additive"))
    if kind == "none":
        return None
    shape = [source.choice((1, size)) for size in (batch, heads, queries)]
    if kind == "causal":
        last = length - 1 - source.randint(0, length - 1) - torch.arange(shape[2]).flip(0)
        mask = (torch.arange(length) <= last[:, None]).expand(*shape, length)
    elif kind == "bool":
        mask = source.uniform(*shape, length) < source.choice((0, 0.02, 0.5, 0.98, 1))
    else:
        mask = source.normal(*shape, length).to(dtype)
        excluded = source.uniform(*shape, length) < source.choice((0, 0.3, 0.98, 1))
        mask.masked_fill_(excluded, source.choice((-math.inf, torch.finfo(dtype).min)))
    mask = source.laid_out(mask)
    return mask.expand(batch, heads, queries, length) if source.chance(20) else mask


def attention(random: Random) -> Attention:
    """Any attention that the operator admits."""
    source = Source(random)
    dtype = source.choice(DTYPES)
    head_dim = source.choice(HEAD_DIMS)
    value_dim = source.choice((head_dim, head_dim, *HEAD_DIMS))
    batch, heads, groups = source.choice((1, 1, 2, 3)), source.randint(1, 3), source.randint(1, 12)
    slots = source.choice(SLOTS)
    kept = [(source.choice((0, 4)), source.choice((0, 3, 64)))] * 2
    if source.chance(20):
        kept[1] = (2, 5)
    keys, values = (
        CacheState.empty(Format(role, source.choice(BITS), size, dtype, *copies), batch, heads, slots, "cpu")
        for role, size, copies in (("key", head_dim, kept[0]), ("value", value_dim, kept[1]))
    )
    of_keys, of_values = (Tokens(source, batch, heads, size, dtype) for size in (head_dim, value_dim))
    end = fill(source, keys, values, of_keys, of_values)

    queries = source.choice((1, 1, 1, 2, 5, 16, 40))
    count = source.choice((0, 1, queries, queries, source.randint(0, 40)))
    start = source.choice((end, end, max(0, end - count), 0, slots - 1))
    positions = torch.arange(start, start + count)  # not yet stored, stored, or beyond the cache
    if source.chance(20):
        positions = source.integers(-2, slots + 3, count)
    length = source.choice((slots, slots, slots + 20, max(1, end), source.randint(1, slots + 5)))
    of_query = source.choice((dtype, dtype, *DTYPES))
    case = Attention(
        query=source.laid_out(source.normal(batch, heads * groups, queries, head_dim).to(of_query)),
        keys=keys,
        values=values,
        key=source.laid_out(of_keys.make(count, source.choice((dtype, of_query)))),
        value=source.laid_out(of_values.make(count, source.choice((dtype, of_query)))),
        positions=positions,
        mask=mask_of(source, batch, heads * groups, queries, length, source.choice((of_query, of_query, *DTYPES))),
        scale=source.choice((None, None, 0.3 / head_dim**0.5)),
        softcap=source.choice((None, None, 1e4, 20.0)),
        first=source.choice((0, 0, 0, -3, 5)),
        length=length,
        sink=source.choice((None, None, source.normal(heads * groups) * 3)),
    )
    return case.of_first(source.randint(1, batch)) if source.chance(30) else case


@dataclass
class Write:
    """Operands of a write, the state aside."""

    new: Tensor
    positions: Tensor
    query: Tensor | None = None
    mask: Tensor | None = None
    shift: int = 0
    first: int = 0
    rows: Tensor | None = None

    def expected(self, state: CacheState) -> None:
        operands = self.new, self.positions, self.query, self.mask, state.slots, self.shift, self.first
        reference.store(state.buffer, *operands, state.format, self.rows)

    def apply(self, native: Kernels, state: CacheState) -> None:
        operands = self.new, self.positions, self.query, self.mask, state.slots, self.shift, self.first
        native.store(state.buffer, *operands, state.format.key(), self.rows)


def spoil(source: Source, new: Tensor) -> None:
    """Makes some tokens special: zeros, not finite, huge, tiny, constant, mostly zeros."""
    large, tiny = torch.finfo(new.dtype).max, torch.finfo(new.dtype).tiny
    chosen = source.uniform(new.shape[2]) < source.choice((0.1, 0.5, 1))
    one_head = new[:, :1] if source.chance(30) else new
    kind = source.choice(("zero", "nan", "infinite", "large", "outlier", "tiny", "constant", "sparse"))
    if kind == "sparse":
        one_head[:, :, chosen, 1:] = 0
    elif kind in ("nan", "outlier"):
        one_head[:, :, chosen, 2] = math.nan if kind == "nan" else large / 2
    else:
        one_head[:, :, chosen] = {"zero": 0, "infinite": math.inf, "large": -large, "tiny": tiny, "constant": 3.0}[kind]


class Writer:
    """A cache and any writes to it."""

    def __init__(self, random: Random) -> None:
        self.source = source = Source(random)
        self.batch, self.heads = source.choice((1, 2, 3)), source.randint(1, 3)
        self.slots = source.choice((1, 40, 64, 65, 129, 300))
        self.form = Format(
            source.choice(("key", "value")),
            source.choice(BITS),
            source.choice(HEAD_DIMS),
            source.choice(DTYPES),
            *source.choice(((4, 64), (4, 8), (0, 3), (2, 0), (0, 0))),
        )
        self.state = CacheState.empty(self.form, self.batch, self.heads, self.slots, "cpu")
        self.tokens = Tokens(source, self.batch, self.heads, self.form.head_dim, self.form.dtype)
        self.padding = source.choice((0, 0, source.randint(0, self.slots)))
        self.end = 0

    def write(self) -> Write:
        """The next write: a chunk or a token behind the last one, over it, at 0, or anywhere."""
        source, slots = self.source, self.slots
        kind = source.choice(("append", "append", "append", "rewrite", "begin", "slide", "any"))
        count = min(slots, source.choice((1, 1, 2, 17, 70, 300)))
        shift = 0
        if kind == "slide":
            shift = source.choice((1, count, slots + 1))
            self.end = max(0, self.end - shift)
        at = {"append": self.end, "rewrite": self.end - count, "slide": self.end, "begin": 0, "any": 0}[kind]
        at = min(max(0, at), slots - count)
        positions = torch.arange(at, at + count)
        if kind == "any":  # duplicates too, and some to drop
            positions = source.integers(-2, slots, count)
        self.end = max(self.end, int(positions.max()) + 1)
        dtype = source.choice((self.form.dtype, self.form.dtype, *DTYPES, torch.float64))
        new = self.tokens.make(count, dtype)
        if source.chance(30):
            spoil(source, new)
        query = None
        if source.chance(50):
            query = source.normal(self.batch, self.heads * source.randint(1, 3), count, self.form.head_dim)
            query = query.to(source.choice(DTYPES))
            if source.chance(15):
                spoil(source, query)
            query = source.laid_out(query)
        first = source.choice((0, 0, 0, -3, 5, at))
        return Write(
            new=source.laid_out(new),
            positions=positions,
            query=query,
            mask=self._mask(at, count, first) if source.chance(50) else None,
            shift=shift,
            first=first,
            rows=source.uniform(self.batch, count) < 0.7 if source.chance(20) else None,
        )

    def _mask(self, at: int, count: int, first: int) -> Tensor:
        """Left padding under a causal mask, or anything."""
        source = self.source
        length = source.choice((self.slots, at + count, source.randint(1, self.slots + 9)))
        rows, heads, queries = (source.choice((1, size)) for size in (self.batch, 2, count))
        column = first + torch.arange(length)
        last = at + count - torch.arange(queries, 0, -1)
        padding = torch.tensor([self.padding // (row + 1) for row in range(rows)])
        admitted = (column <= last[:, None]) & (column >= padding[:, None, None])
        admitted = admitted[:, None].expand(rows, heads, queries, length)
        if source.chance(20):
            admitted = source.uniform(rows, heads, queries, length) < source.choice((0, 0.1, 0.9))
        if source.chance(50):
            return source.laid_out(admitted)
        dtype = source.choice(DTYPES)
        excluded = source.choice((-math.inf, torch.finfo(dtype).min, -1e4, -100.0))
        return source.laid_out(source.normal(rows, heads, queries, length).masked_fill(~admitted, excluded).to(dtype))
