"""Ahead-of-time builds of Triton kernels, for GPUs that need not be there, and what the machine code costs.

A `Build` takes the place of a launch: it specialises a kernel on the arguments just as a launch on that GPU would,
compiles it, and runs nothing. Only that needs no driver in Triton (3.8): `JITFunction.run` asks one for the target.
"""

import collections
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, KernelInterface, create_function_from_signature

from decoquant_compile._compat import pack_launch

TARGETS: Final[Mapping[str, GPUTarget]] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100 and H200, B200, MI300."""


class Build:
    """Compiles what it is asked to launch: ``build(kernel)[grid](*args, **constants)``.

    Args:
        target: a name in `TARGETS`.
        only: names of the kernels to compile, if not all; launches of others do nothing.
        options: compiler options that override those of the launch, such as ``maxnreg``.
    """

    def __init__(self, target: str, only: Sequence[str] | None = None, **options: object) -> None:
        self.target = TARGETS[target]
        self.only = only
        self.options = options
        self.kernels: list[CompiledKernel] = []
        """What was compiled so far, in the order of the launches."""

    def __call__(self, kernel: JITFunction) -> KernelInterface:
        """What takes a launch of `kernel`."""
        return _Launch(self, kernel)


class _Launch(KernelInterface):
    def __init__(self, build: Build, kernel: JITFunction) -> None:
        self.build, self.kernel = build, kernel

    def run(self, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> CompiledKernel | None:  # noqa: ARG002
        build, kernel = self.build, self.kernel
        if build.only is not None and kernel.fn.__name__ not in build.only:
            return None
        backend = make_backend(build.target)
        kwargs |= {**build.options, "debug": False, "instrumentation_mode": ""}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        options, signature, constants, attributes = pack_launch(kernel, backend, kwargs, bind(*args, **kwargs))
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=build.target, options=options.__dict__)
        build.kernels.append(compiled)
        return compiled


@dataclass(frozen=True)
class Loop:
    """A loop in machine code.

    Attributes:
        start: address or place of its first instruction.
        stop: of its last one.
        instructions: as of `Statistics`.
    """

    start: int
    stop: int
    instructions: Mapping[str, int]

    def contains(self, other: "Loop") -> bool:
        """Whether the other loop is a part of this one."""
        return self is not other and self.start <= other.start and other.stop <= self.stop


@dataclass(frozen=True)
class Statistics:
    """What a compiled kernel needs and does.

    Attributes:
        registers: of a thread; for AMD vector registers.
        spills: bytes that a thread spills (NVIDIA), or vector registers (AMD).
        shared: bytes of shared memory of a program.
        warps: of a program.
        instructions: of the machine code by name, without modifiers, such as ``HMMA``; for NVIDIA also with those of
            asynchronous copies: ``LDGSTS.128``.
        loops: what branches back, the longest first.
        scalar_spills: scalar registers (AMD) that are spilled, into lanes of vector registers, not to memory.
    """

    registers: int
    spills: int
    shared: int
    warps: int
    instructions: Mapping[str, int] = field(repr=False)
    loops: tuple[Loop, ...] = field(repr=False)
    scalar_spills: int = 0

    def loop(self, instruction: str) -> Mapping[str, int]:
        """Instructions of the longest innermost loop with one whose name begins so; none if there is no such loop."""
        having = [loop for loop in self.loops if any(name.startswith(instruction) for name in loop.instructions)]
        inner = (loop for loop in having if not any(map(loop.contains, having)))
        return next((loop.instructions for loop in inner), {})


def size(instructions: Mapping[str, int]) -> int:
    """How many instructions these are, those that have a second name counted once."""
    return sum(count for name, count in instructions.items() if "." not in name)


def statistics(compiled: CompiledKernel) -> Statistics:
    """Statistics of a compiled kernel; for NVIDIA GPUs of the code that ptxas makes of it."""
    return _nvidia(compiled) if compiled.metadata.target.backend == "cuda" else _amd(compiled)


def _run(*command: str) -> tuple[str, str]:
    result = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return result.stdout, result.stderr


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _count(code: list[str]) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for instruction in code:
        name = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]
        counts[name.split(".")[0]] += 1
        if name.startswith("LDGSTS") and ".128" in name:
            counts["LDGSTS.128"] += 1
    return dict(counts.most_common())


def _loops(code: list[tuple[int, str]], spans: list[tuple[int, int]]) -> tuple[Loop, ...]:
    """The loops of those spans of addresses."""
    spans.sort(key=lambda span: span[0] - span[1])
    return tuple(Loop(a, b, _count([text for address, text in code if a <= address <= b])) for a, b in spans)


def _nvidia(compiled: CompiledKernel) -> Statistics:
    arch = compiled.metadata.target.arch
    assembler = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = f"{folder}/kernel.ptx", f"{folder}/kernel.cubin"
        with open(ptx, "w") as file:  # noqa: PTH123
            file.write(compiled.asm["ptx"])
        with open(cubin, "wb") as file:  # noqa: PTH123
            file.write(compiled.kernel)
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        # As Triton calls it: registers and spills are otherwise known to the driver alone.
        _, log = _run(assembler.path, "-v", "--regAllocOptLevel=2", f"--gpu-name={name}", ptx, "-o", "/dev/null")
        listing, _ = _run(knobs.nvidia.cuobjdump.path, "-sass", cubin)
    code = [(int(match[1], 16), match[2].strip()) for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", listing)]
    spans = []
    for address, instruction in code:
        branch = re.search(r"BRA\S*\s+.*?(0x[0-9a-f]+)", instruction)
        if branch and (start := int(branch[1], 16)) < address:
            spans.append((start, address))
    return Statistics(
        registers=_number(r"Used (\d+) registers", log),
        spills=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        instructions=_count([instruction for _, instruction in code]),
        loops=_loops(code, spans),
    )


def _amd(compiled: CompiledKernel) -> Statistics:
    text = compiled.asm["amdgcn"]
    code: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    spans = []
    for label, instruction, branch in re.findall(
        r"^(\.LBB\w+):|^\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)(?:\s+(\.LBB\w+))?", text, re.MULTILINE
    ):
        if label:
            labels[label] = len(code)
            continue
        if branch in labels:
            spans.append((labels[branch], len(code)))
        code.append((len(code), instruction))
    return Statistics(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", text),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        instructions=_count([instruction for _, instruction in code]),
        loops=_loops(code, spans),
        scalar_spills=_number(r"\.sgpr_spill_count:\s+(\d+)", text),
    )
