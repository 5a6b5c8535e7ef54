"""Attention over packed caches.

Five kernels: `plan` says what each column of the axis is, `fold` turns the queries to the basis of each parameter set,
`split` attends to the packed tokens of a run of tiles, `exact` to the tokens that are known exactly, and `combine`
merges their results and turns them back. `kernels/reference.py` defines the result.

The query rows of one KV head, its whole group, share a program, so that codes are read and decoded once. Everything
that depends on the contents of a state, its header included, is read on the device.
"""

import triton
import triton.language as tl

from decoquant_compile.kernels.triton.codec import (
    entries,
    entry,
    gather,
    neighbour,
    rotation,
    two_limbs,
    unpack,
)

# Tags of columns; others are ``key set + 128 * value set``
_ELSEWHERE = tl.constexpr(-1)  # attended exactly, masked, or off the axis
_ZERO = tl.constexpr(-2)  # never written: logit 0, value 0
_NO_SET = tl.constexpr(127)  # neither code nor copy: zero
_LOG2E = tl.constexpr(1.4426950408889634)
_TILE = tl.constexpr(64)


@triton.jit
def _int64s(STATE, offset):
    return (STATE + offset).to(tl.pointer_type(tl.int64))


@triton.jit
def _exp(x, NATURAL: tl.constexpr):
    return tl.exp2(x * _LOG2E if NATURAL else x)


@triton.jit
def _finite_peak(m):
    """`m`, or 0 where nothing was admitted."""
    return tl.where(m == -float("inf"), 0.0, m)


# ---------------------------------------------------------------------------------------------------------------- plan


