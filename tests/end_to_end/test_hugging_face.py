"""Hugging Face models with static caches, fed by hand: in one chunk or several, prefilled eagerly or compiled."""

import copy

import pytest
import torch

from tests.end_to_end.harness import (
    NOISE,
    SMALL,
    assert_packed,
    distance,
    feed,
    noise,
    packing,
    shown,
    static_cache,
    tensors,
    write_forms,
)
from tests.end_to_end.models import SLIDING_WINDOW, hugging_face, prompts

FORMS = {
    "llama": {"index_copy"},
    "qwen3": {"index_copy"},
    "mistral": {"index_copy", "roll", "append", "replace"},
    "gemma3": {"index_copy", "roll", "append", "replace"},
}

"""Standard deviations of the logits; float32 gives 3e-6."""

LOSS = {8: 0.02, 5: 0.15, 4: 0.3, 3: 0.5, 2: 1.0}
"""Standard deviations of the logits, root mean square, for random weights; llama loses most, 0.6 to 0.8 of this."""

# Over the edge of the sliding window (24) by one token and by several, and from behind it.
CHUNKS = [
    # (is the first chunk compiled, chunks)
    (True, [10, 1, 9, 7, 1, 5, 1]),
    (False, [12, 1, 9, 2, 1]),
    (True, [40, 1]),
    (False, [40, 1, 5]),
]

NORMAL = {("llama", False), ("qwen3", True), ("gemma3", None)}
"""The slow sweep has all pairs."""


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("name", FORMS)
def test_late_logits_depend_on_the_first_tokens(name):
    """Without it, equal logits would prove little."""
    model, ids = hugging_face(name), prompts(1, 60)
    changed = torch.cat((prompts(1, 6, seed=1), ids[:, 6:]), 1)
    logits, other = (feed(model, x, [60], static_cache(model)) for x in (ids, changed))
    # Mistral's two layers see 46 tokens back.
    at = 40 if name == "mistral" else -1
    assert distance(other[:, at], logits[:, at]) > 1e4 * NOISE


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        pytest.param(name, dynamic, marks=[] if (name, dynamic) in NORMAL else pytest.mark.slow)
        for name in FORMS
        for dynamic in (None, True, False)
    ],
)
def test_at_16_bits_logits_are_those_of_the_dense_model(name, dynamic):
    model, ids = hugging_face(name), prompts(1, 60)
    with packing(bits=16) as session:
        forward = torch.compile(model.forward, dynamic=dynamic)
        for compiled, chunks in CHUNKS:
            expected = feed(model, ids, chunks, static_cache(model))
            cache = static_cache(model, early=compiled)
            got = feed(forward, ids, chunks, cache, eager=None if compiled else model)
            assert distance(got, expected) < NOISE, chunks
            assert_packed(tensors(cache))
    assert write_forms(session) == FORMS[name]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("gemma3", torch.float16),
        *(pytest.param(n, torch.bfloat16, marks=pytest.mark.slow) for n in ("qwen3", "mistral", "gemma3")),
        *(pytest.param(n, torch.float16, marks=pytest.mark.slow) for n in ("llama", "qwen3", "mistral")),
    ],
)
def test_at_16_bits_low_precision_errs_no_more_than_the_dense_model(name, dtype):
    model, ids, chunks = hugging_face(name).to(dtype), prompts(1, 60), [40, *[1] * 12]
    exact = copy.deepcopy(model).float()
    truth = feed(exact, ids, chunks, static_cache(exact))[:, chunks[0] :]
    dense = feed(model, ids, chunks, static_cache(model))[:, chunks[0] :]
    with packing(bits=16):
        got = feed(torch.compile(model.forward), ids, chunks, static_cache(model), eager=model)[:, chunks[0] :]
    assert rms(got - truth) < 1.5 * rms(dense - truth)


def unwound(cache, before, size):
    """The dense cache that a call of `size` tokens read, with the content that `cache` shows after the call.

    The call's own tokens may stand in it: it is to be repeated and writes them again. A sliding layer that several
    tokens carry over its edge attends to what it held before.
    """
    cache, before = shown(cache), shown(before)
    for number, (layer, old) in enumerate(zip(cache.layers, before.layers, strict=True)):
        held = getattr(old, "cumulative_length_int", 0)
        rolled = held >= SLIDING_WINDOW and size == 1
        if held + size > SLIDING_WINDOW and layer.is_sliding and not rolled:
            cache.layers[number] = old
            continue
        if rolled:
            layer.keys, layer.values = layer.keys.roll(1, 2), layer.values.roll(1, 2)
        layer.cumulative_length = old.cumulative_length
        if layer.is_sliding:
            layer.cumulative_length_int = held
    return cache


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        pytest.param(name, bits, marks=[] if (name, bits) in {("llama", 3), ("gemma3", 4)} else pytest.mark.slow)
        for name in FORMS
        for bits in (8, 5, 4, 3, 2)
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_dense_model_over_the_cache_that_the_handles_show(name, bits):
    """Whatever the codec loses, the graphs read exactly what it kept."""
    model, ids = hugging_face(name), prompts(1, 96)
    with packing(bits=bits, **SMALL) as session:
        forward, cache, at, logits = torch.compile(model.forward), static_cache(model), 0, []
        for size in (14, 1, 7, 1, 1, 1, 1, 20, 1, 1, 9, 1):
            chunk, before = ids[:, at : at + size], copy.deepcopy(cache)
            got = forward(input_ids=chunk, past_key_values=cache).logits
            expected = model(input_ids=chunk, past_key_values=unwound(cache, before, size)).logits
            assert distance(got, expected) < noise(bits), at
            logits.append(got)
            at += size
        assert_packed(tensors(cache))
    exact = feed(model, ids, [at], static_cache(model))
    assert 5e-4 < rms(torch.cat(logits, 1) - exact) / exact.std() < LOSS[bits]
    assert "index_copy" in write_forms(session)
