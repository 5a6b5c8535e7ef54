"""Caches that grow, and caches that the compiled prefill creates: nothing dense of their length, in no step."""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import decoquant_compile
from decoquant_compile import decoquant_backend
from decoquant_compile._compat import ATEN_KERNELS
from tests.end_to_end.harness import (
    SMALL,
    assert_packed,
    distance,
    feed,
    noise,
    packing,
    static_cache,
    tensors,
    write_forms,
)
from tests.end_to_end.models import SLIDING_WINDOW, hugging_face, prompts

CHUNKS = [20, *[1] * 8, 5, *[1] * 12]
IDS = prompts(2, sum(CHUNKS))


@pytest.mark.parametrize(
    ("name", "attention", "eager_prefill"),
    [
        ("llama", "sdpa", True),
        ("gemma3", "sdpa", False),
        pytest.param("llama", "sdpa", False, marks=pytest.mark.slow),
        pytest.param("gemma3", "sdpa", True, marks=pytest.mark.slow),
        pytest.param("mistral", "eager", True, marks=pytest.mark.slow),
        pytest.param("gemma2", "eager", False, marks=pytest.mark.slow),
        ("bloom", "eager", False),
    ],
)
def test_dynamic_caches(name, attention, eager_prefill):
    model = hugging_face(name, attention)
    expected = feed(model, IDS, CHUNKS, DynamicCache(config=model.config))
    cache = DynamicCache(config=model.config)
    with packing(bits=16, **SMALL) as session:
        forward = torch.compile(model.forward)
        got = feed(forward, IDS, CHUNKS, cache, eager=model if eager_prefill else None)
    assert write_forms(session) == {"cat"}
    assert distance(got, expected) < noise(16)
    assert decoquant_compile.nbytes(tensors(cache)).dense == 0


def test_a_scale_that_is_an_attribute_is_a_constant_of_dynamic_graphs():
    """`torch.compile(dynamic=True)` makes inputs of floats; what scales logits is guarded instead."""
    model = hugging_face("llama", "eager")
    chunks = [20, *[1] * 4]
    ids = IDS[:, : sum(chunks)]
    expected = feed(model, ids, chunks, DynamicCache(config=model.config))
    with packing(bits=16, **SMALL) as session:
        got = feed(torch.compile(model.forward, dynamic=True), ids, chunks, DynamicCache(config=model.config))
    assert {finding.form for finding in session.report().findings} == {"eager"}
    assert distance(got, expected) < noise(16)


def test_static_caches_are_born_packed():
    model, prompt = hugging_face("gemma3"), 20
    chunks = [prompt, *[1] * 4]
    ids = prompts(2, sum(chunks))
    expected = feed(model, ids, chunks, static_cache(model, 2, early=False))
    cache = static_cache(model, 2, early=False)
    with packing(bits=16, **SMALL):
        forward = torch.compile(model.forward)
        got = feed(forward, ids[:, :prompt], chunks[:1], cache)
        kinds = [type(tensor).__name__ for tensor in tensors(cache)]
        got = torch.cat((got, feed(forward, ids[:, prompt:], chunks[1:], cache)), 1)
    assert kinds == ["CacheTensor"] * 4
    assert distance(got, expected) < noise(16)
    assert_packed(tensors(cache))


def test_a_prompt_longer_than_the_window_is_born_packed():
    model = hugging_face("gemma3")
    chunks = [SLIDING_WINDOW + 6, 3, *[1] * 4]
    ids = prompts(2, sum(chunks))
    expected = feed(model, ids, chunks, static_cache(model, 2, early=False))
    cache = static_cache(model, 2, early=False)
    with packing(bits=16, **SMALL):
        forward = torch.compile(model.forward)
        got = feed(forward, ids[:, : chunks[0]], chunks[:1], cache)
        assert_packed(tensors(cache))
        got = torch.cat((got, feed(forward, ids[:, chunks[0] :], chunks[1:], cache)), 1)
    assert distance(got, expected) < noise(16)


def put(cache, start, new):
    return cache.index_copy(2, torch.arange(new.shape[2]) + start, new)


def put_slice(cache, start, new):
    cache = cache.clone()
    cache[:, :, start : start + new.shape[2]] = new
    return cache


def put_one_hot(cache, start, new):
    if new.shape[2] > 1:
        return put(cache, start, new)
    return torch.where((torch.arange(cache.shape[2]) == torch.tensor(start))[:, None], new, cache)


@pytest.mark.parametrize("write", [put, put_slice, put_one_hot])
def test_caches_that_are_returned_changed(write):
    """The old one stays what it is: two continuations of one prefix are independent."""

    def step(q, k, v, start, keys, values):
        keys, values = write(keys, start, k), write(values, start, v)
        mask = torch.arange(keys.shape[2]) <= start + torch.arange(q.shape[2])[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask), keys, values

    def tokens(start, count):
        return *(torch.randn(1, 2, count, 16) for _ in range(3)), start

    prompt, left, right = tokens(0, 20), tokens(20, 1), tokens(20, 1)
    empty = torch.zeros(1, 2, 40, 16), torch.zeros(1, 2, 40, 16)
    _, *expected = step(*prompt, *empty)
    with packing(bits=16, **SMALL), torch.no_grad():
        compiled = torch.compile(step)
        _, *prefix = compiled(*prompt, *empty)
        first = compiled(*left, *prefix)
        second = compiled(*right, *prefix)
        third = compiled(*tokens(21, 1), *second[1:])
    assert not any(tensor.any() for tensor in empty)
    for new, got in ((left, first), (right, second)):
        for x, y in zip(got, step(*new, *expected), strict=True):
            assert distance(x, y) < noise(16)
    for kept, x in zip(prefix, expected, strict=True):
        assert torch.equal(kept.dense(), x)
    assert_packed([*prefix, *first[1:], *second[1:], *third[1:]])


