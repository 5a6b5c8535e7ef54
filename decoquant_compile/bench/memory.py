"""Memory that both sides of a comparison share: 2 MB pages, rings of caches too large for any CPU cache."""

import math
import pathlib
from collections.abc import Sequence
from typing import Final, Generic, Literal, TypeVar

import psutil
import torch
from torch import Tensor

from decoquant_compile.kernels import cpu
from decoquant_compile.kernels.cpu import memory as pages

Pages = Literal["huge", "default"]

_RESERVE: Final = 2**30
"""Bytes that a benchmark leaves to the rest of the machine and to its own temporaries."""

T = TypeVar("T")


def huge(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of zeros that starts on a 2 MB boundary, in 2 MB pages where the system gives them."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    return pages.huge(count * dtype.itemsize).view(dtype).view(tuple(shape))


def huge_bytes() -> int:
    """Bytes of this process that stand in 2 MB pages now; 0 where the system does not say."""
    try:
        lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))


def available() -> int:
    """Bytes that a benchmark may still allocate."""
    return max(0, psutil.virtual_memory().available - _RESERVE)


def lack(nbytes: int) -> str:
    """Why `nbytes` cannot be allocated; "" if they can."""
    free = available()
    return "" if nbytes <= free else f"needs {nbytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are available"


def copies(nbytes: int, ring: int) -> int:
    """How many caches of `nbytes` make a ring of at least `ring` bytes; one may be that large by itself."""
    return math.ceil(ring / nbytes)


class Ring(Generic[T]):
    """Equal caches that take turns, so that what is used next has left the CPU's caches."""

    def __init__(self, items: Sequence[T]) -> None:
        self._items = items
        self._next = 0

    def __len__(self) -> int:
        return len(self._items)

    def next(self) -> T:
        """The cache that was used longest ago."""
        item = self._items[self._next]
        self._next = (self._next + 1) % len(self._items)
        return item


def pure_read(buffer: Tensor) -> None:
    """Reads the bytes of a contiguous tensor on all of torch's threads: the limit of whatever has to read them."""
    native = cpu.kernels()
    if native is not None:
        native.read(buffer)
    else:
        flat = buffer.view(-1).view(torch.uint8)
        flat[: flat.numel() // 8 * 8].view(torch.int64).sum()
