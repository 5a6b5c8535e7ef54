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

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decoquant_compile.kernels import codec, reference, tiles
from decoquant_compile.kernels.format import NO_EPOCH, Format
from decoquant_compile.kernels.triton.encode import LIMIT, column_channels, encode, fit, weights_of
from decoquant_compile.kernels.triton.layout import padded_slots, sections, write_codes

Launch = Callable[[Any], Any]
"""Makes ``kernel[grid](...)`` a launch: the identity, `torch.library.wrap_triton`, an interpreter, a build."""

# Fields of a row of the plan, int64; the slots of pending copies and the flags of the tokens follow.
(
    ORIGIN, VALID, ACTIVE, END, START, SET, TOTAL, FITTED, COUNT, SEEN, ADDED, BEGIN, FIT, FIRST, PADDING_COUNT, PAD,
) = map(tl.constexpr, range(16))  # fmt: skip
FIELDS = tl.constexpr(16)

# Flags of a token
KEPT = tl.constexpr(1)  # stored; the other flags are for kept tokens only
NONZERO = tl.constexpr(2)  # in some head; exact zeros are stored as never written
ORDINARY = tl.constexpr(4)  # all channels of all heads are ordinary numbers
QUERIED = tl.constexpr(8)  # and so are all queries
PADDING = tl.constexpr(16)  # before the start of the sequence
COUNTED = tl.constexpr(32)  # enters the statistics

