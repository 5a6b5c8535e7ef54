"""Storages that take the place of a tensor's memory: none at all, or zeros that nobody has touched yet."""

import ctypes
import functools
import mmap
import os
import sys
from typing import Any

import torch
from torch import Tensor

from decoquant_compile import _compat

_CHUNK = 4 << 20  # bytes mapped at a time; vm.max_map_count (65,530) then allows 256 GB
_MAP_FIXED = 0x10


def exchange(tensor: Tensor, storage: torch.UntypedStorage) -> None:
    """Swap the memory under `tensor`, and under every tensor that shares it, with that of `storage`."""
    _compat.swap_memory(tensor.untyped_storage(), storage)


def is_sole_owner(tensor: Tensor) -> bool:
    """Whether nobody else can reach the memory of a tensor: no view, no export, no autograd graph.

    The base of a view counts as somebody only if more than the view keeps it: `torch.zeros(n).view(...)` is alone.
    """
    with torch.inference_mode(mode=False):
        counts = _compat.reference_counts
        return counts(tensor) in (counts(torch.empty(1)), counts(torch.empty(1).view(1)))


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor has no memory of its own: it belongs to a functorch transform or to functionalisation."""
    return bool(_compat.is_wrapped(tensor) or _compat.is_functional(tensor))


class Reserved:
    """Addresses without memory, for storages of up to `nbytes`.

    Writing to these storages through PyTorch raises a `RuntimeError`. Reading, which PyTorch does not check, gives NaN
    in every floating dtype on Linux CPUs (all addresses are mapped to the same few pages of 0xFF); on other devices it
    is a null pointer.

    Raises:
        OSError: the address space cannot be mapped.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self._device = nbytes, device
        on_pages = nbytes > 0 and device.type == "cpu" and sys.platform == "linux"
        self._pages = _nan_pages(nbytes) if on_pages else None

    def storage(self, nbytes: int) -> torch.UntypedStorage:
        """A storage of `nbytes`, of its own, over these addresses."""
        if self._pages is None or nbytes == 0:
            storage = _compat.wrapper_subclass(_Null, nbytes, self._device)
        else:
            storage = torch.frombuffer(self._pages, dtype=torch.uint8, count=nbytes)
        _compat.forbid_writes(storage)
        return storage.untyped_storage()


def zeros(nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """A storage of `nbytes` zeros; on Linux CPUs its pages take memory only when they are written."""
    memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
    start = end = 0
    if device.type == "cpu" and sys.platform == "linux":
        address = memory.data_ptr()
        start = min(-address % mmap.PAGESIZE, nbytes)
        end = start + (nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # Private anonymous pages that are given back read as zeros.
        if _libc().madvise(address + start, end - start, mmap.MADV_DONTNEED) != 0:
            end = start
    memory[:start].zero_()
    memory[end:].zero_()
    return memory.untyped_storage()


def _nan_pages(nbytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for at in range(start, start + nbytes, _CHUNK):
        size = min(_CHUNK, start + nbytes - at)
        if _libc().mmap(at, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, _nan_chunk(), 0) != at:
            error = ctypes.get_errno()
            raise OSError(
                error, f"cannot map {nbytes} bytes of address space: {os.strerror(error)} (vm.max_map_count?)"
            )
    return pages


@functools.cache
def _nan_chunk() -> int:
    """A file in memory, all 0xFF: NaN in every floating dtype."""
    file = os.memfd_create("decoquant-nan")
    os.write(file, b"\xff" * _CHUNK)
    return file


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


class _Null(Tensor):
    """A tensor whose storage was never allocated."""

    @classmethod
    def __torch_dispatch__(cls, func: object, *_: Any) -> Any:
        raise RuntimeError(f"{func} on a tensor without memory")
