"""Tables, JSON, pages and pictures of measured methods."""

import base64
import html
import io
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from rich.table import Table
from rich.text import Text

FORMATS: Final = (".json", ".html", ".png")
"""Of files that `write` writes, by the end of their name."""


@dataclass(frozen=True)
class Row:
    """One method on one text.

    Attributes:
        text: its name.
        method: its name.
        how: "operators": decoded through the compiled model on its packed cache; "emulated": quantised and
            reconstructed inside the plain model's attention.
        prefill: "compiled" or "eager"; "" where it makes no difference.
        statistics: as of `Divergence.summary`.
        by_position: first position, last position and mean KL divergence of bins along the window.
        bits: stored bits per element of the layers that hold every token; None where they were not counted.
        bits_held: of all layers as the model holds them; None where they were not counted.
    """

    text: str
    method: str
    how: str
    prefill: str
    statistics: dict[str, float]
    by_position: list[tuple[int, int, float]]
    bits: float | None = None
    bits_held: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """What storing one side of one layer costs, all else being exact."""

    text: str
    method: str
    layer: int
    role: str
    kl_mean: float
    kl_error: float


@dataclass
class Results:
    """All that a run has measured.

    Attributes:
        settings: of the run, as JSON can hold them.
        rows: methods, in the order of measurement.
        layers: the breakdown, if it was asked for.
    """

    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For JSON: plain values; what is not a number is null."""
        found = {
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "layers": [asdict(row) for row in self.layers],
        }
        return _plain(found)

    def ordered(self, text: str) -> list[Row]:
        """Rows of a text by stored bits, those without last."""
        return sorted(
            (row for row in self.rows if row.text == text), key=lambda row: math.inf if row.bits is None else row.bits
        )

    @property
    def texts(self) -> list[str]:
        """Names of the texts, in the order of measurement."""
        return list(dict.fromkeys(row.text for row in self.rows))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------------------------------------- tables


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


def _with_error(row: Row, name: str, form: str) -> str:
    error = _number(row.statistics[f"{name}_error"], ".1g")
    return format(row.statistics[name], form) + (f" ± {error}" if error else "")


def _label(row: Row) -> str:
    control = "emulated" if row.prefill and row.how == "emulated" else ""
    return ", ".join(part for part in (row.method, row.prefill, control) if part)


_MEANS: Final[Mapping[str, Callable[[Row], str]]] = {
    "method": _label,
    "bits": lambda row: _number(row.bits, ".2f"),
    "as held": lambda row: _number(row.bits_held, ".2f"),
    "KL": lambda row: _with_error(row, "kl_mean", ".3g"),
    "top-1": lambda row: _with_error(row, "top1", ".4f"),
    "ln ppl ratio": lambda row: _with_error(row, "ln_ppl_ratio", "+.4f"),
}
_QUANTILES: Final[Mapping[str, Callable[[Row], str]]] = {
    "method": _label,
    "KL, median": lambda row: _number(row.statistics["kl_median"], ".3g"),
    "99 %": lambda row: _number(row.statistics["kl_99"], ".3g"),
    "99.9 %": lambda row: _number(row.statistics["kl_99.9"], ".3g"),
    "max": lambda row: _number(row.statistics["kl_max"], ".3g"),
}

LEGEND: Final = (
    "KL: divergence of the next token's distribution from the model on its exact cache, nats, mean ± standard error "
    "over windows. bits: stored per element in layers that hold every token; as held: in all layers, sliding windows "
    "only their window. decoquant is decoded through the compiled model, its prompt run compiled or eager; all other "
    "methods are emulated (fake-quantised) inside the plain model."
)


def tables(results: Results, text: str) -> list[Table]:
    """The methods on a text, KL divergence along its windows, and by layer."""
    rows = results.ordered(text)
    bins = rows[0].by_position if rows else []
    positions = ["method", *(f"{first}-{last}" for first, last, _ in bins)]
    found = [
        _table(f"{text}: methods by stored bits", _MEANS, ([cell(row) for cell in _MEANS.values()] for row in rows)),
        _table(f"{text}: quantiles", _QUANTILES, ([cell(row) for cell in _QUANTILES.values()] for row in rows)),
        _table(
            f"{text}: KL by position",
            positions,
            ([_label(row), *(f"{mean:.2g}" for _, _, mean in row.by_position)] for row in rows),
        ),
    ]
    layers = [row for row in results.layers if row.text == text]
    for method in dict.fromkeys(row.method for row in layers):
        title = f"{text}: KL that one layer costs, {method}, emulated, all else exact"
        lines = _layer_lines([row for row in layers if row.method == method])
        found.append(_table(title, ("layer", "keys", "values"), lines))
    return found


def _layer_lines(layers: Sequence[LayerRow]) -> list[list[str]]:
    lines: dict[int, dict[str, str]] = {}
    for row in layers:
        error = _number(row.kl_error, ".1g")
        lines.setdefault(row.layer, {})[row.role] = f"{row.kl_mean:.3g}" + (f" ± {error}" if error else "")
    return [[str(layer), sides.get("key", ""), sides.get("value", "")] for layer, sides in lines.items()]


def _table(title: str, heads: Iterable[str], lines: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head == "method" else "right", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    return table


# ---------------------------------------------------------------------------------------------------------------- files


def write(path: pathlib.Path, results: Results) -> None:
    """Writes the results as ``.json``, as a self-contained ``.html`` page, or draws them as ``.png``."""
    if path.suffix == ".json":
        path.write_text(json.dumps(results.document(), indent=1) + "\n", encoding="utf-8")
    elif path.suffix == ".html":
        path.write_text(_page(results), encoding="utf-8")
    else:
        path.write_bytes(_picture(results))


_STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:80em;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ccc}"
    "td:first-child,th:first-child{text-align:left}caption{text-align:left;font-weight:600}img{max-width:100%}"
)


def _page(results: Results) -> str:
    title = html.escape(f"KV cache quality: {results.settings.get('model', '')}")
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>',
        f"<h1>{title}</h1><p>{html.escape(LEGEND)}</p>",
    ]
    if results.rows:
        picture = base64.b64encode(_picture(results)).decode()
        parts.append(f'<img alt="KL divergence against stored bits" src="data:image/png;base64,{picture}">')
    for text in results.texts:
        parts += [_html(table) for table in tables(results, text)]
    settings = html.escape(json.dumps(_plain(results.settings), indent=1))
    return "\n".join([*parts, f"<h2>Settings</h2><pre>{settings}</pre></html>"]) + "\n"


def _html(table: Table) -> str:
    heads = "".join(f"<th>{html.escape(str(column.header))}" for column in table.columns)
    columns = [list(column.cells) for column in table.columns]
    lines = ["<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in line) for line in zip(*columns, strict=True)]
    return f"<table><caption>{html.escape(str(table.title))}</caption><tr>{heads}" + "".join(lines) + "</table>"


def _picture(results: Results) -> bytes:
    """KL divergence against stored bits, on a log axis; a panel for each text."""
    import matplotlib as mpl  # noqa: PLC0415  # only a picture needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    texts = results.texts or [""]
    figure, axes = plt.subplots(1, len(texts), figsize=(8 * len(texts), 6), squeeze=False, layout="constrained")
    palette = plt.get_cmap("tab20")
    families = list(dict.fromkeys(map(_family, results.rows)))
    for axis, text in zip(axes[0], texts, strict=True):
        for number, family in enumerate(families):
            rows = [row for row in results.ordered(text) if _family(row) == family and row.bits is not None]
            if not rows:
                continue
            ours = family.startswith("decoquant")
            axis.errorbar(
                [row.bits for row in rows],
                [max(row.statistics["kl_mean"], 1e-7) for row in rows],
                [0 if math.isnan(row.statistics["kl_mean_error"]) else row.statistics["kl_mean_error"] for row in rows],
                marker="o" if ours else "s",
                linestyle="-" if ours else ":",
                linewidth=2 if ours else 1,
                color=palette(number % palette.N),
                label=family,
            )
        axis.set_yscale("log")
        axis.set_title(text)
        axis.set_xlabel("stored bits per element")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("KL divergence from the exact cache, nats")
    if families:
        axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=120)
    plt.close(figure)
    return target.getvalue()


def _family(row: Row) -> str:
    """What is one curve: a method at all its widths."""
    name, _, rest = row.method.partition(":")
    modifiers = "".join(f"+{part}" for part in rest.split("+")[1:])
    emulation = " (emulated)" if name == "decoquant" and row.how == "emulated" else ""
    return name + modifiers + emulation + (f", {row.prefill} prefill" if row.prefill else "")
