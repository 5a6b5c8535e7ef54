"""The coverage table: every attention of every architecture is rewritten or has a reason."""

import random

import pytest
import torch

from decoquant_compile.coverage import architectures
from decoquant_compile.coverage import cells as coverage_cells
from decoquant_compile.coverage.cells import ATTENTIONS, BOUNDS, CACHES, PREFILLS, measure
from decoquant_compile.coverage.idioms import IDIOMS
from decoquant_compile.patterns.reject import Reason
from decoquant_compile.report import GraphReport, Untouched

# What a cell may say of an attention. "UNSEEN" and "ERROR" are none: they are faults of ours.
OUTCOMES = {"rewritten", *Reason.__members__, Untouched.UNSUPPORTED.name, "GRAPH_BREAK"}


def cells(name, attention, **how):
    return list(measure(name, attention, how.pop("caches", CACHES), how.pop("prefills", tuple(PREFILLS)), **how))


def assert_explained(cell):
    assert cell.refused or cell.attentions, cell
    assert {a.outcome for a in cell.attentions} <= OUTCOMES, cell


@pytest.mark.parametrize("name", ["GptFast", "Rolling", "NanoGpt"])
def test_idioms(name):
    for cell in cells(name, "own"):
        assert_explained(cell)
        assert cell.complete


def test_a_missed_attention_is_no_success(monkeypatch):
    for missed in (False, True):
        if missed:
            monkeypatch.setattr(coverage_cells, "packed", lambda *_: None)
        (cell,) = cells("MetaLlama", "own", prefills=("one",))
        assert cell.complete != missed
        assert {a.outcome for a in cell.attentions} == ({"UNSEEN"} if missed else {"rewritten"})


def test_an_attention_that_dynamo_cuts_is_named():
    def outcomes(*reports, breaks=()):
        found = coverage_cells._attentions([(report, 0) for report in reports], set(), 1, 2, breaks)
        return [attention.outcome for attention in found]

    softmax_alone = GraphReport("0/0", untouched=Untouched.NO_SITE)
    nothing = GraphReport("1/0", untouched=Untouched.NO_ATTENTION)
    assert outcomes(nothing, softmax_alone) == ["GRAPH_BREAK"]
    assert outcomes(softmax_alone) == outcomes(nothing, nothing) == ["UNSEEN"]
    assert outcomes(nothing, breaks=["Tensor.item()"]) == ["GRAPH_BREAK"]
    rejected = GraphReport("2/0", untouched=Untouched.UNSUPPORTED)
    assert outcomes(nothing, rejected, breaks=["Tensor.item()"]) != ["GRAPH_BREAK"]


def test_an_architecture():
    static, dynamic = cells("llama", "sdpa", prefills=("one",))
    assert_explained(static)
    assert static.rewritten >= 2
    assert_explained(dynamic)


def test_what_the_library_refuses_is_no_cell_of_ours():
    (cell,) = cells("gptj", "sdpa", caches=("static",), prefills=("one",))
    assert "does not support" in cell.refused
    (cell,) = cells("mamba", "eager", caches=("static",), prefills=("one",))
    assert cell.refused


def test_enough_architectures_can_be_made():
    """The library's own mapping; the count of those that run with a KV cache is tested in the sweep."""
    names = architectures.names()
    assert len(names) > 150
    assert {"llama", "t5:seq2seq", "whisper:seq2seq"} <= set(names)
    sample = random.Random(0).sample(names, 6)
    built = []
    for name in sample:
        try:
            built.append(architectures.Architecture(name, "eager"))
        except architectures.Unavailable:
            continue
    assert len(built) >= 3


@pytest.mark.parametrize("compiled", [False, True])
def test_checks_of_results(compiled):
    (cell,) = cells("LitGpt", "own", prefills=("one",), bits=(16,), compiled=compiled)
    assert cell.checks[16].error <= BOUNDS[16]
    assert cell.checks[16].tokens == 1
    assert not cell.wrong


def test_a_wrong_result_is_called_so(monkeypatch):
    def off(gm, *_, **__):
        return lambda *inputs: [
            x + 1 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in gm(*inputs)
        ]

    monkeypatch.setattr(coverage_cells, "_uncompiled", off)
    (cell,) = cells("LitGpt", "own", prefills=("one",), bits=(16, 8))
    assert cell.wrong == [16, 8]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IDIOMS, *architectures.names()])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_cell(name, attention):
    if name in IDIOMS and attention != "sdpa":
        pytest.skip("an idiom has its own attention")
    for cell in cells(name, attention, bits=tuple(BOUNDS), compiled=True):
        assert_explained(cell)
        assert not cell.wrong, cell
