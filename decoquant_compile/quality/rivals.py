"""Rivals by name: ``kivi:4``, ``q4_0+hadamard``, ``turboquant:3+window``, ``kvarn:K4V2``.

A rival is a codec for keys, one for values, and the tokens that it keeps in 16 bits. Each comes as published; the
modifiers ``+sinks`` and ``+window`` give it what this package keeps exact, 4 sinks and the newest 64 tokens, so that
the gain of the codec by itself can be seen.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor

from decoquant_compile.kernels.codec import Role
from decoquant_compile.quality.codecs import (
    SCALE,
    Codec,
    Factors,
    Grouped,
    PerChannel,
    VarianceNormalised,
    asymmetric,
    half_quadratic,
    llama_cpp,
    normalised_lloyd_max,
    symmetric,
)

SINKS: Final = 4
RECENT: Final = 64


@dataclass(frozen=True)
class Window:
    """The newest tokens, which stand in 16 bits.

    Attributes:
        kind: "sliding": always the newest `length`, the query's own among them; "blocks": they gather until there are
            `length`, then all are stored, counted from the start of the sequence; "after-prompt": the same, but counted
            from the end of the prompt, which is stored whole.
        length: 0 for none.
    """

    kind: Literal["sliding", "blocks", "after-prompt"] = "sliding"
    length: int = 0

    def first(self, length: int, prompt: int, block: int) -> Tensor:
        """For the query at each position, the first position that it sees in 16 bits, int64 ``[length]``.

        Args:
            length: number of positions.
            prompt: number of those in the prompt.
            block: tokens that the codec stores together.
        """
        at = torch.arange(length)
        if self.kind == "sliding":
            stored = (at + 1 - self.length).clamp_min(0)
        elif self.kind == "blocks":
            stored = at // self.length * self.length
        else:
            stored = prompt + (at - prompt).div(self.length, rounding_mode="floor").clamp_min(0) * self.length
        return stored // block * block

    def mean(self, block: int) -> float:
        """Mean number of tokens that stand in 16 bits, over a long decode."""
        if self.kind == "sliding":
            return self.length + (block - 1) / 2
        return (self.length - 1) / 2


@dataclass(frozen=True)
class Side:
    """Keys or values: how they are stored, and which not yet."""

    codec: Codec
    window: Window = Window()

    def nbits(self, tokens: int, heads: int, head_dim: int, sinks: int) -> float:
        """Bits of a layer's keys, or values, with that many tokens, the first `sinks` of them in 16 bits."""
        exact = min(tokens, sinks + self.window.mean(self.codec.block))
        return self.codec.nbits(tokens - exact, heads, head_dim) + exact * 16 * heads * head_dim


@dataclass(frozen=True)
class Rival:
    """A codec for KV caches that stands beside ours.

    Attributes:
        name: as given on the command line.
        key: of the keys.
        value: of the values.
        sinks: tokens at the start that stay in 16 bits.
    """

    name: str
    key: Side
    value: Side
    sinks: int = 0

    def side(self, role: Role) -> Side:
        """Keys' or values'."""
        return self.key if role == "key" else self.value

    def stored(self, x: Tensor, grouped: Tensor | None, role: Role, prompt: int) -> Tensor:  # noqa: ARG002 - no rival looks at queries
        """What a query sees of the tokens that are stored; see `emulate.Scheme`."""
        codec = self.side(role).codec
        whole = x.shape[2] // codec.block * codec.block
        return torch.cat([codec.store(x[:, :, :whole], prompt), x[:, :, whole:]], 2)

    def exact(self, role: Role, length: int, prompt: int) -> Tensor:
        """For each query, the first position of its window in 16 bits; see `emulate.Scheme`."""
        side = self.side(role)
        return side.window.first(length, prompt, side.codec.block)

    def bits(self, tokens: int, heads: int, key_dim: int, value_dim: int) -> float:
        """Stored bits per element of a layer that holds so many tokens: codes, scales, small tensors, exact tokens.

        Args:
            tokens: held by the layer.
            heads: KV heads.
            key_dim: channels of a key.
            value_dim: channels of a value.
        """
        sides = (self.key, key_dim), (self.value, value_dim)
        total = sum(side.nbits(tokens, heads, head_dim, self.sinks) for side, head_dim in sides)
        return total / (tokens * heads * (key_dim + value_dim))


