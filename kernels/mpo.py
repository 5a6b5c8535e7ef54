"""Matrix product operators (arXiv 2405.12591, equations 1 to 3), on plain tensors.

A matrix ``[I, J]`` with ``I = i_1 ... i_n`` and ``J = j_1 ... j_n`` is written as a product of `n` local tensors
``T_k [d_(k-1), i_k, j_k, d_k]``, without loss: every bond has its full rank. The tensor with most elements (T_L) is
quantised, the others (T_S) keep their precision.

The product does not change when a matrix is moved from one tensor to its neighbour. As in the authors' code the split
is balanced: across each bond `k` with singular values ``S_k``, the tensors to the left form a matrix ``L`` and those to
the right a matrix ``R`` with ``L^T L = S_k = R R^T``. For two sites that is ``T_L = U sqrt(S)``, ``T_S = sqrt(S) V^T``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Shape = Sequence[tuple[int, int]]
"""``(i_k, j_k)`` of each site."""


def cache_shape(tokens: int, channels: int, groups: Sequence[int] = (16,)) -> list[tuple[int, int]]:
    """Shape of a cache matrix ``[tokens, channels]`` whose large tensor comes first.

    ``groups=(16,)`` is the published one, MPO([tokens, 1], [channels / 16, 16]): one transform of 16 adjacent channels.
    None was published for more sites; here each takes a further factor of the channels.

    Args:
        tokens: rows.
        channels: columns, of all heads together.
        groups: channels at each of the small sites.

    Raises:
        ValueError: the product of `groups` does not divide `channels`.
    """
    group = math.prod(groups)
    if group < 1 or channels % group:
        raise ValueError(f"groups {tuple(groups)} must be positive and their product divide the {channels} channels")
    return [(tokens, channels // group), *((1, width) for width in groups)]


def decompose(matrix: Tensor, shape: Shape) -> list[Tensor]:
    """Local tensors of a matrix, with balanced bonds of full rank.

    Args:
        matrix: floating ``[..., I, J]``, finite; leading dimensions are a batch. Computed in float64.
        shape: ``(i_k, j_k)`` of each site, with product ``(I, J)``.

    Returns:
        For each site a tensor ``[..., d_(k-1), i_k, j_k, d_k]`` in the dtype of `matrix`; ``d_0 = d_n = 1``.

    Raises:
        ValueError: a shape that does not multiply to that of the matrix, or a value that is not finite.
    """
    _check(matrix, shape)
    n, batch = len(shape), matrix.shape[:-2]
    rows, columns = zip(*shape, strict=True)
    lead = len(batch)
    pairs = [lead + axis for site in range(n) for axis in (site, n + site)]
    rest = matrix.double().reshape(*batch, *rows, *columns).permute(*range(lead), *pairs)  # i_1, j_1, i_2, j_2, ...
    # `rest` holds the sites still to come, the left bond's singular values included: those to its left are orthonormal.
    undo = torch.ones(*batch, 1, dtype=torch.float64, device=matrix.device)  # 1 / sqrt(S) of the left bond
    tensors = []
    for i, j in shape[:-1]:
        left = undo.shape[-1]
        u, values, v = torch.linalg.svd(rest.reshape(*batch, left * i * j, -1), full_matrices=False)
        root = values.sqrt()
        tensors.append(undo[..., None, None, None] * (u * root[..., None, :]).unflatten(-2, (left, i, j)))
        rest = values[..., None] * v
        # What belongs to a vanishing singular value is zero on both sides of the bond, not nan.
        alive = values > torch.finfo(torch.float64).eps * values[..., :1]
        undo = torch.where(alive, root, torch.inf).reciprocal()
    tensors.append(undo[..., None, None, None] * rest.reshape(*batch, undo.shape[-1], *shape[-1], 1))
    return [tensor.to(matrix.dtype) for tensor in tensors]


def reconstruct(tensors: Sequence[Tensor]) -> Tensor:
    """The matrix ``[..., I, J]`` of local tensors ``[..., d_(k-1), i_k, j_k, d_k]``: the inverse of `decompose`.

    Raises:
        ValueError: no tensor, or bonds that do not fit.
    """
    ends = [1, *(tensor.shape[-1] for tensor in tensors)]
    begins = [*(tensor.shape[-4] if tensor.dim() >= 4 else 0 for tensor in tensors), 1]
    if not tensors or ends != begins:
        raise ValueError(
            "expected local tensors [..., d_(k-1), i_k, j_k, d_k] whose bonds d fit, 1 at both ends, "
            f"got shapes {[tuple(tensor.shape) for tensor in tensors]}"
        )
    product = tensors[0].squeeze(-4)
    for tensor in tensors[1:]:
        product = torch.einsum("...abx,...xijy->...aibjy", product, tensor).flatten(-5, -4).flatten(-3, -2)
    return product.squeeze(-1)


def fake_quantise(x: Tensor, bits: int, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Round to the nearest of ``2^bits - 1`` evenly spaced levels, symmetric about zero, up to the largest magnitude.

    Args:
        x: floating, finite.
        bits: width of a code, 2 to 16; 2 bits leave the levels -1, 0 and 1.
        dim: dimensions that share one scale; None for one scale in all.

    Returns:
        The quantised values, of the shape and dtype of `x`.

    Raises:
        ValueError: a width out of range.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be 2 to 16, got {bits}")
    dims = tuple(range(x.dim())) if dim is None else dim
    wide = x if x.dtype == torch.float64 else x.float()
    last = 2 ** (bits - 1) - 1
    scale = wide.abs().amax(dims, keepdim=True) / last
    levels = torch.where(scale > 0, wide / scale, 0).round_().clamp_(-last, last)
    return (levels * scale).to(x.dtype)


def _check(matrix: Tensor, shape: Shape) -> None:
    if matrix.dim() < 2 or not matrix.is_floating_point():
        raise ValueError(f"expected a floating matrix [..., I, J], got {matrix.dtype} {tuple(matrix.shape)}")
    if not shape or min(map(min, shape)) < 1:
        raise ValueError(f"shape must be pairs (i_k, j_k) of positive integers, got {list(shape)}")
    product = tuple(math.prod(sizes) for sizes in zip(*shape, strict=True))
    if product != tuple(matrix.shape[-2:]):
        raise ValueError(
            f"shape {list(shape)} multiplies to {product}, but the matrix is {tuple(matrix.shape[-2:])}; "
            "choose factors of both sizes"
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError("the matrix holds inf or nan: it has no singular values")
