"""Codec mathematics on plain tensors: codebooks, rotation, fit, encode, decode.

DecoQuant writes a cache matrix as a product of a large, quantised tensor and a small one in high precision (a matrix
product operator with two sites, arXiv 2405.12591). Here the large tensor holds codes times one gain per token and the
small one is ``R^T diag(1/s)``, a rotation and a diagonal balance, next to a mean::

    y = ((x - mu) * s) @ R,    x ~ (gain * u @ R^T) / s + mu,    u = codebook entries of y / radius(y)

The small tensor is frozen once fitted, so that a new token costs one transform and no decomposition, and it folds into
the query and the output of attention: ``q . x = gain * (((q / s) @ R) . u) + q . mu``.

Tensors are ``[..., head_dim]``; the radius is the root mean square of ``y``, or at 8 bits its largest magnitude.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Role = Literal["key", "value"]

LIMIT: Final = 2.0**50
"""Larger magnitudes are saturated before encoding: their squares must stay finite in float32."""

GAIN_MAX: Final = 65504.0
"""Largest float16: gains saturate here. Fitted tokens have a gain near 1."""

_BALANCE_FLOOR: Final = 1e-6  # of the largest channel variance
_IDENTITY_SHARE: Final = 0.2  # mixed into the query weights: the channels that today's queries ignore may matter later
_CONSTANT_FLOOR: Final = 2.0**-16  # variance, relative to the mean's square, below which a channel counts as constant
_COORDINATE_LIMIT: Final = 2.0**24  # beyond what any gain can express; its square is finite

# Lloyd-Max quantisers of a standard normal in units of 1 / _STEPS: the positive half; the other half mirrors it.
# The number of steps is the one that costs least when entries are rounded to int8 (0.6 % of the error at 5 bits, the
# worst case); entries are then exact in every kernel.
_POSITIVE_ENTRIES: Final = {
    2: (36, 120),
    3: (13, 40, 71, 114),
    4: (5, 15, 25, 36, 48, 62, 79, 104),
    5: (2, 6, 10, 14, 18, 22, 26, 31, 36, 41, 47, 53, 60, 69, 80, 97),
}
_STEPS: Final = {2: 79.453, 3: 52.946, 4: 38.146, 5: 29.698, 8: 32.0}
_PLANES: Final = {8: (8,), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}

CODED_BITS: Final = tuple(_PLANES)
"""Widths that are quantised: 8 bits on a uniform grid, the others on a Lloyd-Max codebook."""


def entries(bits: int) -> tuple[int, ...]:
    """Codebook in ascending order as int8 integers; code ``c`` stands for ``entries(bits)[c] / steps(bits)``."""
    if bits == 8:
        return tuple(range(-128, 128))
    positive = _POSITIVE_ENTRIES[bits]
    return (*(-entry for entry in reversed(positive)), *positive)


def steps(bits: int) -> float:
    """Integer codebook steps per unit radius."""
    return _STEPS[bits]


def planes(bits: int) -> tuple[int, ...]:
    """Widths in bits of the planes that hold a code, low bits first (5 = 4 + 1, 3 = 2 + 1)."""
    return _PLANES[bits]


def _table(make: Callable[[int, torch.device], Tensor]) -> Callable[[int, torch.device], Tensor]:
    """Keeps a constant tensor per size and device, but never a fake one made while something is being traced."""
    kept: dict[tuple[int, torch.device], Tensor] = {}

    @functools.wraps(make)
    def get(size: int, device: torch.device) -> Tensor:
        table = kept.get((size, device))
        if table is None:
            with torch.inference_mode(mode=False):
                table = make(size, device)
            if type(table) is Tensor:
                kept[size, device] = table
        return table

    return get


@_table
def _codebook(bits: int, device: torch.device) -> Tensor:
    return torch.tensor(entries(bits), dtype=torch.float32, device=device) / steps(bits)


@_table
def thresholds(bits: int, device: torch.device) -> Tensor:
    """Where the nearest codebook entry changes, in units of the radius: float32 ``[2 ** bits - 1]``, ascending."""
    book = _codebook(bits, device)
    return (book[1:] + book[:-1]) / 2


def lookup(codes: Tensor, bits: int) -> Tensor:
    """Codebook entries of uint8 codes, float32 of the same shape."""
    return F.embedding(codes.int(), _codebook(bits, codes.device)[:, None]).squeeze(-1)


@_table
def signs(head_dim: int, device: torch.device) -> Tensor:
    """Fixed pseudo-random signs; the generator is spelled out because stored caches depend on it."""
    state, values = 1, []
    for _ in range(head_dim):
        state = (1664525 * state + 1013904223) % 2**32  # Numerical Recipes' linear congruential generator
        values.append(1.0 if state >> 31 else -1.0)
    return torch.tensor(values, dtype=torch.float32, device=device)


@_table
def cosines(order: int, device: torch.device) -> Tensor:
    """Orthonormal DCT-II as a matrix ``[sample, frequency]``."""
    sample, frequency = torch.meshgrid(torch.arange(order), torch.arange(order), indexing="ij")
    matrix = torch.cos(math.pi * (2 * sample.double() + 1) * frequency / (2 * order)) * math.sqrt(2 / order)
    matrix[:, 0] = math.sqrt(1 / order)
    return matrix.float().to(device)


def _hadamard(x: Tensor, order: int) -> Tensor:
    """Orthonormal Sylvester-Hadamard transform of the axis before the last.

    A butterfly and not a matrix product: its rounding does not depend on how many tokens are transformed together.
    """
    half = 1
    while half < order:
        pair = x.unflatten(-2, (order // (2 * half), 2, half))
        a, b = pair[..., 0, :, :], pair[..., 1, :, :]
        x = torch.stack((a + b, a - b), -3).flatten(-4, -2)
        half *= 2
    return x * order**-0.5


def rotate(x: Tensor) -> Tensor:
    """Multiplies rows by the fixed orthonormal matrix ``R = diag(signs) (H_p kron Q_m)``.

    ``H_p`` is a Hadamard matrix of the power-of-two part ``p`` of ``head_dim = p * m``, ``Q_m`` the DCT-II of the rest,
    so that every head size has one.

    Args:
        x: float32 ``[..., head_dim]``.
    """
    head_dim = x.shape[-1]
    order = head_dim & -head_dim
    y = _hadamard((x * signs(head_dim, x.device)).unflatten(-1, (order, -1)), order)
    if order < head_dim:
        y = y @ cosines(head_dim // order, x.device)
    return y.flatten(-2)


def unrotate(y: Tensor) -> Tensor:
    """Inverse of `rotate`: multiplies rows by ``R^T``."""
    head_dim = y.shape[-1]
    order = head_dim & -head_dim
    x = y.unflatten(-1, (order, -1))
    if order < head_dim:
        x = x @ cosines(head_dim // order, y.device).T
    return _hadamard(x, order).flatten(-2) * signs(head_dim, y.device)


class Parameters(NamedTuple):
    """The small tensor of a decomposition, besides the fixed rotation."""

    mean: Tensor
    """bfloat16 ``[..., head_dim]``; zero for values."""
    scale: Tensor
    """bfloat16 ``[..., head_dim]``, the channel balance ``s``; positive."""


def fit(mean: Tensor, variance: Tensor, weight: Tensor | None, *, role: Role, bits: int) -> Parameters:
    """Fits mean and balance from channel statistics.

    Keys: ``s_j = (w_j / c_j) ** (1/4)``, ``c`` the channel variance and ``w`` the mean square of the queries: of all
    diagonals this one minimises the expected error of ``q . k`` when the rotation spreads the error evenly. Values at
    2 bits: ``c_j ** (-1/4)``; at more bits a balance brings nothing. Values are not centred. In all cases ``s`` is
    scaled so that the fitted tokens have unit mean square after it.

    Args:
        mean: float32 ``[..., head_dim]``, per channel.
        variance: float32 ``[..., head_dim]``, per channel, about `mean`.
        weight: float32 ``[..., head_dim]``, mean or sum of the squared queries per channel, or None if none were seen;
            rows of zeros count as none.
        role: what the tokens are.
        bits: width of a code.

    Returns:
        Parameters as stored, in bfloat16.
    """
    centre = (mean if role == "key" else torch.zeros_like(mean)).bfloat16()
    # Spread about the rounded mean, which is what the codes will have to express. A channel that was constant so far
    # leaves room for later tokens that differ by as much as its own size.
    spread = (variance + (mean - centre.float()) ** 2).maximum(_CONSTANT_FLOOR * centre.float() ** 2)
    if role == "value" and bits > 2:
        balance = torch.ones_like(spread)
    else:
        tiny = torch.finfo(torch.float32).tiny
        floor = (_BALANCE_FLOOR * spread.amax(-1, keepdim=True)).clamp_min(tiny)
        balance = spread.maximum(floor) ** -0.25
        if weight is not None:
            average = weight.mean(-1, keepdim=True)
            relative = torch.where(average > 0, weight / average.clamp_min(tiny), 1.0)
            balance = balance * ((1 - _IDENTITY_SHARE) * relative + _IDENTITY_SHARE) ** 0.25
    power = (spread * balance**2).mean(-1, keepdim=True)
    scale = torch.where(power > 0, balance * power.rsqrt(), 1.0)
    return Parameters(centre, scale.bfloat16())


def encode(x: Tensor, parameters: Parameters, *, role: Role, bits: int) -> tuple[Tensor, Tensor]:
    """Quantises tokens.

    The gain of keys keeps the inner product unbiased, ``gain = <y, y> / <y, u>``; that of values keeps the norm,
    ``gain = |y| / |u|``.

    Args:
        x: float32 ``[..., head_dim]``, without nan; magnitudes above `LIMIT` saturate.
        parameters: broadcastable to `x`.
        role: what the tokens are.
        bits: width of a code.

    Returns:
        Codes, uint8 ``[..., head_dim]``, and gains, float16 ``[...]`` in ``[0, 65504]``.
    """
    mean, scale = parameters.mean.float(), parameters.scale.float()
    y = rotate((x.clamp(-LIMIT, LIMIT) - mean) * scale).clamp(-_COORDINATE_LIMIT, _COORDINATE_LIMIT)
    power = y.square().sum(-1)
    tiny = torch.finfo(torch.float32).tiny
    if bits == 8:
        # A grid up to the largest magnitude: half the error of a fixed clip, and an outlier is never cut off.
        radius = (y.abs().amax(-1) * (steps(8) / 127)).clamp_min(tiny)
        codes = (y * (steps(8) / radius)[..., None]).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
    else:
        radius = (power / x.shape[-1]).sqrt().clamp_min(tiny)
        codes = torch.bucketize(y / radius[..., None], thresholds(bits, x.device), out_int32=True).to(torch.uint8)
    entry = lookup(codes, bits)
    if role == "key":
        inner = (y * entry).sum(-1)
        gain = torch.where(inner > 0, power / inner.clamp_min(tiny), 0.0)
    else:
        norm = entry.square().sum(-1)
        gain = torch.where(norm > 0, (power / norm.clamp_min(tiny)).sqrt(), 0.0)
    return codes, gain.clamp_max(GAIN_MAX).half()


def decode(entry: Tensor, gain: Tensor, parameters: Parameters) -> Tensor:
    """Reconstructs tokens, float32 ``[..., head_dim]``.

    Args:
        entry: codebook entries as of `lookup`, float32 ``[..., head_dim]``.
        gain: float16 ``[...]``.
        parameters: broadcastable to `entry`.
    """
    return unrotate(entry * gain.float()[..., None]) / parameters.scale.float() + parameters.mean.float()


def error_bound(peak: Tensor, *, head_dim: int, role: Role, bits: int) -> Tensor:
    """Upper bound of ``|gain * u - y| / |y|`` for any token whatever, up to the gain's float16 rounding.

    Let ``z = y / rms(y)``, so ``|z| = sqrt(d)``, and let theta be the angle between ``y`` and ``u``. The gain of keys
    makes the error orthogonal to ``y``: it is ``|y| tan(theta)``. The gain of values keeps the norm: it is
    ``2 |y| sin(theta / 2)``. Two facts bound theta:

    1. ``sin(theta) <= |z - u| / |z|``. Inside the codebook a channel errs by at most half the widest gap; channels
       beyond its outermost entry ``m`` err by ``|z_j| - m <= |z_j| (1 - m / peak)``, and their squares sum to at most
       ``d``. So ``sin(theta)^2 <= half_gap^2 + max(0, 1 - m / peak)^2``. At 8 bits nothing is beyond and the gap is
       ``peak / 127``.
    2. ``cos(theta) >= (e / m) / peak`` with the innermost entry ``e``: signs agree, so ``<z, u> >= e sum |z_j|
       >= e d / peak``, while ``|z| |u| <= d m``. (Not at 8 bits, where the innermost entry is zero.)

    Args:
        peak: float ``[...]``, largest magnitude of ``y`` over its root mean square, in ``[1, sqrt(head_dim)]``.
        head_dim: number of channels.
        role: what the token is.
        bits: width of a code.
    """
    if bits == 8:
        if head_dim >= 254**2:
            raise ValueError(f"error_bound needs head_dim below {254**2} at 8 bits, got {head_dim}")
        sine = peak / 254
        cosine = torch.zeros_like(peak)
    else:
        book = [entry / steps(bits) for entry in entries(bits)]
        half_gap = max(b - a for a, b in itertools.pairwise(book)) / 2
        outermost, innermost = book[-1], book[len(book) // 2]
        sine = (half_gap**2 + (1 - outermost / peak).clamp_min(0) ** 2).sqrt()
        cosine = innermost / outermost / peak
    cosine = cosine.maximum((1 - sine.square()).clamp_min(0).sqrt())
    if role == "key":
        return (1 / cosine.square() - 1).clamp_min(0).sqrt()
    return (2 - 2 * cosine).clamp_min(0).sqrt()
