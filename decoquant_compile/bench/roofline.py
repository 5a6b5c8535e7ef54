"""How much of a GPU's bandwidth the decode kernel can use at best, told by its machine code: no GPU is needed.

A token of the cache, keys and values of one KV head, costs its bytes and the instructions of the loop over packed
tokens. A multiprocessor has a share of the bandwidth and issues so many instructions a clock, of which those of the
integer pipe fewer: the slowest of the three is the limit. Latency is taken as hidden and caches as cold; the other
kernels of a step, whose work does not grow with the context or is small beside this, are left out, and so is the
matrix unit, which for the products of four query heads is busy for less time than it takes to issue them.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from decoquant_compile.bench import cuda
from decoquant_compile.bench.attention import Settings, Shape, Step
from decoquant_compile.kernels.codec import Role
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.tiles import TILE
from decoquant_compile.kernels.triton import launch
from decoquant_compile.kernels.triton.build import TARGETS, Build, Statistics, size, statistics

CONTEXT: Final = 32768
"""Tokens over which bytes per token are averaged."""


@dataclass(frozen=True)
class Gpu:
    """Public figures of a GPU.

    Attributes:
        name: as torch's name of the device contains it.
        target: a name in `build.TARGETS`.
        bandwidth: of the memory, in bytes per second.
        multiprocessors: or compute units.
        clock: the highest, in Hz.
        issue: instructions of a warp that a multiprocessor issues per clock.
        integer: of these, integer, logic, compare and select instructions.
        registers: 32-bit registers of a multiprocessor.
        shared: bytes of shared memory of a multiprocessor.
        warps: that a multiprocessor holds.
        source: of the figures.
    """

    name: str
    target: str
    bandwidth: float
    multiprocessors: int
    clock: float
    issue: float
    integer: float
    registers: int
    shared: int
    warps: int
    source: str


# Issue and pipes of NVIDIA's: four schedulers, one instruction each a clock; 64 results of the integer pipe a clock
# ("Throughput of Native Arithmetic Instructions", CUDA C++ Programming Guide, 8.0 and 9.0; taken for 10.0 too).
# AMD: four SIMD units of 16 lanes, on which a wavefront of 64 takes four clocks (CDNA 3 ISA and white paper).
GPUS: Final = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "sm_80", 2.039e12, 108, 1.41e9, 4, 2, 65536, 164 * 1024, 64,
            "NVIDIA A100 80GB SXM data sheet; NVIDIA A100 Tensor Core GPU Architecture"),
        Gpu("H100", "sm_90", 3.35e12, 132, 1.98e9, 4, 2, 65536, 228 * 1024, 64,
            "NVIDIA H100 SXM data sheet (67 TFLOPS in float32: 1.98 GHz); NVIDIA H100 Tensor Core GPU Architecture"),
        Gpu("H200", "sm_90", 4.8e12, 132, 1.98e9, 4, 2, 65536, 228 * 1024, 64,
            "NVIDIA H200 SXM data sheet (67 TFLOPS in float32: 1.98 GHz)"),
        Gpu("B200", "sm_100", 7.7e12, 148, 1.98e9, 4, 2, 65536, 228 * 1024, 64,
            "NVIDIA HGX B200 data sheet (75 TFLOPS in float32: 1.98 GHz)"),
        Gpu("MI300X", "gfx942", 5.3e12, 304, 2.1e9, 4, 1, 4 * 512 * 64, 64 * 1024, 32,
            "AMD Instinct MI300X data sheet; AMD CDNA 3 white paper"),
    )
}  # fmt: skip

_PRODUCTS: Final = ("IMMA", "IGMMA", "v_mfma_i32")
"""Products of 8-bit integers."""
_INTEGER: Final = re.compile(
    r"(PRMT|SHF|LOP3|LEA|IADD3|VIADD|ISETP|SEL|FSEL|FSETP|FMNMX|VIMNMX|IABS|PLOP3|LOP|IMNMX|SGXT|BMSK|HMNMX2)\d*$"
    r"|v_(?!mfma|accvgpr)\w+"  # AMD: all vector instructions share a pipe
)


@dataclass(frozen=True)
class Point:
    """One width of the cache on one GPU; figures per token are of keys and values of one KV head.

    Attributes:
        gpu: key of `GPUS`.
        bits: width of both caches.
        nbytes: bytes that a token takes.
        dense: bytes that a token of a bfloat16 cache takes.
        instructions: of warps, in the loop over packed tokens, per token.
        integer: of these on the integer pipe.
        registers: of a thread.
        spills: see `Statistics`.
        shared: bytes of shared memory of a program.
        programs: that a multiprocessor holds at once.
        asynchronous: 16-byte asynchronous copies in a turn of the loop.
        share: of the bandwidth, at most.
        bound: what limits it.
        measured: share of the bandwidth that was reached on this machine; None where there is no such GPU.
    """

    gpu: str
    bits: int
    nbytes: float
    dense: float
    instructions: float
    integer: float
    registers: int
    spills: int
    shared: int
    programs: int
    asynchronous: int
    share: float
    bound: str
    measured: float | None = None

    @property
    def speedup(self) -> float:
        """How many times faster than reading a bfloat16 cache at the full bandwidth, at most."""
        return self.share * self.dense / self.nbytes


def stored_bytes(bits: int, heads: int, head_dim: int) -> float:
    """Bytes per token and KV head that attention reads of long caches: codes, gains, parameter sets of tokens."""
    roles: tuple[Role, Role] = ("key", "value")
    total = 0
    for role in roles:
        layout = Format(role, bits, head_dim, torch.bfloat16).layout(1, heads, CONTEXT)
        sections = layout.views(torch.empty(layout.nbytes, dtype=torch.uint8))
        total += sum(x.nbytes for x in (*sections.planes, sections.gains, sections.epochs, sections.raw))
    return total / CONTEXT / heads


def build(target: str, bits: int, shape: Shape) -> Statistics:
    """The kernel that attends to packed tokens, as a decode step launches it on such a GPU."""
    roles: tuple[Role, Role] = ("key", "value")
    key_form, value_form = (Format(role, bits, shape.head_dim, torch.bfloat16) for role in roles)
    key_state, value_state = (
        torch.empty(form.layout(shape.batch, shape.heads, CONTEXT).nbytes, dtype=torch.uint8)
        for form in (key_form, value_form)
    )
    step = Step.random(shape, CONTEXT)
    builds = Build(target, only=("split",))
    launch.attend(
        step.query, key_state, value_state, step.key, step.value, step.positions, step.mask, None, None, CONTEXT, 0,
        CONTEXT, key_form, value_form, wrap=builds, ptx=TARGETS[target].backend == "cuda",
    )  # fmt: skip
    (kernel,) = builds.kernels
    return statistics(kernel)


def loop(found: Statistics) -> Mapping[str, int]:
    """Instructions of a turn of the loop over packed tokens."""
    return next((turn for name in _PRODUCTS if (turn := found.loop(name))), {})


def programs(gpu: Gpu, found: Statistics) -> int:
    """Programs that a multiprocessor holds at once."""
    threads = TARGETS[gpu.target].warp_size * found.warps
    by_registers = gpu.registers // (-(-found.registers // 8) * 8 * threads)
    by_memory = gpu.shared // (found.shared + 1024)
    return min(by_registers, by_memory, gpu.warps // found.warps)


def predict(gpu: Gpu, bits: int, shape: Shape, found: Statistics) -> Point:
    """What `found`, a `build` for this GPU, lets expect.

    Raises:
        ValueError: there is no loop with products of codes in it.
    """
    turn = loop(found)
    if not turn:
        raise ValueError(f"the kernel of {bits} bits for {gpu.target} has no loop with products of codes")
    instructions = found.warps * size(turn) / TILE
    integer = found.warps * sum(count for name, count in turn.items() if _INTEGER.match(name)) / TILE
    nbytes = stored_bytes(bits, shape.heads, shape.head_dim)
    seconds = {
        "memory": nbytes / (gpu.bandwidth / gpu.multiprocessors),
        "issue": instructions / (gpu.issue * gpu.clock),
        "integer pipe" if gpu.target.startswith("sm") else "vector pipe": integer / (gpu.integer * gpu.clock),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return Point(
        gpu=gpu.name,
        bits=bits,
        nbytes=nbytes,
        dense=2 * shape.head_dim * torch.bfloat16.itemsize,
        instructions=instructions,
        integer=integer,
        registers=found.registers,
        spills=found.spills,
        shared=found.shared,
        programs=programs(gpu, found),
        asynchronous=turn.get("LDGSTS.128", 0),
        share=seconds["memory"] / seconds[bound],
        bound=bound,
    )


def present() -> Gpu | None:
    """The GPU of this machine, if it is one of `GPUS`."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().replace("-", " ").split()
    return next((gpu for gpu in GPUS.values() if gpu.name in words), None)


