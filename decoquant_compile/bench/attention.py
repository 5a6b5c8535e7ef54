"""One attention of one decode step, over caches that come from DRAM as they do between the layers of a model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from decoquant_compile.bench import memory
from decoquant_compile.bench.memory import Pages, Ring
from decoquant_compile.bench.timing import Row, interleave, on_threads, relate
from decoquant_compile.kernels import ops, tiles
from decoquant_compile.kernels.codec import Role
from decoquant_compile.kernels.format import END, FITTED, NO_EPOCH, TOTAL, Format, Sections
from decoquant_compile.kernels.state import CacheState

TEMPLATE: Final = 1024
"""Tokens that are really encoded at the front of a synthetic cache; a multiple of every tile."""

WARM_UP: Final = 2

_LINE: Final = 64
"""Bytes: states start on a cache line."""

FAMILIES: Final = {
    "sdpa": "`scaled_dot_product_attention` as transformers calls it for a static cache, bfloat16 and float32",
    "inductor": "the same call compiled by plain Inductor, bfloat16; includes Dynamo's guards, about 0.1 ms",
    "torch": "other formulations in torch, no mask, bfloat16: query heads folded into the query axis, by"
    " `scaled_dot_product_attention` (fold) and by matmul-softmax-matmul (eager); `enable_gqa` (gqa)",
    "attend": "our attention at each number of bits",
    "step": "our writes of one token's key and value, and the attention",
    "read": "the bytes of the caches read and nothing else, packed and bfloat16",
}
_BEST: Final = ("torch-fold", "torch-eager", "torch-gqa")
BASES: Final = {"SDPA bf16": ("sdpa-bf16",), "Inductor": ("inductor-bf16",), "best torch": _BEST}
"""What the ratios compare with."""


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention.

    Attributes:
        name: as the tables call it.
        batch: sequences.
        query_heads: a multiple of `heads`.
        heads: KV heads.
        head_dim: channels of each.
    """

    name: str
    batch: int
    query_heads: int
    heads: int
    head_dim: int

    @property
    def groups(self) -> int:
        """Query heads for each KV head."""
        return self.query_heads // self.heads

    def cache_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Bytes of dense keys and values."""
        return 2 * self.batch * self.heads * context * self.head_dim * dtype.itemsize


SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape("llama8b", 1, 32, 8, 128),
        Shape("llama1b", 1, 32, 8, 64),
        Shape("gemma", 1, 4, 1, 256),
        Shape("qwen", 1, 16, 8, 128),
        Shape("mha", 4, 32, 32, 128),
    )
}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        bits: widths of the packed caches.
        families: keys of `FAMILIES`.
        threads: numbers of threads.
        rounds: timed calls of each arm.
        ring: bytes that the caches of one ring take together, at least; the arms of one kind of cache share a ring.
        pages: pages of the dense caches; the packed ones always ask for 2 MB pages.
    """

    bits: tuple[int, ...] = (16, 8, 5, 4, 3, 2)
    families: tuple[str, ...] = tuple(FAMILIES)
    threads: tuple[int, ...] = (1,)
    rounds: int = 15
    ring: int = 768 * 2**20
    pages: Pages = "huge"


# ---------------------------------------------------------------------------------------------------- synthetic caches


