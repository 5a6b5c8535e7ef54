"""Dynamo's graph to functional pre-dispatch ATen, where attention is whole and every write is a value, and back."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from decoquant_compile import _compat
from decoquant_compile.patterns.symbols import inputs_behind

aten = torch.ops.aten

_IN_PLACE_OPERATORS = {operator.setitem, operator.delitem} | {
    getattr(operator, f"i{name}")
    for name in (
        "add",
        "and",
        "floordiv",
        "lshift",
        "matmul",
        "mod",
        "mul",
        "or",
        "pow",
        "rshift",
        "sub",
        "truediv",
        "xor",
    )
}

# Functions whose result may share memory with an argument although their operator, which is kept whole, has a schema
# that says it does not.
_HIDES_ALIASES = {"broadcast_tensors", "einsum", "meshgrid", "sum_to_size"}

# Functions that take a float as a number, of which Inductor can make no tensor.
_TAKES_NUMBERS = {"scaled_dot_product_attention", "embedding"}


@dataclass
class Normal:
    """A functional graph of ATen operators that does what a graph of Dynamo's does.

    The graph returns a pair of tuples: the values that its inputs take, and what Dynamo's graph returns. Both stay true
    while nodes are replaced, since the graph itself holds them.

    Attributes:
        gm: the module; its placeholders are Dynamo's, in Dynamo's order, until inputs are added or removed.
        original: Dynamo's module, which is never changed.
    """

    gm: fx.GraphModule
    original: fx.GraphModule
    _targets: tuple[fx.Node, ...]

    @property
    def graph(self) -> fx.Graph:
        """The graph of `gm`."""
        return self.gm.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        """The inputs, in order."""
        return self.graph.find_nodes(op="placeholder")

    @property
    def mutations(self) -> list[tuple[fx.Node, fx.Node]]:
        """(value, input) of every input that the graph writes: once it has run, the input holds the value."""
        return list(zip(self._returned[0], self._targets, strict=True))

    @mutations.setter
    def mutations(self, mutations: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        self._output.args = ((tuple(value for value, _ in mutations), self._returned[1]),)
        self._targets = tuple(target for _, target in mutations)

    @property
    def outputs(self) -> tuple[Any, ...]:
        """What the graph returns to its caller: nodes and constants. A written input among them stands for itself."""
        return self._returned[1]

    @outputs.setter
    def outputs(self, outputs: tuple[Any, ...]) -> None:
        self._output.args = ((self._returned[0], outputs),)

    def add_part(self, of: fx.Node, name: str, value: Any, index: str) -> fx.Node:
        """Add an input behind those there are that stands for a part of one.

        Args:
            of: the input.
            name: of the new one.
            value: its example, a fake tensor.
            index: what the part is called behind the name of the whole.
        """
        with self.graph.inserting_after(self.placeholders[-1]):
            part = self.graph.placeholder(name)
        part.meta["val"] = value
        _compat.add_part_source(part, of, index)
        return part

    @staticmethod
    def source(placeholder: fx.Node) -> str:
        """How Dynamo names an input, such as `L['cache'].layers[0].keys`; "" where it has no name."""
        source = _compat.input_source(placeholder)
        return "" if source is None else str(source.name)

    @property
    def _output(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def _returned(self) -> tuple[tuple[fx.Node, ...], tuple[Any, ...]]:
        returned: Any = self._output.args[0]
        mutated, outputs = returned
        return mutated, outputs


def records_gradients(example_inputs: Sequence[Any]) -> bool:
    """Whether a graph over these inputs is to be differentiated."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)


