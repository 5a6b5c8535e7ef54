"""The operators on CPUs: arguments of the C++ functions packed into structs, and calls of them."""

import contextlib
import ctypes
import functools
import math
import pathlib
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from decoquant_compile._compat import flash_attention_cpu
from decoquant_compile.kernels import codec, reference, tiles
from decoquant_compile.kernels.cpu import build
from decoquant_compile.kernels.format import Format

_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MASKS: Final = {**_DTYPES, torch.bool: 3}

_NO_ARRAY: Final[tuple[int, ...]] = (0, 0, 0, 0, 0, 0)

_ATTEND: Final = struct.Struct("@4q 6q 2q 6q 6q q q 6q 2d 2q 6q q q 2q")
"""`Attend` of attend.cpp."""
_CACHES_DIFFER, _DENSE_IS_ALL = 1, 2
"""Results of `decoquant_attend`."""

_LARGEST_SUM: Final = 1e4
"""Larger logarithms of sums are too coarse to merge by (a mask adds the least number everywhere); nan may come of a
key that is masked."""

_STORE: Final = struct.Struct("@2q 6q 2q 6q q 6q 3q q 2q 2q")
"""`Store` of store.cpp."""

_QUERIES_TOGETHER: Final = 16
"""From so many queries on, new tokens are attended by torch's own flash attention and merged."""


@functools.lru_cache(maxsize=256)
def _tables(bits: int, head_dim: int) -> tuple[Tensor, ...]:
    """The codec's tables as `Layout` of state.hpp wants them."""
    device = torch.device("cpu")
    order = head_dim & -head_dim
    entries = torch.tensor(codec.entries(bits), dtype=torch.int8)
    rotation = codec.signs(head_dim, device), codec.cosines(head_dim // order, device)
    return entries, codec.thresholds(bits, device), *rotation


class Bound(NamedTuple):
    """A format and the size of a state of it, as the C++ functions take them."""

    form: Format
    head_dim: int
    shape: tuple[int]
    """Of the buffer."""
    layout: ctypes.Array[ctypes.c_char]
    """`Layout` of state.hpp."""
    address: int
    """Of `layout`."""


@functools.lru_cache(maxsize=4096)
def bind(key: str, batch: int, heads: int, slots: int) -> Bound:
    """What the C++ functions need to know of a state ``[batch, heads, slots, head_dim]`` of the format `key`."""
    form = Format.parse(key)
    span = form.layout(batch, heads, slots)
    offsets = [offset for offset, _, _ in span.spans]
    coded = form.bits != 16
    widths = codec.planes(form.bits) if coded else ()
    tables = [table.data_ptr() for table in _tables(form.bits, form.head_dim)] if coded else [0] * 4
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
        *offsets[:3],
        *(*offsets[3 : 3 + span.planes], 0, 0)[:2],
        *offsets[3 + span.planes :],
        *tables,
    )
    packed = struct.pack(f"@{len(numbers)}qd", *numbers, codec.steps(form.bits) if coded else 1.0)
    layout = ctypes.create_string_buffer(packed, len(packed))
    return Bound(form, form.head_dim, (span.nbytes,), layout, ctypes.addressof(layout))


