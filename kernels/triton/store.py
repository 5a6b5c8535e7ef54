"""Writes of tokens into a state by Triton kernels: `store` of kernels/reference.py, which defines the result.

A fixed sequence of launches takes all decisions on the device, from the state's header and rows: nothing is read back,
nothing allocated depends on data. A token alone takes two, `plan_write` and `write_one`:

- `plan_write`, a program for each row of the batch, decides: which tokens stay, does a sequence begin, what is counted,
  where exact copies go, is a fit due, and which parameter set is free. It writes a plan and changes nothing else.
- `write_one`, a program for each row and head, carries the plan out: statistics, fit, codes, copies, labels.

Many tokens take eight, with a mask nine: the owner of each slot is a question of its own there (`find_owners`,
`look_at_tokens`, `find_admitted`), and statistics, fit, codes and copies are launches apart
(`sum_tokens`, `fit_rows`, `write_tokens`, `copy_tokens`). 16 bits take two or three: `plan_raw`, `write_raw`.

Launches follow each other on one stream: what one writes, the next reads.
"""

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decoquant_compile.kernels import codec, reference, tiles
from decoquant_compile.kernels.format import NO_EPOCH, Format
from decoquant_compile.kernels.triton.encode import (
    LIMIT,
    column_channels,
    cosine_table,
    divide,
    encode,
    fit,
    leaf_order,
    weights_of,
)
from decoquant_compile.kernels.triton.launch import REGISTERS, Wrap
from decoquant_compile.kernels.triton.layout import padded_slots, sections, write_codes

# Fields of a row of the plan, int64; the slots of pending copies and the flags of the tokens follow.
(
    ORIGIN, VALID, ACTIVE, END, START, SET, TOTAL, FITTED, COUNT, SEEN, ADDED, BEGIN, FIT, FIRST, PADDING_COUNT, PAD,
    SLOT, PLACE,
) = map(tl.constexpr, range(18))  # fmt: skip
FIELDS = tl.constexpr(18)

# Flags of a token
KEPT = tl.constexpr(1)  # stored; the other flags are for kept tokens only
NONZERO = tl.constexpr(2)  # in some head; exact zeros are stored as never written
ORDINARY = tl.constexpr(4)  # all channels of all heads are ordinary numbers
QUERIED = tl.constexpr(8)  # and so are all queries
PADDING = tl.constexpr(16)  # before the start of the sequence
COUNTED = tl.constexpr(32)  # enters the statistics
FLAG_RANGE = tl.constexpr(256)  # the slot stands above the flags

_UNCODED = tl.constexpr(NO_EPOCH)
_NEVER = tl.constexpr(2**62)


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _finite(x, LARGE: tl.constexpr):
    """`reference._finite` of numbers widened to float32."""
    x = tl.where(x == x, x, 0.0)  # noqa: PLR0124 - nan is not equal to itself
    x = tl.where(x == float("inf"), LARGE, x)
    return tl.where(x == float("-inf"), -LARGE, x)


@triton.jit
def _advanced(index, distance, size):
    """Index `distance` further in a ring; none of them is above its size."""
    index += distance
    return tl.where(index >= size, index - size, index)


@triton.jit
def _origin_index(origin, size):
    """Where the origin stands in the ring of slots, or of the window: ``origin % size``, int32.

    A division of 64 bits is a call, around which the compiler spills: each step here leaves 2 ** -21 of the quotient.
    """
    size = tl.maximum(size, 1)
    inverse = 1.0 / tl.cast(size, tl.float32)
    rest = origin
    for _ in tl.static_range(3):
        rest -= (rest.to(tl.float32) * inverse).to(tl.int64) * size
    for _ in tl.static_range(2):
        rest = tl.where(rest < 0, rest + size, rest)
    return tl.where(rest >= size, rest - size, rest).to(tl.int32)


@triton.jit
def _distance(position, origin, slots):
    """Slot of an absolute position, int32, and whether there is one; 0 if not."""
    distance = position - origin
    there = (distance >= 0) & (distance < slots)
    return tl.where(there, distance, 0).to(tl.int32), there


@triton.jit
def _kept(POSITIONS, ROWS, b, t, tokens, slots, rows_b, rows_t):
    """Positions ``[N]`` of the tokens `t`, -1 beyond the last one, and which of them are to be stored."""
    position = tl.load(POSITIONS + t, mask=t < tokens, other=-1)
    kept = (position >= 0) & (position < slots)
    if ROWS is not None:
        kept &= tl.load(ROWS + b * rows_b + t * rows_t, mask=t < tokens, other=0).to(tl.int32) != 0
    return position, kept


