"""Functions of kernels/codec.py for Triton kernels: fit and encode.

A tile of tokens is ``[N, SIZE]`` with ``SIZE = ORDER * RUN_PADDED`` channels: `codec.rotate` splits a head size into a
power of two ORDER and an odd rest RUN, which is padded to a power of two here. So channel ``c`` stands in column
``c // RUN * RUN_PADDED + c % RUN``; the columns between hold nothing. What belongs to heads, not tokens, is
``[HEADS, SIZE]``, and the tokens of a tile come head by head, ``N / HEADS`` of each.

Results equal the oracle's bit for bit as long as only the order of sums differs. So a product that is added to is not
fused with the addition (`_rounded`), and divisions and roots are those of IEEE 754.
"""

import itertools
import math
import struct

import triton
import triton.language as tl

from decoquant_compile.kernels import codec

# Triton's compiler admits no other global names, and Inductor, which copies them, no annotations.
LIMIT = tl.constexpr(codec.LIMIT)
GAIN_MAX = tl.constexpr(codec.GAIN_MAX)
TINY = tl.constexpr(2.0**-126)
COORDINATE_LIMIT = tl.constexpr(codec.COORDINATE_LIMIT)
BALANCE_FLOOR = tl.constexpr(codec.BALANCE_FLOOR)
CONSTANT_FLOOR = tl.constexpr(codec.CONSTANT_FLOOR)
IDENTITY_SHARE = tl.constexpr(codec.IDENTITY_SHARE)
QUERY_SHARE = tl.constexpr(1 - codec.IDENTITY_SHARE)
LEAST_SQUARED_COSINE = tl.constexpr(codec.LEAST_COSINE**2)
FLOAT_MAX = tl.constexpr((2 - 2.0**-23) * 2.0**127)
ROUNDER = tl.constexpr(1.5 * 2.0**23)  # x + ROUNDER - ROUNDER is x rounded to an integer, ties to even


_NEVER = 2.0**127
"""No value lies above this threshold. Not infinity: Inductor copies tables with kernels, and `inf` is no literal."""


def _single(x: float) -> float:
    """`x` rounded to float32. Not by a tensor: whoever imports this may be tracing with fake ones."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def _tables() -> tuple[tuple[float, ...], tuple[float, ...]]:
    entries: list[float] = []
    thresholds: list[float] = []
    for bits in (2, 3, 4, 5):
        book = [_single(entry / _single(codec.steps(bits))) for entry in codec.entries(bits)]
        entries += book
        thresholds += [*(_single(low + high) / 2 for low, high in itertools.pairwise(book)), _NEVER]
    return tuple(entries), tuple(thresholds)


def cosine_table(run: int) -> tuple[float, ...]:
    """`codec.cosines`, row by row; empty if a head size has no odd factor."""
    if run == 1:
        return ()
    norms = [math.sqrt(1 / run), *[math.sqrt(2 / run)] * (run - 1)]
    return tuple(
        _single(math.cos(math.pi * (2 * sample + 1) * frequency / (2 * run)) * norms[frequency])
        for sample in range(run)
        for frequency in range(run)
    )


def leaf_order(head_dim: int) -> int:
    """Power of two in the number of channels that shaping rounds at once."""
    order = head_dim & -head_dim
    run = head_dim // order
    while order > 1 and order * run > codec.leaf(head_dim):
        order //= 2
    return order


# Of 2, 3, 4 and 5 bits, one after the other: the table of BITS begins at 2**BITS - 4.
ENTRIES, THRESHOLDS = map(tl.constexpr, _tables())
RADII = tl.constexpr(
    tuple(tuple(map(_single, codec.radii(bits))) if bits in codec.CODED_BITS else () for bits in range(9))
)
LEAVES = tl.constexpr((0, 0, 16, 8, 8, 4, 0, 0, 4))  # whose codes share a word, by bits: a power of two


def _jumps() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Multipliers and increments that take the generator of `codec.signs` 1, 2, 4, ... steps further."""
    factor, increment = 1664525, 1013904223
    factors, increments = [], []
    for _ in range(16):
        factors.append(factor)
        increments.append(increment)
        factor, increment = factor * factor % 2**32, (factor + 1) * increment % 2**32
    return tuple(factors), tuple(increments)


