"""Where the sections of a state lie, computed in Triton kernels, and how codes are written into tiles.

Kernels take the one buffer of a state and its sizes, so that one build serves all batch sizes and cache lengths and no
view of the buffer is ever made. `Format.layout` and `decoquant_compile.kernels.tiles` define both.
"""

import triton
import triton.language as tl

from decoquant_compile.kernels.format import ALIGNMENT
from decoquant_compile.kernels.tiles import LANES, QUAD, TILE

# Plain integers are global constants that Triton admits only so.
_ALIGNMENT = tl.constexpr(ALIGNMENT)
_TILE = tl.constexpr(TILE)
_LANES = tl.constexpr(LANES)
_QUAD = tl.constexpr(QUAD)


@triton.jit
def _after(offset, nbytes):
    return offset + (nbytes + (_ALIGNMENT - 1)) // _ALIGNMENT * _ALIGNMENT


@triton.jit
def padded_slots(slots):
    """`tiles.capacity`."""
    return (slots + (_TILE - 1)) // _TILE * _TILE


@triton.jit
def plane_width(BITS: tl.constexpr, PLANE: tl.constexpr):
    """Width in bits of plane 0 or 1, `codec.planes`; 0 for a second plane that there is not."""
    if BITS == 5:
        width: tl.constexpr = 4 if PLANE == 0 else 1
    elif BITS == 3:
        width: tl.constexpr = 2 if PLANE == 0 else 1
    else:
        width: tl.constexpr = BITS if PLANE == 0 else 0
    return width


@triton.jit
def sections(
    state,
    batch,
    heads,
    slots,
    sets,
    sinks,
    window,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ITEM: tl.constexpr,
):
    """Pointers to the sections of a quantised state, typed but for the copies, in the order of `Sections`.

    Returns:
        rows, plane 0, plane 1, gains, epochs, means, scales, average, deviation, weights, energy, sinks (bytes),
        sink positions, window (bytes), window positions. The header lies at `state` itself.
    """
    rows_of = tl.cast(batch, tl.int64) * heads
    kept = padded_slots(slots)
    channels = rows_of * HEAD_DIM
    words = rows_of * kept * PADDED // 8  # bytes of a plane that is one bit wide
    set_bytes = channels * sets * 2
    rows = state + _ALIGNMENT
    plane0 = _after(rows, batch * 40)
    plane1 = _after(plane0, words * plane_width(BITS, 0))
    gains = _after(plane1, words * plane_width(BITS, 1))
    epochs = _after(gains, rows_of * kept * 2)
    means = _after(epochs, tl.cast(batch, tl.int64) * kept)
    scales = _after(means, set_bytes * KEY)
    average = _after(scales, set_bytes)
    deviation = _after(average, channels * 4)
    weights = _after(deviation, channels * 4)
    energy = _after(weights, channels * 2 * KEY)
    sink_tokens = _after(energy, channels * 4 * KEY)
    sink_positions = _after(sink_tokens, channels * sinks * ITEM)
    window_tokens = _after(sink_positions, batch * sinks * 8)
    window_positions = _after(window_tokens, channels * window * ITEM)
    return (
        rows.to(tl.pointer_type(tl.int64)),
        plane0.to(tl.pointer_type(tl.int32)),
        plane1.to(tl.pointer_type(tl.int32)),
        gains.to(tl.pointer_type(tl.float16)),
        epochs,
        means.to(tl.pointer_type(tl.bfloat16)),
        scales.to(tl.pointer_type(tl.bfloat16)),
        average.to(tl.pointer_type(tl.float32)),
        deviation.to(tl.pointer_type(tl.float32)),
        weights.to(tl.pointer_type(tl.bfloat16)),
        energy.to(tl.pointer_type(tl.float32)),
        sink_tokens,
        sink_positions.to(tl.pointer_type(tl.int64)),
        window_tokens,
        window_positions.to(tl.pointer_type(tl.int64)),
    )


@triton.jit
def _write_plane(
    plane,
    codes,
    channel,
    head,
    slot,
    slots,
    keep,
    N: tl.constexpr,
    SIZE: tl.constexpr,
    KEY: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
):
    BYTE_LANES: tl.constexpr = 8 // WIDTH
    MASK: tl.constexpr = 2**WIDTH - 1
    part = (codes >> SHIFT) & MASK
    words = plane + head.to(tl.int64) * (padded_slots(slots) * (PADDED * WIDTH) // 32)
    if KEY:  # a word belongs to one token
        CHANNELS: tl.constexpr = 4 * BYTE_LANES
        ROWS: tl.constexpr = SIZE // CHANNELS
        lane = tl.arange(0, BYTE_LANES)[:, None]
        byte = tl.arange(0, _QUAD)[None, :]
        grouped = tl.reshape(part, [N, ROWS, BYTE_LANES, 4]) << (byte * 8 + lane * WIDTH)[None, None, :, :]
        packed = tl.sum(tl.sum(grouped, 3), 2)
        row = tl.arange(0, ROWS)[None, :]
        at = (slot // _LANES * (PADDED * WIDTH // 32) + row) * _LANES + slot % _LANES
        tl.store(words + at, packed, mask=keep & (row < PADDED * WIDTH // 32))
    else:  # a word holds several tokens, each with bits of its own, which no one else changes
        group = slot % _TILE // _QUAD
        bit = (slot % _QUAD * 8 + group % BYTE_LANES * WIDTH).to(tl.int32)
        chunk = slot // _TILE * (PADDED // 16) + channel // _LANES
        at = (chunk * (2 * WIDTH) + group // BYTE_LANES) * _LANES + channel % _LANES
        mask = keep & (channel >= 0)
        before = tl.load(words + at, mask=mask, other=0)
        tl.atomic_xor(words + at, (((before >> bit) ^ part) & MASK) << bit, mask=mask, sem="relaxed")


@triton.jit
def write_codes(
    plane0,
    plane1,
    codes,
    channel,
    head,
    slot,
    slots,
    keep,
    N: tl.constexpr,
    SIZE: tl.constexpr,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RUN: tl.constexpr,
    RUN_PADDED: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
):
    """`tiles.write` for a tile of tokens.

    Args:
        plane0, plane1: int32 pointers.
        codes: int32 ``[N, SIZE]``, columns as of `encode`.
        channel: of each column, ``[1, SIZE]``; -1 in the padding.
        head: row and head in one number, ``[N, 1]``.
        slot: int64 ``[N, 1]``, valid wherever `keep`; no head has one twice, but for programs that write the same.
        slots: of the cache.
        keep: bool ``[N, 1]``.
        PADDED: `tiles.padded`.
        PADDED_SIZE: the next power of two.
    """
    if KEY and (RUN > 1 or SIZE < PADDED_SIZE):  # columns as a plane has them
        target = tl.arange(0, PADDED_SIZE)[None, :]
        column = tl.where(target < HEAD_DIM, target // RUN * RUN_PADDED + target % RUN, 0)
        codes = tl.gather(codes, tl.broadcast_to(column, [N, PADDED_SIZE]), 1)
        codes = tl.where(target < HEAD_DIM, codes, 0)
    WIDE: tl.constexpr = PADDED_SIZE if KEY else SIZE
    _write_plane(plane0, codes, channel, head, slot, slots, keep, N, WIDE, KEY, PADDED, plane_width(BITS, 0), 0)
    if plane_width(BITS, 1) > 0:
        _write_plane(
            plane1, codes, channel, head, slot, slots, keep, N, WIDE, KEY, PADDED, plane_width(BITS, 1),
            plane_width(BITS, 0),
        )  # fmt: skip
