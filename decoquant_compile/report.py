"""What was found in the compiled graphs, what was done with it, and what it saved: values first, tables second."""

import enum
import io
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from decoquant_compile.kernels.state import CacheState
from decoquant_compile.patterns.match import RebuiltSite, Site
from decoquant_compile.patterns.reject import Reject


class Untouched(enum.Enum):
    """Why a whole graph went to Inductor as it came."""

    NO_ATTENTION = "the graph holds no attention that we recognise (no softmax, no fused attention)"
    GRADIENTS = "the graph records gradients; run generation under torch.no_grad() or torch.inference_mode()"
    UNSUPPORTED = "the graph cannot be brought into normal form"
    NO_SITE = "no attention that we recognise over a cache that we can hold"
    INTERNAL_ERROR = "our pass failed; please report it"


@dataclass(frozen=True)
class Finding:
    """One attention (or cache write) of a graph and what became of it.

    Attributes:
        attention: name of the attention's node in the graph.
        keys: where the keys are cached, as Dynamo names it; "" if not cached.
        write: how the cache is written ("index_copy", "roll", ...); "" if not known.
        form: form of the attention ("sdpa", ...); with "rebuilt" where it stays as it is and reads caches that are
            dequantised in each call, as a whole or "in blocks" of slots.
        outcome: "rewritten", or the reason why not.
        detail: more about the outcome.
    """

    attention: str
    keys: str
    write: str
    form: str
    outcome: str
    detail: str = ""

    @property
    def rewritten(self) -> bool:
        """Whether the cache is held packed for this attention."""
        return self.outcome == "rewritten"

    @classmethod
    def of(cls, found: Site | RebuiltSite | Reject, source: str, detail: str = "") -> Self:
        """The row of a site (rewritten) or of a reject."""
        if isinstance(found, RebuiltSite):
            reject = found.reject
            form = f"{reject.core.form}, rebuilt" if reject.core else "rebuilt"
            writes = ", ".join(dict.fromkeys(cache.write.form for cache in found.caches))
            why = reject.reason.name if found.expansion is None else f"{reject.reason.name}, in blocks"
            return cls(reject.where, source, writes, form, "rewritten", f"{detail}: {why}")
        if isinstance(found, Site):
            form = found.core.form if found.read else f"{found.core.form}, own tokens only"
            return cls(found.core.node.name, source, found.key.form, form, "rewritten", detail)
        form = found.core.form if found.core else ""
        return cls(found.where, source, "", form, found.reason.name, found.detail or found.reason.value)


@dataclass(eq=False)
class GraphReport:
    """One compiled graph.

    Attributes:
        name: Dynamo's frame and the number of its entry, as "frame/entry".
        findings: a row for each attention.
        untouched: why the whole graph was left alone; None if something was rewritten.
        detail: more about `untouched`.
        calls: how often the compiled graph ran.
        dense_calls: how often it ran on dense tensors all the same, and why the last time.
    """

    name: str
    findings: list[Finding] = field(default_factory=list)
    untouched: Untouched | None = None
    detail: str = ""
    calls: int = 0
    dense_calls: int = 0
    obstacle: str = ""

    @property
    def rewritten(self) -> int:
        """Number of attentions that read the packed cache."""
        return sum(f.rewritten for f in self.findings)

    def __str__(self) -> str:
        if self.untouched is not None and not self.findings:
            return f"graph {self.name}: untouched, {_joined(self.untouched.value, self.detail)}"
        rejected: dict[str, int] = {}
        for f in self.findings:
            if not f.rewritten:
                rejected[f.outcome] = rejected.get(f.outcome, 0) + 1
        parts = [f"{count} {reason}" for reason, count in rejected.items()]
        tail = f" ({', '.join(parts)})" if parts else ""
        return f"graph {self.name}: {self.rewritten} of {len(self.findings)} attentions rewritten{tail}"


