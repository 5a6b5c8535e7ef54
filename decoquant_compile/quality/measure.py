"""Methods measured on windows of text: ours through the real operators, any other emulated."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

import decoquant_compile
from decoquant_compile import _compat
from decoquant_compile.kernels.codec import Role
from decoquant_compile.quality.divergence import Divergence, compare
from decoquant_compile.quality.emulate import Emulation, Scheme, emulated
from decoquant_compile.quality.model import Subject
from decoquant_compile.quality.rivals import Rival

Prefill = Literal["eager", "compiled"]
Tick = Callable[[], Any]

_SAMPLE: Final = 512
"""Real tokens that fill the cache whose bytes are counted, over and over."""


class NotPackedError(RuntimeError):
    """The compiled model decoded on a cache that was not packed, or not all of it."""


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        prompt: tokens at the start of a window, whose queries attend exactly.
        context: tokens of a window.
        every: the distribution after every n-th token of the rest is compared.
        start: from this position on, if it comes after the prompt; what is before is decoded all the same.
    """

    prompt: int
    context: int
    every: int = 1
    start: int = 0

    @property
    def positions(self) -> Tensor:
        """Positions whose next-token distribution is compared; the token that follows stands in the window."""
        return torch.arange(max(self.prompt, self.start), self.context - 1, self.every)

    @property
    def steps(self) -> int:
        """Tokens that are decoded one by one."""
        return self.context - 1 - self.prompt

    def following(self, ids: Tensor) -> Tensor:
        """The token after each compared position, ``[windows, positions]``."""
        return ids[:, self.positions + 1]


# --------------------------------------------------------------------------------------------------------------- states


def exact(subject: Subject, ids: Tensor, setting: Setting) -> Tensor:
    """States of the model as it is at the compared positions, ``[windows, positions, width]``."""
    return subject.whole(ids)[:, setting.positions]


