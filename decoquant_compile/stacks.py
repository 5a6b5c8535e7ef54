"""Tensors that hold many caches, as those of all layers: the graph gets, and returns, each of these on its own."""

from collections import Counter
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from decoquant_compile import _compat
from decoquant_compile.dims import Stacking
from decoquant_compile.handle import Parts, Transients, parts_of, stack_of
from decoquant_compile.normalize import Normal
from decoquant_compile.patterns.stacks import Split, distribute, gathered, parts_taken, split, stacked
from decoquant_compile.patterns.symbols import argument, shape


@dataclass(frozen=True)
class Stack:
    """One tensor that was taken apart.

    Attributes:
        index: its position among Dynamo's inputs; None: the graph makes it.
        first: position of its first cache among the inputs of the graph by now; the others follow.
        stacking: where the caches stand in it.
        outputs: positions, among Dynamo's results, of the tensor that holds them after the call; () for one that is
            written in place.
        first_output: position of the first cache among the results of the graph by now, where it is returned.
        itself: positions, among Dynamo's results, of the input itself.
    """

    index: int | None
    first: int
    stacking: Stacking
    outputs: tuple[int, ...] = ()
    first_output: int = 0
    itself: tuple[int, ...] = ()

    @property
    def positions(self) -> range:
        """Positions of its caches among the inputs of the graph."""
        return range(0) if self.index is None else range(self.first, self.first + self.stacking.number)

    @property
    def place(self) -> int:
        """Which tensor it is: its position among the inputs, or, where the graph makes it, ~position of the result."""
        return ~self.outputs[0] if self.index is None else self.index

    @property
    def results(self) -> range:
        """Positions of its caches among the results of the graph."""
        return range(self.first_output, self.first_output + self.stacking.number) if self.outputs else range(0)


def unstack(normal: Normal, born: Container[fx.Node] = (), whole: Collection[int] = ()) -> tuple[Stack, ...]:
    """Take apart every input that the graph writes, or makes anew, part by part along one dim or several.

    Args:
        normal: the graph; it is changed in place. Inputs that stand for single caches come behind those it has, and
            so do its results; an input that is taken apart stays, without users, a result becomes None.
        born: caches that the graph makes; results that are stacks of these are taken apart, too.
        whole: which tensors to leave as they are, by their `Stack.place`.

    Returns:
        What was taken apart.
    """
    inputs, given = normal.placeholders, normal.outputs
    numbers = {node: i for i, node in enumerate(inputs) if i not in whole}
    found: list[tuple[int, _Apart, tuple[int, ...], tuple[int, ...]]] = []
    for value, buffer in normal.mutations:
        if buffer in numbers and value not in given:
            before = normal.outputs
            normal.outputs = tuple(None if x is buffer else x for x in before)
            apart = _taken_apart(normal, _Unit(buffer, value))
            if apart is None:
                normal.outputs = before
            else:
                itself = tuple(i for i, x in enumerate(before) if x is buffer)
                found.append((numbers[buffer], apart, (), itself))
    written = {node for pair in normal.mutations for node in pair}
    results = [x for x in dict.fromkeys(given) if isinstance(x, fx.Node) and x.op != "placeholder" and x not in written]
    kept = written | {inputs[i] for i in whole if i >= 0}
    distributed = [x if kept.intersection(x.all_input_nodes) else distribute(x) for x in results]
    sources = {x: gathered(x) for x in distributed}
    continued = Counter(source[0] for source in sources.values() if source is not None)
    for output, source in sources.items():
        if source is not None and source[0] in numbers.keys() - written and continued[source[0]] == 1:
            places = tuple(i for i, x in enumerate(normal.outputs) if x is output)
            apart = _taken_apart(normal, _Unit(source[0], output, returned=True))
            found += [] if apart is None else [(numbers[source[0]], apart, places, ())]
    made = [x for x in results if ~given.index(x) not in whole and all(part in born for part in stacked(x))]
    stacks = [stack for x in made if (stack := _made_apart(normal, x)) is not None]
    inputs = normal.placeholders
    return tuple(stacks) + tuple(
        Stack(index, inputs.index(apart.units[0].buffer), apart.stacking, places, apart.first_output, itself)
        for index, apart, places, itself in found
    )


def with_parts(args: Sequence[Any], stacks: Sequence[Stack]) -> Sequence[Any]:
    """The inputs of a graph that was taken apart: Dynamo's, then each cache.

    A cache is a handle. Where it is none yet, it is None if it is written in place (whoever takes it over must be the
    only one who holds it) and dense otherwise.
    """
    if not stacks:
        return args
    parts: list[Any] = []
    for stack in stacks:
        if stack.index is None:
            continue
        tensor, stacking = args[stack.index], stack.stacking
        held: Sequence[Any] | None = parts_of(tensor, stacking)
        if held is None:
            # Of a handle of another kind, such as a view, there is no memory to look into.
            held = stacking.apart(Transients().lower(tensor)) if stack.outputs else [None] * stacking.number
        parts += held
    return [*args, *parts]