def fill(state: CacheState, tokens: int, generator: torch.Generator) -> None:
    """Makes `state` look like one that holds `tokens` random tokens, at the cost of encoding a few.

    The first `TEMPLATE` tokens are written for real; what is stored for each is repeated along the slots, and the last
    tokens are written for real again, so that the window and the end are as in any cache. All have been seen by the
    fit, as after a prefill in one piece.

    Args:
        state: fresh.
        tokens: at most its slots.
        generator: of the tokens, which are standard normal.
    """
    form = state.format
    shape = (state.batch, state.heads, min(tokens, TEMPLATE), form.head_dim)
    random = torch.randn(shape, generator=generator).to(form.dtype)
    state.write(random, torch.arange(shape[2]))
    blocks = max(1, (tokens - form.window) // TEMPLATE)
    if blocks > 1:
        sections = form.layout(state.batch, state.heads, state.slots).views(state.buffer)
        _repeat(sections, blocks, state.slots)
        sections.header[END] = blocks * TEMPLATE
        for column in (TOTAL, FITTED):
            sections.rows[:, column] += (blocks - 1) * TEMPLATE
    rest = range(min(tokens, blocks * TEMPLATE), tokens)
    for begin in range(rest.start, rest.stop, TEMPLATE):
        positions = torch.arange(begin, min(rest.stop, begin + TEMPLATE))
        state.write(random[:, :, : len(positions)], positions)


def _repeat(sections: Sections, blocks: int, slots: int) -> None:
    """Copies what is stored for the first `TEMPLATE` slots to the blocks after them."""
    if sections.planes:
        if (sections.epochs[:, :TEMPLATE] == NO_EPOCH).any():
            raise RuntimeError(f"the first {TEMPLATE} tokens of the synthetic cache were not all encoded")
        whole = tiles.capacity(slots)
        tokenwise = [(plane, 2, plane.shape[2] * TEMPLATE // whole) for plane in sections.planes]
        tokenwise += [(sections.gains, 2, TEMPLATE), (sections.epochs, 1, TEMPLATE)]
    else:
        tokenwise = [(sections.raw, 2, TEMPLATE)]
    for section, axis, block in tokenwise:
        rest = section.narrow(axis, block, (blocks - 1) * block)
        rest.unflatten(axis, (blocks - 1, block)).copy_(section.narrow(axis, 0, block).unsqueeze(axis))


def read_bytes(state: CacheState) -> int:
    """Bytes of a full `state` that its attention has to read: all but the statistics of the next fit."""
    sections = state.format.layout(state.batch, state.heads, state.slots).views(state.buffer)
    return state.nbytes - sum(x.nbytes for x in (sections.average, sections.deviation, sections.energy))


class NoRoomError(Exception):
    """A cache does not fit into memory."""


def _packed_ring(shape: Shape, context: int, bits: int, size: int) -> Ring[tuple[CacheState, CacheState]]:
    """Equal keys and values in packed states, each with `context` - 1 tokens."""
    roles: tuple[Role, Role] = ("key", "value")
    forms = [Format(role, bits, shape.head_dim, torch.bfloat16) for role in roles]
    counts = [form.layout(shape.batch, shape.heads, context).nbytes for form in forms]
    spans = [-(-count // _LINE) * _LINE for count in counts]
    number = memory.copies(sum(spans), size)
    if reason := memory.lack(number * sum(spans)):
        raise NoRoomError(reason)
    arena = memory.huge((number, sum(spans)), torch.uint8)
    pairs = []
    for copy in arena:
        buffers = [part[:count] for part, count in zip(copy.split(spans), counts, strict=True)]
        key, value = (
            CacheState(form, shape.batch, shape.heads, context, buffer)
            for form, buffer in zip(forms, buffers, strict=True)
        )
        pairs.append((key, value))
    generator = torch.Generator().manual_seed(0)
    for state in pairs[0]:
        state.reset()
        fill(state, context - 1, generator)
    arena[1:] = arena[0]
    return Ring(pairs)


def _dense_ring(shape: Shape, context: int, dtype: torch.dtype, size: int, pages: Pages) -> Ring[Tensor]:
    """Equal dense caches `[2, batch, heads, context, head_dim]`: keys and values."""
    nbytes = shape.cache_bytes(context, dtype)
    number = memory.copies(nbytes, size)
    if reason := memory.lack(number * nbytes):
        raise NoRoomError(reason)
    sizes = (2, shape.batch, shape.heads, context, shape.head_dim)
    if pages == "huge":  # one mapping for all, so that small caches share their pages
        caches = list(memory.huge((number, *sizes), dtype))
    else:
        caches = [torch.empty(sizes, dtype=dtype) for _ in range(number)]
    generator = torch.Generator().manual_seed(0)
    random = torch.randn((*sizes[:3], min(context, TEMPLATE), shape.head_dim), generator=generator).to(dtype)
    for begin in range(0, context, TEMPLATE):
        part = caches[0][..., begin : begin + TEMPLATE, :]
        part.copy_(random[..., : part.shape[3], :])
    for cache in caches[1:]:
        cache.copy_(caches[0])
    return Ring(caches)


# ----------------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Step:
    """What one decode step brings: its query, its own key and value, and the static cache's mask.

    Attributes:
        query: ``[batch, query_heads, 1, head_dim]``.
        key: ``[batch, heads, 1, head_dim]``.
        value: ``[batch, heads, 1, head_dim]``.
        positions: int64 ``[1]``, the last slot.
        mask: bool ``[1, 1, 1, context]``, all True: the cache is full.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    mask: Tensor

    @classmethod
    def random(cls, shape: Shape, context: int) -> "Step":
        """Standard normal, bfloat16."""
        generator = torch.Generator().manual_seed(1)
        query, key, value = (
            torch.randn(shape.batch, heads, 1, shape.head_dim, generator=generator).bfloat16()
            for heads in (shape.query_heads, shape.heads, shape.heads)
        )
        mask = torch.ones(1, 1, 1, context, dtype=torch.bool)
        return cls(query, key, value, torch.tensor([context - 1]), mask)

    def attend(self, key: CacheState, value: CacheState, query: Tensor | None = None) -> Tensor:
        """Our attention, as a rewritten graph calls it."""
        slots = key.slots
        return ops.attend(
            self.query if query is None else query, key.buffer, value.buffer, self.key, self.value, self.positions,
            self.mask, None, None, slots, 0, slots, key.format.key(), value.format.key(),
        )  # fmt: skip

    def store(self, key: CacheState, value: CacheState) -> None:
        """Our writes, as a rewritten graph calls them."""
        slots = key.slots
        ops.store(key.buffer, self.key, self.positions, self.query, self.mask, slots, 0, 0, key.format.key())
        ops.store(value.buffer, self.value, self.positions, None, self.mask, slots, 0, 0, value.format.key())

    def error(self, key: CacheState, value: CacheState) -> float:
        """Relative error of our attention, for the worst head, against dense attention over the dequantised cache.

        The query is widened to float32, so that the rounding of the output to bfloat16 does not hide the error.
        """
        query = self.query.float()
        ours = self.attend(key, value, query)
        keys, values = key.read(), value.read()
        keys[:, :, -1:], values[:, :, -1:] = self.key, self.value
        worst = 0.0
        groups = query.shape[1] // keys.shape[1]
        for row in range(keys.shape[0]):  # head by head: a whole cache in float32 would be several times ours
            for head in range(keys.shape[1]):
                of = slice(head * groups, (head + 1) * groups)
                k, v = keys[row, head].float(), values[row, head].float()
                exact = (query[row, of, 0] @ k.T * query.shape[3] ** -0.5).softmax(-1) @ v
                difference = (ours[row, of, 0].float() - exact).norm(dim=-1) / exact.norm(dim=-1)
                worst = max(worst, float(difference.max()))
        return worst


class _Layer(nn.Module):
    """What `sdpa_attention_forward` asks of an attention layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


@dataclass
class Arm:
    """One way to do it.

    Attributes:
        name: family and variant.
        call: one call over the next cache of its ring; None if it cannot run.
        nbytes: bytes that it reads.
        error: see `Row`.
        note: see `Row`.
    """

    name: str
    call: Callable[[], object] | None = None
    nbytes: int = 0
    error: float | None = None
    note: str = ""


def _packed_arms(step: Step, shape: Shape, context: int, bits: int, settings: Settings) -> Iterator[Arm]:
    names = [family for family in ("attend", "step", "read") if family in settings.families]
    if not names:
        return
    try:
        ring = _packed_ring(shape, context, bits, settings.ring)
    except NoRoomError as short:
        yield from (Arm(f"{name}-{bits}", note=str(short)) for name in names)
        return
    pair = ring.next()
    error, note = None, ""
    if "attend" in names:
        if memory.lack(2 * shape.cache_bytes(context, torch.bfloat16)):
            note = "error not checked: no memory for the dense cache"
        else:
            error = step.error(*pair)
    used = sum(map(read_bytes, pair))

    def attend() -> None:
        step.attend(*ring.next())

    def whole() -> None:
        key, value = ring.next()
        step.store(key, value)
        step.attend(key, value)

    def read() -> None:
        for state in ring.next():
            memory.pure_read(state.buffer)

    for name in names:
        if name == "attend":
            yield Arm(f"attend-{bits}", attend, used, error, note)
        elif name == "step":
            yield Arm(f"step-{bits}", whole, used)
        else:
            yield Arm(f"read-{bits}", read, sum(state.nbytes for state in pair))


def _dense_arms(step: Step, shape: Shape, context: int, dtype: torch.dtype, settings: Settings) -> Iterator[Arm]:
    suffix = "bf16" if dtype == torch.bfloat16 else "fp32"
    names = [f"sdpa-{suffix}"] if "sdpa" in settings.families else []
    if dtype == torch.bfloat16:
        names += ["inductor-bf16"] if "inductor" in settings.families else []
        names += _BEST if "torch" in settings.families else []
        names += ["read-bf16"] if "read" in settings.families else []
    if not names:
        return
    try:
        ring = _dense_ring(shape, context, dtype, settings.ring, settings.pages)
    except NoRoomError as short:
        yield from (Arm(name, note=str(short)) for name in names)
        return
    layer, scale = _Layer(shape.groups), shape.head_dim**-0.5
    query = step.query.to(dtype)
    folded = query.view(shape.batch, shape.heads, shape.groups, shape.head_dim)

    def as_transformers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return sdpa_attention_forward(layer, query, key, value, mask, scaling=scale)[0]

    compiled = torch.compile(as_transformers, dynamic=False, fullgraph=True)
    forms: dict[str, Callable[[Tensor, Tensor], object]] = {
        f"sdpa-{suffix}": lambda k, v: as_transformers(query, k, v, step.mask),
        "inductor-bf16": lambda k, v: compiled(query, k, v, step.mask),
        "torch-fold": lambda k, v: F.scaled_dot_product_attention(folded, k, v),
        "torch-eager": lambda k, v: (folded @ k.mT * scale).softmax(-1) @ v,
        "torch-gqa": lambda k, v: F.scaled_dot_product_attention(query, k, v, enable_gqa=True),
    }
    for name in names:
        if name == "read-bf16":
            call: Callable[[], object] = lambda: memory.pure_read(ring.next())
        else:
            call = lambda form=forms[name]: form(*ring.next())  # type: ignore[misc]
        yield Arm(name, call, shape.cache_bytes(context, dtype))


# ------------------------------------------------------------------------------------------------------------------ run


@torch.no_grad()
def measure(shape: Shape, context: int, settings: Settings, tell: Callable[[str], object]) -> list[Row]:
    """Measures all arms at one context length.

    Args:
        shape: of the attention.
        context: tokens, the new one included; the caches have as many slots.
        settings: what to measure.
        tell: called with what is going on.

    Returns:
        A row for each arm and number of threads, in this order of threads.
    """
    step = Step.random(shape, context)
    arms: list[Arm] = []
    # The large ones last: where memory is short, it is they that do not run
    tell(f"{shape.name}, {context} tokens: filling dense caches")
    arms += _dense_arms(step, shape, context, torch.bfloat16, settings)
    for bits in sorted(settings.bits):
        tell(f"{shape.name}, {context} tokens: filling and checking {bits}-bit caches")
        arms += _packed_arms(step, shape, context, bits, settings)
    tell(f"{shape.name}, {context} tokens: filling dense float32 caches")
    arms += _dense_arms(step, shape, context, torch.float32, settings)
    calls = {arm.name: arm.call for arm in arms if arm.call is not None}
    rows = []
    for threads in settings.threads:
        tell(f"{shape.name}, {context} tokens, {threads} threads")
        with on_threads(threads):
            seconds = interleave(calls, rounds=settings.rounds, warm_up=WARM_UP)
        measured = [
            Row(shape.name, context, threads, arm.name, seconds.get(arm.name, []), arm.nbytes, arm.error, arm.note)
            for arm in arms
        ]
        compare(measured)
        rows += measured
    return rows


def compare(rows: Sequence[Row]) -> None:
    """Fills in ratios and read shares of rows measured together, and says which torch formulation is the best."""
    relate(rows, BASES)
    reads: Mapping[str, Row] = {row.arm.removeprefix("read-"): row for row in rows if row.arm.startswith("read-")}
    for row in rows:
        limit = reads.get(row.arm.rpartition("-")[2]) or reads.get("bf16")
        if limit is not None and limit.speed and row.speed and not row.arm.startswith("read-"):
            row.read_share = row.speed / limit.speed
    candidates = [row for row in rows if row.arm in _BEST and row.median is not None]
    if candidates:
        min(candidates, key=lambda row: row.median or math.inf).note = "best torch"
