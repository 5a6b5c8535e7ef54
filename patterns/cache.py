"""Cache writes: one rule for each way in which a graph puts new tokens into a cache tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from decoquant_compile.patterns.movement import (
    REGROUPING,
    constant,
    is_identity,
    moves,
    operand,
    peel,
    plain,
    regrouped,
    same_or_refused,
    sliced,
    start_of,
)
from decoquant_compile.patterns.reject import Problem, Reason
from decoquant_compile.patterns.symbols import (
    Int,
    Size,
    argument,
    as_int,
    computed,
    dtype,
    guarded,
    known,
    number,
    same_shape,
    same_value,
    shape,
    size_of,
)

aten = torch.ops.aten

__all__ = ["CacheWrite", "Int", "is_birth", "parse", "parse_returned", "parse_returned_turns", "parse_turns"]

_BIRTHS = {
    *(aten.zeros, aten.zeros_like, aten.new_zeros, aten.empty, aten.empty_like, aten.new_empty),
    *(aten.full, aten.full_like, aten.new_full, aten.ones, aten.ones_like, aten.new_ones),
}


def is_birth(node: fx.Node) -> bool:
    """Whether a node is a new tensor, of one value or of none."""
    return getattr(node.target, "overloadpacket", None) in _BIRTHS


@dataclass(frozen=True)
class CacheWrite:
    """New tokens placed in one cache tensor.

    Attributes:
        form: "index_copy", "index_put", "scatter", "where", "slice", "roll", "append", "replace" or "cat"; "read" where
            the graph only reads the cache: there are no new tokens, and `value` and `new` are the buffer.
        buffer: the cache tensor, a graph input; of a cache that the graph creates, what it is created from.
        value: the tensor after the write, which the graph copies into `buffer` or, if `returned`, gives its caller; of
            several writes in turn, what this one makes.
        new: the tokens written, dims in the buffer's order; sizes are those of the buffer but for `slot_dim`; where its
            dtype differs, the write casts. With "append" and "replace" it may be longer than what stays.
        slot_dim: dim of the buffer along which tokens are placed.
        positions: int64 [tokens], the slot of each new token (index forms); [batch, tokens] where each sequence has its
            own.
        start: slot of the first new token; the others follow (slice form).
        kept: tail forms: slots [0, kept) held tokens, and the cache becomes the last slots of `cat(cache[:kept], new)`.
            With "roll" what is seen is the cache after the write; "replace" keeps none; with "cat" the buffer
            has so many slots, and the value all of them and the new ones, or the last slots of that.
        wraps: a negative position counts from the end (index_put).
        seen: the node that an attention over the cache starts from: the tensor after the write; "append": old tokens
            followed by all the new ones; "replace": the new tokens.
        offset: "append": the slot, before the write, that stands first in `seen`.
        returned: the value is a tensor of its own, and the buffer stays what it is.
        result: of several writes in turn to a cache that is returned, the value of the last one.
        partial: dim along which only the first sequences are written, as many as `new` has; None writes all.
        is_stretch: with "read": the buffer is a handle of a growing cache.
    """

    form: str
    buffer: fx.Node
    value: fx.Node
    new: fx.Node
    slot_dim: int
    seen: fx.Node
    positions: fx.Node | None = None
    start: Int | None = None
    kept: Int | None = None
    wraps: bool = False
    offset: Int = 0
    returned: bool = False
    result: fx.Node | None = None
    partial: int | None = None
    is_stretch: bool = False

    @property
    def cache(self) -> fx.Node:
        """The node that stands for the cache: the input that is written, or what is returned."""
        return self.result or self.value if self.returned else self.buffer

    @property
    def born(self) -> bool:
        """Whether the graph creates the cache."""
        return self.buffer.op != "placeholder"

    @property
    def grows(self) -> bool:
        """Whether the tensor shows a part of a state with room for more."""
        return self.form == "cat" or self.is_stretch

    @property
    def is_ragged(self) -> bool:
        """Whether each sequence has positions of its own."""
        return self.positions is not None and len(shape(self.positions)) == 2

    @property
    def writes(self) -> bool:
        """Whether there is anything to store."""
        return self.form != "read"


def parse(buffer: fx.Node, value: fx.Node) -> CacheWrite | Problem:
    """Read what a graph writes into one of its inputs.

    Args:
        buffer: the input.
        value: the tensor that it becomes.
    """
    seen = plain(value)
    rule = (FORMS | _BLENDS).get(seen.target)
    if rule is None:
        return Problem(Reason.UNKNOWN_WRITE, f"by {seen.target if seen.op == 'call_function' else seen.op}")
    return rule(buffer, value, seen)


def parse_turns(buffer: fx.Node, value: fx.Node) -> list[CacheWrite] | Problem:
    """Read what a graph writes into one of its inputs in several turns, each into what the turn before made.

    Args:
        buffer: the input.
        value: the tensor that it becomes.

    Returns:
        The writes in their order.
    """
    turns: list[fx.Node] = []
    node = plain(value)
    while node is not buffer:
        if node.target not in _IN_TURNS:
            return Problem(Reason.UNKNOWN_WRITE, f"into {node}, not into {buffer}")
        turns.append(node)
        node = plain(node.all_input_nodes[0])
    before, writes = buffer, list[CacheWrite]()
    for turn in reversed(turns):
        write = _IN_TURNS[turn.target](before, turn, turn)
        if isinstance(write, Problem):
            return write
        if write.partial is not None or write.is_ragged or write.kept is not None:
            return Problem(Reason.TWO_WRITES, f"{write.form} of {write.new}")
        writes.append(replace(write, buffer=buffer))
        before = turn
    return writes


def parse_returned_turns(value: fx.Node) -> list[CacheWrite] | None:
    """Read how a graph appends to one of its inputs in several turns and returns the result; None for anything else.

    Args:
        value: a tensor that the graph returns.

    Returns:
        The writes in their order.
    """
    turns: list[fx.Node] = []
    node = plain(value)
    while node.target is aten.cat.default and len(argument(node, "tensors")) == 2:
        turns.insert(0, node)
        node = plain(argument(node, "tensors")[0])
    if node.op != "placeholder" or len(turns) < 2:
        return None
    writes: list[CacheWrite] = []
    for turn in turns:
        old, new = argument(turn, "tensors")
        dim = argument(turn, "dim") % len(shape(turn))
        with value.graph.inserting_before(turn):
            kept = number(value.graph, shape(old)[dim])
        if kept is None or not dtype(old) == dtype(new) == dtype(node) or (writes and writes[0].slot_dim != dim):
            return None
        writes.append(CacheWrite("cat", node, turn, new, dim, turn, kept=kept, returned=True, result=value))
    return writes


def parse_returned(value: fx.Node) -> CacheWrite | Problem | None:
    """Read how a graph makes a cache that it returns; None for what is no cache by its form.

    Args:
        value: a tensor that the graph returns.
    """
    seen = plain(value)
    if seen.target is aten.slice.Tensor and (base := _overwritten(value)) is not None:
        return _as_returned(_tail(base, value, seen))
    if seen.target is aten.slice.Tensor and plain(operand(seen)).target is aten.cat.default:
        return _grown_tail(value, seen)
    if seen.target is aten.cat.default:
        return _grown(value, seen)
    if seen.target in REGROUPING and operand(seen).target is aten.cat.default:
        return _grown_regrouped(value, seen)
    rule = _COPYING.get(seen.target)
    if rule is None:
        return None
    old = seen.args[_BASE.get(seen.target, 0)]
    assert isinstance(old, fx.Node)
    base = plain(old)
    if base.op != "placeholder":
        if not is_birth(base):
            return None
        if not _is_zero(base):
            return Problem(Reason.CACHE_BORN_INSIDE, f"{base.name} is not zero")
    return _as_returned(rule(base, value, seen))


def _as_returned(write: CacheWrite | Problem) -> CacheWrite | Problem:
    return write if isinstance(write, Problem) else replace(write, returned=True)


def _overwritten(value: fx.Node) -> fx.Node | None:
    """The new tensor of zeros whose elements are all replaced by those of `value`; None if it is no such copy."""
    node = value
    while moves(node) and same_shape(shape(node), shape(operand(node))):
        if node.target is aten.copy.default:
            assert isinstance(node.args[0], fx.Node)
            base = plain(node.args[0])
            return base if is_birth(base) and _is_zero(base) else None
        node = operand(node)
    return None


def _grown(value: fx.Node, seen: fx.Node) -> CacheWrite | Problem | None:
    """Old tokens followed by new ones: a tensor that is longer than the one before."""
    parts, dim = argument(seen, "tensors"), argument(seen, "dim") % len(shape(seen))
    old, new = plain(parts[0]), parts[-1]
    if len(parts) != 2 or (old.op != "placeholder" and (0 not in shape(old) or not _is_constant(old))):
        if any(peel(part).source.op == "placeholder" for part in parts):
            return Problem(Reason.GROWING_CACHE, f"{seen.name} of {', '.join(map(str, parts))}")
        return None
    kept = 0 if 0 in shape(old) else as_int(shape(old)[dim], value.graph)
    if kept is None:
        return _no_input(shape(old)[dim], old)
    if dtype(new) != dtype(seen) or (old.op == "placeholder" and dtype(old) != dtype(seen)):
        return Problem(Reason.DTYPE, f"{dtype(old)} and {dtype(new)} concatenated")
    return CacheWrite("cat", old, value, new, dim, seen, kept=kept, returned=True)


def _grown_regrouped(value: fx.Node, seen: fx.Node) -> CacheWrite | None:
    """The same among tensors of other dims, as where sequences and heads are one while keys are concatenated."""
    whole = operand(seen)
    parts, dim = argument(whole, "tensors"), argument(whole, "dim") % len(shape(whole))
    slot = regrouped(whole, dim, seen)
    if len(parts) != 2 or parts[0].target not in REGROUPING or slot is None:
        return None
    old, new, sizes = plain(operand(parts[0])), parts[1], list(shape(seen))
    before = [*sizes[:slot], shape(parts[0])[dim], *sizes[slot + 1 :]]
    if old.op != "placeholder" or not same_shape(shape(old), tuple(before)) or dtype(old) != dtype(new):
        return None
    kept, tokens = (as_int(shape(part)[dim], value.graph) for part in parts)
    if kept is None or tokens is None or not all(isinstance(n, int) for d, n in enumerate(sizes) if d != slot):
        return None
    with value.graph.inserting_after(_last(new, tokens)):
        arranged = computed(value.graph, aten.reshape.default, new, [*sizes[:slot], tokens, *sizes[slot + 1 :]])
    return CacheWrite("cat", old, value, arranged, slot, seen, kept=kept, returned=True)


def _grown_tail(value: fx.Node, seen: fx.Node) -> CacheWrite | Problem | None:
    """The last slots of `_grown`: a sliding window."""
    whole, dim, start = plain(operand(seen)), argument(seen, "dim") % len(shape(seen)), argument(seen, "start")
    write = _grown(value, whole)
    if not isinstance(write, CacheWrite):
        return write
    size, length, first = shape(whole)[dim], shape(seen)[dim], size_of(start or 0)
    to_end = known(first == -length) or known(first + length == size) or known(length == size)
    if write.slot_dim != dim or argument(seen, "step") != 1 or not to_end:
        return Problem(Reason.UNKNOWN_WRITE, f"{seen.name} returned, which is not the tail of {whole}")
    return write


def _is_constant(node: fx.Node) -> bool:
    """Whether a node is made of constants of the graph alone."""
    return node.op == "get_attr" or (
        node.op == "call_function" and not node.is_impure() and all(map(_is_constant, node.all_input_nodes))
    )


def _is_zero(birth: fx.Node) -> bool:
    """Whether a new tensor holds zeros, or nothing that anybody may rely on."""
    name = str(getattr(birth.target, "overloadpacket", birth.target)).rpartition(".")[2]
    if "full" in name:
        return bool(argument(birth, "fill_value") == 0)
    return "zeros" in name or "empty" in name


def _index_copy(buffer: fx.Node, value: fx.Node, seen: fx.Node) -> CacheWrite | Problem:
    positions = argument(seen, "index")
    if (problem := _base_problem(buffer, seen.args[0]) or _positions_problem(positions)) is not None:
        return problem
    write = CacheWrite("index_copy", buffer, value, argument(seen, "source"), argument(seen, "dim"), seen, positions)
    return _placed(write, shape(positions)[0])


def _index_put(buffer: fx.Node, value: fx.Node, seen: fx.Node) -> CacheWrite | Problem:
    base = plain(argument(seen, "self"))
    given = [(dim, index) for dim, index in enumerate(argument(seen, "indices")) if index is not None]
    if len(given) == 2 and not argument(seen, "accumulate"):
        return _by_sequence(buffer, value, seen, base, given)
    if len(given) != 1 or argument(seen, "accumulate"):
        return Problem(Reason.UNKNOWN_WRITE, f"index_put by {len(given)} indices, or accumulating")
    dim, positions = given[0]
    if (problem := _positions_problem(positions)) is not None:
        return problem
    if base.target is aten.roll.default:
        return _roll(buffer, value, seen, base, dim, positions)
    if (problem := _base_problem(buffer, base)) is not None:
        return problem
    write = CacheWrite("index_put", buffer, value, argument(seen, "values"), dim, seen, positions, wraps=True)
    return _placed(write, shape(positions)[0])


def _by_sequence(
    buffer: fx.Node, value: fx.Node, seen: fx.Node, base: fx.Node, given: Sequence[tuple[int, fx.Node]]
) -> CacheWrite | Problem:
    """Each sequence at positions of its own: `cache[arange(batch)[:, None], :, positions]`."""
    batch = _outermost(slot_dim := next((dim for dim, index in given if not _counts(index)), 0))
    indices, sizes = dict(given), shape(buffer)
    if (problem := _base_problem(buffer, base)) is not None:
        return problem
    if batch not in indices or len(sizes) not in (3, 4) or dtype(indices[slot_dim]) != torch.int64:
        return Problem(Reason.UNKNOWN_WRITE, f"index_put by {' and '.join(str(i) for _, i in given)}")
    positions, counted = indices[slot_dim], peel(indices[batch])
    places, rank = shape(positions), len(shape(positions))
    block = (*places, *(n for d, n in enumerate(sizes) if d not in indices))  # what is indexed comes first
    new = argument(seen, "values")
    missing = len(block) - len(shape(new))  # an assignment drops leading dims of size 1
    if (
        rank not in (1, 2)
        or _arange(counted.source) is None
        or not same_shape(shape(indices[batch]), (sizes[batch], 1)[:rank])
        or not known(places[0] == sizes[batch])
        or not is_identity(counted)
        or missing < 0
        or not same_shape(block[:missing], (1,) * missing)
        or not _fills(shape(new), block[missing:])
    ):
        return Problem(Reason.UNKNOWN_WRITE, f"index_put of {list(block)} by {indices[batch]} and {positions}")
    for _ in range(missing):
        with buffer.graph.inserting_after(new):
            new = computed(buffer.graph, aten.unsqueeze.default, new, 0)
    if rank == 1:
        with buffer.graph.inserting_after(new):
            new = computed(buffer.graph, aten.unsqueeze.default, new, 1)
        with buffer.graph.inserting_after(positions):
            positions = computed(buffer.graph, aten.unsqueeze.default, positions, 1)
    kept = iter(range(2, len(sizes)))
    order = [0 if d == batch else 1 if d == slot_dim else next(kept) for d in range(len(sizes))]
    with buffer.graph.inserting_after(_last(new, positions)):
        new = computed(buffer.graph, aten.permute.default, new, order)
    return CacheWrite("index_put", buffer, value, new, slot_dim, seen, positions, wraps=True)


def _fills(sizes: tuple[Size, ...], block: tuple[Size, ...]) -> bool:
    """Whether values of such sizes fill what is indexed, one for each element, or PyTorch refuses them."""
    return len(sizes) == len(block) and all(map(same_or_refused, sizes, block))


def _counts(index: fx.Node) -> bool:
    """Whether an index is `arange`, moved."""
    return _arange(peel(index).source) is not None


def _outermost(slot_dim: int) -> int:
    """The dim of the sequences, which stand outside of heads."""
    return 1 if slot_dim == 0 else 0


def _roll(
    buffer: fx.Node, value: fx.Node, seen: fx.Node, roll: fx.Node, dim: int, positions: fx.Node
) -> CacheWrite | Problem:
    """All tokens one slot down, the new one last."""
    if (problem := _base_problem(buffer, roll.args[0])) is not None:
        return problem
    rank, size = len(shape(buffer)), shape(buffer)[dim]
    shifts, dims, put = argument(roll, "shifts"), argument(roll, "dims"), _constant(positions)
    at_end = put is not None and (put == [-1] or (len(put) == 1 and known(put[0] == size - 1)))
    if list(shifts) != [-1] or [d % rank for d in dims] != [dim] or not at_end:
        return Problem(Reason.UNKNOWN_WRITE, f"roll by {shifts} along {dims}, then index_put at {put or positions}")
    kept = as_int(size, buffer.graph)
    if kept is None:
        return _no_input(size, buffer)
    return _placed(CacheWrite("roll", buffer, value, argument(seen, "values"), dim, seen, kept=kept), 1)


def _slice_scatter(buffer: fx.Node, value: fx.Node, seen: fx.Node) -> CacheWrite | Problem:
    dim, part, span = argument(seen, "dim") % len(shape(seen)), plain(argument(seen, "src")), sliced(seen)
    if (shifted := _shifted(buffer, value, seen, dim)) is not None:
        return shifted
    if (problem := _base_problem(buffer, seen.args[0])) is not None:
        return problem
    if part.target in FORMS and peel(part.all_input_nodes[0]).source is buffer:
        return _partial(buffer, value, seen, part, dim)
    if span is None:
        return Problem(Reason.UNKNOWN_WRITE, f"slice from {argument(seen, 'start')} by {argument(seen, 'step')}")
    write = CacheWrite("slice", buffer, value, argument(seen, "src"), dim, seen, start=span.first)
    return _placed(write, span.length)


def _shifted(buffer: fx.Node, value: fx.Node, seen: fx.Node, dim: int) -> CacheWrite | Problem | None:
    """All tokens some slots down, in place, then as many new ones at the end, or more; None if it is no such thing."""
    base, size, tokens = plain(argument(seen, "self")), shape(buffer)[dim], shape(argument(seen, "src"))[dim]
    if base.target is not aten.slice_scatter.default or plain(argument(base, "self")) is not buffer:
        return None
    moved, front = plain(argument(base, "src")), sliced(base)
    if moved.target is not aten.slice.Tensor or plain(operand(moved)) is not buffer:
        return None
    taken = sliced(moved)
    if front is None or taken is None:
        return None
    shift = size_of(taken.first)
    kept = as_int(size + shift - tokens, buffer.graph)
    if kept is None or not guarded(shift <= tokens):
        return None
    places = [argument(node, "dim") % len(shape(node)) == dim for node in (base, moved)]
    start = size_of(argument(seen, "start") or 0)
    at_end = argument(seen, "step") == 1 and (known(start == -tokens) or known(start == size - tokens))
    fits = [known(size_of(front.first) == 0), *(known(s.length == size - shift) for s in (front, taken))]
    if not all(places) or not all(fits) or not at_end:
        return None
    return _placed(CacheWrite("roll", buffer, value, argument(seen, "src"), dim, seen, kept=kept), tokens)


def _partial(buffer: fx.Node, value: fx.Node, seen: fx.Node, part: fx.Node, dim: int) -> CacheWrite | Problem:
    """A write into the first sequences of a cache, which are put back."""
    base, span = plain(part.all_input_nodes[0]), sliced(seen)
    problem = Problem(Reason.PARTIAL_BATCH if dim == 0 else Reason.UNKNOWN_WRITE, f"a write into a slice of dim {dim}")
    if base.target is not aten.slice.Tensor or plain(operand(base)) is not buffer:
        return problem
    if span is None or span.first != 0 or sliced(base) != span or argument(base, "dim") % len(shape(base)) != dim:
        return problem
    write = FORMS[part.target](base, value, part)
    if isinstance(write, Problem):
        return write
    if dim != _outermost(write.slot_dim) or write.kept is not None or write.partial is not None or write.is_ragged:
        return problem
    return replace(write, buffer=buffer, seen=seen, partial=dim)


def _scatter(buffer: fx.Node, value: fx.Node, seen: fx.Node) -> CacheWrite | Problem:
    """Elements at indices that are the same for all heads and channels, and for all sequences or not."""
    dim, index, source = argument(seen, "dim") % len(shape(seen)), argument(seen, "index"), argument(seen, "src")
    if (problem := _base_problem(buffer, seen.args[0])) is not None:
        return problem
    walk = peel(index)
    batch = _outermost(dim)
    for positions in (*reversed(walk.nodes), walk.source):
        rank = len(shape(positions))
        if rank not in (1, 2) or dtype(positions) != torch.int64 or (rank == 2 and len(shape(buffer)) not in (3, 4)):
            continue
        tokens = shape(index)[dim]
        if not _fills(shape(positions)[-1:], (tokens,)):
            continue
        block = (*shape(buffer)[:dim], tokens, *shape(buffer)[dim + 1 :])
        dims = peel(index, until={positions}).axes.dims
        of = {dim: (rank - 1, tokens), **({batch: (0, shape(buffer)[batch])} if rank == 2 else {})}
        alone = all(not isinstance(atom, int) for d, atoms in enumerate(dims) if d not in of for atom in atoms)
        along = all(dims[d] == (axis,) or known(size == 1) for d, (axis, size) in of.items())
        if rank == 2 and not known(shape(positions)[0] == shape(buffer)[batch]):
            continue
        new = _first(source, dim, tokens)  # more than there are indices for is not taken
        if alone and along and same_shape(shape(index), block) and same_shape(shape(new), block):
            return _placed(CacheWrite("scatter", buffer, value, new, dim, seen, positions), tokens)
    return Problem(Reason.UNKNOWN_WRITE, f"scatter of {list(shape(source))} by {index}")


def _first(node: fx.Node, dim: int, count: Size) -> fx.Node:
    """So many of the first elements of a tensor along a dim: the tensor itself if it is known to have no more."""
    if known(shape(node)[dim] == count) or (number := as_int(count, node.graph)) is None:
        return node
    with node.graph.inserting_after(_last(node, number)):
        return computed(node.graph, aten.slice.Tensor, node, dim, 0, number)


def _where(buffer: fx.Node, value: fx.Node, seen: fx.Node) -> CacheWrite | Problem:
    """One token where the number of the slot equals its position."""
    condition, new, base = seen.args
    assert isinstance(condition, fx.Node)
    assert isinstance(new, fx.Node)
    if (problem := _base_problem(buffer, base)) is not None:
        return problem
    return _one_hot(buffer, value, seen, condition, new)


def _blend(buffer: fx.Node, value: fx.Node, seen: fx.Node) -> CacheWrite | Problem:
    """The same with numbers: `cache * (1 - one_hot) + one_hot * new`."""
    terms = [plain(term) for term in seen.args[:2] if isinstance(term, fx.Node)]
    products = [
        term.all_input_nodes
        for term in terms
        if term.target is aten.mul.Tensor and len(term.all_input_nodes) == 2 and argument(seen, "alpha") == 1
    ]
    for old, added in zip(products, products[::-1], strict=True):
        if len(products) != 2:
            break
        for (base, rest), (hot, new) in itertools.product((old, old[::-1]), (added, added[::-1])):
            if plain(base) is buffer and _complement(rest, hot):
                walk = peel(hot)
                return _one_hot(buffer, value, seen, _truth(walk.source, walk.nodes), new)
    return Problem(Reason.UNKNOWN_WRITE, f"by a sum, {seen}")


def _complement(node: fx.Node, of: fx.Node) -> bool:
    """Whether a node is 1 minus another."""
    if node.target is aten.rsub.Scalar:
        ones = argument(node, "other") == 1 and argument(node, "alpha") == 1
        return bool(ones) and same_value(node.args[0], of)
    return node.target is aten.sub.Tensor and constant(node.args[0]) == 1 and same_value(node.args[1], of)


def _truth(source: fx.Node, nodes: Sequence[fx.Node]) -> fx.Node:
    """The last boolean node of a walk that ends with numbers."""
    return next((n for n in reversed(nodes) if dtype(n) == torch.bool), source)


def _one_hot(buffer: fx.Node, value: fx.Node, seen: fx.Node, condition: fx.Node, new: fx.Node) -> CacheWrite | Problem:
    """One token, put where `condition` holds: `arange(slots) == position`, broadcast."""
    problem = Problem(Reason.UNKNOWN_WRITE, f"where {condition} holds")
    walk = peel(condition)
    equal, rank = walk.source, len(shape(buffer))
    if equal.target is not aten.eq.Tensor or len(shape(condition)) > rank or dtype(equal) != torch.bool:
        return problem
    for line, position in (equal.args[:2], equal.args[1::-1]):
        if not isinstance(line, fx.Node) or not isinstance(position, fx.Node) or dtype(position) != torch.int64:
            continue
        count = peel(line)
        slots = _arange(count.source)
        if slots is None or not all(known(size == 1) for size in shape(position)):
            continue
        # The one dim of `condition` that is not 1, counted from the last, is that of the slots.
        sizes = shape(condition)
        (dim, *others) = [d for d, size in enumerate(sizes) if not known(size == 1)] or [-1]
        if dim < 0 or others or not known(sizes[dim] == slots) or not is_identity(walk) or not is_identity(count):
            continue
        dim += rank - len(sizes)
        if not known(shape(buffer)[dim] == slots):
            continue
        if (size := as_int(slots, buffer.graph)) is None:
            return _no_input(slots, buffer)
        with buffer.graph.inserting_after(_last(position, size)):
            places = computed(buffer.graph, aten.reshape.default, position, [1])
        with buffer.graph.inserting_after(places):
            beyond = computed(buffer.graph, aten.ge.Scalar, places, size)
        with buffer.graph.inserting_after(beyond):  # nothing is written there: negative places are dropped
            places = computed(buffer.graph, aten.masked_fill.Scalar, places, beyond, -1)
        return _placed(CacheWrite("where", buffer, value, new, dim, seen, places), 1)
    return problem


def _arange(node: fx.Node) -> Size | None:
    """How far a node counts from 0 by 1; None if it does not."""
    plainly = {aten.arange.default, aten.arange.start, aten.arange.start_step}
    if node.target not in plainly or dtype(node) != torch.int64 or len(node.args) > 2:
        return None
    return shape(node)[0] if node.target is aten.arange.default or node.args[0] == 0 else None


def _last(*nodes: Int) -> fx.Node:
    return max(node for node in nodes if isinstance(node, fx.Node))


def _one_slot(buffer: fx.Node, value: fx.Node, seen: fx.Node) -> CacheWrite | Problem:
    """One slot, at an integer."""
    if (pair := _pair(buffer, value, seen)) is not None:
        return pair
    dim, index, source = argument(seen, "dim") % len(shape(seen)), argument(seen, "index"), argument(seen, "src")
    if (problem := _base_problem(buffer, seen.args[0])) is not None:
        return problem
    start = start_of(index, shape(buffer)[dim], 1)
    block = (*shape(buffer)[:dim], *shape(buffer)[dim + 1 :])
    if start is None or not same_shape(shape(source), block):
        return Problem(Reason.UNKNOWN_WRITE, f"at the index {index} of dim {dim}")
    if source.target is aten.copy.default and same_shape(shape(operand(source)), block):
        source = operand(source)  # what `copy` is made from; the write casts
    with buffer.graph.inserting_after(source):
        new = computed(buffer.graph, aten.unsqueeze.default, source, dim)
    return CacheWrite("slice", buffer, value, new, dim, seen, start=start)


def _pair(buffer: fx.Node, value: fx.Node, seen: fx.Node) -> CacheWrite | Problem | None:
    """The same write into both halves of a tensor, as keys and values in one; None if it is no such thing."""
    dim, base = argument(seen, "dim") % len(shape(seen)), plain(argument(seen, "self"))
    if (
        base.target is not seen.target
        or plain(argument(base, "self")) is not buffer
        or not known(shape(seen)[dim] == 2)
    ):
        return None
    halves: dict[int, CacheWrite] = {}
    for node in (base, seen):
        part, index = plain(argument(node, "src")), argument(node, "index")
        if part.target not in FORMS or argument(node, "dim") % len(shape(node)) != dim or index not in (0, 1, -1, -2):
            return None
        before = plain(part.all_input_nodes[0])
        taken = before.target is aten.select.int and plain(operand(before)) in (buffer, base)
        if not taken or (argument(before, "dim") % len(shape(seen)), argument(before, "index") % 2) != (dim, index % 2):
            return None
        half = FORMS[part.target](before, node, part)
        if isinstance(half, Problem):
            return half
        halves[index % 2] = half
    if len(halves) != 2:
        return Problem(Reason.TWO_WRITES, f"{base} before")
    first, second = halves[0], halves[1]
    for half in (first, second):
        if half.kept is not None or half.partial is not None or half.is_ragged:
            return Problem(Reason.UNKNOWN_WRITE, f"{half.form} of {half.new} into a half of {buffer}")
    places = [(half.form, half.slot_dim, half.positions, half.start, dtype(half.new)) for half in (first, second)]
    if not same_value(*places):
        return Problem(Reason.POSITIONS_DIFFER, f"{first.form} into one half of {buffer}, {second.form} into the other")
    with buffer.graph.inserting_after(max(first.new, second.new)):
        new = computed(buffer.graph, aten.stack.default, [first.new, second.new], dim)
    slot_dim = first.slot_dim + (first.slot_dim >= dim)
    return replace(first, buffer=buffer, value=value, new=new, slot_dim=slot_dim, seen=seen)


def _cat(buffer: fx.Node, value: fx.Node, seen: fx.Node) -> CacheWrite | Problem:
    """The cache, or a stretch of it, followed by new tokens; `value` is all of that, or its tail."""
    parts, dim = argument(seen, "tensors"), argument(seen, "dim") % len(shape(seen))
    if len(parts) != 2:
        return Problem(Reason.UNKNOWN_WRITE, f"concatenation of {len(parts)} tensors")
    old, new = plain(parts[0]), parts[1]
    size = shape(buffer)[dim]
    offset: Int = 0
    kept = as_int(size, buffer.graph)
    if old.target is aten.slice.Tensor:
        span, end = sliced(old), argument(old, "end")
        if span is None or argument(old, "dim") % len(shape(old)) != dim:
            return Problem(Reason.UNKNOWN_WRITE, "concatenation with a slice that is not understood")
        offset, last = span.first, size_of(span.first) + span.length
        if not known(last == size):
            # The operator clamps `end`; as a number of slots it serves only if it was not clamped.
            kept = end if end is not None and known(last == size_of(end)) else as_int(last, buffer.graph)
    if (problem := _base_problem(buffer, old.args[0] if old.target is aten.slice.Tensor else old)) is not None:
        return problem
    if kept is None:
        return _no_input(size, buffer)
    return CacheWrite("append", buffer, value, new, dim, seen, kept=kept, offset=offset)


def _tail(buffer: fx.Node, value: fx.Node, seen: fx.Node) -> CacheWrite | Problem:
    """The last slots of something longer."""
    whole, dim, start = operand(seen), argument(seen, "dim") % len(shape(seen)), argument(seen, "start")
    size, length = shape(whole)[dim], shape(seen)[dim]
    first = size_of(start or 0)
    to_end = known(first == -length) or known(first + length == size)
    if argument(seen, "step") != 1 or not to_end or not same_shape(shape(seen), shape(buffer)):
        return Problem(Reason.UNKNOWN_WRITE, f"the whole cache by {seen.name}, which is not the tail of {whole}")
    inner = plain(whole)
    if inner.target is aten.cat.default and buffer in (peel(part).source for part in inner.all_input_nodes):
        return _cat(buffer, value, inner)
    return CacheWrite("replace", buffer, value, whole, dim, whole, kept=0)


def _placed(write: CacheWrite, tokens: Size) -> CacheWrite | Problem:
    """The write with its tokens in the buffer's dims."""
    block = list(shape(write.buffer))
    dim = write.slot_dim % len(block)
    block[dim] = tokens
    new = write.new
    if new.target is aten.copy.default and same_shape(shape(operand(new)), tuple(block)):
        new = operand(new)  # what `copy` is made from; the write casts
    walk = peel(new)
    for node in (*reversed(walk.nodes), walk.source):
        fits = _fills if write.form == "index_put" else same_shape
        if fits(shape(node), tuple(block)) and is_identity(peel(new, until={node})):
            return replace(write, new=plain(node), slot_dim=dim)
    return Problem(Reason.UNKNOWN_WRITE, f"tokens of shape {list(shape(new))} written as {block}")


