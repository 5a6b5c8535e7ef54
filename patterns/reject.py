"""Why an attention, or a cache, is left as it is."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decoquant_compile.patterns.core import AttentionCore


class Reason(enum.Enum):
    """One reason not to rewrite; the value is its text for people."""

    NO_CACHE = "keys and values are computed in this call; there is no cache, or none yet"
    READ_ONLY_CACHE = "the graph reads keys and values that it does not write (cross-attention, or a write elsewhere)"
    ONLY_ONE_CACHED = "of keys and values, only one is cached"
    CACHE_BORN_INSIDE = "the cache is created in this graph, with values that nobody wrote"
    GROWING_CACHE = "the cache grows by more than new tokens behind the old ones"
    READ_BEFORE_WRITE = "the attention reads the cache as it was before this call's write"
    WRITE_NOT_READ = "the graph writes this cache, but no attention that we recognise reads it"
    UNKNOWN_WRITE = "the cache is written in a way that is not understood"
    TWO_WRITES = "the cache is written several times in one graph, and not read after each"
    PARTIAL_BATCH = "only a part of the cache's batch is written or read"
    POSITIONS_DIFFER = "keys and values are written or read in different ways or at different positions"
    RAGGED = "each sequence is written at positions of its own"
    SAME_TENSOR = "keys and values share one tensor"
    SHARED_TENSOR = "the tensor holds other caches as well, and not all of them can be packed"
    SHARED_CACHE = "several attentions read this cache, and not all of them in a way that is rewritten"
    CACHE_VALUE_ESCAPES = "something besides this attention uses the cache"
    COMPUTE_AFTER_CACHE = "keys or values are computed from what is cached (rotary embedding, dequantisation)"
    LINEAR_AFTER_CACHE = "keys or values are a linear map of what is cached (latent attention)"
    UNKNOWN_MOVEMENT = "the path from cache to attention moves elements in a way that is not understood"
    HEAD_ORDER = "key-value heads are tiled; query heads must follow one another in groups"
    LAYOUT = "the dims of the cache are not batch, heads, slots and channels as the attention needs them"
    DTYPE = "the cache's elements are not float32, bfloat16 or float16, or are rounded before the attention"
    UNDECIDED_SIZE = "a size is not known to be equal to another, or not constant"
    ATTENTION_FORM = "attention in this form is not rewritten"
    ATTENTION_RANK = "the attention does not work on four dims"
    WEIGHTS_ESCAPE = "the attention's logits or weights are used by something besides its softmax and its values"
    DROPOUT = "the attention drops probabilities at random"
    MASK_FORM = "the attention mask does not cover [batch, heads, queries, keys], is no bool or float, or hides nothing"


@dataclass(frozen=True)
class Problem:
    """A reason and the particulars."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class Reject:
    """One attention, or one cache, that stays as it is.

    Attributes:
        reason: why.
        where: name of the attention's node; for a cache without an attention, name of its graph input.
        detail: the particulars.
        core: the attention, where it could be read.
    """

    reason: Reason
    where: str
    detail: str = ""
    core: AttentionCore | None = None
