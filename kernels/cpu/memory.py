"""Memory in huge pages: a cache is read from end to end for each token, which 4 KiB pages slow down by a fifth."""

import mmap
from typing import Final

import torch
from torch import Tensor

_HUGE_PAGE: Final = 1 << 21


def zeros(nbytes: int) -> Tensor:
    """Zeros, uint8 ``[nbytes]``, in huge pages where the system gives them; memory is taken up as it is written to."""
    if nbytes < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)  # before the first touch
    except OSError:  # a kernel without them
        pages.close()
        return torch.zeros(nbytes, dtype=torch.uint8)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    offset = -buffer.data_ptr() % _HUGE_PAGE
    return buffer[offset : offset + nbytes]