def measured(gpu: Gpu, shape: Shape, bits: Sequence[int], tell: Callable[[str], object]) -> dict[int, float]:
    """Share of the bandwidth of `gpu`, which is the one of this machine, that whole attentions reach, by bits."""
    rows = cuda.measure(shape, CONTEXT, Settings(bits=tuple(bits), families=("attend",)), tell)
    speeds = {int(row.arm.removeprefix("attend-")): row.speed for row in rows}
    return {width: speed / gpu.bandwidth for width, speed in speeds.items() if speed is not None}


def run(shape: Shape, bits: Sequence[int], tell: Callable[[str], object]) -> list[Point]:
    """Predicts for all GPUs, and measures on the one that is there."""
    points = []
    here = present()
    for target in dict.fromkeys(gpu.target for gpu in GPUS.values()):
        for width in bits:
            tell(f"building {width} bits for {target}")
            found = build(target, width, shape)
            points += [predict(gpu, width, shape, found) for gpu in GPUS.values() if gpu.target == target]
    points.sort(key=lambda point: list(GPUS).index(point.gpu))
    shares = {} if here is None else measured(here, shape, bits, tell)
    return [
        replace(point, measured=shares.get(point.bits)) if here is not None and point.gpu == here.name else point
        for point in points
    ]


# --------------------------------------------------------------------------------------------------------------- output


