"""A packed cache in a safetensors file: the prompt of another day, without its prefill."""

import json
import math
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from decoquant_compile.dims import Stacking
from decoquant_compile.handle import CacheTensor, Parts, adopt, handle_of, settle, stack_of, stretch_of
from decoquant_compile.kernels.format import NO_EPOCH, SET, START, UNSET, Format
from decoquant_compile.kernels.state import CacheState, GrowingState
from decoquant_compile.members import members
from decoquant_compile.takeover import holds_tensors, obstacle

T = TypeVar("T")

VERSION: Final = 1
"""Of the file's own layout; the format of the states has its own version, in their keys."""

_STACK: Final = "stack"
"""Stands where the key of a format stands otherwise."""

_NUMBERS = (bool, int, float)
_OPAQUE = (str, bytes, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def save(cache: object, path: str | os.PathLike[str]) -> None:
    """Write a packed cache to a safetensors file: its packed states as they are, its other tensors and its numbers.

    The file is as large as `nbytes(cache).total` and a header of 1 or 2 KB a layer. A cache is as long as it was made,
    filled or not: for a file that tracks the prompt, make it with little more room than the prompt needs.

    Args:
        cache: a Hugging Face `Cache`, a list or dictionary of cache tensors, or any object that holds them in
            containers and attributes.
        path: of the file; an existing one is replaced.

    Raises:
        TypeError: a tensor stands where it has no name: in a set, or under a key that is not a string or a number.
        ValueError: nothing in the cache is packed, or a tensor stands in two places, or is a view of a packed one.
    """
    tensors: dict[str, Tensor] = {}
    layout: dict[str, Any] = {"places": {}, "packed": {}, "numbers": {}}
    seen: dict[int, str] = {}
    for place in _places(cache):
        value = place.value
        if isinstance(value, Tensor):
            if (other := seen.setdefault(id(value), place.name)) != place.name:
                raise ValueError(f"{other} and {place.name} are one tensor, which a file cannot express")
            if settle(value):
                if value._root is not None:
                    raise ValueError(f"{place.name} is a view of a packed cache; save the whole cache")
                layout["packed"][place.name], value = _described(value)
            tensors[place.name] = value.detach().contiguous()
        elif type(value) in _NUMBERS:
            layout["numbers"][place.name] = value
        elif isinstance(value, torch.dtype | torch.device):
            layout["numbers"][place.name] = [type(value).__name__, str(value).removeprefix("torch.")]
        else:
            continue
        layout["places"][place.name] = [place.parent, place.key, place.is_item]
    if not layout["packed"]:
        raise ValueError(
            "the cache holds no packed tensor: decode with it under the compiled model first; "
            "torch.save is for caches that are not packed"
        )
    save_file(tensors, path, {"decoquant_compile": str(VERSION), "layout": json.dumps(layout)})


def _described(handle: CacheTensor) -> tuple[list[Any], Tensor]:
    """What is to be known of a whole handle besides its bytes, and these."""
    if (parts := handle._parts) is not None:
        about, content = zip(*(_described(part) for part in parts.handles), strict=True)
        return [_STACK, parts.stacking.axes, parts.stacking.counts, about], torch.cat(content)
    state, shown = handle.states()[0], list[int]()
    if (stretch := stretch_of(handle, handle._dims)) is not None:  # of a growing cache
        alone = stretch.copied()
        state, shown = alone.state, [alone.first, alone.length]
    return [state.format.key(), state.batch, state.heads, state.slots, handle._dims, *shown], state.buffer


def load(cache: T, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> T:
    """Put a saved cache into a fresh one of the same kind and size.

    Packed tensors come back packed: no dense tensor is allocated. A cache that allocates its tensors at first use, as
    Hugging Face's do, may be given before or after it has.

    Args:
        cache: made as the saved one was, such as ``StaticCache(config=config, max_cache_len=...)``.
        path: of a file that `save` wrote.
        device: where the tensors go.

    Returns:
        The same object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a file of `save`, one of another version or damaged, or the cache does not fit it. The cache is
            unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no saved cache at {path}")
    try:
        with safe_open(path, "pt") as file:
            layout = _layout(file.metadata() or {}, path)
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a saved cache, or damaged: {error}") from None
    parents = dict(_objects(cache))
    found = {place.name: place.value for place in _places(cache)}
    for name, value in found.items():
        if name not in layout["places"] and (isinstance(value, Tensor) or type(value) in _NUMBERS):
            raise ValueError(f"this cache has {name}, the file has not; make it as the saved one was made")
    puts = []
    try:
        for name, (parent, key, is_item) in layout["places"].items():
            if parent not in parents:
                raise ValueError(f"the file has {name}, this cache has not; make it as the saved one was made")
            if name in content:
                new: Any = _unpacked(content[name], layout["packed"].get(name), device)
            else:
                new = _number(layout["numbers"][name], device)
            _check_fit(name, found.get(name), new)
            puts.append((parents[parent], key, is_item, found.get(name), new))
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for owner, key, is_item, old, new in puts:
        _put(owner, key, is_item, old, new)
    return cache


@dataclass(frozen=True)
class _Place:
    """Where a value stands: the item or attribute `key` of the object that is named `parent`."""

    parent: str
    key: str | int
    is_item: bool
    value: object

    @property
    def name(self) -> str:
        """Such as ``layers[0].keys``."""
        return f"{self.parent}[{self.key!r}]" if self.is_item else f"{self.parent}.{self.key}".removeprefix(".")


def _objects(root: object) -> Iterator[tuple[str, object]]:
    """Every object with members that is reachable from an object, once each, with its name; "" is the object itself."""
    seen: dict[int, object] = {}  # keeps what a property made alive, so that an id stays its own
    stack = [("", root)]
    while stack:
        name, item = stack.pop()
        if id(item) in seen or isinstance(item, Tensor):
            continue
        seen[id(item)] = item
        yield name, item
        stack.extend((place.name, place.value) for place in _members(name, item))


def _places(root: object) -> Iterator[_Place]:
    """Every member of every object that is reachable from an object."""
    for name, item in _objects(root):
        yield from _members(name, item)


def _members(name: str, item: object) -> Iterator[_Place]:
    if isinstance(item, _OPAQUE):
        return
    found = list(members(item))
    if (nameless := [member.value for member in found if member.key is None]) and holds_tensors(nameless):
        raise TypeError(f"a {type(item).__name__} in the cache holds tensors under no name; use strings or a list")
    yield from (_Place(name, key, is_item, value) for key, is_item, value in found if key is not None)


def _layout(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    version = metadata.get("decoquant_compile")
    if version is None:
        raise ValueError(f"{path} was not written by decoquant_compile.save")
    if version != str(VERSION):
        raise ValueError(f"{path} has version {version}, this package reads version {VERSION}; save it again")
    try:
        layout = json.loads(metadata["layout"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(layout, dict) or not {"places", "packed", "numbers"} <= layout.keys():
        raise ValueError(f"{path} is damaged: its layout is incomplete")
    return layout


def _unpacked(content: Tensor, about: list[Any] | None, device: torch.device | str) -> Tensor:
    """What one tensor of the file stands for; `about` describes it if it is packed."""
    if about is None:
        return content.to(device)
    if about[0] != _STACK:
        return _packed(content, about, device)
    axes, counts, each = about[1:]
    parts, start = list[Tensor](), 0
    for described in each:
        key, batch, heads, slots, *_ = described
        nbytes = _format(key).layout(batch, heads, slots).nbytes
        parts.append(_packed(content.narrow(0, start, nbytes), described, device))
        start += nbytes
    sound = (
        len(axes) == len(counts) > 0
        and all(isinstance(n, int) and n > 0 for n in counts)
        and math.prod(counts) == len(parts)
        and len({(x.shape, x.dtype) for x in parts}) == 1
        and all(isinstance(a, int) and 0 <= a < parts[0].dim() + len(axes) - i for i, a in enumerate(axes))
        and start == content.numel()
    )
    if not sound:
        raise ValueError(f"the file is damaged: {len(parts)} caches along dims {axes} of sizes {counts}")
    return stack_of(Parts(Stacking(tuple(axes), tuple(counts)), tuple(parts)))


def _format(key: str) -> Format:
    try:
        return Format.parse(key)
    except ValueError as error:
        raise ValueError(f"the file's states are of another version of this package, save it again: {error}") from None


def _packed(content: Tensor, about: list[Any], device: torch.device | str) -> Tensor:
    """The handle that one packed cache of the file stands for."""
    key, batch, heads, slots, dims, *shown = about
    first: int = shown[0] if shown else 0
    length: int | None = shown[1] if shown else None
    form = _format(key)
    state = (CacheState if length is None else GrowingState).empty(form, batch, heads, slots, device)
    if content.dtype != torch.uint8 or content.shape != state.buffer.shape:
        raise ValueError(
            f"the file is damaged: a state {key} of {batch} x {heads} x {slots} is uint8 {tuple(state.buffer.shape)}, "
            f"not {content.dtype} {tuple(content.shape)}"
        )
    with torch.inference_mode(mode=False):
        state.buffer.copy_(content)
    _check_indices(state)
    if isinstance(state, GrowingState) and length is not None:
        if not 0 <= first <= first + length <= slots:
            raise ValueError(f"the file is damaged: tokens {first} to {first + length} of {slots}")
        state.end = first + length
    batch_dims, head_dims = (tuple(group) if isinstance(group, list) else group for group in dims[:2])
    return handle_of(state, (batch_dims, head_dims, dims[2], dims[3]), first, length)


def _check_indices(state: CacheState) -> None:
    """The kernels address memory by what a state says: a damaged one must not reach them."""
    sections = state.format.layout(state.batch, state.heads, state.slots).views(state.buffer)
    origin, end = sections.header.tolist()
    sets = sections.scales.shape[1]
    used = sections.epochs[sections.epochs != NO_EPOCH]
    positions = torch.cat((sections.sink_positions.flatten(), sections.window_positions.flatten()))
    sound = (
        0 <= origin <= end <= origin + state.slots
        and bool((used < sets).all())
        and bool(((sections.rows[:, SET] >= UNSET) & (sections.rows[:, SET] < max(sets, 1))).all())
        and bool((sections.rows[:, START] >= UNSET).all())
        and bool(((positions >= UNSET) & (positions < end)).all())
    )
    if not sound:
        raise ValueError("the file is damaged: a packed state refers to tokens or parameters that it does not have")


def _number(value: Any, device: torch.device | str) -> Any:
    if not isinstance(value, list):
        return value
    kind, name = value
    if kind == "device":
        return torch.device(device)
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is not a dtype")
    return dtype


def _check_fit(name: str, old: object, new: Any) -> None:
    """Raise if `new` cannot take the place of `old`, of a cache that was just made."""
    if isinstance(new, Tensor):
        if old is not None and not isinstance(old, Tensor):
            raise ValueError(f"{name} is a tensor in the file and a {type(old).__name__} in this cache")
        if isinstance(old, Tensor) and (old.shape != new.shape or old.dtype != new.dtype):
            raise ValueError(
                f"{name} is {tuple(new.shape)} {new.dtype} in the file and {tuple(old.shape)} {old.dtype} in this cache"
            )
        if isinstance(new, CacheTensor) and isinstance(old, Tensor):
            if old.device != new.device:
                raise ValueError(f"{name} is on {old.device} in this cache; load with device={str(old.device)!r}")
            if reason := obstacle(old, new._dims if new._parts is None else None):
                raise ValueError(f"{name} {reason}; load into a fresh cache")
    elif isinstance(old, _NUMBERS) and old and old != new:
        # A fresh cache has counted nothing yet: what is not zero says how it was made.
        raise ValueError(f"{name} is {new} in the file and {old} in this cache; load into a fresh one of the same size")


def _put(owner: Any, key: str | int, is_item: bool, old: object, new: Any) -> None:
    """Other references to a tensor, and its static address, stay valid: it is changed, not replaced."""
    if isinstance(new, CacheTensor):
        if isinstance(old, Tensor):
            adopt(old, new)
            return
    elif isinstance(new, Tensor) and isinstance(old, Tensor) and old.device == new.device:
        with torch.no_grad():
            old.copy_(new)
        return
    elif type(old) is type(new) and old == new:
        return
    if is_item:
        owner[key] = new
    else:
        setattr(owner, str(key), new)
