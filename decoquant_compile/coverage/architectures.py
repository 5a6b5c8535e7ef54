"""Tiny random models of every decoder and encoder-decoder that transformers maps, made from its own configurations.

Nothing here knows an architecture: a configuration is shrunk by the names of its parameters (`hidden_size`,
`num_experts`, ...), so one that the library adds is tried too.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
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
SLIDING_WINDOW: Final = 8
_SOURCE_TOKENS: Final = 7
_HEADS: Final = 4

# What a parameter of a configuration may be at most, by its name; the first pattern that fits counts.
_LIMITS: Final[Sequence[tuple[str, int]]] = (
    (r".*_token(_id|_index|s)?", 3),
    (r".*vocab.*", VOCABULARY),
    (r"n_window.*|.*(window|chunk)_(size|len|length)|.*sliding_window(_size)?|local_attention|.*block_size", SLIDING_WINDOW),
    (r".*(max|num|n)_.*position.*|n_ctx|(max_seq|model_max|max|context)_(len|length)", 256),
    (r"(?!max_window).*(layers|n_layer|depth|num_blocks)", 2),
    (r".*(key_value_heads|kv_n_heads|kv_heads|query_groups)", 2),
    (r".*(heads|n_head)", _HEADS),
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


_PAIRS: Final = (
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)
_HYBRID: Final[Mapping[str, Any]] = {
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "attn_layer_indices": [1], "block_types": ["recurrent", "attention"], "mamba_dt_rank": 4, "use_mamba_kernels": False,
    "layers_block_type": ["mamba", "attention"], "mamba_d_ssm": 128,
}
_VARIANTS: Final[Sequence[Mapping[str, Any]]] = (
    {},
    {"num_key_value_heads": _HEADS},
    {"head_dim": 16, "num_key_value_heads": 2},
    _HYBRID | {"mamba_n_heads": 8},
    _HYBRID | {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8},
    {"layer_types": ["full_attention"] * 2},
    {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256},
    {"num_experts_per_tok": 1},
)


class Unavailable(Exception):  # noqa: N818 - a fact about the library
    """The library has no such model."""


@dataclass
class _Encoded(BaseModelOutput):
    """What any encoder returns."""

    attention_mask: Tensor | None = None
    router_logits: Any = None


def names() -> list[str]:
    """Model types that the library maps to a causal decoder or to an encoder-decoder, as "llama" or "bart-decoder"."""
    decoders = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    pairs = dict.fromkeys(name for mapping in _PAIRS for name in mapping)
    return [*decoders, *(f"{name}:seq2seq" for name in pairs)]


class Architecture:
    """One model of the library, tiny and random.

    Attributes:
        model: the model.
        attention: name of its attention implementation.

    Raises:
        Unavailable: the library has no such model, or not with this attention.
    """

    def __init__(self, name: str, attention: str) -> None:
        kind, _, paired = name.partition(":")
        mappings = _PAIRS if paired else (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,)
        model = next(mapping[kind] for mapping in mappings if kind in mapping)
        model_class = getattr(transformers, model if isinstance(model, str) else model[0])
        problems: list[str] = []
        for changes in _VARIANTS:
            try:
                config = tiny_config(transformers.CONFIG_MAPPING[kind], **changes)
                torch.manual_seed(0)
                # Outside of torch.compile, flex_attention compiles itself at every shape: the trial run goes without.
                trial = "eager" if attention == "flex_attention" else attention
                self.model: nn.Module = model_class._from_config(config, attn_implementation=trial).eval()
                self.config = config.get_text_config(decoder=True)
                self.paired = bool(paired)
                if self.paired and not config.is_encoder_decoder:
                    raise Unavailable("not an encoder-decoder")
                with torch.no_grad():
                    cache = self.cache("dynamic")
                    for size in (3, 1):
                        self.step(self.model, cache, prompts(1, size))
                self.caches = len(cached_layers(cache))
                if trial != attention:
                    self.model = model_class._from_config(config, attn_implementation=attention).eval()
                return
            except Unavailable:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the library raises is its answer
                problems.append(f"{type(error).__name__}: {error}")
        raise Unavailable(problems[0])

    def cache(self, kind: str) -> Any:
        """A fresh cache, "static" or "dynamic"."""

        def one(slots: int) -> Any:
            return DynamicCache(config=self.config) if kind == "dynamic" else StaticCache(self.config, slots)

        return EncoderDecoderCache(one(SLOTS), one(_SOURCE_TOKENS)) if self.paired else one(SLOTS)

    def step(self, forward: Any, cache: Any, ids: Tensor) -> Tensor:
        """Logits of `ids` after what the cache holds."""
        if not self.paired:
            return forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
        generator = torch.Generator().manual_seed(1)
        source = torch.randn(len(ids), _SOURCE_TOKENS, self.config.hidden_size, generator=generator)
        encoded = _Encoded(last_hidden_state=source)
        return forward(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True).logits


def cached_layers(cache: Any) -> list[Any]:
    """The layers of a cache that hold keys."""
    both = (getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None))
    layers = [layer for part in both if part is not None for layer in part.layers]
    return [layer for layer in layers if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel()]


def prompts(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(4, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def tiny_config(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A configuration of two layers, or one of each sort, of the least width.

    Args:
        kind: the configuration's class.
        **changes: parameters that it shall have all the same.
    """
    default = kind()
    values = default.to_dict()
    sizes: dict[str, Any] = {}
    layers = values.get(default.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
    per_layer: dict[str, list[Any]] = {}
    for name in inspect.signature(kind.__init__).parameters:
        value = values.get(name)
        if isinstance(value, dict) and isinstance(part := getattr(default, name, None), PreTrainedConfig):
            sizes[name] = tiny_config(type(part))
        elif isinstance(value, list | tuple) and len(value) == layers:
            per_layer[name] = list(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            sizes[name] = _limited(name, value)
    if layers:
        number = {i: None for i in range(2)}
        if per_layer:
            sorts: dict[str, int] = {}
            for i, sort in enumerate(zip(*per_layer.values(), strict=True)):
                sorts.setdefault(str(sort), i)
            chosen = sorted({*sorts.values(), *([] if len(sorts) > 1 else [0, 1])})
            number = dict.fromkeys(chosen)
            for name, values in per_layer.items():
                sizes[name] = [_limited(name, values[i]) for i in chosen]
        for name in ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "decoder_layers", "num_decoder_layers"):
            if name in sizes:
                sizes[name] = len(number)
    known = {*inspect.signature(kind.__init__).parameters, *kind.attribute_map}
    common = {"use_cache": True, "is_decoder": True, "initializer_range": 0.1, "init_std": 0.1, "pad_token_id": 0}
    common |= {"tie_word_embeddings": False} if "tie_word_embeddings" in known else {}
    sizes |= {name: value for name, value in common.items() if name in known}
    return kind(**sizes | {name: value for name, value in changes.items() if name in known})


def _limited(name: str, value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    limit = next((limit for pattern, limit in _LIMITS if re.fullmatch(pattern, name)), value)
    return min(value, limit)