# ------------------------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class _Method:
    """A family of rivals.

    Attributes:
        what: a line for the help.
        build: from the bits of keys and of values.
        widths: bits that it has.
        bits: of keys and values where none are named.
        sinks: tokens that it keeps at the start, as published.
        hadamard: whether it can be rotated.
    """

    what: str
    build: Callable[[int, int], tuple[Side, Side]]
    widths: tuple[int, ...]
    bits: tuple[int, int]
    sinks: int = 0
    hadamard: bool = False


_Make = Callable[[int], Codec]


def _alike(make: _Make, window: Window, key: int, value: int) -> tuple[Side, Side]:
    return Side(make(key), window), Side(make(value), window)


def _everywhere(make: _Make, window: Window = Window()) -> Callable[[int, int], tuple[Side, Side]]:
    """Keys and values alike."""
    return partial(_alike, make, window)


def _kivi(group: int, residual: int) -> Callable[[int, int], tuple[Side, Side]]:
    def build(key: int, value: int) -> tuple[Side, Side]:
        return (
            Side(PerChannel(key, group), Window("blocks", residual)),
            Side(Grouped(asymmetric, value, group, 2 * SCALE), Window("sliding", residual)),
        )

    return build


def _kvarn(key: int, value: int) -> tuple[Side, Side]:
    window = Window("blocks", 128)
    return Side(VarianceNormalised(key, "channel"), window), Side(VarianceNormalised(value, "token"), window)


_ANY: Final = (8, 6, 5, 4, 3, 2)
_HUGGING_FACE: Final = Window("after-prompt", 128)
_METHODS: Final[Mapping[str, _Method]] = {
    "paper": _Method(
        "DecoQuant as published, n = 2, frozen after the prompt", _everywhere(Factors), _ANY, (4, 4)
    ),
    "paper-n3": _Method(
        "the same with n = 3", _everywhere(partial(Factors, before=(4,))), _ANY, (4, 4)
    ),
    "paper-n4": _Method(
        "the same with n = 4", _everywhere(partial(Factors, before=(4, 4))), _ANY, (4, 4)
    ),
    "rtn": _Method(
        "round to nearest, symmetric, one scale for each token",
        _everywhere(lambda bits: Grouped(symmetric, bits, None, SCALE)), _ANY, (4, 4), hadamard=True,
    ),
    "q4_0": _Method(
        "llama.cpp, blocks of 32", _everywhere(lambda bits: Grouped(llama_cpp, bits, 32, SCALE)), (4,), (4, 4),
        hadamard=True,
    ),
    "q8_0": _Method(
        "llama.cpp, blocks of 32", _everywhere(lambda bits: Grouped(llama_cpp, bits, 32, SCALE)), (8,), (8, 8),
        hadamard=True,
    ),
    "kivi": _Method("KIVI, groups of 32, residual 128", _kivi(32, 128), _ANY, (2, 2)),
    "kivi-r32": _Method("KIVI, groups of 32, residual 32", _kivi(32, 32), _ANY, (2, 2)),
    "kivi-g64": _Method("KIVI, groups of 64, residual 128", _kivi(64, 128), _ANY, (2, 2)),
    "kivi-g128": _Method("KIVI, groups of 128, residual 128", _kivi(128, 128), _ANY, (2, 2)),
    "quanto": _Method(
        "Hugging Face's QuantizedCache with quanto, groups of 64, residual 128",
        _everywhere(lambda bits: Grouped(asymmetric, bits, 64, 2 * SCALE), _HUGGING_FACE), (4, 2), (4, 4),
    ),
    "hqq": _Method(
        "Hugging Face's QuantizedCache with HQQ, groups of 64, residual 128",
        _everywhere(lambda bits: Grouped(half_quadratic, bits, 64, 2 * SCALE), _HUGGING_FACE), (8, 4, 3, 2), (4, 4),
    ),
    "turboquant": _Method(
        "like TurboQuant: rotation, Lloyd-Max codebook, one norm for each token and head",
        _everywhere(lambda bits: Grouped(normalised_lloyd_max, bits, 2**30, SCALE, rotated=True)),
        (5, 4, 3, 2), (4, 4),
    ),
    "kvarn": _Method("like KVarN, tiles of 128 tokens, first tile and tail exact", _kvarn, _ANY, (4, 2), sinks=128),
}  # fmt: skip