def decoded(
    subject: Subject,
    ids: Tensor,
    setting: Setting,
    options: Mapping[str, Any],
    prefill: Prefill,
    tick: Tick = lambda: None,
    slots: int | None = None,
) -> Tensor:
    """The same, decoded token by token through the compiled model on its packed cache.

    All windows are rows of one batch. What is not ours in the graph runs on ATen's kernels, which compiles faster.

    Args:
        subject: the model.
        ids: windows, ``[windows, context]``.
        setting: what is compared.
        options: of the backend.
        prefill: "compiled": the prompt runs through the compiled model, which sees its queries; "eager": through the
            plain one, and the first compiled step takes its cache over.
        tick: called after every step.
        slots: of the caches; what an average of bits is allotted over. By default those of a window.

    Raises:
        NotPackedError: the cache of a layer was not packed.
        ValueError: an option is not valid.
    """
    torch.compiler.reset()  # each set of options has graphs of its own
    cache = subject.static_cache(len(ids), setting.context if slots is None else slots)
    compared = set(setting.positions.tolist())
    rows = []
    with _compat.quick_compile(), decoquant_compile.enable(**options) as session:
        forward = torch.compile(subject.body.forward)
        first = forward if prefill == "compiled" else subject.body.forward
        first(input_ids=ids[:, : setting.prompt], past_key_values=cache, use_cache=True)
        for at in range(setting.prompt, setting.context - 1):
            output = forward(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            if at == setting.prompt:
                _require_packed(subject, cache, session.report())
            if at in compared:
                rows.append(subject.states(output)[:, -1].clone())
            tick()
        _require_packed(subject, cache, session.report())
    return torch.stack(rows, 1)


def _require_packed(subject: Subject, cache: Cache, report: decoquant_compile.Report) -> None:
    dense = [
        at
        for at in subject.heads
        if not all(isinstance(side, decoquant_compile.CacheTensor) for side in _sides(cache, at))
    ]
    if dense:
        raise NotPackedError(
            f"the caches of layers {', '.join(map(str, dense))} of {len(subject.heads)} were not packed, so that what "
            f"is measured would not be the packed cache. What the compiler found:\n{report}"
        )


def _sides(cache: Cache, at: int) -> tuple[Tensor, Tensor]:
    layer: Any = cache.layers[at]
    return layer.keys, layer.values


def emulate(subject: Subject, ids: Tensor, setting: Setting, emulation: Emulation, tick: Tick = lambda: None) -> Tensor:
    """The same with a scheme emulated inside the attention.

    Args:
        subject: the model.
        ids: windows, ``[windows, context]``.
        setting: what is compared.
        emulation: the scheme, and where it works.
        tick: called after every window.
    """
    rows = []
    with emulated(subject.model, emulation, otherwise=subject.attention):
        for window in ids:
            rows.append(subject.whole(window[None])[:, setting.positions])
            tick()
    return torch.cat(rows)


def check_emulation(subject: Subject, ids: Tensor) -> None:
    """Makes sure that the model's attentions are what the emulation takes them for.

    Args:
        subject: the model.
        ids: one window, ``[length]``; a few tokens are enough.

    Raises:
        ValueError: with nothing quantised, the emulation does not reproduce the model.
    """
    plain = subject.whole(ids[None]).float()
    with emulated(subject.model, Emulation(None, 0), otherwise=subject.attention):
        again = subject.whole(ids[None]).float()
    error = ((again - plain).norm() / plain.norm()).item()
    if not error < (1e-3 if subject.model.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"the attention of {type(subject.model).__name__} is not what an emulation can stand in for (it differs by "
            f"{error:.1%} with nothing quantised): only --bits can be measured, no --methods or --layers"
        )


# --------------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class LayerCost:
    """What storing one side of one layer costs, all else being exact.

    Attributes:
        layer: its place in the model.
        role: keys or values.
        divergence: from the exact model.
    """

    layer: int
    role: Role
    divergence: Divergence


def by_layer(
    subject: Subject, ids: Tensor, setting: Setting, scheme: Scheme, reference: Tensor, tick: Tick = lambda: None
) -> list[LayerCost]:
    """Stores one side of one layer at a time, emulated.

    Args:
        subject: the model.
        ids: windows, ``[windows, context]``.
        setting: what is compared.
        scheme: how the one cache is held.
        reference: states of the model as it is, of `exact`.
        tick: called after every window of every run.

    Returns:
        Keys and values of each layer, in order.
    """
    roles: tuple[Role, Role] = ("key", "value")
    cases = {f"{layer} {role}": (layer, role) for layer in subject.heads for role in roles}
    states = {
        name: emulate(
            subject, ids, setting, Emulation(scheme, setting.prompt, frozenset({layer}), frozenset({role})), tick
        )
        for name, (layer, role) in cases.items()
    }
    found = compare(reference, states, setting.following(ids), subject.logits, subject.vocabulary)
    return [LayerCost(*cases[name], divergence) for name, divergence in found.items()]


# ----------------------------------------------------------------------------------------------------------------- bits


@dataclass(frozen=True)
class Bits:
    """Stored bits per element.

    Attributes:
        full: of the layers that hold every token (of all layers, if none does).
        held: of all layers as the model holds them, sliding windows only their window; None for an emulated method.
    """

    full: float
    held: float | None


@torch.no_grad()
def stored_bits(subject: Subject, options: Mapping[str, Any], tokens: int, sample: Tensor) -> Bits:
    """Bits per element counted from the live tensors of a cache that one compiled step has taken over.

    The cache is in bfloat16, so that sinks and recent tokens count 16 bits.

    Args:
        subject: the model.
        options: of the backend.
        tokens: in the cache after the step.
        sample: token ids ``[length]``; what the model makes of them fills the cache, over and over.

    Raises:
        NotPackedError: the cache of a layer was not packed.
    """
    torch.compiler.reset()
    model = subject.model
    if model.dtype != torch.bfloat16:
        subject = Subject(copy.deepcopy(model).to(torch.bfloat16))
    cache = _filled(subject, tokens, sample[None, :_SAMPLE])
    with _compat.quick_compile(), decoquant_compile.enable(**options) as session:
        forward = torch.compile(subject.body.forward)
        forward(input_ids=sample[None, :1], past_key_values=cache, use_cache=True)
        _require_packed(subject, cache, session.report())
    torch.compiler.reset()
    sides = [_sides(cache, at) for at in subject.heads]
    full = [pair for pair in sides if pair[0].shape[2] == tokens]
    return Bits(_bits(full or sides), _bits(sides))


def _bits(sides: Sequence[tuple[Tensor, Tensor]]) -> float:
    return 8 * decoquant_compile.nbytes(sides).total / sum(side.numel() for pair in sides for side in pair)


def _filled(subject: Subject, tokens: int, sample: Tensor) -> Cache:
    """A static cache of `tokens` slots, all taken but one."""
    seen = DynamicCache(config=subject.model.config)
    subject.body(input_ids=sample, past_key_values=seen, use_cache=True)
    cache = subject.static_cache(1, tokens)
    for at in subject.heads:
        layer: Any = cache.layers[at]
        for target, source in zip(_sides(cache, at), _sides(seen, at), strict=True):
            count = min(tokens - 1, target.shape[2])
            target[:, :, :count] = source[:, :, torch.arange(count) % source.shape[2]]
        layer.cumulative_length.fill_(tokens - 1)
        if layer.is_sliding:
            layer.cumulative_length_int = tokens - 1
    return cache


def rival_bits(subject: Subject, rival: Rival, tokens: int) -> Bits:
    """Bits per element of a layer that holds every token, by the rival's own formula, averaged over the layers."""
    layers = list(subject.heads.values())
    sizes = [heads.count * (heads.key_dim + heads.value_dim) for heads in layers]
    bits = [rival.bits(tokens, heads.count, heads.key_dim, heads.value_dim) for heads in layers]
    return Bits(sum(b * size for b, size in zip(bits, sizes, strict=True)) / sum(sizes), None)
