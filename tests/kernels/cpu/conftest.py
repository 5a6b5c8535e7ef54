"""The kernels of each instruction set; those that this machine lacks are skipped."""

import functools
import pathlib
import shutil

import pytest
import torch

from decoquant_compile.kernels.cpu import build
from decoquant_compile.kernels.cpu.native import Kernels


@functools.lru_cache
def kernels_of(level):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("needs a C++ compiler")
    if level not in build.usable():
        pytest.skip(f"this machine does not run {level}")
    return Kernels(level, build.load(level))


def pytest_collection_modifyitems(config, items):
    """Only attention uses tile registers: everything else is the code of AVX-512 again."""
    again = [
        item
        for item in items
        if item.path.name in ("test_store.py", "test_dequantise.py")
        and item.path.parent == pathlib.Path(__file__).parent
        and getattr(item, "callspec", None)
        and item.callspec.params.get("native") == "amx"
    ]
    if again:
        config.hook.pytest_deselected(items=again)
        left_out = set(again)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", params=build.LEVELS)
def native(request):
    """The C++ kernels of a level, built once."""
    return kernels_of(request.param)


@pytest.fixture(scope="module", autouse=True)
def _alone():
    """One thread: pools of workers side by side would wait for each other, most of all in small operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """Sets torch's number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