STANDARD: Final = (
    "paper:4", "paper:4+window", "paper-n3:4", "paper-n4:4", "rtn:4", "q4_0", "q4_0+hadamard", "q8_0", "q8_0+hadamard",
    "kivi:2", "kivi:3", "kivi:4", "kivi:8", "kivi-r32:4", "kivi-g128:4", "kivi-g128:4+sinks", "kivi:2+sinks",
    "quanto:4", "hqq:4", "turboquant:4", "turboquant:4+window", "turboquant:3+window", "kvarn:K4V2",
    "kvarn:K4V2+window",
)  # fmt: skip
"""What ``--methods all`` runs."""

_PATTERN: Final = re.compile(r"(?P<family>[\w-]+)(?::(?P<bits>\w+))?(?P<modifiers>(?:\+\w+)*)")


def describe() -> dict[str, str]:
    """A line about each family of rivals, by name."""
    return {name: method.what for name, method in _METHODS.items()}


def widths(text: str) -> tuple[int, int]:
    """Bits of keys and of values from ``4`` or ``K4V2``.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"[kK](\d{1,2})[vV](\d{1,2})|(\d{1,2})", text)
    if not found:
        raise ValueError(f"{text!r} is no width: expected bits such as 4, or K4V3 for keys and values apart")
    key, value, both = found.groups()
    return (int(both), int(both)) if both else (int(key), int(value))


def parse(text: str) -> Rival:
    """A rival from its name, ``family[:bits][+modifier]...``.

    Raises:
        ValueError: no such rival; the message says what there is.
    """
    found = _PATTERN.fullmatch(text)
    if not found or found["family"] not in _METHODS:
        raise ValueError(
            f"{text!r} is no method: expected FAMILY[:BITS][+hadamard][+sinks][+window] with FAMILY of "
            f"{', '.join(_METHODS)}"
        )
    method = _METHODS[found["family"]]
    bits = widths(found["bits"]) if found["bits"] else method.bits
    if wrong := set(bits) - set(method.widths):
        raise ValueError(
            f"{text!r}: {found['family']} has no {min(wrong)} bits, only {', '.join(map(str, method.widths))}"
        )
    key, value = method.build(*bits)
    rival = Rival(text, key, value, method.sinks)
    for modifier in found["modifiers"].split("+")[1:]:
        if modifier == "hadamard" and method.hadamard:
            rival = replace(rival, key=_rotated(rival.key), value=_rotated(rival.value))
        elif modifier == "sinks":
            rival = replace(rival, sinks=SINKS)
        elif modifier == "window":
            window = Window("sliding", RECENT)
            key, value = replace(rival.key, window=window), replace(rival.value, window=window)
            rival = replace(rival, key=key, value=value, sinks=SINKS)
        else:
            raise ValueError(
                f"{text!r}: +{modifier} is no modifier of {found['family']}: expected "
                f"{'+hadamard, ' if method.hadamard else ''}+sinks or +window"
            )
    return rival


def _rotated(side: Side) -> Side:
    assert isinstance(side.codec, Grouped)
    return replace(side, codec=replace(side.codec, rotated=True))