def unsupported(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Say why a graph must not be normalised, None if it may be.

    To try and fail is no option for these graphs: tracing leaves state behind that breaks Dynamo's guards.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs. Only their metadata is read.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    if not _compat.is_traced() or len(inputs) != len(example_inputs):
        return "it was not traced by Dynamo"
    if records_gradients(example_inputs):
        return "it records gradients"
    if any(True for _ in gm.parameters()) or any(True for _ in gm.buffers()):
        return "it holds parameters or buffers of its own"
    if any(torch.is_autocast_enabled(x.device.type) for x in example_inputs if isinstance(x, Tensor)):
        return "it is traced under autocast"
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if (why := _foreign(node)) is not None:
                return f"{node.name}: {why}"
    return _aliasing(gm)


def fixed_numbers(gm: fx.GraphModule) -> set[fx.Node]:
    """The float inputs of a graph of Dynamo's that functions take which know plain numbers only.

    With `dynamic=True` every attribute of a module is such an input. Inductor makes tensors of them in arithmetic; for
    the others it has Dynamo trace the frame again with constants, but only after the whole graph was traced.
    """
    takers = (node for node in gm.graph.nodes if _name(node) in _TAKES_NUMBERS)
    arguments = [x for node in takers for x in node.all_input_nodes]
    return inputs_behind(x for x in arguments if isinstance(x.meta.get("example_value"), torch.SymFloat))


def normalise(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Normal:
    """Trace a graph of Dynamo's to functional ATen operators, composites whole.

    Must run inside a Dynamo backend: tracing works on fake tensors that share Dynamo's symbolic sizes, so nothing is
    computed or written, and shape guards go where they belong.

    Args:
        gm: Dynamo's graph, not `unsupported`. It is not changed.
        example_inputs: its inputs. Only their metadata is read.

    Returns:
        The functional graph, without dead code.

    Raises:
        RestartAnalysis: Dynamo's own control flow, which the caller must let through.
    """
    traced, written = _compat.trace_functional(gm, example_inputs)
    return _settle(gm, traced, written)


def finish(normal: Normal) -> fx.GraphModule:
    """Turn a normalised graph into one that `compile_fx` takes in place of Dynamo's, with the inputs it has by now.

    The module of `normal` is changed and returned; inputs that were added must bring their own source.
    """
    gm, output = normal.gm, normal._output
    mutations, outputs = normal.mutations, normal.outputs
    with gm.graph.inserting_before(output):
        for value, target in mutations:
            gm.graph.call_function(aten.copy_.default, (target, value))
    output.args = (outputs,)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    gm.meta.update(normal.original.meta)
    _compat.copy_parameter_sources(gm, normal.original)
    return gm


def _settle(gm: fx.GraphModule, traced: fx.GraphModule, written: Sequence[int]) -> Normal:
    """Give the traced module Dynamo's names for its inputs and the shape of a `Normal`."""
    graph = traced.graph
    placeholders = graph.find_nodes(op="placeholder")
    for theirs, ours in zip(gm.graph.find_nodes(op="placeholder"), placeholders, strict=True):
        _compat.copy_input_source(ours, theirs)
        if "tensor_dict" in theirs.meta:
            ours.meta["tensor_dict"] = theirs.meta["tensor_dict"]
    output = graph.output_node()
    returned: Any = output.args[0]
    values, outputs = tuple(returned[: len(written)]), tuple(returned[len(written) :])
    targets = tuple(placeholders[i] for i in written)
    # A written input that is returned is the input, not a copy of it.
    itself = dict(zip(values, targets, strict=True))
    before: Any = gm.graph.output_node().args[0]
    outputs = tuple(itself.get(x, x) if _is_input(y) else x for x, y in zip(outputs, before, strict=True))
    output.args = ((values, outputs),)
    for node in list(graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default)):
        graph.erase_node(node)
    for node in list(graph.find_nodes(op="call_function", target=_compat.SET_GRAD_ENABLED)):
        graph.erase_node(node)
    for node in list(graph.find_nodes(op="call_function", target=aten.dropout.default)):
        rate, training = node.args[1:3]
        if not training or rate == 0:  # as a random operator it would be kept alive, and all it is made from
            source: Any = node.args[0]
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        _guard_lengths(node)
    for node in graph.nodes:
        if node.op == "call_function" and _compat.higher_order_name(node.target) == "flex_attention":
            _guard_lengths(node)
            _guard_blocks(node)
    graph.eliminate_dead_code()
    for name, constant in list(traced.named_buffers(recurse=False, remove_duplicate=False)):
        # AOTAutograd looks for a Dynamo source of every buffer; constants of the graph have none.
        delattr(traced, name)
        setattr(traced, name, constant)
    traced.recompile()
    return Normal(traced, gm, targets)


def _guard_lengths(attention: fx.Node) -> None:
    """Guard that keys, values and mask are of one length, as the attention demands.

    Whole in this form, the operator does not look; once decomposed, it would add the same guards. Without them caches
    of symbolic length, each with a symbol of its own, could not be told to fit each other.
    """
    _, key, value, *rest = attention.args
    mask = None
    if attention.target is aten.scaled_dot_product_attention.default:
        mask = rest[0] if rest else attention.kwargs.get("attn_mask")
    lengths = [x.meta["val"].shape[-2] for x in (key, value) if isinstance(x, fx.Node)]
    if isinstance(mask, fx.Node) and mask.meta["val"].shape[-1] != 1:
        lengths.append(mask.meta["val"].shape[-1])
    for length in lengths[1:]:
        bool(length == lengths[0])  # asking adds the guard


def _guard_blocks(attention: fx.Node) -> None:
    """Guard that the blocks of a `flex_attention` cover its queries and keys, as its kernels do."""
    query, key, *_ = attention.args
    blocks: Any = attention.args[4]
    for axis, operand in ((2, query), (3, key)):
        assert isinstance(operand, fx.Node)
        size = blocks[12 + axis]
        size = size.meta["val"] if isinstance(size, fx.Node) else size
        bool(blocks[3].meta["val"].shape[axis] * size >= operand.meta["val"].shape[2])  # asking adds the guard


def _foreign(node: fx.Node) -> str | None:
    """What of a node the normal form cannot hold."""
    target = node.target
    if node.op == "call_method" and target == "requires_grad_":
        return "it asks for gradients"
    if node.op != "call_function":
        return None
    if _compat.is_functorch(target):
        return "a functorch transform (vmap, grad)"
    if target in _compat.AUTOCAST:
        return "an autocast region"
    if _compat.higher_order_name(target) not in (None, "flex_attention"):
        return "a higher-order operator"
    if target is _compat.SET_GRAD_ENABLED and node.args[0]:
        grads = (n.meta["example_value"] for n in node.graph.find_nodes(op="placeholder"))
        if any(isinstance(x, Tensor) and x.requires_grad for x in grads):
            return "it switches gradients on"
    if node.meta.get("unbacked_bindings"):
        return "a size that depends on data"
    return None


def _aliasing(gm: fx.GraphModule) -> str | None:
    """Why writes to shared memory keep a graph from having a functional form.

    Dynamo's fake tensors share storage where the real ones do; the real ones need not be touched.
    """
    storages: dict[int, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        for storage in _storages([node]):
            storages.setdefault(storage, []).append(node)
    written = {s for node in gm.graph.nodes if _writes(node) for s in _storages([node, *_written_by(node)])}
    for storage, nodes in storages.items():
        if len(nodes) > 1 and storage in written:
            return f"inputs share memory that it writes: {', '.join(map(Normal.source, nodes))}"
    for node in gm.graph.nodes:
        if _name(node) in _HIDES_ALIASES and _storages([node]) & _storages(node.all_input_nodes) & written:
            return f"{node.name}: it writes to memory that {_name(node)} shares with its arguments"
    for output in gm.graph.output_node().all_input_nodes:
        if not _is_input(output) and _storages([output]) & written & storages.keys():
            return f"it returns a view of an input that it writes: {output.name}"
    return None


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    """Identities of the storages behind the tensors that Dynamo saw at these nodes."""
    found: set[int] = set()
    for node in nodes:
        value = node.meta.get("example_value")
        for x in value if isinstance(value, list | tuple) else [value]:
            if isinstance(x, Tensor) and x.layout == torch.strided:
                found.add(_compat.storage_id(x))
    return found


def _writes(node: fx.Node) -> bool:
    """Whether a node of Dynamo's may write to a tensor that it is given."""
    target = node.target
    if node.op == "call_method":
        return _in_place(str(target)) or target in ("__setitem__", "__iadd__")
    if node.op != "call_function":
        return False
    if (mutates := _compat.mutates(target)) is not None:
        return mutates
    return (
        _in_place(_name(node))
        or target in _IN_PLACE_OPERATORS
        or "out" in node.kwargs
        or bool(node.kwargs.get("inplace"))
    )


def _written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments of a node, which writes, that it may write to."""
    first: Any = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and (node.op == "call_method" or node.target in _IN_PLACE_OPERATORS):
        return [first]
    return node.all_input_nodes


def _name(node: fx.Node) -> str:
    """Of the function or method that a node of Dynamo's calls."""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_input(node: object) -> bool:
    """Whether a value of Dynamo's graph is an input itself.

    In-place methods and operators (`x += 1`) return the tensor they write; `to` and `contiguous` return their tensor if
    it is that already.
    """
    while isinstance(node, fx.Node) and (
        (node.op == "call_method" and (_writes(node) or _is_same(node)))
        or (node.op == "call_function" and node.target in _IN_PLACE_OPERATORS and _shares(node))
    ):
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _is_same(node: fx.Node) -> bool:
    """Whether a conversion had nothing to convert."""
    return node.target in ("to", "contiguous") and _shares(node)


def _shares(node: fx.Node) -> bool:
    """Whether a node is in the memory of its first argument."""
    given: Any = node.args[0]
    return _storages([node]) == _storages([given]) != set()
