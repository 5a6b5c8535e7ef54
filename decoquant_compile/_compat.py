"""Every private name of PyTorch that this package uses, checked on torch 2.13.0.

No other module reaches into PyTorch's underscored names (tests/test_packaging.py), so a new release is checked here.
"""

import contextlib
import copy
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch._C import _functorch as functorch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import config as dynamo_config
from torch._dynamo import error_on_graph_break as _error_on_graph_break
from torch._dynamo import eval_frame
from torch._dynamo.cache_size import compute_cache_size
from torch._dynamo.exc import RestartAnalysis, SkipFrame, TensorifyScalarRestartAnalysis, TorchRuntimeError
from torch._dynamo.source import SyntheticLocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator, TensorifyState
from torch._dynamo.utils import counters as dynamo_counters
from torch._dynamo.variables.torch_function import TensorWithTFOverrideVariable
from torch._functorch import predispatch
from torch._functorch._aot_autograd import functional_utils
from torch._guards import CompileContext, TracingContext, tracing
from torch._inductor import compile_fx as inductor
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.utils import fresh_cache
from torch._logging import _internal as torch_logging
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental import proxy_tensor, symbolic_shapes
from torch.utils import _python_dispatch, _pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

T = TypeVar("T")


# Dynamo and Inductor


