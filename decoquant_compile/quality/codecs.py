"""Codecs of rivals as pure functions: what their stored form decodes to, and the bits that it takes.

All of them are fake-quantised: tokens are quantised and reconstructed in float32, nothing is packed. Numbers that the
method stores in 16 bits (scales, zero points, small tensors) are rounded to float16.

Tensors are ``[batch, heads, tokens, head_dim]``.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from decoquant_compile.kernels.codec import rotate, unrotate

_TINY: Final = 1e-8
"""Smallest scale: one that float16 still holds where it matters, and that a group of zeros can be divided by."""

SCALE: Final = 16
"""Bits of a scale, of a zero point, of an element of a small tensor."""


class Codec(Protocol):
    """How one side (keys or values) of one layer is stored."""

    @property
    def block(self) -> int:
        """Tokens that are stored together; a token is quantised when its block is complete."""

    def store(self, x: Tensor, prompt: int) -> Tensor:
        """What the stored tokens decode to.

        Args:
            x: float32 ``[batch, heads, tokens, head_dim]``; its number of tokens is a multiple of `block`.
            prompt: number of leading tokens that a method may be fitted to.
        """

    def nbits(self, tokens: float, heads: int, head_dim: int) -> float:
        """Bits that this many stored tokens take, all overhead counted."""


def half(x: Tensor) -> Tensor:
    """Rounded to float16, finite."""
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).half().to(x.dtype)


def _scale(x: Tensor) -> Tensor:
    """A stored scale; groups whose scale underflows decode to (nearly) zero."""
    return half(x).clamp_min(_TINY)


def symmetric(x: Tensor, bits: int) -> Tensor:
    """Round to nearest on ``2 ** bits - 1`` levels around zero, one absmax scale for each row."""
    limit = 2 ** (bits - 1) - 1
    scale = _scale(x.abs().amax(-1, keepdim=True) / limit)
    return (x / scale).round().clamp(-limit, limit) * scale


def asymmetric(x: Tensor, bits: int) -> Tensor:
    """Round to nearest on ``2 ** bits`` levels from the least to the largest of each row."""
    least = half(x.amin(-1, keepdim=True))
    scale = _scale((x.amax(-1, keepdim=True) - least) / (2**bits - 1))
    return ((x - least) / scale).round().clamp(0, 2**bits - 1) * scale + least


def llama_cpp(x: Tensor, bits: int) -> Tensor:
    """The legacy blocks of llama.cpp (``q4_0``, ``q8_0``), one scale for each row.

    8 bits: the symmetric grid. Fewer: the entry of largest magnitude, with its sign, stands on the grid's lower end
    ``-2 ** (bits - 1)``; codes are rounded with the unrounded scale.
    """
    if bits == 8:
        return symmetric(x, 8)
    half_grid = 2 ** (bits - 1)
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scale = peak / -half_grid
    codes = torch.where(scale != 0, x / torch.where(scale != 0, scale, 1), 0.0)
    return ((codes + half_grid + 0.5).floor().clamp(0, 2 * half_grid - 1) - half_grid) * half(scale)


def half_quadratic(x: Tensor, bits: int, *, steps: int = 20) -> Tensor:
    """HQQ (Badri and Shaji, 2023): the asymmetric grid with zero points found by half-quadratic splitting.

    Its published defaults: ``lp = 0.7``, ``beta = 10``, ``kappa = 1.01``, 20 steps at most, stopped when the mean error
    stops falling.
    """
    levels = 2**bits - 1
    least = x.amin(-1, keepdim=True)
    inverse = (levels / (x.amax(-1, keepdim=True) - least).clamp_min(_TINY)).clamp_max(2e4)
    zero = (-least * inverse).clamp(-6e4, 6e4)
    best, lowest, beta = zero, math.inf, 10.0
    for _ in range(steps):
        codes = (x * inverse + zero).round().clamp(0, levels)
        error = x - (codes - zero) / inverse
        mean = error.abs().mean().item()
        if mean >= lowest:
            break
        best, lowest = zero, mean
        shrunk = error.sign() * (error.abs() - error.abs().clamp_min(_TINY).pow(-0.3) / beta).relu()
        zero = (codes - (x - shrunk) * inverse).mean(-1, keepdim=True)
        beta *= 1.01
    scale, zero = _scale(1 / inverse), half(best)
    return ((x / scale + zero).round().clamp(0, levels) - zero) * scale


@functools.cache
def lloyd_max(bits: int) -> tuple[Tensor, Tensor]:
    """Lloyd-Max quantiser of a standard normal with ``2 ** bits`` levels.

    Returns:
        Entries, ascending, and the thresholds between them; float32.
    """
    levels = 2**bits
    entries = torch.special.ndtri((torch.arange(levels, dtype=torch.float64) + 0.5) / levels)
    edge = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(100_000):
        borders = torch.cat([-edge, (entries[1:] + entries[:-1]) / 2, edge])
        density = torch.exp(-borders.square() / 2) / math.sqrt(2 * math.pi)
        share = torch.special.ndtr(borders).diff()
        moved = -density.diff() / share
        shift = (moved - entries).abs().max()
        entries = moved
        if shift < 1e-9:
            break
    return entries.float(), ((entries[1:] + entries[:-1]) / 2).float()


def normalised_lloyd_max(x: Tensor, bits: int) -> Tensor:
    """Rows divided by their root mean square, each entry on the Lloyd-Max codebook of a standard normal."""
    entries, thresholds = lloyd_max(bits)
    radius = _scale(x.square().mean(-1, keepdim=True).sqrt())
    return entries.to(x.device)[torch.bucketize(x / radius, thresholds.to(x.device))] * radius


class Rounding(Protocol):
    """A scalar quantiser of rows, ``[..., group]``."""

    def __call__(self, x: Tensor, bits: int, /) -> Tensor:
        """Reconstruct the rows."""


@dataclass(frozen=True)
class Grouped:
    """Groups of neighbouring channels of one token.

    Attributes:
        rounding: of a group.
        bits: of a code.
        group: channels of a group, at most all of a head; None for all channels of all heads of a token.
        overhead: bits stored beside the codes of a group.
        rotated: whether each head is rotated first, by signs and a Hadamard matrix.
    """

    rounding: Rounding
    bits: int
    group: int | None
    overhead: int
    rotated: bool = False

    @property
    def block(self) -> int:
        """Each token by itself."""
        return 1

    def store(self, x: Tensor, prompt: int) -> Tensor:  # noqa: ARG002 - nothing is fitted
        """See `Codec`."""
        y = rotate(x) if self.rotated else x
        if self.group is None:
            rows = y.transpose(1, 2).flatten(2)
            z = self.rounding(rows, self.bits).unflatten(2, (x.shape[1], -1)).transpose(1, 2)
        else:
            z = self.rounding(y.unflatten(-1, (-1, self._width(x.shape[-1]))), self.bits).flatten(-2)
        return unrotate(z) if self.rotated else z

    def nbits(self, tokens: float, heads: int, head_dim: int) -> float:
        """See `Codec`."""
        groups = 1 if self.group is None else heads * head_dim // self._width(head_dim)
        return tokens * (heads * head_dim * self.bits + groups * self.overhead)

    def _width(self, head_dim: int) -> int:
        assert self.group is not None
        width = min(self.group, head_dim)
        if head_dim % width:
            raise ValueError(f"groups of {self.group} channels do not divide a head of {head_dim}")
        return width


@dataclass(frozen=True)
class PerChannel:
    """Groups of consecutive tokens of one channel, on the asymmetric grid (the keys of KIVI).

    Attributes:
        bits: of a code.
        group: tokens of a group.
    """

    bits: int
    group: int

    @property
    def block(self) -> int:
        """A group of tokens."""
        return self.group

    def store(self, x: Tensor, prompt: int) -> Tensor:  # noqa: ARG002 - nothing is fitted
        """See `Codec`."""
        rows = x.unflatten(2, (-1, self.group)).transpose(-1, -2)
        return asymmetric(rows, self.bits).transpose(-1, -2).flatten(2, 3)

    def nbits(self, tokens: float, heads: int, head_dim: int) -> float:
        """See `Codec`."""
        return tokens * heads * head_dim * (self.bits + 2 * SCALE / self.group)


@dataclass(frozen=True)
class Factors:
    """DecoQuant as published (arXiv 2405.12591), in the form of its cache experiments.

    The cache of all heads, ``[tokens, channels]``, is decomposed into a matrix product operator at full rank with the
    singular values split evenly at each bond. The largest local tensor has all tokens and is quantised, with one
    symmetric absmax scale for each token; the others stay in 16 bits. With n = 2, the operator of the authors' code
    (``[tokens, 1] x [channels / 16, 16]``), the small tensor works on 16 neighbouring channels. The paper gives no
    shapes for more; here further small tensors stand before the large one and work on channels far apart, 4 each.

    In canonical form the bonds are independent: each small tensor is ``U sqrt(S)`` of its own unfolding. They are
    fitted to the prompt and frozen, so that a later token costs a product; the paper decomposes anew every 1,000.

    Attributes:
        bits: of a code.
        before: channels of the small tensors before the large one.
        after: channels of the small tensor behind it.
    """

    bits: int
    before: tuple[int, ...] = ()
    after: int = 16

    @property
    def block(self) -> int:
        """Each token by itself."""
        return 1

    def store(self, x: Tensor, prompt: int) -> Tensor:
        """See `Codec`."""
        channels = x.shape[1] * x.shape[3]
        left = math.prod(self.before)
        self._check(channels)
        folded = x.transpose(1, 2).reshape(len(x), x.shape[2], left, channels // (left * self.after), self.after)
        fitted = folded[:, :prompt].double()
        # Gram matrices of the unfoldings at the bonds to the left and to the right of the large tensor
        outer = [small_tensor(torch.einsum("btimj,btkmj->bik", fitted, fitted))] if left > 1 else []
        inner = small_tensor(torch.einsum("btimj,btimk->bjk", fitted, fitted))
        large = self._apply(folded, [f[1] for f in outer], inner[1])
        rounded = symmetric(large.flatten(2), self.bits).view_as(large)
        out = self._apply(rounded, [f[0] for f in outer], inner[0])
        return out.reshape(len(x), x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

    @staticmethod
    def _apply(x: Tensor, outer: Sequence[Tensor], inner: Tensor) -> Tensor:
        for matrix in outer:
            x = torch.einsum("bki,btimj->btkmj", matrix, x)
        return torch.einsum("bkj,btimj->btimk", inner, x)

    def _check(self, channels: int) -> None:
        width = math.prod(self.before) * self.after
        if channels % width:
            raise ValueError(f"the factors of {width} channels do not divide the {channels} of all heads")

    def nbits(self, tokens: float, heads: int, head_dim: int) -> float:
        """See `Codec`."""
        self._check(heads * head_dim)
        small, bond = self.after**2, 1
        for size in self.before:  # the tensors [bond, size, bond * size] of a chain at full rank
            small += bond * size * bond * size
            bond *= size
        return tokens * (heads * head_dim * self.bits + SCALE) + SCALE * small


def small_tensor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The small tensor ``U sqrt(S)`` of an unfolding ``U S V`` from its Gram matrix, and its inverse.

    Args:
        gram: float64 ``[batch, n, n]``.

    Returns:
        Both float32 ``[batch, n, n]``, the first rounded to float16; singular values are taken as at least 1e-6 of the
        largest, so that the inverse exists.
    """
    power, basis = torch.linalg.eigh(gram)
    largest = power.amax(-1, keepdim=True)
    power = torch.where(largest > 0, power.maximum(1e-12 * largest), 1.0)
    # Only the shape matters: a common factor goes into the scales of the tokens
    root = (power / power.mean(-1, keepdim=True)) ** 0.25
    small = half(basis * root[:, None, :])
    return small.float(), torch.linalg.inv(small).float()