_Columns = dict[str, Callable[[Point], str]]

_KERNEL: Final[_Columns] = {
    "target": lambda p: GPUS[p.gpu].target,
    "bits": lambda p: str(p.bits),
    "bytes": lambda p: f"{p.nbytes:.1f}",
    "of bf16": lambda p: f"{p.nbytes / p.dense:.3f}",
    "instr": lambda p: f"{p.instructions:.1f}",
    "integer": lambda p: f"{p.integer:.1f}",
    "regs": lambda p: str(p.registers),
    "spills": lambda p: str(p.spills),
    "shared": lambda p: str(p.shared),
    "copies": lambda p: str(p.asynchronous),
}
"""What is the same for all GPUs of one target; copies are asynchronous ones of 16 bytes in a turn of the loop."""

_PREDICTION: Final[_Columns] = {
    "GPU": lambda p: p.gpu,
    "bits": lambda p: str(p.bits),
    "programs": lambda p: str(p.programs),
    "predicted": lambda p: f"{p.share:.0%}",
    "bound by": lambda p: p.bound,
    "x bf16": lambda p: f"{p.speedup:.1f}",
    "measured": lambda p: "not measured" if p.measured is None else f"{p.measured:.0%}",
}

_TITLES: Final = {
    "The kernel, per token: keys and values of one KV head": _KERNEL,
    "Share of each GPU's bandwidth: predicted, at most, and measured": _PREDICTION,
}


def _rows(columns: _Columns, points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Rows of cells, equal ones once."""
    return list(dict.fromkeys(tuple(cell(point) for cell in columns.values()) for point in points))


def tables(points: Sequence[Point]) -> list[Table]:
    """All points, as rich prints them."""
    shown = []
    for title, columns in _TITLES.items():
        table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for name in columns:
            words = name in ("target", "GPU", "bound by", "measured")
            table.add_column(name, justify="left" if words else "right", no_wrap=words)
        for row in _rows(columns, points):
            table.add_row(*map(Text, row))
        shown.append(table)
    return shown


def markdown(points: Sequence[Point], shape: Shape) -> str:
    """All points, as a page in Markdown."""
    parts = [
        f"# Roofline of the decode kernel\n\n{shape.groups} query heads for each KV head, {shape.head_dim} channels.",
        (__doc__ or "").strip(),
    ]
    for title, columns in _TITLES.items():
        lines = [tuple(columns), ("---",) * len(columns), *_rows(columns, points)]
        parts += [f"## {title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    gpus = [GPUS[name] for name in dict.fromkeys(point.gpu for point in points)]
    figures = [
        f"- {gpu.name} ({gpu.target}): {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.multiprocessors} multiprocessors, "
        f"{gpu.clock / 1e9:.2f} GHz, {gpu.issue:g} instructions per clock, {gpu.integer:g} of them on the integer pipe "
        f"({gpu.source})"
        for gpu in gpus
    ]
    parts += ["## Figures of the GPUs", "\n".join(figures)]
    return "\n\n".join(parts) + "\n"


def document(points: Sequence[Point], shape: Shape) -> dict[str, Any]:
    """All points, for JSON."""
    return {
        "benchmark": "roofline",
        "shape": asdict(shape),
        "gpus": [asdict(GPUS[name]) for name in dict.fromkeys(point.gpu for point in points)],
        "points": [asdict(point) | {"speedup": point.speedup} for point in points],
    }


def write(path: pathlib.Path, points: Sequence[Point], shape: Shape) -> None:
    """Writes all points as ``.json`` or as a page ``.md``."""
    if path.suffix == ".json":
        path.write_text(json.dumps(document(points, shape), indent=1) + "\n")
    else:
        path.write_text(markdown(points, shape))
