"""What share of a compile the matcher takes."""

import contextlib
import time
import unittest.mock
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers

from decoquant_compile import _compat, backend
from decoquant_compile.coverage.architectures import SLOTS, VOCABULARY, prompts

LAYERS: Final = 30


@dataclass(frozen=True)
class Share:
    """Seconds of one `torch.compile` of a decoding step, and of our passes in it.

    Attributes:
        cache: "static", or "growing" with dynamic shapes.
        whole: of the first call: Dynamo, our passes, Inductor and its compilers.
        passes: of these, in each of our passes.
    """

    cache: str
    whole: float
    passes: Mapping[str, float]

    @property
    def share(self) -> float:
        """Our part of the whole."""
        return sum(self.passes.values()) / self.whole

    def __str__(self) -> str:
        ours = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.passes.items())
        return f"{LAYERS} layers, {self.cache} cache: {self.whole:.1f} s, of these {ours}: {self.share:.1%}"


def measure(*, growing: bool = False) -> Share:
    """Compile one step of a Llama of 30 narrow layers, with cold caches of Inductor.

    Args:
        growing: on a growing cache, with dynamic shapes; else on a static one.
    """
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = transformers.DynamicCache(config=config) if growing else transformers.StaticCache(config, SLOTS)
    ids = prompts(1, 5)
    torch.compiler.reset()
    spent: dict[str, float] = {}
    with torch.no_grad(), _compat.cold_caches(), contextlib.ExitStack() as stack:
        for name in ("find", "rewrite"):
            stack.enter_context(_timed(name, spent))
        model(input_ids=ids[:, :4], past_key_values=cache)
        compiled = torch.compile(model.forward, backend=backend.decoquant_backend, dynamic=growing or None)
        start = time.perf_counter()
        compiled(input_ids=ids[:, 4:], past_key_values=cache)
        whole = time.perf_counter() - start
    return Share("growing" if growing else "static", whole, spent)


@contextlib.contextmanager
def _timed(name: str, spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds that a pass of the backend takes."""
    function = getattr(backend, name)

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        spent[name] = spent.get(name, 0) + time.perf_counter() - start
        return result

    with unittest.mock.patch.object(backend, name, timed):
        yield
