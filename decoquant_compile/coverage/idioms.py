"""Hand-written models: the styles of caches and attention of well-known code, each a decoder of two layers.

Each is an `Idiom`: an attention with its cache, in buffers or handed in and returned, inside the same small decoder.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decoquant_compile.coverage.architectures import SLOTS, VOCABULARY

WIDTH: Final = 64
HEADS: Final = 4
KV_HEADS: Final = 2
HEAD_DIM: Final = WIDTH // HEADS
LAYERS: Final = 2
_SIZES: Final = [n * HEAD_DIM for n in (HEADS, KV_HEADS, KV_HEADS)]


class Call(NamedTuple):
    """What a layer is called with.

    Attributes:
        mask: ``[1, 1, tokens, slots]``, True attends.
        positions: ``[tokens]``, of the call's tokens.
        start: the first of them.
        cache: what the layer returned last, if its cache is no buffer; None before the first call.
    """

    mask: Tensor
    positions: Tensor
    start: int
    cache: Any


Attended: TypeAlias = tuple[Tensor, Any]
"""An attention ``[batch, tokens, heads, head_dim]``, and the cache where it is no buffer."""


class Idiom(nn.Module, ABC):
    """One attention; subclasses write the cache and attend."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, sum(_SIZES), bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def buffers_of(self, *shape: int) -> None:
        """Make the two cache buffers."""
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))

    def forward(self, x: Tensor, call: Call) -> Attended:
        """What the layer adds to `x` ``[batch, tokens, width]``, and its cache."""
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)) for t in self.qkv(x).split(_SIZES, -1))
        y, cache = self.attend(rotary(q, call.positions), rotary(k, call.positions), v, call)
        return self.out(y.flatten(2)), cache

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """Write the new keys and values, and attend to all; tokens come as ``[batch, tokens, heads, head_dim]``."""