@dataclass(frozen=True)
class VarianceNormalised:
    """Like KVarN (arXiv 2606.03458): Hadamard rotation, then both axes of a tile of tokens are normalised.

    In turns the channels and the tokens of a tile are divided by their standard deviation, 16 times. Keys are then
    quantised along each channel of the tile, values along each token, both on the asymmetric grid, into whose scales
    and offsets the factors along the same axis go; those of the other axis are kept beside it in 16 bits. Approximated
    from the published descriptions: their bounds on the factors and their pool of outliers are left out.

    Attributes:
        bits: of a code.
        along: "channel": one grid for each channel of a tile; "token": one for each token.
        tile: tokens of a tile.
    """

    bits: int
    along: str
    tile: int = 128

    @property
    def block(self) -> int:
        """A tile."""
        return self.tile

    def store(self, x: Tensor, prompt: int) -> Tensor:  # noqa: ARG002 - nothing is fitted
        """See `Codec`."""
        tiles = rotate(x).unflatten(2, (-1, self.tile))
        if self.along == "channel":
            factors = self._factors(tiles, -1)
            rounded = asymmetric((tiles / factors).transpose(-1, -2), self.bits).transpose(-1, -2)
        else:
            factors = self._factors(tiles, -2)
            rounded = asymmetric(tiles / factors, self.bits)
        return unrotate((rounded * factors).flatten(2, 3))

    @staticmethod
    def _factors(tiles: Tensor, over: int) -> Tensor:
        """Standard deviations over one axis that normalise both, together with those over the other."""
        normal, factors = tiles, torch.ones(())
        for _ in range(16):
            normal = normal / _deviation(normal, -3 - over)
            deviation = _deviation(normal, over)
            normal, factors = normal / deviation, factors * deviation
        return _scale((factors.log() - factors.log().mean((-2, -1), keepdim=True)).exp())

    def nbits(self, tokens: float, heads: int, head_dim: int) -> float:
        """See `Codec`."""
        grids, factors = (head_dim, self.tile) if self.along == "channel" else (self.tile, head_dim)
        return tokens * heads * (head_dim * self.bits + SCALE * (2 * grids + factors) / self.tile)


def _deviation(x: Tensor, over: int) -> Tensor:
    """Standard deviation over an axis, 1 where there is none."""
    found = x.std(over, keepdim=True)
    return torch.where(found > _TINY, found, 1.0)
