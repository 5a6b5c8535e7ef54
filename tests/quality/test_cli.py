import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from decoquant_compile.quality import cli, text
from tests.quality import tiny


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tiny.save(tmp_path_factory.mktemp("model"))
    (path / "prose.txt").write_text(tiny.prose(), encoding="utf-8")
    return path


def test_the_whole_way(folder, tmp_path):
    out = [tmp_path / f"x.{kind}" for kind in ("json", "html", "png")]
    arguments = ["--text", folder / "prose.txt", "--prompt", 60, "--context", 110, "--windows", 2, "--bits-at", 256]
    arguments += ["--bits", "K3V2", "--methods", "rtn:4+window,q8_0", "--control", "--layers", "--option", "window=32"]
    result = run(folder, *arguments, *(part for path in out for part in ("--out", path)))
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = json.loads(out[0].read_text())
    rows = found["rows"]
    assert [(row["method"], row["how"], row["prefill"]) for row in rows] == [
        ("decoquant:K3V2", "operators", "compiled"),
        ("decoquant:K3V2", "emulated", "compiled"),
        ("rtn:4+window", "emulated", ""),
        ("q8_0", "emulated", ""),
    ]
    assert all(row["statistics"]["kl_mean"] > 0 for row in rows)
    assert rows[3]["statistics"]["kl_mean"] < rows[2]["statistics"]["kl_mean"]
    assert 3 < rows[0]["bits"] == rows[0]["bits_held"] < 10
    assert rows[3]["bits"] == 8.5
    assert found["settings"]["options"] == {"window": 32}
    assert [(row["method"], row["layer"], row["role"]) for row in found["layers"]] == [
        (method, layer, role)
        for method in ("decoquant:K3V2", "rtn:4+window", "q8_0")
        for layer in range(2)
        for role in ("key", "value")
    ]
    assert "KL by position" in result.output
    assert all(path.stat().st_size > 1000 for path in out)


def test_rivals_alone_on_the_default_texts(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(text, "literary", lambda: None)
    arguments = ["--bits", "", "--methods", "rtn:2,rtn:8", "--prompt", 20, "--context", 40, "--windows", 1]
    result = run(folder, *arguments, "--out", tmp_path / "x.json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "no literary text" in result.output
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["text"], row["method"]) for row in rows] == [("technical", "rtn:2"), ("technical", "rtn:8")]
    assert rows[0]["statistics"]["kl_mean_error"] is None


def test_both_prefills_are_measured(folder, monkeypatch, tmp_path):
    """The order and the names of what is run; the runs themselves are those of `measure`."""
    seen = []

    def decoded(subject, ids, setting, options, prefill, tick, slots):
        seen.append((options, prefill))
        assert slots == 40
        return cli.measure.exact(subject, ids, setting)

    monkeypatch.setattr(cli.measure, "decoded", decoded)
    arguments = ["--text", folder / "prose.txt", "--prompt", 20, "--context", 40, "--windows", 1, "--bits-at", 0]
    result = run(folder, *arguments, "--bits", "K4V3,8", "--prefill", "both", "--out", tmp_path / "x.json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    mixed, same = {"key_bits": 4, "value_bits": 3}, {"bits": 8}
    assert seen == [(mixed, "compiled"), (mixed, "eager"), (same, "compiled"), (same, "eager")]
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert all(row["statistics"]["kl_mean"] == 0 and row["bits"] is None for row in rows)


def test_an_average_is_allotted_over_the_caches_whose_bits_are_counted(folder, monkeypatch):
    seen = []

    def decoded(subject, ids, setting, options, prefill, tick, slots):
        seen.append(slots)
        return cli.measure.exact(subject, ids, setting)

    monkeypatch.setattr(cli.measure, "decoded", decoded)
    monkeypatch.setattr(cli.measure, "stored_bits", lambda *_: cli.measure.Bits(3.0, 3.0))
    arguments = ["--text", folder / "prose.txt", "--prompt", 20, "--context", 40, "--windows", 1]
    for at in (60, 0):
        result = run(folder, *arguments, "--bits", "4,3.2", "--bits-at", at)
        assert result.exit_code == 0, result.output + repr(result.exception)
    assert seen == [40, 60, 40, 40]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--bits", "9"], "9"),
        (["--bits", "3.2", "--control"], "cannot be emulated"),
        (["--bits", "K4"], "no width"),
        (["--bits", ""], "nothing to measure"),
        (["--methods", "nothing"], "no method"),
        (["--methods", "q4_0:3"], "no 3 bits"),
        (["--option", "window"], "NAME=VALUE"),
        (["--option", "nothing=1"], "nothing"),
        (["--prompt", "39", "--context", "40"], "leaves nothing"),
        (["--bits-at", "1"], "at least 2"),
        (["--out", "x.pdf"], ".json"),
        (["--out", "nowhere/x.json"], "no folder"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--windows", "4000"], "too short"),
    ],
)
def test_bad_input_is_told(folder, arguments, reason):
    result = run(folder, *arguments)
    assert result.exit_code in (1, 2)
    assert reason in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_model_that_is_not_there(tmp_path):
    result = run(tmp_path / "none.gguf", "--windows", 1)
    assert result.exit_code == 1
    assert "none.gguf" in result.output


def test_an_average_of_bits_is_passed_on_unchanged():
    assert cli._width("3.2") == {"bits": 3.2}
    assert cli._width("4") == {"bits": 4}
    assert cli._width("K5V4") == {"key_bits": 5, "value_bits": 4}


@pytest.mark.parametrize("missing", ["click", "transformers"])
def test_a_missing_extra_is_named(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; import runpy; "
        "runpy.run_module('decoquant_compile.quality', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert f"needs {missing}" in done.stderr
    assert "[quality]" in done.stderr


def test_gradients_stay_as_they_were():
    assert torch.is_grad_enabled()
