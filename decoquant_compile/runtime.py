"""A compiled graph at run time: finds or takes over the caches of a call, and keeps handles right in dense graphs."""

import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from decoquant_compile import growth
from decoquant_compile.growth import Opened
from decoquant_compile.handle import CacheTensor, Transients, format_of, is_whole, state_of, unpack
from decoquant_compile.kernels.reference import admitted_columns
from decoquant_compile.kernels.state import CacheState
from decoquant_compile.report import GraphReport, Report, TakenOver
from decoquant_compile.rewrite import Binding, Probe, Sizes
from decoquant_compile.selections import Selections
from decoquant_compile.stacks import Stack, with_parts, with_wholes
from decoquant_compile.takeover import Claim, Obstructed, obstacle, take_over

log = logging.getLogger(__name__)

# Sessions that are open; a compiled graph tells them that it ran.
OPEN: list[Report] = []

# States that they have been told of.
_TOLD: weakref.WeakSet[CacheState] = weakref.WeakSet()

_DENSE_CALLS_BEFORE_RESTORE = 2
_REASONS_IN_A_MESSAGE = 3


def announce(graph: GraphReport) -> None:
    """Tell the open sessions about a graph, once each."""
    for report in OPEN:
        if graph not in report.graphs:
            report.graphs.append(graph)


def run_dense(
    fn: Callable[..., Sequence[Any]],
    args: Sequence[Any],
    handles: Sequence[int],
    report: GraphReport,
    why: str = "a graph that was not rewritten reads a packed cache",
) -> list[Any]:
    """Run a dense graph over handles: each cache is read whole, and the tokens that the graph changed are stored.

    After two such calls a cache is given back its dense tensor, with a warning: to unpack it at every step is slower
    than never to have packed it. If the graph raises, nothing is stored.

    Args:
        fn: the compiled graph, in Dynamo's calling convention.
        args: its arguments.
        handles: positions of those that may be handles.
        report: the graph's report.
        why: the reason, for the report.

    Returns:
        The results; what aliases a cache is a view of its handle.
    """
    transients = Transients()
    lowered = list(args)
    for i in handles:
        lowered[i] = transients.lower(lowered[i])
    results = fn(*lowered)
    transients.commit(counted=False)
    report.dense_calls += 1
    report.obstacle = why
    worn = []
    for root in transients.roots:
        if not isinstance(root, CacheTensor):  # cleared by the graph, so dense again
            continue
        root.dense_calls += 1
        if root.dense_calls >= _DENSE_CALLS_BEFORE_RESTORE:
            worn.append(root)
    for root in worn:
        unpack(root)
    lifted = [transients.lift(x) for x in results]
    if worn:
        warnings.warn(
            f"decoquant_compile: {len(worn)} packed cache tensors were read by a graph that could not be rewritten "
            f"({report}); they are dense again. See report() or explain() for the reasons.",
            stacklevel=3,
        )
    elif report.findings and (
        lost := [root for root in transients.roots if any(_takes_the_place(x, root) for x in lifted)]
    ):
        warnings.warn(
            f"decoquant_compile: {len(lost)} packed cache tensors were read by a graph that could not be rewritten "
            f"({report}); what it returns in their places is dense. See report() or explain() for the reasons.",
            stacklevel=3,
        )
    return lifted


def _takes_the_place(result: object, root: CacheTensor) -> bool:
    """Whether a result looks like the cache with other tokens, or with more."""
    if type(result) is not Tensor or result.dtype != root.dtype or result.dim() != root.dim():
        return False
    more = [a - b for a, b in zip(result.shape, root.shape, strict=True) if a != b]
    return more == [] or (len(more) == 1 and more[0] > 0)


@dataclass
class DenseGraph:
    """A compiled graph that was not rewritten but takes handles: each call reads them dense.

    Attributes:
        fn: the compiled graph, in Dynamo's calling convention.
        handles: positions of the inputs that are handles.
        report: the graph's report.
    """

    fn: Callable[..., Sequence[Any]]
    handles: tuple[int, ...]
    report: GraphReport

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run it, in Dynamo's calling convention."""
        announce(self.report)
        self.report.calls += 1
        return run_dense(self.fn, args, self.handles, self.report)


