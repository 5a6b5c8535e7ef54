"""Graph surgery: the sites of a normalised graph become `store` and `attend` on packed state buffers.

A cache whose reads are none that we rewrite becomes `store` as well, and what the graph reads of it is made from
`dequantise`: a dense tensor that lives while it is needed within the call.
"""

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from decoquant_compile import _compat, loop
from decoquant_compile.dims import BHSD, Dims, arranged, is_plain, order, order_back, sizes
from decoquant_compile.kernels import ops
from decoquant_compile.kernels.format import Format
from decoquant_compile.normalize import Normal, finish
from decoquant_compile.patterns import blocks
from decoquant_compile.patterns.cache import CacheWrite
from decoquant_compile.patterns.core import AttentionCore
from decoquant_compile.patterns.match import RebuiltCache, RebuiltSite, Site
from decoquant_compile.patterns.movement import moves
from decoquant_compile.patterns.symbols import Int, known, shape
from decoquant_compile.stacks import Stack
from decoquant_compile.subgraph import cut, is_heavy

aten = torch.ops.aten

# Example buffers only name a symbolic size; distinct sizes keep the symbols of different caches apart.
_EXAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Binding:
    """One cache tensor that a rewritten graph stores to.

    Attributes:
        index: position among the inputs that Dynamo passes; None: the graph creates the cache.
        source: the tensor as Dynamo names it.
        dims: which of its dims is batch, head, slot, channel.
        format: how its state is packed.
        device: where it is.
        outputs: positions among the graph's results that are to be a handle of the cache after the call; () for a cache
            that is written in place.
        itself: positions among the graph's results that are the input itself.
        grows: the state is a growing one, and the cache a stretch of it.
        follows: its stretch is that of the binding before: they are keys and values of one attention.
        writes: whether the graph writes it at all.
    """

    index: int | None
    source: str
    dims: Dims
    format: Format
    device: torch.device
    outputs: tuple[int, ...] = ()
    itself: tuple[int, ...] = ()
    grows: bool = False
    follows: bool = False
    writes: bool = True

    @property
    def is_placed(self) -> bool:
        """Whether the graph takes the slots of its state and the first one of its stretch."""
        return self.grows and not self.follows


@dataclass(frozen=True)
class Probe:
    """A small graph that tells, before the first call, what a cache holds: where the call writes and its masks.

    Attributes:
        graph: computes `outputs` from some of Dynamo's inputs; runs eagerly, once per takeover.
        inputs: positions of its inputs among those that Dynamo passes.
        length: per binding, index of the output that bounds the tokens held so far (their number, or the slots
            written now), or None.
        mask: per binding, index of the output with the attention mask, or None.
        first: per binding, index of the output with the slot of the mask's first column, or None.
        tokens: per binding, index of the output that counts the tokens that the call writes, or None.
        reads_all: per binding, whether the call reads all slots, and masks none.
    """

    graph: fx.GraphModule
    inputs: tuple[int, ...]
    length: tuple[int | None, ...]
    mask: tuple[int | None, ...]
    first: tuple[int | None, ...]
    tokens: tuple[int | None, ...]
    reads_all: tuple[bool, ...]


class _Wanted(NamedTuple):
    """What a `Probe` is to compute of a binding: see there."""

    held: Int | None
    mask: fx.Node | None = None
    first: Int = 0
    tokens: Int | None = None
    reads_all: bool = False


@dataclass(frozen=True)
class Sizes:
    """Numbers of a call that follow from the sizes of its inputs.

    Attributes:
        graph: computes the `outputs` that are not constant from some of Dynamo's inputs; None if all are.
        inputs: positions of its inputs among those that Dynamo passes.
        values: for each binding whose cache is returned, its batch, its heads, the tokens of the call and the slots of
            the result: constants, or the number of an output in brackets.
    """

    graph: fx.GraphModule | None
    inputs: tuple[int, ...]
    values: tuple[tuple[int | tuple[int], ...], ...]

    def __call__(self, args: Sequence[Any]) -> list[tuple[int, ...]]:
        """The numbers of each binding, () for one whose cache is not returned."""
        outputs = () if self.graph is None else self.graph(*(args[i] for i in self.inputs))
        return [tuple(x if isinstance(x, int) else outputs[x[0]] for x in row) for row in self.values]


