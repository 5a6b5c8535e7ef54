"""Tiny random models: Hugging Face's with their static cache, and hand-written ones with buffers.

Weights are large enough for peaked attention: what a token attends to moves its logits by whole standard deviations.
"""

import torch
import transformers
from torch import nn
from torch.nn import functional as F

VOCAB = 97
SLIDING_WINDOW = 24


def hugging_face(name, attention="sdpa", **changes):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": 1,
    } | changes
    whole = {name: size for name, size in sizes.items() if name not in ("num_key_value_heads", "head_dim")}
    config = {
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "qwen3": lambda: transformers.Qwen3Config(**sizes),
        "mistral": lambda: transformers.MistralConfig(**sizes, sliding_window=SLIDING_WINDOW),
        "gemma2": lambda: transformers.Gemma2Config(
            **{"attn_logit_softcapping": 2.0} | sizes,  # as 50 is to real models: it must bend these logits
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=16,
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **sizes,
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=64,
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**whole),
        "opt": lambda: transformers.OPTConfig(**whole, ffn_dim=64, word_embed_proj_dim=64, init_std=0.2),
        "deepseek_v3": lambda: transformers.DeepseekV3Config(
            **whole,
            num_key_value_heads=4,
            kv_lora_rank=32,
            q_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            first_k_dense_replace=2,
        ),
        "bloom": lambda: transformers.BloomConfig(**whole),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **sizes,
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
        "granite_swa": lambda: transformers.AutoConfig.for_model(
            "granite_swa",
            **whole,
            num_key_value_heads=2,
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        ),
    }[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for module in model.modules():
        if hasattr(module, "sinks"):
            nn.init.normal_(module.sinks, mean=2.0)
    return model


def prompts(*shape, seed=0):
    """Random tokens, none of them padding."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


class BufferAttention(nn.Module):
    """Attention over buffers of the module, as in gpt-fast ("put") or in Meta's first Llama ("slice")."""

    def __init__(self, width, heads, kv_heads, slots, form):
        super().__init__()
        self.heads, self.kv_heads, self.form = heads, kv_heads, form
        self.head_dim = width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        shape = (1, kv_heads, slots, self.head_dim) if form == "put" else (1, slots, kv_heads, self.head_dim)
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))

    def forward(self, x, mask, positions, start):
        batch, tokens, _ = x.shape
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (t.view(batch, tokens, -1, self.head_dim) for t in self.qkv(x).split(sizes, -1))
        q = q.transpose(1, 2)
        if self.form == "put":
            self.k_cache[:, :, positions] = k.transpose(1, 2)
            self.v_cache[:, :, positions] = v.transpose(1, 2)
            k, v = self.k_cache, self.v_cache
        else:
            self.k_cache[:batch, start : start + tokens] = k
            self.v_cache[:batch, start : start + tokens] = v
            k = self.k_cache[:batch, : start + tokens].transpose(1, 2)
            v = self.v_cache[:batch, : start + tokens].transpose(1, 2)
            mask = mask[..., : start + tokens]
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class BufferModel(nn.Module):
    """A decoder whose caches are buffers; `forward(ids, positions, start)` with `start` the first position."""

    def __init__(self, form, slots=96, width=64, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, width)
        self.place = nn.Embedding(slots, width)
        self.layers = nn.ModuleList(BufferAttention(width, 4, 2, slots, form) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(slots, slots, dtype=torch.bool)))
        for layer in self.layers:
            nn.init.normal_(layer.qkv.weight, std=0.2)
            nn.init.normal_(layer.out.weight, std=0.2)

    def forward(self, ids, positions, start):
        x = self.embed(ids) + self.place(positions)
        mask = self.mask[None, None, positions]
        for layer in self.layers:
            x = x + layer(self.norm(x), mask, positions, start)
        return self.head(self.norm(x))


SLOTS, WIDTH, HEADS, KV_HEADS, CHANNELS = 96, 64, 4, 2, 16


def rotated(x, places):
    """Rotary embedding of [..., tokens, channels]."""
    angle = places[:, None] * 10 ** -torch.linspace(0, 2, x.shape[-1] // 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class CacheLayer(nn.Module):
    """Attention over buffers [batch, heads, slots, channels], or with their dims in another order.

    `write(cache, positions, tokens)` puts tokens, in the cache's order, into it; `read(layer, q, keys, values, mask)`
    attends.
    """

    def __init__(self, read, order=(0, 1, 2, 3), write=None, batch=1):
        super().__init__()
        self.read, self.order, self.write = read, order, write
        self.back = [order.index(d) for d in range(4)]
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * CHANNELS, bias=False)
        self.up = nn.Linear(2 * KV_HEADS * CHANNELS, 2 * HEADS * CHANNELS, bias=False)
        self.out = nn.Linear(HEADS * CHANNELS, WIDTH, bias=False)
        for linear in (self.qkv, self.up, self.out):
            nn.init.normal_(linear.weight, std=0.2)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(batch, KV_HEADS, SLOTS, CHANNELS).permute(order).contiguous())

    def forward(self, x, positions, mask):
        split = self.qkv(x).view(*x.shape[:2], -1, CHANNELS).transpose(1, 2).split([HEADS, KV_HEADS, KV_HEADS], 1)
        q, *new = split
        for cache, tokens in zip((self.keys, self.values), new, strict=True):
            if self.write is None:
                cache.index_copy_(self.order.index(2), positions, tokens.permute(self.order))
            else:
                self.write(cache, positions, tokens.permute(self.order))
        keys, values = (cache.permute(self.back)[: x.shape[0]] for cache in (self.keys, self.values))
        y = self.read(self, rotated(q, positions), keys, values, mask)
        return self.out(y.transpose(1, 2).flatten(2))


class CacheModel(nn.Module):
    """Some layers; `forward(ids, positions)`."""

    def __init__(self, read, layers=2, **how):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(97, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(CacheLayer(read, **how) for _ in range(layers))

    def forward(self, ids, positions):
        x = self.embed(ids)
        mask = torch.arange(SLOTS) <= positions[:, None]
        for layer in self.layers:
            x = x + layer(self.norm(x), positions, mask)
        return self.norm(x)

    @property
    def caches(self):
        return [cache for layer in self.layers for cache in (layer.keys, layer.values)]


def steps(ids, chunks):
    """The calls that feed `ids` in chunks."""
    at = 0
    for tokens in ids.split(chunks, 1):
        yield tokens, torch.arange(at, at + tokens.shape[1])
        at += tokens.shape[1]