@dataclass
class PackedGraph:
    """A rewritten, compiled graph.

    Attributes:
        fn: the compiled graph; takes the inputs that `Rewritten` says.
        kept: positions of Dynamo's inputs that the graph still takes.
        handles: positions, among the kept inputs, of handles that the graph reads as any other tensor.
        bindings: its cache tensors.
        selections: what it takes and returns parts of.
        stacks: inputs that hold many of them, which the graph takes apart: their parts come behind Dynamo's inputs.
        probe: tells what a cache holds that is not ours yet.
        sizes: tells how large the caches are that it returns.
        report: the graph's report.
        original: Dynamo's graph, to run densely where a cache cannot be taken over.
        patches: Inductor's options for it.
    """

    fn: Callable[..., Sequence[Any]]
    kept: tuple[int, ...]
    handles: tuple[int, ...]
    bindings: tuple[Binding, ...]
    selections: Selections
    stacks: tuple[Stack, ...]
    probe: Probe
    sizes: Sizes
    report: GraphReport
    original: fx.GraphModule
    patches: Mapping[str, Any]
    _dense: Callable[..., Sequence[Any]] | None = field(default=None, init=False)
    _in_place: tuple[int, ...] = field(init=False)  # the numbers of the bindings that are written in place
    _returns_inputs: bool = field(init=False)  # whether some cache that is written in place is a result, too
    _number: int = field(init=False)  # of Dynamo's results

    def __post_init__(self) -> None:
        numbered = enumerate(self.bindings)
        self._in_place = tuple(i for i, binding in numbered if binding.writes and not binding.outputs)
        self._returns_inputs = any(binding.itself for binding in self.bindings)
        returned: Any = self.original.graph.output_node().args[0]
        self._number = len(returned)

    def __call__(self, *given: Any) -> Sequence[Any]:
        """Run it, in Dynamo's calling convention."""
        announce(self.report)
        self.report.calls += 1
        taken = self.selections.of_inputs(given)
        args = with_parts(taken, self.stacks)
        foreign = self._foreign(args)
        try:
            if foreign:
                self._take_over(args, foreign)
                args = with_parts(taken, self.stacks)
            opened = self._open(args) if len(self._in_place) < len(self.bindings) else {}
        except Obstructed as error:
            return self._run_dense(given, self._why(foreign, error.reasons))
        except Exception as error:
            log.exception("graph %s: takeover failed, the call runs dense", self.report.name)
            return self._run_dense(given, f"takeover failed: {type(error).__name__}: {error}")
        self.selections.reorder(given)
        buffers = [
            self._tensor(args, i)._state.buffer if i not in opened else opened[i].state.buffer
            for i in range(len(self.bindings))
        ]
        numbers = [
            number
            for i, binding in enumerate(self.bindings)
            if binding.is_placed
            for number in (opened[i].state.slots, opened[i].first)
        ]
        kept = [args[i] for i in self.kept]
        if self.handles:
            results: Sequence[Any] = run_dense(
                lambda *inputs: self.fn(*inputs, *buffers, *numbers), kept, self.handles, self.report
            )
        else:
            results = self.fn(*kept, *buffers, *numbers)
        if opened or self._returns_inputs:
            results = self._with_handles(results, args, opened)
        if self.selections.returned:
            results = self.selections.of_results(results)
        if self.stacks or len(results) > self._number:
            results = with_wholes(results, self.stacks, given, self._number)
        return results

    def _foreign(self, args: Sequence[Any]) -> list[int]:
        """The numbers of the bindings whose caches are not held in the right way yet, with all that share a tensor."""
        foreign = {i for i in self._in_place if not _is_held(self._tensor(args, i), self.bindings[i])}
        for stack in self.stacks if foreign else ():
            shared = [i for i in self._in_place if self.bindings[i].index in stack.positions]
            if not foreign.isdisjoint(shared):
                foreign.update(shared)
        return sorted(foreign)

    def _claim(self, args: Sequence[Any], binding: Binding) -> Claim:
        """What is to be taken over for a binding."""
        assert binding.index is not None
        for stack in self.stacks:
            if stack.index is not None and binding.index in stack.positions:
                part = binding.index - stack.first
                return Claim(args[stack.index], binding.dims, binding.format, stack.stacking, part)
        return Claim(args[binding.index], binding.dims, binding.format)

    def _tensor(self, args: Sequence[Any], number: int) -> Any:
        """The cache tensor of a binding; None where the graph creates it."""
        index = self.bindings[number].index
        return None if index is None else args[index]

    def _open(self, args: Sequence[Any]) -> dict[int, Opened]:
        """For each binding whose cache is returned or only read, the state that the call uses."""
        opened: dict[int, Opened] = {}
        outputs: Sequence[Any] | None = None
        taken: set[int] = set()
        sizes = self.sizes(args)
        for i, (binding, row) in enumerate(zip(self.bindings, sizes, strict=True)):
            if not binding.writes:
                opened[i] = growth.shown(self._tensor(args, i), binding.dims, binding.format, grows=binding.grows)
                continue
            if not binding.outputs:
                continue
            tensor, mask = self._tensor(args, i), None
            batch, heads, tokens, length = row
            if tensor is not None and format_of(tensor, binding.dims) != binding.format:
                outputs = self._probed(args) if outputs is None else outputs
                mask = self._mask(i, outputs)
            if binding.grows:
                empty = (batch, heads, binding.device)
                opened[i] = growth.opened(tensor, binding.dims, binding.format, tokens, length, mask, taken, empty)
            elif tensor is None:
                state = CacheState.empty(binding.format, batch, heads, length, binding.device)
                opened[i] = Opened(state, 0, 0, tokens, length)
            else:
                past = None if outputs is None else self._length(i, outputs, length)
                unread = outputs is not None and not self._reads_beyond(i, past, mask, outputs)
                opened[i] = growth.copied(tensor, binding.dims, binding.format, tokens, mask, past, unread=unread)
            taken.add(id(opened[i].state))
        for i, binding in enumerate(self.bindings):
            if binding.follows:
                opened[i - 1], opened[i] = growth.levelled(opened[i - 1], opened[i])
        return opened

    def _with_handles(self, results: Sequence[Any], args: Sequence[Any], opened: Mapping[int, Opened]) -> list[Any]:
        """The results of a call, with handles in the places of the caches that it returns."""
        results = list(results)
        for i, binding in enumerate(self.bindings):
            for output in binding.itself:
                results[output] = self._tensor(args, i)
        for i, held in opened.items():
            binding = self.bindings[i]
            if not binding.writes:
                continue
            handle = held.handle(binding.dims)
            for output in binding.outputs:
                results[output] = handle
            self._tell(binding, held.state, filled=binding.index is not None and held.shown > 0)
        return results

    def _probed(self, args: Sequence[Any]) -> Sequence[Any]:
        transients = Transients()  # a mask may be computed from what another handle holds
        with torch.no_grad():
            outputs: Sequence[Any] = self.probe.graph(*(transients.lower(args[i]) for i in self.probe.inputs))
        return outputs

    def _mask(self, number: int, outputs: Sequence[Any]) -> tuple[Tensor, int] | None:
        """The attention mask of a call over one cache and the slot of its first column, as `take_over` wants them."""
        mask, first = self.probe.mask[number], self.probe.first[number]
        return None if mask is None or first is None else (outputs[mask], int(outputs[first]))

    def _length(self, number: int, outputs: Sequence[Any], slots: int) -> int | None:
        """The slot of the first token that a cache of so many does not hold yet, as `take_over` wants it."""
        at = self.probe.length[number]
        length = None if at is None else outputs[at]
        if isinstance(length, Tensor):  # the slots that this call writes; negative ones count from the end
            return int(length.remainder(slots).min()) if length.numel() else None
        return None if length is None else int(length)

    def _reads_beyond(
        self, number: int, length: int | None, mask: tuple[Tensor, int] | None, outputs: Sequence[Any]
    ) -> bool:
        """Whether a call is known to read slots behind the tokens that it writes, as that of a ring that has turned."""
        at = self.probe.tokens[number]
        if self.probe.reads_all[number] or length is None or mask is None or at is None:
            return self.probe.reads_all[number]
        admitted, first = mask
        hidden = length + int(outputs[at]) - first
        return bool(admitted_columns(admitted[..., max(0, hidden) :]).any())

    def _tell(self, binding: Binding, state: CacheState, *, filled: bool) -> None:
        """Tell the open sessions of a cache that is held packed now, once."""
        if state in _TOLD:
            return
        _TOLD.add(state)
        form = binding.format
        taken = TakenOver(binding.source, form.role, form.bits, weakref.ref(state), filled)
        for report in OPEN:
            report.caches.append(taken)

    def _take_over(self, args: Sequence[Any], foreign: Sequence[int]) -> None:
        """Take every cache tensor that is not held in the right way yet, or none of them.

        Args:
            args: of the call.
            foreign: the numbers of their bindings.

        Raises:
            Obstructed: a tensor cannot be taken over.
        """
        bindings = [self.bindings[i] for i in foreign]
        claims = [self._claim(args, binding) for binding in bindings]
        reasons = [
            None if is_whole(claim.tensor) or claim.part else obstacle(claim.tensor, claim.whole_dims)
            for claim in claims
        ]
        if any(reasons):
            raise Obstructed(reasons)
        for claim in claims:
            if isinstance(claim.tensor, CacheTensor):  # packed, but in another format or layout
                unpack(claim.tensor)
        outputs = self._probed(args)
        lengths: list[int | None] = []
        masks: list[tuple[Tensor, int] | None] = []
        for i, claim in zip(foreign, claims, strict=True):
            lengths.append(self._length(i, outputs, claim.cache.shape[claim.dims[2]]))
            masks.append(self._mask(i, outputs))
        unread = {n for n, i in enumerate(foreign) if not self._reads_beyond(i, lengths[n], masks[n], outputs)}
        states = take_over(claims, lengths=lengths, masks=masks, unread=unread)
        for state, binding, length in zip(states, bindings, lengths, strict=True):
            self._tell(binding, state, filled=length != 0)
        log.info("graph %s: took over %d cache tensors", self.report.name, len(claims))

    def _why(self, foreign: Sequence[int], reasons: Sequence[str | None]) -> str:
        found = [f"{self.bindings[i].source} {reason}" for i, reason in zip(foreign, reasons, strict=True) if reason]
        more = len(found) - _REASONS_IN_A_MESSAGE
        return "; ".join(found[:_REASONS_IN_A_MESSAGE]) + (f"; and {more} more" if more > 0 else "")

    def _run_dense(self, args: Sequence[Any], why: str) -> Sequence[Any]:
        """Run the graph as Dynamo traced it, compiled by Inductor alone, on dense tensors."""
        if self._dense is None:
            warnings.warn(f"decoquant_compile: the cache stays dense: {why}", stacklevel=3)
            self._dense = torch.compile(self.original, backend="inductor", options=dict(self.patches))
        handles = [i for i, x in enumerate(args) if isinstance(x, CacheTensor)]
        with torch.compiler.set_stance("default"):  # a forced backend would bring the graph back here
            return run_dense(self._dense, args, handles, self.report, why)


def _is_held(tensor: object, binding: Binding) -> bool:
    """Whether a tensor is a handle in the format and layout that the graph was compiled for."""
    state = state_of(tensor, binding.dims)
    return state is not None and state.format == binding.format
