"""One way to use one model, and what becomes of its attentions."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx

from decoquant_compile import _compat
from decoquant_compile.backend import contained, find
from decoquant_compile.options import Options
from decoquant_compile.report import GraphReport, Untouched
from decoquant_compile.coverage.architectures import Architecture, Unavailable, cached_layers, prompts

PREFILLS: Final = {"one": (6, 1, 1, 1, 1), "chunked": (10, 3, 1, 1)}
"""Tokens of the calls. The longest chunk is longer than the sliding window; the single steps cross its edge."""


@dataclass
class Cell:
    subject: str
    attention: str
    cache: str
    prefill: str
    refused: str = ""
    attentions: list[tuple[str, str, str, str]] = field(default_factory=list)  # form, write, outcome, detail
    seconds: float = 0


class Recorder:
    """A backend that matches each graph and runs it as Dynamo traced it; notes which graphs run."""

    def __init__(self) -> None:
        self.ran: list[GraphReport] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        report = GraphReport(_compat.graph_name())
        with contained(report):
            find(gm, example_inputs, Options(), report)

        def run(*inputs: Any) -> Any:
            self.ran.append(report)
            return gm.forward(*inputs)

        return run


def measure(name: str, attention: str, caches: Sequence[str], prefills: Sequence[str]) -> list[Cell]:
    """All cells of one architecture with one attention implementation."""
    cells = [Cell(name, attention, cache, prefill) for cache, prefill in itertools.product(caches, prefills)]
    try:
        subject = Architecture(name, attention)
    except Unavailable as error:
        for cell in cells:
            cell.refused = f"{error}"
        return cells
    if not subject.caches:
        for cell in cells:
            cell.refused = "no KV cache"
        return cells
    torch.compiler.reset()
    recorder = Recorder()
    compiled = torch.compile(subject.model.forward, backend=recorder)
    with torch.no_grad(), _compat.dynamo_limits(64):
        for cell in cells:
            start = time.perf_counter()
            try:
                if attention != "flex_attention":
                    _run(subject, subject.model.forward, cell)
            except Exception as error:
                cell.refused = f"eager: {type(error).__name__}: {error}"
                continue
            try:
                _run(subject, compiled, cell, recorder)
            except Exception as error:
                cell.refused = f"compiled: {type(error).__name__}: {error}"
            cell.seconds = time.perf_counter() - start
    return cells


def _run(subject, forward, cell, recorder=None):
    cache, logits = subject.cache(cell.cache), []
    sizes = PREFILLS[cell.prefill]
    seen = {}
    for ids in prompts(1, sum(sizes)).split(sizes, 1):
        if recorder:
            recorder.ran.clear()
        logits.append(subject.step(forward, cache, ids))
        if recorder:
            found = 0
            for graph in recorder.ran:
                found += len(graph.findings)
                if id(graph) in seen:
                    continue
                seen[id(graph)] = graph
                cell.attentions += [(f.form, f.write, f.outcome, f.detail) for f in graph.findings]
                if graph.untouched in (Untouched.UNSUPPORTED, Untouched.INTERNAL_ERROR):
                    cell.attentions.append(("","",graph.untouched.name, graph.detail))
            expected = len(cached_layers(cache))
            if found < expected:
                cell.attentions.append(("","","UNSEEN",f"{found} of {expected} in a call of {ids.shape[1]}"))
    return logits
