"""The operators in plain torch, on any device: what every kernel is tested against.

Three operations on a state buffer and its `Format`: `store` writes tokens, `attend` attends to them without rebuilding
the cache, `dequantise` rebuilds it. `Sections` explains the state. Two rules keep every token readable at all times:

- A token is encoded when it is written and *also* copied to the window and, at the start of a sequence, to the sinks.
  Copies take precedence over codes, and losing a copy loses nothing.
- Until the first fit of a sequence there are no parameters to encode with, but every token has a copy. The write that
  would evict a copy which has no code fits first.
"""

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from decoquant_compile.kernels import codec, tiles
from decoquant_compile.kernels.codec import Parameters
from decoquant_compile.kernels.format import (
    COUNT,
    END,
    FITTED,
    NO_EPOCH,
    ORIGIN,
    REFIT_GROWTH,
    SET,
    START,
    TOTAL,
    UNSET,
    Format,
    Sections,
)

_BLOCK_ELEMENTS: Final = 2**19
"""Elements of a float32 temporary over tokens: about a second-level cache."""

_LOGIT_ELEMENTS: Final = 2**24
"""Elements of a float32 temporary over queries and keys."""

_MASKED: Final = -9000.0
"""Additive masks at most this large exclude a token from the statistics: conventions go from -10000 (-9984 in bfloat16)
to -inf, while position biases stay far above it near the diagonal. Attention itself honours a mask exactly."""


