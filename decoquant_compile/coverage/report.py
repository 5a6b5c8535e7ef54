"""Cells as tables: rich, Markdown, JSON."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, cast

import torch
import transformers
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from decoquant_compile.coverage.cells import Attention, Cell, Check

_EXAMPLES: Final = 3


def columns(cells: Sequence[Cell]) -> list[tuple[str, str, str]]:
    """(attention, cache, prefill) of each column."""
    return list(dict.fromkeys((c.attention, c.cache, c.prefill) for c in cells))


def text(cell: Cell) -> str:
    """What a cell says: rewritten of all, why not the others, and how far results are off."""
    if cell.refused:
        return "-"
    parts = [f"{cell.rewritten}/{len(cell.attentions)}"]
    parts += [reason if count == 1 else f"{count} {reason}" for reason, count in cell.reasons.items()]
    parts += [
        f"{bits} bits: {'WRONG ' if bits in cell.wrong else ''}{check.error:.1g}" for bits, check in cell.checks.items()
    ]
    return " ".join(parts)


def forms(cells: Iterable[Cell]) -> str:
    """The forms of attention and of writes that some cells hold."""
    found = dict.fromkeys(f"{a.form}/{a.write}" if a.write else a.form for c in cells for a in c.attentions)
    return ", ".join(form for form in found if form)


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """Counts and shares over all cells that the library itself can run."""
    run = [c for c in cells if not c.refused]
    attentions = [a for c in run for a in c.attentions]
    checked = [c for c in run if c.checks]
    return {
        "cells": len(run),
        "complete": sum(c.complete for c in run),
        "share": sum(c.complete for c in run) / max(len(run), 1),
        "without rebuilt caches": sum(c.complete and not c.rebuilt for c in run),
        "attentions": len(attentions),
        "rewritten": sum(a.outcome == "rewritten" for a in attentions),
        "refused": len(cells) - len(run),
        "subjects": len({c.subject for c in run}),
        "cells by reason": dict(Counter(r for c in run for r in c.reasons).most_common()),
        "checked": len(checked),
        "wrong": [f"{c.subject} {c.attention} {c.cache} {c.prefill}" for c in checked if c.wrong],
    }


def _rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    heads, by_subject = columns(cells), _grouped(cells, lambda c: c.subject)
    rows = []
    for subject, own in by_subject.items():
        if all(c.refused for c in own):
            continue
        found = {(c.attention, c.cache, c.prefill): text(c) for c in own}
        rows.append([subject, forms(own), *(found.get(head, "") for head in heads)])
    return ["architecture", "forms", *(" ".join(head) for head in heads)], rows


def _details(cells: Sequence[Cell]) -> tuple[list[list[str]], list[list[str]]]:
    """(reasons with particulars, refusals), each with the number of cells and the first subjects."""
    why: dict[tuple[str, str], list[str]] = {}
    refused: dict[str, list[str]] = {}
    for c in cells:
        if c.refused:
            refused.setdefault(c.refused, []).append(f"{c.subject} ({c.attention}, {c.cache})")
        for a in dict.fromkeys(c.attentions):
            if a.outcome != "rewritten":
                why.setdefault((a.outcome, a.form), []).append(f"{c.subject}: {a.detail}")
    return (
        [[*key, str(len(found)), "; ".join(list(dict.fromkeys(found))[:_EXAMPLES])] for key, found in why.items()],
        [[reason, str(len(found)), ", ".join(dict.fromkeys(found))] for reason, found in refused.items()],
    )


def _grouped(cells: Iterable[Cell], key: Callable[[Cell], str]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def _sentence(cells: Sequence[Cell]) -> str:
    s = summary(cells)
    line = (
        f"{s['complete']} of {s['cells']} cells ({s['share']:.1%}) of {s['subjects']} architectures and idioms are "
        f"rewritten throughout ({s['without rebuilt caches']} of them without rebuilding a cache), "
        f"{s['rewritten']} of {s['attentions']} attentions. {s['refused']} other cells do not run without us."
    )
    if s["checked"]:
        line += f" {s['checked']} cells checked, {len(s['wrong'])} wrong."
    return line


def _by_attention(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for attention, own in _grouped(cells, lambda c: c.attention).items():
        s = summary(own)
        plainly = s["without rebuilt caches"] / max(s["cells"], 1)
        rows.append([attention, str(s["subjects"]), str(s["cells"]), f"{s['share']:.1%}", f"{plainly:.1%}"])
    return ["attention", "models", "cells", "rewritten throughout", "without rebuilding a cache"], rows


def tables(cells: Sequence[Cell]) -> RenderableType:
    """All cells, as rich prints them."""
    heads, rows = _rows(cells)
    table = Table(title="attentions rewritten, of all", title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    reasons = Table(title="reasons", title_justify="left")
    for head in ("reason", "form", "cells", "such as"):
        reasons.add_column(head, overflow="fold")
    for row in _details(cells)[0]:
        reasons.add_row(*map(Text, row))
    return Group(table, reasons, Text(_sentence(cells)))


def markdown(cells: Sequence[Cell], settings: Mapping[str, Any]) -> str:
    """All cells, as Markdown."""
    why, refused = _details(cells)
    chosen = " ".join(f"--{name} {','.join(settings[name])}" for name in ("attention", "cache", "prefill"))
    origin = (
        f"Made by `python -m decoquant_compile.coverage {chosen}` with torch {torch.__version__} and transformers "
        f"{transformers.__version__}: tiny random models, batch 1. A cell says how many attentions of all compiled "
        "graphs read a packed cache, of how many, and why the others do not; `-` was not run."
    )
    parts = [
        "# Which attentions are rewritten",
        origin,
        _sentence(cells),
        _markdown(*_by_attention(cells)),
        _markdown(*_rows(cells)),
        "Why attentions were left alone:",
        _markdown(["reason", "form", "cells", "such as"], why),
        "What does not run: what transformers, or plain `torch.compile`, says of these tiny models:",
        _markdown(["its answer", "cells", "where"], refused),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def document(cells: Sequence[Cell], settings: Mapping[str, Any]) -> str:
    """All cells, as JSON."""
    return json.dumps({"settings": settings, "summary": summary(cells), "cells": [asdict(c) for c in cells]}, indent=1)


def read(text: str) -> list[Cell]:
    """The cells of a `document`."""
    cells = [Cell(**cell) for cell in json.loads(text)["cells"]]
    for cell in cells:
        cell.attentions = [Attention(**a) for a in cast("list[Any]", cell.attentions)]
        cell.checks = {int(bits): Check(**c) for bits, c in cast("dict[Any, Any]", cell.checks).items()}
    return cells
