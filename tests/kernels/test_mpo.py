"""Matrix product operators: lossless, balanced at every bond, defined for degenerate matrices."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels import mpo

SITES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)
SCALES = st.sampled_from((1e-6, 1.0, 1e4))


def matrix_of(shape, seed, scale=1.0, rank=None):
    rows, columns = (math.prod(sizes) for sizes in zip(*shape, strict=True))
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    matrix = draw(rows, columns) if rank is None else draw(rows, rank) @ draw(rank, columns)
    return scale * matrix


def unfolded(tensors):
    """A chain of tensors with open ends, as a matrix ``[d_0 * all i and j, d_n]``."""
    out = tensors[0].flatten(0, 2)
    for tensor in tensors[1:]:
        out = (out @ tensor.flatten(1)).reshape(-1, tensor.shape[-1])
    return out


def folded(tensors):
    """A chain of tensors with open ends, as a matrix ``[d_0, all i and j * d_n]``."""
    out = tensors[-1].flatten(1)
    for tensor in reversed(tensors[:-1]):
        out = (tensor.flatten(0, 2) @ out).reshape(tensor.shape[0], -1)
    return out


@settings(deadline=None, max_examples=60)
@given(shape=SITES, seed=st.integers(0, 2**16), scale=SCALES)
def test_lossless_at_full_rank(shape, seed, scale):
    matrix = matrix_of(shape, seed, scale)
    tensors = mpo.decompose(matrix, shape)
    assert [tuple(tensor.shape[1:3]) for tensor in tensors] == shape
    torch.testing.assert_close(mpo.reconstruct(tensors), matrix, rtol=0, atol=1e-12 * float(matrix.norm()))


@settings(deadline=None, max_examples=40)
@given(shape=SITES.filter(lambda shape: len(shape) > 1), seed=st.integers(0, 2**16), scale=SCALES)
def test_balanced_at_every_bond(shape, seed, scale):
    tensors = mpo.decompose(matrix_of(shape, seed, scale), shape)
    for cut in range(1, len(shape)):
        left, right = unfolded(tensors[:cut]), folded(tensors[cut:])
        values = torch.linalg.svdvals(left @ right)[: left.shape[1]]
        tolerance = {"rtol": 0, "atol": 1e-9 * float(values[0])}
        torch.testing.assert_close(left.T @ left, values.diag(), **tolerance)
        torch.testing.assert_close(right @ right.T, values.diag(), **tolerance)


@settings(deadline=None, max_examples=30)
@given(shape=SITES, seed=st.integers(0, 2**16), rank=st.integers(0, 2))
def test_deficient_rank_loses_nothing(shape, seed, rank):
    matrix = matrix_of(shape, seed, rank=rank)
    tensors = mpo.decompose(matrix, shape)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
    torch.testing.assert_close(mpo.reconstruct(tensors), matrix, rtol=0, atol=1e-12 * (1 + float(matrix.norm())))


def test_elements_are_placed_as_in_the_definition():
    shape = [(2, 3), (3, 2), (2, 2)]
    matrix = matrix_of(shape, 0)
    first, second, third = mpo.decompose(matrix, shape)
    for (i1, i2, i3), (j1, j2, j3) in itertools.product(
        itertools.product(*(range(i) for i, _ in shape)), itertools.product(*(range(j) for _, j in shape))
    ):
        product = first[:, i1, j1] @ second[:, i2, j2] @ third[:, i3, j3]
        row, column = (i1 * 3 + i2) * 2 + i3, (j1 * 2 + j2) * 2 + j3
        torch.testing.assert_close(product.squeeze(), matrix[row, column])


def test_two_sites_are_one_svd_split_evenly():
    tokens, channels, group = 20, 24, 4
    matrix = matrix_of([(tokens, channels)], 1)
    large, small = mpo.decompose(matrix, mpo.cache_shape(tokens, channels, (group,)))
    assert (large.shape, small.shape) == ((1, tokens, channels // group, group), (group, 1, group, 1))
    u, values, v = torch.linalg.svd(matrix.reshape(-1, group), full_matrices=False)
    # Singular vectors are unique up to their sign
    torch.testing.assert_close(large.reshape(-1, group).abs(), (u * values.sqrt()).abs())
    torch.testing.assert_close(small.squeeze().abs(), (values.sqrt()[:, None] * v).abs())


def test_a_batch_is_decomposed_matrix_by_matrix():
    shape = [(3, 2), (2, 4)]
    batch = torch.stack([matrix_of(shape, seed) for seed in range(6)]).unflatten(0, (2, 3))
    tensors = mpo.decompose(batch, shape)
    for at in itertools.product(range(2), range(3)):
        for whole, single in zip(tensors, mpo.decompose(batch[at], shape), strict=True):
            torch.testing.assert_close(whole[at], single)
    torch.testing.assert_close(mpo.reconstruct(tensors), batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept(dtype):
    shape = [(4, 3), (2, 2)]
    matrix = matrix_of(shape, 2).to(dtype)
    tensors = mpo.decompose(matrix, shape)
    assert {tensor.dtype for tensor in tensors} == {dtype}
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(mpo.reconstruct(tensors), matrix, rtol=tolerance, atol=4 * tolerance)


def test_cache_shape():
    assert mpo.cache_shape(7, 64) == [(7, 4), (1, 16)]
    assert mpo.cache_shape(7, 64, (4, 8)) == [(7, 2), (1, 4), (1, 8)]
    with pytest.raises(ValueError, match=r"\(5,\).*64 channels"):
        mpo.cache_shape(7, 64, (5,))
    with pytest.raises(ValueError, match="positive"):
        mpo.cache_shape(7, 64, (0,))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([(2, 4), (3, 4)], r"multiplies to \(6, 16\), but the matrix is \(6, 8\)"),
        ([(5, 2), (1, 4)], r"multiplies to \(5, 8\)"),
        ([(-6, 8), (-1, 1)], "positive integers"),
        ([(6, 0), (1, 8)], "positive integers"),
        ([], "positive integers"),
    ],
)
def test_bad_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        mpo.decompose(torch.ones(6, 8), shape)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(6), r"\(6,\)"),
        (torch.ones(6, 8, dtype=torch.int64), "int64"),
        (torch.full((6, 8), torch.inf), "inf or nan"),
        (torch.full((6, 8), torch.nan), "inf or nan"),
    ],
)
def test_bad_matrices(matrix, message):
    with pytest.raises(ValueError, match=message):
        mpo.decompose(matrix, [(6, 2), (1, 4)])


@pytest.mark.parametrize(
    "shapes", [[], [(2, 2)], [(1, 2, 2, 3), (2, 2, 2, 1)], [(2, 2, 2, 1)], [(1, 2, 2, 2)]], ids=str
)
def test_bonds_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match="bonds"):
        mpo.reconstruct([torch.ones(shape) for shape in shapes])


@settings(deadline=None)
@given(bits=st.integers(2, 16), seed=st.integers(0, 2**16), dim=st.sampled_from((None, 0, 1, (0, 1), -1)))
def test_quantiser_rounds_to_the_nearest_level(bits, seed, dim):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    quantised = mpo.fake_quantise(x, bits, dim)
    last = 2 ** (bits - 1) - 1
    scale = x.abs().amax((0, 1) if dim is None else dim, keepdim=True) / last
    levels = quantised / scale
    torch.testing.assert_close(levels, levels.round(), rtol=1e-5, atol=1e-5)
    assert float(levels.abs().max()) <= last * (1 + 1e-6)
    assert bool(((quantised - x).abs() <= scale * (0.5 + 1e-3 + last * 1e-6)).all())


def test_quantiser_at_two_bits_and_on_zeros():
    x = torch.tensor([[4.0, -1.9, 2.1, -4.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    expected = torch.tensor([[4.0, 0.0, 4.0, -4.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    assert torch.equal(mpo.fake_quantise(x, 2, -1), expected)
    subnormal = torch.full((1, 3), 1e-45)
    assert bool(mpo.fake_quantise(subnormal, 4, -1).isfinite().all())


@pytest.mark.parametrize("bits", [0, 1, 17])
def test_quantiser_refuses_other_widths(bits):
    with pytest.raises(ValueError, match=f"got {bits}"):
        mpo.fake_quantise(torch.ones(2), bits)
