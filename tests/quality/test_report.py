import io
import json
import math

import pytest
from rich.console import Console

from decoquant_compile.quality import report
from decoquant_compile.quality.report import LayerRow, Results, Row

BINS = [(10, 14, 0.25), (15, 19, 0.5)]


def statistics(kl):
    names = ("kl_mean", "kl_mean_error", "kl_median", "kl_99", "kl_99.9", "kl_max", "top1", "top1_error")
    return dict.fromkeys((*names, "ln_ppl_ratio", "ln_ppl_ratio_error"), kl)


def results():
    return Results(
        {"model": "<tiny>", "every": float("nan")},
        [
            Row("prose", "kivi:4", "emulated", "", statistics(0.125), BINS, 5.13),
            Row("prose", "decoquant:4", "operators", "compiled", statistics(0.0625), BINS, 4.16, 5.5),
            Row("prose", "decoquant:4", "emulated", "compiled", statistics(0.0626), BINS),
            Row("code", "decoquant:4", "operators", "eager", statistics(math.nan), BINS, 4.16, 5.5),
        ],
        [LayerRow("prose", "decoquant:4", at, role, 0.5**at, 0.01) for at in range(2) for role in ("key", "value")],
    )


def shown(found):
    console = Console(width=200, file=io.StringIO())
    for table in found:
        console.print(table)
    return console.file.getvalue()


def test_tables_are_ordered_by_bits_and_show_every_figure():
    text = shown(report.tables(results(), "prose"))
    rows = [line for line in text.splitlines() if line.startswith(("│ decoquant", "│ kivi"))]
    assert [row.split("│")[1].strip() for row in rows[:3]] == [
        "decoquant:4, compiled",
        "kivi:4",
        "decoquant:4, compiled, emulated",
    ]
    for cell in ("4.16", "5.50", "0.0625 ± 0.06", "10-14", "15-19", "0.25", "1 ± 0.01", "0.5 ± 0.01"):
        assert cell in text
    assert "eager" not in text


def test_json_holds_everything_and_no_nan(tmp_path):
    path = tmp_path / "x.json"
    report.write(path, results())
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found["settings"] == {"model": "<tiny>", "every": None}
    assert [row["method"] for row in found["rows"]] == ["kivi:4", "decoquant:4", "decoquant:4", "decoquant:4"]
    assert found["rows"][1]["statistics"]["kl_mean"] == 0.0625
    assert found["rows"][1]["bits_held"] == 5.5
    assert found["rows"][3]["statistics"]["kl_mean"] is None
    assert found["rows"][0]["by_position"] == [list(part) for part in BINS]
    assert len(found["layers"]) == 4


def test_the_page_stands_alone_and_is_escaped(tmp_path):
    path = tmp_path / "x.html"
    report.write(path, results())
    page = path.read_text()
    assert "&lt;tiny&gt;" in page
    assert "<tiny>" not in page
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page
    assert page.count("<table>") == 3 + 1 + 3  # the breakdown is of the first text alone
    assert "decoquant:4, eager" in page


def test_the_picture_is_a_png(tmp_path):
    path = tmp_path / "x.png"
    report.write(path, results())
    assert path.read_bytes().startswith(b"\x89PNG")
    report.write(path, Results({}))  # even of nothing
    assert path.read_bytes().startswith(b"\x89PNG")