@triton.jit
def _copied(STATE, sink_positions, window_positions, row, position, SINKS: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the token of a position has an exact copy."""
    hit = position < 0
    for i in tl.static_range(SINKS):
        hit |= tl.load(_int64s(STATE, sink_positions) + row * SINKS + i) == position
    if WINDOW > 0:
        at = row * WINDOW + tl.maximum(position, 0) % WINDOW
        hit |= tl.load(_int64s(STATE, window_positions) + at) == position
    return hit & (position >= 0)


@triton.jit
def _set_of(STATE, epochs, row, ring, stored, capacity, BITS: tl.constexpr):
    if BITS == 16:
        number = tl.zeros_like(ring).to(tl.int32)
    else:
        number = tl.load(STATE + epochs + row * capacity + ring, mask=stored, other=255).to(tl.int32)
    return tl.where(stored, tl.minimum(number, _NO_SET), _NO_SET)


@triton.jit
def plan(
    KEYS, VALUES, POSITIONS, MASK, TAGS, COLUMNS,
    slots, first, length, tokens, capacity, mask_sb, mask_sl,
    k_epochs, k_sink_positions, k_window_positions, v_epochs, v_sink_positions, v_window_positions,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_SINKS: tl.constexpr, K_WINDOW: tl.constexpr,
    V_SINKS: tl.constexpr, V_WINDOW: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tags of the columns and columns of the new tokens. Grid: (blocks of columns, then of new tokens; batch).

    TAGS: int16 ``[batch, length]``; COLUMNS: int32 ``[tokens]``, -1 where another token counts or none.
    MASKED: a bool MASK that all heads and queries share is part of the tags.
    """
    row = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(length, BLOCK)
    block = tl.program_id(0)
    if block >= blocks:
        token = (block - blocks) * BLOCK + tl.arange(0, BLOCK)
        position = tl.load(POSITIONS + token, mask=token < tokens, other=-1)
        column = position - first
        counts = (position >= 0) & (column >= 0) & (column < length)
        for other in tl.range((block - blocks) * BLOCK + 1, tokens):
            counts &= (token >= other) | (position != tl.load(POSITIONS + other))
        if row == 0:
            tl.store(COLUMNS + token, tl.where(counts, column, -1).to(tl.int32), mask=token < tokens)
    else:
        column = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        slot = column + first
        k_origin = tl.load(_int64s(KEYS, 0))
        k_end = tl.load(_int64s(KEYS, 0) + 1)
        v_origin = tl.load(_int64s(VALUES, 0))
        v_end = tl.load(_int64s(VALUES, 0) + 1)
        inside = (slot >= 0) & (slot < slots) & (column < length)
        k_stored = inside & (slot < k_end - k_origin)
        v_stored = inside & (slot < v_end - v_origin)
        k_ring = (k_origin + slot) % slots
        v_ring = (v_origin + slot) % slots
        k_set = _set_of(KEYS, k_epochs, row, k_ring, k_stored, capacity, K_BITS)
        v_set = _set_of(VALUES, v_epochs, row, v_ring, v_stored, capacity, V_BITS)
        tag = tl.where(k_stored | v_stored, k_set + 128 * v_set, _ZERO)
        k_position = tl.where(inside, k_origin + slot, -1)
        v_position = tl.where(inside, v_origin + slot, -1)
        gone = _copied(KEYS, k_sink_positions, k_window_positions, row, k_position, K_SINKS, K_WINDOW)
        gone |= _copied(VALUES, v_sink_positions, v_window_positions, row, v_position, V_SINKS, V_WINDOW)
        for other in tl.range(0, tokens):
            taken = tl.load(POSITIONS + other)
            gone |= (taken >= 0) & (taken == slot)
        if MASKED:
            gone |= tl.load(MASK + row * mask_sb + column * mask_sl, mask=column < length, other=0) == 0
        tag = tl.where(gone, _ELSEWHERE, tag)
        tl.store(TAGS + row * length + column, tag.to(tl.int16), mask=column < length)


# ---------------------------------------------------------------------------------------------------------------- fold


@triton.jit
def fold(
    QUERY, KEYS, FOLDED, FACTORS,
    heads, queries, groups, q_sb, q_sh, q_sq, q_sc, k_means, k_scales, sets, scale,
    D: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries in the basis of a parameter set, in two int8 limbs. Grid: (batch * heads, sets, row groups).

    FOLDED: int8 ``[batch * heads, row groups, sets, ROWS, 2, PLACES]``, high limb first, in the order of `neighbour`.
    FACTORS: float32 ``[batch * heads, row groups, sets, 2, ROWS]``: what a product with entries is multiplied by, and
    the product with the mean; both in units of `scale`.
    """
    head = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1)
    group = tl.program_id(2)
    row = group * ROWS + tl.arange(0, ROWS)
    query = row // groups
    base = head // heads * q_sb + (head % heads * groups + row % groups) * q_sh + query * q_sq
    of_set = ((head // heads * sets + number) * heads + head % heads) * D
    place = tl.arange(0, PLACES)
    channel = neighbour(place, WIDTH)
    rotated = tl.zeros([ROWS, PLACES], tl.float32)
    constant = tl.zeros([ROWS], tl.float32)
    for begin in tl.range(0, D, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        x = (
            tl.load(
                QUERY + base[:, None] + c[None, :] * q_sc, mask=(query < queries)[:, None] & (c < D)[None, :], other=0.0
            ).to(tl.float32)
            * scale
        )
        s = tl.load((KEYS + k_scales).to(tl.pointer_type(tl.bfloat16)) + of_set + c, mask=c < D, other=1.0)
        mean = tl.load((KEYS + k_means).to(tl.pointer_type(tl.bfloat16)) + of_set + c, mask=c < D, other=0.0)
        constant += tl.sum(x * mean.to(tl.float32)[None, :], 1)
        inside = (c < D)[:, None] & (channel < D)[None, :]
        matrix = rotation(c[:, None], channel[None, :], D)
        matrix = tl.where(inside, matrix, 0.0)
        rotated = tl.dot(x / s.to(tl.float32)[None, :], matrix, rotated, input_precision=PRECISION)
    peak = tl.max(tl.abs(rotated), 1)
    # Integers know no nan: it comes back with the factor.
    poison = tl.sum(rotated * 0.0, 1)
    limbs = two_limbs(tl.where(poison[:, None] == 0, rotated, 0.0), peak[:, None])
    at = ((head * tl.num_programs(2) + group) * sets + number) * ROWS
    limb = tl.arange(0, 2)[None, None, :]
    tl.store(
        FOLDED + (at + tl.arange(0, ROWS)[:, None, None]) * 2 * PLACES + limb * PLACES + place[None, :, None], limbs
    )
    tl.store(FACTORS + at * 2 + tl.arange(0, ROWS), peak / (16256.0 * STEPS) + poison)
    tl.store(FACTORS + at * 2 + ROWS + tl.arange(0, ROWS), constant)


# -------------------------------------------------------------------------------------------------------------- decode


@triton.jit
def decode(
    STATE, codes, high, gains, means, scales, head, heads, sets, ring, number, capacity, c,
    D: tl.constexpr, CHANNELS: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr,
    KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Channels `c` of tokens from their codes, float32 ``[tokens, channels]``.

    Args:
        ring: int64 ``[tokens]``, index along the slots.
        number: int32 ``[tokens]``, parameter set; those out of range give zeros.
        CHANNELS: of the planes.
    """  # (the other arguments are as elsewhere)
    WIDTH: tl.constexpr = 2 if BITS == 3 else 4 if BITS == 5 else BITS
    coded = (number >= 0) & (number < sets)
    gain = tl.load((STATE + gains).to(tl.pointer_type(tl.float16)) + head * capacity + ring, mask=coded, other=-1.0)
    gain = gain.to(tl.float32)
    coded &= gain >= 0
    planes = STATE + codes + head * capacity * (CHANNELS * WIDTH // 8)
    x = tl.zeros([ring.shape[0], c.shape[0]], tl.float32)
    for begin in tl.range(0, D, 16):
        j = begin + tl.arange(0, 16)
        mask = coded[:, None] & (j < D)[None, :]
        code = _code(planes, ring[:, None], j[None, :], mask, CHANNELS, WIDTH, KEY)
        if BITS == 3 or BITS == 5:
            bits = STATE + high + head * capacity * (CHANNELS // 8)
            code |= _code(bits, ring[:, None], j[None, :], mask, CHANNELS, 1, KEY) << WIDTH
        y = tl.where(mask, entry(code, BITS).to(tl.float32), 0.0)
        matrix = rotation(c[None, :], j[:, None], D)
        matrix = tl.where((j < D)[:, None] & (c < D)[None, :], matrix, 0.0)
        x = tl.dot(y, matrix, x, input_precision=PRECISION)
    inside = coded[:, None] & (c < D)[None, :]
    of_set = ((head // heads * sets + number) * heads + head % heads)[:, None] * D + c[None, :]
    scale = tl.load((STATE + scales).to(tl.pointer_type(tl.bfloat16)) + of_set, mask=inside, other=1.0).to(tl.float32)
    x = x * (gain * (1 / STEPS))[:, None] / scale
    if KEY:
        mean = tl.load((STATE + means).to(tl.pointer_type(tl.bfloat16)) + of_set, mask=inside, other=0.0)
        x += mean.to(tl.float32)
    return tl.where(inside, x, 0.0)


@triton.jit
def _code(PLANE, token, channel, mask, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, KEY: tl.constexpr):
    """Part of a code in one plane, int32; see `decoquant_compile.kernels.tiles`."""
    PER: tl.constexpr = 32 // WIDTH
    if KEY:
        at = ((token // 16 * (CHANNELS // PER) + channel // PER) * 16 + token % 16) * 4 + channel % 4
        field = channel % PER // 4
    else:
        at = token // 64 * (CHANNELS // 16) + channel // 16
        at = ((at * (2 * WIDTH) + token % 64 // PER) * 16 + channel % 16) * 4 + token % 4
        field = (token % PER // 4).to(tl.int32)
    byte = tl.load(PLANE + at, mask=mask, other=0).to(tl.int32)
    return (byte >> (field * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def _turn_back(sums, j, c, out, D: tl.constexpr, PRECISION: tl.constexpr):
    """Adds to `out` what places `j` of sums over values ``[j, rows]`` of one set are in channels `c`, scale aside."""
    matrix = rotation(c[:, None], j[None, :], D)
    matrix = tl.where((c < D)[:, None] & (j < D)[None, :], matrix, 0.0)
    return tl.dot(matrix, sums, out, input_precision=PRECISION)


@triton.jit
def _scale(VALUES, v_scales, number, c, head, heads, sets, D: tl.constexpr):
    # In these terms no remainder is needed: ptxas would keep its parts, 64 bits each, through all loops
    at = (head + (head.to(tl.int32) // heads * (sets - 1) + number) * heads) * D + c
    scale = tl.load((VALUES + v_scales).to(tl.pointer_type(tl.bfloat16)) + at, mask=c < D, other=1.0)
    return scale.to(tl.float32)


# --------------------------------------------------------------------------------------------------------------- split


@triton.jit
def _token_of(i):
    """Token of a tile at place i of the scores: an order in which scores lie as 16-byte loads of keys do."""
    return (i >> 5 << 5) | (i >> 4 & 1) << 1 | (i >> 3 & 1) | (i >> 2 & 1) << 4 | (i & 3) << 2


@triton.jit
def _key_words(WORDS, ROWS: tl.constexpr, PADDED: tl.constexpr, PER: tl.constexpr):
    """Words of a tile of keys ``[row / 4, tile / 2, tile % 2, token / 4, row % 4, token % 4]``.

    PADDED rows of which ROWS exist; PER of them share a row of the plane.
    """
    row = _rows(PADDED)
    tile = tl.arange(0, 2)[None, :, None, None, None, None] * 2 + tl.arange(0, 2)[None, None, :, None, None, None]
    token = tl.arange(0, 4)[None, None, None, :, None, None] * 4 + tl.arange(0, 4)[None, None, None, None, None, :]
    at = (tile * (ROWS // PER) + row // PER) * 16 + token
    if PADDED == ROWS:
        return tl.load(WORDS + at)
    return tl.load(WORDS + at, mask=tl.broadcast_to(row < ROWS, at.shape), other=0)


@triton.jit
def _value_words(WORDS, ROWS: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr, PER: tl.constexpr):
    """Words of a tile of values ``[row / 4, chunk / 2, chunk % 2, channel / 4, row % 4, channel % 4]``."""
    row = _rows(ROWS)
    LOW: tl.constexpr = 2 if PADDED > 1 else 1
    chunk = tl.arange(0, PADDED // LOW)[None, :, None, None, None, None] * LOW
    chunk += tl.arange(0, LOW)[None, None, :, None, None, None]
    channel = tl.arange(0, 4)[None, None, None, :, None, None] * 4 + tl.arange(0, 4)[None, None, None, None, None, :]
    at = (chunk * (ROWS // PER) + row // PER) * 16 + channel
    if PADDED == CHUNKS:
        return tl.load(WORDS + at)
    return tl.load(WORDS + at, mask=tl.broadcast_to(chunk < CHUNKS, at.shape), other=0)


@triton.jit
def _rows(PADDED: tl.constexpr):
    """Row of each word of a tile."""
    row = tl.arange(0, PADDED // 4)[:, None, None, None, None, None] * 4
    return row + tl.arange(0, 4)[None, None, None, None, :, None]


@triton.jit
def _reorder(weights, WIDTH: tl.constexpr, N: tl.constexpr):
    """Rows from the order of `_token_of` to that of `neighbour`."""
    bits = tl.reshape(weights, [2, 2, 2, 2, 2, 2, N])
    if WIDTH == 8:
        bits = tl.permute(bits, (0, 3, 4, 5, 1, 2, 6))
    elif WIDTH == 4:
        bits = tl.permute(bits, (0, 1, 3, 4, 2, 5, 6))
    else:
        bits = tl.permute(bits, (5, 1, 0, 3, 2, 4, 6))
    return tl.reshape(bits, [64, N])


@triton.jit
def _softcap(logits, softcap):
    """``softcap * tanh(logits / softcap)``."""
    return softcap - 2 * softcap / (1 + tl.exp2(logits * (2 * _LOG2E / softcap)))


@triton.jit
def _masked(logits, MASK, row, kv_head, query, head, column, admitted, m_sb, m_sh, m_sq, m_sl, MASK_KIND: tl.constexpr):
    """Logits ``[columns, rows]`` under the mask. Kinds: 0 none, 1 bool, 2 additive."""
    if MASK_KIND == 0:
        return logits
    at = row * m_sb + (kv_head + head)[None, :] * m_sh + query[None, :] * m_sq + column[:, None] * m_sl
    if MASK_KIND == 1:
        return tl.where(tl.load(MASK + at, mask=admitted, other=0) != 0, logits, -float("inf"))
    return logits + tl.load(MASK + at, mask=admitted, other=0.0).to(tl.float32)


@triton.jit
def _in_order(sums, PADDED: tl.constexpr, N: tl.constexpr):
    """Sums over values ``[PADDED, N]`` in the order of channels; they come in the one of 16-byte loads of values.

    Not the addresses are put in order: ptxas would keep one for each sum, through all loops.
    """
    LOW: tl.constexpr = 2 if PADDED > 16 else 1
    pieces = tl.reshape(sums, [PADDED // (16 * LOW), 4, LOW, 4, N])
    return tl.reshape(tl.permute(pieces, (0, 2, 3, 1, 4)), [PADDED, N])


@triton.jit
def split(
    QUERY, KEYS, VALUES, MASK, TAGS, FOLDED, FACTORS, PART, PEAKS, SUMS, SETS,
    heads, queries, groups, slots, capacity, first, length, q_sb, q_sh, q_sq, q_sc, m_sb, m_sh, m_sq, m_sl,
    k_codes, k_high, k_gains, v_codes, v_high, v_gains, v_scales, k_sets, v_sets, scale, softcap, parts,
    KD: tl.constexpr, KP: tl.constexpr, K_CHANNELS: tl.constexpr, PLACES: tl.constexpr, K_BITS: tl.constexpr,
    VD: tl.constexpr, VP: tl.constexpr, V_CHANNELS: tl.constexpr, V_BITS: tl.constexpr, V_STEPS: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, MASK_KIND: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attends to the packed tokens in a share of the tiles. Grid: (shares, batch * heads, row groups).

    PART: float32 ``[batch * heads, row groups, parts, ROWS, VP]``, sums of values with weights relative to PEAKS
    ``[..., parts, ROWS]``; SUMS: of the weights; SETS int32 ``[..., parts]``: the parameter set in whose basis PART is,
    -1 for the cache's own. Part `share` is the last set of a share, part ``shares + share`` the sum of its others.
    STAGES: of the loop over tiles; with 2 the codes of the next tile are on their way while one is worked on.
    """
    K_WIDTH: tl.constexpr = 2 if K_BITS == 3 else 4 if K_BITS == 5 else K_BITS
    V_WIDTH: tl.constexpr = 2 if V_BITS == 3 else 4 if V_BITS == 5 else V_BITS
    N: tl.constexpr = 2 * ROWS
    share = tl.program_id(0)
    shares = tl.num_programs(0)
    head = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    batch_row = head // heads
    kv_head = head % heads * groups
    r = tl.arange(0, ROWS)
    row = group * ROWS + r
    query = row // groups
    in_group = row % groups
    real = query < queries
    tokens = tl.arange(0, 64)
    if K_BITS != 16 or V_BITS != 16:
        tokens = _token_of(tokens)
    tags = TAGS + batch_row * length

    origin = tl.load(_int64s(KEYS, 0))
    # Zero, for `entries`; the detour over floats keeps it out of the uniform registers
    both = tl.load(_int64s(KEYS, 0) + tl.arange(0, 2))
    zero = tl.min(tl.minimum(both.to(tl.float32), 0.0), 0).to(tl.int32)
    turn = (origin % slots).to(tl.int32)
    written = tl.maximum(tl.load(_int64s(KEYS, 0) + 1), tl.load(_int64s(VALUES, 0) + 1)) - origin
    low = tl.maximum(first, 0)
    high = tl.minimum(tl.minimum(slots, first + length), written).to(tl.int32)
    count = tl.maximum(high - low, 0)
    apart = origin != tl.load(_int64s(VALUES, 0))  # then `exact` does it
    tiles = capacity // _TILE
    begin = (turn + low) % slots
    tile0 = begin // _TILE
    stop = begin + count
    number = tl.where(stop <= slots, tl.cdiv(stop, _TILE) - tile0, tiles - tile0 + tl.cdiv(stop - slots, _TILE))
    number = tl.where((count > 0) & ~apart, tl.minimum(number, tiles), 0)
    tile_begin = (number.to(tl.int64) * share // shares).to(tl.int32)
    tile_end = (number.to(tl.int64) * (share + 1) // shares).to(tl.int32)

    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    if count < length:  # columns never written, a share of all columns each
        ZEROS: tl.constexpr = 256
        blocks = tl.cdiv(length, ZEROS)
        for block in tl.range(blocks * share // shares, blocks * (share + 1) // shares):
            column = block * ZEROS + tl.arange(0, ZEROS)
            tag = tl.load(tags + column, mask=column < length, other=_ELSEWHERE).to(tl.int32)
            found = tag == _ZERO
            here = tl.sum(found.to(tl.int32), 0)
            if here > 0:
                if MASK_KIND == 0:
                    new_peak = tl.maximum(peak, 0.0)
                    total = total * _exp(peak - new_peak, NATURAL) + here.to(tl.float32) * _exp(-new_peak, NATURAL)
                    peak = new_peak
                else:
                    z = tl.where(found[:, None], tl.zeros([ZEROS, ROWS], tl.float32), -float("inf"))
                    admitted = found[:, None] & real[None, :]
                    z = _masked(
                        z,
                        MASK,
                        batch_row,
                        kv_head,
                        query,
                        in_group,
                        column,
                        admitted,
                        m_sb,
                        m_sh,
                        m_sq,
                        m_sl,
                        MASK_KIND,
                    )
                    new_peak = tl.maximum(peak, tl.max(z, 0))
                    safe = _finite_peak(new_peak)
                    total = total * _exp(peak - safe, NATURAL) + tl.sum(_exp(z - safe[None, :], NATURAL), 0)
                    peak = new_peak

    channel = tl.arange(0, VP)
    at = (head * tl.num_programs(2) + group) * parts + share
    own = PART + at * ROWS * VP + r[None, :] * VP
    other = own + shares * ROWS * VP
    flushed = tl.full([ROWS], -float("inf"), tl.float32)  # what the other part is relative to
    flushes = 0

    if K_BITS == 16:
        kc = tl.arange(0, KP)
        q_at = batch_row * q_sb + (kv_head + in_group) * q_sh + query * q_sq
        q = tl.load(QUERY + q_at[None, :] + kc[:, None] * q_sc, mask=real[None, :] & (kc < KD)[:, None], other=0.0)
        q = q.to(tl.float32) * scale
        limbs_of_q = q.to(DTYPE)
        if tl.float32 != DTYPE:  # as of codes: what the first rounds away is the second
            limbs_of_q = tl.reshape(tl.join(limbs_of_q, (q - limbs_of_q.to(tl.float32)).to(DTYPE)), [KP, N])

    # Pairs of parameter sets in the order of their tags, each over the run of tiles it occurs in
    tag_now = tl.full([], -1, tl.int32)
    value_set = tl.full([], -1, tl.int32)
    acc = tl.zeros([VP, ROWS], tl.float32)
    searching = tile_begin < tile_end
    while searching:
        following = tl.full([256], 32767, tl.int32)
        first_tile = tl.full([256], 2147483647, tl.int32)
        last_tile = tl.full([256], -1, tl.int32)
        for look in tl.static_range(2):  # the next tag, then where it is
            for block in tl.range(tile_begin, tile_end, 4):
                found_tile = block + tl.arange(0, 256) // 64
                spot = (tile0 + found_tile) % tiles * _TILE + tl.arange(0, 256) % 64
                slot = spot - turn
                slot = tl.where(slot < 0, slot + slots, slot)
                column = slot - first
                inside = (found_tile < tile_end) & (spot < slots) & (column >= 0) & (column < length)
                tag = tl.load(tags + column, mask=inside, other=_ELSEWHERE).to(tl.int32)
                if look == 0:
                    following = tl.where(tag > tag_now, tl.minimum(tag, following), following)
                else:
                    first_tile = tl.where(tag == tag_now, tl.minimum(found_tile, first_tile), first_tile)
                    last_tile = tl.where(tag == tag_now, tl.maximum(found_tile, last_tile), last_tile)
            if look == 0:
                tag_now = tl.min(following, 0)
        searching = tag_now < 32767
        if searching:
            k_set = tag_now % 128
            if V_BITS != 16:
                if tag_now // 128 != value_set:
                    if (value_set >= 0) & (value_set < v_sets):
                        # Through memory, in small pieces: registers are for the loop below
                        relative = _exp(flushed - _finite_peak(peak), NATURAL)
                        tl.store(own + channel[:, None], _in_order(acc, VP, ROWS))
                        tl.debug_barrier()
                        for block in tl.range(0, VP, 16):
                            c = block + tl.arange(0, 16)
                            turned = tl.zeros([16, ROWS], tl.float32)
                            for piece in tl.range(0, VP, 16):
                                j = piece + tl.arange(0, 16)
                                turned = _turn_back(tl.load(own + j[:, None]), j, c, turned, VD, PRECISION)
                            turned /= _scale(VALUES, v_scales, value_set, c, head, heads, v_sets, VD)[:, None]
                            before = tl.load(
                                other + c[:, None], mask=tl.broadcast_to(flushes > 0, turned.shape), other=0.0
                            )
                            tl.store(other + c[:, None], before * relative[None, :] + turned)
                        tl.debug_barrier()
                        flushed = _finite_peak(peak)
                        flushes += 1
                        acc = tl.zeros([VP, ROWS], tl.float32)
                    value_set = tag_now // 128
            if K_BITS != 16:
                k_safe = tl.where(k_set < k_sets, k_set, 0)
                folded = ((head * tl.num_programs(2) + group) * k_sets + k_safe) * ROWS
                q_words = (FOLDED + folded * 2 * PLACES).to(tl.pointer_type(tl.int32))
                q_words += tl.arange(0, N)[:, None] * (PLACES // 4) + tl.arange(0, PLACES // 4)[None, :]
                limbs_of_q = tl.trans(tl.reshape(unpack(tl.load(q_words)), [N, PLACES]))
                factor = tl.load(FACTORS + folded * 2 + r)
                constant = tl.load(FACTORS + folded * 2 + ROWS + r)
            for index in tl.range(tl.min(first_tile, 0), tl.max(last_tile, 0) + 1, num_stages=STAGES):
                tile = (tile0 + index) % tiles
                ring = tile * _TILE + tokens
                slot = ring - turn
                slot = tl.where(slot < 0, slot + slots, slot)
                column = slot - first
                inside = (ring < slots) & (column >= 0) & (column < length)
                mine = tl.load(tags + column, mask=inside, other=_ELSEWHERE).to(tl.int32) == tag_now

                # Scores
                if K_BITS == 16:
                    raw = (
                        (KEYS + k_codes).to(tl.pointer_type(DTYPE)) + (head * slots + ring)[:, None] * KD + kc[None, :]
                    )
                    x = tl.load(raw, mask=mine[:, None] & (kc < KD)[None, :], other=0.0)
                    s = tl.dot(x, limbs_of_q, input_precision=PRECISION)
                    if tl.float32 != DTYPE:
                        s_high, s_low = tl.split(tl.reshape(s, [64, ROWS, 2]))
                        s = s_high + s_low
                else:
                    K_ROWS: tl.constexpr = K_CHANNELS * K_WIDTH // 32
                    k_tile = head * capacity + tile * _TILE
                    words = (KEYS + k_codes).to(tl.pointer_type(tl.int32)) + k_tile * K_ROWS
                    K_PADDED: tl.constexpr = PLACES * K_WIDTH // 32
                    w = _key_words(words, K_ROWS, K_PADDED, 1)
                    if K_BITS == 5 or K_BITS == 3:
                        k_high_words = (KEYS + k_high).to(tl.pointer_type(tl.int32)) + k_tile * (K_CHANNELS // 32)
                        above = _key_words(k_high_words, K_ROWS, K_PADDED, K_WIDTH)
                    else:
                        above = w
                    e = entries(w, above, _rows(K_PADDED), zero, K_BITS, PTX)
                    limbs_of_s = tl.zeros([64, N], tl.int32)
                    for half in tl.static_range(2 if K_BITS == 4 else 1):
                        x = gather(e, half * (8 // K_WIDTH), 8 // K_WIDTH)
                        x = tl.reshape(tl.permute(x, (1, 5, 2, 3, 0, 7, 4, 6)), [64, PLACES])
                        limbs_of_s = tl.dot(x, limbs_of_q, limbs_of_s)
                    s_high, s_low = tl.split(tl.reshape(limbs_of_s, [64, ROWS, 2]))
                    gain = tl.load((KEYS + k_gains).to(tl.pointer_type(tl.float16)) + head * capacity + ring)
                    gain = gain.to(tl.float32)
                    s = (s_high * 128 + s_low).to(tl.float32) * gain[:, None] * factor[None, :] + constant[None, :]
                    s = tl.where((gain >= 0)[:, None] & (k_set < k_sets), s, 0.0)

                # Softmax
                if SOFTCAP:
                    s = _softcap(s, softcap)
                    if not NATURAL:
                        s *= _LOG2E
                s = _masked(
                    s, MASK, batch_row, kv_head, query, in_group, column, mine[:, None] & real[None, :],
                    m_sb, m_sh, m_sq, m_sl, MASK_KIND,
                )  # fmt: skip
                s = tl.where(mine[:, None], s, -float("inf"))
                new_peak = tl.maximum(peak, tl.max(s, 0))
                safe = _finite_peak(new_peak)
                alpha = _exp(peak - safe, NATURAL)
                p = _exp(s - safe[None, :], NATURAL)
                total = total * alpha + tl.sum(p, 0)
                peak = new_peak

                # Weighted sum of the values
                if V_BITS == 16:
                    vc = tl.arange(0, VP)
                    raw = (
                        (VALUES + v_codes).to(tl.pointer_type(DTYPE))
                        + (head * slots + ring)[:, None] * VD
                        + vc[None, :]
                    )
                    x = tl.trans(tl.load(raw, mask=mine[:, None] & (vc < VD)[None, :], other=0.0))
                    p_high = p.to(DTYPE)
                    acc = tl.dot(x, p_high, acc * alpha[None, :], input_precision=PRECISION)
                    if tl.float32 != DTYPE:
                        acc = tl.dot(x, (p - p_high.to(tl.float32)).to(DTYPE), acc)
                else:
                    gain = tl.load((VALUES + v_gains).to(tl.pointer_type(tl.float16)) + head * capacity + ring)
                    p *= tl.maximum(gain.to(tl.float32), 0.0)[:, None]
                    top = tl.max(p, 0)
                    limbs = two_limbs(p, tl.broadcast_to(top[None, :], p.shape))
                    limbs = _reorder(tl.reshape(limbs, [64, N]), V_WIDTH, N)
                    v_tile = (head * capacity + tile * _TILE) * (V_CHANNELS // 16) // 2
                    words = (VALUES + v_codes).to(tl.pointer_type(tl.int32)) + v_tile * V_WIDTH
                    w = _value_words(words, 2 * V_WIDTH, V_CHANNELS // 16, VP // 16, 1)
                    if V_BITS == 5 or V_BITS == 3:
                        v_high_words = (VALUES + v_high).to(tl.pointer_type(tl.int32)) + v_tile
                        above = _value_words(v_high_words, 2 * V_WIDTH, V_CHANNELS // 16, VP // 16, V_WIDTH)
                    else:
                        above = w
                    e = entries(w, above, _rows(2 * V_WIDTH), zero, V_BITS, PTX)
                    limbs_of_sum = tl.zeros([VP, N], tl.int32)
                    for half in tl.static_range(2 if V_BITS == 4 else 1):
                        x = gather(e, half * (8 // V_WIDTH), 8 // V_WIDTH)
                        x = tl.reshape(tl.permute(x, (1, 5, 2, 3, 0, 7, 4, 6)), [VP, 64])
                        limbs_of_sum = tl.dot(x, limbs, limbs_of_sum)
                    sum_high, sum_low = tl.split(tl.reshape(limbs_of_sum, [VP, ROWS, 2]))
                    unit = top * (1 / (16256.0 * V_STEPS))
                    acc = acc * alpha[None, :] + (sum_high * 128 + sum_low).to(tl.float32) * unit[None, :]

    if V_BITS != 16:
        acc = _in_order(acc, VP, ROWS)
    tl.store(own + channel[:, None], acc)
    tl.store(PEAKS + at * ROWS + r, peak)
    tl.store(PEAKS + (at + shares) * ROWS + r, flushed)
    tl.store(SUMS + at * ROWS + r, total)
    tl.store(SUMS + (at + shares) * ROWS + r, tl.zeros([ROWS], tl.float32))
    if V_BITS != 16:
        value_set = tl.where(value_set < v_sets, value_set, -1)
    tl.store(SETS + at, value_set)
    tl.store(SETS + at + shares, -1)


# --------------------------------------------------------------------------------------------------------------- exact


@triton.jit
def _find(STATE, positions, row, wanted, COUNT: tl.constexpr):
    """Which of the labelled copies has a position, -1 where none has."""
    at = tl.zeros_like(wanted).to(tl.int32) - 1
    for i in tl.static_range(COUNT):
        at = tl.where(tl.load(_int64s(STATE, positions) + row * COUNT + i) == wanted, i, at)
    return at


@triton.jit
def _find_in_window(STATE, positions, row, wanted, WINDOW: tl.constexpr):
    if WINDOW == 0:
        return tl.zeros_like(wanted).to(tl.int32) - 1
    else:
        at = tl.maximum(wanted, 0) % WINDOW
        hit = (wanted >= 0) & (tl.load(_int64s(STATE, positions) + row * WINDOW + at) == wanted)
        return tl.where(hit, at, -1).to(tl.int32)


@triton.jit
def _copies(STATE, sinks, window, head, sink, at, c, D: tl.constexpr,
            SINKS: tl.constexpr, WINDOW: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Channels `c` of exact copies, float32 ``[n, channels]``: of a sink, else of the window, else zeros."""
    x = tl.zeros([sink.shape[0], c.shape[0]], tl.float32)
    if SINKS > 0:
        rows = (head * SINKS + sink)[:, None] * D + c[None, :]
        base = (STATE + sinks).to(tl.pointer_type(DTYPE))
        x += tl.load(base + rows, mask=(sink >= 0)[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    if WINDOW > 0:
        rows = (head * WINDOW + at)[:, None] * D + c[None, :]
        base = (STATE + window).to(tl.pointer_type(DTYPE))
        wanted = (sink < 0) & (at >= 0)
        x += tl.load(base + rows, mask=wanted[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    return x


@triton.jit
def _stored(STATE, raw, codes, high, gains, epochs, means, scales, head, heads, sets, slot, wanted, slots, capacity, c,
            D: tl.constexpr, CHANNELS: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr,
            KEY: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Channels `c` of slots as held, copies aside, float32 ``[n, channels]``; zeros where not `wanted`."""
    origin = tl.load(_int64s(STATE, 0))
    wanted &= (slot >= 0) & (slot < slots) & (slot < tl.load(_int64s(STATE, 0) + 1) - origin)
    ring = (origin + tl.maximum(slot, 0)) % slots
    if BITS == 16:
        at = (head * slots + ring)[:, None] * D + c[None, :]
        base = (STATE + raw).to(tl.pointer_type(DTYPE))
        return tl.load(base + at, mask=wanted[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    else:
        number = tl.load(STATE + epochs + head // heads * capacity + ring, mask=wanted, other=255).to(tl.int32)
        return decode(
            STATE, codes, high, gains, means, scales, head, heads, sets, ring, number, capacity, c,
            D, CHANNELS, BITS, STEPS, KEY, PRECISION,
        )  # fmt: skip


@triton.jit
def exact(
    QUERY, KEYS, VALUES, KEY, VALUE, COLUMNS, TAGS, MASK, PART, PEAKS, SUMS, SETS,
    heads, queries, groups, tokens, slots, capacity, first, length, scale, softcap, parts, part0,
    q_sb, q_sh, q_sq, q_sc, k_sb, k_sh, k_st, k_sc, v_sb, v_sh, v_st, v_sc, m_sb, m_sh, m_sq, m_sl,
    k_raw, k_codes, k_high, k_gains, k_epochs, k_means, k_scales,
    k_sinks, k_sink_positions, k_window, k_window_positions,
    v_raw, v_codes, v_high, v_gains, v_epochs, v_means, v_scales,
    v_sinks, v_sink_positions, v_window, v_window_positions,
    k_sets, v_sets,
    KD: tl.constexpr, KP: tl.constexpr, K_CHANNELS: tl.constexpr, K_BITS: tl.constexpr, K_STEPS: tl.constexpr,
    K_SINKS: tl.constexpr, K_WINDOW: tl.constexpr,
    VD: tl.constexpr, VP: tl.constexpr, V_CHANNELS: tl.constexpr, V_BITS: tl.constexpr, V_STEPS: tl.constexpr,
    V_SINKS: tl.constexpr, V_WINDOW: tl.constexpr,
    DTYPE: tl.constexpr, NEW: tl.constexpr, ROWS: tl.constexpr, MASK_KIND: tl.constexpr, SOFTCAP: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends to tokens that have an exact copy of their key or value, and to the new ones.

    Grid: (shares, batch * heads, row groups). The first share has the copies, the new tokens are shared among all.
    Between two writes that turn the rings of keys and values one may stand further on than the other: then the packed
    tokens are attended here too.
    NEW: dtype of the products with new tokens; float32 is always right, another one where query and tokens have it.
    """
    share = tl.program_id(0)
    shares = tl.num_programs(0)
    head = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2)
    batch_row = head // heads
    kv_head = head % heads * groups
    r = tl.arange(0, ROWS)
    row = group * ROWS + r
    query = row // groups
    in_group = row % groups
    real = query < queries
    # Channels of a key and of a value at a time: registers hold no more
    K_STEP: tl.constexpr = min(KP, 32 if max(KP, VP) <= 128 else 16)
    PIECE: tl.constexpr = min(VP, 128)
    vc = tl.arange(0, PIECE)
    n = tl.arange(0, 64)
    q_row = QUERY + (batch_row * q_sb + (kv_head + in_group) * q_sh + query * q_sq)[None, :]
    k_origin = tl.load(_int64s(KEYS, 0))
    v_origin = tl.load(_int64s(VALUES, 0))

    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = ()
    for _ in tl.static_range(VP // PIECE):
        acc = acc + (tl.zeros([PIECE, ROWS], tl.float32),)

    COPIES: tl.constexpr = K_SINKS + K_WINDOW + V_SINKS + V_WINDOW
    listed = COPIES + tl.where(k_origin == v_origin, 0, length)
    blocks = tl.where(share == 0, tl.cdiv(listed, 16), 0)
    for block in tl.range(0, blocks):
        e = block * 16 + tl.arange(0, 16)
        # The position that an entry of the list stands for: sinks and window of the keys, then of the values. The
        # first entry of a position counts.
        sink_k = e < K_SINKS
        window_k = (e >= K_SINKS) & (e < K_SINKS + K_WINDOW)
        f = e - (K_SINKS + K_WINDOW)
        sink_v = (f >= 0) & (f < V_SINKS)
        window_v = (f >= V_SINKS) & (f < V_SINKS + V_WINDOW)
        label = tl.load(_int64s(KEYS, k_sink_positions) + batch_row * K_SINKS + e, mask=sink_k, other=-1)
        label = tl.where(
            window_k,
            tl.load(_int64s(KEYS, k_window_positions) + batch_row * K_WINDOW + e - K_SINKS, mask=window_k, other=-1),
            label,
        )  # fmt: skip
        label_v = tl.load(_int64s(VALUES, v_sink_positions) + batch_row * V_SINKS + f, mask=sink_v, other=-1)
        label_v = tl.where(
            window_v,
            tl.load(_int64s(VALUES, v_window_positions) + batch_row * V_WINDOW + f - V_SINKS, mask=window_v, other=-1),
            label_v,
        )  # fmt: skip
        slot = tl.where(f < 0, label - k_origin, label_v - v_origin)
        slot = tl.where(e < COPIES, slot, e - COPIES + first)
        valid = tl.where(f < 0, label, label_v) >= 0
        column = slot - first
        valid &= (slot >= 0) & (column >= 0) & (column < length)
        k_sink = _find(KEYS, k_sink_positions, batch_row, slot + k_origin, K_SINKS)
        k_at = _find_in_window(KEYS, k_window_positions, batch_row, slot + k_origin, K_WINDOW)
        v_sink = _find(VALUES, v_sink_positions, batch_row, slot + v_origin, V_SINKS)
        v_at = _find_in_window(VALUES, v_window_positions, batch_row, slot + v_origin, V_WINDOW)
        valid &= ~(window_k & (k_sink >= 0))
        valid &= ~((f >= 0) & ((k_sink >= 0) | (k_at >= 0)))
        valid &= ~(window_v & (v_sink >= 0))
        for other in tl.range(0, tokens):
            valid &= tl.load(COLUMNS + other) != column
        packed = (e >= COPIES) & (e < listed)
        tag = tl.load(TAGS + batch_row * length + e - COPIES, mask=packed, other=_ELSEWHERE)
        valid = (valid & ~packed) | (packed & (tag >= 0))
        if tl.sum(valid.to(tl.int32), 0) > 0:
            lacking = valid & (k_sink < 0) & (k_at < 0)
            any_lacking = tl.sum(lacking.to(tl.int32), 0) > 0
            s = tl.zeros([16, ROWS], tl.float32)
            for begin in tl.range(0, KD, K_STEP):
                kc = begin + tl.arange(0, K_STEP)
                q = tl.load(q_row + kc[:, None] * q_sc, mask=real[None, :] & (kc < KD)[:, None], other=0.0)
                x = _copies(KEYS, k_sinks, k_window, head, k_sink, k_at, kc, KD, K_SINKS, K_WINDOW, DTYPE)
                if any_lacking:
                    x += _stored(
                        KEYS, k_raw, k_codes, k_high, k_gains, k_epochs, k_means, k_scales, head, heads, k_sets, slot,
                        lacking, slots, capacity, kc, KD, K_CHANNELS, K_BITS, K_STEPS, True, DTYPE, PRECISION,
                    )  # fmt: skip
                s = tl.dot(x, q.to(tl.float32), s, input_precision=PRECISION)
            s *= scale
            s = _logits(
                s, MASK, batch_row, kv_head, query, in_group, column, valid, real, softcap,
                m_sb, m_sh, m_sq, m_sl, MASK_KIND, SOFTCAP, NATURAL,
            )  # fmt: skip
            new_peak = tl.maximum(peak, tl.max(s, 0))
            safe = _finite_peak(new_peak)
            alpha = _exp(peak - safe, NATURAL)
            p = _exp(s - safe[None, :], NATURAL)
            total = total * alpha + tl.sum(p, 0)
            lacking = valid & (v_sink < 0) & (v_at < 0)
            any_lacking = tl.sum(lacking.to(tl.int32), 0) > 0
            sums = ()
            for piece in tl.static_range(VP // PIECE):
                c = piece * PIECE + vc
                x = _copies(VALUES, v_sinks, v_window, head, v_sink, v_at, c, VD, V_SINKS, V_WINDOW, DTYPE)
                if any_lacking:
                    x += _stored(
                        VALUES, v_raw, v_codes, v_high, v_gains, v_epochs, v_means, v_scales, head, heads, v_sets, slot,
                        lacking, slots, capacity, c, VD, V_CHANNELS, V_BITS, V_STEPS, False, DTYPE, PRECISION,
                    )  # fmt: skip
                sums = sums + (tl.dot(tl.trans(x), p, acc[piece] * alpha[None, :], input_precision=PRECISION),)
            acc = sums
            peak = new_peak

    blocks = tl.cdiv(tokens, 64)
    for block in tl.range(blocks * share // shares, blocks * (share + 1) // shares):
        token = block * 64 + n
        column = tl.load(COLUMNS + token, mask=token < tokens, other=-1)
        valid = column >= 0
        at = KEY + batch_row * k_sb + head % heads * k_sh + token.to(tl.int64)[:, None] * k_st
        s = tl.zeros([64, ROWS], tl.float32)
        for begin in tl.range(0, KD, K_STEP):
            kc = begin + tl.arange(0, K_STEP)
            q = tl.load(q_row + kc[:, None] * q_sc, mask=real[None, :] & (kc < KD)[:, None], other=0.0)
            x = tl.load(at + kc[None, :] * k_sc, mask=(token < tokens)[:, None] & (kc < KD)[None, :], other=0.0)
            s = tl.dot(x.to(NEW), q.to(NEW), s, input_precision=PRECISION)
        s *= scale
        s = _logits(
            s, MASK, batch_row, kv_head, query, in_group, column, valid, real, softcap,
            m_sb, m_sh, m_sq, m_sl, MASK_KIND, SOFTCAP, NATURAL,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(s, 0))
        safe = _finite_peak(new_peak)
        alpha = _exp(peak - safe, NATURAL)
        p = _exp(s - safe[None, :], NATURAL)
        total = total * alpha + tl.sum(p, 0)
        at = VALUE + batch_row * v_sb + head % heads * v_sh + token.to(tl.int64)[:, None] * v_st
        p_high = p.to(NEW)
        sums = ()
        for piece in tl.static_range(VP // PIECE):
            c = piece * PIECE + vc
            x = tl.load(at + c[None, :] * v_sc, mask=valid[:, None] & (c < VD)[None, :], other=0.0)
            x = tl.trans(x.to(NEW))
            y = tl.dot(x, p_high, acc[piece] * alpha[None, :], input_precision=PRECISION)
            if tl.float32 != NEW:
                y = tl.dot(x, (p - p_high.to(tl.float32)).to(NEW), y)
            sums = sums + (y,)
        acc = sums
        peak = new_peak

    at = (head * tl.num_programs(2) + group) * parts + part0 + share
    for piece in tl.static_range(VP // PIECE):
        tl.store(PART + at * ROWS * VP + r[None, :] * VP + (piece * PIECE + vc)[:, None], acc[piece])
    tl.store(PEAKS + at * ROWS + r, peak)
    tl.store(SUMS + at * ROWS + r, total)
    tl.store(SETS + at, -1)


@triton.jit
def _logits(
    s, MASK, batch_row, kv_head, query, in_group, column, valid, real, softcap, m_sb, m_sh, m_sq, m_sl,
    MASK_KIND: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Logits from scaled products: softcap, unit, mask, columns that do not count."""
    if SOFTCAP:
        s = _softcap(s, softcap)
    if not NATURAL:
        s *= _LOG2E
    admitted = valid[:, None] & real[None, :]
    s = _masked(s, MASK, batch_row, kv_head, query, in_group, column, admitted, m_sb, m_sh, m_sq, m_sl, MASK_KIND)
    return tl.where(valid[:, None], s, -float("inf"))


# ------------------------------------------------------------------------------------------------------------- combine


@triton.jit
def combine(
    PART, PEAKS, SUMS, SETS, SINK, VALUES, OUT,
    heads, queries, groups, parts, v_scales, v_sets,
    VD: tl.constexpr, VP: tl.constexpr, CODED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    HAS_SINK: tl.constexpr, NATURAL: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Merges the parts and turns them back to the cache's basis. Grid: (batch * heads, row groups, blocks of channels).

    SINK: float32 ``[query heads]``, a logit per head that takes part in the softmax and has no value.
    OUT: contiguous ``[batch, query heads, queries, VD]``. PARTS: `parts` or more, a power of two.
    """
    head = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    r = tl.arange(0, ROWS)
    row = group * ROWS + r
    query = row // groups
    real = query < queries
    at = (head * tl.num_programs(1) + group) * parts
    part = tl.arange(0, PARTS)
    there = part < parts
    peaks = tl.load(PEAKS + (at + part)[:, None] * ROWS + r[None, :], mask=there[:, None], other=-float("inf"))
    sums = tl.load(SUMS + (at + part)[:, None] * ROWS + r[None, :], mask=there[:, None], other=0.0)
    sets = tl.load(SETS + at + part, mask=there, other=-1)
    peak = tl.max(peaks, 0)
    if HAS_SINK:
        sink = tl.load(SINK + head % heads * groups + row % groups, mask=real, other=0.0) * (1.0 if NATURAL else _LOG2E)
        peak = tl.maximum(peak, sink)
    safe = _finite_peak(peak)
    total = tl.sum(sums * _exp(peaks - safe[None, :], NATURAL), 0)
    if HAS_SINK:
        total += _exp(sink - safe, NATURAL)

    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    out = tl.zeros([BLOCK, ROWS], tl.float32)
    STEP: tl.constexpr = 8
    lane = tl.arange(0, STEP)
    for begin in tl.range(0, parts, STEP):  # what is in the cache's basis already
        which = begin + lane
        own = tl.load(SETS + at + which, mask=which < parts, other=0) == -1
        weight = tl.load(
            PEAKS + (at + which)[:, None] * ROWS + r[None, :],
            mask=(own & (which < parts))[:, None],
            other=-float("inf"),
        )
        used = (weight > -float("inf"))[:, None, :] & (c < VD)[None, :, None]
        rows = (at + which)[:, None, None] * ROWS + r[None, None, :]
        x = tl.load(PART + rows * VP + c[None, :, None], mask=used, other=0.0)
        out += tl.sum(x * _exp(weight - safe[None, :], NATURAL)[:, None, :], 0)
    if CODED:
        number = tl.min(tl.where(sets >= 0, sets, 2147483647), 0)
        while number < 2147483647:
            turned = tl.zeros([BLOCK, ROWS], tl.float32)
            for piece in tl.range(0, VP, 32):
                j = piece + tl.arange(0, 32)
                acc = tl.zeros([32, ROWS], tl.float32)
                for begin in tl.range(0, parts, STEP):
                    which = begin + lane
                    own = tl.load(SETS + at + which, mask=which < parts, other=-1) == number
                    weight = tl.load(
                        PEAKS + (at + which)[:, None] * ROWS + r[None, :], mask=own[:, None], other=-float("inf")
                    )
                    used = (weight > -float("inf"))[:, None, :] & (j < VP)[None, :, None]
                    rows = (at + which)[:, None, None] * ROWS + r[None, None, :]
                    x = tl.load(PART + rows * VP + j[None, :, None], mask=used, other=0.0)
                    acc += tl.sum(x * _exp(weight - safe[None, :], NATURAL)[:, None, :], 0)
                turned = _turn_back(acc, j, c, turned, VD, PRECISION)
            out += turned / _scale(VALUES, v_scales, number, c, head, heads, v_sets, VD)[:, None]
            number = tl.min(tl.where(sets > number, sets, 2147483647), 0)
    out = tl.where((total == 0)[None, :], 0.0, out / total[None, :])
    to = ((head * groups + row % groups) * queries + query) * VD
    tl.store(OUT + to[None, :] + c[:, None], out, mask=real[None, :] & (c < VD)[:, None])


# ---------------------------------------------------------------------------------------------------------- dequantise


@triton.jit
def dequantise(
    STATE, OUT, START, first, length, heads, slots, capacity, sets,
    raw, codes, high, gains, epochs, means, scales, sinks, sink_positions, window, window_positions,
    HAS_START: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHANNELS: tl.constexpr, BITS: tl.constexpr,
    STEPS: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, KEY: tl.constexpr, DTYPE: tl.constexpr,
    LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Slots of the dense cache, from ``first + START`` on. Grid: (blocks of 32 of them, batch * heads).

    OUT: contiguous ``[batch, heads, length, D]``, zeros where the cache has no slot.
    """
    head = tl.program_id(1).to(tl.int64)
    row = head // heads
    place = tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32)
    slot = place + first
    if HAS_START:
        slot += tl.load(START)
    c = tl.arange(0, DP)
    inside = (place < length) & (slot < slots)
    x = _stored(
        STATE, raw, codes, high, gains, epochs, means, scales, head, heads, sets, slot, inside, slots, capacity, c,
        D, CHANNELS, BITS, STEPS, KEY, DTYPE, PRECISION,
    )  # fmt: skip
    if BITS != 16:
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    position = slot + tl.load(_int64s(STATE, 0))
    sink = _find(STATE, sink_positions, row, position, SINKS)
    at = _find_in_window(STATE, window_positions, row, position, WINDOW)
    copy = _copies(STATE, sinks, window, head, sink, at, c, D, SINKS, WINDOW, DTYPE)
    x = tl.where(((sink >= 0) | (at >= 0))[:, None], copy, x)
    x = tl.where(inside[:, None], x, 0.0)
    within = (place < length)[:, None] & (c < D)[None, :]
    tl.store(OUT + (head * length + place)[:, None] * D + c[None, :], x, mask=within)
