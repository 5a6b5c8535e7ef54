"""Tables of cells that are made up."""

import json
import logging
import unittest.mock

import pytest
import transformers
from click.testing import CliRunner
from rich.console import Console

from decoquant_compile.coverage import cli, report
from decoquant_compile.coverage.cells import Attention, Cell, Check

YES = Attention("sdpa", "slice", "rewritten", "K4 V4")
NO = Attention("sdpa", "", "SHARED_CACHE", "keys: a, b")
CELLS = [
    Cell("a", "sdpa", "static", "one", attentions=[YES, YES], checks={16: Check(1e-6, 1.0)}),
    Cell("a", "sdpa", "dynamic", "one", attentions=[YES, NO, NO], checks={16: Check(0.5, 1.0), 8: Check(0.01, 0.8)}),
    Cell("b", "sdpa", "static", "one", refused="ValueError: no"),
    Cell("c", "own", "own", "one"),
]


def test_a_cell_counts_as_rewritten_only_if_every_attention_is():
    assert [c.complete for c in CELLS] == [True, False, False, False]
    found = report.summary(CELLS)
    assert (found["cells"], found["complete"], found["refused"]) == (3, 1, 1)
    assert (found["attentions"], found["rewritten"]) == (5, 3)
    assert found["cells by reason"] == {"SHARED_CACHE": 1}


def test_wrong_results_are_named():
    assert [c.wrong for c in CELLS] == [[], [16, 8], [], []]
    assert report.summary(CELLS)["wrong"] == ["a sdpa dynamic one"]
    assert report.text(CELLS[1]) == "1/3 2 SHARED_CACHE 16 bits: WRONG 0.5 8 bits: WRONG 0.01"


def test_tables(tmp_path):
    document = json.loads(report.document(CELLS, {"check": True}))
    assert len(document["cells"]) == 4
    assert report.read(json.dumps(document)) == CELLS
    settings = {"attention": ["sdpa"], "cache": ["static", "dynamic"], "prefill": ["one"]}
    markdown = report.markdown(CELLS, settings)
    assert "--attention sdpa --cache static,dynamic --prefill one" in markdown
    assert "| sdpa | 1 | 2 | 50.0% | 50.0% |" in markdown
    assert "| a | sdpa/slice, sdpa | 2/2" in markdown
    assert "ValueError: no" in markdown
    assert "\n| b |" not in markdown
    console = Console(record=True, width=160)
    console.print(report.tables(CELLS))
    assert "SHARED_CACHE" in console.export_text()


@pytest.mark.parametrize(
    "arguments", [["--only", "no_such_model"], ["--attention", "flash"], ["--out", "x.txt"], ["--out", "no/folder.md"]]
)
def test_bad_input_is_named(arguments):
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert arguments[1].split(",")[0] in result.output


def test_the_whole_way(tmp_path):
    out = tmp_path / "x.json", tmp_path / "x.md"
    arguments = ["--only", "Ring", "--prefill", "one", "--out", str(out[0]), "--out", str(out[1])]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    (cell,) = json.loads(out[0].read_text())["cells"]
    assert {a["outcome"] for a in cell["attentions"]} == {"rewritten"}
    assert "| Ring |" in out[1].read_text()
    out[1].unlink()
    known = ["--known", str(out[0]), "--only", "Ring", "--out", str(out[1])]
    with unittest.mock.patch.object(cli, "measure", side_effect=AssertionError("it is known")):
        assert CliRunner().invoke(cli.main, known).exit_code == 0
    assert "| Ring |" in out[1].read_text()


def test_logs_are_left_as_they_were(caplog):
    caplog.set_level(logging.INFO, "decoquant_compile")
    log, theirs = logging.getLogger("decoquant_compile"), transformers.logging.get_verbosity()
    levels = []

    def measure(*_, **__):
        levels.append(log.level)
        return [CELLS[3]]

    with unittest.mock.patch.object(cli, "measure", measure):
        assert CliRunner().invoke(cli.main, ["--only", "Ring"]).exit_code == 0
    assert (levels, log.level, transformers.logging.get_verbosity()) == ([logging.CRITICAL], logging.INFO, theirs)


def test_rebuilt_caches_count_apart():
    cell = Cell("d", "sdpa", "static", "one", attentions=[Attention("sdpa, rebuilt", "cat", "rewritten")])
    found = report.summary([*CELLS, cell])
    assert (found["complete"], found["without rebuilt caches"]) == (2, 1)
