"""What the figures were measured on."""

import pathlib
import platform
from typing import Final

import psutil
import torch

from decoquant_compile.kernels import cpu

_FLAGS: Final = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_int8")


def describe() -> dict[str, str | int]:
    """CPU, instruction set, kernels in use, cores, memory, pages, GPU and versions, by name."""
    kernels = cpu.kernels()
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instructions": " ".join(flag for flag in _FLAGS if flag in _cpuinfo("flags").split()),
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": "plain PyTorch" if kernels is None else kernels.level,
        "cores": psutil.cpu_count(logical=True) or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "huge_pages": _huge_pages(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def summary(machine: dict[str, str | int]) -> str:
    """`machine` on two lines, and its GPU."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {int(machine['memory_bytes']) / 2**30:.0f} GiB, "
        f"2 MB pages: {machine['huge_pages']}, torch {machine['torch']} ({machine['torch_instructions']})\n"
        f"instruction set: {machine['instructions'] or 'not known'}; our kernels: {machine['kernels']}"
        + ("" if machine["gpu"] == "none" else f"\nGPU: {machine['gpu']}")
    )


def _cpuinfo(field: str) -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def _huge_pages() -> str:
    """The system's setting for transparent huge pages: the word in brackets."""
    try:
        text = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "not known"
    return text.partition("[")[2].partition("]")[0] or "not known"
