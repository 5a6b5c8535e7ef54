"""What the kernels share of the codec equals the codec."""

import pytest
import torch
import triton
import triton.language as tl

from decoquant_compile.kernels import codec, tiles
from decoquant_compile.kernels.triton.codec import entries, entry, neighbour, rotation, two_limbs
from decoquant_compile.kernels.triton.encode import column_channels, cosine_table, encode, leaf_order
from tests.kernels.triton.interpret import interpreted


@triton.jit
def _entries(WORDS, HIGH, OUT, BITS: tl.constexpr, PER: tl.constexpr, PTX: tl.constexpr):
    row = tl.arange(0, 64)
    words = entries(tl.load(WORDS + row), tl.load(HIGH + row // PER), row, 0, BITS, PTX)
    for piece in tl.static_range(len(words)):
        tl.store(OUT + row * len(words) + piece, words[piece])


@triton.jit
def _single(CODES, OUT, N: tl.constexpr, BITS: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(OUT + n, entry(tl.load(CODES + n).to(tl.int32), BITS))


@triton.jit
def _rotation(OUT, D: tl.constexpr, P: tl.constexpr):
    i = tl.arange(0, P)[:, None]
    j = tl.arange(0, P)[None, :]
    tl.store(OUT + i * D + j, rotation(i, j, D), mask=(i < D) & (j < D))


@triton.jit
def _limbs(X, OUT, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(X + n)
    limbs = two_limbs(x, tl.broadcast_to(tl.max(tl.abs(x), 0)[None], [N]))
    tl.store(OUT + n[:, None] * 2 + tl.arange(0, 2)[None, :], limbs)


@triton.jit
def _neighbour(OUT, WIDTH: tl.constexpr):
    k = tl.arange(0, 64)
    tl.store(OUT + k, neighbour(k, WIDTH))


@triton.jit
def _encode(
    X,
    MEAN,
    SCALE,
    WEIGHT,
    CODES,
    GAINS,
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
    channel, valid = column_channels(ORDER * RUN_PADDED, RUN, RUN_PADDED)
    n = tl.arange(0, N)[:, None]
    h = tl.arange(0, HEADS)[:, None]
    x = tl.load(X + n * HEAD_DIM + channel, mask=valid, other=0.0)
    mean = tl.load(MEAN + h * HEAD_DIM + channel, mask=valid, other=0.0)
    scale = tl.load(SCALE + h * HEAD_DIM + channel, mask=valid, other=1.0)
    weight = tl.load(WEIGHT + h * HEAD_DIM + channel, mask=valid, other=1.0)
    codes, gains = encode(x, mean, scale, weight, N, HEADS, HEAD_DIM, ORDER, RUN, RUN_PADDED, LEAF, COSINES, KEY, BITS)
    tl.store(CODES + n * HEAD_DIM + channel, codes, mask=valid)
    tl.store(GAINS + tl.arange(0, N), gains)


def places(width):
    out = torch.empty(64, dtype=torch.int32)
    interpreted(_neighbour)[(1,)](out, WIDTH=width)
    return out


@pytest.mark.parametrize("ptx", [False, True])
@pytest.mark.parametrize("bits", codec.CODED_BITS)
def test_entries_of_packed_codes(bits, ptx):
    """Codes of one token in the tiles of keys come back as the entries of its channels."""
    width = codec.planes(bits)[0]
    channels = 64 * 32 // width
    codes = torch.randint(0, 2**bits, (1, 1, channels), dtype=torch.uint8, generator=torch.manual_seed(bits))
    codes[0, 0, : 2**bits] = torch.arange(2**bits)
    shapes = tiles.shapes("key", bits, channels, 64)
    planes = tuple(torch.zeros(1, 1, *shape, dtype=torch.uint8) for shape in shapes)
    at = torch.zeros(1, dtype=torch.int64)
    tiles.write(planes, codes, at, at, role="key", bits=bits)
    words = [plane[0, 0, 0, :, 0].contiguous().view(torch.int32).flatten() for plane in planes]
    halves = 2 if bits == 4 else 1
    pieces = 8 // width
    out = torch.empty(64, halves * pieces, dtype=torch.int32)
    interpreted(_entries)[(1,)](words[0], words[-1], out, BITS=bits, PER=width, PTX=ptx)
    found = out.view(torch.int8).view(64, halves, pieces, 4).int().sum(1)  # [row, piece, byte]
    # 16 rows of words are 64 / pieces places each: four rows, then the pieces
    order = found.view(16, 4, pieces, 4).transpose(1, 2).flatten()
    expected = torch.tensor(codec.entries(bits))[codes[0, 0].long()]
    place = places(width)
    per = 16 * pieces
    channel = torch.cat([place[:per] + block * 4 * (32 // width) for block in range(channels // per)])
    assert torch.equal(order, expected[channel.long()].int())


@pytest.mark.parametrize("width", [2, 4, 8])
def test_places_are_a_permutation_of_a_tile(width):
    assert sorted(places(width).tolist()) == list(range(64))


@pytest.mark.parametrize("bits", codec.CODED_BITS)
def test_entries_of_single_codes(bits):
    codes, out = torch.arange(2**bits, dtype=torch.uint8), torch.empty(2**bits, dtype=torch.int32)
    interpreted(_single)[(1,)](codes, out, N=2**bits, BITS=bits)
    assert out.tolist() == list(codec.entries(bits))


@pytest.mark.parametrize("head_dim", [1, 2, 7, 16, 24, 80, 96, 128, 256])
def test_rotation(head_dim):
    out = torch.empty(head_dim, head_dim)
    interpreted(_rotation)[(1,)](out, D=head_dim, P=triton.next_power_of_2(head_dim))
    torch.testing.assert_close(out, codec.rotate(torch.eye(head_dim)), atol=1e-6, rtol=1e-6)


def test_two_limbs_know_fourteen_bits():
    x = torch.randn(256, generator=torch.manual_seed(0))
    x[:3] = torch.tensor([0.0, 9.0, -9.0])
    out = torch.empty(256, 2, dtype=torch.int8)
    interpreted(_limbs)[(1,)](x, out, N=256)
    back = (out[:, 0].int() * 128 + out[:, 1]).float() * 9 / 16256
    assert float((back - x).abs().max()) <= 9 / 16256 / 2 * 1.001


@pytest.mark.parametrize("head_dim", [1, 7, 24, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", codec.CODED_BITS)
@pytest.mark.parametrize("role", ["key", "value"])
def test_encode(role, bits, head_dim):
    """At a radius other than the one that the codec keeps, hardly any token has the same codes."""
    heads, tokens = 2, 64
    generator = torch.manual_seed(head_dim)
    deviation, energy = 10 ** (3 * torch.rand(2, heads, head_dim, generator=generator))
    x = torch.randn(heads, tokens, head_dim, generator=generator) * deviation[:, None]
    weight = codec.weights(energy) if role == "key" else None
    fitted = codec.fit(x.mean(1), x.var(1), weight, role=role)
    per_token = codec.Parameters(*(each[:, None] for each in fitted))
    expected, gains = codec.encode(x, per_token, None if weight is None else weight[:, None], role=role, bits=bits)
    codes, found = torch.empty(expected.shape, dtype=torch.int32), torch.empty(gains.shape)
    order = head_dim & -head_dim
    run = head_dim // order
    interpreted(_encode)[(1,)](
        x, fitted.mean.float(), fitted.scale.float(), torch.ones_like(energy) if weight is None else weight.float(),
        codes, found, N=heads * tokens, HEADS=heads, HEAD_DIM=head_dim, ORDER=order, RUN=run,
        RUN_PADDED=triton.next_power_of_2(run), LEAF=leaf_order(head_dim), COSINES=cosine_table(run), KEY=role == "key",
        BITS=bits,
    )  # fmt: skip
    same = (codes == expected).all(-1)
    assert int((~same).sum()) <= heads * tokens // 100  # ties that rounding decides
    torch.testing.assert_close(found.half()[same], gains[same], rtol=2**-10, atol=0)
