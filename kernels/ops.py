"""The operators ``torch.ops.decoquant.*``: schemas, fake implementations, dispatch.

The version in each name is part of the stored format: torch's compile caches know an operator by its name alone, so a
changed schema or state needs a new one.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from decoquant_compile._compat import inline_when_traced
from decoquant_compile.kernels import cpu, reference, triton
from decoquant_compile.kernels.format import Format

_LIBRARY: Final = torch.library.Library("decoquant", "DEF")

_STORE: Final = (
    "store_v4(Tensor(a!) state, Tensor new, Tensor positions, Tensor? query, Tensor? mask, SymInt slots, SymInt shift,"
    " SymInt first, str format, Tensor? rows=None) -> ()"
)
_ATTEND: Final = (
    "attend_v4(Tensor query, Tensor key_state, Tensor value_state, Tensor key, Tensor value, Tensor positions,"
    " Tensor? mask, float? scale, float? softcap, SymInt slots, SymInt first, SymInt length,"
    " str key_format, str value_format, Tensor? sink=None, SymInt? sequences=None) -> Tensor"
)
_DEQUANTISE: Final = (
    "dequantise_v4(Tensor state, SymInt batch, SymInt heads, SymInt slots, str format, Tensor? after=None) -> Tensor"
)

_STRETCH: Final = (
    "dequantise_stretch_v5(Tensor state, SymInt batch, SymInt heads, SymInt slots, SymInt first, SymInt length,"
    " str format, Tensor? after=None, Tensor? start=None) -> Tensor"
)

_TURN: Final = _STORE.replace("store_v4(Tensor(a!) state", "store_in_turn_v1(Tensor state").replace(
    "Tensor? rows=None) -> ()", "Tensor? rows, Tensor[] others) -> Tensor"
)

_AFTER: Final = "after_v1(Tensor tensor, Tensor[] others) -> Tensor"


def _store(
    state: Tensor,
    new: Tensor,
    positions: Tensor,
    query: Tensor | None,
    mask: Tensor | None,
    slots: int,
    shift: int,
    first: int,
    format: str,  # noqa: A002
    rows: Tensor | None = None,
) -> None:
    reference.store(state, new, positions, query, mask, slots, shift, first, Format.parse(format), rows)


def _attend(
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
    key_format: str,
    value_format: str,
    sink: Tensor | None = None,
    sequences: int | None = None,
) -> Tensor:
    return reference.attend(
        query, key_state, value_state, key, value, positions, mask, scale, softcap, slots, first, length,
        Format.parse(key_format), Format.parse(value_format), sink, sequences,
    )  # fmt: skip


def _stretch(
    state: Tensor,
    batch: int,
    heads: int,
    slots: int,
    first: int,
    length: int,
    format: str,  # noqa: A002
    after: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    del after
    first += 0 if start is None else int(start)
    return reference.dequantise(state, batch, heads, slots, Format.parse(format), first, length)


def _whole(stretch: Callable[..., Any]) -> Callable[..., Any]:
    """What does with all slots as `stretch` does with some."""

    def run(
        state: Tensor,
        batch: int,
        heads: int,
        slots: int,
        format: str,  # noqa: A002
        after: Tensor | None = None,
    ) -> Any:
        return stretch(state, batch, heads, slots, 0, slots, format, after)

    return run


def _store_fake(*_args: object, **_kwargs: object) -> None:
    """A write has no result."""


def _attend_fake(query: Tensor, *args: object, **_kwargs: object) -> Tensor:
    value_format = args[12]  # a sink may follow
    assert isinstance(value_format, str)
    return query.new_empty((*query.shape[:3], Format.parse(value_format).head_dim))


def _stretch_fake(state: Tensor, batch: int, heads: int, _slots: int, _first: int, length: int, *rest: Any) -> Tensor:
    form = Format.parse(rest[0])
    return state.new_empty((batch, heads, length, form.head_dim), dtype=form.dtype)


def _store_in_turn(state: Tensor, *args: Any) -> Tensor:
    *rest, _others = args
    store(state, *rest)
    return state.new_zeros(1)


def _store_in_turn_fake(state: Tensor, *_args: object) -> Tensor:
    return state.new_empty(1)


def _after(tensor: Tensor, _others: Sequence[Tensor]) -> Tensor:
    return tensor.clone()


def _native_or(portable: Callable[..., Any], method: str) -> Callable[..., Any]:
    """The C++ kernel of that name, or `portable` where the kernels cannot be built."""

    def run(*args: object) -> Any:
        native = cpu.kernels()
        return (portable if native is None else getattr(native, method))(*args)

    return run


def _store_triton(
    state: Tensor,
    new: Tensor,
    positions: Tensor,
    query: Tensor | None,
    mask: Tensor | None,
    slots: int,
    shift: int,
    first: int,
    format: str,  # noqa: A002
    rows: Tensor | None = None,
) -> Callable[..., None] | None:
    """As `_attend_triton`."""
    writes, form = triton.writes(), Format.parse(format)
    if writes is None or writes.unserved(state, new, query, mask, form) is not None:
        return None
    return lambda **wrap: writes.store(state, new, positions, query, mask, slots, shift, first, form, rows, **wrap)


def _attend_triton(*args: Any) -> Callable[..., Tensor] | None:
    """Launches that do what `_attend` does with such arguments, given how to wrap a kernel; None: there are none."""
    query, _, _, key, value, *_ = args
    sink, sequences = (*args[14:], None, None)[:2]
    launches, forms = triton.launches(), [Format.parse(form) for form in args[12:14]]
    if launches is None or not launches.serves(query, key, value, *forms):
        return None
    return lambda **wrap: launches.attend(*args[:12], *forms, sink=sink, sequences=sequences, **wrap)


def _stretch_triton(*args: Any) -> Callable[..., Tensor] | None:
    """As `_attend_triton`."""
    start = args[8] if len(args) > 8 else None
    launches, form = triton.launches(), Format.parse(args[6])
    if launches is None or form.head_dim > launches.HEAD_DIM_MAX:
        return None
    return lambda **wrap: launches.dequantise(*args[:4], form, *args[4:6], start, **wrap)


def _is_static(args: Sequence[Any]) -> bool:
    """Whether all sizes are constant: launches are laid out by them, and a size that was made one would be a guard.

    Where one is not, the operator stays whole in the compiled graph and launches when it runs. The size of a state, the
    only tensor of bytes, is always symbolic, and not looked at.
    """
    sizes = [n for x in args if isinstance(x, Tensor) and x.dtype != torch.uint8 for n in x.shape]
    return all(type(n) is not torch.SymInt for n in (*args, *sizes))


def _register(
    schema: str,
    portable: Callable[..., Any],
    fake: Callable[..., Any],
    serve: Callable[..., Callable[..., Any] | None],
    *,
    placed: bool = True,
) -> None:
    """An operator with kernels of its own on CPUs and, where launches serve, on GPUs; `portable` runs everywhere else.

    If it is to be `placed`, Inductor sees the launches and places them if all sizes are constant.
    """
    name = schema.partition("(")[0]
    # Any strides will do: else Inductor makes a copy of each argument that it has not laid out yet, at each use.
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    _LIBRARY.impl(name, portable, "CompositeExplicitAutograd")
    torch.library.register_fake(f"decoquant::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, _native_or(portable, name.rpartition("_")[0]), "CPU")

    def run(*args: Any) -> Any:
        launch = serve(*args)
        return portable(*args) if launch is None else launch(wrap=lambda kernel: kernel)

    def inline(*args: Any) -> Any:
        launch = serve(*args) if args[0].device.type == "cuda" and _is_static(args) else None
        return NotImplemented if launch is None else launch()

    _LIBRARY.impl(name, run, "CUDA")
    if placed:
        inline_when_traced(f"decoquant::{name}", inline, _LIBRARY)


for _schema, _run, _fake in ((_TURN, _store_in_turn, _store_in_turn_fake), (_AFTER, _after, _after)):
    _LIBRARY.define(_schema, tags=(torch.Tag.flexible_layout,))
    _LIBRARY.impl(_schema.partition("(")[0], _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"decoquant::{_schema.partition('(')[0]}", _fake, lib=_LIBRARY)
_register(_STORE, _store, _store_fake, _store_triton)
_register(_ATTEND, _attend, _attend_fake, _attend_triton)
_register(_DEQUANTISE, _whole(_stretch), _whole(_stretch_fake), _whole(_stretch_triton))
_register(_STRETCH, _stretch, _stretch_fake, _stretch_triton, placed=False)

store: Final = torch.ops.decoquant.store_v4.default
"""`reference.store` with the format as a key."""
attend: Final = torch.ops.decoquant.attend_v4.default
"""`reference.attend` with the formats as keys."""
dequantise: Final = torch.ops.decoquant.dequantise_v4.default
"""`reference.dequantise` with the format as a key. `after` is not read: a compiler that reorders cannot rebuild a cache
before `after` has been computed, while nothing needs it yet."""
dequantise_stretch: Final = torch.ops.decoquant.dequantise_stretch_v5.default
"""The slots ``[first + start, first + start + length)`` of `dequantise`, zeros where there is none; `start` is an int64
tensor of one element, known when it runs. Nothing is asked of `slots` and `first` when it is traced: a graph may take
both as numbers that no shape depends on."""
store_in_turn: Final = torch.ops.decoquant.store_in_turn_v1.default
"""`store` where a graph writes to a state more than once, once `others` have been computed; gives a token of the write.

It hides that it writes: a compiler that knew would copy the state for each write but one. So tokens alone order it:
whoever reads the state later must be `after` the token, and a token of the last write must be a result.
"""
after: Final = torch.ops.decoquant.after_v1.default
"""A copy of a tensor that cannot be made before `others` have been computed."""
