"""One way to use one model, and what becomes of its attentions."""

import contextlib
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol, Self

import torch
from torch import Tensor, fx, nn

from decoquant_compile import _compat
from decoquant_compile.backend import contained, decoquant_backend, packed, untouched
from decoquant_compile.coverage.architectures import Architecture, Unavailable, one_line, prompts
from decoquant_compile.coverage.idioms import IDIOMS, Handwritten
from decoquant_compile.options import Options
from decoquant_compile.report import GraphReport, Untouched

PREFILLS: Final = {"one": (6, 1, 1, 1, 1), "chunked": (10, 3, 1, 1)}
"""Tokens of the calls. A chunk is longer than the sliding window, and single steps cross its edge."""

ATTENTIONS: Final = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention"}
CACHES: Final = ("static", "dynamic")
OWN: Final = "own"
"""Attention and cache of a hand-written idiom."""

BOUNDS: Final = {16: 1e-3, 8: 0.1}
"""Largest difference of logits from plain PyTorch, in standard deviations of these, at each number of bits."""

_ENTRIES: Final = 64


class Subject(Protocol):
    """A model with a way to call it."""

    @property
    def model(self) -> nn.Module:
        """The model."""

    @property
    def caches(self) -> int:
        """How many of its layers have a cache."""

    def cache(self, kind: str) -> Any:
        """A fresh cache."""

    def step(self, forward: Callable[..., Any], cache: Any, ids: Tensor) -> Tensor:
        """Logits of `ids` after what the cache holds."""

    def cached(self, cache: Any) -> int:
        """How many layers of the cache hold keys."""


@dataclass(frozen=True)
class Attention:
    """One attention of one graph: how it is spelled, how its cache is written, and what became of it."""

    form: str
    write: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Check:
    """The compiled model beside plain PyTorch.

    Attributes:
        error: largest difference of logits, in standard deviations.
        tokens: the share of calls' last tokens of which the likeliest next token is the same, or tied within the error.
    """

    error: float
    tokens: float

    @classmethod
    def of(cls, got: Sequence[Tensor], expected: Sequence[Tensor], bits: int) -> Self:
        """Compare logits of each call, from caches of `bits`."""
        if len(got) < len(expected):
            return cls(math.inf, 0)
        spread = float(torch.cat(list(expected), 1).std())
        error = max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)) / spread
        same = [_same_token(a[0, -1], b[0, -1], BOUNDS[bits] * spread) for a, b in zip(got, expected, strict=True)]
        return cls(error, sum(same) / len(same))


@dataclass
class Cell:
    """One model, used in one way.

    Attributes:
        subject: the architecture or idiom.
        attention: the implementation, of `ATTENTIONS`.
        cache: of `CACHES`.
        prefill: of `PREFILLS`.
        refused: why the library itself, or plain torch.compile, does not run this; the cell then counts nowhere.
        attentions: of all graphs that ran.
        checks: by bits.
    """

    subject: str
    attention: str
    cache: str
    prefill: str
    refused: str = ""
    attentions: list[Attention] = field(default_factory=list)
    checks: dict[int, Check] = field(default_factory=dict)

    @property
    def rewritten(self) -> int:
        """How many attentions read a packed cache."""
        return sum(a.outcome == "rewritten" for a in self.attentions)

    @property
    def complete(self) -> bool:
        """Whether all do."""
        return bool(self.attentions) and self.rewritten == len(self.attentions)

    @property
    def rebuilt(self) -> bool:
        """Whether some read caches that are dequantised in each call."""
        return any("rebuilt" in a.form for a in self.attentions)

    @property
    def reasons(self) -> Counter[str]:
        """Why others do not."""
        return Counter(a.outcome for a in self.attentions if a.outcome != "rewritten")

    @property
    def wrong(self) -> list[int]:
        """The numbers of bits at which the results are not those of plain PyTorch."""
        return [bits for bits, c in self.checks.items() if not (c.error <= BOUNDS[bits] and c.tokens == 1)]


