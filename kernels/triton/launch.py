"""Launches of the Triton kernels, with the arguments of `decoquant_compile.kernels.reference`.

Nothing here looks at the contents of a tensor. `wrap` makes a kernel launchable: `torch.library.wrap_triton` where
torch may be tracing (so Inductor sees the launches and places them), a `build.Build` to compile for a GPU that is not
there, an interpreter in tests.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from decoquant_compile.kernels import codec, tiles
from decoquant_compile.kernels.format import Format, Layout
from decoquant_compile.kernels.triton import attend as kernels

Wrap = Callable[[Any], Any]

HEAD_DIM_MAX: Final = 256
SETS_MAX: Final = 126
"""More are no tags of columns."""

PROGRAMS: Final = 1024
"""Programs that a launch of `split` aims at: several for each multiprocessor."""

SHARES_MAX: Final = 64
SHARE_TOKENS: Final = 256
"""A share of the tokens is at least so large."""

_DTYPES: Final = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_PRECISION: Final = {True: "tf32x3", False: "ieee"}
"""Of products in float32: three in tf32 are as good; AMD's matrix units have float32."""

_LOG2E: Final = math.log2(math.e)

REGISTERS: Final = {True: {"maxnreg": 255}, False: {}}
"""Options by `ptx`: left to itself ptxas may spill for the sake of one more program on a multiprocessor. Launches that
Inductor places lose this option (torch 2.13)."""

HALF: Final = {True: {"maxnreg": 128}, False: {}}
"""Likewise for kernels of eight warps that need no more, so that two of their programs fit."""


