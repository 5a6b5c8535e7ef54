"""`enable(...)`: whatever `torch.compile` compiles inside uses this backend."""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from decoquant_compile import _compat
from decoquant_compile.backend import Compiled, compile_graph
from decoquant_compile.options import Options
from decoquant_compile.report import Report
from decoquant_compile.runtime import OPEN


@dataclass(frozen=True)
class _Backend:
    """The backend under fixed options; equal options share one object, so that Dynamo finds its graphs again."""

    options: Options
    mode: str | None
    _decoquant_backend: ClassVar[bool] = True

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Compiled:
        patches = Options.parse(None, self.mode)[1]
        return compile_graph(gm, example_inputs, self.options, patches)


@functools.cache
def _backend(options: Options, mode: str | None) -> _Backend:
    return _Backend(options, mode)


@dataclass
class Session:
    """What happened while an `enable(...)` block was open."""

    options: Options
    _report: Report = field(default_factory=Report)

    def report(self) -> Report:
        """Graphs that were compiled or that ran, with each attention and its outcome, and the bytes of the caches."""
        return self._report


@contextlib.contextmanager
def enable(
    *, mode: str | None = None, fullgraph: bool = False, recompile_limit: int = 64, **options: Any
) -> Iterator[Session]:
    """Compile everything that `torch.compile` compiles in this block with packed KV caches.

    The switch (`torch.compiler.set_stance(force_backend=...)`) holds for the whole process while the block is open,
    other threads included. It overrides the backend that a `torch.compile` call names, and drops that call's `mode`,
    `fullgraph` and `options`: give them here. Leaving the block restores everything; caches that were taken over stay
    packed.

    Args:
        mode: a mode of `torch.compile`, such as "reduce-overhead" (CUDA graphs).
        fullgraph: make a graph break an error.
        recompile_limit: Dynamo's per-frame limit of compiled entries while the block is open; each shape takes up to
            two (the first call on a new cache, and later calls). It is never lowered.
        **options: names of `Options`, such as `bits=4`.

    Yields:
        The session; `print(session.report())` shows what was done.

    Raises:
        RuntimeError: another `enable` block is open.
        ValueError: an option is not known or not valid.
    """
    own, inductor = Options.parse(options, mode)
    unknown = [name for name in options if name not in Options.names()]
    if unknown:
        raise ValueError(
            f"option {unknown[0]!r} is Inductor's: pass it to torch.compile(..., backend=decoquant_backend, "
            "options={...}), outside of enable()"
        )
    if OPEN:
        raise RuntimeError("enable() is open already: blocks cannot be nested, close the other one first")
    session = Session(own)
    report = session.report()
    if torch.cuda.is_available() and not inductor.get("triton.cudagraphs"):
        report.notes.append(
            'CUDA graphs are off: this block drops the mode of torch.compile; enable(mode="reduce-overhead")'
        )
    OPEN.append(report)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_compat.dynamo_limits(recompile_limit))
            stack.enter_context(torch.compiler.set_stance("default", force_backend=_backend(own, mode)))
            if fullgraph:
                stack.enter_context(_compat.error_on_graph_break(True))
            yield session
    finally:
        OPEN.remove(report)
    _warn_if_idle(report)


def _warn_if_idle(report: Report) -> None:
    """Never silently unquantised."""
    if not report.graphs:
        warnings.warn(
            "decoquant_compile: nothing was compiled inside enable(), so no cache was packed. Compile the model "
            "(model.forward = torch.compile(model.forward)); on CPU, generate(cache_implementation='static') does not "
            "compile by itself. If it was compiled before, nothing in it was rewritten: explain(model, ...) says why.",
            stacklevel=4,
        )
    elif not report.rewritten:
        reasons = sorted({str(g) for g in report.graphs})
        warnings.warn(
            "decoquant_compile: no attention was rewritten inside enable(), so no cache was packed: "
            + "; ".join(reasons[:8]),
            stacklevel=4,
        )
