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
        for token in tl.range(0, tokens):
            position = tl.load(POSITIONS + token)
            gone |= (position >= 0) & (position == slot)
        if MASKED:
            gone |= tl.load(MASK + row * mask_sb + column * mask_sl, mask=column < length, other=0) == 0
        tag = tl.where(gone, _ELSEWHERE, tag)
        tl.store(TAGS + row * length + column, tag.to(tl.int16), mask=column < length)


# ---------------------------------------------------------------------------------------------------------------- fold


@triton.jit
def fold(
    QUERY, KEYS, FOLDED, FACTORS,
    heads, queries, groups, q_sb, q_sh, q_sq, q_sc, k_means, k_scales, sets, scale,
    D: tl.constexpr, DP: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
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
        x = tl.load(
            QUERY + base[:, None] + c[None, :] * q_sc, mask=(query < queries)[:, None] & (c < D)[None, :], other=0.0
        ).to(tl.float32) * scale
        s = tl.load((KEYS + k_scales).to(tl.pointer_type(tl.bfloat16)) + of_set + c, mask=c < D, other=1.0)
        mean = tl.load((KEYS + k_means).to(tl.pointer_type(tl.bfloat16)) + of_set + c, mask=c < D, other=0.0)
        constant += tl.sum(x * mean.to(tl.float32)[None, :], 1)
        inside = (c < D)[:, None] & (channel < D)[None, :]
        matrix = rotation(c[:, None] + tl.zeros_like(channel)[None, :], channel[None, :] + tl.zeros_like(c)[:, None], D)
        matrix = tl.where(inside, matrix, 0.0)
        rotated = tl.dot(x / s.to(tl.float32)[None, :], matrix, rotated, input_precision="ieee")
    peak = tl.max(tl.abs(rotated), 1)
    # Integers know no nan: it comes back with the factor.
    poison = tl.sum(rotated * 0.0, 1)
    limbs = two_limbs(tl.where(poison[:, None] == 0, rotated, 0.0), peak[:, None])
    at = ((head * tl.num_programs(2) + group) * sets + number) * ROWS
    limb = tl.arange(0, 2)[None, None, :]
    tl.store(FOLDED + (at + tl.arange(0, ROWS)[:, None, None]) * 2 * PLACES + limb * PLACES + place[None, :, None], limbs)
    tl.store(FACTORS + at * 2 + tl.arange(0, ROWS), peak / (16256.0 * STEPS) + poison)
    tl.store(FACTORS + at * 2 + ROWS + tl.arange(0, ROWS), constant)


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
    row = tl.arange(0, PADDED // 4)[:, None, None, None, None, None] * 4
    row += tl.arange(0, 4)[None, None, None, None, :, None]
    tile = tl.arange(0, 2)[None, :, None, None, None, None] * 2 + tl.arange(0, 2)[None, None, :, None, None, None]
    token = tl.arange(0, 4)[None, None, None, :, None, None] * 4 + tl.arange(0, 4)[None, None, None, None, None, :]
    at = (tile * (ROWS // PER) + row // PER) * 16 + token
    if PADDED == ROWS:
        return tl.load(WORDS + at)
    return tl.load(WORDS + at, mask=tl.broadcast_to(row < ROWS, at.shape), other=0)


@triton.jit
def _value_words(WORDS, ROWS: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr, PER: tl.constexpr):
    """Words of a tile of values ``[row / 4, chunk / 2, chunk % 2, channel / 4, row % 4, channel % 4]``."""
    row = tl.arange(0, ROWS // 4)[:, None, None, None, None, None] * 4
    row += tl.arange(0, 4)[None, None, None, None, :, None]
    LOW: tl.constexpr = 2 if PADDED > 1 else 1
    chunk = tl.arange(0, PADDED // LOW)[None, :, None, None, None, None] * LOW
    chunk += tl.arange(0, LOW)[None, None, :, None, None, None]
    channel = tl.arange(0, 4)[None, None, None, :, None, None] * 4 + tl.arange(0, 4)[None, None, None, None, None, :]
    at = (chunk * (ROWS // PER) + row // PER) * 16 + channel
    if PADDED == CHUNKS:
        return tl.load(WORDS + at)
    return tl.load(WORDS + at, mask=tl.broadcast_to(chunk < CHUNKS, at.shape), other=0)


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
def _mask_tile(
    logits, MASK, row, kv_head, query, head, column, admitted, m_sb, m_sh, m_sq, m_sl, MASK_KIND: tl.constexpr
):
    """Logits ``[columns, rows]`` under the mask. Kinds: 0 none, 1 bool, 2 additive."""
    if MASK_KIND == 0:
        return logits
    at = row * m_sb + (kv_head + head)[None, :] * m_sh + query[None, :] * m_sq + column[:, None] * m_sl
    if MASK_KIND == 1:
        return tl.where(tl.load(MASK + at, mask=admitted, other=0) != 0, logits, -float("inf"))
    return logits + tl.load(MASK + at, mask=admitted, other=0.0).to(tl.float32)


@triton.jit
def split(
    QUERY, KEYS, VALUES, MASK, TAGS, FOLDED, FACTORS, PART, PEAKS, SUMS, SETS,
    heads, queries, groups, slots, capacity, first, length, q_sb, q_sh, q_sq, q_sc, m_sb, m_sh, m_sq, m_sl,
    k_codes, k_high, k_gains, v_codes, v_high, v_gains, k_sets, scale, softcap, parts,
    KD: tl.constexpr, VD: tl.constexpr, VP: tl.constexpr, PLACES: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, DTYPE: tl.constexpr, V_STEPS: tl.constexpr,
    ROWS: tl.constexpr, MASK_KIND: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Attends to the packed tokens in a share of the tiles. Grid: (splits, batch * heads, row groups).

    PART: float32 ``[batch * heads * row groups, parts, ROWS, VP]``, sums of values weighted relative to PEAKS
    ``[..., parts, ROWS]``, with SUMS of the weights; SETS int32 ``[..., parts]``: the parameter set in whose basis PART
    is, -1 for the cache's own. A split owns two parts: its last set, and all others together.
    """
    K_WIDTH: tl.constexpr = 2 if K_BITS == 3 else 4 if K_BITS == 5 else K_BITS
    V_WIDTH: tl.constexpr = 2 if V_BITS == 3 else 4 if V_BITS == 5 else V_BITS
    K_HALVES: tl.constexpr = 2 if K_BITS == 4 else 1
    V_HALVES: tl.constexpr = 2 if V_BITS == 4 else 1
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
    i = tl.arange(0, 64)
    tokens = _token_of(i)
    tags = TAGS + batch_row * length

    origin = tl.load(_int64s(KEYS, 0))
    written = tl.maximum(tl.load(_int64s(KEYS, 0) + 1), tl.load(_int64s(VALUES, 0) + 1)) - origin
    zero = (origin >> 63).to(tl.int32)
    turn = (origin % slots).to(tl.int32)
    low = tl.maximum(first, 0)
    high = tl.minimum(tl.minimum(slots, first + length), written).to(tl.int32)
    count = tl.maximum(high - low, 0)
    tiles = capacity // _TILE
    begin = (turn + low) % slots
    tile0 = begin // _TILE
    stop = begin + count
    number = tl.where(stop <= slots, tl.cdiv(stop, _TILE) - tile0, tiles - tile0 + tl.cdiv(stop - slots, _TILE))
    number = tl.where(count > 0, tl.minimum(number, tiles), 0)
    tile_begin = (number.to(tl.int64) * share // shares).to(tl.int32)
    tile_end = (number.to(tl.int64) * (share + 1) // shares).to(tl.int32)

    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    # Columns never written, a share of all columns each
    if count < length:
        ZB: tl.constexpr = 256
        blocks = tl.cdiv(length, ZB)
        for block in tl.range(blocks * share // shares, blocks * (share + 1) // shares):
            column = block * ZB + tl.arange(0, ZB)
            tag = tl.load(tags + column, mask=column < length, other=_ELSEWHERE).to(tl.int32)
            found = tag == _ZERO
            here = tl.sum(found.to(tl.int32), 0)
            if here > 0:
                if MASK_KIND == 0:
                    new_peak = tl.maximum(peak, 0.0)
                    total = total * _exp(peak - new_peak, NATURAL) + here.to(tl.float32) * _exp(-new_peak, NATURAL)
                    peak = new_peak
                else:
                    s = tl.where(found[:, None], tl.zeros([ZB, ROWS], tl.float32), -float("inf"))
                    admitted = found[:, None] & real[None, :]
                    s = _mask_tile(
                        s, MASK, batch_row, kv_head, query, in_group, column, admitted, m_sb, m_sh, m_sq, m_sl, MASK_KIND
                    )
                    new_peak = tl.maximum(peak, tl.max(s, 0))
                    safe = _finite_peak(new_peak)
                    total = total * _exp(peak - safe, NATURAL) + tl.sum(_exp(s - safe[None, :], NATURAL), 0)
                    peak = new_peak

    CHUNKS: tl.constexpr = (VD + 15) // 16
    m = tl.arange(0, VP)
    if V_BITS == 16:
        channel = m
    else:
        C_LOW: tl.constexpr = 2 if VP > 16 else 1
        channel = (m // (16 * C_LOW) * C_LOW + m // 4 % C_LOW) * 16 + m % 4 * 4 + m // (4 * C_LOW) % 4
    at = (head * tl.num_programs(2) + group) * parts + share * 2
    out = PART + (at + 1) * ROWS * VP + r[None, :] * VP + channel[:, None]
    flushed = tl.full([ROWS], -float("inf"), tl.float32)  # the peak that the other part is relative to

    # Parameter sets in ascending order of tags, each over the tiles it occurs in
    tag_now = tl.full([], -1, tl.int32)
    value_set = tl.full([], -1, tl.int32)
    acc = tl.zeros([VP, ROWS], tl.float32)
    searching = tile_begin < tile_end
    while searching:
        following = tl.full([256], 32767, tl.int32)
        first_tile = tl.full([256], 2147483647, tl.int32)
        last_tile = tl.full([256], -1, tl.int32)
        # The next tag, then where it is
        for look in tl.static_range(2):
            for block in tl.range(tile_begin, tile_end, 4):
                index = block + tl.arange(0, 256) // 64
                ring = (tile0 + index) % tiles * _TILE + tl.arange(0, 256) % 64
                slot = ring - turn
                slot = tl.where(slot < 0, slot + slots, slot)
                column = slot - first
                inside = (index < tile_end) & (ring < slots) & (column >= 0) & (column < length)
                tag = tl.load(tags + column, mask=inside, other=_ELSEWHERE).to(tl.int32)
                if look == 0:
                    following = tl.where(tag > tag_now, tl.minimum(tag, following), following)
                else:
                    first_tile = tl.where(tag == tag_now, tl.minimum(index, first_tile), first_tile)
                    last_tile = tl.where(tag == tag_now, tl.maximum(index, last_tile), last_tile)
            if look == 0:
                tag_now = tl.min(following, 0)
        searching = tag_now < 32767
        if searching:
            k_set = tag_now % 128
            if tag_now // 128 != value_set:
                if value_set >= 0:
                    # TODO
                    acc = tl.zeros([VP, ROWS], tl.float32)
                value_set = tag_now // 128
            if K_BITS != 16:
                N: tl.constexpr = 2 * ROWS
                k_safe = tl.where(k_set < k_sets, k_set, 0)
                folded = ((head * tl.num_programs(2) + group) * k_sets + k_safe) * ROWS
                q_words = (FOLDED + folded * 2 * PLACES).to(tl.pointer_type(tl.int32))
                q_words += tl.arange(0, N)[:, None] * (PLACES // 4) + tl.arange(0, PLACES // 4)[None, :]
                q = tl.trans(tl.reshape(unpack(tl.load(q_words)), [N, PLACES]))
                factor = tl.load(FACTORS + folded * 2 + r)
                constant = tl.load(FACTORS + folded * 2 + ROWS + r)
            for index in tl.range(tl.min(first_tile, 0), tl.max(last_tile, 0) + 1):
                tile = (tile0 + index) % tiles
                ring = tile * _TILE + tokens
                slot = ring - turn
                slot = tl.where(slot < 0, slot + slots, slot)
                column = slot - first
                inside = (ring < slots) & (column >= 0) & (column < length)
                mine = tl.load(tags + column, mask=inside, other=_ELSEWHERE).to(tl.int32) == tag_now
                K_ROWS: tl.constexpr = (KD * K_WIDTH + 31) // 32
                K_PADDED: tl.constexpr = PLACES * K_WIDTH // 32
                words = (KEYS + k_codes).to(tl.pointer_type(tl.int32)) + (head * capacity + tile * _TILE) * K_ROWS
                w = _key_words(words, K_ROWS, K_PADDED, 1)
                e = entries(w, w, w, zero, K_BITS, PTX)
                s_limbs = tl.zeros([64, N], tl.int32)
                for half in tl.static_range(K_HALVES):
                    x = gather(e, half * (8 // K_WIDTH), 8 // K_WIDTH)
                    x = tl.reshape(tl.permute(x, (1, 5, 2, 3, 0, 7, 4, 6)), [64, PLACES])
                    s_limbs = tl.dot(x, q, s_limbs)
                s_high, s_low = tl.split(tl.reshape(s_limbs, [64, ROWS, 2]))
                gain = tl.load((KEYS + k_gains).to(tl.pointer_type(tl.float16)) + head * capacity + ring).to(tl.float32)
                s = (s_high * 128 + s_low).to(tl.float32) * gain[:, None] * factor[None, :] + constant[None, :]
                s = tl.where((gain >= 0)[:, None] & (k_set != _NO_SET), s, 0.0)
                s = tl.where(mine[:, None], s, -float("inf"))

                new_peak = tl.maximum(peak, tl.max(s, 0))
                safe = _finite_peak(new_peak)
                alpha = _exp(peak - safe, NATURAL)
                p = _exp(s - safe[None, :], NATURAL)
                total = total * alpha + tl.sum(p, 0)
                peak = new_peak
                v_gain = tl.load((VALUES + v_gains).to(tl.pointer_type(tl.float16)) + head * capacity + ring).to(tl.float32)
                weight = p * tl.maximum(v_gain, 0.0)[:, None]
                top = tl.max(weight, 0)
                limbs = two_limbs(weight, tl.broadcast_to(top[None, :], weight.shape))
                limbs = _reorder(tl.reshape(limbs, [64, N]), V_WIDTH, N)
                V_ROWS: tl.constexpr = 2 * V_WIDTH
                words = (VALUES + v_codes).to(tl.pointer_type(tl.int32)) + (head * tiles + tile) * (CHUNKS * V_ROWS * 16)
                w = _value_words(words, V_ROWS, CHUNKS, VP // 16, 1)
                e = entries(w, w, w, zero, V_BITS, PTX)
                o_limbs = tl.zeros([VP, N], tl.int32)
                for half in tl.static_range(V_HALVES):
                    x = gather(e, half * (8 // V_WIDTH), 8 // V_WIDTH)
                    x = tl.reshape(tl.permute(x, (1, 5, 2, 3, 0, 7, 4, 6)), [VP, 64])
                    o_limbs = tl.dot(x, limbs, o_limbs)
                o_high, o_low = tl.split(tl.reshape(o_limbs, [VP, ROWS, 2]))
                acc = acc * alpha[None, :] + (o_high * 128 + o_low).to(tl.float32) * (top * (1 / (16256.0 * V_STEPS)))[None, :]

    tl.store(PART + at * ROWS * VP + r[None, :] * VP + channel[:, None], acc)
    tl.store(PEAKS + at * ROWS + r, peak)
    tl.store(SUMS + at * ROWS + r, total)
    tl.store(SETS + at, value_set)
