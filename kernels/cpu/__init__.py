"""The operators on CPUs: C++ built at first use, plain PyTorch where it cannot be built."""

import threading
import warnings

from torch import Tensor

from decoquant_compile.kernels import reference
from decoquant_compile.kernels.cpu import build
from decoquant_compile.kernels.cpu.native import Kernels
from decoquant_compile.kernels.format import Format

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
        return Kernels(level, build.load(level))
    except build.BuildError as error:
        warnings.warn(
            f"decoquant-compile runs its plain PyTorch operators, which are right but slow: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def store(
    state: Tensor,
    new: Tensor,
    positions: Tensor,
    query: Tensor | None,
    mask: Tensor | None,
    slots: int,
    shift: int,
    first: int,
    format: str,  # noqa: A002
    rows: Tensor | None = None,
) -> None:
    """`reference.store` with the format as a key."""
    native = kernels()
    if native is None:
        reference.store(state, new, positions, query, mask, slots, shift, first, Format.parse(format), rows)
    else:
        native.store(state, new, positions, query, mask, slots, shift, first, format, rows)


def attend(
    query: Tensor,
    key_state: Tensor,
    value_state: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    slots: int,
    first: int,
    length: int,
    key_format: str,
    value_format: str,
) -> Tensor:
    """`reference.attend` with the formats as keys."""
    operands = (query, key_state, value_state, key, value, positions, mask, scale, softcap, slots, first, length)
    native = kernels()
    if native is None:
        return reference.attend(*operands, Format.parse(key_format), Format.parse(value_format))
    return native.attend(*operands, key_format, value_format)


def dequantise(state: Tensor, batch: int, heads: int, slots: int, format: str) -> Tensor:  # noqa: A002
    """`reference.dequantise` with the format as a key."""
    native = kernels()
    if native is None:
        return reference.dequantise(state, batch, heads, slots, Format.parse(format))
    return native.dequantise(state, batch, heads, slots, format)
