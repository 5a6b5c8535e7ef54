"""Memory in huge pages: a cache is read from end to end for each token, which 4 KiB pages slow down by a fifth."""

import contextlib
import mmap
from typing import Final

import torch
from torch import Tensor

_HUGE_PAGE: Final = 1 << 21


def huge(nbytes: int) -> Tensor:
    """Zeros, uint8 ``[nbytes]`` from a 2 MB boundary on, in huge pages where the system gives them.

    Memory is taken up as it is written to. The advice must come before the first touch, which torch's own allocator
    cannot promise.
    """
    pages = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)  # keeps the mapping alive
    offset = -buffer.data_ptr() % _HUGE_PAGE
    return buffer[offset : offset + nbytes]


def zeros(nbytes: int) -> Tensor:
    """Zeros, uint8 ``[nbytes]``, as `huge` where they fill several huge pages."""
    return huge(nbytes) if nbytes >= 2 * _HUGE_PAGE else torch.zeros(nbytes, dtype=torch.uint8)
