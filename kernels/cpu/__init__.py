"""Kernels for CPUs in C++, built at first use."""

import logging
import threading
import warnings

from decoquant_compile.kernels.cpu import build
from decoquant_compile.kernels.cpu.native import Kernels

log = logging.getLogger(__name__)

_lock = threading.Lock()
_kernels: list[Kernels | None] = []  # none yet, or the one choice


def kernels() -> Kernels | None:
    """The C++ kernels for this CPU, built first if need be; None, with one warning, if that is not possible.

    Raises:
        ValueError: the environment variable DECOQUANT_CPU is no instruction set, or one that this CPU lacks.
    """
    if not _kernels:
        with _lock:
            if not _kernels:
                _kernels.append(_load())
    return _kernels[0]


def _load() -> Kernels | None:
    level = build.detect()
    try:
        return _of(level)
    except build.BuildError as error:
        warnings.warn(
            f"decoquant-compile runs its plain PyTorch operators, which are right but slow: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _of(level: build.Level) -> Kernels:
    """The kernels of a level; a compiler that is too old for AMX builds those of the next one."""
    try:
        return Kernels(level, build.load(level))
    except build.BuildError as error:
        if level != "amx":
            raise
        log.info("no kernels for AMX: %s", error)
        return _of("avx512")
