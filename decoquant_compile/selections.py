"""Caches of which a graph selects sequences or a stretch: selected outside of it, where a handle knows how."""

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from decoquant_compile.dims import Dims
from decoquant_compile.handle import CacheTensor, Transients, applied, replace
from decoquant_compile.normalize import Normal
from decoquant_compile.patterns import selections as patterns
from decoquant_compile.patterns.cache import CacheWrite
from decoquant_compile.patterns.selections import Kind, Selection
from decoquant_compile.patterns.symbols import computed
from decoquant_compile.subgraph import cut, is_heavy

Value: TypeAlias = int | tuple[int] | None
"""A constant, the number of a computed value in brackets, or None for an open end."""


@dataclass(frozen=True)
class Step:
    """A selection that is made before or after a graph.

    Attributes:
        place: position of what it selects from, among the inputs or the results.
        kind: how, as of `Selection`.
        dim: along which dim.
        values: start and end of a slice, or an index.
    """

    place: int
    kind: Kind
    dim: int
    values: tuple[Value, ...]

    def __call__(self, tensor: Tensor, known: Sequence[Any]) -> Tensor:
        """The part of a tensor, where `known` has the values that are no constants."""
        values: list[Any] = [known[x[0]] if isinstance(x, tuple) else x for x in self.values]
        if self.kind == "slice":
            part: Tensor = applied(Tensor.__getitem__, tensor, (*(slice(None),) * self.dim, slice(*values)))
        else:
            index = values[0]
            if self.kind == "index":
                index = torch.where(index < 0, index + tensor.shape[self.dim], index)
            part = applied(torch.index_select, tensor, self.dim, index)
        if isinstance(tensor, CacheTensor) and not isinstance(part, CacheTensor) and part.numel():
            why = f"a handle does not know how to select by {self.kind} along dim {self.dim}"
            warnings.warn(f"decoquant_compile: a packed cache is dense after a selection: {why}", stacklevel=3)
        return part


@dataclass(frozen=True)
class Selections:
    """What is selected outside of a graph.

    Attributes:
        graph: computes the values of `taken` and `reordered` that are no constants from some of Dynamo's inputs.
        inputs: positions of its inputs among those that Dynamo passes.
        taken: each adds an input behind those that Dynamo passes, and uses up the one that it selects from.
        reordered: each of an input that takes its selection in place, before the graph writes to it.
        first: how many inputs Dynamo passes.
        returned: each takes the place of the result that it selects from; their values are results of the graph, too.
    """

    graph: fx.GraphModule
    inputs: tuple[int, ...]
    taken: tuple[Step, ...]
    reordered: tuple[Step, ...]
    first: int
    returned: tuple[Step, ...]

    @property
    def spent(self) -> tuple[int, ...]:
        """Positions of the inputs that the graph does not take, because it gets a selection."""
        return tuple(step.place for step in self.taken)

    def of_inputs(self, args: Sequence[Any]) -> Sequence[Any]:
        """The inputs of the graph: Dynamo's, then what is selected."""
        if not self.taken:
            return args
        with torch.no_grad():
            values, given = self._values(args), list(args)
            for step in self.taken:
                given.append(step(given[step.place], values))
        return given

    def reorder(self, args: Sequence[Any]) -> None:
        """Let inputs, held by now, take their selections."""
        if not self.reordered:
            return
        with torch.no_grad():
            values = self._values(args)
            for step in self.reordered:
                replace(args[step.place], step(args[step.place], values))

    def _values(self, args: Sequence[Any]) -> Sequence[Any]:
        transients = Transients()  # an index may be computed from what another handle holds
        values: Sequence[Any] = self.graph(*(transients.lower(args[i]) for i in self.inputs))
        return values

    def of_examples(self, args: Sequence[Any]) -> Sequence[Any]:
        """The same of inputs whose kind alone is looked at: a selection of a cache is one of its kind."""
        given = list(args)
        for step in self.taken:
            given.append(given[step.place])
        return given

    def of_results(self, results: Sequence[Any]) -> Sequence[Any]:
        """The results of the graph with the selections in their places."""
        given = list(results)
        for step in self.returned:
            given[step.place] = step(given[step.place], results)
        return given

    def unserved(self, normal: Normal, caches: Iterable[tuple[CacheWrite, Dims]]) -> set[int]:
        """Which selections were in vain: they are not of sequences or slots of caches that are packed.

        Args:
            normal: the graph, with the selections taken out.
            caches: what is to be packed.

        Returns:
            The positions of Dynamo's inputs; of results ~position.
        """
        found = list(caches)
        inputs, placeholders = {write.buffer: (write, dims) for write, dims in found}, normal.placeholders
        outputs = {write.cache: (write, dims) for write, dims in found if write.returned}
        left: set[int] = set()
        end = {place: self.first + number for number, place in enumerate(self.spent)}
        for step in self.taken:
            last, root = step.place, step.place
            while last in end:
                last = end[last]
            while root >= self.first:
                root = self.taken[root - self.first].place
            if not _is_served(step, inputs.get(placeholders[last])):
                left.add(root)
        for step in self.reordered:
            if not _is_served(step, inputs.get(placeholders[step.place])):
                left.add(step.place)
        for step in self.returned:
            if not _is_served(step, outputs.get(normal.outputs[step.place])):
                left.add(~step.place)
        return left


