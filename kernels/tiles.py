"""Where codes lie: bit planes in tiles that a vector unit reads without shuffling.

A code of several bits is split over planes (5 = 4 + 1, 3 = 2 + 1). In a plane of ``width`` bits four neighbours,
channels of keys or tokens of values, share the four bytes of a 32-bit lane, one byte each; byte lane ``h`` (bits
``h * width`` and up) holds the ``h``-th such group. Sixteen lanes, tokens of keys or channels of values, make a row of
64 bytes. So a dot product over channels (keys) or tokens (values) runs down the rows, for sixteen tokens or channels
at once::

    keys    [batch, heads, tokens / 16, channels * width / 32, 16 tokens, 4]
            channel = row * (32 / width) + 4 h + j
    values  [batch, heads, tokens / 64, channels / 16, 2 * width, 16 channels, 4]
            token of the tile = row * (32 / width) + 4 h + j
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from decoquant_compile.kernels import codec
from decoquant_compile.kernels.codec import Role

TILE: Final = 64
"""Slots are padded to this many."""

LANES: Final = 16
QUAD: Final = 4


def capacity(slots: int) -> int:
    """Slots in whole tiles."""
    return -(-slots // TILE) * TILE


def padded(role: Role, bits: int, head_dim: int) -> int:
    """Channels in the planes: whole rows of keys in every plane, whole chunks of values."""
    multiple = max(32 // width for width in codec.planes(bits)) if role == "key" else LANES
    multiple = max(multiple, LANES)
    return -(-head_dim // multiple) * multiple


def shapes(role: Role, bits: int, head_dim: int, slots: int) -> tuple[tuple[int, ...], ...]:
    """Shape of each plane after ``[batch, heads]``."""
    channels, tokens = padded(role, bits, head_dim), capacity(slots)
    if role == "key":
        return tuple((tokens // LANES, channels * width // 32, LANES, QUAD) for width in codec.planes(bits))
    return tuple((tokens // TILE, channels // LANES, 2 * width, LANES, QUAD) for width in codec.planes(bits))


def write(planes: tuple[Tensor, ...], codes: Tensor, row: Tensor, slot: Tensor, *, role: Role, bits: int) -> None:
    """Writes codes of single tokens.

    Args:
        planes: uint8 ``[batch, heads, *shape]``, modified.
        codes: uint8 ``[n, heads, head_dim]``.
        row: int64 ``[n]``, batch row of each.
        slot: int64 ``[n]``, slot of each; no pair of row and slot occurs twice.
        role: what the tokens are.
        bits: width of a code.
    """
    codes = F.pad(codes, (0, padded(role, bits, codes.shape[-1]) - codes.shape[-1]))
    offset = 0
    for plane, width in zip(planes, codec.planes(bits), strict=True):
        lanes = 8 // width
        part = (codes >> offset) & (2**width - 1)
        offset += width
        if role == "key":
            groups = part.unflatten(-1, (-1, lanes, QUAD))
            packed = groups[..., 0, :]
            for lane in range(1, lanes):
                packed = packed | (groups[..., lane, :] << (lane * width))
            plane[row, :, slot // LANES, :, slot % LANES] = packed
            continue
        group, byte = slot % TILE // QUAD, slot % QUAD
        for lane in range(lanes):  # tokens of one lane never share a byte
            n = (group % lanes == lane).nonzero().flatten()
            at = row[n], slice(None), slot[n] // TILE, slice(None), group[n] // lanes, slice(None), byte[n]
            kept = plane[at] & (255 - ((2**width - 1) << (lane * width)))
            plane[at] = kept | (part[n].unflatten(-1, (-1, LANES)) << (lane * width))


def read(planes: tuple[Tensor, ...], slots: slice, *, role: Role, bits: int, head_dim: int) -> Tensor:
    """Codes of a run of slots, uint8 ``[batch, heads, n, head_dim]``."""
    codes: Tensor | None = None
    offset = 0
    tile = LANES if role == "key" else TILE
    first = slots.start // tile
    for plane, width in zip(planes, codec.planes(bits), strict=True):
        rows = plane[:, :, first : -(-slots.stop // tile)]
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
        part = (rows[..., None] >> shifts) & (2**width - 1)  # [batch, heads, tiles, ..., 16, 4, lanes]
        part = part.permute((0, 1, 2, 4, 3, 6, 5) if role == "key" else (0, 1, 2, 4, 7, 6, 3, 5))
        part = part.flatten(4).flatten(2, 3) if role == "key" else part.flatten(6).flatten(2, 5)
        codes = part << offset if codes is None else codes | (part << offset)
        offset += width
    assert codes is not None
    begin = slots.start - first * tile
    return codes[:, :, begin : begin + slots.stop - slots.start, :head_dim]