def _token_blocks(first: int, last: int, elements_per_token: int) -> Iterator[slice]:
    size = max(1, _BLOCK_ELEMENTS // elements_per_token)
    for start in range(first, last, size):
        yield slice(start, min(last, start + size))


def _finite(x: Tensor) -> Tensor:
    """`x` with nan as zero and infinities as large numbers: an inner product with them must stay finite."""
    large = min(codec.LIMIT, torch.finfo(x.dtype).max)
    return torch.nan_to_num(x, nan=0.0, posinf=large, neginf=-large)


def _parameters(sections: Sections, index: Tensor | int) -> Parameters:
    """Parameter sets by number.

    Args:
        sections: the state.
        index: one number for all rows, or int64 ``[batch, n]``, one for each of n tokens.

    Returns:
        ``[batch, heads, head_dim]``, or ``[batch, heads, n, head_dim]``.
    """
    if isinstance(index, int):
        scale = sections.scales[:, index]
        return Parameters(sections.means[:, index] if sections.means.shape[1] else torch.zeros_like(scale), scale)
    batch = torch.arange(len(index), device=index.device)[:, None]
    scale = sections.scales[batch, index].transpose(1, 2)
    mean = sections.means[batch, index].transpose(1, 2) if sections.means.shape[1] else torch.zeros_like(scale)
    return Parameters(mean, scale)


# ---------------------------------------------------------------------------------------------------------------- store


def _last_writers(targets: Tensor, keep: Tensor, size: int) -> Tensor:
    """Which of the kept tokens is the last to go to its target.

    Args:
        targets: int64 ``[batch, tokens]`` in ``[0, size)`` wherever `keep`.
        keep: bool ``[batch, tokens]``.
        size: number of targets.

    Returns:
        bool ``[batch, tokens]``.
    """
    tokens = targets.shape[1]
    if tokens == 1 or size == 0:
        return keep & (size > 0)
    order = torch.arange(tokens, device=targets.device).expand_as(targets)
    target = torch.where(keep, targets, size)
    owner = torch.full((len(targets), size + 1), -1, device=targets.device)
    owner.scatter_reduce_(1, target, order, "amax")
    return keep & (owner.gather(1, target) == order)


def admitted_columns(mask: Tensor) -> Tensor:
    """Columns that some head and some query admit, bool ``[batch | 1, length]``."""
    admits = mask if mask.dtype == torch.bool else mask > _MASKED
    return admits.flatten(1, 2).any(1)


class _Tokens(NamedTuple):
    """The tokens of one write and what is known about each."""

    values: Tensor
    """Cache dtype ``[batch, heads, tokens, head_dim]``."""
    positions: Tensor
    """int64 ``[tokens]``, absolute."""
    keep: Tensor
    """bool ``[batch, tokens]``: these are stored."""
    nonzero: Tensor
    """bool ``[batch, heads, tokens]``: exact zeros are stored as never written."""
    padding: Tensor
    """bool ``[batch, tokens]``: before the start of the sequence."""
    counted: Tensor
    """bool ``[batch, tokens]``: these enter the statistics."""


def _accumulate(sections: Sections, tokens: _Tokens, query: Tensor | None) -> None:
    """Adds the counted tokens to the running statistics (Chan, Golub and LeVeque's pairwise update)."""
    rows = sections.rows
    heads, count = tokens.values.shape[1:3]
    seen = rows[:, COUNT].float()
    for block in _token_blocks(0, count, tokens.values[:, :, 0].numel()):
        weight = tokens.counted[:, None, block, None]
        added = tokens.counted[:, block].sum(1).float()
        total = (seen + added)[:, None, None].clamp_min(1)
        x = torch.where(weight, tokens.values[:, :, block].float(), 0.0)
        mean = x.sum(2) / added[:, None, None].clamp_min(1)
        shift = torch.where(added[:, None, None] > 0, mean - sections.average, 0.0)
        deviation = torch.where(weight, x - mean[:, :, None], 0.0).square_().sum(2)
        sections.average.add_(shift * added[:, None, None] / total)
        sections.deviation.add_(deviation + shift**2 * (seen * added)[:, None, None] / total)
        seen += added
        if query is not None and sections.energy.shape[1]:
            q = query[:, :, block].float().unflatten(1, (heads, -1))
            valid = tokens.counted[:, block] & (q.abs() <= codec.LIMIT).all(-1).flatten(1, 2).all(1)
            sections.energy.add_(torch.where(valid[:, None, None, :, None], q, 0.0).square_().sum((2, 3)))
    for column in (TOTAL, COUNT):
        rows[:, column].add_(tokens.counted.sum(1))


def _adopt(
    sections: Sections, wanted: Tensor, parameters: Parameters, weight: Tensor | None, overwritten: Tensor
) -> Tensor:
    """Puts new parameters into a free set of each wanted row and makes it the row's own.

    A set is free if no token names it, those about to be overwritten aside. A row without a free set keeps the set it
    has: what it writes is encoded less well, not wrongly.

    Args:
        sections: the state.
        wanted: bool ``[batch]``.
        parameters: ``[batch, heads, head_dim]``.
        weight: the channel weights they were fitted with, ``[batch, heads, head_dim]``; None: all the same.
        overwritten: bool ``[batch, slots]``, by ring index.

    Returns:
        bool ``[batch]``: rows that got a set.
    """
    sets = sections.scales.shape[1]
    live = (sections.gains >= 0).any(1) & ~overwritten & (sections.epochs != NO_EPOCH)
    used = torch.zeros(len(wanted), sets + 1, dtype=torch.bool, device=wanted.device)
    used.scatter_(1, torch.where(live, sections.epochs.long(), sets), value=True)
    free = ~used[:, :sets]
    got = wanted & free.any(1)
    row = got.nonzero().flatten()
    number = free.int().argmax(1)[row]
    if sections.means.shape[1]:
        sections.means[row, number] = parameters.mean[row]
        sections.weights[row] = 1 if weight is None else weight[row]
    sections.scales[row, number] = parameters.scale[row]
    sections.rows[row, SET] = number
    return got


def _refit(sections: Sections, form: Format, first: Tensor, overwritten: Tensor) -> None:
    """Fits the rows that have no parameters and need them, and those whose tokens have grown enough since the last fit.

    Args:
        sections: the state, with the statistics of the tokens about to be written.
        form: its format.
        first: bool ``[batch]``, rows that need their first fit.
        overwritten: bool ``[batch, slots]``, by ring index.
    """
    rows = sections.rows
    total, fitted = rows[:, TOTAL], rows[:, FITTED]
    again = (fitted >= 0) & (total >= (REFIT_GROWTH * fitted.double()).clamp_min(1))
    wanted = first | again
    if not wanted.any():
        return
    count = rows[:, COUNT, None, None].clamp_min(1).float()
    weight = codec.weights(sections.energy) if sections.energy.shape[1] else None
    parameters = codec.fit(sections.average, sections.deviation / count, weight, role=form.role)
    got = _adopt(sections, wanted, parameters, weight, overwritten)
    fitted.copy_(torch.where(got, total, torch.where(first, 0, fitted)))
    # What follows may be of another kind: the past counts half as much with each fit.
    rows[:, COUNT].sub_(torch.where(got, rows[:, COUNT] // 2, 0))
    share = torch.where(got, 0.5, 1.0)[:, None, None]
    sections.deviation.mul_(share)
    sections.energy.mul_(share)


def _fit_padding(sections: Sections, form: Format, tokens: _Tokens, overwritten: Tensor) -> None:
    """Gives rows that write padding before their first fit a set fitted on that padding alone.

    So padding takes neither copies nor statistics from the sequence, and can still be read.
    """
    padding = tokens.padding & tokens.keep
    wanted = padding.any(1) & (sections.rows[:, SET] < 0)
    if not wanted.any():
        return
    count = padding.sum(1)[:, None, None].clamp_min(1)
    mean = torch.zeros_like(sections.average)
    power = torch.zeros_like(sections.average)
    for block in _token_blocks(0, tokens.values.shape[2], tokens.values[:, :, 0].numel()):
        x = _finite(tokens.values[:, :, block]).float().clamp(-codec.LIMIT, codec.LIMIT)
        x = torch.where(padding[:, None, block, None], x, 0.0) / count[..., None]
        mean += x.sum(2)
        power += (x**2).sum(2) * count
    parameters = codec.fit(mean, (power - mean**2).clamp_min(0), None, role=form.role)
    _adopt(sections, wanted, parameters, None, overwritten)


def _put(sections: Sections, form: Format, values: Tensor, index: Tensor, keep: Tensor, encoded: Tensor) -> None:
    """Writes tokens to their slots: encoded with the row's set, or as written but not encoded.

    Args:
        sections: the state.
        form: its format.
        values: ``[batch, heads, tokens, head_dim]``.
        index: int64 ``[batch, tokens]``, ring index along the slots; valid wherever `keep`.
        keep: bool ``[batch, tokens]``: these are written.
        encoded: bool ``[batch, tokens]``: these are encoded.
    """
    sets = sections.rows[:, SET].clamp_min(0)
    parameters = _parameters(sections, sets[:, None])
    weight = sections.weights[:, :, None] if form.role == "key" else None
    for block in _token_blocks(0, values.shape[2], values[:, :, 0].numel()):
        row, token = keep[:, block].nonzero(as_tuple=True)
        if not len(row):
            continue
        x = _finite(values[:, :, block])
        slot = index[:, block][row, token]
        codes_wanted = encoded[:, block][row, token]
        gains = torch.zeros_like(x[..., 0], dtype=torch.float16)
        if codes_wanted.any():
            codes, gains = codec.encode(x.float(), parameters, weight, role=form.role, bits=form.bits)
            chosen = codes_wanted.nonzero().flatten()
            at = row[chosen], slice(None), token[chosen]
            tiles.write(sections.planes, codes[at], row[chosen], slot[chosen], role=form.role, bits=form.bits)
            gains = torch.where(encoded[:, None, block], gains, 0)
        gains = torch.where((x != 0).any(-1), gains, -1)
        sections.gains[row, :, slot] = gains[row, :, token]
        sections.epochs[row, slot] = torch.where(codes_wanted, sets[row], NO_EPOCH).to(torch.uint8)


class _Copies(NamedTuple):
    """Where the exact copies of a write go, and which copies it concerns; window first, then sinks."""

    windowed: Tensor
    """bool ``[batch, tokens]``: goes to the window ..."""
    ring: Tensor
    """int64 ``[batch, tokens]``: ... at this index."""
    sink: Tensor
    """bool ``[batch, tokens]``: goes to the sinks ..."""
    to_sink: Tensor
    """int64 ``[batch, tokens]``: ... at this index."""
    labels: Tensor
    """int64 ``[batch, window + sinks]``: positions of the copies there are."""
    replaced: Tensor
    """bool ``[batch, window + sinks]``: the write replaces the tokens themselves."""


def _place_copies(sections: Sections, tokens: _Tokens, overwritten: Tensor, origin: int) -> _Copies:
    window, sinks = sections.window.shape[2], sections.sinks.shape[2]
    copied = tokens.keep & tokens.nonzero.any(1)  # zeros need no copy
    ring = (tokens.positions % max(1, window)).expand_as(copied)
    to_sink = tokens.positions - sections.rows[:, START, None]
    labels = torch.cat((sections.window_positions, sections.sink_positions), 1)
    return _Copies(
        windowed=_last_writers(ring, copied, window),
        ring=ring,
        sink=copied & (to_sink >= 0) & (to_sink < sinks),
        to_sink=to_sink,
        labels=labels,
        replaced=(labels >= origin) & overwritten.gather(1, labels.clamp_min(0) % overwritten.shape[1]),
    )


def _first_fits(sections: Sections, tokens: _Tokens, copies: _Copies, origin: int) -> tuple[Tensor, Tensor]:
    """Rows without a fit in which a token would be left with neither a code nor a copy.

    Returns:
        bool ``[batch]``, these rows, and bool ``[batch, window + sinks]``, copies of tokens to be encoded for that.
    """
    unfitted = (sections.rows[:, FITTED] < 0) & tokens.keep.any(1)
    if not unfitted.any():
        return unfitted, torch.zeros_like(copies.replaced)
    window = sections.window.shape[2]
    at = copies.labels.clamp_min(0) % sections.gains.shape[2]
    written = (sections.gains >= 0).any(1).gather(1, at)
    codeless = written & (sections.epochs.gather(1, at) == NO_EPOCH)
    pending = unfitted[:, None] & (copies.labels >= origin) & ~copies.replaced & codeless

    evicted = torch.zeros_like(pending)
    sinks_after = sections.sink_positions.clone()
    row, token = copies.windowed.nonzero(as_tuple=True)
    evicted[row, copies.ring[row, token]] = True
    row, token = copies.sink.nonzero(as_tuple=True)
    evicted[row, window + copies.to_sink[row, token]] = True
    sinks_after[row, copies.to_sink[row, token]] = tokens.positions[token]
    # What leaves the window may still be a sink. Sinks lose their place only when a sequence begins elsewhere, which is
    # rare: they count as lost even if they are in the window as well.
    evicted[:, :window] &= ~(copies.labels[:, :window, None] == sinks_after[:, None]).any(2)

    new = tokens.keep & tokens.nonzero.any(1) & ~tokens.padding & ~copies.windowed & ~copies.sink
    rows = unfitted & (new.any(1) | (pending & evicted).any(1))
    return rows, pending & rows[:, None]


def check_write(
    new: Tensor, positions: Tensor, query: Tensor | None, mask: Tensor | None, rows: Tensor | None, form: Format
) -> None:
    """Raises a ValueError if the arguments of `store` do not fit together."""
    if new.dim() != 4 or new.shape[3] != form.head_dim:
        raise ValueError(f"new must be [batch, heads, tokens, {form.head_dim}], got {tuple(new.shape)}")
    batch, heads, count, _ = new.shape
    if positions.shape != (count,) or positions.dtype != torch.int64:
        raise ValueError(f"positions must be int64 [{count}], got {positions.dtype} {tuple(positions.shape)}")
    if query is not None and (query.dim() != 4 or query.shape[1] % heads or query.shape[::2] != new.shape[::2]):
        raise ValueError(
            f"query must be [{batch}, a multiple of {heads}, {count}, {form.head_dim}], got {tuple(query.shape)}"
        )
    if mask is not None and (mask.dim() != 4 or mask.shape[0] not in (1, batch)):
        raise ValueError(f"mask must be [{batch} or 1, query heads or 1, tokens or 1, length], got {tuple(mask.shape)}")
    if rows is not None and (rows.shape != (batch, count) or rows.dtype != torch.bool):
        raise ValueError(f"rows must be bool [{batch}, {count}], got {rows.dtype} {tuple(rows.shape)}")


@torch.no_grad()
def store(
    state: Tensor,
    new: Tensor,
    positions: Tensor,
    query: Tensor | None,
    mask: Tensor | None,
    slots: int,
    shift: int,
    first: int,
    form: Format,
    rows: Tensor | None = None,
) -> None:
    """Writes tokens into the cache.

    A write that includes slot 0, or the first one ever, begins a new sequence in the rows concerned: start and fit are
    made anew, tokens further up stay until they are overwritten.

    Args:
        state: buffer of ``form.layout(batch, heads, slots)``; modified.
        new: float ``[batch, heads, tokens, head_dim]``. Not-a-numbers are stored as zero, infinities as large numbers.
        positions: int64 ``[tokens]``, slots after the shift; negative ones are dropped, of equal ones the last counts.
        query: float ``[batch, query_heads, tokens, head_dim]``, queries of the same tokens; query head ``h`` reads KV
            head ``h // (query_heads // heads)``. For the statistics of keys only.
        mask: bool (True admits) or additive ``[batch | 1, query_heads | 1, tokens | 1, length]``; its column ``a`` is
            slot ``first + a`` after the shift. Tells where sequences start and which tokens are real.
        slots: size of the cache.
        shift: the cache first moves this many slots towards slot 0; what leaves it is gone.
        first: see `mask`.
        form: format of the state.
        rows: bool ``[batch, tokens]``: only these are written; None writes all.

    Raises:
        IndexError: a position of at least `slots`.
        ValueError: a tensor of the wrong shape or dtype, or a negative shift.
    """
    check_write(new, positions, query, mask, rows, form)
    batch, heads, count, _ = new.shape
    sections = form.layout(batch, heads, slots).views(state)
    highest = int(positions.max()) if count else UNSET
    if highest >= slots:
        raise IndexError(f"position {highest} is outside the cache of {slots} slots")
    if shift < 0:
        raise ValueError(f"shift must not be negative, got {shift}: a cache only moves towards slot 0")

    origin = int(sections.header[ORIGIN])
    if shift:
        freed = torch.arange(origin, origin + min(shift, slots), device=state.device) % slots
        if form.bits == 16:
            sections.raw[:, :, freed] = 0
        else:
            sections.gains[:, :, freed] = -1
        origin += shift
        sections.header[ORIGIN] = origin
    if highest < 0:
        return
    sections.header[END].clamp_min_(origin + highest + 1)

    absolute = origin + positions
    index = (absolute % slots).expand(batch, -1)
    keep = (positions >= 0).expand(batch, -1)
    keep = _last_writers(index, keep if rows is None else keep & rows, slots)
    new = new.to(form.dtype)
    if form.bits == 16:
        row, token = keep.nonzero(as_tuple=True)
        sections.raw[row, :, index[row, token]] = new[row, :, token]
        return
    _store_coded(sections, form, new, absolute, keep, query, mask, origin, shift, first)


def _begin(
    sections: Sections, absolute: Tensor, keep: Tensor, admitted: Tensor | None, origin: int, shift: int, first: int
) -> None:
    """Begins a new sequence in the rows that a write starts."""
    rows = sections.rows
    begin = keep.any(1) & (rows[:, START] < 0)
    if shift == 0:
        begin |= (keep & (absolute == origin)).any(1)
    if not begin.any():
        return
    start = torch.where(keep, absolute, torch.iinfo(torch.int64).max).amin(1)
    if admitted is not None and admitted.shape[1]:
        start = torch.where(admitted.any(1), origin + first + admitted.int().argmax(1), start)
    rows[:, START].copy_(torch.where(begin, start, rows[:, START]))
    rows[:, TOTAL].masked_fill_(begin, 0)
    rows[:, FITTED].masked_fill_(begin, UNSET)
    rows[:, COUNT].masked_fill_(begin, 0)
    for statistic in (sections.average, sections.deviation, sections.energy):
        statistic.masked_fill_(begin[:, None, None], 0)


def _describe(
    sections: Sections,
    form: Format,
    new: Tensor,
    absolute: Tensor,
    keep: Tensor,
    admitted: Tensor | None,
    first_position: int,
) -> _Tokens:
    """What is known about each token of a write."""
    nonzero, finite = [], []
    for block in _token_blocks(0, new.shape[2], new[:, :, 0].numel()):
        x = new[:, :, block]
        nonzero.append((_finite(x) != 0).any(-1))
        finite.append((x.abs() <= min(codec.LIMIT, torch.finfo(x.dtype).max)).all(-1).all(1))
    is_nonzero = torch.cat(nonzero, 2)
    start = sections.rows[:, START, None]
    counted = keep & torch.cat(finite, 1) & is_nonzero.any(1) & (absolute >= start + form.sinks)
    if admitted is not None and admitted.shape[1]:
        column = absolute - first_position
        covered = (column >= 0) & (column < admitted.shape[1])
        counted &= ~covered | admitted[:, column.clamp(0, admitted.shape[1] - 1)]
    return _Tokens(new, absolute, keep, is_nonzero, absolute < start, counted)


def _store_coded(
    sections: Sections,
    form: Format,
    new: Tensor,
    absolute: Tensor,
    keep: Tensor,
    query: Tensor | None,
    mask: Tensor | None,
    origin: int,
    shift: int,
    first: int,
) -> None:
    """`store` for quantised formats, after the shift."""
    slots = sections.gains.shape[2]
    index = (absolute % slots).expand_as(keep)
    admitted = None if mask is None else admitted_columns(mask)[:, max(0, -first) :]
    first = max(0, first)
    _begin(sections, absolute, keep, admitted, origin, shift, first)
    tokens = _describe(sections, form, new, absolute, keep, admitted, origin + first)
    _accumulate(sections, tokens, query)

    overwritten = torch.zeros_like(sections.epochs, dtype=torch.bool)
    row, token = keep.nonzero(as_tuple=True)
    overwritten[row, index[row, token]] = True

    copies = _place_copies(sections, tokens, overwritten, origin)
    first_fit, pending = _first_fits(sections, tokens, copies, origin)
    _refit(sections, form, first_fit, overwritten)
    if pending.any():
        exact = torch.cat((sections.window, sections.sinks), 2)
        _put(sections, form, exact, copies.labels.clamp_min(0) % slots, pending, pending)
    _fit_padding(sections, form, tokens, overwritten)
    _put(sections, form, new, index, keep, keep & ((sections.rows[:, FITTED, None] >= 0) | tokens.padding))

    window = sections.window.shape[2]
    for section, labels, chosen, place, stale in (
        (sections.window, sections.window_positions, copies.windowed, copies.ring, copies.replaced[:, :window]),
        (sections.sinks, sections.sink_positions, copies.sink, copies.to_sink, copies.replaced[:, window:]),
    ):
        labels.masked_fill_(stale, UNSET)
        row, token = chosen.nonzero(as_tuple=True)
        section[row, :, place[row, token]] = _finite(new[row, :, token])
        labels[row, place[row, token]] = absolute[token]


# ----------------------------------------------------------------------------------------------------------------- read


class _History:
    """The stored tokens of a cache as an attention's key axis sees them: axis ``a`` is slot ``first + a``."""

    def __init__(
        self, state: Tensor, form: Format, shape: tuple[int, int, int], first: int, length: int, sequences: int
    ) -> None:
        self.form = form
        batch, heads, slots = shape
        self.slots, self.first, self.length = slots, first, length
        self.sections = form.layout(batch, heads, slots).views(state).of_first(sequences)
        self.origin, end = self.sections.header.tolist()
        self.low = max(0, first)
        self.high = min(slots, first + length, end - self.origin)
        self._elements_per_token = sequences * heads * form.head_dim

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Runs of written slots: their place on the axis and in the ring of slots."""
        wrap = self.slots - self.origin % self.slots  # the first slot whose ring index starts over
        for low, high in ((self.low, min(self.high, wrap)), (max(self.low, wrap), self.high)):
            for run in _token_blocks(low, high, self._elements_per_token):
                begin = (self.origin + run.start) % self.slots
                axis = slice(run.start - self.first, run.stop - self.first)
                yield axis, slice(begin, begin + run.stop - run.start)

    def entries(self, ring: slice) -> Tensor:
        """Codebook entries, float32 ``[batch, heads, n, head_dim]``."""
        form = self.form
        codes = tiles.read(self.sections.planes, ring, role=form.role, bits=form.bits, head_dim=form.head_dim)
        return codec.lookup(codes, form.bits)

    def epochs(self, ring: slice) -> Iterator[tuple[int, slice, Tensor]]:
        """Parameter sets in a run: number, the part of the run they occur in, and where, bool ``[batch, 1, 1, n]``."""
        epochs = self.sections.epochs[:, ring]
        for number in epochs.unique().tolist():
            if number != NO_EPOCH:
                where = epochs == number
                at = where.any(0).nonzero().flatten()
                part = slice(int(at[0]), int(at[-1]) + 1)
                yield number, part, where[:, None, None, part]

    def copies(self) -> tuple[Tensor, Tensor]:
        """Sinks and window: tokens ``[batch, heads, n, head_dim]`` and their place on the axis, int64 ``[batch, n]``.

        What is not on the axis, and all but one copy of a token, have the place `length`.
        """
        sections = self.sections
        twice = (sections.window_positions[:, :, None] == sections.sink_positions[:, None]).any(2)
        labels = torch.cat((sections.sink_positions, sections.window_positions.masked_fill(twice, UNSET)), 1)
        place = labels - (self.origin + self.first)
        valid = (labels >= self.origin) & (place >= 0) & (place < self.length)
        return torch.cat((sections.sinks, sections.window), 2), torch.where(valid, place, self.length)

    def logits(self, query: Tensor) -> Tensor:
        """Inner products with every token on the axis, zero where there is none.

        Args:
            query: float32 ``[batch, heads, queries, head_dim]``.

        Returns:
            float32 ``[batch, heads, queries, length + 1]``; the last column means nothing.
        """
        sections = self.sections
        logits = query.new_zeros(*query.shape[:3], self.length + 1)
        folded: dict[int, tuple[Tensor, Tensor]] = {}
        for axis, ring in self.blocks():
            if self.form.bits == 16:
                logits[..., axis] = query @ sections.raw[:, :, ring].float().mT
                continue
            entry = self.entries(ring)
            stored = sections.gains[:, :, None, ring].float()
            for number, part, where in self.epochs(ring):
                if number not in folded:
                    mean, scale = (x.float()[:, :, None] for x in _parameters(self.sections, number))
                    folded[number] = codec.rotate(query / scale), (query * mean).sum(-1, keepdim=True)
                rotated, constant = folded[number]
                gain = stored[..., part]
                product = rotated @ entry[:, :, part].mT * gain + constant
                view = logits[..., axis.start + part.start : axis.start + part.stop]
                view.copy_(torch.where(where & (gain >= 0), product, view))
        tokens, place = self.copies()
        return _override(logits, place, query @ tokens.float().mT)

    def mix(self, weights: Tensor) -> Tensor:
        """Weighted sum of the tokens on the axis, float32 ``[batch, heads, queries, head_dim]``.

        Args:
            weights: float32 ``[batch, heads, queries, length + 1]`` with a last column of zeros; consumed.
        """
        sections = self.sections
        tokens, place = self.copies()
        out = _take(weights, place) @ tokens.float()
        sums: dict[int, Tensor] = {}
        for axis, ring in self.blocks():
            if self.form.bits == 16:
                out += weights[..., axis] @ sections.raw[:, :, ring].float()
                continue
            entry = self.entries(ring)
            gains = sections.gains[:, :, None, ring].float().clamp_min(0)
            for number, part, where in self.epochs(ring):
                view = weights[..., axis.start + part.start : axis.start + part.stop]
                share = torch.where(where, view * gains[..., part], 0.0) @ entry[:, :, part]
                sums[number] = sums[number] + share if number in sums else share
        for number, total in sums.items():  # values have no mean
            out += codec.unrotate(total) / _parameters(self.sections, number).scale.float()[:, :, None]
        return out


def _override(logits: Tensor, place: Tensor, values: Tensor) -> Tensor:
    """Replaces columns; `place` is int64 ``[batch, n]``."""
    return logits.scatter_(-1, place[:, None, None].expand_as(values), values)


def _take(weights: Tensor, place: Tensor) -> Tensor:
    """Takes columns out of `weights`, which loses them; `place` is int64 ``[batch, n]``."""
    column = place[:, None, None].expand(*weights.shape[:3], -1)
    taken = weights.gather(-1, column)
    weights.scatter_(-1, column, 0.0)
    return taken


def _softmax(logits: Tensor, mask: Tensor | None, sink: Tensor | None, groups: int, queries: int) -> Tensor:
    """Softmax over the last axis under a mask, zeros where nothing is admitted.

    Args:
        logits: float32 ``[batch, heads, groups * queries, length]``.
        mask: ``[batch | 1, heads * groups | 1, queries | 1, length]`` or None.
        sink: a logit for each query head that takes a share and is left out, ``[heads * groups]``, or None.
        groups: query heads per KV head.
        queries: queries per head.
    """
    if mask is not None:
        split = mask.unflatten(1, (1, 1) if mask.shape[1] == 1 else (-1, groups))
        view = logits.unflatten(2, (groups, queries))
        masked = view.masked_fill(~split, -math.inf) if mask.dtype == torch.bool else view + split.float()
        logits = masked.flatten(2, 3)
    peak = logits.amax(-1, keepdim=True)
    if sink is not None:
        sink = sink.float().unflatten(0, (-1, groups)).repeat_interleave(queries, 1)[..., None]
        peak = torch.maximum(peak, sink)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    weights = (logits - peak).exp_()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - peak).exp()
    return weights / total.clamp_min(torch.finfo(torch.float32).tiny)


def check_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    length: int,
    kf: Format,
    vf: Format,
    sink: Tensor | None,
    sequences: int | None = None,
) -> None:
    """Raises a ValueError if the arguments of `attend` do not fit together."""
    if kf.role != "key" or vf.role != "value":
        raise ValueError(f"attend needs the formats of a key and of a value cache, got {kf.key()} and {vf.key()}")
    batch, heads, count = key.shape[:3]
    if query.dim() != 4 or query.shape[0] != batch or query.shape[1] % heads or query.shape[3] != kf.head_dim:
        raise ValueError(
            f"query must be [{batch}, a multiple of {heads}, queries, {kf.head_dim}], got {tuple(query.shape)}"
        )
    for name, tensor, form in (("key", key, kf), ("value", value, vf)):
        if tensor.shape != (batch, heads, count, form.head_dim):
            raise ValueError(f"{name} must be [{batch}, {heads}, {count}, {form.head_dim}], got {tuple(tensor.shape)}")
    if positions.shape != (count,):
        raise ValueError(f"positions must be [{count}], got {tuple(positions.shape)}")
    if mask is not None:
        allowed = ((1, batch), (1, query.shape[1]), (1, query.shape[2]), (length,))
        if mask.dim() != 4 or any(size not in sizes for size, sizes in zip(mask.shape, allowed, strict=True)):
            raise ValueError(
                f"mask must be [{batch} or 1, {query.shape[1]} or 1, {query.shape[2]} or 1, {length}], "
                f"got {tuple(mask.shape)}"
            )
    if sink is not None and sink.shape != (query.shape[1],):
        raise ValueError(f"sink must be [{query.shape[1]}], got {tuple(sink.shape)}")
    if sequences is not None and sequences < batch:
        raise ValueError(f"{batch} sequences attend to caches of {sequences}")


@torch.no_grad()
def attend(
    query: Tensor,
    key_state: Tensor,
    value_state: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    slots: int,
    first: int,
    length: int,
    key_form: Format,
    value_form: Format,
    sink: Tensor | None = None,
    sequences: int | None = None,
) -> Tensor:
    """Attention over packed caches; equals dense attention over `dequantise` with the new tokens put in place.

    Axis ``a`` of the keys is slot ``first + a``. The tokens given are attended exactly, in place of what the caches
    hold there; slots never written or outside the cache are zeros, as a dense cache reads them. Softmax in float32.

    Args:
        query: float ``[batch, query_heads, queries, head_dim]``; query head ``h`` reads KV head
            ``h // (query_heads // heads)``.
        key_state: buffer of the key cache.
        value_state: buffer of the value cache.
        key: float ``[batch, heads, tokens, head_dim]``, new tokens.
        value: float ``[batch, heads, tokens, value_head_dim]``.
        positions: int64 ``[tokens]``, slots of the new tokens, also beyond the cache; negative ones are dropped, of
            equal ones the last counts.
        mask: bool (True admits) or additive ``[batch | 1, query_heads | 1, queries | 1, length]``; a query that
            nothing is admitted to gets zeros.
        scale: of the logits; None means ``head_dim ** -0.5``.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the mask; None leaves them.
        slots: size of both caches.
        first: slot of axis 0, may be negative.
        length: length of the axis.
        key_form: format of `key_state`.
        value_form: format of `value_state`.
        sink: float32 ``[query_heads]``, a logit of each head beside those of the keys, as they are after scale, softcap
            and mask: it joins the sum of the softmax and has no value. None: there is none.
        sequences: of the caches, of which the first `batch` are attended to; None: there are no others.

    Returns:
        ``[batch, query_heads, queries, value_head_dim]`` in the query's dtype, contiguous.

    Raises:
        ValueError: a tensor of the wrong shape, or formats of the wrong role.
    """
    check_attend(query, key, value, positions, mask, length, key_form, value_form, sink, sequences)
    batch, heads = key.shape[:2]
    query_heads, queries = query.shape[1:3]
    groups = query_heads // heads
    out = query.new_zeros(batch, heads, groups, queries, value_form.head_dim)
    if length == 0 or out.numel() == 0:
        return out.flatten(1, 2)

    shape = batch if sequences is None else sequences, heads, slots
    keys = _History(key_state, key_form, shape, first, length, batch)
    values = _History(value_state, value_form, shape, first, length, batch)
    column = (positions - first)[None]
    on_axis = _last_writers(column, (positions >= 0) & (column >= 0) & (column < length), length)
    place = torch.where(on_axis, column, length).expand(batch, -1)
    exact_keys = key.float()
    exact_values = value.float().masked_fill(~on_axis[0, :, None], 0)  # their weight is zero, which nan would survive
    q = query.float().unflatten(1, (heads, groups)) * (key_form.head_dim**-0.5 if scale is None else scale)
    size = max(1, _LOGIT_ELEMENTS // (batch * query_heads * length))
    for begin in range(0, queries, size):
        block = slice(begin, min(queries, begin + size))
        part = q[:, :, :, block].flatten(2, 3)
        logits = _override(keys.logits(part), place, part @ exact_keys.mT)[..., :length]
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, block]
        weights = F.pad(_softmax(logits, rows, sink, groups, block.stop - block.start), (0, 1))
        mixed = _take(weights, place) @ exact_values
        mixed += values.mix(weights)
        out[:, :, :, block] = mixed.unflatten(2, (groups, -1)).to(query.dtype)
    return out.flatten(1, 2)


@torch.no_grad()
def dequantise(
    state: Tensor, batch: int, heads: int, slots: int, form: Format, first: int = 0, length: int | None = None
) -> Tensor:
    """The dense cache, as attention sees it: sinks and window exactly, never-written slots as zeros.

    Args:
        state: buffer of ``form.layout(batch, heads, slots)``.
        batch: rows.
        heads: KV heads.
        slots: size of the cache.
        form: format of the state.
        first: the slot to start from.
        length: how many slots to take, all by default; what the cache does not have is zeros.

    Returns:
        ``[batch, heads, length, head_dim]`` in ``form.dtype``.

    Raises:
        ValueError: `first` is negative.
    """
    if first < 0:
        raise ValueError(f"first must be at least 0, got {first}")
    length = slots if length is None else length
    history = _History(state, form, (batch, heads, slots), first, length, batch)
    sections = history.sections
    out = torch.zeros(batch, heads, length, form.head_dim, dtype=form.dtype, device=state.device)
    large = torch.finfo(form.dtype).max
    for axis, ring in history.blocks():
        if form.bits == 16:
            out[:, :, axis] = sections.raw[:, :, ring]
            continue
        epochs = sections.epochs[:, ring].long()
        parameters = _parameters(sections, torch.where(epochs == NO_EPOCH, 0, epochs))
        gain = sections.gains[:, :, ring]
        tokens = codec.decode(history.entries(ring), gain, parameters).clamp_(-large, large)
        out[:, :, axis] = torch.where((gain >= 0)[..., None], tokens, 0.0).to(form.dtype)
    copies, place = history.copies()
    row, copy = (place < length).nonzero(as_tuple=True)
    out[row, :, place[row, copy]] = copies[row, :, copy]
    return out