def _base_problem(buffer: fx.Node, base: object) -> Problem | None:
    """What keeps a write from being the first one into the buffer; None if nothing does."""
    assert isinstance(base, fx.Node)
    base = plain(base)
    if same_value(base, buffer):
        return None
    if base.target in FORMS and buffer in base.all_input_nodes:
        return Problem(Reason.TWO_WRITES, f"{base} before")
    return Problem(Reason.UNKNOWN_WRITE, f"into {base}, not into {buffer}")


def _positions_problem(positions: fx.Node) -> Problem | None:
    if len(shape(positions)) == 1 and dtype(positions) == torch.int64:
        return None
    return Problem(Reason.UNKNOWN_WRITE, f"at positions of {len(shape(positions))} dims, {dtype(positions)}")


def _no_input(size: Size, buffer: fx.Node) -> Problem:
    return Problem(Reason.UNDECIDED_SIZE, f"no graph input carries the size {size} of {buffer}")


def _constant(node: fx.Node) -> list[int] | None:
    """The elements of a constant of the graph."""
    node = plain(node)
    if node.op != "get_attr":
        return None
    tensor = getattr(node.graph.owning_module, str(node.target))
    return list(tensor.tolist())


FORMS: dict[object, Callable[[fx.Node, fx.Node, fx.Node], CacheWrite | Problem]] = {
    aten.index_copy.default: _index_copy,
    aten.index_put.default: _index_put,
    aten.slice_scatter.default: _slice_scatter,
    aten.scatter.src: _scatter,
    aten.select_scatter.default: _one_slot,
    aten.cat.default: _cat,
    aten.slice.Tensor: _tail,
}

_IN_TURNS = {target: rule for target, rule in FORMS.items() if rule not in (_cat, _tail)}
"""Those that may follow each other."""

_BLENDS = {aten.where.self: _where, aten.add.Tensor: _blend}
"""Common in other places: a write only where an input of the graph becomes the result."""

_COPYING: dict[object, Callable[[fx.Node, fx.Node, fx.Node], CacheWrite | Problem]] = {
    **_IN_TURNS,
    aten.where.self: _where,
}
"""Those that make a whole cache: of a tensor of zeros, or of one that stays as it is."""

_BASE: dict[object, int] = {aten.where.self: 2}
"""Which argument the old tokens are, if it is not the first."""
