"""Which dimension of a cache tensor is what, and the tensor as [batch, heads, slots, channels]."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

Group: TypeAlias = int | tuple[int, ...]
"""A dimension; those of a pair, such as keys and values in one tensor, of which the first has size 2; () for none."""

Dims: TypeAlias = tuple[Group, Group, int, int]
"""Which dimensions of a tensor are batch, head, slot and channel."""

BHSD: Dims = (0, 1, 2, 3)


def order(dims: Dims) -> list[int]:
    """All dimensions, those of the batch first: what to permute by."""
    return [dim for group in dims for dim in members(group)]


def members(group: Group) -> tuple[int, ...]:
    """The dimensions of a group."""
    return (group,) if isinstance(group, int) else group


def order_back(dims: Dims) -> list[int]:
    """The order that undoes `order`."""
    places = order(dims)
    return [places.index(dim) for dim in range(len(places))]


def is_plain(dims: Dims) -> bool:
    """Whether each role is that of one dimension: then `arranged` gives a view."""
    return all(isinstance(group, int) for group in dims)


def sizes(shape: Sequence[Any], dims: Dims) -> list[Any]:
    """Batch, heads, slots and channels of a tensor of this shape."""
    return [prod(shape[dim] for dim in members(group)) for group in dims]


def shape_of(sizes: Sequence[int], dims: Dims) -> list[int]:
    """Shape of the tensor that has these sizes, batch, heads, slots and channels."""
    shape = [0] * len(order(dims))
    for size, group in zip(sizes, dims, strict=True):
        parts = members(group)
        for dim, part in zip(parts, (size,) if len(parts) == 1 else (2, size // 2), strict=False):
            shape[dim] = part
    return shape


def arranged(tensor: Tensor, dims: Dims) -> Tensor:
    """A tensor as [batch, heads, slots, channels]."""
    moved = tensor.permute(order(dims))
    return moved if is_plain(dims) else moved.reshape(sizes(tensor.shape, dims))


def laid_out(tensor: Tensor, dims: Dims) -> Tensor:
    """What `arranged` is made from: [batch, heads, slots, channels] in the cache's own dimensions."""
    if not is_plain(dims):
        shape = shape_of(tensor.shape, dims)
        tensor = tensor.reshape([shape[dim] for dim in order(dims)])
    return tensor.permute(order_back(dims))


@dataclass(frozen=True)
class Stacking:
    """How a tensor holds many caches, as those of all layers.

    Attributes:
        axes: the dims along which they stand, the outermost first, each as it is counted once those before are gone.
        counts: their sizes.
    """

    axes: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def number(self) -> int:
        """How many they are."""
        return prod(self.counts)

    def apart(self, tensor: Tensor) -> list[Tensor]:
        """The caches, as views; the last axis counts fastest."""
        parts = [tensor]
        for axis in self.axes:
            parts = [part for whole in parts for part in whole.unbind(axis)]
        return parts

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor that holds such caches, not contiguous."""
        whole = torch.stack(list(parts)).unflatten(0, self.counts)
        for i in reversed(range(len(self.axes))):
            whole = whole.movedim(i, i + self.axes[i])
        return whole

    def dim_of(self, dim: int) -> int | None:
        """Which dimension of each cache a dimension of the tensor is; None for one along which they stand."""
        for axis in self.axes:
            if dim == axis:
                return None
            dim -= dim > axis
        return dim
