"""A compiled graph at run time: looks up or takes over the caches of each call, and keeps handles right in dense graphs."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from decoquant_compile.handle import CacheTensor
from decoquant_compile.report import GraphReport, Report, TakenOver
from decoquant_compile.rewrite import Binding, Probe
from decoquant_compile.takeover import Claim, Obstructed, restore, take_over

log = logging.getLogger(__name__)

# Sessions that are open; a compiled graph tells them that it ran.
OPEN: list[Report] = []

_DENSE_CALLS_BEFORE_RESTORE = 2


def announce(graph: GraphReport) -> None:
    """Tell the open sessions about a graph, once each."""
    for report in OPEN:
        if graph not in report.graphs:
            report.graphs.append(graph)


@dataclass
class DenseGraph:
    """A compiled graph that was not rewritten but takes handles: each call reads them dense and stores what it changed.

    After two such calls the caches are given back their dense tensors, with a warning: a cache that is unpacked at every
    step is slower than one that was never packed.

    Attributes:
        fn: the compiled graph, in Dynamo's calling convention.
        handles: positions of the inputs that are handles.
        report: the graph's report.
    """

    fn: Callable[..., Sequence[object]]
    handles: tuple[int, ...]
    report: GraphReport

    def __call__(self, *args: object) -> Sequence[object]:
        announce(self.report)
        self.report.calls += 1
        return run_dense(self.fn, args, self.handles, self.report)


def run_dense(fn: Callable[..., Sequence[object]], args: Sequence[object], handles: Sequence[int], report: GraphReport) -> Sequence[object]:
    """Run a dense graph over handles: each is read whole, and the tokens that the graph changed are stored."""
    full = list(args)
    held: list[tuple[CacheTensor, Tensor, Tensor]] = []
    for i in handles:
        tensor = full[i]
        if not isinstance(tensor, CacheTensor):
            continue
        dense = tensor.dense()
        full[i] = dense
        held.append((tensor, dense, dense.clone()))
    result = fn(*full)
    for tensor, after, before in held:
        tensor.store_changes(before, after)
        tensor.dense_calls += 1
    worn = [t for t, _, _ in held if t.dense_calls >= _DENSE_CALLS_BEFORE_RESTORE]
    if held:
        report.dense_calls += 1
        report.obstacle = report.obstacle or "a graph that was not rewritten reads a packed cache"
    if worn:
        for tensor in worn:
            restore(tensor)
        warnings.warn(
            f"decoquant_compile: {len(worn)} packed cache tensors were read by a graph that could not be rewritten "
            f"({report}); they are dense again. See report() or explain() for the reasons.",
            stacklevel=2,
        )
    return result


@dataclass
class PackedGraph:
    """A rewritten, compiled graph.

    Attributes:
        fn: the compiled graph; takes the `kept` inputs, then a state buffer for each binding.
        kept: positions of Dynamo's inputs that the graph still takes.
        bindings: its cache tensors.
        probe: tells what a cache holds that is not ours yet.
        original: Dynamo's graph, to run densely where a cache cannot be taken over.
        report: the graph's report.
        handles: kept inputs that are handles which this graph does not understand.
    """

    fn: Callable[..., Sequence[object]]
    kept: tuple[int, ...]
    bindings: tuple[Binding, ...]
    probe: Probe
    original: fx.GraphModule
    report: GraphReport
    handles: tuple[int, ...] = ()
    _dense: Callable[..., Sequence[object]] | None = field(default=None, init=False)

    def __call__(self, *args: object) -> Sequence[object]:
        if OPEN:
            announce(self.report)
        self.report.calls += 1
        foreign = [b for b in self.bindings if not _held(args[b.index], b)]
        if foreign:
            try:
                self._take_over(args, foreign)
            except Obstructed as error:
                return self._run_dense(args, str(error))
        buffers = [args[b.index]._state.buffer for b in self.bindings]  # type: ignore[attr-defined]
        if self.handles:
            position = {index: at for at, index in enumerate(self.kept)}
            kept = [args[i] for i in self.kept]
            return run_dense(
                lambda *a: self.fn(*a, *buffers), kept, [position[i] for i in self.handles if i in position], self.report
            )
        return self.fn(*[args[i] for i in self.kept], *buffers)

    def _take_over(self, args: Sequence[object], foreign: Sequence[Binding]) -> None:
        """Take every cache tensor that is not ours yet, or none of them."""
        for binding in foreign:  # held in another format: unpack, then pack anew
            restore(args[binding.index])
        with torch.no_grad():
            outputs = self.probe.graph(*[args[i] for i in self.probe.inputs])
        claims, lengths, masks = [], [], []
        sources = []
        for number, binding in enumerate(self.bindings):
            if binding not in foreign:
                continue
            tensor = args[binding.index]
            assert isinstance(tensor, Tensor)
            length_at, mask_at, first_at = self.probe.length[number], self.probe.mask[number], self.probe.first[number]
            length = None if length_at is None else outputs[length_at]
            if isinstance(length, Tensor):
                length = int(length.min()) if length.numel() else None
            mask = None if mask_at is None or first_at is None else (outputs[mask_at], int(outputs[first_at]))
            claims.append(Claim(tensor, binding.dims, binding.format))
            lengths.append(length)
            masks.append(mask)
            sources.append((binding, tensor.numel() * tensor.element_size()))
        take_over(claims, lengths=lengths, masks=masks)
        for claim, (binding, dense_bytes) in zip(claims, sources, strict=True):
            state = claim.tensor._state  # type: ignore[attr-defined]
            taken = TakenOver(binding.source, binding.format.role, binding.format.bits, dense_bytes, weakref.ref(state))
            for report in OPEN:
                report.caches.append(taken)
        log.info("graph %s: took over %d cache tensors", self.report.name, len(claims))

    def _run_dense(self, args: Sequence[object], why: str) -> Sequence[object]:
        """The graph as Dynamo traced it, compiled by Inductor alone, on dense tensors."""
        self.report.dense_calls += 1
        self.report.obstacle = why
        if self._dense is None:
            warnings.warn(f"decoquant_compile: the cache stays dense: {why}", stacklevel=2)
            self._dense = torch.compile(self.original, backend="inductor")
        handles = [i for i, x in enumerate(args) if isinstance(x, CacheTensor)]
        return run_dense(self._dense, args, handles, self.report)


def _held(tensor: object, binding: Binding) -> bool:
    """Whether a tensor is a handle in the format that the graph was compiled for."""
    return isinstance(tensor, CacheTensor) and tensor._state is not None and tensor._state.format == binding.format