def rotary(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions, in pairs of neighbours."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = positions[:, None, None] * frequencies
    even, odd = x[..., ::2], x[..., 1::2]
    rotated = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
    return torch.stack(rotated, -1).flatten(-2)


def _repeat(x: Tensor, dim: int = 1) -> Tensor:
    return x.repeat_interleave(HEADS // KV_HEADS, dim=dim)


def _swap(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


class GptFast(Idiom):
    """Buffers [B, H, S, D], written by index_put at the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers_of(1, KV_HEADS, SLOTS, HEAD_DIM)

    def write(self, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Write [B, H, T, D]; what to attend to."""
        self.k_cache[:, :, call.positions] = k
        self.v_cache[:, :, call.positions] = v
        return self.k_cache, self.v_cache

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        k, v = self.write(k, v, call)
        y = F.scaled_dot_product_attention(q, _repeat(k), _repeat(v), attn_mask=call.mask)
        return y.transpose(1, 2), None


class LitGpt(GptFast):
    """index_copy_ along the slots."""

    def write(self, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """See the class."""
        return self.k_cache.index_copy_(2, call.positions, k), self.v_cache.index_copy_(2, call.positions, v)


class ExecuTorch(GptFast):
    """narrow(...).copy_ at an integer."""

    def write(self, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """See the class."""
        self.k_cache.narrow(2, call.start, k.shape[2]).copy_(k)
        self.v_cache.narrow(2, call.start, k.shape[2]).copy_(v)
        return self.k_cache, self.v_cache


class Scatter(GptFast):
    """scatter_ with an expanded index."""

    def write(self, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """See the class."""
        index = call.positions.view(1, 1, -1, 1).expand_as(k)
        return self.k_cache.scatter_(2, index, k), self.v_cache.scatter_(2, index, v)


class Ring(GptFast):
    """A ring buffer: the places are the positions modulo its length."""

    def write(self, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """See the class."""
        at = call.positions % SLOTS
        return self.k_cache.index_copy_(2, at, k), self.v_cache.index_copy_(2, at, v)


class OneHot(GptFast):
    """A one-hot `where` over the whole cache, as on TPUs."""

    def write(self, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """See the class."""
        if k.shape[2] > 1:
            return super().write(k, v, call)
        here = (torch.arange(SLOTS) == call.positions).view(1, 1, SLOTS, 1)
        self.k_cache.copy_(torch.where(here, k, self.k_cache))
        self.v_cache.copy_(torch.where(here, v, self.v_cache))
        return self.k_cache, self.v_cache


class TorchTune(Idiom):
    """The counter of positions is a buffer of the module; heads expanded by a view."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.buffers_of(1, KV_HEADS, SLOTS, HEAD_DIM)
        self.register_buffer("places", torch.arange(SLOTS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        at = self.places[: k.shape[2]]
        self.k_cache[:, :, at], self.v_cache[:, :, at] = k, v
        self.places.add_(k.shape[2])
        groups = (1, KV_HEADS, HEADS // KV_HEADS, SLOTS, HEAD_DIM)
        k, v = (t.unsqueeze(2).expand(groups).flatten(1, 2) for t in (self.k_cache, self.v_cache))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=call.mask).transpose(1, 2), None


class MetaLlama(Idiom):
    """Buffers [B, S, H, D], slice assignment, the prefix is read, softmax spelled out in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers_of(1, SLOTS, KV_HEADS, HEAD_DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        batch, tokens = q.shape[:2]
        self.k_cache[:batch, call.start : call.start + tokens] = k
        self.v_cache[:batch, call.start : call.start + tokens] = v
        k, v = (_repeat(t[:batch, : call.start + tokens], 2) for t in (self.k_cache, self.v_cache))
        q, k, v = _swap(q, k, v)
        scores = q @ k.transpose(2, 3) / math.sqrt(HEAD_DIM)
        if tokens > 1:
            scores = scores + torch.full((tokens, call.start + tokens), -math.inf).triu(call.start + 1)
        return (F.softmax(scores.float(), -1).type_as(q) @ v).transpose(1, 2), None


class Grouped(Idiom):
    """Buffers [B, S, H, D]; einsum over groups of query heads, nothing is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers_of(1, SLOTS, KV_HEADS, HEAD_DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        self.k_cache[:, call.positions], self.v_cache[:, call.positions] = k, v
        q = q.unflatten(2, (KV_HEADS, -1))
        scores = torch.einsum("btkgd,bskd->bkgts", q, self.k_cache) * HEAD_DIM**-0.5
        weights = torch.where(call.mask[:, :, None], scores, torch.finfo(scores.dtype).min).softmax(-1)
        return torch.einsum("bkgts,bskd->btkgd", weights, self.v_cache).flatten(2, 3), None


class SlotsFirst(Idiom):
    """Buffers [S, B, H, D], as in Megatron."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers_of(SLOTS, 1, KV_HEADS, HEAD_DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        end = call.start + q.shape[1]
        self.k_cache[call.start : end], self.v_cache[call.start : end] = k.transpose(0, 1), v.transpose(0, 1)
        k, v = (_repeat(t.permute(1, 2, 0, 3)) for t in (self.k_cache, self.v_cache))
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=call.mask).transpose(1, 2), None


class KeysTransposed(Idiom):
    """Keys as [B, H, D, S], as the first Bloom and Falcon had them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(1, KV_HEADS, HEAD_DIM, SLOTS))
        self.register_buffer("v_cache", torch.zeros(1, KV_HEADS, SLOTS, HEAD_DIM))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        self.k_cache.index_copy_(3, call.positions, k.transpose(2, 3))
        self.v_cache.index_copy_(2, call.positions, v)
        scores = (q @ _repeat(self.k_cache)) * HEAD_DIM**-0.5
        weights = scores.masked_fill(~call.mask, -math.inf).softmax(-1)
        return (weights @ _repeat(self.v_cache)).transpose(1, 2), None


class Stacked(Idiom):
    """Keys and values in one buffer [2, B, H, S, D], written one after the other."""

    kv_cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kv_cache", torch.zeros(2, 1, KV_HEADS, SLOTS, HEAD_DIM))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        self.kv_cache[0][:, :, call.positions], self.kv_cache[1][:, :, call.positions] = k, v
        k, v = self.kv_cache.unbind(0)
        return F.scaled_dot_product_attention(q, _repeat(k), _repeat(v), attn_mask=call.mask).transpose(1, 2), None


class Paired(Idiom):
    """Keys and values in one buffer [B, 2, S, H, D], written together."""

    kv_cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kv_cache", torch.zeros(1, 2, SLOTS, KV_HEADS, HEAD_DIM))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        end = call.start + q.shape[1]
        self.kv_cache[:, :, call.start : end] = torch.stack((k, v), 1)
        k, v = self.kv_cache[:, :, :end].permute(1, 0, 3, 2, 4)
        mask = call.mask[..., :end]
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2), None


class FlatHeads(Idiom):
    """Buffers [B, S, H * D]: heads come apart when they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers_of(1, SLOTS, KV_HEADS * HEAD_DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        self.k_cache[:, call.positions], self.v_cache[:, call.positions] = k.flatten(2), v.flatten(2)
        k, v = (t.view(*t.shape[:2], KV_HEADS, HEAD_DIM) for t in (self.k_cache, self.v_cache))
        q, k, v = _swap(q, k, v)
        return F.scaled_dot_product_attention(q, _repeat(k), _repeat(v), attn_mask=call.mask).transpose(1, 2), None


class Latent(Idiom):
    """Latents and rotated keys [B, S, C], with the projections absorbed, as in DeepSeek's own code."""

    latents: Tensor
    rotated: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("latents", torch.zeros(1, SLOTS, KV_HEADS * HEAD_DIM))
        self.register_buffer("rotated", torch.zeros(1, SLOTS, HEAD_DIM))
        self.up_keys = nn.Parameter(torch.randn(HEADS, HEAD_DIM, KV_HEADS * HEAD_DIM) / HEAD_DIM)
        self.up_values = nn.Parameter(torch.randn(HEADS, HEAD_DIM, KV_HEADS * HEAD_DIM) / HEAD_DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        end = call.start + q.shape[1]
        self.latents[:, call.start : end], self.rotated[:, call.start : end] = v.flatten(2), k[:, :, 0]
        absorbed = torch.einsum("bshd,hdc->bshc", q, self.up_keys)
        scores = torch.einsum("bshc,btc->bsht", absorbed, self.latents[:, :end])
        scores = (scores + torch.einsum("bshr,btr->bsht", q, self.rotated[:, :end])) * HEAD_DIM**-0.5
        scores = scores.masked_fill(~call.mask[0, :, :, None, :end], -math.inf)
        weights = scores.softmax(-1, dtype=torch.float32).type_as(q)
        mixed = torch.einsum("bsht,btc->bshc", weights, self.latents[:, :end])
        return torch.einsum("bshc,hdc->bshd", mixed, self.up_values), None


class Rolling(Idiom):
    """A window that rolls: the cache moves left, new tokens stand at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers_of(1, KV_HEADS, SLOTS, HEAD_DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        for old, new in ((self.k_cache, k), (self.v_cache, v)):
            old.copy_(torch.cat([old[:, :, new.shape[2] :], new], 2))
        mask = torch.arange(SLOTS) + call.start + k.shape[2] - SLOTS <= call.positions[:, None]
        mask = mask & (torch.arange(SLOTS) >= SLOTS - call.start - k.shape[2])
        y = F.scaled_dot_product_attention(q, _repeat(self.k_cache), _repeat(self.v_cache), attn_mask=mask)
        return y.transpose(1, 2), None


class ReadFirst(Idiom):
    """Attention over what was cached and the new tokens, which are written afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers_of(1, KV_HEADS, SLOTS, HEAD_DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        end = call.start + k.shape[2]
        keys = torch.cat([self.k_cache[:, :, : call.start], k], 2)
        values = torch.cat([self.v_cache[:, :, : call.start], v], 2)
        y = F.scaled_dot_product_attention(q, _repeat(keys), _repeat(values), attn_mask=call.mask[..., :end])
        self.k_cache[:, :, call.start : end], self.v_cache[:, :, call.start : end] = k, v
        return y.transpose(1, 2), None


class NanoGpt(Idiom):
    """Old and new tokens are concatenated and returned as tuples."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        if call.cache is not None:
            k, v = torch.cat([call.cache[0], k], 2), torch.cat([call.cache[1], v], 2)
        y = F.scaled_dot_product_attention(
            q, _repeat(k), _repeat(v), attn_mask=call.mask[..., : call.start + q.shape[2]]
        )
        return y.transpose(1, 2), (k, v)


class FusedGrowing(Idiom):
    """Keys and values side by side in one tensor that grows, as gpt_bigcode's."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        both = torch.cat([k, v], -1)
        if call.cache is not None:
            both = torch.cat([call.cache, both], 2)
        k, v = both.split(HEAD_DIM, -1)
        y = F.scaled_dot_product_attention(
            q, _repeat(k), _repeat(v), attn_mask=call.mask[..., : call.start + q.shape[2]]
        )
        return y.transpose(1, 2), both


class FirstGpt2(Idiom):
    """Keys and values stacked in one tensor that grows, as the first ports of GPT-2 returned them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        if call.cache is not None:
            past_k, past_v = call.cache.unbind(0)
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        y = F.scaled_dot_product_attention(
            q, _repeat(k), _repeat(v), attn_mask=call.mask[..., : call.start + q.shape[2]]
        )
        return y.transpose(1, 2), torch.stack([k, v])


class Functional(Idiom):
    """The updated cache is a new tensor, returned, as for export."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        cache = call.cache
        if cache is None:
            cache = (torch.zeros(1, KV_HEADS, SLOTS, HEAD_DIM), torch.zeros(1, KV_HEADS, SLOTS, HEAD_DIM))
        k, v = cache[0].index_copy(2, call.positions, k), cache[1].index_copy(2, call.positions, v)
        y = F.scaled_dot_product_attention(q, _repeat(k), _repeat(v), attn_mask=call.mask)
        return y.transpose(1, 2), (k, v)


class XTransformers(NanoGpt):
    """Keys are cached without positions and rotated after every read; einsum attention."""

    def forward(self, x: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = (t.unflatten(-1, (-1, HEAD_DIM)) for t in self.qkv(x).split(_SIZES, -1))
        if call.cache is not None:
            k, v = torch.cat([call.cache[0], k], 1), torch.cat([call.cache[1], v], 1)
        end = call.start + x.shape[1]
        q, rotated = rotary(q, call.positions), rotary(k, torch.arange(end))
        scores = torch.einsum("bihd,bjhd->bhij", q, _repeat(rotated, 2)) * HEAD_DIM**-0.5
        weights = scores.masked_fill(~call.mask[..., :end], -torch.finfo(scores.dtype).max).softmax(-1)
        y = torch.einsum("bhij,bjhd->bihd", weights, _repeat(v, 2))
        return self.out(y.flatten(2)), (k, v)


class Fairseq(Idiom):
    """Sequences and heads are one while tokens are concatenated and attended to; returned apart."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = (_repeat(t) if t.shape[1] != HEADS else t for t in _swap(q, k, v))
        q, k, v = (t.reshape(-1, t.shape[2], HEAD_DIM) for t in (q, k, v))
        if call.cache is not None:
            k, v = (
                torch.cat([old.view(-1, old.shape[2], HEAD_DIM), t], 1)
                for old, t in zip(call.cache, (k, v), strict=True)
            )
        scores = torch.bmm(q * HEAD_DIM**-0.5, k.transpose(1, 2))
        weights = scores.masked_fill(~call.mask[0, ..., : k.shape[1]], -math.inf).softmax(-1)
        y = torch.bmm(weights, v).view(-1, HEADS, q.shape[1], HEAD_DIM)
        return y.transpose(1, 2), tuple(t.view(-1, HEADS, t.shape[1], HEAD_DIM) for t in (k, v))


class Shifting(GptFast):
    """Old tokens move down in place, new ones follow at the end."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        tokens = q.shape[2]
        for cache, new in ((self.k_cache, k), (self.v_cache, v)):
            cache[:, :, :-tokens] = cache[:, :, tokens:].clone()
            cache[:, :, -tokens:] = new
        places = torch.arange(SLOTS) + call.start + tokens - SLOTS
        mask = (places <= call.positions[:, None]) & (places >= 0)
        y = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2), None


class Ragged(GptFast):
    """Each sequence has positions of its own."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        rows, places = torch.arange(q.shape[0])[:, None], call.positions.expand(q.shape[0], -1)
        self.k_cache[rows, :, places], self.v_cache[rows, :, places] = k, v
        keys, values = _repeat(self.k_cache), _repeat(self.v_cache)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=call.mask)
        return y.transpose(1, 2), None


class Paged(Idiom):
    """A pool of slots [slots, H, D], and a table of those of each sequence."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.buffers_of(2 * SLOTS, KV_HEADS, HEAD_DIM)
        self.register_buffer("table", 2 * SLOTS - 1 - 2 * torch.arange(SLOTS)[None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        slots = self.table[:, call.positions].flatten()
        self.k_cache.index_copy_(0, slots, k.flatten(0, 1))
        self.v_cache.index_copy_(0, slots, v.flatten(0, 1))
        q, k, v = _swap(q, self.k_cache[self.table], self.v_cache[self.table])
        return F.scaled_dot_product_attention(q, _repeat(k), _repeat(v), attn_mask=call.mask).transpose(1, 2), None


class SpelledOut(GptFast):
    """Softmax as exponentials over their sum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        self.k_cache[:, :, call.positions], self.v_cache[:, :, call.positions] = k, v
        scores = q @ _repeat(self.k_cache).mT / math.sqrt(HEAD_DIM)
        scores = scores.masked_fill(~call.mask, torch.finfo(scores.dtype).min)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        return (weights @ _repeat(self.v_cache)).transpose(1, 2), None


class NormedAfter(GptFast):
    """Keys are scaled to a length of 1 after every read."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Attended:
        """See the class."""
        q, k, v = _swap(q, k, v)
        self.k_cache[:, :, call.positions], self.v_cache[:, :, call.positions] = k, v
        q, k = F.normalize(q, dim=-1), F.normalize(_repeat(self.k_cache), dim=-1)
        y = F.scaled_dot_product_attention(q, k, _repeat(self.v_cache), attn_mask=call.mask, scale=8.0)
        return y.transpose(1, 2), None


IDIOMS: Final[dict[str, type[Idiom]]] = {
    kind.__name__: kind
    for kind in (
        *(
            GptFast,
            LitGpt,
            ExecuTorch,
            Scatter,
            Ring,
            OneHot,
            TorchTune,
            MetaLlama,
            Grouped,
            SlotsFirst,
            KeysTransposed,
        ),
        *(Stacked, Paired, FlatHeads, Latent, Rolling, ReadFirst, NanoGpt, FusedGrowing, FirstGpt2, Functional),
        *(XTransformers, Fairseq, Shifting, Ragged, Paged, SpelledOut, NormedAfter),
    )
}


class Decoder(nn.Module):
    """Two layers of an idiom; `forward(ids, positions, start, caches)` gives logits and the caches that follow."""

    mask: Tensor

    def __init__(self, kind: Callable[[], Idiom]) -> None:
        super().__init__()
        self.kind = kind
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layers = [kind() for _ in range(LAYERS)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("mask", torch.ones(SLOTS, SLOTS, dtype=torch.bool).tril())
        for layer in layers:
            nn.init.normal_(layer.qkv.weight, std=0.2)
            nn.init.normal_(layer.out.weight, std=0.2)

    def forward(self, ids: Tensor, positions: Tensor, start: int, caches: list[Any]) -> tuple[Tensor, list[Any]]:
        """Logits ``[batch, tokens, vocabulary]`` and the caches after the call."""
        x, after = self.embed(ids), []
        mask = self.mask[None, None, positions]
        for layer, cache in zip(self.layers, caches, strict=True):
            y, own = layer(self.norm(x), Call(mask, positions, start, cache))
            x = x + y
            after.append(own)
        return self.head(self.norm(x)), after


class Handwritten:
    """An idiom as the table measures it: like `Architecture`, with a cache of its own kind.

    Attributes:
        model: the decoder.
        caches: its layers with a cache.
    """

    caches = LAYERS

    def __init__(self, name: str) -> None:
        self.model = Decoder(IDIOMS[name])

    def cache(self, _: str) -> dict[str, Any]:
        """Fresh caches: buffers as they were made, nothing else."""
        for name, buffer in Decoder(self.model.kind).named_buffers():
            self.model.get_buffer(name).copy_(buffer)
        return {"start": 0, "caches": [None] * LAYERS}

    def step(self, forward: Callable[..., Any], cache: dict[str, Any], ids: Tensor) -> Tensor:
        """Logits of `ids` after what the cache holds."""
        start, end = cache["start"], cache["start"] + ids.shape[1]
        logits, cache["caches"] = forward(ids, torch.arange(start, end), start, cache["caches"])
        cache["start"] = end
        return logits

    @staticmethod
    def cached(_: object) -> int:
        """How many layers hold keys."""
        return LAYERS
