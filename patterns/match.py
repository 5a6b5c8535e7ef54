"""Sites: an attention joined with the two cache writes that feed it, or the reason why not."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol, TypeAlias

import torch
from torch import fx

from decoquant_compile.patterns import blocks, flow
from decoquant_compile.patterns.attention import anchors, cores, readers
from decoquant_compile.patterns.blocks import Expansion
from decoquant_compile.patterns.cache import CacheWrite, parse, parse_returned, parse_returned_turns, parse_turns
from decoquant_compile.patterns.core import AttentionCore
from decoquant_compile.patterns.movement import Repeat, Walk, moves, operand, peel, plain
from decoquant_compile.patterns.reject import Problem, Reason, Reject
from decoquant_compile.patterns.symbols import (
    FLOATS,
    Int,
    Size,
    argument,
    dtype,
    guarded,
    known,
    same_value,
    shape,
    size_of,
)

aten = torch.ops.aten


Group: TypeAlias = int | tuple[int, ...]
"""A dim of a cache; two of them, where the first holds keys and values, or anything else of which there are two; ()."""

Dims: TypeAlias = tuple[Group, Group, int, int]
"""Which dims of a cache are batch, head, slot, channel."""


class Normalised(Protocol):
    """A functional graph whose writes to its inputs are values."""

    @property
    def graph(self) -> fx.Graph:
        """The graph."""

    @property
    def mutations(self) -> Sequence[tuple[fx.Node, fx.Node]]:
        """(value, input that becomes it) of every write."""

    @property
    def outputs(self) -> Sequence[object]:
        """What the graph returns to its caller."""


@dataclass(frozen=True)
class CacheRead:
    """What the key axis of an attention is.

    Attributes:
        first: slot of the first key; the others follow.
        after_write: slots are those of the cache after the write; otherwise those before it, and the new tokens stand
            at slots `kept`, `kept` + 1, ...
    """

    first: Int
    after_write: bool


@dataclass(frozen=True)
class Site:
    """One attention over one cache. Sites may share a cache: all are rewritten then, or none.

    Sites whose writes differ share a cache that is written several times; then the graph has them in the writes' order.

    Attributes:
        core: the attention; its keys are as many as the size of `core.key`.
        key: how the keys' cache is written.
        value: the same for the values; same form, same positions.
        read: which slots the attention sees; None: only the tokens of this call, it stays as it is.
        key_dims: which dim of the keys' cache is batch, head, slot, channel.
        value_dims: the same of the values'.
        groups: query heads for each key-value head: query head h reads key-value head h // groups.
    """

    core: AttentionCore
    key: CacheWrite
    value: CacheWrite
    read: CacheRead | None
    key_dims: tuple[int, int, int, int]
    value_dims: tuple[int, int, int, int]
    groups: int

    @property
    def ready(self) -> fx.Node:
        """The first node before which all that the site needs has been computed.

        That is its attention, unless it reads the new tokens alone: their places may be computed later.
        """
        write = self.key
        needed = (write.new, self.value.new, write.positions, write.start, write.kept)
        last = max(node for node in needed if isinstance(node, fx.Node))
        return max(self.core.node, last.next)


@dataclass(frozen=True)
class RebuiltCache:
    """A cache that is stored packed and rebuilt in each call, because what reads it is no attention that we rewrite.

    Attributes:
        write: how it is written.
        side: "key" if its slots index the keys of every attention that they reach, "value" otherwise.
        dims: which of its dims are batch, head, slot, channel.
    """

    write: CacheWrite
    side: flow.Side
    dims: Dims


@dataclass(frozen=True)
class RebuiltSite:
    """One attention that stays as it is, over caches that are rebuilt.

    Attributes:
        reject: the attention, and why it cannot read the packed caches.
        caches: where its keys and values come from; other sites may have the same.
        expansion: how its keys and values come from what it sees of the caches; None where that takes the whole of them
            at once. Sites that share a cache have one, or none has.
    """

    reject: Reject
    caches: tuple[RebuiltCache, ...]
    expansion: Expansion | None = None

    @property
    def buffers(self) -> set[fx.Node]:
        """What its caches are written into."""
        return {cache.write.buffer for cache in self.caches}


_LINEAR = {
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.einsum.default,
}


@dataclass(frozen=True)
class Held:
    """What is known of an input that is packed already.

    Attributes:
        dims: which of its dims are batch, head, slot, channel.
        is_stretch: it is a handle of a growing cache.
    """

    dims: Dims
    is_stretch: bool


@dataclass(frozen=True)
class _Operand:
    """Keys or values of an attention, traced back to a cache write."""

    write: CacheWrite
    walk: Walk
    own: bool  # the attention reads the tokens of this call, not the cache


def match(normal: Normalised, held: Mapping[fx.Node, Held] | None = None) -> list[Site | RebuiltSite | Reject]:
    """Find every attention and say what it is.

    Args:
        normal: the graph.
        held: the inputs that are packed already: those that the graph only reads are known to be caches by that alone.

    Returns:
        One `Site`, `RebuiltSite` or `Reject` for each attention, in the graph's order, then a `Reject` for each
        cache that the graph writes in a known way and no attention reads.
    """
    return _Matcher(normal, held or {}).run()


class _Matcher:
    def __init__(self, normal: Normalised, held: Mapping[fx.Node, Held]) -> None:
        self.graph = normal.graph
        self.outputs = [n for n in normal.outputs if isinstance(n, fx.Node)]
        self.impure = [n for n in self.graph.nodes if n.op == "call_function" and n.is_impure()]
        self.mutations = list(normal.mutations)
        self.readers = readers(self.graph)
        self.writes: dict[fx.Node, CacheWrite] = {}  # by the cache: an input, or what is returned
        self.turns: dict[fx.Node, list[CacheWrite]] = {}  # of caches that are written several times
        self.seen: dict[fx.Node, CacheWrite] = {}  # by the node that an attention over the cache starts from
        self.new: dict[fx.Node, CacheWrite | None] = {}  # by the tokens written; None where they go to several caches
        self.evidence: dict[fx.Node, Problem | None] = {}  # nodes that hold a cache, and what is wrong with it
        for value, buffer in self.mutations:
            if len(shape(buffer)) >= 3:
                self.evidence[buffer] = Problem(Reason.READ_BEFORE_WRITE, buffer.name)
                self._learn(buffer, value, parse(buffer, value))
        mutated = {buffer for _, buffer in self.mutations}
        for output in dict.fromkeys(self.outputs):
            if len(shape(output)) < 3:
                continue
            if (turns := parse_returned_turns(output)) is not None:
                self._learn_turns(output, turns)
                continue
            write = parse_returned(output)
            is_known = isinstance(write, CacheWrite) and write.buffer in mutated
            if write is not None and not is_known:
                self._learn(output, output, write)
        written = {write.buffer for write in self.writes.values()} | self.evidence.keys()
        for buffer in [node for node in held if node not in written]:
            slot, is_stretch = held[buffer].dims[2], held[buffer].is_stretch
            read = CacheWrite("read", buffer, buffer, buffer, slot, buffer, is_stretch=is_stretch)
            self._learn(buffer, buffer, read)
        self.read_by: dict[fx.Node, dict[fx.Node, object]] = {}  # cache -> attentions -> caches of keys and values
        self.sides: dict[fx.Node, set[tuple[fx.Node, flow.Side]]] = {}  # cache -> attentions whose operand it is
        self.own: dict[fx.Node, set[tuple[fx.Node, flow.Side]]] = {}  # cache -> those that read its new tokens instead

    def _learn(self, cache: fx.Node, value: fx.Node, write: CacheWrite | Problem) -> None:
        if (
            isinstance(write, Problem)
            and cache is not value
            and not isinstance(turns := parse_turns(cache, value), Problem)
        ):
            self._learn_turns(cache, turns)
            return
        if isinstance(write, Problem):
            node = plain(value)
            self.evidence[node] = write
            if cache is value and moves(node):  # a part of what attention reads is returned
                self.evidence[plain(operand(node))] = write
            return
        self.writes[cache] = write
        self._show(write)

    def _learn_turns(self, cache: fx.Node, turns: list[CacheWrite]) -> None:
        self.turns[cache] = turns
        for turn in turns:
            self._show(turn)

    def _show(self, write: CacheWrite) -> None:
        """Make a write known by what attentions may read of it."""
        if write.form != "replace":
            self.seen[write.seen] = write
            self.evidence[write.seen] = None
        if write.writes:
            self.new[write.new] = None if write.new in self.new else write
            new = write.new  # of a prompt longer than a window the last tokens
            along = new.target is aten.slice.Tensor and argument(new, "dim") % len(shape(new)) == write.slot_dim
            if along and argument(new, "step") == 1:
                self.new[operand(new)] = None if operand(new) in self.new else write

    def run(self) -> list[Site | RebuiltSite | Reject]:
        found, known_by = cores(self.graph), anchors(self.graph)
        operands: dict[fx.Node, tuple[_Operand | Problem, _Operand | Problem]] = {}
        for core in found:
            if isinstance(core, AttentionCore):
                pair = self._resolve(core.key, scaled=True), self._resolve(core.value)
                operands[core.node] = pair
                caches = tuple(side.write.cache for side in pair if isinstance(side, _Operand))
                for cache in caches:
                    self.read_by.setdefault(cache, {})[core.node] = caches
                by_side: dict[flow.Side, _Operand | Problem] = {"key": pair[0], "value": pair[1]}
                for side, traced in by_side.items():
                    if isinstance(traced, _Operand):
                        reading = self.own if traced.own else self.sides
                        reading.setdefault(traced.write.cache, set()).add((core.node, side))
        sites: dict[fx.Node, Site | Problem] = {}
        for core in found:
            if isinstance(core, AttentionCore):
                sites[core.node] = self._join(core, *operands[core.node])
        for cache in {site.key.cache: None for site in sites.values() if isinstance(site, Site)}:
            group = {node: sites[node] for node in self.read_by[cache]}
            if (problem := self._share(list(group.values()))) is not None:
                sites |= {node: problem for node, site in group.items() if isinstance(site, Site)}
        joined: list[Site | Reject] = []
        for core in found:
            if isinstance(core, Reject):
                joined.append(core)
                continue
            site = sites[core.node]
            joined.append(site if isinstance(site, Site) else Reject(site.reason, core.node.name, site.detail, core))
        results = self._rebuild(dict(zip(known_by, joined, strict=True)), sites)
        unread = (c for c in self.writes if len(shape(c)) == 4 and c not in self.read_by and not self._is_read(c))
        results += [Reject(Reason.WRITE_NOT_READ, c.name) for c in unread if not self.writes[c].returned]
        return results

    def _rebuild(
        self, joined: dict[fx.Node, Site | Reject], read: Container[fx.Node]
    ) -> list[Site | RebuiltSite | Reject]:
        """Serve rejected attentions whose keys and values all come from caches with writes that are understood.

        Args:
            joined: what each attention is, by its anchor.
            read: as of `_expand`.
        """
        held = {w.cache for site in joined.values() if isinstance(site, Site) for w in (site.key, site.value)}
        at = {x.core.node: anchor for anchor, x in joined.items() if x.core is not None}
        escaped = {
            x.core.node
            for x in joined.values()
            if isinstance(x, Reject) and x.core is not None and x.reason is Reason.CACHE_VALUE_ESCAPES
        }
        mutating = {value for value, _ in self.mutations}
        reading: dict[fx.Node, list[tuple[RebuiltCache, set[flow.Side]]]] = {}
        for cache, write in self.writes.items():
            if cache in held or (write.returned and cache in mutating):  # a handle would have to be in two places
                continue
            start = write.seen if write.born else write.buffer
            reached = flow.attentions(start, write.slot_dim, self.readers, {write.value, write.cache})
            if reached is not None and not reached:
                reached = {(at[node], side) for node, side in self.own.get(cache, ())}
            if not reached and not self._is_shown(write) and not flow.decides(start, self.readers):
                reached = {(at[node], side) for node, side in self.sides.get(cache, ()) if node in escaped}
            dims = _dims(write)
            if not reached or dims is None:
                continue
            rebuilt = RebuiltCache(write, "key" if {side for _, side in reached} == {"key"} else "value", dims)
            for anchor in {anchor for anchor, _ in reached}:
                reading.setdefault(anchor, []).append((rebuilt, {side for a, side in reached if a is anchor}))
        results: list[Site | RebuiltSite | Reject] = []
        for anchor, result in joined.items():
            caches = reading.get(anchor, [])
            sides = {side for _, of_cache in caches for side in of_cache}
            if isinstance(result, Site) or sides != {"key", "value"}:
                results.append(result)
                continue
            results.append(RebuiltSite(result, tuple(cache for cache, _ in caches)))
        return self._expand(results, read)

    def _expand(
        self, results: list[Site | RebuiltSite | Reject], read: Container[fx.Node]
    ) -> list[Site | RebuiltSite | Reject]:
        """Find the sites whose keys and values can be made from a few slots of their caches at a time.

        Args:
            results: all sites.
            read: the attentions that are understood but for where their keys and values come from.
        """
        results = [_expanded(x, read) if isinstance(x, RebuiltSite) else x for x in results]
        while dense := self._dense([x for x in results if isinstance(x, RebuiltSite)]):
            results = [
                replace(x, expansion=None) if isinstance(x, RebuiltSite) and not dense.isdisjoint(x.buffers) else x
                for x in results
            ]
        return results

    def _dense(self, sites: Sequence[RebuiltSite]) -> set[fx.Node]:
        """The caches that some site takes a block at a time and something else as a whole."""
        expanded = [(site, site.expansion, site.reject.core) for site in sites if site.expansion is not None]
        if not expanded:
            return set()
        writes = list({cache.write.cache: cache.write for site, *_ in expanded for cache in site.caches}.values())
        kept: list[object] = []
        for write in writes:
            kept += [write.new, write.positions, write.start, write.kept] if write.writes else []
        rewritten: set[fx.Node] = set()
        for _, expansion, core in expanded:
            assert core is not None  # only such sites are expanded
            rewritten.add(core.node)
            kept += [core.query, core.mask, core.sink, *expansion.others]
        held = {write.buffer for write in writes}
        needed = {node for node, _ in self._needed(held, {write.cache for write in writes}, kept, rewritten)}
        return needed | {node for site in sites if site.expansion is None for node in held & site.buffers}

    def _is_shown(self, write: CacheWrite) -> bool:
        """Whether the graph returns a cache besides as what it becomes: its elements, moved."""
        return any(
            x is not write.value
            and x is not write.cache
            and peel(x, until={write.seen, write.buffer}).source in (write.seen, write.buffer)
            for x in self.outputs
        )

    def _is_read(self, cache: fx.Node) -> bool:
        """Whether some attention reads the cache after all, so that its reject tells why nobody claimed it."""
        write = self.writes[cache]
        if not write.writes or self.new[write.new] is None:
            return True
        visited: set[fx.Node] = set()
        todo = [cache, write.seen]
        while todo:
            node = todo.pop()
            if node in self.readers:
                return True
            if node not in visited:
                visited.add(node)
                todo += node.users
        return False

    def _resolve(self, node: fx.Node, *, scaled: bool = False) -> _Operand | Problem:
        walk = peel(node, until=self.seen.keys() | self.new.keys(), scaled=scaled)
        if (write := self.seen.get(walk.source)) is not None:
            return _Operand(write, walk, own=False)
        if walk.source in self.new:
            only = self.new[walk.source]
            if only is not None:
                return _Operand(only, walk, own=True)
            return Problem(Reason.SAME_TENSOR, f"{walk.source} goes to several caches")
        return self._blame(walk.source)

    def _blame(self, source: fx.Node) -> Problem:
        """Why keys or values that start at `source` are not those of a cache write."""
        queue: list[tuple[fx.Node, Reason | None]] = [(source, None)]
        visited: set[fx.Node] = set()
        while queue:
            node, passed = queue.pop(0)
            if node in visited:
                continue
            visited.add(node)
            if node in self.evidence:
                if passed is not None:
                    return Problem(passed, f"{source} is computed from {node}")
                return self.evidence[node] or Problem(Reason.UNKNOWN_MOVEMENT, f"{source} after {node}")
            if node in self.readers:
                continue
            if node.target in _LINEAR:
                passed = Reason.LINEAR_AFTER_CACHE
            elif not moves(node):
                passed = passed or Reason.COMPUTE_AFTER_CACHE
            queue += [(n, passed) for n in node.all_input_nodes]
        if source.op == "placeholder":
            return Problem(Reason.READ_ONLY_CACHE, source.name)
        return Problem(Reason.NO_CACHE, f"from {source}")

    def _join(self, core: AttentionCore, key: _Operand | Problem, value: _Operand | Problem) -> Site | Problem:
        if isinstance(key, Problem) or isinstance(value, Problem):
            return _worse(key, value)
        k, v = key.write, value.write
        if k.cache is v.cache:
            return Problem(Reason.SAME_TENSOR, k.cache.name)
        for write in (k, v):
            if write.is_ragged:
                return Problem(Reason.RAGGED, f"{write.buffer} at {write.positions}")
        for cache in (k.cache, v.cache):
            if any(others != (k.cache, v.cache) for others in self.read_by[cache].values()):
                names = ", ".join(n.name for n in self.read_by[cache])
                return Problem(Reason.SHARED_CACHE, f"{cache} is read with other caches: {names}")
        for side in (key, value):
            if dtype(side.write.cache) not in FLOATS:
                return Problem(Reason.DTYPE, f"{side.write.cache} is {dtype(side.write.cache)}")
            source = side.walk.axes.dtypes[0]
            if not side.own and any(t not in (source, torch.float32) for t in side.walk.axes.dtypes):
                return Problem(Reason.DTYPE, f"{source} read as {side.walk.axes.dtypes[-1]}")
        _agree(k, v)
        if key.own != value.own or not _same_places(k, v):
            return Problem(Reason.POSITIONS_DIFFER, f"{k.form} into {k.cache}, {v.form} into {v.cache}")
        key_dims, value_dims = _layout(key), _layout(value)
        if isinstance(key_dims, Problem) or isinstance(value_dims, Problem):
            return _worse(key_dims, value_dims)
        problem = _sizes(core, (k, key_dims), (v, value_dims))
        groups = _groups(core, key, key_dims[1])
        read = _read(key, value, (key_dims[2], value_dims[2]))
        for result in (problem, groups, read):
            if isinstance(result, Problem):
                return result
        assert isinstance(groups, int)
        assert not isinstance(read, Problem)
        if key.walk.factor != 1:
            scale = shape(core.query)[-1] ** -0.5 if core.scale is None else core.scale
            core = replace(core, scale=scale * key.walk.factor)
        return Site(core, k, v, read, key_dims, value_dims, groups)

    def _share(self, group: Sequence[Site | Problem]) -> Problem | None:
        """What keeps all attentions over one cache from being rewritten together."""
        sites = [site for site in group if isinstance(site, Site)]
        for other in group:
            if isinstance(other, Problem):
                return Problem(Reason.SHARED_CACHE, f"{sites[0].key.cache}: another attention stays: {other.detail}")
        dims = [(site.key_dims, site.value_dims) for site in sites]
        if any(x != dims[0] for x in dims):
            return Problem(Reason.SHARED_CACHE, f"{sites[0].key.cache}: {dims}")
        if len({site.read.after_write for site in sites if site.read is not None}) > 1:
            return Problem(Reason.SHARED_CACHE, f"{sites[0].key.cache} is read before and after the write")
        return self._in_turn(sites) or self._escape(sites)

    def _in_turn(self, sites: Sequence[Site]) -> Problem | None:
        """What keeps the attentions over a cache that is written several times from following its writes."""
        key, value = sites[0].key.cache, sites[0].value.cache
        if key not in self.turns and value not in self.turns:
            return None
        turns = list(zip(self.turns.get(key, ()), self.turns.get(value, ()), strict=False))
        reading = [[site for site in sites if site.key is k and site.value is v] for k, v in turns]
        if len(turns) != len(self.turns.get(key, ())) or len(turns) != len(self.turns.get(value, ())):
            return Problem(Reason.POSITIONS_DIFFER, f"{key} and {value} are written another number of times")
        if not all(reading) or sum(map(len, reading)) != len(sites):
            return Problem(Reason.TWO_WRITES, f"of {key} and {value}")
        for before, after in itertools.pairwise(reading):
            if max(site.ready for site in before) >= min(site.ready for site in after):
                return Problem(Reason.READ_BEFORE_WRITE, f"{key} is written again before {before[-1].core.node}")
        return None

    def _escape(self, sites: Sequence[Site]) -> Problem | None:
        """What still needs a cache tensor once the sites over it are rewritten."""
        sides = list({(side.cache, side.value): side for site in sites for side in (site.key, site.value)}.values())
        held = {node for w in sides for node in ((w.seen, w.value) if w.born else (w.buffer,))}
        held -= {w.seen for w in sides if w.form == "replace"}  # the new tokens
        kept: list[object] = []
        for write in sides if sides[0].writes else ():
            kept += [write.new, write.positions, write.start, write.kept, write.offset]
        rewritten: set[fx.Node] = set()
        for site in sites:
            if site.read is not None:
                rewritten.add(site.core.node)
                kept += [site.core.query, site.core.mask, site.core.sink, site.read.first]
        for node, user in self._needed(held, {write.cache for write in sides}, kept, rewritten):
            return Problem(Reason.CACHE_VALUE_ESCAPES, f"{node} is still needed by {user}")
        return None

    def _needed(
        self, held: Container[fx.Node], ours: Container[fx.Node], kept: Iterable[object], rewritten: Container[fx.Node]
    ) -> Iterator[tuple[fx.Node, fx.Node]]:
        """The nodes of `held` that the graph still needs, each with a user, without the writes of the caches `ours`.

        Args:
            held: nodes that hold a cache.
            ours: caches whose values nobody takes.
            kept: what is needed besides the graph's results.
            rewritten: nodes whose operands are not needed.
        """
        roots = [*self.outputs, *(value for value, buffer in self.mutations if buffer not in ours)]
        roots = [n for n in roots if n not in ours] + self.impure
        todo = [(n, n) for n in [*roots, *(n for n in kept if isinstance(n, fx.Node))]]
        visited: set[fx.Node] = set()
        while todo:
            node, user = todo.pop()
            if node in held:
                yield node, user
            if node in visited or node.target is aten.sym_size.int:
                continue
            visited.add(node)
            if node not in rewritten:
                todo += [(n, node) for n in node.all_input_nodes]


def _worse(key: object, value: object) -> Problem:
    """The reason to report of two sides of which one at least is a problem."""
    problems = [p for p in (key, value) if isinstance(p, Problem)]
    mild = (Reason.NO_CACHE, Reason.READ_ONLY_CACHE)
    for problem in problems:
        if problem.reason not in mild:
            return problem
    if len(problems) == 1:
        cached = value if problems[0] is key else key
        assert isinstance(cached, _Operand)
        return Problem(Reason.ONLY_ONE_CACHED, f"{cached.write.cache}; the other {problems[0].detail}")
    return problems[0]


def _dims(write: CacheWrite) -> Dims | None:
    """Which dims of a cache are batch, head, slot and channel, by its write and by custom; None if it cannot be held.

    Batches stand outside of heads, and channels inside of all but slots. With three dims there are no heads; with five,
    one of size 2 that is not the channels' makes two sequences of one, or two heads of one. Where that is wrong, the
    cache is stored less well, and read as well. A single channel would take more memory packed: it is a scale.
    """
    cache, slot, sizes = write.cache, write.slot_dim, shape(write.cache)
    if not 3 <= len(sizes) <= 5 or dtype(cache) not in FLOATS:
        return None
    *others, channel = (d for d in range(len(sizes)) if d != slot)
    batch: Group = others[0]
    head: Group = tuple(others[1:])
    if len(others) == 3:
        pair = next((d for d in others if isinstance(sizes[d], int) and sizes[d] == 2), None)
        if pair is None or write.returned or write.partial is not None:
            return None
        first, last = (d for d in others if d != pair)
        batch, head = ((pair, first), last) if pair == 0 else (first, (pair, last))
    elif len(others) == 2:
        head = others[1]
    if write.partial not in (None, batch) or not isinstance(sizes[channel], int) or sizes[channel] == 1:
        return None
    return batch, head, slot, channel


def _expanded(site: RebuiltSite, read: Container[fx.Node]) -> RebuiltSite:
    """A site with its expansion, if it has one, and needs one; `read` as of `_expand`."""
    core, writes = site.reject.core, [cache.write for cache in site.caches]
    if core is None or core.node not in read or not blocks.is_long(core) or not _is_even(core):
        return site
    if not all(map(_is_readable, writes)):
        return site
    return replace(site, expansion=blocks.expansion(core, {write.seen: write.slot_dim for write in writes}))


def _is_readable(write: CacheWrite) -> bool:
    """Whether what an attention sees of a cache is its slots before the write and the new tokens in their places."""
    if write.born or write.partial is not None or write.is_ragged or write.form in ("roll", "append", "replace"):
        return False
    return write.form != "cat" or write.kept != 0


def _is_even(core: AttentionCore) -> bool:
    """Whether queries, keys and values are of one batch, and their heads pair off or repeat a number of times."""
    query, key, value = shape(core.query), shape(core.key), shape(core.value)
    same = [(query[0], key[0]), (key[0], value[0]), (key[1], value[1]), (key[2], value[2]), (query[3], key[3])]
    if not all(known(a == b) for a, b in same):
        return False
    heads, own = query[1], key[1]
    repeats = core.enable_gqa and isinstance(heads, int) and isinstance(own, int) and heads % own == 0
    return repeats or known(heads == own)


def _agree(k: CacheWrite, v: CacheWrite) -> None:
    """Guard that keys and values that grow were, and become, of one length, where their shapes do not tell."""
    if k.form == v.form == "cat" and k.kept is not None and v.kept is not None:
        for a, b in ((size_of(k.kept), size_of(v.kept)), (shape(k.new)[k.slot_dim], shape(v.new)[v.slot_dim])):
            guarded(a == b)


def _same_places(k: CacheWrite, v: CacheWrite) -> bool:
    places = [(w.positions, w.start, w.kept, w.offset, w.partial is None) for w in (k, v)]
    same = k.form == v.form and k.returned == v.returned and k.born == v.born
    return same and all(same_value(a, b) for a, b in zip(*places, strict=True))


def _layout(side: _Operand) -> tuple[int, int, int, int] | Problem:
    """Which dim of the cache each dim of the attention's operand is."""
    buffer, slot, axes, taken = side.write.cache, side.write.slot_dim, side.walk.axes, shape(side.walk.source)
    if len(taken) != 4 or len(axes.dims) != 4:
        return Problem(Reason.LAYOUT, f"{buffer} has {len(taken)} dims")
    roles: list[int | None] = []
    for axis, atoms in enumerate(axes.dims):
        sources = [a for a in atoms if isinstance(a, int)]
        if axis == 1 and len(sources) == 1 and atoms[-1] == sources[0] and len(atoms) > 1:
            return Problem(Reason.HEAD_ORDER, f"{buffer} is repeated as a whole")
        if len(sources) > 1 or (axis != 1 and len(atoms) > len(sources)) or atoms[: len(sources)] != tuple(sources):
            return Problem(Reason.LAYOUT, f"dim {axis} of the attention's operand is {atoms} of {buffer}")
        roles.append(sources[0] if sources else None)
    # Dims of size 1 leave no trace. Which is which makes no difference, but the slots are where the write puts them.
    left = [d for d in range(4) if d not in roles]
    if roles[2] is None and slot in left:
        left.remove(slot)
        roles[2] = slot
    batch, head, keys, channel = (left.pop(0) if role is None else role for role in roles)
    if keys != slot:
        return Problem(Reason.LAYOUT, f"tokens are placed along dim {slot} of {buffer}, the keys are its dim {keys}")
    write = side.write
    for dim in (batch, head, channel):
        written = shape(write.new)[dim] if dim == write.partial and not side.own else taken[dim]
        if axes.spans[dim].first != 0 or not known(axes.spans[dim].length == written):
            reason = Reason.PARTIAL_BATCH if dim == batch else Reason.LAYOUT
            return Problem(reason, f"{axes.spans[dim].length} of {taken[dim]} along dim {dim} of {buffer}")
    return batch, head, keys, channel