def compile_fx(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config_patches: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph with Inductor."""
    compiled: Any = inductor.compile_fx(gm, list(example_inputs), config_patches=dict(config_patches or {}))
    return compiled


def inductor_options() -> frozenset[str]:
    """Names that Inductor's own configuration knows."""
    return frozenset(list_options())


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings behind a `torch.compile` mode such as "reduce-overhead".

    Raises:
        RuntimeError: there is no such mode.
    """
    return list_mode_options(mode)


def graph_name() -> str:
    """Dynamo's name of the graph being compiled, as its logs have it: the frame and the number of the entry."""
    return str(CompileContext.current_compile_id() or "?")


def entries_of_this_frame() -> int:
    """How many entries Dynamo holds of the frame being compiled, this one included, as its limit counts them."""
    try:
        frame: Any = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return 1
    region = torch._C._dynamo.eval_frame.get_eval_frame_isolate_recompiles_id()
    entries = eval_frame._get_cache_entries_for_region(frame.f_code, region)
    return compute_cache_size(frame, entries).num_cache_entries_with_same_id_matched_objs + 1


def recompile_limit_now() -> int:
    """Dynamo's present per-frame limit of compiled entries."""
    return int(dynamo_config.recompile_limit)


@contextlib.contextmanager
def dynamo_limits(recompile_limit: int) -> Iterator[None]:
    """Raise Dynamo's per-frame limit of compiled entries while the block runs; never lower it."""
    wanted = max(recompile_limit, recompile_limit_now())
    with dynamo_config.patch(
        recompile_limit=wanted, accumulated_recompile_limit=max(dynamo_config.accumulated_recompile_limit, 4 * wanted)
    ):
        yield


error_on_graph_break = _error_on_graph_break
"""Context: whether a graph break is an error."""


def is_restart(error: BaseException) -> bool:
    """Whether an exception is Dynamo's own control flow, which a backend must let through."""
    return isinstance(error, RestartAnalysis | SkipFrame | TensorifyScalarRestartAnalysis)


def make_constant(inputs: Iterable[fx.Node]) -> None:
    """Let Dynamo trace the frame again with some float inputs as constants, guarded.

    Inductor does the same with those that it cannot make tensors of.

    Args:
        inputs: placeholders of Dynamo's graph; those that hold no float are left alone.

    Raises:
        TensorifyScalarRestartAnalysis: Dynamo's control flow, where there are any that are no constants yet.
    """
    numbers = [getattr(node.meta.get("example_value"), "item_memo", None) for node in inputs]
    symbols = {str(number.node._expr) for number in numbers if isinstance(number, torch.SymFloat)}
    if new := {symbol for symbol in symbols if not TensorifyState.should_specialize(symbol)}:
        for symbol in new:
            TensorifyState.specialize(symbol)
        raise TensorifyScalarRestartAnalysis


def tracing_error(message: str) -> Exception:
    """An exception that ends Dynamo's tracing and reaches the user: after a `UserError` it goes on without a graph."""
    return TorchRuntimeError(message)


def compilers_in_use() -> Iterator[object]:
    """The backend for which Dynamo is tracing, then what it wraps; nothing under another tracer."""
    wrapped = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable", "compiler_fn", "func", "__wrapped__")
    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        return
    for _ in range(8):  # wrappers could form a cycle
        if backend is None:
            return
        yield backend
        backend = next((inner for name in wrapped if (inner := getattr(backend, name, None)) is not None), None)


def compile_isolated(model: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` whose entries, though they stay with the code, do not count against the limit of other calls."""
    isolated: dict[str, Any] = {"isolate_recompiles": True}  # not in the annotations of `torch.compile`
    return torch.compile(model, backend=backend, **isolated)


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` wraps, if `model` is its result."""
    model = getattr(model, "_orig_mod", model)
    return getattr(model, "_torchdynamo_orig_callable", model)


# Tracing


def is_traced() -> bool:
    """Whether a graph of Dynamo's is being compiled now."""
    return TracingContext.try_get() is not None


def trace_functional(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """Trace a graph of Dynamo's to functional pre-dispatch ATen, on fakes that share Dynamo's symbolic sizes.

    AOTAutograd's own export runs every graph twice, the first time to see what it writes. Here nothing depends on that
    before the end, so once is enough.

    Returns:
        The graph, and the positions of the inputs that become its first outputs.

    Raises:
        RuntimeError: the graph does to its inputs what no value can express: it changes sizes, strides or storage of
            one, or writes to memory that several share; or tensors made of tensors go in or out.
    """
    context = TracingContext.get()
    mode = context.fake_mode
    assert mode is not None
    fakes = FakeTensorMode(shape_env=mode.shape_env, allow_non_fake_inputs=False)

    def fake(node: fx.Node, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        number = getattr(node.meta.get("example_value"), "item_memo", None)
        symbolic = context.tensor_to_context.get(x)
        if symbolic is None or number is not None:
            copy = fakes.from_tensor(x, static_shapes=True)
            copy.item_memo = number  # a symbol of its own would be one too many: Inductor traces again without it
            return copy
        return fakes.from_tensor(x, symbolic_context=symbolic, source=input_source(node), trace=False)

    inputs = gm.graph.find_nodes(op="placeholder")
    arguments = tuple(fake(node, x) for node, x in zip(inputs, example_inputs, strict=True))
    written: list[int] = []

    def functional(*arguments: Any) -> tuple[Any, ...]:
        with proxy_tensor.maybe_enable_thunkify():  # no nodes for sizes that nothing needs
            wrapped = [functional_utils.to_fun(x) for x in arguments]
            outputs = _Interpreter(gm).run(*wrapped)
            if any(map(_python_dispatch.is_traceable_wrapper_subclass, (*arguments, *outputs))):
                raise RuntimeError("a tensor made of tensors goes in or out")
            if any(itertools.starmap(_reshaped_in_place, zip(wrapped, arguments, strict=True))):
                raise RuntimeError("sizes, strides or storage of an input are changed")
            written.extend(i for i, x in enumerate(wrapped) if functional_utils.has_data_mutation(x))
            storages = Counter(storage_id(x) for x in arguments if isinstance(x, Tensor))
            if any(storages[storage_id(arguments[i])] > 1 for i in written):
                raise RuntimeError("memory is written that inputs share")
            return tuple(functional_utils.from_fun(x) for x in (*(wrapped[i] for i in written), *outputs))

    make = proxy_tensor.make_fx(functional, pre_dispatch=True, _disable_torch_fn_metadata_mode=True)
    with (
        tracing(TracingContext(fakes)),
        fakes,
        torch.no_grad(),
        fx.traceback.preserve_node_meta(),
        enable_python_dispatcher(),
        FunctionalTensorMode(pre_dispatch=True, export=True),
        torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)),
    ):
        traced = make(*arguments)
    return traced, tuple(written)


VMAP_STEPS: Mapping[object, int] = {
    predispatch._vmap_increment_nesting: 1,
    predispatch._vmap_decrement_nesting: -1,
    predispatch._add_batch_dim: 0,
    predispatch._remove_batch_dim: 0,
    predispatch.lazy_load_decompositions: 0,
}
"""Targets of `vmap`: 1 where it is entered, -1 where it is left."""


def is_functorch(target: object) -> bool:
    """Whether a target is part of a functorch transform (vmap, grad)."""
    return str(getattr(target, "__module__", "")).startswith(("torch._functorch", "torch._C._functorch"))


def trace_alone(gm: fx.GraphModule, values: Sequence[Any]) -> fx.GraphModule | None:
    """Trace a part of a graph of Dynamo's, under transforms or not, to ATen, on the fakes that Dynamo made.

    Returns:
        The graph; None if that fails, with the transforms left that it had entered.
    """
    depth = functorch_depth()
    mode = next((x.fake_mode for x in values if isinstance(x, FakeTensor)), TracingContext.get().fake_mode)
    assert mode is not None
    try:
        with tracing(TracingContext(mode)), mode, torch.no_grad(), enable_python_dispatcher():
            return proxy_tensor.make_fx(fx.Interpreter(gm).run, _disable_torch_fn_metadata_mode=True)(*values)
    except (RuntimeError, ValueError, TypeError, AssertionError):  # of transforms and of fakes
        return None
    finally:
        while functorch_depth() > depth:
            functorch._vmap_decrement_nesting()


def functorch_depth() -> int:
    """How many functorch transforms are active."""
    stack = functorch.get_interpreter_stack()
    return 0 if stack is None else len(stack)


class _Interpreter(fx.Interpreter):
    """Runs a graph of Dynamo's under a tracer that puts off what it computes of sizes.

    What the graph itself computes is not put off: sums of sums could be nested as deep as the graph is long.

    `type_as` that has nothing to convert and dropout that drops nothing are their tensor, which functionalisation takes
    for a copy. So is `to`, which it would check when the graph runs.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._recorder = _Recorder()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (torch.nn.functional.dropout, torch.dropout):
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            if not given.get("training", given.get("train", True)) or given.get("p") == 0:
                return given["input"]
        return self._recorder.call(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in ("to", "type_as") and not kwargs:
            tensor, *wanted = args
            if _is_already(tensor, *((wanted[0].dtype, wanted[0].device) if target == "type_as" else wanted)):
                return tensor
        return self._recorder.call(super().call_method, target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if not isinstance(n.meta.get("example_value"), torch.SymInt | torch.SymFloat | torch.SymBool):
            return super().run_node(n)
        with proxy_tensor.maybe_disable_thunkify():
            return super().run_node(n)


def _is_already(tensor: Tensor, *wanted: object) -> bool:
    """Whether a tensor has the dtype and is on the device that it is to have, as far as that is clear."""
    kinds = torch.dtype, torch.device
    return all(isinstance(x, kinds) and x in (tensor.dtype, tensor.device) for x in wanted)


class _Recorder:
    """Makes the calls of a graph under a tracer; those that are alike run through its modes once.

    The modes take a millisecond for each call, most of what our passes need, and layers are alike. A call that was
    traced as one operator which makes one new tensor is known from then on: with tensors of the same dtype, sizes and
    strides, and equal other arguments, it is recorded at once. Views and writes always take the long way.
    """

    def __init__(self) -> None:
        mode = proxy_tensor.get_proxy_mode()
        assert mode is not None
        self._tracer: Any = mode.tracer
        self._functional: Any = _python_dispatch._detect_infra_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
        self._known: dict[object, _Known] = {}
        self._others: set[object] = set()  # targets of calls that became something else

    def call(self, run: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        """Record what became of a call like this one, or run it."""
        if target in self._others or (inputs := self._inputs(args, kwargs)) is None:
            return run(target, args, kwargs)
        tensors, likeness = inputs
        if (known := self._known.get((target, likeness))) is not None:
            return self._record(known, list(tensors.values()))
        last = self._tracer.graph._root._prev
        result = run(target, args, kwargs)
        known, after = self._learn(last.next, result, tensors), self._inputs(args, kwargs)
        if known is None or after is None or after[0].keys() != tensors.keys():  # written in place
            self._others.add(target)
        else:
            self._known[target, likeness] = known
        return result

    def _inputs(self, args: Any, kwargs: Any) -> tuple[dict[fx.Node, Tensor], object] | None:
        """The tensors of a call by what they are in the graph, and what calls share that are alike.

        None without tensors, or with an argument of which nobody knows what it is like.
        """
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        tensors: dict[fx.Node, Tensor] = {}
        likeness: list[object] = [spec]
        for x in leaves:
            if type(x) is FunctionalTensor:
                functional_utils.sync_functional_tensor(x)
                below = torch._from_functional_tensor(x.elem)
                slot = self._tracer.tensor_tracker.get(below)
                if slot is None or slot.constant is not None:
                    return None
                tensors.setdefault(slot.proxy.node, below)
                sizes = (n.node.expr if isinstance(n, torch.SymInt) else n for n in (*below.shape, *below.stride()))
                likeness += (list(tensors).index(slot.proxy.node), below.dtype, below.device, below.dim(), *sizes)
            elif isinstance(x, bool | int | float | str | torch.dtype | torch.device | torch.memory_format | None):
                likeness += (type(x), x)
            else:
                return None
        return (tensors, tuple(likeness)) if tensors else None

    def _learn(self, node: fx.Node, result: object, tensors: Mapping[fx.Node, Tensor]) -> "_Known | None":
        """What a call was traced as; None if not as one operator that makes one new tensor.

        Args:
            node: the first that it recorded.
            result: what it returned.
            tensors: it had.
        """
        if node.op != "call_function" or node.next.op != "root" or not isinstance(node.target, OpOverload):
            return None
        schema = node.target._schema
        if len(schema.returns) != 1 or any(x.alias_info is not None for x in (*schema.arguments, *schema.returns)):
            return None
        if type(result) is not FunctionalTensor or not tensors.keys() >= set(node.all_input_nodes):
            return None
        below = torch._from_functional_tensor(result.elem)
        slot = self._tracer.tensor_tracker.get(below)
        if slot is None or slot.proxy.node is not node or storage_id(below) in map(storage_id, tensors.values()):
            return None
        places: dict[fx.Node, Any] = {x: _Place(i) for i, x in enumerate(tensors)}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), places.__getitem__)
        return _Known(node.target, args, kwargs, below)

    def _record(self, known: "_Known", tensors: Sequence[Tensor]) -> FunctionalTensor:
        """Record an operator as the modes would."""
        proxies = [self._tracer.tensor_tracker[x].proxy for x in tensors]
        args, kwargs = fx.node.map_aggregate(
            (known.args, known.kwargs), lambda x: proxies[x.number] if isinstance(x, _Place) else x
        )
        name = self._tracer.graph._target_to_str(known.op.overloadpacket.__name__)
        proxy = self._tracer.create_proxy("call_function", known.op, args, kwargs, name=name)
        like, mode = known.result, known.result.fake_mode
        with torch._C.DisableTorchFunction(), in_kernel_invocation_manager(mode), mode.shape_env.suppress_guards():
            memory = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
        result = FakeTensor(mode, memory, like.device)
        proxy.node.meta["val"] = result
        proxy_tensor.set_proxy_slot(result, self._tracer, proxy_tensor._ProxyTensor(proxy, None))
        return FunctionalTensor(torch._to_functional_tensor(result), self._functional)


@dataclass(frozen=True)
class _Place:
    """A tensor's place among those of a call."""

    number: int


@dataclass(frozen=True)
class _Known:
    """What a call was traced as.

    Attributes:
        op: the operator.
        args: its arguments, a `_Place` for each tensor.
        kwargs: the same.
        result: like what it makes.
    """

    op: OpOverload[..., Any]
    args: Any
    kwargs: Any
    result: Any


def _reshaped_in_place(after: Any, before: Any) -> bool:
    """Whether code has changed of a functional tensor what is no data."""
    changed = functional_utils.has_metadata_mutation(after, before, check_only_storage_mutation=False)
    return changed or functional_utils.was_inductor_storage_resized(after)


DataDependent = DataDependentOutputException
"""Raised where code asks a tensor without data for a value."""


@contextlib.contextmanager
def fake_copies(objects: T) -> Iterator[T]:
    """Yield a deep copy of `objects` whose tensors have shapes but no data; inside the block no kernel runs."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        copies = copy.deepcopy(objects)
    with mode:
        yield copies


def without_data(value: T) -> T:
    """A tensor of the same shape without data, inside `fake_copies`; any other value as it is."""
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return fake_mode().from_tensor(value)
    return value


def fake_mode() -> Any:
    """The active FakeTensorMode, under which no data can be read; None outside of one."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def compiles_here() -> bool:
    """Whether this thread compiles, where `torch.compiler.is_compiling` says that one of the process does."""
    contexts = TracingContext.try_get(), CompileContext.try_get()
    return any(context is not None for context in contexts) or fake_mode() is not None


def faking(graph: fx.Graph) -> contextlib.AbstractContextManager[Any]:
    """The FakeTensorMode of a graph's tensors, for those that are made from none; no mode if they are not fake."""
    for node in graph.nodes:
        if isinstance(value := node.meta.get("val"), FakeTensor):
            return value.fake_mode
    return contextlib.nullcontext()


statically_known_true = symbolic_shapes.statically_known_true
"""Whether a condition on sizes holds for every run of a graph; adds no guard."""


# Inputs and sources: what Dynamo's graphs carry beyond FX


def input_source(placeholder: fx.Node) -> Any:
    """Where Dynamo found an input; None if it is not Dynamo's."""
    return getattr(placeholder, "_dynamo_source", None)


def copy_input_source(to: fx.Node, of: fx.Node) -> None:
    """Give a placeholder the source of another."""
    to._dynamo_source = of._dynamo_source  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _PartSource:
    """A name in the place of a source; the placeholder does not reach AOTAutograd."""

    name: str


def add_part_source(to: fx.Node, of: fx.Node, index: str) -> None:
    """Name a placeholder that stands for a part of another."""
    source = input_source(of)
    to._dynamo_source = _PartSource(f"{'' if source is None else source.name}{index}")


def copy_parameter_sources(to: fx.GraphModule, of: fx.GraphModule) -> None:
    """Give a module the sources by which AOTAutograd names parameters."""
    sources: Any = getattr(of, "_param_name_to_source", {})
    to._param_name_to_source = sources


def add_input_source(node: fx.Node, example: Tensor, name: str) -> None:
    """Make the new placeholder `node` an input that AOTAutograd accepts beside Dynamo's own.

    Its one dimension is symbolic: buffers of caches with another length pass through the same compiled graph.
    "unguarded" marks a static address for CUDA graphs.
    """
    source = SyntheticLocalSource(name)
    node._dynamo_source = source
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    context = symbolic_shapes.StatefulSymbolicContext(
        dynamic_sizes=[symbolic_shapes.DimDynamic.DYNAMIC],
        dynamic_strides=[symbolic_shapes.DimDynamic.INFER_STRIDE],
        constraint_sizes=[None],
        constraint_strides=[None],
        tensor_source=source,
        shape_env_to_source_to_symbol_cache={},
    )
    if (traced := TracingContext.try_get()) is not None:
        traced.tensor_to_context[example] = context


def add_number_source(node: fx.Node, hint: int) -> torch.SymInt:
    """Make the new placeholder `node` a number that differs from call to call, beside Dynamo's own inputs.

    Returns:
        The example to compile with, a symbol of its own. Nothing may guard on it: Dynamo does not know it.
    """
    source = SyntheticLocalSource(node.name)
    context = TracingContext.get()
    assert context.fake_mode is not None
    shape_env: Any = context.fake_mode.shape_env
    symbol = shape_env.create_symbol(hint, source, symbolic_shapes.DimDynamic.DYNAMIC, do_not_specialize_zero_one=True)
    number: torch.SymInt = shape_env.create_symintnode(symbol, hint=hint, source=source)
    node._dynamo_source = source
    node.meta["val"] = number
    return number


def settled(size: int | torch.SymInt) -> int | torch.SymInt:
    """A size as a constant, if guards have made it one."""
    return int(size.node.expr) if isinstance(size, torch.SymInt) and size.node.expr.is_number else size


def canonical(example: T) -> T:
    """A symbolic number as guards have made it by now; any other example as it is.

    Where two symbols have become one, Inductor takes the one that is left from whichever input has it: Dynamo's own
    number may still be the other one, and the tensor that had it may be gone from the rewritten graph.
    """
    if not isinstance(example, torch.SymInt) or example.node._expr == example.node.expr:
        return example
    return example.node.shape_env.create_symintnode(example.node.expr, hint=example.node.hint)


def hint_of(size: int | torch.SymInt) -> int:
    """The size that a graph was traced with."""
    return size if isinstance(size, int) else int(size.node.hint)


def is_backed(condition: torch.SymBool) -> bool:
    """Whether a condition on sizes was decided when the graph was traced, and not left to data."""
    return bool(condition.node.has_hint())


def carriers(graph: fx.Graph) -> dict[object, fx.Node]:
    """The inputs of a graph that carry symbols of sizes, by the symbol."""
    found: dict[object, fx.Node] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            found.setdefault(value.node.expr, node)
    return found


def size_node(graph: fx.Graph, size: int | torch.SymInt) -> int | fx.Node:
    """A size as a constant, or as a node that computes it from the graph's inputs, at the graph's insertion point.

    Raises:
        LookupError: no input carries one of its symbols.
    """
    size = settled(size)
    if isinstance(size, int):
        return size
    expr = size.node.expr
    inputs = carriers(graph)
    if expr in inputs:
        return inputs[expr]
    if missing := expr.free_symbols - inputs.keys():
        raise LookupError(f"no input of the graph carries {', '.join(map(str, missing))} of the size {expr}")
    tracer = fx.proxy.GraphAppendingTracer(graph)
    symbols = {symbol: fx.Proxy(inputs[symbol], tracer) for symbol in expr.free_symbols}
    computed: fx.Proxy = sympy_interp(PythonReferenceAnalysis, symbols, expr)
    return computed.node


def never_a_frame(function: Callable[..., Any]) -> None:
    """Keep Dynamo from compiling a function that plain Python calls; where it traces a caller, it goes on as before."""
    eval_frame.skip_code(function.__code__)


def keep_class(subclass: type[Tensor]) -> None:
    """Let Dynamo remember that a tensor is of a subclass once it is written in place.

    torch 2.13 takes it for a plain one after a write of another tensor, and cannot inline functions in Python on it.
    This is the only part of PyTorch that is patched; it concerns no other class.
    """
    inherited = TensorWithTFOverrideVariable.synchronize_attributes

    def synchronize_attributes(self: Any, tx: Any, target_cls: Any = None) -> None:
        before = self.class_type
        inherited(self, tx, target_cls)
        if before is subclass:
            self.class_type = before

    TensorWithTFOverrideVariable.synchronize_attributes = synchronize_attributes  # type: ignore[method-assign]


def graph_breaks() -> Counter[str]:
    """Why Dynamo has ended graphs before the end of their frames, in this process, and how often."""
    return Counter(dynamo_counters["graph_break"])


def is_cut(gm: fx.GraphModule) -> bool:
    """Whether Dynamo ends a graph before the end of its frame: it returns whatever is still needed there."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and bool(reason.graph_break)


def symbol_inputs(graph: fx.Graph, values: Iterable[object]) -> list[fx.Node]:
    """The inputs of a graph that carry the symbols in the sizes of tensors; other values have none."""
    sizes: list[Any] = [n for x in values if isinstance(x, Tensor) for n in x.shape if isinstance(n, torch.SymInt)]
    symbols = {symbol for n in sizes for symbol in n.node.expr.free_symbols}
    return [node for symbol, node in carriers(graph).items() if symbol in symbols]


# Operators, as targets of nodes

AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
"""Targets that open and close an autocast region."""

SET_GRAD_ENABLED = torch._C._set_grad_enabled
"""Target that switches gradients on or off."""


def arguments_of(target: object) -> Sequence[torch.Argument]:
    """The arguments that an ATen operator declares, in order."""
    assert isinstance(target, OpOverload)
    return target._schema.arguments


def mutates(target: object) -> bool | None:
    """Whether a dispatcher's operator writes to an argument; None if `target` is none."""
    if isinstance(target, OpOverload):
        return target._schema.is_mutable
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    return None


def is_random(target: object) -> bool:
    """Whether an operator draws random numbers."""
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


WHILE_LOOP = torch.ops.higher_order.while_loop
"""Target of a loop: condition and body, both modules, what is carried, what they take besides."""


def higher_order_name(target: object) -> str | None:
    """The name of a higher-order operator; None if `target` is none."""
    return target.name() if isinstance(target, HigherOrderOperator) else None


# Storage


def storage_id(tensor: Tensor) -> int:
    """Identity of the storage under a tensor and its functorch wrappers; 0 without one."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else 0


def swap_memory(a: torch.UntypedStorage, b: torch.UntypedStorage) -> None:
    """Exchange memory, size, allocator and access flags of two storages; every tensor over them follows."""
    a._swap_data_ptr_(b)  # type: ignore[attr-defined]


def forbid_writes(tensor: Tensor) -> None:
    """Make PyTorch raise a `RuntimeError` when the memory under a tensor is to be written."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def wrapper_subclass(kind: type[Tensor], nbytes: int, device: torch.device) -> Tensor:
    """A uint8 tensor of class `kind` whose storage claims `nbytes` but was never allocated."""
    wrapper = Tensor._make_wrapper_subclass(kind, (nbytes,), dtype=torch.uint8, device=device)
    assert isinstance(wrapper, Tensor)
    return wrapper


def reference_counts(tensor: Tensor) -> tuple[int, ...]:
    """How many hold a tensor in C++, its storage, and its base; to compare with those of tensors that are alone."""
    storage, base = tensor.untyped_storage(), tensor._base
    counts = _use_count(tensor), torch._C._storage_Use_Count(storage._cdata)
    return counts if base is None else (*counts, _use_count(base), sys.getrefcount(base))


def _use_count(tensor: Tensor) -> int:
    return int(tensor._use_count())  # type: ignore[attr-defined]


def version(tensor: Tensor) -> int:
    """A number that grows with each write to a tensor or to a view of it."""
    return tensor._version


def base_of(view: Tensor) -> Tensor | None:
    """The tensor that a view was taken of."""
    return view._base


def is_view(tensor: Tensor) -> bool:
    """Whether autograd takes a tensor for a view."""
    return tensor._is_view()


def is_zero_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is one of autograd's zeros, which have no memory."""
    return tensor._is_zerotensor()


# Dispatch

no_subclass_dispatch = torch._C.DisableTorchFunctionSubclass
"""Context in which `__torch_function__` of tensor subclasses is not called."""

no_torch_function = torch._C.DisableTorchFunction
"""Context without subclasses' `__torch_function__` and without torch-function modes."""

no_transforms = torch._C._DisableFuncTorch
"""Context outside all functorch transforms."""

no_modes = _python_dispatch._disable_current_modes
"""Context outside all dispatch modes."""

is_wrapped = functorch.is_functorch_wrapped_tensor
"""Whether a tensor belongs to a functorch transform."""

is_functional = torch._is_functional_tensor
"""Whether a tensor belongs to functionalisation."""

BASE_GETTER = Tensor._base.__get__  # type: ignore[union-attr]
"""What `__torch_function__` is given when `base_of` is asked."""

IS_VIEW = Tensor._is_view
"""The same for `is_view`."""

PRIVATE_METADATA = frozenset({Tensor._use_count})  # type: ignore[attr-defined]
"""Private methods of tensors that need no content."""

PRIVATE_MEMORY = frozenset({Tensor._typed_storage, torch._to_functional_tensor})
"""Private functions that need a tensor's memory."""

VMAP_MODULE = "torch._functorch.vmap"
"""Where vmap asks for the sizes of its arguments before it goes on in C++."""

FAKE_MODULE = "torch._subclasses.meta_utils"
"""Where a tensor's storage is described for a fake of it."""


def in_transform() -> bool:
    """Whether a functorch transform is active."""
    return functorch.peek_interpreter_stack() is not None


tree_map = _pytree.tree_map
"""Apply a function to the leaves of nested containers."""


# Logging


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Hand a text to torch's structured trace (tlparse), if one is being recorded."""
    torch_logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": f"decoquant_{name}", "encoding": "string"}, payload_fn=payload
    )


# Kernels


def amx_granted() -> bool:
    """Whether this process may use the tile registers of AMX, for which the system has to be asked."""
    return bool(torch.cpu._init_amx())


def flash_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Torch's flash attention on CPUs with the logarithms of its sums, which `scaled_dot_product_attention` drops.

    Args:
        query: ``[batch, query_heads, queries, head_dim]``.
        key: ``[batch, heads, tokens, head_dim]``, same dtype.
        value: as `key`.
        mask: additive, same dtype, broadcastable to ``[batch, query_heads, queries, tokens]``.
        scale: of the logits.
        causal: without a mask: admits to each query the tokens up to its own number.

    Returns:
        The result, shape and dtype of `query`, and float32 ``[batch, query_heads, queries]``; rows that nothing is
        admitted to are zeros with an arbitrary sum.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = attention(query, key, value, is_causal=causal, attn_mask=mask, scale=scale)
    return out, sums


def inline_when_traced(name: str, body: Callable[..., Any], library: torch.library.Library) -> None:
    """Let a graph that is functionalised for a compiler have the body of an operator in the operator's place.

    As `torch.library.triton_op` does (its own form would inline launches on every device, CPUs included).

    Args:
        name: qualified name of the operator.
        body: takes the operator's arguments; returns NotImplemented where the operator stays as it is.
        library: that defines the operator.
    """

    def rule(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not kwargs:
            with mode:
                out = body(*args)
            if out is not NotImplemented:
                return out
        return mode.__torch_dispatch__(op, types, args, kwargs)

    torch.library.register_torch_dispatch(name, FunctionalTensorMode, rule, lib=library)


def pack_launch(kernel: Any, backend: Any, options: Mapping[str, Any], bound: tuple[Any, ...]) -> tuple[Any, ...]:
    """Options, signature, constants and attributes that a launch of a Triton kernel is compiled for (Triton 3.8)."""
    packed: tuple[Any, ...] = kernel._pack_args(backend, options, *bound)
    return packed


ATEN_KERNELS = {"fallback_by_default": True, "selective_decompose": True}
"""Configuration with which Inductor calls ATen's kernels instead of generating C++: a graph compiles in a third of the
time, and what is ours in it (operators, aliasing, symbolic sizes, order of reads and writes) is the same."""


def quick_compile() -> contextlib.AbstractContextManager[None]:
    """While open, Inductor compiles with `ATEN_KERNELS`."""
    quick: contextlib.AbstractContextManager[None] = inductor_config.patch(ATEN_KERNELS)
    return quick


def cold_caches() -> contextlib.AbstractContextManager[None]:
    """While open, Inductor compiles everything anew, as for a model it has never seen."""
    cold: contextlib.AbstractContextManager[None] = fresh_cache()
    return cold
