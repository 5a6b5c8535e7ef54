"""Tiny random models of every decoder and encoder-decoder that transformers maps, made from its own configurations.

Nothing here knows an architecture: a configuration is shrunk by the names of its parameters (`hidden_size`,
`num_experts`, ...), so one that the library adds is tried too.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, StaticCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto

VOCABULARY: Final = 128
SLOTS: Final = 32
_SOURCE_TOKENS: Final = 7

# What a parameter of a configuration may be at most, by its name; the first pattern that fits counts.
_LIMITS: Final[Sequence[tuple[str, int]]] = (
    (r".*_token(_id|_index|s)?", 3),
    (r".*vocab.*", VOCABULARY),
    (r"n_window.*|.*(window|chunk)_(size|len|length)|.*sliding_window(_size)?|local_attention|.*block_size", 8),
    (r".*(max|num|n)_.*position.*|n_ctx|(max_seq|model_max|max|context)_(len|length)", 256),
    (r"(?!max_window).*(layers|n_layer|depth|num_blocks)", 2),
    (r".*(key_value_heads|kv_n_heads|kv_heads|query_groups)", 2),
    (r".*(heads|n_head)", 4),
    (r"index_topk", 4),
    (r".*(rope_head_dim|rotary_dim|dt_rank)", 8),
    (r".*(qk_head_dim)", 24),
    (r".*(head_dim|d_kv|head_size|dim_head|d_head|kv_channels|headdim|state_size|d_state)", 16),
    (r".*experts|zero_expert_num", 4),
    (r".*(per_tok|topk|top_k)", 2),
    (r".*_groups?|.*topk_group", 1),
    (r".*rank", 16),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|hidden_dim|embedding_dim|emb_dim|embed_proj_dim).*", 64),
    (r".*(intermediate_size|ffn|d_?ff|dim_ff|mlp_dim|d_inner|lru_width|feed_forward_size).*", 64),
    (r"query_pre_attn_scalar", 16),
    (r"num_mel_bins", 8),
)
# Of every model: weights large enough for peaked attention.
_COMMON: Final[dict[str, Any]] = {
    "use_cache": True,
    "is_decoder": True,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_HYBRID: Final[dict[str, Any]] = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_indices": [1],
    "block_types": ["recurrent", "attention"],
    "layers_block_type": ["mamba", "attention"],
    "mamba_d_ssm": 128,
    "mamba_dt_rank": 4,
    "mamba_n_heads": 8,
    "use_mamba_kernels": False,
}
# Some parameters depend on each other; the first of these sets of values with which a model runs is taken.
_VARIANTS: Final[Sequence[Mapping[str, Any]]] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 8, "num_experts_per_tok": 2},
    {"head_dim": 16, "num_key_value_heads": 2},
    _HYBRID,
    _HYBRID | {"layer_types": ["mamba", "attention"]},
    {"layer_types": ["full_attention"] * 2},
    {"attention_types": [[["global", "local"], 1]]},
)
_DECODERS: Final = {transformers.AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
_PAIRS: Final = {
    transformers.AutoModelForSeq2SeqLM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    transformers.AutoModelForSpeechSeq2Seq: modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
_PAIRED: Final = ":seq2seq"
_LAYER_SORTS: Final = 6  # a list of more different values than this does not say what sort of layer a layer is


class Unavailable(Exception):  # noqa: N818 - a fact about the library
    """The library has no such model, or not with this attention."""


@dataclass
class _Encoded(BaseModelOutput):
    """What the encoders of the library return."""

    attention_mask: Tensor | None = None
    router_logits: Any = None


class Architecture:
    """One model of the library, tiny and random.

    Attributes:
        model: the model.
        config: the configuration of its decoder.
        paired: it is an encoder-decoder.
        caches: layers of its cache that hold keys; 0 if it has no KV cache.

    Raises:
        Unavailable: the library has no such model, or not with this attention.
    """

    model: nn.Module

    def __init__(self, name: str, attention: str) -> None:
        self.paired = name.endswith(_PAIRED)
        kind = name.removesuffix(_PAIRED)
        classes = (_PAIRS if self.paired else _DECODERS).items()
        model_class = next(auto for auto, mapping in classes if kind in mapping)
        problems: list[str] = []
        for changes in _VARIANTS:
            try:
                config = tiny_config(transformers.CONFIG_MAPPING[kind], **changes)
                self.config = config.get_text_config(decoder=True)
                self.caches = self._try(model_class, config)
            except Exception as error:  # noqa: BLE001 - whatever the library raises is its answer
                problems.append(one_line(error))
                continue
            break
        else:
            raise Unavailable(problems[0])
        if self.paired and not config.is_encoder_decoder:
            raise Unavailable("it is no encoder-decoder")
        try:
            self.model = _build(model_class, config, attention)
        except (ValueError, ImportError) as error:
            raise Unavailable(one_line(error)) from None

    def _try(self, model_class: Any, config: PreTrainedConfig) -> int:
        """Run the model, spelled out, and count the layers that its cache got."""
        self.model = _build(model_class, config, "eager")
        if self.paired and not config.is_encoder_decoder:
            return 0
        cache = self.cache("dynamic")
        with torch.no_grad():
            for tokens in (3, 1):
                self.step(self.model, cache, prompts(1, tokens))
        return self.cached(cache)

    def cache(self, kind: str) -> Any:
        """A fresh cache, "static" or "dynamic"."""

        def one(slots: int) -> Any:
            return DynamicCache(config=self.config) if kind == "dynamic" else StaticCache(self.config, slots)

        return EncoderDecoderCache(one(SLOTS), one(_SOURCE_TOKENS)) if self.paired else one(SLOTS)

    def step(self, forward: Callable[..., Any], cache: Any, ids: Tensor) -> Tensor:
        """Logits ``[batch, tokens, vocabulary]`` of `ids` ``[batch, tokens]`` after what the cache holds."""
        if not self.paired:
            return forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
        generator = torch.Generator().manual_seed(1)
        source = torch.randn(len(ids), _SOURCE_TOKENS, self.config.hidden_size, generator=generator)
        encoded = _Encoded(last_hidden_state=source)
        return forward(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True).logits

    @staticmethod
    def cached(cache: Any) -> int:
        """How many of a cache's layers hold keys."""
        parts = (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None))
        layers = [layer for part in parts if part is not None for layer in part.layers]
        return sum(isinstance(keys := getattr(layer, "keys", None), Tensor) and keys.numel() > 0 for layer in layers)


