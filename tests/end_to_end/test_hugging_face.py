"""Hugging Face models with static caches: the packed cache gives what the dense one gives."""

import pytest
import torch
from transformers import StaticCache

import decoquant_compile
from decoquant_compile import CacheTensor, decoquant_backend
from tests.end_to_end.models import VOCAB, hugging_face

NAMES = ["llama", "qwen3", "mistral", "gemma3"]
NOISE = {torch.float32: 5e-6, torch.bfloat16: 0.05, torch.float16: 5e-3}


def tokens(*shape):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, forward, ids, chunks, *, compiled_prefill=False, mask=None, slots=160):
    """Logits of all positions, fed in chunks; the first chunk is eager unless `compiled_prefill`."""
    cache = StaticCache(config=model.config, max_cache_len=slots)
    heads = model.config.num_key_value_heads
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    cache.early_initialization(ids.shape[0], heads, head_dim, model.dtype, ids.device)
    rows, at = [], 0
    for number, size in enumerate(chunks):
        call = model.forward if number == 0 and not compiled_prefill else forward
        extra = {} if mask is None else {"attention_mask": mask[:, : at + size]}
        rows.append(call(input_ids=ids[:, at : at + size], past_key_values=cache, **extra).logits)
        at += size
    return torch.cat(rows, 1).float(), cache


def packed(model, **options):
    torch.compiler.reset()
    return torch.compile(
        model.forward, backend=decoquant_backend, options=options, recompile_limit=64, dynamic=options.pop("dynamic", None)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compiled_prefill", [False, True], ids=["eager-prefill", "compiled-prefill"])
def test_at_16_bits_the_logits_are_those_of_the_dense_model(name, compiled_prefill):
    model = hugging_face(name)
    ids = tokens(1, 100)
    # over the edge of the sliding window (24), in single tokens and in chunks
    for chunks in ([20, *[1] * 8], [40, 1, 1, 30, 1, 1], [10, 7, 5, 9, 1, 1]):
        expected, _ = logits(model, model.forward, ids, chunks)
        got, cache = logits(model, packed(model, bits=16), ids, chunks, compiled_prefill=compiled_prefill)
        torch.testing.assert_close(got, expected, rtol=0, atol=NOISE[torch.float32])
        assert all(isinstance(layer.keys, CacheTensor) and isinstance(layer.values, CacheTensor) for layer in cache.layers)
