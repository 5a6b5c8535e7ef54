"""Tensors in any layout as [batch, heads, slots, channels], and back."""

import pytest
import torch

from decoquant_compile.dims import BHSD, Stacking, arranged, is_plain, laid_out, members, shape_of, sizes

LAYOUTS = {
    BHSD: (3, 4, 5, 6),
    (0, 2, 1, 3): (3, 5, 4, 6),
    (1, 2, 0, 3): (5, 3, 4, 6),
    (0, 1, 3, 2): (3, 4, 6, 5),
    (0, (), 1, 2): (3, 5, 6),
    (0, (), 2, 1): (3, 6, 5),
    ((0, 1), 2, 3, 4): (2, 3, 4, 5, 6),
    ((0, 1), 3, 2, 4): (2, 3, 5, 4, 6),
    (0, (1, 3), 2, 4): (3, 2, 5, 4, 6),
    (0, (2, 1), 3, 4): (3, 4, 2, 5, 6),
}
each_layout = pytest.mark.parametrize(("dims", "shape"), LAYOUTS.items())


@each_layout
def test_there_and_back(dims, shape):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    there = arranged(tensor, dims)
    assert list(there.shape) == sizes(shape, dims)
    assert torch.equal(laid_out(there, dims), tensor)
    assert shape_of(there.shape, dims) == list(shape)


@each_layout
def test_rows_are_what_the_roles_say(dims, shape):
    tensor = torch.randn(shape)
    token = arranged(tensor, dims)[-1, -1, 2]
    index = [0] * len(shape)
    for group in dims[:2]:
        for dim in members(group):
            index[dim] = shape[dim] - 1
    index[dims[2]], index[dims[3]] = 2, slice(None)
    assert torch.equal(token, tensor[tuple(index)])


@each_layout
def test_a_plain_layout_is_a_view(dims, shape):
    tensor = torch.zeros(shape)
    arranged(tensor, dims).add_(1)
    assert bool((tensor == 1).all()) or not is_plain(dims)


@pytest.mark.parametrize(
    ("axes", "shape", "place"),
    [
        ((0,), (3, 4, 5), lambda i: (i,)),
        ((1,), (4, 3, 5), lambda i: (slice(None), i)),
        ((0, 0), (3, 2, 4, 5), lambda i: divmod(i, 2)),
        ((1, 0), (2, 3, 4, 5), lambda i: (i % 2, i // 2)),
        ((2, 0), (2, 4, 3, 5), lambda i: (i % 2, slice(None), i // 2)),
    ],
)
def test_stacking(axes, shape, place):
    tensor = torch.randn(shape)
    stacking = Stacking(axes, tuple((3, 2)[: len(axes)]))
    parts = stacking.apart(tensor)
    assert len(parts) == stacking.number
    for i, part in enumerate(parts):
        assert torch.equal(part, tensor[place(i)])
    assert torch.equal(stacking.together(parts), tensor)
    left = [stacking.dim_of(dim) for dim in range(tensor.dim())]
    assert [dim for dim in left if dim is not None] == list(range(parts[0].dim()))
    assert all(tensor.shape[i] == parts[0].shape[dim] for i, dim in enumerate(left) if dim is not None)