FACTORS, INCREMENTS = map(tl.constexpr, _jumps())


@triton.jit
def _rounded(x):
    """A product that must not become part of a fused multiply-add: the operators round it."""
    return tl.minimum(x, FLOAT_MAX)


@triton.jit
def divide(a, b):
    """The quotient as IEEE 754 rounds it, of ordinary numbers: no detour for those with a reciprocal that is none.

    `tl.div_rn` has one, and calls to it from everywhere keep registers from being used.
    """
    inverse = 1.0 / b
    inverse = tl.fma(tl.fma(-b, inverse, 1.0), inverse, inverse)
    quotient = a * inverse
    quotient = tl.fma(tl.fma(-b, quotient, a), inverse, quotient)
    return tl.fma(tl.fma(-b, quotient, a), inverse, quotient)


@triton.jit
def _root(x):
    """The square root as IEEE 754 rounds it, of ordinary numbers and zero."""
    root = tl.sqrt(x)
    return tl.where(x > 0, tl.fma(tl.fma(-root, root, x), 0.5 / root, root), 0.0)


@triton.jit
def _clamp(x, limit):
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def column_channels(SIZE: tl.constexpr, RUN: tl.constexpr, RUN_PADDED: tl.constexpr):
    """Channel of each column ``[1, SIZE]``, and which columns hold one."""
    column = tl.arange(0, SIZE)[None, :]
    return column // RUN_PADDED * RUN + column % RUN_PADDED, column % RUN_PADDED < RUN


@triton.jit
def _signs(SIZE: tl.constexpr, RUN: tl.constexpr, RUN_PADDED: tl.constexpr):
    channel, _ = column_channels(SIZE, RUN, RUN_PADDED)
    steps = channel + 1
    state = tl.full([1, SIZE], 1, tl.uint32)
    for i in tl.static_range(16):
        if 2**i <= SIZE:  # of at most SIZE steps
            state = tl.where((steps >> i) % 2 == 1, state * FACTORS[i] + INCREMENTS[i], state)
    return tl.where(state >> 31 == 1, 1.0, -1.0)