def names() -> list[str]:
    """Model types that the library maps to a causal decoder, as "llama", or to an encoder-decoder, as "t5:seq2seq"."""
    decoders = [name for mapping in _DECODERS.values() for name in mapping]
    pairs = dict.fromkeys(name for mapping in _PAIRS.values() for name in mapping)
    return [*decoders, *(name + _PAIRED for name in pairs)]


def prompts(batch: int, tokens: int) -> Tensor:
    """Random tokens ``[batch, tokens]``, none of them special."""
    return torch.randint(4, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))


def tiny_config(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A configuration of two layers, or of one of each sort, of the least width.

    Args:
        kind: the configuration's class.
        **changes: parameters that it shall have all the same, where it knows them.
    """
    default = kind()
    values = default.to_dict()
    parameters = inspect.signature(kind.__init__).parameters
    layers = values.get(default.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
    sizes: dict[str, Any] = {}
    per_layer: dict[str, Sequence[Any]] = {}
    for name in parameters:
        value = values.get(name)
        if isinstance(value, dict) and isinstance(part := getattr(default, name, None), PreTrainedConfig):
            sizes[name] = tiny_config(type(part))
        elif isinstance(value, list | tuple) and len(value) == layers:
            per_layer[name] = value
        else:
            sizes[name] = _limited(name, value)
    chosen = _of_each_sort(per_layer)
    sizes |= {name: [_limited(name, value[i]) for i in chosen] for name, value in per_layer.items()}
    for name in sizes:
        if re.fullmatch(r"(num_)?(hidden_|decoder_)?(n_)?layers?", name):
            sizes[name] = len(chosen)
    known = {*parameters, *kind.attribute_map}
    # What is not limited is left to the class: a default may follow from what is.
    sizes = {name: value for name, value in sizes.items() if value != values.get(name)}
    return kind(**sizes | {name: value for name, value in (_COMMON | changes).items() if name in known})


def _of_each_sort(per_layer: Mapping[str, Sequence[Any]]) -> list[int]:
    """The first layer of each sort; two layers where there is one sort."""
    telling = [value for value in per_layer.values() if len(set(map(str, value))) <= _LAYER_SORTS]
    sorts: dict[str, int] = {}
    for i, sort in enumerate(zip(*telling, strict=True)):
        sorts.setdefault(str(sort), i)
    return sorted(sorts.values()) if len(sorts) > 1 else [0, 1]


def _limited(name: str, value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return min(value, next((limit for pattern, limit in _LIMITS if re.fullmatch(pattern, name)), value))


def _build(model_class: Any, config: PreTrainedConfig, attention: str) -> Any:
    torch.manual_seed(0)
    return model_class.from_config(config, attn_implementation=attention).eval()


def one_line(error: BaseException) -> str:
    """An error as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