@dataclass
class Rewritten:
    """A graph on packed state.

    Attributes:
        gm: ready for Inductor; its inputs are Dynamo's inputs `kept`, then one state buffer for each binding, then, for
            each binding that `is_placed`, the slots of its state and the first slot of what the input shows. Behind
            Dynamo's results it may give others.
        kept: positions, among the inputs of the graph as it came, of those that the graph still takes.
        bindings: the cache tensors, in the order of the state buffers: keys and values in turn.
        examples: example buffers and numbers for the compiler.
        probe: what takeover needs to know.
        sizes: of the caches that are returned.
    """

    gm: fx.GraphModule
    kept: tuple[int, ...]
    bindings: tuple[Binding, ...]
    examples: tuple[Tensor | torch.SymInt, ...]
    probe: Probe
    sizes: Sizes


def rewrite(
    normal: Normal,
    sites: Sequence[Site | RebuiltSite],
    formats: Mapping[fx.Node, Format],
    stacks: Sequence[Stack] = (),
    spent: Collection[int] = (),
) -> Rewritten:
    """Replace each site's cache writes by `store` and its attention by `attend`, or its caches by `dequantise`.

    Args:
        normal: the normalised graph; it is changed in place.
        sites: what to rewrite, in the graph's order, with all sites over the same caches.
        formats: how each cache is packed, by the node that stands for it.
        stacks: inputs that were taken apart into caches.
        spent: positions of inputs in whose place others stand.

    Returns:
        The graph, finished for Inductor, with the inputs it takes now.
    """
    return _Rewriter(normal, stacks, spent).run(sites, formats)


