"""What people do with caches, on a packed one and on a dense one: the logits agree at every call."""

import copy
import gc
import io
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from decoquant_compile import CacheTensor, decoquant_backend, nbytes, restore, runtime
from decoquant_compile.kernels.state import CacheState
from decoquant_compile.report import Report
from tests.end_to_end.harness import ATEN_KERNELS, assert_packed, distance, static_cache, tensors
from tests.end_to_end.models import BufferModel, hugging_face, prompts

# Largest difference of a logit, in standard deviations: rounding, and what eight bits cost.
NOISE = {16: 2e-5, 8: 0.2}
IDS = prompts(2, 80)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with inductor_config.patch(ATEN_KERNELS), torch.no_grad():
        yield


def entries():
    """How many graphs Dynamo has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def packed(function, bits=16):
    options = {"bits": bits, "sinks": 2, "window": 6}
    return torch.compile(function, backend=decoquant_backend, options=options, recompile_limit=64)


@dataclass
class Arm:
    """One way to run a model: `feed` calls it compiled, if this is the packed arm, and keeps the logits."""

    model: Any
    forward: Any
    is_packed: bool
    logits: list[Tensor] = field(default_factory=list)

    def eager(self, cache, ids):
        self.logits.append(self.model.forward(ids, past_key_values=cache).logits)

    def feed(self, cache, ids):
        self.logits.append(self.forward(ids, past_key_values=cache).logits)

    def decode(self, cache, ids):
        """Feed one token after another; then the packed arm holds no dense cache."""
        for at in range(ids.shape[1]):
            self.feed(cache, ids[:, at : at + 1])
        self.check(cache)

    def check(self, cache):
        if self.is_packed:
            assert_packed(tensors(cache))


def compare(model, flow, bits=16):
    """Run a flow in both arms."""
    dense, ours = Arm(model, model.forward, False), Arm(model, packed(model.forward, bits), True)
    flow(dense)
    flow(ours)
    assert dense.logits
    for number, (expected, got) in enumerate(zip(dense.logits, ours.logits, strict=True)):
        assert distance(got, expected) < NOISE[bits], f"call {number}"


both_models = pytest.mark.parametrize("name", ["llama", "gemma3"])


@pytest.mark.parametrize(("name", "bits"), [("llama", 16), ("llama", 8), ("gemma3", 16)])
def test_eager_prefill_then_compiled_decode(name, bits):
    model = hugging_face(name)

    def flow(arm):
        cache = static_cache(model, early=False)
        arm.eager(cache, IDS[:, :19])
        arm.decode(cache, IDS[:, 19:28])  # over the edge of the sliding window

    compare(model, flow, bits)


@both_models
def test_one_cache_is_reset_for_each_prompt(name):
    model = hugging_face(name)
    compiled = []

    def flow(arm):
        cache = static_cache(model, early=False)
        for length in (10, 17, 12):
            arm.eager(cache, IDS[:, length : 2 * length])
            arm.decode(cache, IDS[:, :4])
            compiled.append(entries())
            cache.reset()
            assert not any(t[:].any() for t in tensors(cache))

    compare(model, flow)
    assert compiled[-1] == compiled[-2]  # every graph there is to compile is compiled in two rounds


@both_models
def test_each_prompt_brings_a_new_cache(name):
    model = hugging_face(name)
    compiled = []

    def flow(arm):
        for length in (10, 17, 12):
            cache = static_cache(model, early=False)
            arm.eager(cache, IDS[:, length : 2 * length])
            arm.decode(cache, IDS[:, :4])
            compiled.append(entries())

    compare(model, flow)
    assert compiled[-1] == compiled[-2]


@pytest.mark.parametrize(("name", "bits"), [("llama", 16), ("llama", 8), ("gemma3", 16)])
def test_a_second_turn_goes_through_a_packed_cache_eagerly(name, bits):
    model = hugging_face(name)

    def flow(arm):
        cache = static_cache(model, early=False)
        arm.eager(cache, IDS[:, :12])
        arm.decode(cache, IDS[:, 12:16])
        arm.eager(cache, IDS[:, 16:30])
        arm.check(cache)
        arm.decode(cache, IDS[:, 30:34])
        arm.eager(cache, IDS[:, 34:35])
        arm.decode(cache, IDS[:, 35:36])

    compare(model, flow, bits)


@both_models
def test_a_cache_born_in_a_compiled_prefill_is_taken_over_at_the_next_call(name):
    model = hugging_face(name)

    def flow(arm):
        for _ in range(2):
            cache = static_cache(model, early=False)
            arm.feed(cache, IDS[:, :12])
            arm.decode(cache, IDS[:, 12:15])

    compare(model, flow)


@pytest.mark.parametrize("form", ["put", "slice"])
def test_buffers_of_a_module(form):
    models = [BufferModel(form, layers=1) for _ in range(2)]
    forward = packed(models[0].forward)

    def caches(model):
        return [b for name, b in model.named_buffers() if name.endswith("_cache")]

    for _ in range(2):
        at = 0
        for size in (7, 1, 1, 4, 1, 1):
            arguments = IDS[:1, at : at + size], torch.arange(at, at + size), at
            got, expected = forward(*arguments), models[1](*arguments)
            assert distance(got, expected) < NOISE[16]
            at += size
        assert_packed(caches(models[0]))
        for model in models:
            for buffer in caches(model):
                buffer.zero_()


@both_models
def test_beams_are_reordered(name):
    model = hugging_face(name)
    compiled = []

    def flow(arm):
        cache = static_cache(model, early=False)
        arm.eager(cache, IDS[:, :12])
        arm.decode(cache, IDS[:, 12:14])
        for at, beams in enumerate([[1, 0], [0, 0], [1, 1], [0, 1]], 14):
            cache.reorder_cache(torch.tensor(beams))
            arm.check(cache)  # a selection of sequences stays packed
            arm.decode(cache, IDS[:, at : at + 1])
            compiled.append(entries())

    compare(model, flow)
    assert compiled[-1] == compiled[-3]


def test_beam_search():
    model = hugging_face("llama")
    how = {
        "num_beams": 3,
        "max_new_tokens": 8,
        "do_sample": False,
        "cache_implementation": "static",
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(IDS[:, :12], **how)
    report = Report()
    runtime.OPEN.append(report)
    model.forward = packed(model.forward)
    got = model.generate(IDS[:, :12], **how)
    runtime.OPEN.remove(report)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores)
    rewritten = [g for g in report.graphs if g.rewritten]  # the prefill, which creates the cache, and decoding
    assert sum(g.calls for g in rewritten) == 8
    assert not any(g.dense_calls for g in rewritten)
    assert_packed(tensors(got.past_key_values))


@both_models
@pytest.mark.parametrize("goes_on", ["compiled", "eager"])
def test_restored_midway(name, goes_on):
    model = hugging_face(name)

    def flow(arm):
        cache = static_cache(model, early=False)
        arm.eager(cache, IDS[:, :12])
        arm.decode(cache, IDS[:, 12:15])
        restore(cache)
        assert all(type(t) is Tensor for t in tensors(cache))
        if goes_on == "compiled":  # taken over again
            arm.decode(cache, IDS[:, 15:18])
        else:
            arm.eager(cache, IDS[:, 15:18])
            assert all(type(t) is Tensor for t in tensors(cache))

    compare(model, flow)


def test_a_graph_that_cannot_be_rewritten_runs_on_a_packed_cache_twice(monkeypatch):
    """Its results are right; only the tokens it writes are stored; then the cache is dense again, with a warning."""
    model = hugging_face("llama")

    def spying(ids, past_key_values):
        out = model(ids, past_key_values=past_key_values)
        return out.logits, past_key_values.layers[0].keys.round().sum((1, 3))

    stored = []
    write = CacheState.write

    def spy(self, new, positions, **kwargs):
        stored.append(positions.tolist())
        return write(self, new, positions, **kwargs)

    decode, rejected = packed(model.forward), packed(spying)
    ours, theirs = static_cache(model, early=False), static_cache(model, early=False)
    for cache in (ours, theirs):
        model(IDS[:, :12], past_key_values=cache)
    decode(IDS[:, 12:13], past_key_values=ours)
    model(IDS[:, 12:13], past_key_values=theirs)
    monkeypatch.setattr(CacheState, "write", spy)

    def call(at):
        token = IDS[:, at : at + 1]
        for got, expected in zip(rejected(token, ours), spying(token, theirs), strict=True):
            assert distance(got, expected) < NOISE[16]

    call(13)
    assert stored == [[13], [13]]  # the keys and values of layer 0; those of layer 1 are rewritten
    assert_packed(tensors(ours))
    with pytest.warns(UserWarning, match=r"could not be rewritten.*CACHE_VALUE_ESCAPES.*they are dense again") as told:
        call(14)
    assert len(told) == 1
    assert [type(t) for t in tensors(ours)] == [Tensor, Tensor, CacheTensor, CacheTensor]
    call(15)  # and stays so, in silence
    assert [type(t) for t in tensors(ours)] == [Tensor, Tensor, CacheTensor, CacheTensor]
    torch.testing.assert_close(restore(ours).layers[1].keys, theirs.layers[1].keys)


@both_models
def test_a_copy_goes_its_own_way(name):
    model = hugging_face(name)

    def flow(arm):
        cache = static_cache(model, early=False)
        arm.eager(cache, IDS[:, :12])
        arm.decode(cache, IDS[:, 12:14])
        other = copy.deepcopy(cache)
        arm.check(other)
        for at in range(14, 18):
            arm.decode(cache, IDS[:, at : at + 1])
            arm.decode(other, IDS[:, 40 + at : 41 + at])
        arm.eager(copy.deepcopy(other), IDS[:, :3])

    compare(model, flow)


@both_models
def test_saved_and_loaded(name):
    model = hugging_face(name)

    def flow(arm):
        cache = static_cache(model, early=False)
        arm.eager(cache, IDS[:, :12])
        arm.decode(cache, IDS[:, 12:15])
        file = io.BytesIO()
        torch.save([vars(layer) for layer in cache.layers], file)
        arm.check(cache)
        file.seek(0)
        again = static_cache(model, early=False)
        for layer, saved in zip(again.layers, torch.load(file, weights_only=False), strict=True):
            # `clone`: memory that torch.load maps could not be released.
            vars(layer).update({k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items()})
        assert all(type(t) is Tensor for t in tensors(again))
        arm.decode(again, IDS[:, 15:18])
        arm.decode(cache, IDS[:, 18:20])

    compare(model, flow)


@both_models
def test_a_cache_that_is_gone_holds_no_memory(name):
    model = hugging_face(name)
    forward = packed(model.forward)
    buffers = []
    for _ in range(3):
        cache = static_cache(model, early=False)
        model(IDS[:, :12], past_key_values=cache)
        for at in range(12, 15):
            forward(IDS[:, at : at + 1], past_key_values=cache)
        assert nbytes(cache).packed > 0
        buffers += [weakref.ref(t._state.buffer) for t in tensors(cache)]
        assert all(ref() is not None for ref in buffers[-4:])
        del cache
        gc.collect()
        assert all(ref() is None for ref in buffers)
