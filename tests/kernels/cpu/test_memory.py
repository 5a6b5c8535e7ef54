"""State buffers in huge pages."""

import gc
import pathlib
import re

import pytest
import torch

from decoquant_compile.kernels.cpu import memory
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState

ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(tensor):
    """Bytes of the mapping around a tensor that stand in huge pages."""
    address = tensor.data_ptr()
    inside = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            inside = begin <= address < end
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.parametrize("nbytes", [0, 1, 100, 2**21, 2**22 - 1, 2**22, 2**23 + 12345])
def test_zeros(nbytes):
    buffer = memory.zeros(nbytes)
    assert (buffer.shape, buffer.dtype, buffer.is_contiguous()) == ((nbytes,), torch.uint8, True)
    assert not buffer.any()
    assert buffer.data_ptr() % 64 == 0
    buffer.fill_(1)
    assert int(buffer.sum()) == nbytes


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="the system gives no transparent huge pages"
)
def test_large_buffers_stand_in_huge_pages():
    state = CacheState.empty(Format("key", 4, 128, torch.bfloat16), 1, 8, 32768, "cpu")
    assert state.buffer.data_ptr() % 2**21 == 0
    state.buffer[:] = 0
    if huge_bytes(state.buffer) == 0:
        pytest.skip("no huge page is free now")
    copy = state.clone()
    assert copy.buffer.data_ptr() % 2**21 == 0


def test_memory_is_taken_up_as_it_is_written_to():
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    before = process.memory_info().rss
    state = CacheState.empty(Format("key", 16, 128, torch.bfloat16), 1, 8, 65536, "cpu")  # 128 MiB
    assert process.memory_info().rss - before < 2**25
    assert not state.read()[0, 0, 0].any()


def test_views_outlive_their_buffer():
    view = memory.zeros(2**23)[2**22 :]
    gc.collect()
    view.fill_(7)
    assert int(view.int().sum()) == 7 * 2**22