class Sizes(TorchDispatchMode):
    """The largest tensor that any operator made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and type(x) is torch.Tensor and x.dtype.is_floating_point:
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("kind", ["dynamic", "born"])
def test_nothing_dense_of_the_length_of_the_cache(kind):
    """In the compiled graphs: what Inductor allocates for them and what they return."""
    model = hugging_face("llama", num_key_value_heads=4)
    length = 400
    ids = prompts(1, length + 3)
    made = []

    def backend(gm, example_inputs):
        compiled = decoquant_backend(gm, example_inputs, options=ATEN_KERNELS | {"bits": 4})

        def run(*args):
            with Sizes() as sizes:
                results = compiled(*args)
            made.append(sizes.largest)
            return results

        return run

    backend._decoquant_backend = True
    cache = DynamicCache(config=model.config) if kind == "dynamic" else static_cache(model, 1, 8 * length, early=False)
    torch.compiler.reset()
    feed(torch.compile(model.forward, backend=backend), ids, [length, 1, 1, 1], cache)
    dense = tensors(cache)[0].numel()
    assert max(made[1:]) < dense / 4  # one token's logits, not the cache
    if kind == "born":  # the prompt itself is dense, the cache of eight times its length is not
        assert made[0] < dense / 2


def grown_to(forward, model, ids, length):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        forward(input_ids=ids[:, :length], past_key_values=cache)
    return cache


@torch.no_grad()
def test_two_continuations_of_one_prefix():
    model = hugging_face("llama")
    ids, other = prompts(1, 30), prompts(1, 30, seed=1)
    whole = [torch.cat((ids[:, :20], tail[:, 20:]), 1) for tail in (ids, other)]
    expected = [feed(model, text, [20, *[1] * 10], DynamicCache()) for text in whole]
    with packing(bits=16, **SMALL):
        forward = torch.compile(model.forward)
        prefix = grown_to(forward, model, ids, 20)
        for tail, logits in zip((ids, other), expected, strict=True):
            got = feed(forward, tail[:, 20:], [1] * 10, copy.deepcopy(prefix))
            assert distance(got, logits[:, 20:]) < noise(16)
        prefix.crop(-5)  # and the prefix is still what it was
        got = feed(forward, ids[:, 15:], [1] * 10, prefix)
    assert distance(got[:, :10], expected[0][:, 15:25]) < noise(16)


@torch.no_grad()
def test_beams_and_crops():
    model = hugging_face("llama")
    ids = prompts(2, 40)
    index = torch.tensor([1, 1])

    def run(forward):
        cache = DynamicCache(config=model.config)
        rows = [feed(forward, ids[:, :22], [20, 1, 1], cache)]
        cache.reorder_cache(index)
        rows.append(feed(forward, ids[:, 22:25], [1] * 3, cache))
        cache.crop(-4)
        rows.append(feed(forward, ids[:, 25:31], [3, 1, 1, 1], cache))
        cache.batch_repeat_interleave(2)
        rows.append(feed(forward, ids[:, 31:34].repeat_interleave(2, 0), [1] * 3, cache)[::2])
        return torch.cat(rows, 1)

    expected = run(model)
    with packing(bits=16, recompile_limit=64, **SMALL):
        got = run(torch.compile(model.forward))
    assert distance(got, expected) < noise(16)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        *(("llama", None), ("llama", True), ("gemma3", None)),
        pytest.param("gemma3", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_entries(name, dynamic):
    """At most 3 with dynamic=True on full attention, 4 by default, twice those of plain torch.compile on hybrids."""
    model = hugging_face(name)
    ids = prompts(1, 80)
    entries = {}
    for kind in ("plain", "packed"):
        graphs = []

        def backend(gm, example_inputs, kind=kind, graphs=graphs):
            graphs.append(gm)
            return decoquant_backend(gm, example_inputs, options={"bits": 4}) if kind == "packed" else gm.forward

        backend._decoquant_backend = True
        torch.compiler.reset()
        with torch._inductor.config.patch(ATEN_KERNELS):
            forward = torch.compile(model.forward, backend=backend, dynamic=dynamic, recompile_limit=64)
            for length in (20, 33):
                feed(forward, ids, [length, *[1] * (70 - length)], DynamicCache(config=model.config))
        entries[kind] = len(graphs)
    if name == "llama":
        assert entries["packed"] <= (3 if dynamic else 4)
    assert entries["packed"] <= 2 * entries["plain"], entries


def test_memory_goes_with_the_cache():
    model = hugging_face("llama")
    cache = DynamicCache(config=model.config)
    with packing(bits=4):
        feed(torch.compile(model.forward), IDS, [20, 1, 1], cache)
        states = [weakref.ref(tensor._state) for tensor in tensors(cache)]
    del cache
    gc.collect()
    assert [state() for state in states] == [None] * 4
