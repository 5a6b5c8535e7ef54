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


# Of 2, 3, 4 and 5 bits, one after the other: the table of BITS begins at 2**BITS - 4.
ENTRIES, THRESHOLDS = map(tl.constexpr, _tables())
SPREADS = tl.constexpr(tuple(codec.spread(bits) if bits in codec.CODED_BITS else 0.0 for bits in range(9)))


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
def _unrotate(y, cosines, N: tl.constexpr, ORDER: tl.constexpr, RUN: tl.constexpr, RUN_PADDED: tl.constexpr):
    if RUN > 1:
        y = _times_runs(y, tl.trans(cosines), N, ORDER, RUN_PADDED)
    return _butterflies(y, N, ORDER, RUN_PADDED) * ORDER**-0.5 * _signs(ORDER * RUN_PADDED, RUN, RUN_PADDED)


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
        z = divide(y, radius)
        code = tl.zeros_like(z).to(tl.int32)
        above = ()  # of each bit of the code, the highest first
        for i in tl.static_range(BITS):
            threshold = _chosen(THRESHOLDS, 2**BITS - 5 + 2 ** (BITS - 1 - i), 2 ** (BITS - i), above, i)
            above = above + (z > threshold,)
            code = code * 2 + above[i].to(tl.int32)
        return code, _chosen(ENTRIES, 2**BITS - 4, 1, above, BITS)


@triton.jit
def _shape(
    y,
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
    """`codec._shape`: codes, int32, and entries of rotated tokens ``[N, ORDER * RUN_PADDED]``."""
    if ORDER == 1 or ORDER * RUN <= LEAF:
        return _nearest(y, radius, BITS)
    else:
        HALF: tl.constexpr = ORDER // 2
        SIZE: tl.constexpr = ORDER * RUN_PADDED
        y1, y2 = _halves(y, N, SIZE)
        p, q = _halves(price, HEADS, SIZE)
        total = p + q
        price1 = divide(2 * p * q, total)
        code1, entry1 = _shape(y1, price1, radius, cosines, N, HEADS, HALF, RUN, RUN_PADDED, LEAF, BITS)
        error = _butterflies(y1 - _rounded(entry1 * radius), N, HALF, RUN_PADDED)
        passed = per_token(divide(p - q, total) * (1 / HALF), N, HEADS, SIZE // 2)
        if RUN > 1:
            error = _times_runs(error, tl.trans(cosines), N, HALF, RUN_PADDED) * passed
            error = _times_runs(error, cosines, N, HALF, RUN_PADDED)
        else:
            error = _rounded(error * passed)
        y2 += _butterflies(error, N, HALF, RUN_PADDED)
        code2, entry2 = _shape(y2, total * 0.5, radius, cosines, N, HEADS, HALF, RUN, RUN_PADDED, LEAF, BITS)
        return _joined(code1, code2, N, SIZE), _joined(entry1, entry2, N, SIZE)


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
    y = _rotate(balanced, cosines, N, ORDER, RUN, RUN_PADDED)
    if BITS == 8:
        size = tl.max(tl.abs(y), 1) * (32 / 127)
    else:
        power = tl.sum(_rounded(y * y), 1)
        size = _root(divide(power, HEAD_DIM * 1.0))
    radius = tl.maximum(size * SPREADS[BITS], TINY)[:, None]
    codes, entry = _shape(y, price, radius, cosines, N, HEADS, ORDER, RUN, RUN_PADDED, LEAF, BITS)

    entry = _unrotate(tl.where(valid, entry, 0.0), cosines, N, ORDER, RUN, RUN_PADDED)
    price = tl.where(valid, per_token(price, N, HEADS, SIZE), 0.0)
    priced = balanced * price
    power = tl.sum(balanced * priced, 1)
    inner = tl.sum(entry * priced, 1)
    norm = tl.sum(entry * entry * price, 1)
    near = inner * inner >= power * LEAST_SQUARED_COSINE * norm
    if KEY:
        wanted = divide(power, tl.maximum(inner, TINY))
    else:
        wanted = _root(divide(power, tl.maximum(norm, TINY)))
    gain = tl.where(near, wanted, divide(inner, tl.maximum(norm, TINY)))
    return codes, tl.minimum(tl.where(inner > 0, gain, 0.0), GAIN_MAX)


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
