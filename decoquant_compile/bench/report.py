"""Tables, JSON and pictures of measured rows."""

import json
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import Any, Final, Literal

from rich.table import Table
from rich.text import Text

from decoquant_compile.bench.attention import BASES
from decoquant_compile.bench.timing import Row

Benchmark = Literal["attention", "decode", "prefill"]

_LINES: Final = {"attend": "-", "step": "-.", "read": ":", "decoquant": "-", "store": ":"}
"""Line style by family."""


def tables(benchmark: Benchmark, rows: Sequence[Row]) -> list[Table]:
    """One table for each shape, context length and number of threads."""
    return [
        _table(benchmark, f"{shape}, {context:,} tokens, {_place(threads)}", list(group))
        for (shape, context, threads), group in groupby(rows, lambda row: (row.shape, row.context, row.threads))
    ]


def _place(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}" if threads else "GPU"


def _table(benchmark: Benchmark, title: str, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    attention = benchmark == "attention"
    bases = list(BASES) if attention else ["Inductor"]
    cells: dict[str, Callable[[Row], str]] = {"arm": lambda row: row.arm}
    if benchmark == "prefill":
        cells["median s"] = lambda row: _number(row.median, ".4f")
    else:
        cells["median ms"] = lambda row: _milliseconds(row.median)
    if attention:
        cells["p10 ms"] = lambda row: _milliseconds(row.p10)
        cells["GB/s"] = lambda row: _number(row.speed and row.speed / 1e9, ".1f")
        cells["of pure read"] = lambda row: _number(row.read_share, ".0%")
        if any(row.peak is not None for row in rows):
            cells["peak MiB"] = lambda row: _number(row.peak and row.peak / 2**20, ".0f")
    else:
        cells["tokens/s"] = lambda row: _number(_tokens_per_second(benchmark, row), ".2f")
    for base in bases:
        cells[f"x {base}"] = partial(_ratio, base)
    if attention:
        cells["error"] = lambda row: _number(row.error, ".1e")
    elif benchmark == "prefill":
        cells["of prefill"] = lambda row: _number(row.prefill_share, ".1%")
    else:
        cells["cache MiB"] = lambda row: _number(row.nbytes / 2**20 if row.seconds else None, ".1f")
        if any(row.resident is not None for row in rows):
            cells["resident MiB"] = lambda row: _number(row.resident and row.resident / 2**20, ".0f")
            cells["peak MiB"] = lambda row: _number(row.peak and row.peak / 2**20, ".0f")
    cells["note"] = lambda row: row.note
    for name in cells:
        table.add_column(name, justify="left" if name in ("arm", "note") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row)) for cell in cells.values()))
    return table


def _ratio(base: str, row: Row) -> str:
    return _number(row.ratios.get(base), ".2f")


def _tokens_per_second(benchmark: Benchmark, row: Row) -> float | None:
    return row.median and (row.context if benchmark == "prefill" else 1) / row.median


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.1f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def document(
    benchmark: Benchmark, machine: dict[str, str | int], settings: dict[str, Any], rows: Sequence[Row]
) -> dict[str, Any]:
    """Everything measured, for JSON: each call by itself and the statistics of the tables; in seconds and bytes."""

    def speed(row: Row) -> dict[str, float | None]:
        if benchmark == "attention":
            return {"bytes_per_second": row.speed}
        return {"tokens_per_second": _tokens_per_second(benchmark, row)}

    return {
        "benchmark": benchmark,
        "machine": machine,
        "settings": settings,
        "rows": [asdict(row) | {"median": row.median, "p10": row.p10} | speed(row) for row in rows],
    }


def write(path: pathlib.Path, measured: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes `measured`, a `document` of `rows`, as ``.json``, or draws it as ``.png``."""
    if path.suffix == ".json":
        path.write_text(json.dumps(measured, indent=1) + "\n")
    else:
        _plot(path, measured["benchmark"], rows)


def _plot(path: pathlib.Path, benchmark: Benchmark, rows: Sequence[Row]) -> None:
    """A column for each shape and number of threads; by context length, time or speed, ratios, shares, memory."""
    import matplotlib as mpl  # noqa: PLC0415  # only a picture needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    base = "SDPA bf16" if benchmark == "attention" else "Inductor"
    curves: dict[str, Callable[[Row], float | None]] = {}
    if benchmark == "attention":
        curves["ms, median"] = lambda row: row.median and row.median * 1e3
    else:  # of whole calls of the model, which are what is compared with the base
        curves["tokens per second"] = lambda row: _tokens_per_second(benchmark, row) if row.ratios else None
    curves[f"times faster than {base}"] = lambda row: row.ratios.get(base)
    if benchmark == "prefill":
        curves["% of the prefill"] = lambda row: row.prefill_share and row.prefill_share * 100
    if any(row.resident is not None for row in rows):
        curves["resident set, GiB"] = lambda row: row.resident and row.resident / 2**30
    panels = list(dict.fromkeys((row.shape, row.threads) for row in rows))
    arms = list(dict.fromkeys(row.arm for row in rows if row.seconds))
    palette = plt.get_cmap("tab20")
    colours = {kind: palette(number % palette.N) for number, kind in enumerate(dict.fromkeys(map(_kind, arms)))}
    size = (6 * len(panels) + 2, 4 * len(curves))
    figure, axes = plt.subplots(len(curves), len(panels), figsize=size, squeeze=False, layout="constrained")
    for column, (shape, threads) in zip(axes.T, panels, strict=True):
        column[0].set_title(f"{shape}, {_place(threads)}")
        column[-1].set_xlabel("tokens in the prompt" if benchmark == "prefill" else "tokens in the cache")
        for axis, (label, curve) in zip(column, curves.items(), strict=True):
            for arm in arms:
                points = sorted(
                    (row.context, value)
                    for row in rows
                    if (row.shape, row.threads, row.arm) == (shape, threads, arm) and (value := curve(row)) is not None
                )
                style = {"color": colours[_kind(arm)], "marker": "o", "linestyle": _line(arm)}
                axis.plot([x for x, _ in points], [y for _, y in points], label=arm, **style)
            axis.set_xscale("log", base=2)
            if benchmark == "attention":
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            if label.startswith("times"):
                axis.axhline(1, color="black", linewidth=1)
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _kind(arm: str) -> str:
    """What has one colour: all arms of one width of the packed cache, or one arm of torch's."""
    family, _, variant = arm.partition("-")
    return variant if family in _LINES else arm


def _line(arm: str) -> str:
    return _LINES.get(arm.partition("-")[0], "--")
