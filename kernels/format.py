"""What a packed cache looks like: its format and the layout of its single buffer."""

import functools
import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from decoquant_compile.kernels import codec, tiles
from decoquant_compile.kernels.codec import Role

VERSION: Final = 4
"""Of the stored format; part of every key, so that nothing compiled for one version reads another."""

ALIGNMENT: Final = 64
"""Bytes: a cache line and a vector register."""

UNSET: Final = -1
"""A position, start, parameter set or fit that does not exist."""

REFIT_GROWTH: Final = 1.5
"""A sequence is fitted anew whenever its tokens have grown by this factor."""

NO_EPOCH: Final = 255
"""Epoch of a token that was written but not encoded: it has an exact copy among the sinks or in the window."""

# Columns of `Sections.header`
ORIGIN, END = range(2)
# Columns of `Sections.rows`
START, SET, TOTAL, FITTED, COUNT = range(5)

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


class Sections(NamedTuple):
    """Typed views of a state buffer.

    Positions are absolute: they count from the first slot the cache ever had, so that a window that slides only moves
    the origin. Slot ``s`` has position ``origin + s`` and stands at index ``position % slots`` of the slot axes; the
    window is a ring, a token stands at index ``position % window``. With `bits` = 16 only `header` and `raw` are
    in use; otherwise `raw` is empty.
    """

    header: Tensor
    """int64 ``[2]``: ORIGIN, position of slot 0; END, highest position ever written + 1."""
    rows: Tensor
    """int64 ``[batch, 5]``: START, position of the sequence's first token; SET, parameter set in use; TOTAL, tokens
    that entered the statistics since the sequence began; FITTED, TOTAL at its last fit; COUNT, tokens that the
    statistics stand for. START, SET and FITTED are UNSET where there is none."""
    raw: Tensor
    """Cache dtype ``[batch, heads, slots, head_dim]``."""
    planes: tuple[Tensor, ...]
    """uint8 ``[batch, heads, ...]`` each: packed codes in the tiles of `decoquant_compile.kernels.tiles`."""
    gains: Tensor
    """float16 ``[batch, heads, slots]``; negative: never written, or exactly zero."""
    epochs: Tensor
    """uint8 ``[batch, slots]``: the parameter set of each token, or NO_EPOCH."""
    means: Tensor
    """bfloat16 ``[batch, sets, heads, head_dim]`` for keys; no sets for values, which are not centred."""
    scales: Tensor
    """bfloat16 ``[batch, sets, heads, head_dim]``."""
    average: Tensor
    """float32 ``[batch, heads, head_dim]``: channel means. Each fit halves the weight of the tokens before it."""
    deviation: Tensor
    """float32 ``[batch, heads, head_dim]``: sum of squared deviations from `average`."""
    weights: Tensor
    """bfloat16 ``[batch, heads, head_dim]`` for keys: channel weights of the last fit; no heads for values."""
    energy: Tensor
    """float32 ``[batch, heads, head_dim]`` for keys: sum of the squared queries; no heads for values."""
    sinks: Tensor
    """Cache dtype ``[batch, heads, sinks, head_dim]``."""
    sink_positions: Tensor
    """int64 ``[batch, sinks]``, UNSET where empty."""
    window: Tensor
    """Cache dtype ``[batch, heads, window, head_dim]``."""
    window_positions: Tensor
    """int64 ``[batch, window]``, UNSET where empty."""

    def of_first(self, sequences: int) -> "Sections":
        """The same of the first sequences alone."""
        header, rows, raw, planes, *others = self
        mine = (tensor[:sequences] for tensor in others)
        return Sections(header, rows[:sequences], raw[:sequences], tuple(p[:sequences] for p in planes), *mine)