def _sizes(core: AttentionCore, *sides: tuple[CacheWrite, tuple[int, int, int, int]]) -> Problem | None:
    """What keeps queries, new tokens and caches from being of one size.

    Args:
        core: the attention.
        sides: how the caches of keys and values are written, each with its dims.
    """
    pairs: list[tuple[str, Size, Size]] = []
    roles: list[list[Size]] = []
    for write, dims in sides:
        batch, _, slot, channel = dims
        if write.partial not in (None, batch):
            return Problem(Reason.PARTIAL_BATCH, f"{write.buffer} is written along a part of dim {write.partial}")
        if not isinstance(shape(write.cache)[channel], int):
            return Problem(Reason.UNDECIDED_SIZE, f"the channels of {write.cache} are not constant")
        mine = write.cache if write.partial is None else write.new
        pairs.append(("batch", shape(core.query)[0], shape(mine)[batch]))
        slots = 0 if write.grows else shape(write.cache)[slot]
        roles.append([*(shape(write.cache)[d] for d in dims[:2]), slots, shape(write.new)[slot]])
    names = ("caches", "heads", "slots", *(("new tokens",) if sides[0][0].writes else ()))
    pairs += zip(names, *roles, strict=False)
    for what, a, b in pairs:
        if not known(a == b):
            decided = isinstance(a, int) and isinstance(b, int)
            return Problem(Reason.LAYOUT if decided else Reason.UNDECIDED_SIZE, f"{what}: {a} and {b}")
    return None


