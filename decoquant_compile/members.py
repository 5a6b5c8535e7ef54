"""What an object holds: the items of built-in containers, and attributes."""

import types
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple


class Member(NamedTuple):
    """An item or attribute of an object.

    Attributes:
        key: index, key or name; None for what has none: an element of a set, an item under another kind of key.
        is_item: whether it is an item; otherwise an attribute.
        value: what stands there.
    """

    key: str | int | None
    is_item: bool
    value: object


def members(item: object) -> Iterator[Member]:
    """Items first, then attributes, those in slots included."""
    if isinstance(item, dict | types.MappingProxyType):
        for key, value in item.items():
            yield Member(key if isinstance(key, str | int) else None, True, value)
    elif isinstance(item, list | tuple | deque):
        for index, value in enumerate(item):
            yield Member(index, True, value)
    elif isinstance(item, set | frozenset):
        for value in item:
            yield Member(None, True, value)
    attributes = dict(getattr(item, "__dict__", {}))
    for owner in type(item).__mro__:
        slots = owner.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(item, name):
                attributes[name] = getattr(item, name)
    for name, value in attributes.items():
        yield Member(name, False, value)