def select(normal: Normal, held: Collection[fx.Node] = (), whole: Collection[int] = ()) -> Selections:
    """Take the selections of inputs and results out of a graph.

    Args:
        normal: the graph; it is changed in place. A selection of an input becomes an input behind those it has, the
            input that it selects from stays, without users; one of an input that it writes to becomes this input.
        held: inputs that are caches by now.
        whole: inputs and results that stay as they are, as of `Selections.unserved`.
    """
    first, needed = len(normal.placeholders), list[fx.Node]()
    taken = _take(normal, set(held), whole, needed)
    reordered = _reorder(normal, whole, needed)
    graph, inputs = cut(normal.gm, normal.placeholders, needed)
    return Selections(graph, inputs, tuple(taken), tuple(reordered), first, tuple(_give(normal, whole)))


def _take(normal: Normal, held: set[fx.Node], whole: Collection[int], needed: list[fx.Node]) -> list[Step]:
    """Put inputs in the places of the selections of inputs; `needed` gets the values that they take."""
    graph, steps = normal.graph, list[Step]()
    kept = {target for _, target in normal.mutations} | {normal.placeholders[i] for i in whole if i >= 0}
    while found := next((x for x in patterns.taken(graph, kept, held) if not _is_late(x[2])), None):
        given, node, selection = found
        place = normal.placeholders.index(given)
        part = normal.add_part(given, f"{given.name}_selected", node.meta["val"], f".{selection.kind}")
        steps.append(_step(place, selection, needed))
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        kept.add(given)
        if given in held:
            held.add(part)
    return steps


def _reorder(normal: Normal, whole: Collection[int], needed: list[fx.Node]) -> list[Step]:
    """Put inputs in the places of their selections, where the graph writes to them; `needed` as for `_take`."""
    steps = list[Step]()
    kept = {normal.placeholders[i] for i in whole if i >= 0}
    for given, node, selection in patterns.reordered([target for _, target in normal.mutations], kept):
        if _is_late(selection):
            continue
        steps.append(_step(normal.placeholders.index(given), selection, needed))
        node.replace_all_uses_with(given)
        normal.graph.erase_node(node)
    return steps


def _give(normal: Normal, whole: Collection[int]) -> list[Step]:
    """Return the tensors that are selected from in the places of the selections, and the values behind them all."""
    outputs, needed = list(normal.outputs), list[fx.Node]()
    written, steps = {value for value, _ in normal.mutations}, list[Step]()
    for place, output in enumerate(normal.outputs):
        if not isinstance(output, fx.Node) or output in written or ~place in whole or outputs.count(output) > 1:
            continue
        base, chain = patterns.returned(output)
        if base.op != "placeholder":
            outputs[place] = base
            steps += [_step(place, selection, needed, len(outputs)) for selection in chain]
    normal.outputs = (*outputs, *map(_kept, needed))
    return steps


def _kept(value: fx.Node) -> fx.Node:
    """A value as it is in the graph, where it may be an input that the graph writes to in the end."""
    if not isinstance(value.meta["val"], Tensor):
        return value
    with value.graph.inserting_before(value.graph.output_node()):
        return computed(value.graph, torch.ops.aten.clone.default, value)


def _step(place: int, selection: Selection, needed: list[fx.Node], before: int = 0) -> Step:
    """A selection whose values are `needed`, of which the first is number `before`."""
    values: list[Value] = []
    for value in selection.values:
        if not isinstance(value, fx.Node):
            values.append(value)
            continue
        if value not in needed:
            needed.append(value)
        values.append((before + needed.index(value),))
    return Step(place, selection.kind, selection.dim, tuple(values))


def _is_late(selection: Selection) -> bool:
    """Whether a value of a selection takes the work of a model to compute."""
    return any(isinstance(value, fx.Node) and is_heavy(value) for value in selection.values)


def _is_served(step: Step, cache: tuple[CacheWrite, Dims] | None) -> bool:
    if cache is None:
        return False
    write, (batch, _, slot, _) = cache
    if step.kind == "slice":
        return write.form == "cat" and step.dim == slot
    return step.dim == batch
