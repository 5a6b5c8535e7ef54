"""Encoder-decoder models: caches that the first compiled call writes once, and that every later one only reads."""

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import decoquant_compile
from tests.end_to_end.harness import SMALL, distance, packing, write_forms
from tests.end_to_end.models import VOCAB, prompts

CHUNKS = [8, *[1] * 6]
SOURCE = 30  # Hugging Face's mask has no more columns, so a static cache must have as many


def t5(attention):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def caches(model, kind):
    def one():
        return (
            DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=SOURCE)
        )

    return EncoderDecoderCache(one(), one())


@torch.no_grad()
def decode(model, forward, cache, source, mask):
    encoded, ids = model.encoder(source, attention_mask=mask), prompts(2, sum(CHUNKS), seed=1)
    rows, at = [], 0
    for size in CHUNKS:
        part = ids[:, at : at + size]
        call = {"encoder_outputs": encoded, "decoder_input_ids": part, "past_key_values": cache}
        rows.append(forward(attention_mask=mask, **call).logits)
        at += size
    return torch.cat(rows, 1)


@pytest.mark.parametrize(
    ("attention", "kind", "bits"),
    [
        ("sdpa", "dynamic", 16),
        ("eager", "static", 16),
        pytest.param("eager", "dynamic", 8, marks=pytest.mark.slow),
        pytest.param("sdpa", "static", 16, marks=pytest.mark.slow),
    ],
)
def test_both_caches_are_packed(attention, kind, bits):
    model = t5(attention)
    source = prompts(2, SOURCE)
    mask = torch.ones_like(source)
    mask[1, 20:] = 0
    expected = decode(model, model, caches(model, kind), source, mask)
    cache = caches(model, kind)
    with packing(bits=bits, **SMALL) as session:
        got = decode(model, torch.compile(model.forward), cache, source, mask)
    assert "read" in write_forms(session)
    assert distance(got, expected) < (1e-3 if bits == 16 else 0.2)
    cross = [t for layer in cache.cross_attention_cache.layers for t in (layer.keys, layer.values)]
    assert decoquant_compile.nbytes(cross).dense == 0
