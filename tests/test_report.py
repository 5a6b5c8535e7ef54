"""What a report shows, and which graphs it holds."""

import io
import weakref

import pytest
import rich.console
import torch

from decoquant_compile import runtime
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState
from decoquant_compile.report import Finding, GraphReport, Report, TakenOver, Untouched


def rendered(report):
    console = rich.console.Console(width=140, file=io.StringIO())
    console.print(report)
    return console.file.getvalue()


@pytest.fixture
def session():
    report = Report()
    runtime.OPEN.append(report)
    yield report
    runtime.OPEN.remove(report)


def test_graphs_are_told_apart_by_identity(session):
    """After `torch.compiler.reset()` Dynamo counts frames anew: two graphs may look alike."""
    first, second = GraphReport("0/0"), GraphReport("0/0")
    for graph in (first, second, first):
        runtime.announce(graph)
    assert [id(graph) for graph in session.graphs] == [id(first), id(second)]


def test_sessions_are_told_apart_by_identity(session):
    assert Report() not in runtime.OPEN
    assert session in runtime.OPEN


BRACKETS = "a mask of shape [s27, 4] for [/b] and [red]"


def test_brackets_are_no_markup():
    finding = Finding("attention", "L['cache'].layers[0].keys", "index_copy", "sdpa", "MASK_FORM", BRACKETS)
    report = Report([GraphReport("[x]0/0", [finding])], notes=[BRACKETS])
    for text in (str(report), rendered(report)):
        assert all(text.count(word) == 2 for word in ("[s27,", "[/b]", "[red]"))  # in the table and in the note
        assert "[x]0/0" in text


def test_an_untouched_graph_has_a_row_with_its_reason():
    report = Report([GraphReport("3/1", untouched=Untouched.UNSUPPORTED, detail="why [s0]")])
    assert "3/1" in str(report)
    assert "normal form: why [s0]" in str(report)
    assert str(report.graphs[0]) == "graph 3/1: untouched, the graph cannot be brought into normal form: why [s0]"


def test_a_graph_with_findings_counts_them():
    rows = [Finding("a", "k", "slice", "sdpa", outcome) for outcome in ("rewritten", "NO_CACHE", "NO_CACHE")]
    graph = GraphReport("0/0", rows)
    assert graph.rewritten == 1
    assert str(graph) == "graph 0/0: 1 of 3 attentions rewritten (2 NO_CACHE)"
    assert list(Report([graph]).findings) == rows


def test_bytes_are_those_of_caches_that_live():
    state = CacheState.empty(Format("key", 4, 8, torch.float32), 1, 1, 64, "cpu")
    report = Report(caches=[TakenOver("keys", "key", 4, weakref.ref(state))])
    assert report.bytes() == (2048, state.nbytes)
    assert "1 cache tensors held packed" in str(report)
    del state
    assert report.bytes() == (0, 0)
    assert "held packed" not in str(report)
