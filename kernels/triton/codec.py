"""What the kernels share of the codec: the rotation, entries of packed codes, the order in which codes come.

Products of codes run on the integer matrix units: entries are int8, exactly, and so are the two limbs of a query or
of a weight (`two_limbs`). A byte permute turns four codes into four entries at once. The order of channels (keys) and
tokens (values) along a product follows from that, and the other operand is laid out alike (`neighbour`).
"""

import triton
import triton.language as tl
from triton.language import constexpr

from decoquant_compile.kernels import codec

# Affine maps of 2 ** k steps of the generator in `codec.signs`: state -> FACTOR[k] * state + TERM[k].
_factor, _term = 1664525, 1013904223
_factors, _terms = [], []
for _ in range(16):
    _factors.append(_factor)
    _terms.append(_term)
    _factor, _term = _factor * _factor % 2**32, (_factor * _term + _term) % 2**32
_FACTORS = constexpr(tuple(_factors))
_TERMS = constexpr(tuple(_terms))


def _word(entries: tuple[int, ...]) -> int:
    """Four int8 in the bytes of a 32-bit word, as a signed number."""
    return int.from_bytes(bytes(entry % 256 for entry in entries), "little", signed=True)


def _words(entries: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_word(entries[i : i + 4]) for i in range(0, len(entries), 4))


_two, _three, _four, _five = (codec.entries(bits) for bits in (2, 3, 4, 5))
_TWO = constexpr(_words(_two + _two))
_THREE = constexpr(_words(_three))
# A selector with its highest bit set yields the sign of an entry. So the lower half of the codes is looked up with the
# code: the upper half gives -1, made up for by the table of the upper half, where the lower half gives 0.
_FOUR_LOWER = constexpr(_words(_four[:8]))
_FOUR_UPPER = constexpr(_words(tuple(entry + 1 for entry in _four[8:])))
# Entries of 5 bits by their low 4: without their sign bit, so that the halves of a table can be joined.
_FIVE = constexpr(_words(tuple(entry % 128 for entry in _five)))

_POSITIVE = constexpr({bits: codec.entries(bits)[1 << (bits - 1) :] for bits in (2, 3, 4, 5)})

assert all(entry < 0 for entry in _four[:8])
assert all(0 < entry < 127 for entry in _four[8:])


