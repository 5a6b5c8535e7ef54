"""Codec mathematics on plain tensors: codebooks, rotation, fit, encode, decode.

DecoQuant writes a cache matrix as a product of a large, quantised tensor and a small one in high precision (a matrix
product operator with two sites, arXiv 2405.12591). Here the large tensor holds codes times one gain per token and the
small one is ``R^T diag(1/s)``, a rotation and a diagonal balance, next to a mean::

    y = ((x - mu) * s) @ R,    x ~ (gain * u @ R^T) / s + mu,    u = codebook entries near y / radius(y)

Which entries: not the nearest, one channel at a time, but those whose error is small where it matters. With weights
``w`` on the channels of ``x`` the error ``e`` of ``y`` costs ``e M e^T``, ``M = R^T diag(w / s^2) R``: errors of later
channels can undo those of earlier ones (noise shaping). This is what lets the balance ``s`` whiten the tokens, so that
the rotation spreads them evenly over the codebook, and still leave small errors where they matter (issue 5).

The small tensor is frozen once fitted, so that a new token costs one transform and no decomposition, and it folds into
the query and the output of attention: ``q . x = gain * (((q / s) @ R) . u) + q . mu``.

Tensors are ``[..., head_dim]``; the radius is about the root mean square of ``y``, or at 8 bits its largest magnitude.
"""

import functools
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

BALANCE_FLOOR: Final = 1e-6  # of the largest channel variance
IDENTITY_SHARE: Final = 0.02  # mixed into the query weights: the channels that today's queries ignore may matter later
CONSTANT_FLOOR: Final = 2.0**-16  # variance, relative to the mean's square, below which a channel counts as constant
COORDINATE_LIMIT: Final = 2.0**24  # beyond what any gain can express; its square is finite
LEAST_COSINE: Final = 0.5**0.5  # a gain that keeps the product with entries further off than 45 degrees would explode

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
# Shaping adds the errors of other channels to a channel before it is rounded: the codebook is spread as much.
_SPREAD: Final = {2: 1.16, 3: 1.08, 4: 1.03, 5: 1.01, 8: 1.0}
_DETOUR: Final = 0.12  # of the spread: how far the radii tried lie from it at most
_TRIED: Final = 8
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


def radii(bits: int) -> tuple[float, ...]:
    """Radii at which a token is encoded, per root mean square, or at 8 bits per 32/127 of its largest magnitude."""
    if bits == 8:
        return (_SPREAD[8],)
    return tuple(_SPREAD[bits] * (1 + _DETOUR * (2 * i / (_TRIED - 1) - 1)) for i in range(_TRIED))


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


@_table
def radii_table(bits: int, device: torch.device) -> Tensor:
    """`radii` as float32."""
    return torch.tensor(radii(bits), dtype=torch.float32, device=device)


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


