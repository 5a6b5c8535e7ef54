"""`explain(...)`: the report of a call, without running a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from decoquant_compile import _compat
from decoquant_compile.backend import Compiled, find, within_policy
from decoquant_compile.options import Options
from decoquant_compile.report import GraphReport, Report, Untouched


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Report every attention that `torch.compile` finds in a call, and what would be done with it.

    The call runs on copies of the model and the arguments whose tensors have shapes but no data, so no kernel runs and
    nothing of the caller's changes; like `torch._dynamo.explain`, it goes on through graph breaks. Code between graphs
    that needs a tensor's value ends the walk, with a note in the report.

    Args:
        model: a module or function, compiled or not.
        *args: its arguments, the cache included.
        **kwargs: its keyword arguments.

    Returns:
        The report: graphs, findings, reasons.
    """
    report = Report()
    options = Options()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        frame, entry = _compat.entries_of_this_frame()
        graph = GraphReport(f"{frame}/{entry - 1}")
        report.graphs.append(graph)
        found = find(gm, example_inputs, graph)
        if found is not None and not within_policy(found[1], options, graph, found[0]):
            graph.untouched = Untouched.NO_SITE
        return gm.forward

    backend._decoquant_backend = True  # type: ignore[attr-defined]
    target = getattr(model, "_orig_mod", model)
    target = getattr(target, "_torchdynamo_orig_callable", target)
    with _compat.fake_copies((target, args, kwargs)) as (fake_model, fake_args, fake_kwargs):
        # Entries of earlier explanations stay with the code: they must not use up the caller's limit here.
        with _compat.dynamo_limits(_compat.recompile_limit_now() + 64):
            try:
                torch.compile(fake_model, backend=backend)(*fake_args, **fake_kwargs)
            except _compat.DataDependent as error:
                report.notes.append(f"the walk ended where code needs a tensor's value: {error}")
    return report