@dataclass(frozen=True)
class Layout:
    """Where the sections of a state lie in its buffer."""

    nbytes: int
    spans: tuple[tuple[int, torch.dtype, tuple[int, ...]], ...]
    """Offset, dtype and shape of each section, the planes of `Sections.planes` one by one."""
    planes: int
    """Number of planes."""
    slots: int
    """Slots of the cache; the slot axes of the sections behind the planes are padded to whole tiles."""
    sets: int
    """Parameter sets of a row."""

    def views(self, buffer: Tensor) -> Sections:
        """Typed views of `buffer`, a contiguous uint8 ``[nbytes]``."""
        if buffer.dtype != torch.uint8 or buffer.shape != (self.nbytes,) or not buffer.is_contiguous():
            raise ValueError(
                f"a state buffer of this format is a contiguous uint8 tensor of {self.nbytes} bytes, "
                f"got {buffer.dtype} {tuple(buffer.shape)}; the format or the number of slots does not belong to it"
            )
        header, rows, raw, *rest = (
            buffer[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for offset, dtype, shape in self.spans
        )
        planes, (gains, epochs, *others) = rest[: self.planes], rest[self.planes :]
        gains, epochs = gains[..., : self.slots], epochs[..., : self.slots]
        return Sections(header, rows, raw, tuple(planes), gains, epochs, *others)

    def clear(self, buffer: Tensor) -> None:
        """Makes `buffer` a fresh cache: every slot never written."""
        self.mark_empty(buffer.zero_())

    def mark_empty(self, buffer: Tensor) -> None:
        """`clear` for a buffer of zeros: memory that is zero anyway is not touched."""
        sections = self.views(buffer)
        sections.rows[:, [START, SET, FITTED]] = UNSET
        sections.gains.fill_(-1)
        sections.scales.fill_(1)  # a set without a fit is still a valid transform
        sections.weights.fill_(1)
        sections.sink_positions.fill_(UNSET)
        sections.window_positions.fill_(UNSET)


@dataclass(frozen=True)
class Format:
    """How the tokens of one cache tensor are stored.

    Attributes:
        role: keys and values are encoded differently.
        bits: 16 stores the cache's own dtype unchanged; 8, 5, 4, 3 and 2 are quantised.
        head_dim: channels per head.
        dtype: the cache's own: float32, bfloat16 or float16.
        sinks: first tokens of each sequence that are also kept in `dtype`; 0 when `bits` is 16.
        window: newest tokens that are also kept in `dtype`; 0 when `bits` is 16.

    Raises:
        ValueError: a field has a value that no state can have.
    """

    role: Role
    bits: int
    head_dim: int
    dtype: torch.dtype
    sinks: int = 4
    window: int = 64

    def __post_init__(self) -> None:
        if self.role not in ("key", "value"):
            raise ValueError(f'role must be "key" or "value", got {self.role!r}')
        if self.bits != 16 and self.bits not in codec.CODED_BITS:
            raise ValueError(f"bits must be one of 16, {', '.join(map(str, codec.CODED_BITS))}, got {self.bits!r}")
        if self.dtype not in _NAMES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        for name, least in (("head_dim", 1), ("sinks", 0), ("window", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.bits == 16:  # everything is exact already
            object.__setattr__(self, "sinks", 0)
            object.__setattr__(self, "window", 0)

    def key(self) -> str:
        """Compact form for operator arguments, such as ``"v4:key:4:128:bfloat16:4:64"``."""
        return f"v{VERSION}:{self.role}:{self.bits}:{self.head_dim}:{_NAMES[self.dtype]}:{self.sinks}:{self.window}"

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(key: str) -> "Format":
        """Inverse of `key`.

        Raises:
            ValueError: not a key, or one of another version.
        """
        version, *fields = key.split(":")
        if version != f"v{VERSION}" or len(fields) != 6:
            raise ValueError(
                f"expected a format key such as {Format('key', 4, 128, torch.bfloat16).key()!r} (version {VERSION}), "
                f"got {key!r}; compile the model again if it was compiled by another version"
            )
        role, bits, head_dim, dtype, sinks, window = fields
        try:
            numbers = [int(field) for field in (bits, head_dim, sinks, window)]
        except ValueError:
            raise ValueError(f"format key {key!r}: bits, head_dim, sinks and window must be integers") from None
        if dtype not in _DTYPES:
            raise ValueError(f"format key {key!r}: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        return Format(role, numbers[0], numbers[1], _DTYPES[dtype], *numbers[2:])  # type: ignore[arg-type]

    def layout(self, batch: int, heads: int, slots: int) -> Layout:
        """Layout of the state of a cache ``[batch, heads, slots, head_dim]``.

        Raises:
            ValueError: a size below 1.
        """
        return _layout(self, batch, heads, slots)


@functools.lru_cache(maxsize=1024)
def _layout(form: Format, batch: int, heads: int, slots: int) -> Layout:
    for name, size in (("batch", batch), ("heads", heads), ("slots", slots)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    coded = form.bits != 16
    kept = tiles.capacity(slots) if coded else 0
    # Refits come at counts that grow so much, so this many sets serve a full cache, and two more an earlier sequence.
    growth = slots / max(1, form.window)  # the first fit comes when a token leaves the window
    sets = max(0, math.ceil(math.log(growth, REFIT_GROWTH))) + 3 if coded else 0
    sinks, window = min(form.sinks, slots), min(form.window, slots)
    channels = (batch, heads, form.head_dim)
    key = form.role == "key"
    packed = tiles.shapes(form.role, form.bits, form.head_dim, slots) if coded else ()
    shapes: list[tuple[torch.dtype, tuple[int, ...]]] = [
        (torch.int64, (2,)),
        (torch.int64, (batch, 5)),
        (form.dtype, (batch, heads, 0 if coded else slots, form.head_dim)),
        *((torch.uint8, (batch, heads, *shape)) for shape in packed),
        (torch.float16, (batch, heads, kept)),
        (torch.uint8, (batch, kept)),
        (torch.bfloat16, (batch, sets if key else 0, heads, form.head_dim)),
        (torch.bfloat16, (batch, sets, heads, form.head_dim)),
        (torch.float32, channels if coded else (batch, 0, form.head_dim)),
        (torch.float32, channels if coded else (batch, 0, form.head_dim)),
        (torch.bfloat16, channels if coded and key else (batch, 0, form.head_dim)),
        (torch.float32, channels if coded and key else (batch, 0, form.head_dim)),
        (form.dtype, (batch, heads, sinks, form.head_dim)),
        (torch.int64, (batch, sinks)),
        (form.dtype, (batch, heads, window, form.head_dim)),
        (torch.int64, (batch, window)),
    ]
    spans = []
    offset = 0
    for dtype, shape in shapes:
        spans.append((offset, dtype, shape))
        offset += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return Layout(offset, tuple(spans), len(packed), slots, sets)