class Matcher:
    """A backend that rewrites each graph and runs it node by node.

    Attributes:
        ran: the graphs that a call ran, each with the number of its packed caches.
    """

    _decoquant_backend: ClassVar[bool] = True  # handles may come in

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.ran: list[tuple[GraphReport, int]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Rewrite a graph; what runs it."""
        report = GraphReport(_compat.graph_name())
        compiled: Callable[..., Any] | None = None
        with contained(report):
            compiled = packed(gm, example_inputs, self.options, {}, report, _uncompiled)
        whole = compiled or untouched(gm, example_inputs, {}, report, _uncompiled)
        caches = len(getattr(compiled, "bindings", ())) // 2

        def run(*inputs: Any) -> Any:
            self.ran.append((report, caches))
            return whole(*inputs)

        return run


def _uncompiled(gm: fx.GraphModule, _: Sequence[Any], **__: Any) -> Callable[..., Any]:
    forward: Callable[..., Any] = gm.forward
    return forward


def measure(
    name: str,
    attention: str,
    caches: Sequence[str],
    prefills: Sequence[str],
    bits: Sequence[int] = (),
    *,
    compiled: bool = False,
) -> Iterator[Cell]:
    """The cells of one model with one attention.

    Args:
        name: an architecture or idiom.
        attention: of `ATTENTIONS`; of no account for an idiom.
        caches: of `CACHES`; of no account for an idiom.
        prefills: of `PREFILLS`.
        bits: check results at these too.
        compiled: check what Inductor makes of the rewritten graphs, too; otherwise they run node by node.
    """
    if name in IDIOMS:
        attention, caches = OWN, (OWN,)
    cells = [Cell(name, attention, cache, prefill) for cache, prefill in itertools.product(caches, prefills)]
    try:
        subject: Subject = Handwritten(name) if name in IDIOMS else Architecture(name, ATTENTIONS[attention])
        refused = "" if subject.caches else "it has no KV cache"
    except Unavailable as error:
        refused = str(error)
    if refused:
        for cell in cells:
            cell.refused = refused
        yield from cells
        return
    options = _packing(bits[0]) if bits and not compiled else {}  # the first check needs no run of its own
    matcher, before = Matcher(Options(**options)), _compat.graph_breaks()
    plain: dict[int, list[Tensor]] = {}
    with torch.no_grad(), _compat.dynamo_limits(_ENTRIES), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's
        torch.compiler.reset()
        traced = torch.compile(subject.model.forward, backend=matcher)
        for number, cell in enumerate(cells):
            got, expected = _measure(subject, traced, matcher, cell, before)
            if bits and not cell.refused and cell.rewritten:
                plain[number] = expected or list(_logits(subject, torch.compile(subject.model.forward), cell))
                if options:
                    cell.checks[bits[0]] = Check.of(got, plain[number], bits[0])
            yield cell
        for b in bits[1:] if options else bits:
            torch.compiler.reset()
            ours, quick = _compiled(subject, b, attention) if compiled else (_run(subject, b), contextlib.nullcontext())
            with quick:
                for number, expected in plain.items():
                    cells[number].checks[b] = Check.of(list(_logits(subject, ours, cells[number])), expected, b)


def _packing(bits: int) -> dict[str, Any]:
    """Options with which most tokens are read from their codes."""
    return {"bits": bits, "sinks": 1, "window": 2}


def _run(subject: Subject, bits: int) -> Callable[..., Any]:
    """What runs rewritten graphs node by node."""
    return torch.compile(subject.model.forward, backend=Matcher(Options(**_packing(bits))))


def _compiled(
    subject: Subject, bits: int, attention: str
) -> tuple[Callable[..., Any], contextlib.AbstractContextManager[None]]:
    """What compiles rewritten graphs by Inductor, and a context that makes it quick."""
    ours = torch.compile(subject.model.forward, backend=decoquant_backend, options=_packing(bits))
    # Of flex_attention's functions the quick way lowers few.
    return ours, contextlib.nullcontext() if attention == "flex" else _compat.quick_compile()


def _measure(
    subject: Subject, compiled: Callable[..., Any], matcher: Matcher, cell: Cell, before: Counter[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """Fill in the attentions of a cell, or why it is refused.

    Returns:
        Its logits, and those of plain PyTorch, [] where that was not run.
    """
    expected: list[Tensor] = []
    try:
        # Outside of torch.compile flex_attention compiles itself, for every shape: minutes.
        if cell.attention != "flex":
            expected = list(_logits(subject, subject.model.forward, cell))
    except Exception as error:  # noqa: BLE001 - whatever the library raises is its answer
        cell.refused = one_line(error)
        return [], []
    got: list[Tensor] = []
    try:
        seen: set[int] = set()
        matcher.ran.clear()
        for tokens, held, logits in _calls(subject, compiled, cell):
            ran, matcher.ran = matcher.ran, []
            cell.attentions += _attentions(ran, seen, tokens, held, _compat.graph_breaks() - before)
            got.append(logits)
    except Exception as error:  # noqa: BLE001
        torch.compiler.reset()
        try:
            list(_logits(subject, torch.compile(subject.model.forward, backend="eager"), cell))
        except Exception as plain:  # noqa: BLE001
            cell.refused = f"torch.compile: {one_line(plain)}"
        else:
            cell.attentions.append(Attention("", "", "ERROR", one_line(error)))
    return got, expected


def _attentions(
    ran: Sequence[tuple[GraphReport, int]], seen: set[int], tokens: int, held: int, breaks: Collection[str] = ()
) -> Iterator[Attention]:
    """The attentions of a call, but for those of graphs that were seen before.

    Args:
        ran: the graphs that ran, each with the number of its packed caches.
        seen: graphs of earlier calls; added to.
        tokens: of the call.
        held: layers with a cache.
        breaks: why Dynamo has ended graphs of the model within a frame.
    """
    hidden = False
    for graph, _ in ran:
        unread = graph.untouched in (Untouched.UNSUPPORTED, Untouched.INTERNAL_ERROR, Untouched.GRADIENTS)
        hidden |= unread
        if id(graph) in seen:
            continue
        seen.add(id(graph))
        yield from (Attention(f.form, f.write, f.outcome, f.detail) for f in graph.findings)
        if unread:
            assert graph.untouched is not None
            yield Attention("", "", graph.untouched.name, graph.detail)
    found = sum(max(len(graph.findings), packed_caches) for graph, packed_caches in ran)  # one may read two caches
    if found < held and not hidden:
        detail = f"{found} attentions for {held} caches in a call of {tokens} tokens"
        # A softmax without its products: Dynamo has ended a graph inside the attention. No softmax in any graph: it has
        # left the attention to Python.
        cut = len(ran) > 1 and any(g.untouched is Untouched.NO_SITE and not g.findings for g, _ in ran)
        left = bool(breaks) and all(g.untouched is Untouched.NO_ATTENTION for g, _ in ran)
        why = f"; {' '.join(min(breaks).split())[:160]}" if left else ""
        yield Attention("", "", "GRAPH_BREAK" if cut or left else "UNSEEN", detail + why)


def _calls(subject: Subject, forward: Callable[..., Any], cell: Cell) -> Iterator[tuple[int, int, Tensor]]:
    """(tokens of a call, layers that hold keys after it, logits)."""
    cache, sizes = subject.cache(cell.cache), PREFILLS[cell.prefill]
    for ids in prompts(1, sum(sizes)).split(sizes, 1):
        logits = subject.step(forward, cache, ids).float().clone()
        yield ids.shape[1], subject.cached(cache), logits


def _logits(subject: Subject, forward: Callable[..., Any], cell: Cell) -> Iterator[Tensor]:
    """Logits of each call."""
    return (logits for _, _, logits in _calls(subject, forward, cell))


def _same_token(got: Tensor, expected: Tensor, tie: float) -> bool:
    return bool(expected.max() - expected[got.argmax()] <= tie)