def with_wholes(results: Sequence[Any], stacks: Sequence[Stack], args: Sequence[Any], number: int) -> Sequence[Any]:
    """Dynamo's results, so many, from those of a graph that was taken apart, and its inputs."""
    wholes = list(results[:number])
    for stack in stacks:
        if stack.outputs:
            handle = stack_of(Parts(stack.stacking, tuple(results[i] for i in stack.results)))
            for output in stack.outputs:
                wholes[output] = handle
        for output in stack.itself:
            assert stack.index is not None  # only an input is returned as itself
            wholes[output] = args[stack.index]
    return wholes


@dataclass(frozen=True)
class _Unit:
    """An input and what it becomes, or what is returned in its place."""

    buffer: fx.Node
    value: fx.Node
    returned: bool = False

    def read(self) -> Split | None:
        """How it is used part by part."""
        if not self.returned:
            return split(self.buffer, self.value)
        source = gathered(self.value)
        return source[1] if source is not None and source[0] is self.buffer else None


@dataclass(frozen=True)
class _Apart:
    """An input that was taken apart: its parts, where they stood, and the position of the first among the results."""

    units: Sequence[_Unit]
    stacking: Stacking
    first_output: int


def _taken_apart(normal: Normal, unit: _Unit) -> _Apart | None:
    """Take an input apart along as many dims as all of its parts allow; None if that is none."""
    units, axes, counts, first = [unit], list[int](), list[int](), 0
    while (splits := _uniform([u.read() for u in units])) is not None:
        whole = {part for of in splits for part in of.parts}
        if not whole.isdisjoint(normal.outputs):
            break  # a part that is returned besides may not be the one in the result
        axes.append(splits[0].axis)
        counts.append(len(splits[0].values))
        first, parts = len(normal.outputs), list[_Unit]()
        for u in units:
            of = u.read()  # again: what it reads may have been replaced since
            assert of is not None
            parts += _apart(normal, u, of)
        for u in units if len(axes) > 1 else ():
            normal.graph.erase_node(u.buffer)
        units = parts
    return _Apart(units, Stacking(tuple(axes), tuple(counts)), first) if axes else None


def _made_apart(normal: Normal, output: fx.Node) -> Stack | None:
    """Return the parts of a stack that the graph makes in its place; None if it is used otherwise."""
    if output.target is not torch.ops.aten.stack.default:
        return None
    axis, parts = argument(output, "dim") % len(shape(output)), stacked(output)
    taken = parts_taken(output, axis, len(parts), is_result=True)
    if taken is None or len(set(parts)) < len(parts) or not set(parts).isdisjoint(normal.outputs):
        return None
    for selection, number in taken:
        selection.replace_all_uses_with(parts[number])
    places, first = tuple(i for i, x in enumerate(normal.outputs) if x is output), len(normal.outputs)
    normal.outputs = (*(None if x is output else x for x in normal.outputs), *parts)
    normal.graph.eliminate_dead_code()
    return Stack(None, 0, Stacking((axis,), (len(parts),)), places, first)


def _uniform(splits: Sequence[Split | None]) -> list[Split] | None:
    """What was read of all parts of an input, if all are taken apart along one dim into as many parts."""
    found = [x for x in splits if x is not None]
    is_one = len(found) == len(splits) and len({(x.axis, len(x.values)) for x in found}) == 1
    return found if is_one else None


def _apart(normal: Normal, unit: _Unit, of: Split) -> list[_Unit]:
    """Put an input and a result for each part in the place of one."""
    graph, buffer, parts = normal.graph, unit.buffer, list[fx.Node]()
    for number in range(len(of.values)):
        with _compat.faking(graph):
            value = buffer.meta["val"].select(of.axis, number)
        parts.append(normal.add_part(buffer, f"{buffer.name}_{number}", value, f"[{':, ' * of.axis}{number}]"))
    taken: dict[fx.Node, fx.Node] = {}
    for selection, value in of.selections:
        taken[selection] = parts[value] if isinstance(value, int) else taken.get(value, value)
        selection.replace_all_uses_with(taken[selection])
    values = [taken.get(value, value) for value in of.values]
    if unit.returned:
        left = tuple(None if x is unit.value else x for x in normal.outputs)
        normal.outputs = (*left, *values)
    else:
        others = [pair for pair in normal.mutations if pair[1] is not buffer]
        normal.mutations = others + list(zip(values, parts, strict=True))
    graph.eliminate_dead_code()
    return [_Unit(part, value, unit.returned) for part, value in zip(parts, values, strict=True)]