_UNCODED = tl.constexpr(NO_EPOCH)
_NEVER = tl.constexpr(2**62)


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _finite(x, LARGE: tl.constexpr):
    """`reference._finite` of numbers widened to float32."""
    x = tl.where(x == x, x, 0.0)
    x = tl.where(x == float("inf"), LARGE, x)
    return tl.where(x == float("-inf"), -LARGE, x)


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
    for head in range(0, mask_heads):
        for query in range(0, mask_queries):
            entry = tl.load(MASK + at + head.to(tl.int64) * mask_h + query.to(tl.int64) * mask_q, mask=wanted, other=0)
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
    for head in range(0, heads):
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
    slot = (origin + tl.maximum(position, 0)) % slots
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
    absolute = tl.load(STATE.to(tl.pointer_type(tl.int64))) + shift + tl.maximum(position, 0)
    kept &= tl.load(OWNERS + b * owners_b + absolute % slots, mask=kept, other=-1) == t
    flags = _look(
        NEW, QUERY, b, t, kept, heads, new_b, new_h, new_t, new_d, query_heads, query_b, query_h, query_t, query_d,
        HEAD_DIM, SIZE, LARGE, N, 1,
    )  # fmt: skip
    flags = tl.where(kept, flags + KEPT, 0)
    tl.store(PLAN + b * plan_b + FIELDS + window + sinks + t, flags.to(tl.int64), mask=t < tokens)
    if window > 0:
        place = slots + absolute % window
        tl.atomic_max(OWNERS + b * owners_b + place, t, mask=(flags & (KEPT + NONZERO)) == KEPT + NONZERO, sem="relaxed")


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
    b = tl.program_id(0).to(tl.int64)
    (
        rows, _plane0, _plane1, gains, epochs, _means, _scales, _average, _deviation, _weights, _energy, _sink_tokens,
        sink_positions, _window_tokens, window_positions,
    ) = sections(STATE, batch, heads, slots, sets, sinks, window, KEY, BITS, HEAD_DIM, PADDED, ITEM)  # fmt: skip
    header = STATE.to(tl.pointer_type(tl.int64))
    origin_before = tl.load(header)
    origin = origin_before + shift
    rows += b * 5
    sink_positions += b * sinks
    window_positions += b * window
    epochs += b * padded_slots(slots)
    plan = PLAN + b * plan_b
    pending_slots = plan + FIELDS
    token_flags = pending_slots + window + sinks
    copies = window + sinks

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
        one_copied = writes & (tl.max(flags, 0) & NONZERO != 0)
    else:
        one_copied = writes
    one_position = origin + tl.minimum(lowest, slots)

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
            column = tl.maximum(0, -first).to(tl.int64)
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
    uncovered = tl.zeros([], tl.int32)  # tokens that would have neither a code nor a copy
    for t0 in range(0, tokens, N):
        t = t0 + tl.arange(0, N)
        position = tl.load(POSITIONS + t, mask=t < tokens, other=-1)
        if not ONE:
            flags = tl.load(token_flags + t, mask=t < tokens, other=0).to(tl.int32)
        stored = (flags & KEPT) != 0
        copied = stored & ((flags & NONZERO) != 0)
        absolute = origin + tl.maximum(position, 0)
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
            ring = slots + absolute % tl.maximum(window, 1)
            in_window &= tl.load(OWNERS + b * owners_b + ring, mask=in_window, other=-1) == t
        in_sinks = copied & (place >= 0) & (place < sinks)
        uncovered |= tl.max((copied & (~padding) & (~in_window) & (~in_sinks)).to(tl.int32), 0)
        added += tl.sum(counted.to(tl.int64), 0)
        paddings += tl.sum(padding.to(tl.int64), 0)
        described = (flags & 15) + tl.where(padding, PADDING, 0) + tl.where(counted, COUNTED, 0)
        tl.store(token_flags + t, described.to(tl.int64), mask=t < tokens)

    # Would a token be left with neither a code nor a copy? Then the row needs its first fit.
    first_fit = tl.zeros([], tl.int32) != 0
    if writes & (fitted < 0):
        k = tl.arange(0, BLOCK_SINKS)
        sink = start + k
        in_cache = (sink >= origin) & (sink < origin + slots) & (k < sinks)
        owner = _owner(OWNERS, b, owners_b, tl.maximum(sink, 0) % slots, in_cache, one_position % slots, one_copied, ONE)
        if not ONE:
            owner_flags = tl.load(token_flags + owner, mask=owner >= 0, other=0)
            owner = tl.where((owner_flags & NONZERO) != 0, owner, -1)
        receives = owner >= 0
        labels_after = tl.load(sink_positions + k, mask=k < sinks, other=-1)
        labels_after = tl.where(receives, sink, labels_after)
        for c0 in range(0, copies, BLOCK_COPIES):
            c = c0 + tl.arange(0, BLOCK_COPIES)
            of_window = c < window
            label = tl.load(window_positions + c, mask=of_window, other=-1)
            label = tl.where(
                of_window, label, tl.load(sink_positions + c - window, mask=(~of_window) & (c < copies), other=-1)
            )
            there = label >= origin
            slot = tl.maximum(label, 0) % slots
            owner = _owner(OWNERS, b, owners_b, slot, there, one_position % slots, writes, ONE)
            pending = there & (owner < 0) & (tl.load(epochs + slot, mask=there, other=0) == _UNCODED)
            pending &= _written(gains, b, heads, slot, pending, slots, BLOCK_COPIES)
            ring = one_position % tl.maximum(window, 1)
            if ONE:
                evicted = of_window & one_copied & (c == ring)
            else:
                evicted = of_window & (tl.load(OWNERS + b * owners_b + slots + c, mask=of_window, other=-1) >= 0)
            # What leaves the window may still be a sink. Sinks lose their place only when a sequence begins elsewhere,
            # which is rare: they count as lost even if they are in the window as well.
            stays = tl.max((label[:, None] == labels_after[None, :]).to(tl.int32), 1) != 0
            replaced = tl.max(((c - window)[:, None] == k[None, :]).to(tl.int32) * receives[None, :].to(tl.int32), 1) != 0
            evicted = tl.where(of_window, evicted & (~stays), replaced)
            uncovered |= tl.max((pending & evicted).to(tl.int32), 0)
            # A token that is in the window as well as among the sinks is encoded once.
            twin = tl.load(
                window_positions + tl.maximum(label, 0) % tl.maximum(window, 1),
                mask=(~of_window) & pending & (window > 0),
                other=-1,
            )
            slot = tl.where(pending & (of_window | (twin != label)), slot, -1)
            tl.store(pending_slots + c, slot, mask=c < copies)
        first_fit = uncovered != 0

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
            slot = s0 + tl.arange(0, BLOCK_SLOTS)
            inside = slot < slots
            freed = (slot + slots - origin_before % slots) % slots < shift
            owner = _owner(OWNERS, b, owners_b, slot, inside, one_position % slots, writes, ONE)
            epoch = tl.load(epochs + slot, mask=inside, other=_UNCODED).to(tl.int64)
            live = inside & (~freed) & (owner < 0) & (epoch < sets)
            live &= _written(gains, b, heads, slot, live, slots, BLOCK_SLOTS)
            used |= tl.where(live, tl.full([BLOCK_SLOTS], 1, tl.int64) << tl.where(live, epoch, 0), 0)
        n = tl.arange(0, 64)
        taken = tl.max(((used[:, None] >> n[None, :].to(tl.int64)) & 1).to(tl.int32), 0)
        free = tl.min(tl.where((taken == 0) & (n < sets), n, 64), 0)
        target = tl.where(free < 64, free, -1).to(tl.int64)
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