@dataclass
class TakenOver:
    """One cache tensor that is held packed now.

    Attributes:
        source: the tensor as Dynamo names it.
        role: "key" or "value".
        bits: bits per stored element.
        state: the packed state, while it lives.
        filled: it held tokens before, written by eager code; so its first fit saw no queries.
    """

    source: str
    role: str
    bits: int
    state: weakref.ref[CacheState]
    filled: bool = False

    @property
    def dense_bytes(self) -> int | None:
        """Bytes of the dense tensor that is not there; None once the cache is gone."""
        state = self.state()
        return None if state is None else state.dense_nbytes

    @property
    def packed_bytes(self) -> int | None:
        """Bytes of the live packed buffer; None once the cache is gone."""
        state = self.state()
        return None if state is None else state.nbytes


@dataclass(eq=False)
class Report:
    """All graphs compiled or run, and all caches taken over, while a session was open.

    `str(report)` and rich's `print(report)` show tables: one row for each attention, one line for the bytes.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    caches: list[TakenOver] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rewritten(self) -> int:
        """Number of attentions, over all graphs, that read a packed cache."""
        return sum(g.rewritten for g in self.graphs)

    @property
    def findings(self) -> Iterator[Finding]:
        """The findings of all graphs."""
        return (f for g in self.graphs for f in g.findings)

    def bytes(self) -> tuple[int, int]:
        """(dense bytes released, packed bytes held) of the caches that are still alive."""
        states = [state for c in self.caches if (state := c.state()) is not None]
        return sum(s.dense_nbytes for s in states), sum(s.nbytes for s in states)

    def __rich__(self) -> RenderableType:
        table = Table(title="attention in the compiled graphs", title_justify="left")
        for column in ("attention", "form", "write: graphs", "outcome"):
            table.add_column(column, overflow="fold")
        for (name, form, outcome), writes in self._rows().items():
            graphs = "; ".join(
                f"{write}: {', '.join(names)}" if write else ", ".join(names) for write, names in writes.items()
            )
            table.add_row(*map(Text, (name, form, graphs, outcome)))  # not markup: a shape in brackets would vanish
        lines = []
        dense, packed = self.bytes()
        if dense:
            lines.append(
                f"{sum(c.packed_bytes is not None for c in self.caches)} cache tensors held packed: "
                f"{dense / 2**20:.2f} MiB dense before, {packed / 2**20:.2f} MiB now ({packed / dense:.3f})"
            )
        if blind := sum(c.filled and c.role == "key" and c.packed_bytes is not None for c in self.caches):
            lines.append(
                f"{blind} of the key caches were filled eagerly: fitted on keys alone, the queries were not seen"
            )
        lines += [
            f"{g.name}: {g.dense_calls} of {g.calls} calls ran dense: {g.obstacle}"
            for g in self.graphs
            if g.dense_calls
        ]
        return Group(table, *map(Text, lines + self.notes))

    def _rows(self) -> dict[tuple[str, str, str], dict[str, list[str]]]:
        """One row for each attention: what it is and what became of it; for each write form, the graphs it is in."""
        rows: dict[tuple[str, str, str], dict[str, list[str]]] = {}
        for graph in self.graphs:
            for f in graph.findings:
                row = (_readable(f.keys) or f.attention, f.form, _joined(f.outcome, f.detail))
                rows.setdefault(row, {}).setdefault(f.write, []).append(graph.name)
            if not graph.findings and graph.untouched is not None:
                row = ("", "", _joined(graph.untouched.value, graph.detail))
                rows.setdefault(row, {}).setdefault("", []).append(graph.name)
        return rows

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, force_terminal=False, color_system=None).print(self)
        return text.getvalue().rstrip()


def _joined(outcome: str, detail: str) -> str:
    return f"{outcome}: {detail}" if detail else outcome


def _readable(source: str) -> str:
    """Dynamo's name of an input without the wrapping of locals: `past_key_values.layers[0].keys`."""
    return re.sub(r"^L\['(?:kwargs'\]\[')?(\w+)'\]", r"\1", source)
