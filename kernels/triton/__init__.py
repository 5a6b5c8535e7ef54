"""Kernels for GPUs in Triton, an optional dependency: nothing here is imported without it."""

import functools
import importlib
import importlib.util
from types import ModuleType


@functools.cache
def launches() -> ModuleType | None:
    """`decoquant_compile.kernels.triton.launch`, or None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("decoquant_compile.kernels.triton.launch")
