"""Kernels for GPUs in Triton, an optional dependency: nothing here is imported without it."""

import functools
import importlib
import importlib.util
from types import ModuleType


def launches() -> ModuleType | None:
    """`decoquant_compile.kernels.triton.launch`, or None without Triton."""
    return _module("launch")


def writes() -> ModuleType | None:
    """`decoquant_compile.kernels.triton.store`, or None without Triton."""
    return _module("store")


@functools.cache
def _module(name: str) -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"decoquant_compile.kernels.triton.{name}")