@triton.jit
def rotation(i, j, D: tl.constexpr):
    """Entries ``[i, j]`` of the matrix of `codec.rotate`, float32; `i` and `j` broadcast, in ``[0, D)``."""
    ORDER: tl.constexpr = D & -D
    RUN: tl.constexpr = D // ORDER
    state = tl.full(i.shape, 1, tl.uint32)
    step = (i + 1).to(tl.uint32)
    for k in tl.static_range(16):
        if (1 << k) <= D:
            state = tl.where(
                (step >> k) & 1 != 0, state * tl.cast(_FACTORS[k], tl.uint32) + tl.cast(_TERMS[k], tl.uint32), state
            )
    sign = tl.where(state >> 31 != 0, ORDER**-0.5, -(ORDER**-0.5))
    parity = (i // RUN) & (j // RUN)
    parity ^= parity >> 8
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    out = tl.where(parity & 1 != 0, -sign, sign)
    if RUN > 1:
        frequency = j % RUN
        angle = (((2 * (i % RUN) + 1) * frequency) % (4 * RUN)).to(tl.float32) * (3.141592653589793 / (2 * RUN))
        out *= tl.cos(angle) * tl.where(frequency == 0, RUN**-0.5, (2 / RUN) ** 0.5)
    return out


@triton.jit
def two_limbs(x, peak):
    """`x`, of magnitude at most `peak`, as ``(128 high + low) * peak / 16256`` with int8 limbs, which come last."""
    inverse = tl.where(peak > 0, 16256.0 / peak, 0.0)
    whole = tl.floor(x * inverse + 0.5).to(tl.int32)
    high = (whole + 64) >> 7
    return tl.join(high.to(tl.int8), (whole - (high << 7)).to(tl.int8))


@triton.jit
def neighbour(k, WIDTH: tl.constexpr):
    """Which channel (keys) or token (values) stands at place `k` along a product of codes.

    A word is looked up in ``8 / WIDTH * ...`` pieces of four codes; places run over the bytes of a piece, four rows of
    words, the pieces of a word, and the other rows.
    """
    PIECES: tl.constexpr = 8 // WIDTH
    byte = k % 4
    piece = k // 16 % PIECES
    row = k // (16 * PIECES) * 4 + k // 4 % 4
    if WIDTH == 8:
        return row * 4 + byte
    nibble = piece % 2 * 4 + byte
    if WIDTH == 4:
        return row * 8 + nibble % 2 * 4 + nibble // 2
    return row * 16 + (nibble % 2 * 2 + piece // 2) * 4 + nibble // 2


@triton.jit
def permute_bytes(low, high, selector, PTX: tl.constexpr):
    """PTX ``prmt``: byte b of the result is byte ``selector >> 4 b & 7`` of ``high:low``, or its sign (bit 3)."""
    if PTX:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    out = tl.zeros_like(selector)
    for byte in tl.static_range(4):
        index = selector >> (4 * byte)
        word = tl.where(index & 4 != 0, high, low)
        value = (word >> ((index & 3) * 8)) & 255
        value = tl.where(index & 8 != 0, -(value >> 7) & 255, value)
        out |= value << (8 * byte)
    return out


@triton.jit
def opaque(table, zero):
    """`table` as a value that the compiler does not know; `zero` is 0, read from memory.

    ptxas would keep a constant in a uniform register, which ``prmt`` cannot read, and move it at each use.
    """
    return zero ^ table


@triton.jit
def _upper(word):
    """The upper half of a word in its lower half, zeros above."""
    return (word.to(tl.uint32, bitcast=True) >> 16).to(tl.int32, bitcast=True)


@triton.jit
def entries(word, high, rows, zero, BITS: tl.constexpr, PTX: tl.constexpr):
    """Entries of packed codes: words of four int8, a tuple of the pieces of each word.

    For 4 bits twice as many: the entries are the sums of those in the two halves of the tuple.

    Args:
        word: int32 words of the first plane.
        high: those of the plane of one bit (5 and 3 bits), of the row that holds the codes of `word`; else anything.
        rows: row of each word; only for 5 and 3 bits.
        zero: see `opaque`.
        BITS: width of a code.
        PTX: whether to use inline assembly.
    """
    if BITS == 8:
        return (word ^ -2139062144,)  # 0x80808080: codes are entries + 128
    elif BITS == 4:
        a = opaque(_FOUR_LOWER[0], zero)
        b = opaque(_FOUR_UPPER[0], zero)
        flipped = word ^ -2004318072  # 0x88888888
        upper = _upper(word)
        upper_flipped = _upper(flipped)
        return (
            permute_bytes(a, _FOUR_LOWER[1], word, PTX),
            permute_bytes(a, _FOUR_LOWER[1], upper, PTX),
            permute_bytes(b, _FOUR_UPPER[1], flipped, PTX),
            permute_bytes(b, _FOUR_UPPER[1], upper_flipped, PTX),
        )
    elif BITS == 5:
        bits = high >> (rows % 4 * 2)
        flipped = word ^ -2004318072
        out = ()
        for piece in tl.static_range(2):
            code = _upper(word) if piece else word
            other = _upper(flipped) if piece else flipped
            negative = permute_bytes(opaque(_FIVE[0], zero), _FIVE[1], code, PTX)
            negative |= permute_bytes(opaque(_FIVE[2], zero), _FIVE[3], other, PTX)
            positive = permute_bytes(opaque(_FIVE[4], zero), _FIVE[5], code, PTX)
            positive |= permute_bytes(opaque(_FIVE[6], zero), _FIVE[7], other, PTX)
            # Signs of bytes 2 piece and 2 piece + 1, of fields 0 and 1
            chosen = tl.full(word.shape, 0xD9C8 + piece * 0x2222, tl.int32)
            upper = permute_bytes(bits << 7, bits << 6, chosen, PTX)
            out = out + ((positive & upper) | ((negative | -2139062144) & ~upper),)
        return out
    else:
        out = ()
        for field in tl.static_range(2):
            code = (word >> (2 * field)) & 0x33333333
            if BITS == 3:
                bits = high >> (rows % 2 * 4 + field)
                code |= ((bits & 0x01010101) << 2) | ((bits & 0x04040404) << 4)
            for piece in tl.static_range(2):
                selector = _upper(code) if piece else code
                if BITS == 3:
                    value = permute_bytes(opaque(_THREE[0], zero), _THREE[1], selector, PTX)
                else:
                    value = permute_bytes(opaque(_TWO[0], zero), _TWO[1], selector, PTX)
                out = out + (value,)
        return out


@triton.jit
def unpack(word):
    """The bytes of words as int8, in a new last dimension of 4."""
    pairs = tl.join(
        tl.join(word.to(tl.int8), (word >> 16).to(tl.int8)), tl.join((word >> 8).to(tl.int8), (word >> 24).to(tl.int8))
    )
    return tl.reshape(pairs, word.shape + [4])


@triton.jit
def gather(words, FROM: tl.constexpr, PIECES: tl.constexpr):
    """Bytes of `PIECES` words of a tuple, int8 ``[..., 4 bytes, pieces]``."""
    if PIECES == 1:
        return tl.expand_dims(unpack(words[FROM]), 7)
    elif PIECES == 2:
        return tl.join(unpack(words[FROM]), unpack(words[FROM + 1]))
    else:
        lower = tl.join(unpack(words[FROM]), unpack(words[FROM + 2]))
        upper = tl.join(unpack(words[FROM + 1]), unpack(words[FROM + 3]))
        joined = tl.join(lower, upper)
        return tl.reshape(joined, unpack(words[FROM]).shape + [4])


@triton.jit
def entry(code, BITS: tl.constexpr):
    """Codebook entries of single codes, int32."""
    if BITS == 8:
        return code - 128
    else:
        HALF: tl.constexpr = 1 << (BITS - 1)
        out = tl.zeros_like(code)
        for i in tl.static_range(1 << (BITS - 1)):
            out = tl.where((code == HALF + i) | (code == HALF - 1 - i), _POSITIVE[BITS][i], out)
        return tl.where(code < HALF, -out, out)
