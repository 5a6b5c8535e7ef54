"""What a user can ask for: one frozen, validated `Options`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from decoquant_compile import _compat
from decoquant_compile.allocate import Holding, allocate

BITS = (16, 8, 5, 4, 3, 2)


@dataclass(frozen=True)
class Options:
    """Options of the backend; each is a plain name in `torch.compile(options={...})` and in `enable(...)`.

    Attributes:
        bits: bits per stored element of keys and values: 8, 5, 4, 3 or 2; 16 takes the same path without quantising
            (values stay in the cache's own dtype). Any other number between 2 and 8, such as 3.2 or 4.0, is an average
            over the elements of all caches of the model, whose widths then differ (`decoquant_compile.allocate`).
        key_bits: bits of keys, if they differ from `bits`.
        value_bits: bits of values, if they differ from `bits`.
        sinks: tokens at the start of each sequence that stay in the cache's own dtype.
        window: newest tokens of each sequence that stay in the cache's own dtype.
        max_rewrites: rewrite at most so many attentions per graph, to bisect a wrong result; None for all.
        averages: whether `bits` is an average, so that widths differ from cache to cache; tells 4.0, an average, from
            the equal number 4. Not an option.
    """

    bits: int | float = 4
    key_bits: int | None = None
    value_bits: int | None = None
    sinks: int = 4
    window: int = 64
    max_rewrites: int | None = None
    averages: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "averages", _is_average(self.bits))
        for name in ("bits", "key_bits", "value_bits"):
            value = getattr(self, name)
            if value is None and name != "bits":
                continue
            if name == "bits" and self.averages:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value not in BITS:
                average = ", or an average such as 3.2" if name == "bits" else ""
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(str, BITS))}{average}")
        if self.averages and (self.key_bits is not None or self.value_bits is not None):
            raise ValueError(
                f"bits={self.bits!r} is an average over keys and values: leave out key_bits and value_bits, "
                f"or give bits as one of {', '.join(map(str, BITS))}"
            )
        for name in ("sinks", "window", "max_rewrites"):
            value = getattr(self, name)
            if value is None and name == "max_rewrites":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r}: expected a whole number, 0 or more")
        if self.window < 1:
            raise ValueError(f"window={self.window!r}: expected at least 1, the newest token is always exact")

    def widths(self, holdings: Sequence[Holding]) -> list[int]:
        """Bits per stored element of each cache tensor of a model."""
        if self.averages:
            return allocate(holdings, self.bits)
        chosen = {"key": self.key_bits, "value": self.value_bits}
        return [int(self.bits if (own := chosen[holding.role]) is None else own) for holding in holdings]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all options."""
        return tuple(f.name for f in fields(cls) if f.init)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> tuple[Self, dict[str, Any]]:
        """Split what `torch.compile` passes into our options and patches of Inductor's configuration.

        Raises:
            ValueError: an option is neither ours nor Inductor's, a value is not valid, or the mode is unknown.
        """
        patches: dict[str, Any] = {}
        if mode is not None:
            try:
                patches.update(_compat.mode_options(mode))
            except RuntimeError as error:
                raise ValueError(f"mode={mode!r}: {error}") from error
        own: dict[str, Any] = {}
        known = _compat.inductor_options()
        for name, value in (options or {}).items():
            if name in cls.names():
                own[name] = value
            elif name.replace("-", "_") in known:
                patches[name.replace("-", "_")] = value
            else:
                raise ValueError(
                    f"option {name!r} is not known: expected one of {', '.join(cls.names())}, "
                    "or an option of Inductor (torch._inductor.list_options())"
                )
        return cls(**own), patches


def _is_average(bits: object) -> bool:
    if isinstance(bits, bool) or not isinstance(bits, int | float) or (isinstance(bits, int) and bits in BITS):
        return False
    return 2 <= bits <= 8