@triton.jit
def _cosines(COSINES: tl.constexpr, RUN: tl.constexpr, RUN_PADDED: tl.constexpr):
    """`codec.cosines` ``[RUN_PADDED, RUN_PADDED]``, zeros in the padding."""
    sample = tl.arange(0, RUN_PADDED)[:, None]
    frequency = tl.arange(0, RUN_PADDED)[None, :]
    matrix = tl.zeros([RUN_PADDED, RUN_PADDED], tl.float32)
    for i in tl.static_range(RUN * RUN):
        matrix = tl.where((sample == i // RUN) & (frequency == i % RUN), COSINES[i], matrix)
    return matrix


@triton.jit
def _butterflies(x, N: tl.constexpr, ORDER: tl.constexpr, RUN_PADDED: tl.constexpr):
    for i in tl.static_range(16):
        if 2**i < ORDER:
            pairs = tl.reshape(x, [N, ORDER // 2 ** (i + 1), 2, 2**i * RUN_PADDED])
            a, b = tl.split(tl.permute(pairs, 0, 1, 3, 2))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), 0, 1, 3, 2), [N, ORDER * RUN_PADDED])
    return x


@triton.jit
def _times_runs(x, matrix, N: tl.constexpr, ORDER: tl.constexpr, RUN_PADDED: tl.constexpr):
    """Multiplies each run of channels by a matrix."""
    runs = tl.reshape(x, [N * ORDER, RUN_PADDED])
    product = tl.sum(_rounded(runs[:, :, None] * matrix[None, :, :]), 1)
    return tl.reshape(product, [N, ORDER * RUN_PADDED])


@triton.jit
def _rotate(x, cosines, N: tl.constexpr, ORDER: tl.constexpr, RUN: tl.constexpr, RUN_PADDED: tl.constexpr):
    y = _butterflies(x * _signs(ORDER * RUN_PADDED, RUN, RUN_PADDED), N, ORDER, RUN_PADDED) * ORDER**-0.5
    if RUN > 1:
        y = _times_runs(y, cosines, N, ORDER, RUN_PADDED)
    return y


@triton.jit
def per_token(x, N: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """What belongs to heads, ``[HEADS, SIZE]``, such that it broadcasts to the tokens ``[N, SIZE]``."""
    if HEADS > 1 and HEADS < N:
        x = tl.reshape(tl.broadcast_to(x[:, None, :], [HEADS, N // HEADS, SIZE]), [N, SIZE])
    return x


@triton.jit
def _halves(x, N: tl.constexpr, SIZE: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, [N, 2, SIZE // 2]), 0, 2, 1))


@triton.jit
def _joined(a, b, N: tl.constexpr, SIZE: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(a, b), 0, 2, 1), [N, SIZE])


@triton.jit
def _chosen(TABLE: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, bits, COUNT: tl.constexpr):
    """The numbers ``TABLE[FIRST + STEP * i]``, where ``i`` has the `COUNT` bits of a tuple, the highest first.

    By selects, which hold a few masks for long instead of many at once: on AMD each is two scalar registers.
    """
    if COUNT == 0:
        return tl.full([], TABLE[FIRST], tl.float32)
    else:
        low = _chosen(TABLE, FIRST, 2 * STEP, bits, COUNT - 1)
        high = _chosen(TABLE, FIRST + STEP, 2 * STEP, bits, COUNT - 1)
        return tl.where(bits[COUNT - 1], high, low)


@triton.jit
def _nearest(y, radius, BITS: tl.constexpr):
    """Codes of the nearest entries, int32, and these entries."""
    if BITS == 8:
        z = y * (divide(1.0, radius) * 32.0)
        z = tl.where(z == z, z, 0.0)  # noqa: PLR0124 - zero times the infinity of a radius too small
        z = _clamp(z, 127.0) + ROUNDER - ROUNDER
        return (z + 128.0).to(tl.int32), z * (1 / 32)
    else:
        # The codebook mirrors its positive half. A tie goes to the lower entry: of negative numbers to the larger one.
        HALF: tl.constexpr = 2 ** (BITS - 1)
        z = divide(y, radius)
        negative = (z > 0).to(tl.int32) ^ 1
        size = (tl.abs(z).to(tl.int32, bitcast=True) + negative).to(tl.float32, bitcast=True)
        code = tl.zeros_like(negative) + 1
        above = ()  # of each bit of the code but the first, the highest first
        for i in tl.static_range(BITS - 1):
            threshold = _chosen(THRESHOLDS, 3 * HALF - 5 + (HALF >> i + 1), HALF >> i, above, i)
            above = above + (size > threshold,)
            code = code * 2 + above[i].to(tl.int32)
        entry = _chosen(ENTRIES, 3 * HALF - 4, 1, above, BITS - 1)
        return code ^ (negative * (2 * HALF - 1)), tl.where(negative == 0, entry, -entry)


@triton.jit
def _shape(
    x,
    price,
    radius,
    cosines,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    ORDER: tl.constexpr,
    RUN: tl.constexpr,
    RUN_PADDED: tl.constexpr,
    LEAF: tl.constexpr,
    BITS: tl.constexpr,
):
    """`codec._shape` of tokens ``[N, ORDER * RUN_PADDED]``: codes, packed as for `_unpacked`, and what they stand for.

    Codes of leaves share words: what a loop keeps costs few registers, and no codes are moved to join those of halves.
    """
    if ORDER == LEAF:
        y = _butterflies(x, N, ORDER, RUN_PADDED)
        if RUN > 1:
            y = _times_runs(y, cosines, N, ORDER, RUN_PADDED)
        code, entry = _nearest(y, radius, BITS)
        y = _rounded(entry * radius)
        if RUN > 1:
            y = _times_runs(y, tl.trans(cosines), N, ORDER, RUN_PADDED)
        return code, _butterflies(y, N, ORDER, RUN_PADDED) * (1 / ORDER)
    else:
        HALF: tl.constexpr = ORDER // 2
        SIZE: tl.constexpr = ORDER * RUN_PADDED
        a, b = _halves(x, N, SIZE)
        p, q = _halves(price, HEADS, SIZE)
        total = p + q
        price1 = divide(2 * p * q, total)
        passed = per_token(divide(p - q, total), N, HEADS, SIZE // 2)
        wanted = a + b
        code1, reached = _shape(wanted, price1, radius, cosines, N, HEADS, HALF, RUN, RUN_PADDED, LEAF, BITS)
        moved = a - b + _rounded((wanted - reached) * passed)
        code2, other = _shape(moved, total * 0.5, radius, cosines, N, HEADS, HALF, RUN, RUN_PADDED, LEAF, BITS)
        if LEAVES[BITS] >= ORDER // LEAF:
            code = code1 | (code2 << HALF // LEAF * BITS)
        else:
            code = _joined(code1, code2, N, 2 * code1.shape[1])
        return code, _joined(reached + other, reached - other, N, SIZE) * 0.5


@triton.jit
def _unpacked(
    words, N: tl.constexpr, ORDER: tl.constexpr, RUN_PADDED: tl.constexpr, LEAF: tl.constexpr, BITS: tl.constexpr
):
    """Codes, int32 ``[N, ORDER * RUN_PADDED]``, of words ``[N, ...]`` that hold those of leaves, the first low."""
    SIZE: tl.constexpr = LEAF * RUN_PADDED
    SHARED: tl.constexpr = ORDER * RUN_PADDED // words.shape[1]
    words = tl.reshape(words, [N, words.shape[1] // SIZE, 1, SIZE])
    codes = (words >> (tl.arange(0, SHARED) * BITS)[None, None, :, None]) & (2**BITS - 1)
    return tl.reshape(codes, [N, ORDER * RUN_PADDED])


@triton.jit
def _attempt(
    wanted,
    price,
    priced,
    radius,
    cosines,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    ORDER: tl.constexpr,
    RUN: tl.constexpr,
    RUN_PADDED: tl.constexpr,
    LEAF: tl.constexpr,
    BITS: tl.constexpr,
):
    """Codes at a radius, packed, and the sums ``[N]`` that their error and gain are formed of."""
    at = (radius * ORDER**0.5)[:, None]
    codes, reached = _shape(wanted, price, at, cosines, N, HEADS, ORDER, RUN, RUN_PADDED, LEAF, BITS)
    left = wanted - reached
    lost = left * priced
    return codes, tl.sum(left * lost, 1), tl.sum(reached * lost, 1), tl.sum(reached * reached * priced, 1)


@triton.jit
def encode(
    x,
    mean,
    scale,
    weight,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ORDER: tl.constexpr,
    RUN: tl.constexpr,
    RUN_PADDED: tl.constexpr,
    LEAF: tl.constexpr,
    COSINES: tl.constexpr,
    KEY: tl.constexpr,
    BITS: tl.constexpr,
):
    """`codec.encode`: codes, int32 ``[N, SIZE]``, and gains, float32 ``[N]``.

    Args:
        x: finite float32 ``[N, SIZE]``, zeros in the padding.
        mean, scale, weight: float32 ``[HEADS, SIZE]``; zeros in the padding of the mean, ones in that of the others.
        LEAF: as of `leaf_order`.
    """
    SIZE: tl.constexpr = ORDER * RUN_PADDED
    _, valid = column_channels(SIZE, RUN, RUN_PADDED)
    if RUN > 1:
        cosines = _cosines(COSINES, RUN, RUN_PADDED)
    else:
        cosines = 0.0
    least = tl.min(tl.where(valid, scale, float("inf")), 1)[:, None]
    relative = divide(least, scale)
    price = relative * relative
    if KEY:
        price *= weight
    price = tl.where(valid, price, 1.0)

    mean = per_token(mean, N, HEADS, SIZE)
    scale = per_token(scale, N, HEADS, SIZE)
    balanced = _clamp((_clamp(x, LIMIT) - mean) * scale, COORDINATE_LIMIT)
    wanted = balanced * _signs(SIZE, RUN, RUN_PADDED)
    if BITS == 8:
        size = tl.max(tl.abs(_rotate(balanced, cosines, N, ORDER, RUN, RUN_PADDED)), 1) * (32 / 127)
    else:
        size = _root(divide(tl.sum(_rounded(balanced * balanced), 1), HEAD_DIM * 1.0))
    priced = per_token(price, N, HEADS, SIZE)  # nothing is wanted or reached in the padding
    if len(RADII[BITS]) == 1:
        radius = tl.maximum(size * RADII[BITS][0], TINY)
        codes, _, cross, norm = _attempt(
            wanted, price, priced, radius, cosines, N, HEADS, ORDER, RUN, RUN_PADDED, LEAF, BITS
        )
    else:
        # Not unrolled: the code, and the time to compile it, would be eight times as long.
        error = tl.full([N], float("inf"), tl.float32)
        cross = tl.zeros([N], tl.float32)
        norm = cross
        radius = cross
        codes = tl.zeros([N, SIZE // min(ORDER // LEAF, LEAVES[BITS])], tl.int32)
        for i in range(len(RADII[BITS])):
            factor = tl.full([], RADII[BITS][0], tl.float32)
            for k in tl.static_range(1, len(RADII[BITS])):
                factor = tl.where(i == k, RADII[BITS][k], factor)
            radius1 = tl.maximum(size * factor, TINY)
            codes1, error1, cross1, norm1 = _attempt(
                wanted, price, priced, radius1, cosines, N, HEADS, ORDER, RUN, RUN_PADDED, LEAF, BITS
            )
            better = error1 < error  # of equal ones the first
            error = tl.where(better, error1, error)
            cross = tl.where(better, cross1, cross)
            norm = tl.where(better, norm1, norm)
            radius = tl.where(better, radius1, radius)
            codes = tl.where(better[:, None], codes1, codes)
    power = tl.sum(wanted * wanted * priced, 1)
    inner = cross + norm
    closest = divide(inner, tl.maximum(norm, TINY))
    if KEY:
        unbiased = divide(power, tl.maximum(inner, TINY))
    else:
        unbiased = _root(divide(power, tl.maximum(norm, TINY)))
    gain = tl.where(inner * closest >= power * LEAST_SQUARED_COSINE, unbiased, closest) * radius
    gain = tl.minimum(tl.where(inner > 0, gain, 0.0), GAIN_MAX)
    return _unpacked(codes, N, ORDER, RUN_PADDED, LEAF, BITS), gain


@triton.jit
def _mean_of_channels(x, HEAD_DIM: tl.constexpr):
    return divide(tl.sum(x, 1), HEAD_DIM * 1.0)[:, None]


@triton.jit
def weights_of(energy, HEAD_DIM: tl.constexpr):
    """`codec.weights` ``[HEADS, SIZE]``, bfloat16."""
    average = tl.broadcast_to(_mean_of_channels(energy, HEAD_DIM), energy.shape)
    relative = tl.where(average > 0, divide(energy, tl.maximum(average, TINY)), 1.0)
    return (relative * QUERY_SHARE + IDENTITY_SHARE).to(tl.bfloat16)


@triton.jit
def fit(mean, variance, weight, HEAD_DIM: tl.constexpr, KEY: tl.constexpr):
    """`codec.fit`: mean and scale ``[HEADS, SIZE]``, bfloat16.

    Args:
        mean, variance: float32 ``[HEADS, SIZE]``, zeros in the padding.
        weight: float32 ``[HEADS, SIZE]``, positive.
    """
    if KEY:
        centre = mean.to(tl.bfloat16)
    else:
        centre = tl.zeros_like(mean).to(tl.bfloat16)
    middle = centre.to(tl.float32)
    spread = tl.maximum(variance + _rounded((mean - middle) * (mean - middle)), (middle * middle) * CONSTANT_FLOOR)
    floor = tl.maximum(tl.max(spread, 1) * BALANCE_FLOOR, TINY)[:, None]
    deviation = _root(tl.maximum(spread, floor))
    if KEY:
        root = _root(deviation)
        deviation = root * _root(root)
    balance = divide(1.0, deviation)
    if KEY:
        balance *= _root(_root(_root(weight)))
    power = _mean_of_channels(spread * (balance * balance), HEAD_DIM)
    norm = divide(1.0, _root(tl.maximum(power, TINY)))
    return centre, tl.where(power > 0, balance * norm, 1.0).to(tl.bfloat16)