def _butterflies(x: Tensor, order: int) -> Tensor:
    """Unnormalised Sylvester-Hadamard transform of the axis before the last, of size `order`.

    A butterfly and not a matrix product: its rounding does not depend on how many tokens are transformed together.
    """
    half = 1
    while half < order:
        pair = x.unflatten(-2, (order // (2 * half), 2, half))
        a, b = pair[..., 0, :, :], pair[..., 1, :, :]
        x = torch.stack((a + b, a - b), -3).flatten(-4, -2)
        half *= 2
    return x


def _hadamard(x: Tensor, order: int) -> Tensor:
    """Orthonormal Sylvester-Hadamard transform of the axis before the last, of size `order`."""
    return _butterflies(x, order) * order**-0.5


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


def weights(energy: Tensor) -> Tensor:
    """What an error in each channel of the keys costs: the mean square of the queries there, mean 1.

    Mixed with the same weight for all channels; rows of zeros (no queries seen) weigh all channels alike.

    Args:
        energy: float32 ``[..., head_dim]``, mean or sum of the squared queries per channel.

    Returns:
        bfloat16 ``[..., head_dim]``, positive.
    """
    average = energy.mean(-1, keepdim=True)
    relative = torch.where(average > 0, energy / average.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    return ((1 - IDENTITY_SHARE) * relative + IDENTITY_SHARE).bfloat16()


def fit(mean: Tensor, variance: Tensor, weight: Tensor | None, *, role: Role) -> Parameters:
    """Fits mean and balance from channel statistics.

    With ``c`` the channel variance and ``w`` the weights, keys take ``s_j = w_j ** (1/8) * c_j ** (-3/8)``. Were
    entries simply the nearest ones, ``(w_j / c_j) ** (1/4)`` would be the best diagonal; were the shaping of their
    error ideal, ``c_j ** (-1/2)``: keys are best served half way, values by the latter (measured; issue 5). Values are
    not centred. In all cases ``s`` is scaled so that the fitted tokens have unit mean square after it.

    Args:
        mean: float32 ``[..., head_dim]``, per channel.
        variance: float32 ``[..., head_dim]``, per channel, about `mean`.
        weight: as of `weights`, or None if all channels weigh the same. For keys only.
        role: what the tokens are.

    Returns:
        Parameters as stored, in bfloat16.
    """
    centre = (mean if role == "key" else torch.zeros_like(mean)).bfloat16()
    # Spread about the rounded mean, which is what the codes will have to express. A channel that was constant so far
    # leaves room for later tokens that differ by as much as its own size.
    spread = (variance + (mean - centre.float()) ** 2).maximum(CONSTANT_FLOOR * centre.float() ** 2)
    floor = (BALANCE_FLOOR * spread.amax(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    if role == "value":
        balance = spread.maximum(floor).rsqrt()
    else:
        balance = spread.maximum(floor) ** -0.375
        if weight is not None:
            balance = balance * weight.float() ** 0.125
    power = (spread * balance**2).mean(-1, keepdim=True)
    scale = torch.where(power > 0, balance * power.rsqrt(), 1.0)
    return Parameters(centre, scale.bfloat16())


def cost(scale: Tensor, weight: Tensor | None) -> Tensor:
    """What an error costs in each channel before the rotation: ``w / s^2`` up to a factor, float32, at most ``w``.

    Args:
        scale: balance, ``[..., head_dim]``.
        weight: as of `weights`, or None if all channels weigh the same.
    """
    scale = scale.float()
    relative = (scale.amin(-1, keepdim=True) / scale).square()
    return relative if weight is None else relative * weight.float()


def leaf(head_dim: int) -> int:
    """Channels that shaping rounds at once at most: with fewer it brings nothing measurable, and takes longer."""
    return min(max(head_dim // 8, 8), 16)


def _nearest(y: Tensor, radius: Tensor, bits: int) -> Tensor:
    """Codes of the nearest entries, uint8; `radius` broadcasts to `y`."""
    if bits == 8:
        scaled = (y * (steps(8) / radius)).nan_to_num_(0.0)  # zero times the infinity of a radius too small
        return scaled.round_().clamp_(-127, 127).add_(128).to(torch.uint8)
    return torch.bucketize((y / radius).contiguous(), thresholds(bits, y.device), out_int32=True).to(torch.uint8)


def _shape(x: Tensor, price: Tensor, radius: Tensor, bits: int, smallest: int) -> tuple[Tensor, Tensor]:
    """Codes whose error is small in the metric of `price`: successive cancellation, as decoders of polar codes do it.

    What is rounded is ``y = (H kron Q^T) x``, with ``H`` not normalised. Its halves are the transforms of the sum and
    of the difference of the halves of `x`, whose prices are ``p`` and ``q``. The sum is rounded first, at what an error
    in it costs when the difference does its best: the harmonic mean of p and q. An error of the sum moves the best
    place of the difference by ``(p - q) / (p + q)`` times as much; there the difference is rounded, at the price
    ``(p + q) / 2``. Without rounding to leaves this is the exact ``L D L^T`` decomposition of M.

    Args:
        x: ``[..., order, run]``, tokens as `rotate` transforms them, signs included: `order` is a power of two, `run`
            the odd rest of the head size.
        price: ``[..., order, run]``, positive.
        radius: ``[..., 1, 1]``, of ``y``; all three broadcast.
        bits: width of a code.
        smallest: see `leaf`.

    Returns:
        Codes of y, uint8 ``[..., order, run]``, and the x that they stand for.
    """
    order, run = x.shape[-2:]
    if order == 1 or order * run <= smallest:
        matrix = cosines(run, x.device)
        codes = _nearest(_butterflies(x, order) @ matrix if run > 1 else _butterflies(x, order), radius, bits)
        y = lookup(codes, bits) * radius
        return codes, _butterflies(y @ matrix.T if run > 1 else y, order) / order
    half = order // 2
    a, b, p, q = x[..., :half, :], x[..., half:, :], price[..., :half, :], price[..., half:, :]
    total = p + q
    wanted = a + b
    codes_of_sum, reached = _shape(wanted, 2 * p * q / total, radius, bits, smallest)
    moved = a - b + (wanted - reached) * ((p - q) / total)
    codes_of_difference, difference = _shape(moved, total / 2, radius, bits, smallest)
    x = torch.cat((reached + difference, reached - difference), -2) / 2
    return torch.cat((codes_of_sum, codes_of_difference), -2), x


def encode(x: Tensor, parameters: Parameters, weight: Tensor | None, *, role: Role, bits: int) -> tuple[Tensor, Tensor]:
    """Quantises tokens.

    A token is encoded at each of the `radii`, and the codes of least error at theirs are kept: shaping is greedy, and
    each radius sends it another way (a fifth less squared error; issue 5).

    Errors and gains are in the metric of `cost`, where ``<a, b> = sum_j cost_j a_j b_j`` before the rotation. The gain
    of keys keeps the inner product unbiased, ``gain = <y, y> / <y, u>``, that of values keeps the norm, ``gain = |y| /
    |u|``. Entries that point elsewhere (more than 45 degrees off, a token unlike all that was fitted) get the gain of
    least error: no token is ever wrong by more than its own distance from the mean, in that metric.

    Args:
        x: float32 ``[..., head_dim]``, without nan; magnitudes above `LIMIT` saturate.
        parameters: broadcastable to `x`.
        weight: as of `weights`, broadcastable to `x`, or None if all channels weigh the same.
        role: what the tokens are.
        bits: width of a code.

    Returns:
        Codes, uint8 ``[..., head_dim]``, and gains, float16 ``[...]`` in ``[0, 65504]``.
    """
    mean, scale = parameters.mean.float(), parameters.scale.float()
    head_dim = x.shape[-1]
    order = head_dim & -head_dim
    tiny = torch.finfo(torch.float32).tiny
    balanced = ((x.clamp(-LIMIT, LIMIT) - mean) * scale).clamp(-COORDINATE_LIMIT, COORDINATE_LIMIT)
    # At 8 bits a grid up to the largest magnitude: half the error of a fixed clip, and an outlier is never cut off.
    size = rotate(balanced).abs().amax(-1) * (steps(8) / 127) if bits == 8 else balanced.square().mean(-1).sqrt()
    # From here on [..., radii, order, run].
    radius = (size[..., None] * radii_table(bits, x.device)).clamp_min(tiny)[..., None, None]
    wanted = (balanced * signs(head_dim, x.device))[..., None, :].unflatten(-1, (order, -1))
    price = cost(scale, weight)[..., None, :].unflatten(-1, (order, -1))
    codes, reached = _shape(wanted, price, radius * order**0.5, bits, leaf(head_dim))
    left = wanted - reached
    error, cross, norm = (
        ((a * b) * price).sum((-2, -1)) for a, b in ((left, left), (left, reached), (reached, reached))
    )
    best = error.argmin(-1, keepdim=True)
    codes = codes.flatten(-2).take_along_dim(best[..., None], -2).squeeze(-2)
    cross, norm, radius = (each.take_along_dim(best, -1).squeeze(-1) for each in (cross, norm, radius[..., 0, 0]))
    power = (wanted * wanted * price).sum((-3, -2, -1))
    inner = cross + norm
    closest = inner / norm.clamp_min(tiny)
    unbiased = power / inner.clamp_min(tiny) if role == "key" else (power / norm.clamp_min(tiny)).sqrt()
    gain = torch.where(inner * closest >= LEAST_COSINE**2 * power, unbiased, closest) * radius
    return codes, torch.where(inner > 0, gain, 0.0).clamp_max(GAIN_MAX).half()


def decode(entry: Tensor, gain: Tensor, parameters: Parameters) -> Tensor:
    """Reconstructs tokens, float32 ``[..., head_dim]``.

    Args:
        entry: codebook entries as of `lookup`, float32 ``[..., head_dim]``.
        gain: float16 ``[...]``.
        parameters: broadcastable to `entry`.
    """
    return unrotate(entry * gain.float()[..., None]) / parameters.scale.float() + parameters.mean.float()
