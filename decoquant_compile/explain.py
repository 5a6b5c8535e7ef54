"""`explain(...)`: the report of a call, without running a kernel."""

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from decoquant_compile import _compat
from decoquant_compile.backend import Compiled, contained, find
from decoquant_compile.options import Options
from decoquant_compile.report import GraphReport, Report
from decoquant_compile.takeover import holds_tensors

_ENTRIES = 64  # of one frame in one call: a module's forward may run for every layer


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

    Raises:
        ValueError: the function uses a model or cache that is not among its arguments, and so would not be copied.
    """
    model = _compat.uncompiled(model)
    _check_variables(model)
    report = Report()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        graph = GraphReport(_compat.graph_name())
        report.graphs.append(graph)
        with contained(graph):
            find(gm, example_inputs, Options(), graph)
        return lambda *inputs: gm.forward(*map(_compat.without_data, inputs))

    backend._decoquant_backend = True  # type: ignore[attr-defined]
    with (
        _compat.fake_copies((model, args, kwargs)) as (fake_model, fake_args, fake_kwargs),
        _compat.dynamo_limits(_ENTRIES),
        torch.compiler.set_stance("default"),  # inside `enable`, its backend would take our place
    ):
        _rebind((model, *args, *kwargs.values()), (fake_model, *fake_args, *fake_kwargs.values()))
        try:
            _compat.compile_isolated(fake_model, backend)(*fake_args, **fake_kwargs)
        except _compat.DataDependent as error:
            report.notes.append(f"the walk ended where code needs a tensor's value: {error}")
    return report


def _check_variables(function: object) -> None:
    """Refuse a function that reaches a model or cache through a closure or a global: it would change for real."""
    if not inspect.isfunction(function):
        return
    variables = inspect.getclosurevars(inspect.unwrap(function))
    for name, value in {**variables.globals, **variables.nonlocals}.items():
        if not isinstance(value, Tensor) and holds_tensors(value):
            raise ValueError(
                f"{function.__qualname__} uses {name!r}, a {type(value).__name__}, which cannot be copied from there: "
                "pass it as an argument, explain(function, model, cache)"
            )


def _rebind(originals: Sequence[object], copies: Sequence[object]) -> None:
    """Let the modules of a copied model run themselves where `forward` is a compiled method of the module they copy."""
    for original, copied in zip(originals, copies, strict=True):
        ours, theirs = getattr(original, "__self__", original), getattr(copied, "__self__", copied)
        if not isinstance(ours, nn.Module) or not isinstance(theirs, nn.Module):
            continue
        for module, twin in zip(ours.modules(), theirs.modules(), strict=True):
            forward = vars(module).get("forward", module.forward)
            method: Any = _compat.uncompiled(forward)
            if method is not forward and getattr(method, "__self__", None) is module:
                twin.forward = types.MethodType(method.__func__, twin)
