"""Every private PyTorch name that this package uses, checked on torch 2.13.0.

Nothing else in the package may import from an underscored torch module; a new torch release is checked here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch._dynamo import config as dynamo_config
from torch._dynamo import error_on_graph_break
from torch._dynamo.exc import RestartAnalysis, SkipFrame, TensorifyScalarRestartAnalysis
from torch._dynamo.source import SyntheticLocalSource
from torch._guards import CompileContext, TracingContext
from torch._inductor import list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx
from torch._logging import trace_structured
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext, statically_known_true
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

__all__ = [
    "DataDependent",
    "FakeCopyMode",
    "FakeTensor",
    "FakeTensorMode",
    "TensorifyScalarRestartAnalysis",
    "TracingContext",
    "add_input_source",
    "compile_fx",
    "dynamo_limits",
    "entries_of_this_frame",
    "error_on_graph_break",
    "fake_copies",
    "inductor_options",
    "mode_options",
    "statically_known_true",
    "trace_artifact",
]


def inductor_options() -> frozenset[str]:
    """Names that Inductor's own configuration knows."""
    return frozenset(list_options())


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings behind a `torch.compile` mode such as "reduce-overhead"."""
    return list_mode_options(mode)


def add_input_source(node: fx.Node, example: Tensor, name: str) -> None:
    """Make the new placeholder `node` an input that AOTAutograd accepts beside Dynamo's own.

    Its one dimension is symbolic: buffers of caches with another length pass through the same compiled graph. "unguarded"
    marks a static address for CUDA graphs.
    """
    source = SyntheticLocalSource(name)
    node._dynamo_source = source  # type: ignore[attr-defined]
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    context = StatefulSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC],
        dynamic_strides=[DimDynamic.INFER_STRIDE],
        constraint_sizes=[None],
        constraint_strides=[None],
        tensor_source=source,
        shape_env_to_source_to_symbol_cache={},
    )
    if (tracing := TracingContext.try_get()) is not None:
        tracing.tensor_to_context[example] = context


def size_node(graph: fx.Graph, size: torch.SymInt) -> fx.Node:
    """A node that computes a symbolic size from the graph's inputs, at the graph's insertion point.

    Raises:
        LookupError: no input carries one of its symbols.
    """
    carriers: dict[object, fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            carriers.setdefault(value.node.expr, node)
    expr = size.node.expr
    if expr in carriers:
        return carriers[expr]
    if missing := expr.free_symbols - carriers.keys():
        raise LookupError(f"no input of the graph carries {', '.join(map(str, missing))} of the size {expr}")
    tracer = fx.proxy.GraphAppendingTracer(graph)
    symbols = {symbol: fx.Proxy(carriers[symbol], tracer) for symbol in expr.free_symbols}
    computed: fx.Proxy = sympy_interp(PythonReferenceAnalysis, symbols, expr)
    return computed.node

def entries_of_this_frame() -> tuple[str, int]:
    """Dynamo's name of the frame being compiled and how many entries it has, this one included."""
    compile_id = CompileContext.current_compile_id()
    if compile_id is None or compile_id.frame_compile_id is None:
        return "?", 1
    return str(compile_id.frame_id), compile_id.frame_compile_id + 1


@contextlib.contextmanager
def dynamo_limits(recompile_limit: int) -> Iterator[None]:
    """Raise Dynamo's per-frame limit of compiled entries while the block runs; never lower it."""
    wanted = max(recompile_limit, recompile_limit_now())
    with dynamo_config.patch(
        recompile_limit=wanted, accumulated_recompile_limit=max(dynamo_config.accumulated_recompile_limit, 4 * wanted)
    ):
        yield


def recompile_limit_now() -> int:
    """Dynamo's present per-frame limit of compiled entries."""
    return int(dynamo_config.recompile_limit)


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Hand a text to torch's structured trace (tlparse), if one is being recorded."""
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": f"decoquant_{name}", "encoding": "string"}, payload_fn=payload
    )


def is_restart(error: BaseException) -> bool:
    """Whether an exception is Dynamo's own control flow, which a backend must let through."""
    return isinstance(error, RestartAnalysis | SkipFrame | TensorifyScalarRestartAnalysis)


def real_inputs(example_inputs: Sequence[object]) -> bool:
    """Whether no example input is a fake tensor."""
    return not any(isinstance(x, FakeTensor) for x in example_inputs)


T = TypeVar("T")

DataDependent = DataDependentOutputException


@contextlib.contextmanager
def fake_copies(objects: T) -> Iterator[T]:
    """Yield a deep copy of `objects` whose tensors have shapes but no data; inside the block no kernel runs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        copies = copy.deepcopy(objects)
    with mode:
        yield copies


def has_grad_inputs(example_inputs: Sequence[object]) -> bool:
    """Whether the graph being compiled records gradients."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