@triton.jit
def _look(
    NEW,
    QUERY,
    b,
    t,
    kept,
    heads,
    new_b,
    new_h,
    new_t,
    new_d,
    query_heads,
    query_b,
    query_h,
    query_t,
    query_d,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    LARGE: tl.constexpr,
    N: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """The flags NONZERO, ORDINARY and QUERIED of the tokens `t`, ``[N]``."""
    c = tl.arange(0, SIZE)[None, None, :]
    nonzero = tl.zeros([N], tl.int32)
    beyond = tl.zeros([N], tl.int32)
    for h0 in range(0, heads, BLOCK_HEADS):
        h = h0 + tl.arange(0, BLOCK_HEADS)[None, :, None]
        mask = kept[:, None, None] & (h < heads) & (c < HEAD_DIM)
        at = b * new_b + h.to(tl.int64) * new_h + t[:, None, None].to(tl.int64) * new_t + c * new_d
        x = tl.abs(tl.load(NEW + at, mask=mask, other=0.0).to(tl.float32))
        nonzero |= tl.max(tl.max((x > 0).to(tl.int32), 2), 1)
        beyond |= tl.max(tl.max((x <= LARGE).to(tl.int32) ^ 1, 2), 1)
    flags = nonzero * NONZERO + (beyond ^ 1) * ORDINARY
    if QUERY is not None:
        beyond = tl.zeros([N], tl.int32)
        for h0 in range(0, query_heads, BLOCK_HEADS):
            h = h0 + tl.arange(0, BLOCK_HEADS)[None, :, None]
            mask = kept[:, None, None] & (h < query_heads) & (c < HEAD_DIM)
            at = b * query_b + h.to(tl.int64) * query_h + t[:, None, None].to(tl.int64) * query_t + c * query_d
            x = tl.abs(tl.load(QUERY + at, mask=mask, other=0.0).to(tl.float32))
            beyond |= tl.max(tl.max((x <= LIMIT).to(tl.int32) ^ 1, 2), 1)
        flags += (beyond ^ 1) * QUERIED
    return flags


@triton.jit
def _admits(
    MASK,
    b,
    column,
    wanted,
    mask_heads,
    mask_queries,
    mask_b,
    mask_h,
    mask_q,
    mask_c,
    MASKED: tl.constexpr,
    N: tl.constexpr,
):
    """Whether some head and some query of row `b` admit the columns ``[N]``, int32."""
    found = tl.zeros([N], tl.int32)
    at = b * mask_b + column.to(tl.int64) * mask_c
    for head in range(mask_heads):
        for query in range(mask_queries):
            entry = tl.load(
                MASK + at + tl.cast(head, tl.int64) * mask_h + tl.cast(query, tl.int64) * mask_q, mask=wanted, other=0
            )
            found |= _entry_admits(entry, MASKED)
    return found


@triton.jit
def _entry_admits(entry, MASKED: tl.constexpr):
    if MASKED is None:  # boolean
        return (entry.to(tl.int32) != 0).to(tl.int32)
    else:
        return (entry.to(tl.float32) > MASKED).to(tl.int32)


@triton.jit
def _owner(OWNERS, b, owners_b, index, wanted, slot, kept, ONE: tl.constexpr):
    """The token that goes to a slot or to a place of the window, -1 if there is none; one token goes to `slot`."""
    if ONE:
        return tl.where((index == slot) & kept & wanted, 0, -1)
    else:
        return tl.load(OWNERS + b * owners_b + index, mask=wanted, other=-1)


@triton.jit
def _written(gains, b, heads, slot, wanted, slots, N: tl.constexpr):
    """Whether some head has a token in the slots ``[N]``."""
    kept = padded_slots(slots)
    written = tl.zeros([N], tl.int32)
    for head in range(heads):
        gain = tl.load(gains + (b * heads + head) * kept + slot, mask=wanted, other=-1.0)
        written |= (gain >= 0).to(tl.int32)
    return written != 0


# --------------------------------------------------------------------------------------------------- plan, many tokens


@triton.jit
def find_owners(POSITIONS, ROWS, OWNERS, STATE, tokens, slots, shift, rows_b, rows_t, owners_b, N: tl.constexpr):
    """The last token to go to each slot. `OWNERS`: int32 ``[batch, slots + window]``, all -1 before."""
    b = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * N + tl.arange(0, N)
    position, kept = _kept(POSITIONS, ROWS, b, t, tokens, slots, rows_b, rows_t)
    origin = tl.load(STATE.to(tl.pointer_type(tl.int64))) + shift
    slot = _advanced(_origin_index(origin, slots), tl.where(kept, position, 0).to(tl.int32), slots)
    tl.atomic_max(OWNERS + b * owners_b + slot, t, mask=kept, sem="relaxed")


@triton.jit
def look_at_tokens(
    STATE,
    PLAN,
    NEW,
    POSITIONS,
    QUERY,
    ROWS,
    OWNERS,
    heads,
    slots,
    sinks,
    window,
    tokens,
    shift,
    plan_b,
    owners_b,
    new_b,
    new_h,
    new_t,
    new_d,
    query_heads,
    query_b,
    query_h,
    query_t,
    query_d,
    rows_b,
    rows_t,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    LARGE: tl.constexpr,
    N: tl.constexpr,
):
    """Flags of each token up to QUERIED, and the last token to go to each place of the window."""
    b = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * N + tl.arange(0, N)
    position, kept = _kept(POSITIONS, ROWS, b, t, tokens, slots, rows_b, rows_t)
    distance = tl.where(kept, position, 0).to(tl.int32)
    origin = tl.load(STATE.to(tl.pointer_type(tl.int64))) + shift
    slot = _advanced(_origin_index(origin, slots), distance, slots)
    kept &= tl.load(OWNERS + b * owners_b + slot, mask=kept, other=-1) == t
    flags = _look(
        NEW, QUERY, b, t, kept, heads, new_b, new_h, new_t, new_d, query_heads, query_b, query_h, query_t, query_d,
        HEAD_DIM, SIZE, LARGE, N, 1,
    )  # fmt: skip
    flags = tl.where(kept, flags + KEPT, 0)
    tl.store(PLAN + b * plan_b + FIELDS + window + sinks + t, flags.to(tl.int64), mask=t < tokens)
    if window > 0:
        place = (_origin_index(origin, window) + distance) % window
        tl.atomic_max(
            OWNERS + b * owners_b + slots + place, t, mask=(flags & (KEPT + NONZERO)) == KEPT + NONZERO, sem="relaxed"
        )


@triton.jit
def find_admitted(
    MASK,
    ADMITTED,
    length,
    mask_heads,
    mask_queries,
    mask_b,
    mask_h,
    mask_q,
    mask_c,
    MASKED: tl.constexpr,
    QUERIES: tl.constexpr,
    N: tl.constexpr,
):
    """Columns that some head and some query admit: uint8 ``[batch | 1, length]``."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    outside = (column >= length).to(tl.int32)
    found = outside
    count = mask_heads * mask_queries
    done = 0
    while (done < count) & (tl.min(found, 0) == 0):  # the last query of a causal mask admits the most
        i = count - 1 - done - tl.arange(0, QUERIES)
        at = b * mask_b + (i // mask_queries).to(tl.int64) * mask_h + (i % mask_queries).to(tl.int64) * mask_q
        at = at[:, None] + column[None, :].to(tl.int64) * mask_c
        wanted = (i >= 0)[:, None] & (column < length)[None, :]
        entry = tl.load(MASK + at, mask=wanted, other=0)
        found |= tl.max(_entry_admits(entry, MASKED) * wanted.to(tl.int32), 0)
        done += QUERIES
    tl.store(ADMITTED + b * length + column, found.to(tl.uint8), mask=column < length)


# ---------------------------------------------------------------------------------------------------------------- plan


@triton.jit
def _list_pending(
    OWNERS,
    b,
    owners_b,
    origin,
    start,
    heads,
    slots,
    sinks,
    window,
    gains,
    epochs,
    sink_positions,
    window_positions,
    pending_slots,
    token_flags,
    slot0,
    place0,
    one_slot,
    one_place,
    one_kept,
    one_copied,
    ONE: tl.constexpr,
    N: tl.constexpr,
    BLOCK_SINKS: tl.constexpr,
):
    """Writes the slots of copies without a code, -1 for others; whether the write would leave one without a copy."""
    k = tl.arange(0, BLOCK_SINKS)
    sink = start + k
    sink_distance, in_cache = _distance(sink, origin, slots)
    in_cache &= k < sinks
    giver = _owner(OWNERS, b, owners_b, _advanced(slot0, sink_distance, slots), in_cache, one_slot, one_copied, ONE)
    if not ONE:
        flags = tl.load(token_flags + giver, mask=giver >= 0, other=0)
        giver = tl.where((flags & NONZERO) != 0, giver, -1)
    receives = giver >= 0
    sinks_after = tl.where(receives, sink, tl.load(sink_positions + k, mask=k < sinks, other=-1))
    lost = tl.zeros([], tl.int32)
    for c0 in range(0, window + sinks, N):
        c = c0 + tl.arange(0, N)
        of_window = c < window
        of_sinks = (c >= window) & (c < window + sinks)
        label = tl.load(window_positions + c, mask=of_window, other=-1)
        label = tl.where(of_window, label, tl.load(sink_positions + (c - window), mask=of_sinks, other=-1))
        distance, there = _distance(label, origin, slots)
        slot = _advanced(slot0, distance, slots)
        owner = _owner(OWNERS, b, owners_b, slot, there, one_slot, one_kept, ONE)
        pending = there & (owner < 0) & (tl.load(epochs + slot, mask=there, other=0) == _UNCODED)
        pending &= _written(gains, b, heads, slot, pending, slots, N)
        if ONE:
            evicted = one_copied & (c == one_place)
        else:
            evicted = tl.load(OWNERS + b * owners_b + slots + c, mask=of_window, other=-1) >= 0
        # What leaves the window may still be a sink. Sinks lose their place only when a sequence begins elsewhere,
        # which is rare: they count as lost even if they are in the window as well.
        stays = tl.max((label[:, None] == sinks_after[None, :]).to(tl.int32), 1) != 0
        replaced = tl.max((((c - window)[:, None] == k[None, :]) & receives[None, :]).to(tl.int32), 1) != 0
        evicted = tl.where(of_window, evicted & (~stays), replaced)
        lost |= tl.max((pending & evicted).to(tl.int32), 0)
        # A token that is in the window as well as among the sinks is encoded once.
        place = (place0 + distance) % tl.maximum(window, 1)
        twin = tl.load(window_positions + place, mask=of_sinks & pending & (window > 0), other=-1)
        slot = tl.where(pending & (of_window | (twin != label)), slot, -1)
        tl.store(pending_slots + c, slot.to(tl.int64), mask=c < window + sinks)
    return lost


@triton.jit
def plan_write(
    STATE,
    PLAN,
    NEW,
    POSITIONS,
    QUERY,
    MASK,
    ROWS,
    OWNERS,
    batch,
    heads,
    slots,
    sets,
    sinks,
    window,
    tokens,
    shift,
    first,
    plan_b,
    owners_b,
    new_b,
    new_h,
    new_t,
    new_d,
    query_heads,
    query_b,
    query_h,
    query_t,
    query_d,
    mask_heads,
    mask_queries,
    mask_length,
    mask_b,
    mask_h,
    mask_q,
    mask_c,
    rows_b,
    rows_t,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SINKS: tl.constexpr,
    ITEM: tl.constexpr,
    SIZE: tl.constexpr,
    LARGE: tl.constexpr,
    MASKED: tl.constexpr,
    ONE: tl.constexpr,
    N: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_COPIES: tl.constexpr,
    BLOCK_SINKS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Decides what a write does to a row of the batch."""
    header = STATE.to(tl.pointer_type(tl.int64))
    origin = tl.load(header) + shift
    slot0 = _origin_index(origin, slots)
    place0 = _origin_index(origin, window)
    b = tl.program_id(0).to(tl.int64)
    (
        rows, _plane0, _plane1, gains, epochs, _means, _scales, _average, _deviation, _weights, _energy, _sink_tokens,
        sink_positions, _window_tokens, window_positions,
    ) = sections(STATE, batch, heads, slots, sets, sinks, window, KEY, BITS, HEAD_DIM, PADDED, ITEM)  # fmt: skip
    rows += b * 5
    sink_positions += b * sinks
    window_positions += b * window
    epochs += b * padded_slots(slots)
    plan = PLAN + b * plan_b
    pending_slots = plan + FIELDS
    token_flags = pending_slots + window + sinks

    # Which tokens stay?
    highest = tl.full([], -1, tl.int64)
    lowest = tl.full([], _NEVER, tl.int64)
    for t0 in range(0, tokens, N):
        t = t0 + tl.arange(0, N)
        position, kept = _kept(POSITIONS, ROWS, b, t, tokens, slots, rows_b, rows_t)
        highest = tl.maximum(highest, tl.max(position, 0))
        lowest = tl.minimum(lowest, tl.min(tl.where(kept, position, _NEVER), 0))
    valid = highest < slots
    tl.device_assert(valid, "decoquant store: a position is outside of the cache")
    active = valid & (highest >= 0)
    writes = active & (lowest < _NEVER)
    if ONE:
        t = tl.arange(0, N)
        position, kept = _kept(POSITIONS, ROWS, b, t, tokens, slots, rows_b, rows_t)
        flags = _look(
            NEW, QUERY, b, t, kept, heads, new_b, new_h, new_t, new_d, query_heads, query_b, query_h, query_t, query_d,
            HEAD_DIM, SIZE, LARGE, N, BLOCK_HEADS,
        )  # fmt: skip
        flags = tl.where(kept, flags + KEPT, 0)
        one_copied = writes & ((tl.max(flags, 0) & NONZERO) != 0)
    else:
        one_copied = writes
    one_distance = tl.where(lowest < slots, lowest, 0).to(tl.int32)
    one_slot = _advanced(slot0, one_distance, slots)

    # Does a sequence begin?
    start = tl.load(rows + 0)
    number = tl.load(rows + 1)
    total = tl.load(rows + 2)
    fitted = tl.load(rows + 3)
    count = tl.load(rows + 4)
    begins = writes & ((start < 0) | ((shift == 0) & (lowest == 0)))
    if begins:
        start = origin + lowest
        if MASK is not None:
            column = tl.cast(tl.maximum(0, -first), tl.int64)
            found = tl.full([], _NEVER, tl.int64)
            while (column < mask_length) & (found == _NEVER):
                at = column + tl.arange(0, BLOCK_COLUMNS)
                admitted = _admits(
                    MASK, b, at, at < mask_length, mask_heads, mask_queries, mask_b, mask_h, mask_q, mask_c, MASKED,
                    BLOCK_COLUMNS,
                )  # fmt: skip
                found = tl.min(tl.where((admitted != 0) & (at < mask_length), at, _NEVER), 0)
                column += BLOCK_COLUMNS
            start = tl.where(found < _NEVER, origin + first + found, start)
        total = total * 0
        fitted = total - 1
        count = total

    # What is each token like?
    added = tl.zeros([], tl.int64)
    paddings = tl.zeros([], tl.int64)
    uncovered = tl.zeros([], tl.int32)  # whether a token would have neither a code nor a copy
    for t0 in range(0, tokens, N):
        t = t0 + tl.arange(0, N)
        position = tl.load(POSITIONS + t, mask=t < tokens, other=-1)
        if not ONE:
            flags = tl.load(token_flags + t, mask=t < tokens, other=0).to(tl.int32)
        stored = (flags & KEPT) != 0
        copied = stored & ((flags & NONZERO) != 0)
        distance = tl.where(stored, position, 0).to(tl.int32)
        absolute = origin + distance
        padding = stored & (absolute < start)
        counted = copied & ((flags & ORDINARY) != 0) & (absolute >= start + SINKS)
        if MASK is not None:
            column = position - first
            covered = counted & (column >= 0) & (column < mask_length)
            admitted = _admits(
                MASK, b, column, covered, mask_heads, mask_queries, mask_b, mask_h, mask_q, mask_c, MASKED, N
            )
            counted &= (~covered) | (admitted != 0)
        place = absolute - start
        in_window = copied & (window > 0)
        if not ONE:
            ring = (place0 + distance) % tl.maximum(window, 1)
            in_window &= tl.load(OWNERS + b * owners_b + slots + ring, mask=in_window, other=-1) == t
        in_sinks = copied & (place >= 0) & (place < sinks)
        uncovered |= tl.max((copied & (~padding) & (~in_window) & (~in_sinks)).to(tl.int32), 0)
        added += tl.sum(counted.to(tl.int64), 0)
        paddings += tl.sum(padding.to(tl.int64), 0)
        described = (flags & 15) + tl.where(padding, PADDING, 0) + tl.where(counted, COUNTED, 0)
        slot = _advanced(slot0, distance, slots).to(tl.int64)
        tl.store(token_flags + t, slot * FLAG_RANGE + described, mask=t < tokens)

    first_fit = tl.zeros([], tl.int32) != 0
    if writes & (fitted < 0):
        lost = _list_pending(
            OWNERS, b, owners_b, origin, start, heads, slots, sinks, window, gains, epochs, sink_positions,
            window_positions, pending_slots, token_flags, slot0, place0, one_slot,
            (place0 + one_distance) % tl.maximum(window, 1), writes, one_copied, ONE, BLOCK_COPIES, BLOCK_SINKS,
        )  # fmt: skip
        first_fit = (uncovered | lost) != 0

    seen = count
    total += added
    count += added
    again = active & (fitted >= 0) & (2 * total >= 3 * fitted) & (total >= 1)
    wanted = first_fit | again
    pads = active & (paddings > 0) & (number < 0)
    target = tl.full([], -1, tl.int64)
    if wanted | pads:
        # A set is free if no token names it, those about to be overwritten aside.
        used = tl.zeros([BLOCK_SLOTS], tl.int64)
        for s0 in range(0, slots, BLOCK_SLOTS):
            index = s0 + tl.arange(0, BLOCK_SLOTS)
            inside = index < slots
            # Seen from the origin, what leaves the cache is behind the last slot.
            freed = _advanced(slots - slot0, tl.where(inside, index, 0), slots) >= slots - shift
            owner = _owner(OWNERS, b, owners_b, index, inside, one_slot, writes, ONE)
            epoch = tl.load(epochs + index, mask=inside, other=_UNCODED).to(tl.int64)
            live = inside & (~freed) & (owner < 0) & (epoch < sets)
            live &= _written(gains, b, heads, index, live, slots, BLOCK_SLOTS)
            used |= tl.where(live, tl.full([BLOCK_SLOTS], 1, tl.int64) << tl.where(live, epoch, 0), 0)
        for n in range(sets):
            taken = tl.max(((used >> n) & 1).to(tl.int32), 0) != 0
            target = tl.where((target < 0) & (~taken), n, target)
    fits = wanted & (target >= 0)
    fitted = tl.where(fits, total, tl.where(first_fit, 0, fitted))
    # What follows may be of another kind: the past counts half as much with each fit.
    count = tl.where(fits, count - count // 2, count)
    pads = pads & (~fits) & (target >= 0)
    number = tl.where(fits | pads, target, number)

    tl.store(plan + ORIGIN, origin)
    tl.store(plan + VALID, valid.to(tl.int64))
    tl.store(plan + ACTIVE, active.to(tl.int64))
    tl.store(plan + END, tl.maximum(tl.load(header + 1), origin + highest + 1))
    tl.store(plan + START, start)
    tl.store(plan + SET, number)
    tl.store(plan + TOTAL, total)
    tl.store(plan + FITTED, fitted)
    tl.store(plan + COUNT, count)
    tl.store(plan + SEEN, seen)
    tl.store(plan + ADDED, added)
    tl.store(plan + BEGIN, begins.to(tl.int64))
    tl.store(plan + FIT, fits.to(tl.int64))
    tl.store(plan + FIRST, first_fit.to(tl.int64))
    tl.store(plan + PADDING_COUNT, paddings)
    tl.store(plan + PAD, pads.to(tl.int64))
    tl.store(plan + SLOT, slot0.to(tl.int64))
    tl.store(plan + PLACE, place0.to(tl.int64))


# --------------------------------------------------------------------------------------------------- statistics and fit


@triton.jit
def _merge(seen, average, deviation, added, mean, spread):
    """Adds `added` tokens to running statistics (Chan, Golub and LeVeque's pairwise update)."""
    total = tl.maximum(seen + added, 1.0)
    shift = tl.where(added > 0, mean - average, 0.0)
    average += divide(shift * added, total)
    deviation += spread + divide(shift * shift * (seen * added), total)
    return average, deviation


@triton.jit
def _set_of(plan, means, scales, weights, b, h, heads, sets, channel, mask, KEY: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Mean, scale and weight ``[heads, SIZE]``, float32, of the row's parameter set."""
    number = tl.maximum(tl.load(plan + SET), 0)
    at = ((b * sets + number) * heads + h) * HEAD_DIM + channel
    scale = tl.load(scales + at, mask=mask, other=1.0).to(tl.float32)
    if KEY:
        mean = tl.load(means + at, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weights + (b * heads + h) * HEAD_DIM + channel, mask=mask, other=1.0).to(tl.float32)
    else:
        mean = tl.zeros_like(scale)
        weight = mean
    return mean, scale, weight


@triton.jit
def _adopt(
    plan,
    means,
    scales,
    weights,
    b,
    h,
    heads,
    sets,
    channel,
    mask,
    average,
    variance,
    weight,
    KEY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Fits, makes the result the row's set, and returns it as `_set_of` does. `weight`: bfloat16."""
    at = ((b * sets + tl.load(plan + SET)) * heads + h) * HEAD_DIM + channel
    mean, scale = fit(average, variance, weight.to(tl.float32), HEAD_DIM, KEY)
    if KEY:
        tl.store(means + at, mean, mask=mask)
        tl.store(weights + (b * heads + h) * HEAD_DIM + channel, weight, mask=mask)
    tl.store(scales + at, scale, mask=mask)
    scale = tl.where(mask, scale.to(tl.float32), 1.0)
    return mean.to(tl.float32), scale, tl.where(mask, weight.to(tl.float32), 1.0)


@triton.jit
def _refit(
    plan,
    means,
    scales,
    weights,
    b,
    h,
    heads,
    sets,
    channel,
    mask,
    average,
    deviation,
    energy,
    KEY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Fits to the statistics."""
    count = tl.load(plan + SEEN) + tl.load(plan + ADDED)
    count = tl.maximum(count, 1).to(tl.float32)
    variance = divide(deviation, count)
    weight = weights_of(energy, HEAD_DIM) if KEY else tl.full(energy.shape, 1.0, tl.bfloat16)
    return _adopt(
        plan, means, scales, weights, b, h, heads, sets, channel, mask, average, variance, weight, KEY, HEAD_DIM
    )


@triton.jit
def _free_slots(gains, b, h, heads, slots, shift, slot0, spared, N: tl.constexpr):
    """Slots that leave the cache as it moves, but for `spared`, were never written. ``h``: ``[heads, 1]``."""
    count = tl.minimum(shift, slots)
    kept = padded_slots(slots)
    begin = _advanced(slot0, slots - count, slots)
    for i0 in range(0, count, N):
        i = i0 + tl.arange(0, N)[None, :]
        slot = _advanced(begin, tl.minimum(i, slots - 1), slots)
        at = (b * heads + h) * kept + slot
        tl.store(gains + at, tl.full(at.shape, -1.0, tl.float16), mask=(i < count) & (slot != spared) & (h < heads))


@triton.jit
def sum_tokens(
    PLAN,
    NEW,
    QUERY,
    SUMS,
    heads,
    sinks,
    window,
    tokens,
    plan_b,
    new_b,
    new_h,
    new_t,
    new_d,
    query_groups,
    query_b,
    query_h,
    query_t,
    query_d,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    KEY: tl.constexpr,
    TILES: tl.constexpr,
    N: tl.constexpr,
):
    """Statistics of the counted tokens of a run of ``TILES * N``.

    `SUMS`: float32 ``[batch, heads, runs, 4, head_dim]``: means, sums of squared deviations, sums of squared queries,
    numbers of tokens.
    """
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    run = tl.program_id(2)
    c = tl.arange(0, SIZE)
    average = tl.zeros([SIZE], tl.float32)
    deviation = tl.zeros([SIZE], tl.float32)
    energy = tl.zeros([SIZE], tl.float32)
    seen = tl.zeros([], tl.float32)
    token_flags = PLAN + b * plan_b + FIELDS + window + sinks
    for t0 in range(run * TILES * N, tl.minimum(tokens, (run + 1) * TILES * N), N):
        t = t0 + tl.arange(0, N)
        flags = tl.load(token_flags + t, mask=t < tokens, other=0)
        counted = (flags & COUNTED) != 0
        added = tl.sum(counted.to(tl.float32), 0)
        mask = counted[:, None] & (c < HEAD_DIM)[None, :]
        at = b * new_b + h * new_h + t[:, None].to(tl.int64) * new_t + c[None, :] * new_d
        x = tl.load(NEW + at, mask=mask, other=0.0).to(tl.float32)
        mean = divide(tl.sum(x, 0), tl.maximum(added, 1.0))
        distance = tl.where(mask, x - mean[None, :], 0.0)
        average, deviation = _merge(seen, average, deviation, added, mean, tl.sum(distance * distance, 0))
        seen += added
        if KEY and QUERY is not None:
            mask &= ((flags & QUERIED) != 0)[:, None]
            for group in range(query_groups):
                of_group = b * query_b + (h * query_groups + group) * query_h + t[:, None].to(tl.int64) * query_t
                q = tl.load(QUERY + of_group + c[None, :] * query_d, mask=mask, other=0.0).to(tl.float32)
                energy += tl.sum(q * q, 0)
    sums = SUMS + (((b * heads + h) * tl.num_programs(2) + run) * 4) * HEAD_DIM + c
    tl.store(sums, average, mask=c < HEAD_DIM)
    tl.store(sums + HEAD_DIM, deviation, mask=c < HEAD_DIM)
    tl.store(sums + 2 * HEAD_DIM, energy, mask=c < HEAD_DIM)
    tl.store(sums + 3 * HEAD_DIM, tl.zeros([SIZE], tl.float32) + seen, mask=c < HEAD_DIM)


@triton.jit
def fit_rows(
    STATE,
    PLAN,
    NEW,
    SUMS,
    batch,
    heads,
    slots,
    sets,
    sinks,
    window,
    tokens,
    runs,
    shift,
    plan_b,
    new_b,
    new_h,
    new_t,
    new_d,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ITEM: tl.constexpr,
    SIZE: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Takes the statistics of many tokens into those of a head, fits if that is due, and frees slots that go."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    (
        _rows, _plane0, _plane1, gains, _epochs, means, scales, averages, deviations, weights, energies, _sink_tokens,
        _sink_positions, _window_tokens, _window_positions,
    ) = sections(STATE, batch, heads, slots, sets, sinks, window, KEY, BITS, HEAD_DIM, PADDED, ITEM)  # fmt: skip
    plan = PLAN + b * plan_b
    if tl.load(plan + VALID) != 0:
        slot0 = tl.load(plan + SLOT).to(tl.int32)
        _free_slots(gains, b, tl.full([1, 1], 0, tl.int64) + h, heads, slots, shift, slot0, -1, BLOCK_SLOTS)
    if tl.load(plan + ACTIVE) == 0:
        return
    channel = tl.arange(0, SIZE)[None, :]
    mask = channel < HEAD_DIM
    at = (b * heads + h) * HEAD_DIM + channel
    goes_on = mask & (tl.load(plan + BEGIN) == 0)
    average = tl.load(averages + at, mask=goes_on, other=0.0)
    deviation = tl.load(deviations + at, mask=goes_on, other=0.0)
    energy = tl.zeros_like(average)
    if KEY:
        energy = tl.load(energies + at, mask=goes_on, other=0.0)
    seen = tl.load(plan + SEEN).to(tl.float32)
    sums = SUMS + ((b * heads + h) * runs * 4) * HEAD_DIM + channel
    for _run in range(runs):
        added = tl.load(SUMS + ((b * heads + h) * runs + _run) * 4 * HEAD_DIM + 3 * HEAD_DIM)
        mean = tl.load(sums, mask=mask, other=0.0)
        spread = tl.load(sums + HEAD_DIM, mask=mask, other=0.0)
        average, deviation = _merge(seen, average, deviation, added, mean, spread)
        energy += tl.load(sums + 2 * HEAD_DIM, mask=mask, other=0.0)
        seen += added
        sums += 4 * HEAD_DIM
    share = 1.0
    heads_of = tl.full([1, 1], 0, tl.int64) + h
    if tl.load(plan + FIT) != 0:
        _refit(
            plan, means, scales, weights, b, heads_of, heads, sets, channel, mask, average, deviation, energy, KEY,
            HEAD_DIM,
        )  # fmt: skip
        share = 0.5
    tl.store(averages + at, average, mask=mask)
    tl.store(deviations + at, deviation * share, mask=mask)
    if KEY:
        tl.store(energies + at, energy * share, mask=mask)
    if tl.load(plan + PAD) != 0:
        count = tl.load(plan + PADDING_COUNT).to(tl.float32)
        mean = tl.zeros_like(average)
        power = tl.zeros_like(average)
        for t in range(tokens):
            padding = (tl.load(plan + FIELDS + window + sinks + t) & PADDING) != 0
            at = b * new_b + h * new_h + tl.cast(t, tl.int64) * new_t + channel * new_d
            x = _finite(tl.load(NEW + at, mask=mask & padding, other=0.0).to(tl.float32), LARGE)
            x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
            x = divide(x, count)
            mean += x
            power += x * x * count
        _adopt(
            plan, means, scales, weights, b, heads_of, heads, sets, channel, mask, mean,
            tl.maximum(power - mean * mean, 0.0), tl.full(mean.shape, 1.0, tl.bfloat16), KEY, HEAD_DIM,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- codes


@triton.jit
def _put(
    i,
    plan,
    NEW,
    plane0,
    plane1,
    gains,
    epochs,
    sink_tokens,
    window_tokens,
    b,
    h0,
    heads,
    slots,
    sinks,
    window,
    tokens,
    new_b,
    new_h,
    new_t,
    new_d,
    mean,
    scale,
    weight,
    T: tl.constexpr,
    H: tl.constexpr,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    RUN: tl.constexpr,
    RUN_PADDED: tl.constexpr,
    LEAF: tl.constexpr,
    COSINES: tl.constexpr,
    LARGE: tl.constexpr,
):
    """Writes tokens to their slots: encoded, or as written but not encoded.

    Items ``i .. i + T`` are pending copies, from window and sinks, and behind them the new tokens; of each the heads
    ``h0 .. h0 + H``.
    """
    N: tl.constexpr = T * H
    SIZE: tl.constexpr = ORDER * RUN_PADDED
    channel, valid = column_channels(SIZE, RUN, RUN_PADDED)
    copies = window + sinks
    n = tl.arange(0, N)
    h = (h0 + n // T)[:, None].to(tl.int64)
    item = (i + n % T)[:, None]
    fitted = tl.load(plan + FITTED) >= 0
    is_copy = item < copies
    entry = tl.load(plan + FIELDS + item, mask=item < copies + tokens, other=-1)
    token = item - copies
    # The slot of a token and whether it is encoded: of a copy it is the entry itself.
    flags = tl.where(is_copy, 0, tl.maximum(entry, 0))
    keep = tl.where(is_copy, (entry >= 0) & (tl.load(plan + FIRST) != 0), (flags & KEPT) != 0)
    keep &= item < copies + tokens
    encoded = keep & (is_copy | fitted | ((flags & PADDING) != 0))
    slot = tl.where(is_copy, tl.maximum(entry, 0), flags // FLAG_RANGE)

    # A leaf, all tokens, the next leaf; and a channel a thread, as if they were not contiguous. The compiler keeps the
    # layout of loads: so threads lie along the channels of a leaf and along tokens, and all have work in `encode`.
    WIDTH: tl.constexpr = LEAF * RUN_PADDED
    column = (tl.arange(0, SIZE // WIDTH) * WIDTH)[:, None, None] + tl.arange(0, WIDTH)[None, None, :]
    channels = column // RUN_PADDED * RUN + column % RUN_PADDED
    mask = (keep & (h < heads))[None, :, :] & (column % RUN_PADDED < RUN)
    items = item[None, :, :]
    at = b * new_b + h * new_h + token.to(tl.int64) * new_t
    at = tl.max_contiguous(at[None, :, :] + channels * new_d, [1, 1, 1])
    x = tl.load(NEW + at, mask=mask & (items >= copies), other=0.0).to(tl.float32)
    x = _finite(x, LARGE)
    if i < copies:
        place = ((b * heads + h) * HEAD_DIM)[None, :, :]
        from_window = mask & (items < window)
        at = tl.max_contiguous(place * window + items * HEAD_DIM + channels, [1, 1, 1])
        x += tl.load(window_tokens + at, mask=from_window, other=0.0).to(tl.float32)
        from_sinks = mask & (items >= window) & (items < copies)
        at = tl.max_contiguous(place * sinks + (items - window) * HEAD_DIM + channels, [1, 1, 1])
        x += tl.load(sink_tokens + at, mask=from_sinks, other=0.0).to(tl.float32)
    nonzero = tl.max(tl.max((x != 0).to(tl.int32), 2), 0)[:, None] != 0  # of the tile below threads would hold copies
    x = tl.reshape(tl.permute(x, 1, 0, 2), [N, SIZE])
    gain = tl.zeros([N, 1], tl.float32)
    if tl.max(encoded.to(tl.int32)) != 0:
        codes, found = encode(x, mean, scale, weight, N, H, HEAD_DIM, ORDER, RUN, RUN_PADDED, LEAF, COSINES, KEY, BITS)
        gain = tl.where(encoded, found[:, None], 0.0)
        head = b * heads + h
        write_codes(
            plane0, plane1, codes, tl.where(valid, channel, -1), head, slot, slots, encoded & (h < heads), N, SIZE, KEY,
            BITS, HEAD_DIM, RUN, RUN_PADDED, PADDED, PADDED_SIZE,
        )  # fmt: skip
    gain = tl.where(nonzero, gain, -1.0)
    kept_slots = padded_slots(slots)
    tl.store(gains + (b * heads + h) * kept_slots + slot, gain.to(tl.float16), mask=keep & (h < heads))
    number = tl.maximum(tl.load(plan + SET), 0)
    epoch = tl.where(encoded, number, _UNCODED).to(tl.uint8)
    tl.store(epochs + b * kept_slots + slot, epoch, mask=keep & (h == 0))


@triton.jit
def write_tokens(
    STATE,
    PLAN,
    NEW,
    batch,
    heads,
    slots,
    sets,
    sinks,
    window,
    tokens,
    plan_b,
    new_b,
    new_h,
    new_t,
    new_d,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ITEM: tl.constexpr,
    ORDER: tl.constexpr,
    RUN: tl.constexpr,
    RUN_PADDED: tl.constexpr,
    LEAF: tl.constexpr,
    COSINES: tl.constexpr,
    LARGE: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
):
    """Encodes and packs pending copies and new tokens."""
    b = tl.program_id(0).to(tl.int64)
    h0 = tl.program_id(1) * H
    i = tl.program_id(2) * T
    (
        _rows, plane0, plane1, gains, epochs, means, scales, _averages, _deviations, weights, _energies, sink_tokens,
        _sink_positions, window_tokens, _window_positions,
    ) = sections(STATE, batch, heads, slots, sets, sinks, window, KEY, BITS, HEAD_DIM, PADDED, ITEM)  # fmt: skip
    plan = PLAN + b * plan_b
    if tl.load(plan + ACTIVE) == 0:
        return
    channel, valid = column_channels(ORDER * RUN_PADDED, RUN, RUN_PADDED)
    h = (h0 + tl.arange(0, H))[:, None].to(tl.int64)
    mean, scale, weight = _set_of(
        plan, means, scales, weights, b, h, heads, sets, channel, valid & (h < heads), KEY, HEAD_DIM
    )
    if (i + T > window + sinks) | (tl.load(plan + FIRST) != 0):
        _put(
            i, plan, NEW, plane0, plane1, gains, epochs, sink_tokens.to(tl.pointer_type(NEW.dtype.element_ty)),
            window_tokens.to(tl.pointer_type(NEW.dtype.element_ty)), b, h0, heads, slots, sinks, window, tokens, new_b,
            new_h, new_t, new_d, mean, scale, weight, T, H, KEY, BITS, HEAD_DIM, PADDED, PADDED_SIZE, ORDER, RUN,
            RUN_PADDED, LEAF, COSINES, LARGE,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- copies and labels


@triton.jit
def _label(
    plan,
    OWNERS,
    b,
    rows,
    sink_positions,
    window_positions,
    slots,
    sinks,
    window,
    owners_b,
    one_slot,
    one_kept,
    one_copied,
    ONE: tl.constexpr,
    N: tl.constexpr,
):
    """Labels of the copies, the row's fields and the header."""
    origin = tl.load(plan + ORIGIN)
    start = tl.load(plan + START)
    slot0 = tl.load(plan + SLOT).to(tl.int32)
    for c0 in range(0, window + sinks, N):
        c = c0 + tl.arange(0, N)
        of_window = c < window
        of_sinks = (c >= window) & (c < window + sinks)
        at_window = window_positions + b * window + c
        at_sinks = sink_positions + b * sinks + (c - window)
        label = tl.load(at_window, mask=of_window, other=-1)
        label = tl.where(of_window, label, tl.load(at_sinks, mask=of_sinks, other=-1))
        distance, there = _distance(label, origin, slots)
        owner = _owner(OWNERS, b, owners_b, _advanced(slot0, distance, slots), there, one_slot, one_kept, ONE)
        label = tl.where(owner >= 0, -1, label)
        owner = _copy_owner(
            plan, OWNERS, b, c, origin, start, slots, sinks, window, owners_b, one_slot, one_copied, ONE
        )
        if ONE:
            slot = tl.full([N], 0, tl.int32) + one_slot
        else:
            token = plan + FIELDS + window + sinks + owner
            slot = (tl.load(token, mask=owner >= 0, other=0) // FLAG_RANGE).to(tl.int32)
        label = tl.where(owner >= 0, origin + _advanced(slots - slot0, slot, slots), label)
        tl.store(at_window, label, mask=of_window)
        tl.store(at_sinks, label, mask=of_sinks)
    rows += b * 5
    tl.store(rows + 0, start)
    tl.store(rows + 1, tl.load(plan + SET))
    tl.store(rows + 2, tl.load(plan + TOTAL))
    tl.store(rows + 3, tl.load(plan + FITTED))
    tl.store(rows + 4, tl.load(plan + COUNT))


@triton.jit
def _copy_owner(
    plan, OWNERS, b, c, origin, start, slots, sinks, window, owners_b, one_slot, one_copied, ONE: tl.constexpr
):
    """The token of which the copy ``c [N]``, window before sinks, is to be made; -1: none."""
    of_window = c < window
    sink = start + (c - window)
    distance, in_cache = _distance(sink, origin, slots)
    in_cache &= (c >= window) & (c < window + sinks)
    slot0 = tl.load(plan + SLOT).to(tl.int32)
    owner = _owner(OWNERS, b, owners_b, _advanced(slot0, distance, slots), in_cache, one_slot, one_copied, ONE)
    if ONE:
        one_distance = _advanced(slots - slot0, one_slot, slots)
        place = (tl.load(plan + PLACE).to(tl.int32) + one_distance) % tl.maximum(window, 1)
        in_window = tl.where((c == place) & one_copied, 0, -1)
    else:
        token = plan + FIELDS + window + sinks + owner
        flags = tl.load(token, mask=owner >= 0, other=0)
        owner = tl.where((flags & NONZERO) != 0, owner, -1)
        in_window = tl.load(OWNERS + b * owners_b + slots + c, mask=of_window, other=-1)
    return tl.where(of_window, in_window, owner)


@triton.jit
def _advance(STATE, plan, b):
    """The header, by the first program that is about it."""
    header = STATE.to(tl.pointer_type(tl.int64))
    if (b == 0) & (tl.load(plan + VALID) != 0):
        tl.store(header, tl.load(plan + ORIGIN))
        if tl.load(plan + ACTIVE) != 0:
            tl.store(header + 1, tl.load(plan + END))


@triton.jit
def copy_tokens(
    STATE,
    PLAN,
    NEW,
    OWNERS,
    batch,
    heads,
    slots,
    sets,
    sinks,
    window,
    plan_b,
    owners_b,
    new_b,
    new_h,
    new_t,
    new_d,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ITEM: tl.constexpr,
    SIZE: tl.constexpr,
    LARGE: tl.constexpr,
    N: tl.constexpr,
):
    """Exact copies of new tokens in window and sinks; the first head also labels them."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    (
        rows, _plane0, _plane1, _gains, _epochs, _means, _scales, _averages, _deviations, _weights, _energies,
        sink_tokens, sink_positions, window_tokens, window_positions,
    ) = sections(STATE, batch, heads, slots, sets, sinks, window, KEY, BITS, HEAD_DIM, PADDED, ITEM)  # fmt: skip
    plan = PLAN + b * plan_b
    if h == 0:
        _advance(STATE, plan, b)
    if tl.load(plan + ACTIVE) == 0:
        return
    origin = tl.load(plan + ORIGIN)
    start = tl.load(plan + START)
    dtype = NEW.dtype.element_ty
    d = tl.arange(0, SIZE)[None, :]
    for c0 in range(0, window + sinks, N):
        c = c0 + tl.arange(0, N)
        owner = _copy_owner(plan, OWNERS, b, c, origin, start, slots, sinks, window, owners_b, 0, False, False)
        mask = (owner >= 0)[:, None] & (d < HEAD_DIM)
        at = b * new_b + h * new_h + owner[:, None].to(tl.int64) * new_t + d * new_d
        x = _finite(tl.load(NEW + at, mask=mask, other=0.0).to(tl.float32), LARGE).to(dtype)
        c = c[:, None]
        at = ((b * heads + h) * window + c) * HEAD_DIM + d
        tl.store(window_tokens.to(tl.pointer_type(dtype)) + at, x, mask=mask & (c < window))
        at = ((b * heads + h) * sinks + (c - window)) * HEAD_DIM + d
        tl.store(sink_tokens.to(tl.pointer_type(dtype)) + at, x, mask=mask & (c >= window))
    if h == 0:
        _label(
            plan, OWNERS, b, rows, sink_positions, window_positions, slots, sinks, window, owners_b, 0, False,
            False, False, N,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- one token


@triton.jit
def write_one(
    STATE,
    PLAN,
    NEW,
    QUERY,
    batch,
    heads,
    slots,
    sets,
    sinks,
    window,
    shift,
    plan_b,
    new_b,
    new_h,
    new_t,
    new_d,
    query_groups,
    query_b,
    query_h,
    query_d,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ITEM: tl.constexpr,
    ORDER: tl.constexpr,
    RUN: tl.constexpr,
    RUN_PADDED: tl.constexpr,
    LEAF: tl.constexpr,
    COSINES: tl.constexpr,
    LARGE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_COPIES: tl.constexpr,
):
    """Carries out the plan for one token and ``H`` heads."""
    b = tl.program_id(0).to(tl.int64)
    h0 = tl.program_id(1) * H
    (
        rows, plane0, plane1, gains, epochs, means, scales, averages, deviations, weights, energies, sink_tokens,
        sink_positions, window_tokens, window_positions,
    ) = sections(STATE, batch, heads, slots, sets, sinks, window, KEY, BITS, HEAD_DIM, PADDED, ITEM)  # fmt: skip
    plan = PLAN + b * plan_b
    dtype = NEW.dtype.element_ty
    sink_tokens = sink_tokens.to(tl.pointer_type(dtype))
    window_tokens = window_tokens.to(tl.pointer_type(dtype))
    origin = tl.load(plan + ORIGIN)
    entry = tl.load(plan + FIELDS + window + sinks)
    active = tl.load(plan + ACTIVE) != 0
    one_slot = (entry // FLAG_RANGE).to(tl.int32)
    slot0 = tl.load(plan + SLOT).to(tl.int32)
    kept = active & ((entry & KEPT) != 0)
    copied = kept & ((entry & NONZERO) != 0)
    channel, valid = column_channels(ORDER * RUN_PADDED, RUN, RUN_PADDED)
    h = (h0 + tl.arange(0, H))[:, None].to(tl.int64)
    if shift > 0:
        if tl.load(plan + VALID) != 0:
            spared = tl.where(kept, one_slot, -1)
            _free_slots(gains, b, h, heads, slots, shift, slot0, spared, BLOCK_SLOTS)
    if h0 == 0:
        _advance(STATE, plan, b)
    if not active:
        return

    # Statistics
    mask = valid & (h < heads)
    at = (b * heads + h) * HEAD_DIM + channel
    goes_on = mask & (tl.load(plan + BEGIN) == 0)
    x = tl.load(NEW + b * new_b + h * new_h + channel * new_d, mask=mask & kept, other=0.0).to(tl.float32)
    average = tl.load(averages + at, mask=goes_on, other=0.0)
    deviation = tl.load(deviations + at, mask=goes_on, other=0.0)
    counted = (entry & COUNTED) != 0
    added = counted.to(tl.float32)
    mean = tl.where(counted, x, 0.0)
    average, deviation = _merge(tl.load(plan + SEEN).to(tl.float32), average, deviation, added, mean, 0.0)
    energy = tl.zeros_like(average)
    if KEY:
        energy = tl.load(energies + at, mask=goes_on, other=0.0)
        if QUERY is not None:
            if counted & ((entry & QUERIED) != 0):
                for group in range(query_groups):
                    head = h * query_groups + group
                    q = tl.load(QUERY + b * query_b + head * query_h + channel * query_d, mask=mask, other=0.0)
                    energy += q.to(tl.float32) * q.to(tl.float32)
    x = _finite(x, LARGE)

    # Fit
    share = 1.0
    if tl.load(plan + FIT) != 0:
        mean, scale, weight = _refit(
            plan, means, scales, weights, b, h, heads, sets, channel, mask, average, deviation, energy, KEY, HEAD_DIM
        )
        share = 0.5
    elif tl.load(plan + PAD) != 0:
        limited = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
        mean, scale, weight = _adopt(
            plan, means, scales, weights, b, h, heads, sets, channel, mask, limited, tl.zeros_like(x),
            tl.full(x.shape, 1.0, tl.bfloat16), KEY, HEAD_DIM,
        )  # fmt: skip
    else:
        mean, scale, weight = _set_of(plan, means, scales, weights, b, h, heads, sets, channel, mask, KEY, HEAD_DIM)
    tl.store(averages + at, average, mask=mask)
    tl.store(deviations + at, deviation * share, mask=mask)
    if KEY:
        tl.store(energies + at, energy * share, mask=mask)

    # Codes: of pending copies, if this is the first fit, and of the token
    copies = window + sinks
    for i in range(tl.where(tl.load(plan + FIRST) != 0, 0, copies), copies + 1):
        _put(
            i, plan, NEW, plane0, plane1, gains, epochs, sink_tokens, window_tokens, b, h0, heads, slots, sinks, window,
            1, new_b, new_h, new_t, new_d, mean, scale, weight, 1, H, KEY, BITS, HEAD_DIM, PADDED, PADDED_SIZE, ORDER,
            RUN, RUN_PADDED, LEAF, COSINES, LARGE,
        )  # fmt: skip

    # Copies, once all of the program has read those before them
    tl.debug_barrier()
    distance = _advanced(slots - slot0, one_slot, slots)
    place = origin + distance - tl.load(plan + START)
    if window > 0:
        at = (b * heads + h) * window + (tl.load(plan + PLACE).to(tl.int32) + distance) % window
        at = at * HEAD_DIM + channel
        tl.store(window_tokens + at, x.to(dtype), mask=mask & copied)
    at = ((b * heads + h) * sinks + place) * HEAD_DIM + channel
    tl.store(sink_tokens + at, x.to(dtype), mask=mask & copied & (place >= 0) & (place < sinks))
    if h0 == 0:
        _label(
            plan, PLAN, b, rows, sink_positions, window_positions, slots, sinks, window, 0, one_slot, kept, copied,
            True, BLOCK_COPIES,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- 16 bits


@triton.jit
def plan_raw(STATE, PLAN, POSITIONS, slots, tokens, shift, N: tl.constexpr):
    """Decides what a write in 16 bits does to the cache: ORIGIN, VALID, ACTIVE and END."""
    header = STATE.to(tl.pointer_type(tl.int64))
    highest = tl.full([], -1, tl.int64)
    for t0 in range(0, tokens, N):
        t = t0 + tl.arange(0, N)
        highest = tl.maximum(highest, tl.max(tl.load(POSITIONS + t, mask=t < tokens, other=-1), 0))
    valid = highest < slots
    tl.device_assert(valid, "decoquant store: a position is outside of the cache")
    origin = tl.load(header) + shift
    tl.store(PLAN + ORIGIN, origin)
    tl.store(PLAN + VALID, valid.to(tl.int64))
    tl.store(PLAN + ACTIVE, (valid & (highest >= 0)).to(tl.int64))
    tl.store(PLAN + END, tl.maximum(tl.load(header + 1), origin + highest + 1))
    tl.store(PLAN + SLOT, _origin_index(origin, slots).to(tl.int64))


@triton.jit
def write_raw(
    STATE,
    PLAN,
    NEW,
    POSITIONS,
    ROWS,
    OWNERS,
    batch,
    heads,
    slots,
    tokens,
    shift,
    owners_b,
    new_b,
    new_h,
    new_t,
    new_d,
    rows_b,
    rows_t,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    ONE: tl.constexpr,
    N: tl.constexpr,
):
    """Writes tokens as they are, and zeros to slots that leave the cache."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    if (h == 0) & (tl.program_id(2) == 0):
        _advance(STATE, PLAN, b)
    if tl.load(PLAN + VALID) == 0:
        return
    slot0 = tl.load(PLAN + SLOT).to(tl.int32)
    dtype = NEW.dtype.element_ty
    # The header and the rows of the batch, of 40 bytes, lie before it.
    raw = (STATE + 64 + (batch * 40 + 63) // 64 * 64).to(tl.pointer_type(dtype)) + (b * heads + h) * slots * HEAD_DIM
    d = tl.arange(0, SIZE)[None, :]
    if ONE:
        position, kept = _kept(POSITIONS, ROWS, b, tl.arange(0, 1), tokens, slots, rows_b, rows_t)
        one_kept = tl.max(kept.to(tl.int32), 0) != 0
        one_slot = _advanced(slot0, tl.max(tl.where(kept, position, 0), 0).to(tl.int32), slots)
    else:
        one_slot = slot0
        one_kept = False
    count = tl.minimum(shift, slots)
    begin = _advanced(slot0, slots - count, slots)
    for i0 in range(tl.program_id(2) * N, count, tl.num_programs(2) * N):
        i = i0 + tl.arange(0, N)
        slot = _advanced(begin, tl.minimum(i, slots - 1), slots)
        owner = _owner(OWNERS, b, owners_b, slot, i < count, one_slot, one_kept, ONE)
        mask = ((i < count) & (owner < 0))[:, None] & (d < HEAD_DIM)
        tl.store(raw + slot[:, None].to(tl.int64) * HEAD_DIM + d, tl.zeros([N, SIZE], dtype), mask=mask)
    t = tl.program_id(2) * N + tl.arange(0, N)
    position, kept = _kept(POSITIONS, ROWS, b, t, tokens, slots, rows_b, rows_t)
    slot = _advanced(slot0, tl.where(kept, position, 0).to(tl.int32), slots)
    if not ONE:
        kept &= tl.load(OWNERS + b * owners_b + slot, mask=kept, other=-1) == t
    mask = kept[:, None] & (d < HEAD_DIM)
    at = b * new_b + h * new_h + t[:, None].to(tl.int64) * new_t + d * new_d
    tl.store(raw + slot[:, None].to(tl.int64) * HEAD_DIM + d, tl.load(NEW + at, mask=mask, other=0.0), mask=mask)


# -------------------------------------------------------------------------------------------------------------- launch


class Blocks(NamedTuple):
    """Sizes of tiles; results do not depend on them, but for rounding in the statistics."""

    heads: int = 1
    """Heads that a program of `write_one` takes."""
    tokens: int = 4
    """Tokens that a program of `write_tokens` takes; half as many of wide or odd heads, or in 5 bits."""
    copies: int = 64
    slots: int = 256
    looked: int = 16
    """Tokens of a program of `look_at_tokens`."""
    summed: int = 32
    """Tokens of a tile of `sum_tokens` ..."""
    tiles: int = 8
    """... and tiles of a program."""


_BLOCKS: Final = Blocks()
_LARGEST_RUN: Final = 16
# `reference._MASKED` as the oracle's comparison rounds it
_MASKED: Final = {torch.float32: -9000.0, torch.bfloat16: -9024.0, torch.float16: -9000.0}


def unserved(state: Tensor, new: Tensor, query: Tensor | None, mask: Tensor | None, form: Format) -> str | None:
    """Why the kernels do not take a write, None if they do; then `reference.store` serves it."""
    odd = form.head_dim // (form.head_dim & -form.head_dim)
    if odd > _LARGEST_RUN or form.head_dim > 512:
        return f"the head size {form.head_dim} has an odd factor above {_LARGEST_RUN} or is above 512"
    if state.dtype != torch.uint8 or not state.is_contiguous():
        return "the state is not a contiguous buffer of bytes"
    if new.shape[2] == 0:
        return "there is no token to write"
    if query is not None and query.dtype not in _MASKED:
        return f"queries are {query.dtype}"
    if mask is not None and mask.dtype not in (torch.bool, *_MASKED):
        return f"the mask is {mask.dtype}"
    return None


def _broadcast(tensor: Tensor, dim: int) -> Any:
    """Size of a dimension, 1 where all of it is one element."""
    return 1 if tensor.stride(dim) == 0 else tensor.shape[dim]


def store(
    state: Tensor,
    new: Tensor,
    positions: Tensor,
    query: Tensor | None,
    mask: Tensor | None,
    slots: int,
    shift: int,
    first: int,
    form: Format,
    rows: Tensor | None = None,
    *,
    wrap: Wrap = torch.library.wrap_triton,
    blocks: Blocks = _BLOCKS,
    ptx: bool = torch.version.hip is None,
) -> None:
    """`reference.store` for what `unserved` does not name; other arguments are as there.

    A position beyond the cache makes the write change nothing; where device assertions are compiled in, as Inductor
    does, it is reported.

    Args:
        wrap: see `launch`.
        blocks: sizes of tiles.
        ptx: for NVIDIA, with all registers that a thread can have.
    """
    reference.check_write(new, positions, query, mask, rows, form)
    if shift < 0:
        raise ValueError(f"shift must not be negative, got {shift}: a cache only moves towards slot 0")
    slots, shift, first = int(slots), int(shift), int(first)
    batch, heads, tokens, head_dim = map(int, new.shape)
    new = new.to(form.dtype)
    one = tokens == 1
    size = triton.next_power_of_2(head_dim)
    at_row = (0, 0) if rows is None else rows.stride()
    owners = None
    owners_b = slots
    sinks, window = min(form.sinks, slots), min(form.window, slots)
    if not one:
        owners_b = slots + window
        owners = torch.full((batch, owners_b), -1, dtype=torch.int32, device=state.device)
        wrap(find_owners)[batch, triton.cdiv(tokens, 256)](
            positions, rows, owners, state, tokens, slots, shift, *at_row, owners_b, N=256
        )
    if form.bits == 16:
        plan = torch.empty(FIELDS.value, dtype=torch.int64, device=state.device)
        wrap(plan_raw)[1,](state, plan, positions, slots, tokens, shift, N=1 if one else 1024)
        n = 1 if one else 16
        wrap(write_raw)[batch, heads, triton.cdiv(tokens, n)](
            state, plan, new, positions, rows, owners, batch, heads, slots, tokens, shift, owners_b, *new.stride(),
            *at_row, HEAD_DIM=head_dim, SIZE=size, ONE=one, N=n,
        )  # fmt: skip
        return

    key = form.role == "key"
    order = head_dim & -head_dim
    run = head_dim // order
    padded = tiles.padded(form.role, form.bits, head_dim)
    sets = form.layout(batch, heads, slots).sets
    large = min(codec.LIMIT, torch.finfo(form.dtype).max)
    if not key:
        query = None
    query_heads, at_query = (0, (0, 0, 0, 0)) if query is None else (query.shape[1], query.stride())
    sizes = batch, heads, slots, sets, sinks, window
    common: dict[str, Any] = {
        "KEY": key, "BITS": form.bits, "HEAD_DIM": head_dim, "PADDED": padded, "ITEM": form.dtype.itemsize,
        "LARGE": large,
    }  # fmt: skip
    coding: dict[str, Any] = {
        "PADDED_SIZE": triton.next_power_of_2(padded), "ORDER": order, "RUN": run,
        "RUN_PADDED": triton.next_power_of_2(run), "LEAF": leaf_order(head_dim), "COSINES": cosine_table(run),
    }  # fmt: skip
    plan_b = FIELDS.value + window + sinks + tokens
    plan = torch.empty((batch, plan_b), dtype=torch.int64, device=state.device)
    masked = None
    at_mask: tuple[Any, ...] = (0, 0, 0, 0, 0, 0, 0)  # heads, queries, length, strides
    if mask is not None:
        if mask.dtype != torch.bool:
            masked = _MASKED[mask.dtype]
        strides = (0 if mask.shape[0] == 1 else mask.stride(0), *mask.stride()[1:])
        at_mask = (_broadcast(mask, 1), _broadcast(mask, 2), mask.shape[3], *strides)
        if not one and mask.numel():
            admitted = torch.empty((mask.shape[0], mask.shape[3]), dtype=torch.uint8, device=state.device)
            wrap(find_admitted)[mask.shape[0], triton.cdiv(mask.shape[3], 128)](
                mask, admitted, mask.shape[3], *at_mask[:2], *strides, MASKED=masked, QUERIES=32, N=128
            )
            mask, masked = admitted, None
            at_mask = (1, 1, mask.shape[1], 0 if mask.shape[0] == 1 else mask.shape[1], 0, 0, 1)
    if not one:
        wrap(look_at_tokens)[batch, triton.cdiv(tokens, blocks.looked)](
            state, plan, new, positions, query, rows, owners, heads, slots, sinks, window, tokens, shift, plan_b,
            owners_b, *new.stride(), query_heads, *at_query, *at_row, HEAD_DIM=head_dim, SIZE=size, LARGE=large,
            N=blocks.looked,
        )  # fmt: skip
    wrap(plan_write)[batch,](
        state, plan, new, positions, query, mask, rows, owners, *sizes, tokens, shift, first, plan_b, owners_b,
        *new.stride(), query_heads, *at_query, *at_mask, *at_row, SINKS=form.sinks, SIZE=size, MASKED=masked, ONE=one,
        N=1 if one else 256, BLOCK_HEADS=8, BLOCK_COPIES=blocks.copies,
        BLOCK_SINKS=triton.next_power_of_2(max(1, sinks)), BLOCK_SLOTS=blocks.slots, BLOCK_COLUMNS=256, num_warps=8,
        **common, **REGISTERS[ptx],
    )  # fmt: skip
    if one:
        wrap(write_one)[batch, triton.cdiv(heads, blocks.heads)](
            state, plan, new, query, *sizes, shift, plan_b, *new.stride(), query_heads // heads, at_query[0],
            at_query[1], at_query[3], H=blocks.heads, BLOCK_SLOTS=blocks.slots, BLOCK_COPIES=blocks.copies, **coding,
            **common, num_warps=2, **REGISTERS[ptx],
        )  # fmt: skip
        return
    runs = triton.cdiv(tokens, blocks.summed * blocks.tiles)
    sums = torch.empty((batch, heads, runs, 4, head_dim), dtype=torch.float32, device=state.device)
    wrap(sum_tokens)[batch, heads, runs](
        plan, new, query, sums, heads, sinks, window, tokens, plan_b, *new.stride(), query_heads // heads, *at_query,
        HEAD_DIM=head_dim, SIZE=size, KEY=key, TILES=blocks.tiles, N=blocks.summed,
    )  # fmt: skip
    wrap(fit_rows)[batch, heads](
        state, plan, new, sums, *sizes, tokens, runs, shift, plan_b, *new.stride(), SIZE=size,
        BLOCK_SLOTS=blocks.slots, **common, num_warps=1,
    )  # fmt: skip
    # More channels, products of runs, or codes of 5 bits, which fill twice the words, leave registers for fewer tokens.
    few = run > 1 or head_dim > 128 or (form.bits == 5 and head_dim > 64)
    taken = max(1, blocks.tokens // 2) if few else blocks.tokens
    wrap(write_tokens)[batch, heads, triton.cdiv(window + sinks + tokens, taken)](
        state, plan, new, *sizes, tokens, plan_b, *new.stride(), H=1, T=taken, **coding, **common,
        num_warps=1 if head_dim <= 128 else 2, **REGISTERS[ptx],
    )  # fmt: skip
    wrap(copy_tokens)[batch, heads](
        state, plan, new, owners, *sizes, plan_b, owners_b, *new.stride(), SIZE=size, N=16, **common
    )