def _array(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """`Array` of state.hpp for a tensor of four dimensions, channels side by side, and the tensor that it describes."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        tensor, dtype = tensor.float(), 0
    strides = tensor.stride()
    if strides[3] != 1:
        tensor = tensor.contiguous()
        strides = tensor.stride()
    return tensor, (tensor.data_ptr(), dtype, *strides)


def _mask(mask: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """`Array` for a mask of four dimensions that broadcasts, and the tensor that it describes."""
    dtype = _MASKS.get(mask.dtype)
    if dtype is None:
        mask, dtype = mask.float(), 0
    rows, heads, queries, _ = mask.shape
    a, b, c, d = mask.stride()
    return mask, (mask.data_ptr(), dtype, rows > 1 and a, heads > 1 and b, queries > 1 and c, d)


def _broadcasts(shape: torch.Size, to: tuple[int, int, int, int]) -> bool:
    """Whether the first three sizes are those of `to` or 1, and the last one is that of `to`."""
    if len(shape) != 4:
        return False
    rows, heads, queries, length = shape
    return (
        length == to[3]
        and (rows == 1 or rows == to[0])
        and (heads == 1 or heads == to[1])
        and (queries == 1 or queries == to[2])
    )


def _function(function: Any, result: Any, *arguments: Any) -> Callable[..., Any]:
    function.restype, function.argtypes = result, arguments
    return function


def _is_state(buffer: Tensor, bound: Bound) -> bool:
    return buffer.shape == bound.shape and buffer.dtype is torch.uint8 and buffer.is_contiguous()


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
        self._attend = _function(library.decoquant_attend, ctypes.c_int64, ctypes.c_char_p)
        self._store = _function(library.decoquant_store, ctypes.c_int64, ctypes.c_char_p)
        address, integer = ctypes.c_void_p, ctypes.c_int64
        self._dequantise = _function(library.decoquant_dequantise, None, address, address, address, address, integer)
        self._read = _function(library.decoquant_read, ctypes.c_uint64, address, integer, address, integer)

    def read(self, buffer: Tensor) -> int:
        """Reads a contiguous tensor once, as fast as memory gives it; the exclusive or of its 64-bit words."""
        nbytes = buffer.nbytes // 64 * 64
        return int(self._read(buffer.data_ptr(), nbytes, self._gomp_parallel, torch.get_num_threads()))

    def dequantise(self, state: Tensor, batch: int, heads: int, slots: int, format: str) -> Tensor:  # noqa: A002
        """`reference.dequantise` with the format as a key."""
        bound = bind(format, batch, heads, slots)
        if not _is_state(state, bound):
            return reference.dequantise(state, batch, heads, slots, bound.form)  # which raises
        out = torch.empty(batch, heads, slots, bound.form.head_dim, dtype=bound.form.dtype)
        threads = torch.get_num_threads()
        self._dequantise(bound.address, state.data_ptr(), out.data_ptr(), self._gomp_parallel, threads)
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
        if new.dim() != 4 or (query is not None and query.dim() != 4):
            reference.check_write(new, positions, query, mask, rows, Format.parse(format))
        batch, heads, tokens, head_dim = shape = new.shape
        bound = bind(format, batch, heads, slots)
        wrong = (
            not _is_state(state, bound)
            or head_dim != bound.form.head_dim
            or shift < 0
            or positions.shape != (tokens,)
            or positions.dtype != torch.int64
        )
        query_heads, query_array = 0, _NO_ARRAY
        if query is not None:
            query_shape = query.shape
            query_heads = query_shape[1]
            wrong = wrong or query_heads % heads != 0 or query_shape[::2] != shape[::2]
            wrong = wrong or query_shape[3] != head_dim
        mask_array, mask_sizes = _NO_ARRAY, _NO_ARRAY[:3]
        if mask is not None:
            mask_shape = mask.shape
            wrong = wrong or len(mask_shape) != 4 or mask_shape[0] not in (1, batch)
            if not wrong:
                mask, mask_array = _mask(mask)
                mask_sizes = tuple(mask_shape[1:])
        if rows is not None:
            wrong = wrong or rows.shape != (batch, tokens) or rows.dtype != torch.bool
            rows = rows.contiguous()
        if wrong or tokens == 0:
            return reference.store(state, new, positions, query, mask, slots, shift, first, bound.form, rows)
        new, new_array = _array(new)
        if query is not None:
            query, query_array = _array(query)
        positions = positions.contiguous()
        highest = self._store(
            _STORE.pack(
                bound.address,
                state.data_ptr(),
                *new_array,
                tokens,
                positions.data_ptr(),
                *query_array,
                query_heads,
                *mask_array,
                *mask_sizes,
                0 if rows is None else rows.data_ptr(),
                shift,
                first,
                self._gomp_parallel,
                torch.get_num_threads(),
            )
        )
        if highest:
            raise IndexError(f"position {highest} is outside the cache of {slots} slots")
        return None

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
    ) -> Tensor:
        """`reference.attend` with the formats as keys."""
        # A decoded token makes one such call for each layer: every look at a tensor from Python counts here.
        operands = (query, key_state, value_state, key, value, positions, mask, scale, softcap, slots, first, length)
        shape, new = query.shape, key.shape
        if len(shape) != 4 or len(new) != 4:
            return reference.attend(*operands, Format.parse(key_format), Format.parse(value_format))  # which raises
        batch, query_heads, queries, head_dim = shape
        _, heads, tokens, _ = new
        keys, values = bind(key_format, batch, heads, slots), bind(value_format, batch, heads, slots)
        right = (
            _is_state(key_state, keys)
            and _is_state(value_state, values)
            and new == (batch, heads, tokens, head_dim)
            and value.shape == (batch, heads, tokens, values.head_dim)
            and head_dim == keys.head_dim
            and query_heads % heads == 0
            and positions.shape == (tokens,)
            and keys.form.role == "key"
            and values.form.role == "value"
            and length > 0
            and 0 not in shape
        )
        mask_array = _NO_ARRAY
        if mask is not None and right:
            right = _broadcasts(mask.shape, (batch, query_heads, queries, length))
            if right:
                mask, mask_array = _mask(mask)
        if not right:
            return reference.attend(*operands, keys.form, values.form)  # which raises, or has nothing to attend to

        dtype = query.dtype
        query, query_array = _array(query)
        key, key_array = _array(key)
        value, value_array = _array(value)
        if positions.dtype is not torch.int64 or not positions.is_contiguous():
            positions = positions.long().contiguous()
        out = torch.empty_like(query)  # faster than to name the sizes; strides of a single query do not matter
        if values.head_dim != head_dim or not out.is_contiguous():
            out = query.new_empty((batch, query_heads, queries, values.head_dim))
        scale = head_dim**-0.5 if scale is None else scale
        dense, dense_array, sums = None, _NO_ARRAY, 0
        if queries >= _QUERIES_TOGETHER and softcap is None:
            dense = _attend_new(query, key, value, positions, mask, scale, first, length)
            if dense is not None:
                _, dense_array = _array(dense.out)
                sums = dense.sums.data_ptr()
        status = self._attend(
            _ATTEND.pack(
                keys.address,
                values.address,
                key_state.data_ptr(),
                value_state.data_ptr(),
                *query_array,
                query_heads,
                queries,
                *key_array,
                *value_array,
                tokens,
                positions.data_ptr(),
                *mask_array,
                scale,
                softcap or 0.0,
                first,
                length,
                *dense_array,
                sums,
                out.data_ptr(),
                self._gomp_parallel,
                torch.get_num_threads(),
            )
        )
        if status == _DENSE_IS_ALL:
            assert dense is not None
            out = dense.out
        elif status == _CACHES_DIFFER:
            return reference.attend(*operands, keys.form, values.form)
        return out if out.dtype is dtype else out.to(dtype)


class _Dense(NamedTuple):
    """Attention to new tokens alone."""

    out: Tensor
    """``[batch, query_heads, queries, head_dim]``"""
    sums: Tensor
    """Logarithms of the sums of the softmax, float32 ``[batch, query_heads, queries]``; -inf: nothing is admitted."""


def _attend_new(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    scale: float,
    first: int,
    length: int,
) -> _Dense | None:
    """Attention to the new tokens alone by torch's kernel, if it has one for them."""
    tokens = len(positions)
    if tokens == 0 or query.dtype != key.dtype or key.dtype != value.dtype or key.shape != value.shape:
        return None
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return None  # torch's kernel would round it
    column = int(positions[0]) - first
    together = torch.equal(positions, torch.arange(first + column, first + column + tokens))
    if not together or first + column < 0 or column < 0 or column + tokens > length:
        return None
    admitted = None
    if mask is not None:
        part = mask[..., column : column + tokens]
        if part.dtype == torch.bool:
            part = torch.zeros(part.shape, dtype=query.dtype).masked_fill_(~part, -math.inf)
        admitted = (part > -math.inf).any(-1)
        mask = part
    out, sums = flash_attention_cpu(query, key, value, mask, scale)
    if not bool((sums.abs() < _LARGEST_SUM).all()):  # nan as well
        return None
    if admitted is not None:
        sums = sums.masked_fill(~admitted, -math.inf)
    return _Dense(out.contiguous(), sums.contiguous())
