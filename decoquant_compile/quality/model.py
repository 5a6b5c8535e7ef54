"""Causal models of Hugging Face, taken apart where measuring needs it: hidden states, and logits from them."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache

_PROBE: Final = 8  # tokens


@dataclass(frozen=True)
class Heads:
    """The cache of one layer.

    Attributes:
        count: of KV heads.
        key_dim: channels of a key.
        value_dim: channels of a value.
    """

    count: int
    key_dim: int
    value_dim: int


class Subject:
    """A causal model under measurement.

    Logits of long windows over a large vocabulary do not fit into memory, hidden states do: the model is split into a
    body, which makes states, and the rest, which makes logits of them. Where a model has no such place, the body is all
    of it and its states are the logits.

    Attributes:
        model: on evaluation, without gradients to be taken.
        attention: the implementation that it runs with: SDPA where it can.
        body: the module whose calls make states; what is compiled.
        vocabulary: number of logits.
        heads: of the layers that have a cache of keys and values, by the layer's place in the cache.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.attention = _attention(model)
        self.body: Any = model.get_decoder()
        ids = torch.arange(_PROBE, device=model.device)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            self.vocabulary: int = logits.shape[-1]
            self._template: Any = None if self.body is model else self.body(input_ids=ids, use_cache=False)
            if not self._agrees(logits):
                self.body, self._template = model, None
            cache = DynamicCache(config=model.config)
            self.body(input_ids=ids, past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers
        self.heads = {
            at: Heads(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
            for at, layer in enumerate(layers)
            if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.dim() == 4
        }
        if not self.heads:
            raise ValueError(f"{type(model).__name__} has no cache of keys and values: nothing to measure")

    def _agrees(self, logits: Tensor) -> bool:
        """Whether the logits of the probe follow from what the body made of it."""
        states = getattr(self._template, "last_hidden_state", None)
        if states is None:
            return False
        try:
            again = self._head(states)
        except (AttributeError, TypeError):  # the rest of the model wants more of its body than an output
            return False
        return again.shape == logits.shape and torch.allclose(again, logits, rtol=1e-3, atol=1e-4)

    def states(self, output: Any) -> Tensor:
        """States from an output of the body, ``[batch, tokens, width]``."""
        found: Tensor = output.logits if self._template is None else output.last_hidden_state
        return found

    def whole(self, ids: Tensor) -> Tensor:
        """States of whole windows without a cache, one window at a time, ``[windows, length, width]``."""
        return torch.cat([self.states(self.body(input_ids=row[None], use_cache=False)) for row in ids])

    def logits(self, states: Tensor) -> Tensor:
        """Logits of states ``[count, width]``, whatever the model does to them (softcapping, scaling) included."""
        return states if self._template is None else self._head(states[None])[0]

    def _head(self, states: Tensor) -> Tensor:
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        answer = type(self._template)(**{**self._template, "last_hidden_state": states})
        with _answering(self.body, answer):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def static_cache(self, batch: int, slots: int) -> Cache:
        """An empty static cache; its tensors are there, as a compiled prefill needs them."""
        cache = StaticCache(config=self.model.config, max_cache_len=slots)
        layers: list[Any] = cache.layers
        like = {"dtype": self.model.dtype, "device": self.model.device}
        for at, heads in self.heads.items():
            key, value = (torch.empty(batch, heads.count, 0, dim, **like) for dim in (heads.key_dim, heads.value_dim))
            layers[at].lazy_initialization(key, value)
        return cache


def _attention(model: PreTrainedModel) -> str:
    for name in ("sdpa", "eager"):
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError):
            continue
        return name
    raise ValueError(f"{type(model).__name__} runs neither with SDPA nor with eager attention")


@contextlib.contextmanager
def _answering(module: torch.nn.Module, answer: object) -> Iterator[None]:
    """While the block is open, calls of `module` return this at once."""
    before = vars(module).get("forward")
    module.forward = lambda *_, **__: answer
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Subject, Any]:
    """A model and its tokenizer.

    Args:
        name: a model of the Hugging Face Hub, a directory, or a GGUF file.
        dtype: of weights and cache.

    Raises:
        OSError: there is no such model.
        ValueError: it is no causal language model with a cache.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if not name.endswith(".gguf"):
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return Subject(model), transformers.AutoTokenizer.from_pretrained(name)
    path = pathlib.Path(name).absolute()
    if not path.is_file():
        raise OSError(f"there is no file {name!r}")
    # In a folder of its own: a configuration or a tokenizer that lies beside the file would take precedence
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / path.name).symlink_to(path)
        unpacked = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=path.name, dtype=dtype, quantization_config=unpacked
        )
        return Subject(model), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
