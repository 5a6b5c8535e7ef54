"""The operators on CPUs: calls of the C++ functions."""

import contextlib
import ctypes
import functools
import pathlib
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from decoquant_compile.kernels import codec, reference, tiles
from decoquant_compile.kernels.cpu import build, prompt
from decoquant_compile.kernels.format import Format

_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_REFUSED: Final = -1
"""Result of a call with arguments that the C++ does not take as they are."""
_DONE, _DENSE_IS_ALL = 0, 2
"""Results of `decoquant_attend`; any other one: nothing was done."""
_UNBROKEN: Final = 1
"""A result of `decoquant_extents`."""

_TOGETHER: Final = 16
"""From so many queries and new tokens on, the new tokens are attended by themselves and merged."""
_MANY: Final = 1536
"""From so many query rows of a KV head on, torch's attention over dequantised stretches of the cache is faster than
ours over its codes, where both have the tiles of AMX: 1.3 times with 2,048 rows, level with 1,024."""


@functools.cache  # for good: layouts hold the addresses
def _tables(bits: int, head_dim: int) -> tuple[Tensor, ...]:
    """The codec's tables as `Layout` of state.hpp wants them."""
    device = torch.device("cpu")
    order = head_dim & -head_dim
    entries = torch.tensor(codec.entries(bits), dtype=torch.int8, device=device)
    rotation = codec.signs(head_dim, device), codec.cosines(head_dim // order, device)
    return entries, codec.thresholds(bits, device), *rotation, codec.radii_table(bits, device)


class Bound(NamedTuple):
    """A format and the size of a state of it, as the C++ functions take them."""

    form: Format
    nbytes: int
    """Of the buffer."""
    layout: bytes
    """`Layout` of state.hpp."""


@functools.lru_cache(maxsize=4096)
def bind(key: str, batch: int, heads: int, slots: int) -> Bound:
    """What the C++ functions need to know of a state ``[batch, heads, slots, head_dim]`` of the format `key`."""
    form = Format.parse(key)
    span = form.layout(batch, heads, slots)
    offsets = [offset for offset, _, _ in span.spans]
    coded = form.bits != 16
    widths = codec.planes(form.bits) if coded else ()
    tables = [table.data_ptr() for table in _tables(form.bits, form.head_dim)] if coded else [0] * 5
    shapes = [shape for _, _, shape in span.spans]
    numbers = (
        form.role == "key",
        form.bits,
        form.head_dim,
        tiles.padded(form.role, form.bits, form.head_dim) if coded else form.head_dim,
        _DTYPES[form.dtype],
        form.sinks,
        batch,
        heads,
        slots,
        tiles.capacity(slots),
        shapes[span.planes + 6][1],
        shapes[-4][2],
        shapes[-2][2],
        span.planes,
        *(*widths, 0, 0)[:2],
        span.nbytes,
        *offsets[:3],
        *(*offsets[3 : 3 + span.planes], 0, 0)[:2],
        *offsets[3 + span.planes :],
        *tables,
        len(codec.radii(form.bits)) if coded else 1,
    )
    layout = struct.pack(f"@{len(numbers)}qd", *numbers, codec.steps(form.bits) if coded else 1.0)
    return Bound(form, span.nbytes, layout)


@functools.lru_cache(maxsize=4096)
def _layouts(key_format: str, value_format: str, batch: int, heads: int, slots: int) -> tuple[bytes, bytes, int]:
    """Layouts of a key and of a value cache, and the size of a value if it is not that of a key, else 0."""
    key, value = bind(key_format, batch, heads, slots), bind(value_format, batch, heads, slots)
    sizes = key.form.head_dim, value.form.head_dim
    return key.layout, value.layout, 0 if sizes[0] == sizes[1] else sizes[1]


def _rows(tensor: Tensor) -> Tensor:
    """A tensor of a dtype that the C++ reads, channels side by side."""
    if tensor.dtype not in _DTYPES:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _mask(mask: Tensor) -> Tensor:
    """A mask of a dtype that the C++ reads."""
    return mask if mask.dtype in _DTYPES or mask.dtype is torch.bool else mask.float()


# -------------------------------------------------------------------------------------------------- functions in C++


def _function(function: Any, result: Any, *arguments: Any) -> Callable[..., Any]:
    function.restype, function.argtypes = result, arguments
    return function


class _Method(ctypes.Structure):
    """`PyMethodDef` of CPython."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_FASTCALL: Final = 0x80
"""METH_FASTCALL: the function takes an array of its arguments."""
_VIEW_TENSOR: Final = 5
"""Number of the word of `DLPackExchangeAPI` that has the address of ``dltensor_from_py_object_no_sync``."""


def _view_tensor() -> int:
    """Address of the function that shows C++ where a tensor lies and what it is like."""
    of_capsule = ctypes.pythonapi.PyCapsule_GetPointer
    of_capsule.restype, of_capsule.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    table = of_capsule(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
    return ctypes.c_size_t.from_address(table + _VIEW_TENSOR * ctypes.sizeof(ctypes.c_size_t)).value


@functools.cache  # for good: the function refers to its definition
def _method(address: int) -> tuple[Callable[..., int], _Method]:
    """A function of Python at an address, with its definition: a call by ctypes would take longer than the work."""
    method = _Method(b"decoquant", address, _FASTCALL, None)
    new = ctypes.pythonapi.PyCFunction_NewEx
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    return new(ctypes.addressof(method), _view_tensor(), None), method


def openmp_parallel() -> int:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch uses, 0 if it uses none with such a function."""
    try:
        mapped = pathlib.Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0
    paths = {line.split(maxsplit=5)[-1] for line in mapped}
    runtimes = [path for path in paths if pathlib.Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    home = str(pathlib.Path(torch.__file__).parent)
    for path in sorted(runtimes, key=lambda path: (not path.startswith(home), path)):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value or 0
    return 0


class Kernels:
    """The C++ kernels of one instruction set.

    Attributes:
        level: the instruction set.
    """

    def __init__(self, level: build.Level, library: ctypes.CDLL) -> None:
        self.level = level
        self._gomp_parallel = openmp_parallel()
        self._attend, self._store, self._extents = (
            _method(ctypes.cast(function, ctypes.c_void_p).value or 0)[0]
            for function in (library.decoquant_attend, library.decoquant_store, library.decoquant_extents)
        )
        address, integer = ctypes.c_void_p, ctypes.c_int64
        places = address, address, integer, integer, address
        self._dequantise = _function(library.decoquant_dequantise, None, *places, address, integer)
        self._read = _function(library.decoquant_read, ctypes.c_uint64, address, integer, address, integer)

    def read(self, buffer: Tensor) -> int:
        """Reads a contiguous tensor once, as fast as memory gives it; the exclusive or of its 64-bit words."""
        nbytes = buffer.nbytes // 64 * 64
        return int(self._read(buffer.data_ptr(), nbytes, self._gomp_parallel, torch.get_num_threads()))

    def extents(self, mask: Tensor) -> prompt.Extents:
        """Where the rows of a mask, bool ``[batch, heads, queries, tokens]``, admit tokens."""
        out = torch.empty((*mask.shape[:3], 2), dtype=torch.int64)
        unbroken = self._extents(mask if mask.stride(-1) == 1 else mask.contiguous(), out)
        assert unbroken != _REFUSED
        return prompt.Extents(out[..., 0], out[..., 1], unbroken == _UNBROKEN)

    def dequantise(
        self,
        state: Tensor,
        batch: int,
        heads: int,
        slots: int,
        format: str,  # noqa: A002
        after: Tensor | None = None,
    ) -> Tensor:
        """`reference.dequantise` with the format as a key."""
        return self.dequantise_stretch(state, batch, heads, slots, 0, slots, format, after)

    def dequantise_stretch(
        self,
        state: Tensor,
        batch: int,
        heads: int,
        slots: int,
        first: int,
        length: int,
        format: str,  # noqa: A002
        after: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """`reference.dequantise` of a stretch, with the format as a key."""
        del after
        first += 0 if start is None else int(start)
        bound = bind(format, batch, heads, slots)
        if state.shape != (bound.nbytes,) or state.dtype != torch.uint8 or not state.is_contiguous() or first < 0:
            return reference.dequantise(state, batch, heads, slots, bound.form, first, length)  # which raises
        out = torch.empty(batch, heads, length, bound.form.head_dim, dtype=bound.form.dtype)
        places = state.data_ptr(), first, length, out.data_ptr()
        self._dequantise(bound.layout, *places, self._gomp_parallel, torch.get_num_threads())
        return out

    def store(
        self,
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
        if new.dim() != 4:
            reference.check_write(new, positions, query, mask, rows, Format.parse(format))  # which raises
        batch, heads, _, _ = new.shape
        layout = bind(format, batch, heads, slots).layout
        common = shift, first, self._gomp_parallel, torch.get_num_threads()
        highest = self._store(layout, state, new, positions, query, mask, rows, *common)
        if highest == _REFUSED:
            highest = self._store(
                layout,
                state,
                _rows(new),
                positions.contiguous(),
                None if query is None else _rows(query),
                None if mask is None else _mask(mask),
                None if rows is None else rows.contiguous(),
                *common,
            )
        if highest == _REFUSED:  # the operands are wrong, or there is nothing to write
            reference.store(state, new, positions, query, mask, slots, shift, first, Format.parse(format), rows)
        elif highest:
            raise IndexError(f"position {highest} is outside the cache of {slots} slots")

    def attend(
        self,
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
        sink: Tensor | None = None,
        sequences: int | None = None,
    ) -> Tensor:
        """`reference.attend` with the formats as keys."""
        # A decoded token makes one such call for each layer: every look at a tensor from Python counts here.
        shape = key.shape
        if len(shape) == 4 and shape[2] < _TOGETHER:
            batch, heads, _, _ = shape
            keys, values, value_dim = _layouts(key_format, value_format, sequences or batch, heads, slots)
            # Strides of a single query do not matter; `empty_like` is faster than to name the sizes.
            out = query.new_empty((*query.shape[:3], value_dim)) if value_dim else torch.empty_like(query)
            status = self._attend(
                keys, values, key_state, value_state, query, key, value, positions, mask, scale, softcap, first, length,
                sink, None, None, out, self._gomp_parallel, torch.get_num_threads(),
            )  # fmt: skip
            if status == _DONE:
                return out
        forms = Format.parse(key_format), Format.parse(value_format)
        return self._attend_any(
            query, key_state, value_state, key, value, positions, mask, scale, softcap, slots, first, length, *forms,
            sink, sequences,
        )  # fmt: skip

    def _attend_any(
        self,
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
        key_form: Format,
        value_form: Format,
        sink: Tensor | None,
        sequences: int | None,
    ) -> Tensor:
        """`reference.attend` of operands that are many, wrong, or not as the C++ reads them."""
        reference.check_attend(query, key, value, positions, mask, length, key_form, value_form, sink, sequences)
        batch, heads, tokens, _ = key.shape
        of_all = batch if sequences is None else sequences
        keys, values = (bind(form.key(), of_all, heads, slots).layout for form in (key_form, value_form))
        rows = _rows(query), _rows(key), _rows(value)
        at = positions.long().contiguous()
        bias = None if mask is None else _mask(mask)
        drain = None if sink is None else sink.float().contiguous()
        dense = None
        if min(query.shape[2], tokens) >= _TOGETHER and softcap is None and query.numel():
            factor = query.shape[3] ** -0.5 if scale is None else scale
            many = query.shape[2] * query.shape[1] // heads >= _MANY and self.level == "amx" and first >= 0
            brief = all(x.dtype is torch.bfloat16 for x in (query, key_form, value_form))
            # The least number, added, hides a stretch without making its sum mergeable.
            hides = mask is None or mask.dtype is torch.bool

            def history(low: int, high: int) -> tuple[Tensor, Tensor]:
                where = of_all, heads, slots, first + low, high - low
                key_side = self.dequantise_stretch(key_state, *where, key_form.key())
                value_side = self.dequantise_stretch(value_state, *where, value_form.key())
                return key_side[:batch], value_side[:batch]

            read = history if many and brief and hides else None
            dense = prompt.attend(*rows, at, bias, factor, first, length, drain, self.extents, read)
            if dense and read:
                return dense.out
        out = rows[0].new_empty((*query.shape[:3], value_form.head_dim))
        status = self._attend(
            keys, values, key_state, value_state, *rows, at, bias, scale, softcap, first, length,
            *((None, *dense) if dense else (drain, None, None)), out, self._gomp_parallel, torch.get_num_threads(),
        )  # fmt: skip
        if status == _DENSE_IS_ALL:
            assert dense is not None
            out = dense.out
        elif status != _DONE:  # the caches differ, the states are wrong, or there is nothing to attend to
            return reference.attend(
                query, key_state, value_state, key, value, positions, mask, scale, softcap, slots, first, length,
                key_form, value_form, sink, sequences,
            )  # fmt: skip
        return out if out.dtype is query.dtype else out.to(query.dtype)