@dataclass
class _Rewriter:
    normal: Normal
    stacks: Sequence[Stack] = ()
    spent: Collection[int] = ()
    bindings: list[Binding] = field(default_factory=list)
    states: dict[fx.Node, fx.Node] = field(default_factory=dict)  # by cache tensor
    turns: set[fx.Node] = field(default_factory=set)  # the keys' caches that are written several times
    written: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)  # by keys' cache: tokens of its last write
    attended: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)  # by keys' cache: reads since then
    examples: list[Tensor] = field(default_factory=list)
    rooms: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)  # by placed cache: its numbers
    numbers: list[torch.SymInt] = field(default_factory=list)
    wanted: list[_Wanted] = field(default_factory=list)
    replaced: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        return self.normal.gm.graph

    def run(self, sites: Sequence[Site | RebuiltSite], formats: Mapping[fx.Node, Format]) -> Rewritten:
        inputs = self.normal.placeholders
        attended = [self._full_mask(site) for site in sites if isinstance(site, Site)]
        rebuilt = list({c.write.cache: c for s in sites if isinstance(s, RebuiltSite) for c in s.caches}.values())
        storing = _storing(attended)
        first = list({site.key.cache: site for site in reversed(storing)}.values())[::-1]  # of each cache
        self.turns = {site.key.cache for site in storing if site not in first}
        for site in first:
            self._note(site)
            self._bind(site.key, site.key_dims, formats[site.key.cache])
            self._bind(site.value, site.value_dims, formats[site.value.cache], follows=True)
        for cache in rebuilt:
            self.wanted.append(_Wanted(_held(cache.write)))
            self._bind(cache.write, cache.dims, formats[cache.write.cache])
        bound: list[tuple[CacheWrite, Dims]] = [side for site in first for side in _sides(site)]
        bound += [(cache.write, cache.dims) for cache in rebuilt]
        for (write, _), binding in zip(bound, self.bindings, strict=True):
            if binding.is_placed:
                self._make_room(write)
        # Before the writes go: the probe copies nodes of the graph as it came.
        probe = _probe(self.normal.gm, inputs, self.wanted)
        sizes = self._sizes(inputs, bound)
        for site in attended:
            self._replace(site, formats[site.key.cache], formats[site.value.cache], stores=site in storing)
        ends = self._loop([site for site in sites if isinstance(site, RebuiltSite)], formats)
        for cache in rebuilt:
            write = cache.write
            self._rebuild(cache, self.states[write.cache], formats[write.cache], ends.get(write.cache))
        for old, new in self.replaced:  # last: one attention may be the operand of another
            old.replace_all_uses_with(new)
            self.graph.erase_node(old)
        if last := [token for written in self.written.values() for token in written]:
            with self.graph.inserting_before(self.graph.output_node()):
                token = self.graph.call_function(ops.after, (last[0], last))
            self.normal.outputs = (*self.normal.outputs, token)
        held = set(self.states)
        self.normal.mutations = [(value, target) for value, target in self.normal.mutations if target not in held]
        caches = {write.cache for write, _ in bound}
        self.normal.outputs = tuple(None if x in caches else x for x in self.normal.outputs)
        for node in self.graph.find_nodes(op="call_function", target=aten.view.default):
            # A view was chosen for the strides of an operand that may be another now.
            node.target = aten.reshape.default
        gm = finish(self.normal)
        gone = (
            {inputs[b.index] for b in self.bindings if b.index is not None}
            | {inputs[i] for s in self.stacks if s.index is not None for i in (s.index, *s.positions)}
            | {inputs[i] for i in self.spent}
        )
        for node in gm.graph.find_nodes(op="placeholder"):
            if not node.users and node in gone:
                gm.graph.erase_node(node)
        gm.recompile()
        left = gm.graph.find_nodes(op="placeholder")
        kept = tuple(inputs.index(node) for node in left if node in inputs)
        examples: tuple[Tensor | torch.SymInt, ...] = (*self.examples, *self.numbers)
        return Rewritten(gm, kept, tuple(self.bindings), examples, probe, sizes)

    def _bind(self, write: CacheWrite, dims: Dims, format_: Format, *, follows: bool = False) -> None:
        index = None if write.born else self.normal.placeholders.index(write.buffer)
        outputs = tuple(i for i, x in enumerate(self.normal.outputs) if write.returned and x is write.cache)
        itself = tuple(i for i, x in enumerate(self.normal.outputs) if not write.returned and x is write.cache)
        device = write.cache.meta["val"].device
        last = self.graph.find_nodes(op="placeholder")[-1]
        number = len(self.states)
        with self.graph.inserting_after(last):
            state = self.graph.placeholder(f"decoquant_state_{number}")
        example = torch.empty(_EXAMPLE_BYTES + 64 * number, dtype=torch.uint8, device=device)
        _compat.add_input_source(state, example, state.name)
        self.states[write.cache] = state
        self.examples.append(example)
        source = "" if write.born else self.normal.source(write.buffer)
        grows = write.grows
        self.bindings.append(
            Binding(index, source, dims, format_, device, outputs, itself, grows, grows and follows, write.writes)
        )

    def _make_room(self, write: CacheWrite) -> None:
        """Add the inputs that tell where the tokens of a growing cache stand."""
        nodes = []
        for name in ("slots", "first"):
            last = self.graph.find_nodes(op="placeholder")[-1]
            with self.graph.inserting_after(last):
                node = self.graph.placeholder(f"decoquant_{name}_{len(self.numbers)}")
            # No two alike: these hints only name symbols.
            self.numbers.append(_compat.add_number_source(node, _EXAMPLE_BYTES + 64 * len(self.numbers) + 7))
            nodes.append(node)
        self.rooms[write.cache] = (nodes[0], nodes[1])

    def _sizes(self, inputs: Sequence[fx.Node], bound: Sequence[tuple[CacheWrite, Dims]]) -> Sizes:
        """What has to be known of each returned cache before and after a call."""
        outputs: list[fx.Node] = []
        rows: list[tuple[int | tuple[int], ...]] = []
        for write, dims in bound:
            batch, heads, slots, _ = sizes(shape(write.cache), dims)
            # All that is written to it, in one turn or several.
            tokens = shape(write.new)[dims[2]] if write.result is None else slots - shape(write.buffer)[dims[2]]
            row: list[int | tuple[int]] = []
            for size in (batch, heads, tokens, slots) if write.returned else ():
                with self.graph.inserting_before(self.graph.output_node()):
                    number = _compat.size_node(self.graph, size)
                if isinstance(number, int):
                    row.append(number)
                    continue
                if number not in outputs:
                    outputs.append(number)
                row.append((outputs.index(number),))
            rows.append(tuple(row))
        if not outputs:
            return Sizes(None, (), tuple(rows))
        graph, taken = cut(self.normal.gm, inputs, outputs)
        return Sizes(graph, taken, tuple(rows))

    def _full_mask(self, site: Site) -> Site:
        """The site with a mask of 4 dims, as the operators and the takeover expect; a graph's own may have fewer."""
        mask = site.core.mask
        if mask is None:
            return site
        while mask.meta["val"].dim() < 4:
            with self.graph.inserting_after(mask):
                value = mask.meta["val"].unsqueeze(0)
                mask = self.graph.call_function(aten.unsqueeze.default, (mask, 0))
                mask.meta["val"] = value
        return replace(site, core=replace(site.core, mask=mask))

    def _note(self, site: Site) -> None:
        """Remember what takeover wants to know of the site's keys and values."""
        first: Int = site.read.first if site.read is not None else 0
        if site.key.form == "roll":  # the mask is for the slots after the write, further left
            with self.graph.inserting_before(site.core.node):
                assert site.key.kept is not None
                after = self._add(site.key.kept, self._size(site.key.new, site.key_dims[2]))
                first = self._add(first, self._sub(after, self._size(site.key.cache, site.key_dims[2])))
        for write, dims in _sides(site):
            # What is only read is held already.
            mask = site.core.mask if site.read is not None and write.writes and write.partial is None else None
            with self.graph.inserting_before(site.core.node):
                tokens = self._size(write.new, dims[2])
            self.wanted.append(_Wanted(_held(write), mask, first, tokens, _reads_all(site)))

    def _replace(self, site: Site, key_format: Format, value_format: Format, *, stores: bool) -> None:
        core = site.core
        key_state, value_state = self.states[site.key.cache], self.states[site.value.cache]
        with self.graph.inserting_before(site.ready):
            key, value = self._tokens(site.key, site.key_dims), self._tokens(site.value, site.value_dims)
            tokens = self._size(key, 2) if site.key.writes else 0
            length = self._size(core.key, 2)
            key_slots, first = self._place(site)
            value_slots = key_slots if site.value.grows else self._room(site.value, site.value_dims)[0]
            mask = self._mask(site, length)
            _, shown = self._room(site.key, site.key_dims)
            stored, shift = self._placing(site.key, tokens, key_slots, shown, key)
            column = self._column(site, self._sub(key_slots, tokens), shift)
            real = None if column is None else mask
            everybody = None if site.key.partial is None else self._roles(site.key.cache, site.key_dims)[0]

            def store(state: fx.Node, new: fx.Node, query: fx.Node | None, slots: Int, format_: Format) -> fx.Node:
                hidden, rows = real, None
                if everybody is not None:
                    new, rows = self._padded(new, everybody)
                    query = query and self._padded(query, everybody)[0]
                    hidden = hidden and self._for_all(hidden, everybody)
                arguments = (state, new, stored, query, hidden, slots, shift, column or 0, format_.key(), rows)
                if site.key.cache in self.turns:
                    return self.graph.call_function(ops.store_in_turn, (*arguments, earlier))
                return self.graph.call_function(ops.store, arguments)

            def attend(positions: fx.Node) -> None:
                query = core.query
                if tokens_before := self.written.get(site.key.cache):
                    query = self.graph.call_function(ops.after, (query, tokens_before))
                arguments = (query, key_state, value_state, key, value, positions, mask, core.scale, core.softcap)
                sizes = (key_slots, first, length, key_format.key(), value_format.key(), core.sink, everybody)
                result = self.graph.call_function(ops.attend, (*arguments, *sizes))
                self.attended.setdefault(site.key.cache, []).append(result)
                for target, others in core.result:
                    result = self.graph.call_function(target, (result, *others))
                self.replaced.append((core.node, self._laid_out(result, core.node)))

            appended = _reads_before(site)
            if appended:  # the attention sees the cache as it was
                held = site.key.kept
                assert held is not None
                attend(stored if site.key.form == "cat" else self._arange(held, tokens, key))
            if stores and site.key.writes:
                seen = known(shape(core.query)[2] == shape(key)[2])  # else they are not of the same tokens
                earlier = [*self.written.pop(site.key.cache, ()), *self.attended.pop(site.key.cache, ())]
                written = [
                    store(key_state, key, core.query if seen else None, key_slots, key_format),
                    store(value_state, value, None, value_slots, value_format),
                ]
                if site.key.cache in self.turns:
                    self.written[site.key.cache] = written
            if site.read is not None and not appended:
                attend(stored)

    def _laid_out(self, result: fx.Node, old: fx.Node) -> fx.Node:
        """The result of an attention with the strides of the one before, where the graph's caller may see them."""
        value = old.meta["val"]
        if value.is_contiguous() or not _is_shown(old):
            return result
        places = sorted(range(value.dim()), key=lambda d: -_compat.hint_of(value.stride(d)))
        result = self.graph.call_function(aten.permute.default, (result, places))
        result = self.graph.call_function(aten.clone.default, (result,), {"memory_format": torch.contiguous_format})
        return self.graph.call_function(aten.permute.default, (result, [places.index(d) for d in range(len(places))]))

    def _loop(self, sites: Sequence[RebuiltSite], formats: Mapping[fx.Node, Format]) -> dict[fx.Node, fx.Node]:
        """Let attentions make their keys and values of a block of slots at a time, where they can.

        Returns:
            The caches that are read so, each with the last node that reads it.
        """
        ends: dict[fx.Node, fx.Node] = {}
        for site in sites:
            core = site.reject.core
            if site.expansion is None or core is None:
                continue
            with self.graph.inserting_before(core.node):
                core = replace(core, mask=self._hiding(core, self._size(core.key, 2)), is_causal=False)
                readers = {c.write.seen: self._reader(c, formats[c.write.cache]) for c in site.caches}
                result = loop.attend(self.graph, core, site.expansion, readers)
                for target, others in core.result:
                    result = self.graph.call_function(target, (result, *others))
            self.replaced.append((core.node, result))
            ends |= {cache.write.cache: result for cache in site.caches}
        return ends

    def _reader(self, cache: RebuiltCache, format_: Format) -> loop.Reader:
        """What reads some slots of a cache as it is after the write: the new tokens exactly."""
        write, dims = cache.write, cache.dims
        state = self.states[write.cache]
        batch, heads, _, _ = self._roles(write.buffer, dims)
        slots, first = self._room(write, dims)
        sizes = [blocks.LENGTH if dim == dims[2] else self._size(write.buffer, dim) for dim in order(dims)]
        new: fx.Node | None = None
        positions: fx.Node | None = None
        if write.writes:
            new = self._tokens(write, dims)
            positions, _ = self._placing(write, self._size(new, 2), slots, 0, new)

        def read(body: loop.Part, start: loop.Recorded) -> loop.Recorded:
            arguments = (state, batch, heads, slots, first, blocks.LENGTH, format_.key(), None, start)
            dense = body.call(ops.dequantise_stretch, *arguments)
            if new is not None and positions is not None:
                place = body.proxy(positions) - start
                beside = (place < 0) | (place >= blocks.LENGTH)
                padded = body.call(aten.constant_pad_nd.default, dense, [0, 0, 0, 1])
                dense = padded.index_copy(2, place.masked_fill(beside, blocks.LENGTH), body.proxy(new))
                dense = dense[:, :, :-1]
            if not is_plain(dims):
                dense = body.call(aten.reshape.default, dense, sizes)
            return dense.permute(order_back(dims))

        return read

    def _rebuild(self, cache: RebuiltCache, state: fx.Node, format_: Format, end: fx.Node | None = None) -> None:
        """Let the graph go on from the cache as it was before the write, rebuilt, and store what it writes.

        The graph's own write stays, on the rebuilt tensor: so the new tokens are read exactly, as `attend` reads them.

        Args:
            cache: the cache.
            state: its state.
            format_: of the state.
            end: the last node that reads the cache, if it does so block by block.
        """
        write, dims = cache.write, cache.dims
        slots, first = self._room(write, dims)
        dense = end if write.born or end is not None else self._dense(cache, state, format_, slots, first)
        if not write.writes:
            return
        inputs = self.graph.find_nodes(op="placeholder")
        needed = (dense, write.new, write.positions, write.start, write.kept, inputs[-1])
        last = max(node for node in needed if isinstance(node, fx.Node))
        with self.graph.inserting_before(last.next):
            new = self._tokens(write, dims)
            stored, shift = self._placing(write, self._size(new, 2), slots, first, new)
            rows = None
            if write.partial is not None:
                new, rows = self._padded(new, self._roles(write.cache, dims)[0])
            if write.is_ragged:
                new, stored, rows = self._spread(new, stored)
            self.graph.call_function(ops.store, (state, new, stored, None, None, slots, shift, 0, format_.key(), rows))

    def _dense(self, cache: RebuiltCache, state: fx.Node, format_: Format, slots: Int, first: Int) -> fx.Node | None:
        """Put the rebuilt cache in place of the input that holds it; None where there is nothing in it yet."""
        write, buffer = cache.write, cache.write.buffer
        if write.form == "cat" and write.kept == 0:
            return None
        readers = [user for user in buffer.users if user.target is not aten.sym_size.int]
        # Where they are known by then, the new tokens keep the compiler from rebuilding the caches of all layers first.
        after = write.new if write.writes and write.new < min(readers) else None
        with self.graph.inserting_before(min(readers)):
            batch, heads, length, _ = self._roles(buffer, cache.dims)
            if write.grows:
                arguments = (state, batch, heads, slots, first, length, format_.key(), after)
                dense = self.graph.call_function(ops.dequantise_stretch, arguments)
            else:
                dense = self.graph.call_function(ops.dequantise, (state, batch, heads, slots, format_.key(), after))
            places = order(cache.dims)
            if not is_plain(cache.dims):
                parts = [self._size(buffer, dim) for dim in places]
                dense = self.graph.call_function(aten.reshape.default, (dense, parts))
            if places != sorted(places):
                dense = self.graph.call_function(aten.permute.default, (dense, order_back(cache.dims)))
                dense = self.graph.call_function(
                    aten.clone.default, (dense,), {"memory_format": torch.contiguous_format}
                )
            dense.meta["val"] = buffer.meta["val"]
        for user in readers:
            user.replace_input_with(buffer, dense)
        return dense

    def _padded(self, new: fx.Node, batch: Int) -> tuple[fx.Node, fx.Node]:
        """New tokens of the first sequences as tokens of all, and which of them are to be stored: [batch, tokens]."""
        tokens, written = self._size(new, 2), self._size(new, 0)
        missing = self._sub(batch, written)
        rows = self._arange(0, batch, new)
        # As a fallback of Inductor, the padding wants its operand so.
        new = self.graph.call_function(aten.clone.default, (new,), {"memory_format": torch.contiguous_format})
        new = self.graph.call_function(aten.constant_pad_nd.default, (new, [0] * 7 + [missing]))
        rows = self.graph.call_function(aten.lt.Scalar, (rows, written))
        rows = self.graph.call_function(aten.unsqueeze.default, (rows, 1))
        return new, self.graph.call_function(aten.expand.default, (rows, [batch, tokens]))

    def _for_all(self, mask: fx.Node, batch: Int) -> fx.Node:
        """A mask of the first sequences as one of all."""
        if known(shape(mask)[0] == 1):
            return mask
        missing = self._sub(batch, self._size(mask, 0))
        return self.graph.call_function(aten.constant_pad_nd.default, (mask, [0] * 7 + [missing]))

    def _spread(self, new: fx.Node, positions: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Tokens at positions of each sequence, [batch, tokens], as tokens of all at the same, and whose they are.

        Each sequence gets the tokens of all, of which only its own are stored.
        """
        call, (batch, heads, tokens, channels) = self.graph.call_function, (self._size(new, dim) for dim in range(4))
        everybody = call(operator.mul, (batch, tokens))
        moved = call(aten.transpose.int, (new, 0, 1))
        moved = call(aten.reshape.default, (moved, [1, heads, everybody, channels]))
        moved = call(aten.expand.default, (moved, [batch, -1, -1, -1]))
        places = call(aten.reshape.default, (positions, [everybody]))
        owners = call(aten.floor_divide.default, (self._arange(0, everybody, new), tokens))
        sequences = call(aten.unsqueeze.default, (self._arange(0, batch, new), 1))
        return moved, places, call(aten.eq.Tensor, (sequences, owners))

    def _tokens(self, write: CacheWrite, dims: Dims) -> fx.Node:
        """The new tokens as the cache would hold them: its dtype, [batch, heads, tokens, channels]."""
        if not write.writes:
            batch, heads, _, channels = self._roles(write.cache, dims)
            like = write.cache.meta["val"]
            options = {"dtype": like.dtype, "device": like.device, "pin_memory": False}
            none = self.graph.call_function(aten.empty.memory_format, ([batch, heads, 0, channels],), options)
            none.meta["val"] = arranged(like, dims)[:, :, :0]
            return none
        new, dtype = write.new, write.cache.meta["val"].dtype
        if new.meta["val"].dtype != dtype:
            new = self.graph.call_function(aten.to.dtype, (new, dtype))
            new.meta["val"] = write.new.meta["val"].to(dtype)
        if dims != BHSD:
            value, roles = new.meta["val"], self._roles(new, dims)
            new = self.graph.call_function(aten.permute.default, (new, order(dims)))
            if not is_plain(dims):
                new = self.graph.call_function(aten.reshape.default, (new, roles))
            new.meta["val"] = arranged(value, dims)
        return new

    def _place(self, site: Site) -> tuple[Int, Int]:
        """Slots of the keys' state, and which of them is the first key of the attention."""
        first: Int = site.read.first if site.read is not None else 0
        slots, shown = self._room(site.key, site.key_dims)
        return slots, self._add(shown, first)

    def _room(self, write: CacheWrite, dims: Dims) -> tuple[Int, Int]:
        """Slots of a state, and the first one of the cache before the call."""
        return self.rooms[write.cache] if write.grows else (self._size(write.cache, dims[2]), 0)

    def _wrapped(self, positions: fx.Node, slots: Int) -> fx.Node:
        """Slots of an index, whose negative numbers count from the end; those outside are for `store` to refuse."""
        call = self.graph.call_function
        from_end = call(aten.add.Scalar, (positions, slots))
        wrapped = call(aten.where.self, (call(aten.lt.Scalar, (positions, 0)), from_end, positions))
        return call(aten.where.ScalarSelf, (call(aten.lt.Scalar, (from_end, 0)), slots, wrapped))

    def _placing(self, write: CacheWrite, tokens: Int, slots: Int, shown: Int, like: fx.Node) -> tuple[fx.Node, Int]:
        """Slots that the new tokens take, after the cache has moved left by the second value.

        Args:
            write: where they go.
            tokens: how many.
            slots: of the state.
            shown: the slot that was the cache's first before the call.
            like: a tensor on the device.
        """
        if write.positions is not None:
            positions = write.positions
            if write.wraps:
                positions = self._wrapped(positions, slots)
            return positions, 0
        if write.start is not None:
            return self._arange(write.start, tokens, like), 0
        if not write.writes:
            return self._arange(0, 0, like), 0
        assert write.kept is not None
        if write.form == "cat":
            return self._arange(self._add(shown, write.kept), tokens, like), 0
        return self._arange(self._sub(slots, tokens), tokens, like), self._sub(self._add(write.kept, tokens), slots)

    def _column(self, site: Site, tail: Int, shift: Int) -> Int | None:
        """Slot, after the write, of the mask's first column; None where it is not known before the graph runs.

        Args:
            site: the site.
            tail: slot of the first new token where the new tokens are the last of the cache.
            shift: how far the write moves the cache to the left.
        """
        if site.read is None and not known(shape(site.core.key)[2] == shape(site.key.new)[site.key_dims[2]]):
            return None  # the mask is for more tokens than are written
        if site.key.form == "cat":
            return self._place(site)[1] if site.read is not None else None
        if site.read is not None:
            return site.read.first if site.read.after_write else self._sub(site.read.first, shift)
        if site.key.kept is not None:
            return tail
        return site.key.start

    def _mask(self, site: Site, length: Int) -> fx.Node | None:
        """The mask as a tensor: `is_causal` admits column j to row i where j <= i, whatever the lengths."""
        return site.core.mask if site.read is None else self._hiding(site.core, length)

    def _hiding(self, core: AttentionCore, length: Int) -> fx.Node | None:
        """The mask of an attention over so many keys."""
        if not core.is_causal:
            return core.mask
        rows = self._arange(0, self._size(core.query, 2), core.query)
        columns = self._arange(0, length, core.query)
        rows = self.graph.call_function(aten.view.default, (rows, [1, 1, -1, 1]))
        mask = self.graph.call_function(aten.le.Tensor, (columns, rows))
        sizes = (1, 1, shape(core.query)[2], shape(core.key)[2])
        mask.meta["val"] = core.query.meta["val"].new_empty(sizes, dtype=torch.bool)
        return mask

    def _arange(self, start: Int, count: Int, like: fx.Node) -> fx.Node:
        """``[start, start + count)``, without a guard on `start`."""
        options = {"dtype": torch.int64, "device": like.meta["val"].device, "pin_memory": False}
        run = self.graph.call_function(aten.arange.start, (0, count), options)
        return run if start == 0 else self.graph.call_function(aten.add.Tensor, (run, start))

    def _size(self, node: fx.Node, dim: int) -> Int:
        """A size as a constant, or computed from the inputs that carry its symbols.

        Not read off the node: that would keep the dense operand alive.
        """
        return _compat.size_node(self.graph, shape(node)[dim])

    def _roles(self, node: fx.Node, dims: Dims) -> list[Int]:
        """Batch, heads, slots and channels of a node."""
        return [_compat.size_node(self.graph, size) for size in sizes(shape(node), dims)]

    def _add(self, a: Int, b: Int) -> Int:
        return self._fold(operator.add, a, b)

    def _sub(self, a: Int, b: Int) -> Int:
        return self._fold(operator.sub, a, b)

    def _fold(self, function: Callable[[int, int], int], a: Int, b: Int) -> Int:
        if isinstance(a, int) and isinstance(b, int):
            return function(a, b)
        return self.graph.call_function(function, (a, b))


def _is_shown(node: fx.Node) -> bool:
    """Whether a graph returns a node, or a view of it."""
    todo, seen = [node], set[fx.Node]()
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return True
            if moves(user) and user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def _storing(sites: Sequence[Site]) -> list[Site]:
    """Of the sites over one write that which stores: the first, or the last where they read the cache as it was."""
    chosen: dict[tuple[fx.Node, fx.Node], Site] = {}
    for site in sites:
        if _reads_before(site) or (site.key.cache, site.key.value) not in chosen:
            chosen[site.key.cache, site.key.value] = site
    return [site for site in sites if chosen[site.key.cache, site.key.value] is site]


def _reads_before(site: Site) -> bool:
    """Whether an attention reads its cache before the new tokens are stored: storing may move others out."""
    return site.read is not None and not site.read.after_write


def _sides(site: Site) -> list[tuple[CacheWrite, Dims]]:
    """How the keys' and the values' cache are written, each with its dims."""
    return [(site.key, site.key_dims), (site.value, site.value_dims)]


def _reads_all(site: Site) -> bool:
    """Whether an attention reads all slots of a cache, and masks none."""
    if site.read is None or site.core.mask is not None or site.core.is_causal:
        return False
    return site.read.first == 0 and known(shape(site.core.key)[2] == shape(site.key.cache)[site.key_dims[2]])


def _held(write: CacheWrite) -> Int | None:
    """What bounds the tokens that a cache held before a write: their number, or the slots written."""
    if write.is_ragged:  # what is left over of one sequence is another's
        return None
    return next((x for x in (write.positions, write.start, write.kept) if x is not None), None)


def _probe(gm: fx.GraphModule, inputs: Sequence[fx.Node], wanted: Iterable[_Wanted]) -> Probe:
    """Cut out of the graph what is needed to compute the wanted values."""
    outputs: list[Int] = []

    def output(value: Int | None) -> int | None:
        if value is None:
            return None
        if isinstance(value, fx.Node) and is_heavy(value):
            return None
        if value not in outputs:
            outputs.append(value)
        return outputs.index(value)

    rows = [(output(w.held), output(w.mask), output(w.first), output(w.tokens), w.reads_all) for w in wanted]
    return Probe(*cut(gm, inputs, outputs), *(tuple(column) for column in zip(*rows, strict=True)))
