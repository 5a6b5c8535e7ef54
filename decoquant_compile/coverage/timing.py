"""What share of a compile the matcher takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers

from decoquant_compile import _compat, backend
from decoquant_compile.coverage.architectures import SLOTS, VOCABULARY, prompts

LAYERS: Final = 30


@dataclass(frozen=True)
class Share:
    """Seconds of one `torch.compile` of a decoding step, and of our part in it.

    Attributes:
        whole: of the first call: Dynamo, our pass, Inductor and its compilers.
        find: of these, in normalising and matching.
        rewrite: of these, in rewriting.
        nodes: of the graph.
    """

    whole: float
    find: float
    rewrite: float
    nodes: int

    @property
    def share(self) -> float:
        """Our part."""
        return (self.find + self.rewrite) / self.whole

    def __str__(self) -> str:
        return (
            f"{LAYERS} layers, {self.nodes} nodes: compile {self.whole:.1f} s, of which normalise and match "
            f"{self.find:.2f} s, rewrite {self.rewrite:.2f} s: {self.share:.1%}"
        )


def measure() -> Share:
    """Compile one step of a Llama of 30 narrow layers on a static cache, with cold caches of Inductor."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = transformers.StaticCache(config, SLOTS)
    ids = prompts(1, 5)
    torch.compiler.reset()
    spent = {"find": 0.0, "rewrite": 0.0}
    nodes = 0

    def count(result: Any) -> None:
        nonlocal nodes
        if result is not None:
            nodes = len(result[0].graph.nodes)

    with torch.no_grad(), _compat.cold_caches(), _timed("find", spent, count), _timed("rewrite", spent):
        model(input_ids=ids[:, :4], past_key_values=cache)
        compiled = torch.compile(model.forward, backend=backend.decoquant_backend)
        start = time.perf_counter()
        compiled(input_ids=ids[:, 4:], past_key_values=cache)
        whole = time.perf_counter() - start
    return Share(whole, spent["find"], spent["rewrite"], nodes)


@contextmanager
def _timed(name: str, spent: dict[str, float], look: Callable[[Any], None] = lambda _: None) -> Iterator[None]:
    """Add up the seconds that a function of the backend takes."""
    function = getattr(backend, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        look(result)
        return result

    setattr(backend, name, timed)
    try:
        yield
    finally:
        setattr(backend, name, function)