class _Side:
    """A state as kernels take it: offsets and sizes."""

    def __init__(self, form: Format, layout: Layout) -> None:
        count = layout.planes
        offsets = [offset for offset, _, _ in layout.spans]
        sizes = [shape for _, _, shape in layout.spans]
        self.raw = offsets[2]
        self.codes = offsets[3] if count else 0
        self.high = offsets[4] if count > 1 else 0
        names = (
            "gains", "epochs", "means", "scales", "average", "deviation", "weights", "energy",
            "sinks", "sink_positions", "window", "window_positions",
        )  # fmt: skip
        at = dict(zip(names, offsets[3 + count :], strict=True))
        size = dict(zip(names, sizes[3 + count :], strict=True))
        self.gains, self.epochs, self.means, self.scales = (at[name] for name in names[:4])
        self.sinks, self.sink_positions = at["sinks"], at["sink_positions"]
        self.window, self.window_positions = at["window"], at["window_positions"]
        self.sets = size["scales"][1]
        self.sink_count, self.window_size = size["sinks"][2], size["window"][2]
        self.bits, self.dim = form.bits, form.head_dim
        self.coded = form.bits != 16
        self.channels = tiles.padded(form.role, form.bits, form.head_dim) if self.coded else form.head_dim
        self.padded = max(16, triton.next_power_of_2(self.channels))
        self.steps = codec.steps(form.bits) if self.coded else 1.0
        self.width = codec.planes(form.bits)[0] if self.coded else 16

    @property
    def places(self) -> int:
        """Places of keys along a product of codes: whole rows of words in fours, at least 32 for the matrix unit."""
        rows = triton.next_power_of_2(max(self.channels * self.width // 32, self.width, 4))
        return int(rows * 32 // self.width)


def serves(query: Tensor, key: Tensor, value: Tensor, key_form: Format, value_form: Format) -> bool:
    """Whether the kernels take such operands; if not, the reference does."""
    dtypes = (query.dtype, key.dtype, value.dtype)
    return (
        all(dtype in _DTYPES for dtype in dtypes)
        and key_form.dtype == value_form.dtype
        and max(key_form.head_dim, value_form.head_dim) <= HEAD_DIM_MAX
    )


def _scratch(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


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
    key_form: Format,
    value_form: Format,
    *,
    sink: Tensor | None = None,
    sequences: int | None = None,
    wrap: Wrap = torch.library.wrap_triton,
    ptx: bool = torch.version.hip is None,
) -> Tensor:
    """`reference.attend`.

    Args:
        sink: float32 ``[query heads]``: a logit per head that joins the softmax and has no value.
        sequences: of the caches; None: as many as attend.
        wrap: see the module.
        ptx: for NVIDIA, with inline assembly and all registers that a thread can have.
    """
    slots, first, length = int(slots), int(first), int(length)
    batch, heads, tokens = (int(size) for size in key.shape[:3])
    query_heads, queries = int(query.shape[1]), int(query.shape[2])
    groups = query_heads // heads
    of_all = batch if sequences is None else int(sequences)
    k, v = (_Side(form, form.layout(of_all, heads, slots)) for form in (key_form, value_form))
    out = torch.empty((batch, query_heads, queries, v.dim), dtype=query.dtype, device=query.device)
    if length == 0 or out.numel() == 0:
        return out.zero_()
    if max(k.sets, v.sets) > SETS_MAX:
        raise ValueError(f"the kernels tell at most {SETS_MAX} parameter sets apart, got {max(k.sets, v.sets)}")

    rows = max(4 if ptx else 16, min(16, triton.next_power_of_2(groups * queries)))
    row_groups = -(-groups * queries // rows)
    programs = batch * heads * row_groups
    capacity = tiles.capacity(slots)
    shares = max(1, min(PROGRAMS // programs, SHARES_MAX, capacity // SHARE_TOKENS))
    new_shares = max(1, min(8, tokens // 256))
    parts = 2 * shares + new_shares

    kind, strides = 0, [0, 0, 0, 0]
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        strides = [0 if size == 1 else step for size, step in zip(mask.shape[:3], mask.stride(), strict=False)]
        strides.append(mask.stride(3))
    merged = kind == 1 and strides[1] == strides[2] == 0
    natural = kind == 2  # in units of log 2 the least number would become -inf
    scale = k.dim**-0.5 if scale is None else scale
    folded_scale = scale if softcap is not None or natural else scale * _LOG2E
    masking = mask if mask is not None else query
    mode = {"SOFTCAP": softcap is not None, "NATURAL": natural}
    precision = _PRECISION[ptx]
    coded, wide = k.coded and v.coded, max(k.padded, v.padded) > 128
    # One warp has no other to wait for, while its sums fit its registers.
    if ptx and coded and rows <= 8:
        warps = 2 if wide else 1
    else:
        warps = 8 if wide else 4
    # AMD's larger matrix instruction pads more rows, in registers.
    limit = REGISTERS[ptx] if ptx else {"matrix_instr_nonkdim": 16}
    # Codes are copied one tile ahead, where that spills nothing: with more rows there are no registers to spare, and
    # AMD's copies pass through registers. Deeper buys nothing, as several programs share a multiprocessor.
    stages = 2 if ptx and coded and rows == 4 else 1
    capped = 0.0 if softcap is None else softcap
    # The cosines of a head size that is no power of two take registers: twice the warps have half as many each.
    folding = {"num_warps": 4}
    if k.dim & (k.dim - 1):
        folding = {"num_warps": 8, **(HALF[ptx] if wide else {})}

    tags = _scratch(query, batch, length, dtype=torch.int16)
    columns = _scratch(query, max(1, tokens), dtype=torch.int32)
    part = _scratch(query, programs * parts * rows, v.padded, dtype=torch.float32)
    peaks, sums = (_scratch(query, programs * parts, rows, dtype=torch.float32) for _ in range(2))
    sets = _scratch(query, programs * parts, dtype=torch.int32)

    block = 1024
    wrap(kernels.plan)[(-(-length // block) + -(-tokens // block), batch)](
        key_state, value_state, positions, masking, tags, columns,
        slots, first, length, tokens, capacity, strides[0], strides[3],
        k.epochs, k.sink_positions, k.window_positions, v.epochs, v.sink_positions, v.window_positions,
        K_BITS=k.bits, V_BITS=v.bits, K_SINKS=k.sink_count, K_WINDOW=k.window_size,
        V_SINKS=v.sink_count, V_WINDOW=v.window_size, MASKED=merged, BLOCK=block, num_warps=4,
    )  # fmt: skip
    query_strides = query.stride()
    folded, factors = query, query
    if k.coded:
        folded = _scratch(query, programs * k.sets * rows * 2, k.places, dtype=torch.int8)
        factors = _scratch(query, programs * k.sets * 2, rows, dtype=torch.float32)
        wrap(kernels.fold)[(batch * heads, k.sets, row_groups)](
            query, key_state, folded, factors,
            heads, queries, groups, *query_strides, k.means, k.scales, k.sets, folded_scale,
            D=k.dim, PLACES=k.places, WIDTH=k.width, ROWS=rows, STEPS=k.steps, BLOCK=16,
            PRECISION=precision, **folding,
        )  # fmt: skip
    wrap(kernels.split)[(shares, batch * heads, row_groups)](
        query, key_state, value_state, masking, tags, folded, factors, part, peaks, sums, sets,
        heads, queries, groups, slots, capacity, first, length, *query_strides, *strides,
        k.codes if k.coded else k.raw, k.high, k.gains, v.codes if v.coded else v.raw, v.high, v.gains, v.scales,
        k.sets, v.sets, folded_scale, capped, parts,
        KD=k.dim, KP=k.padded, K_CHANNELS=k.channels, PLACES=k.places, K_BITS=k.bits,
        VD=v.dim, VP=v.padded, V_CHANNELS=v.channels, V_BITS=v.bits, V_STEPS=v.steps,
        DTYPE=_DTYPES[key_form.dtype], ROWS=rows, MASK_KIND=0 if merged else kind, PTX=ptx, PRECISION=precision,
        STAGES=stages, **mode, num_warps=warps, num_stages=1, **limit,
    )  # fmt: skip
    alike = query.dtype == key.dtype == value.dtype
    wrap(kernels.exact)[(new_shares, batch * heads, row_groups)](
        query, key_state, value_state, key, value, columns, tags, masking, part, peaks, sums, sets,
        heads, queries, groups, tokens, slots, capacity, first, length, scale, capped, parts, 2 * shares,
        *query_strides, *key.stride(), *value.stride(), *strides,
        k.raw, k.codes, k.high, k.gains, k.epochs, k.means, k.scales,
        k.sinks, k.sink_positions, k.window, k.window_positions,
        v.raw, v.codes, v.high, v.gains, v.epochs, v.means, v.scales,
        v.sinks, v.sink_positions, v.window, v.window_positions, k.sets, v.sets,
        KD=k.dim, KP=k.padded, K_CHANNELS=k.channels, K_BITS=k.bits, K_STEPS=k.steps,
        K_SINKS=k.sink_count, K_WINDOW=k.window_size,
        VD=v.dim, VP=v.padded, V_CHANNELS=v.channels, V_BITS=v.bits, V_STEPS=v.steps,
        V_SINKS=v.sink_count, V_WINDOW=v.window_size,
        DTYPE=_DTYPES[key_form.dtype], NEW=_DTYPES[query.dtype] if alike else tl.float32, ROWS=rows,
        MASK_KIND=kind, PRECISION=precision, **mode,
        num_warps=8, num_stages=1, **limit,
    )  # fmt: skip
    channels = min(32, v.padded)
    wrap(kernels.combine)[(batch * heads, row_groups, v.padded // channels)](
        part, peaks, sums, sets, query if sink is None else sink, value_state, out,
        heads, queries, groups, parts, v.scales, v.sets,
        VD=v.dim, VP=v.padded, CODED=v.coded, ROWS=rows, PARTS=triton.next_power_of_2(parts),
        HAS_SINK=sink is not None, NATURAL=natural, BLOCK=channels, PRECISION=precision,
        num_warps=8, num_stages=1, **(HALF[ptx] if v.coded else {}),
    )  # fmt: skip
    return out


def dequantise(
    state: Tensor,
    batch: int,
    heads: int,
    slots: int,
    form: Format,
    first: int = 0,
    length: int | None = None,
    start: Tensor | None = None,
    *,
    wrap: Wrap = torch.library.wrap_triton,
    ptx: bool = torch.version.hip is None,
) -> Tensor:
    """`reference.dequantise` from the slot ``first + start`` on; see `attend`. What `start` is only the GPU knows."""
    batch, heads, slots = int(batch), int(heads), int(slots)
    length = slots if length is None else length
    s = _Side(form, form.layout(batch, heads, slots))
    out = torch.empty((batch, heads, length, s.dim), dtype=form.dtype, device=state.device)
    wrap(kernels.dequantise)[(-(-length // 32), batch * heads)](
        state, out, state if start is None else start, first, length, heads, slots, tiles.capacity(slots), s.sets,
        s.raw, s.codes, s.high, s.gains, s.epochs, s.means, s.scales,
        s.sinks, s.sink_positions, s.window, s.window_positions,
        HAS_START=start is not None,
        D=s.dim, DP=s.padded, CHANNELS=s.channels, BITS=s.bits, STEPS=s.steps,
        SINKS=s.sink_count, WINDOW=s.window_size, KEY=form.role == "key", DTYPE=_DTYPES[form.dtype],
        LIMIT=torch.finfo(form.dtype).max, PRECISION=_PRECISION[ptx], num_warps=8, num_stages=1, **REGISTERS[ptx],
    )  # fmt: skip
    return out