def _groups(core: AttentionCore, key: _Operand, head: int) -> int | Problem:
    """Query heads for each key-value head."""
    queries, keys, values = shape(core.query)[1], shape(core.key)[1], shape(core.value)[1]
    heads = shape(key.write.cache)[head]
    if not known(keys == values) or not (core.enable_gqa or known(keys == queries) or known(keys == 1)):
        return Problem(Reason.LAYOUT, f"{queries} query heads, {keys} key heads, {values} value heads")
    if isinstance(queries, int) and isinstance(heads, int):
        groups: Size = queries // heads
    else:
        groups = reduce(operator.mul, [a.factor for a in key.walk.axes.dims[1] if isinstance(a, Repeat)], 1)
    if not isinstance(groups, int) or not known(heads * groups == queries):
        return Problem(Reason.UNDECIDED_SIZE, f"{queries} query heads over {heads} key-value heads")
    return groups


def _read(key: _Operand, value: _Operand, slots: tuple[int, int]) -> CacheRead | Problem | None:
    if key.own:
        return None
    spans = [side.walk.axes.spans[slot] for side, slot in zip((key, value), slots, strict=True)]
    if key.write.form in ("append", "cat"):
        sizes = [shape(side.walk.source)[slot] for side, slot in zip((key, value), slots, strict=True)]
        if all(known(s.length == size) for s, size in zip(spans, sizes, strict=True)):
            return CacheRead(key.write.offset, after_write=False)
        tail = key.write.form == "cat" and same_value(spans[0].first, spans[1].first)
        # Of old slots only: all new ones are seen.
        if not tail or not all(
            known(size_of(s.first) + s.length == size) and known(s.length >= shape(side.write.new)[slot])
            for s, size, side, slot in zip(spans, sizes, (key, value), slots, strict=True)
        ):
            return Problem(Reason.UNKNOWN_MOVEMENT, f"a slice of {key.walk.source}")
        return CacheRead(spans[0].first, after_write=False)
    if not same_value(spans[0].first, spans[1].first):
        return Problem(
            Reason.POSITIONS_DIFFER, f"keys are read from slot {spans[0].first}, values from {spans[1].first}"
        )
    return CacheRead(spans[0].first, after_write=True)
