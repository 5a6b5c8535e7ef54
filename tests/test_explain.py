"""`explain(...)`: the report of a call; nothing runs and nothing changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

from decoquant_compile import CacheTensor, decoquant_backend, enable, explain, nbytes
from decoquant_compile.report import Untouched
from tests.end_to_end.models import VOCAB, BufferModel, hugging_face
from tests.graphs import cached_arguments, new, queries

IDS = torch.randint(1, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def entries():
    """How many graphs Dynamo has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def step(q, k, v, keys, values, positions, mask):
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


class Kernels(TorchDispatchMode):
    """Counts the operators that read or write data. Dynamo must compile beneath it."""

    ran = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        self.ran += not func.is_view and not all(isinstance(x, FakeTensor) for x in tensors)
        return result


@torch.no_grad()
def prefilled(model, tokens=10):
    cache = StaticCache(config=model.config, max_cache_len=48)
    model(IDS[:, :tokens], past_key_values=cache)
    return cache


def state(cache):
    """What a cache holds, copied."""
    return [{k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(layer).items()} for layer in cache.layers]


def check_state(cache, before):
    for layer, old in zip(cache.layers, before, strict=True):
        assert vars(layer).keys() == old.keys()
        for name, value in vars(layer).items():
            assert type(value) is type(old[name])
            assert torch.equal(value, old[name]) if isinstance(value, Tensor) else value == old[name]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_every_attention_is_listed_and_nothing_runs(name):
    model = hugging_face(name)
    cache = prefilled(model)
    before, weights = state(cache), {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(IDS[:, 10:11], past_key_values=copy.deepcopy(cache)).logits
    with Kernels() as kernels:
        report = explain(model, IDS[:, 10:11], past_key_values=cache)
    assert kernels.ran == 0
    assert [f.outcome for f in report.findings] == ["rewritten"] * 2
    assert [f.keys.partition("past_key_values'].")[2] for f in report.findings] == ["layers[0].keys", "layers[1].keys"]
    assert report.rewritten == 2
    assert report.caches == []
    assert all(word in str(report) for word in ("layers[1].keys", "index_copy", "sdpa", "rewritten"))
    check_state(cache, before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any(hasattr(m, "_compiled_call_impl") and m._compiled_call_impl for m in model.modules())
    assert torch.equal(model(IDS[:, 10:11], past_key_values=cache).logits, expected)


def test_the_counter_counts():
    """The test above can fail."""
    with Kernels() as kernels:
        torch.ones(2) + 1
    assert kernels.ran > 0


@torch.no_grad()
def test_a_packed_cache_can_be_explained():
    model = hugging_face("llama")
    cache = prefilled(model)
    forward = torch.compile(model.forward, backend=decoquant_backend, options={"bits": 8, "window": 4})
    forward(IDS[:, 10:11], past_key_values=cache)
    assert isinstance(cache.layers[0].keys, CacheTensor)
    held, dense = nbytes(cache), [layer.keys[:].clone() for layer in cache.layers]
    report = explain(model, IDS[:, 11:12], past_key_values=cache)
    assert [f.outcome for f in report.findings] == ["rewritten"] * 2
    assert nbytes(cache) == held
    assert all(isinstance(t, CacheTensor) for layer in cache.layers for t in (layer.keys, layer.values))
    assert all(torch.equal(layer.keys[:], keys) for layer, keys in zip(cache.layers, dense, strict=True))
    # and goes on as if nothing had been
    compiled = entries()
    for at in range(11, 14):
        forward(IDS[:, at : at + 1], past_key_values=cache)
    assert entries() == compiled + 1  # the second call of a new cache, with or without explain()


@torch.no_grad()
def test_module_buffers_are_explained_and_left():
    model = BufferModel("put")
    positions = torch.arange(4)
    report = explain(model, IDS[:, :4], positions, 0)
    assert [f.outcome for f in report.findings] == ["rewritten"] * 2
    assert not any(b.any() for name, b in model.named_buffers() if "cache" in name)
    assert all(type(b) is Tensor for b in model.buffers())


@torch.no_grad()
def test_without_attention():
    report = explain(torch.nn.Linear(3, 3), torch.ones(2, 3))
    assert [g.untouched for g in report.graphs] == [Untouched.NO_ATTENTION]
    assert "no attention" in str(report)


def test_training():
    report = explain(hugging_face("llama"), IDS)
    assert {g.untouched for g in report.graphs} == {Untouched.GRADIENTS}
    assert "no_grad" in str(report)


@torch.no_grad()
def test_a_growing_cache():
    model = hugging_face("llama")
    cache = DynamicCache(config=model.config)
    model(IDS[:, :10], past_key_values=cache)
    before = state(cache)
    report = explain(model, IDS[:, 10:11], past_key_values=cache)
    assert [(f.outcome, f.write) for f in report.findings] == [("rewritten", "cat")] * 2
    check_state(cache, before)


@torch.no_grad()
def test_an_escape():
    def escapes(*arguments):
        return step(*arguments), arguments[3] > 2

    report = explain(escapes, *cached_arguments())
    assert [f.outcome for f in report.findings] == ["CACHE_VALUE_ESCAPES"]
    assert [g.untouched for g in report.graphs] == [Untouched.NO_SITE]


@torch.no_grad()
def test_the_walk_goes_on_through_graph_breaks():
    def broken(q, k, v, keys, values, positions, mask, other, more):
        out = step(q, k, v, keys, values, positions, mask)
        torch._dynamo.graph_break()
        return step(out, k, v, other, more, positions, mask)

    arguments = cached_arguments()
    report = explain(broken, *arguments, *(t.clone() for t in arguments[3:5]))
    assert len(report.graphs) == 2
    assert [f.outcome for f in report.findings] == ["rewritten"] * 2
    assert [f.keys for f in report.findings] == ["L['keys']", "L['other']"]


@torch.no_grad()
def test_data_dependent_code_ends_it_with_a_note():
    def peeks(*arguments):
        out = step(*arguments)
        if out.sum() > 0:
            out = out * 2
        return F.scaled_dot_product_attention(out, *arguments[1:3], enable_gqa=True)

    report = explain(peeks, *cached_arguments())
    assert [f.outcome for f in report.findings] == ["rewritten"]
    assert len(report.notes) == 1
    assert "needs a tensor's value" in report.notes[0]
    assert report.notes[0] in str(report)


@pytest.mark.parametrize("how", ["module", "forward", "method", "in place", "other backend"])
@torch.no_grad()
def test_what_is_compiled_already_is_explained(how):
    model = BufferModel("put", layers=1)
    arguments = IDS[:, :4], torch.arange(4), 0
    match how:
        case "module":
            target = torch.compile(model, backend=decoquant_backend)
        case "forward":
            target = torch.compile(model.forward, backend=decoquant_backend)
        case "method":
            model.forward = torch.compile(model.forward, backend=decoquant_backend)
            target = model
        case "in place":
            model.compile(backend=decoquant_backend)
            target = model
        case "other backend":
            target = torch.compile(model, backend="eager")
    report = explain(target, *arguments)
    assert [f.outcome for f in report.findings] == ["rewritten"]
    assert all(type(b) is Tensor for b in model.buffers())
    assert not model.layers[0].k_cache.any()


@torch.no_grad()
def test_it_does_not_disturb_compiled_code():
    arguments = cached_arguments()
    fn = torch.compile(step, backend=decoquant_backend)
    counts = []
    for explained in (False, True):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        explanations = 0
        caches = [[a.clone() for a in arguments] for _ in range(3)]
        for cache in caches:
            if explained:
                for _ in range(4):
                    before = entries()
                    assert explain(step, *cache).rewritten == 1
                    explanations += entries() - before
            for _ in range(2):
                fn(*cache)
        assert all(isinstance(cache[3], CacheTensor) for cache in caches)
        counts.append(entries() - explanations)
    assert counts[0] == counts[1]


@torch.no_grad()
def test_inside_a_session():
    arguments = cached_arguments()
    with enable(bits=16) as session:
        report = explain(step, *arguments)
        assert report.rewritten == 1
        assert session.report().graphs == []
        assert type(arguments[3]) is Tensor
        torch.compile(step)(*arguments)
    assert session.report().rewritten == 1


@torch.no_grad()
def test_what_a_function_closes_over_would_not_be_copied():
    model = BufferModel("put", layers=1)
    table = torch.arange(4)
    cache = {"keys": torch.zeros(2)}
    ids = IDS[:, :4]
    with pytest.raises(ValueError, match=r"uses 'model', a BufferModel.*pass it as an argument"):
        explain(lambda ids: model(ids, table, 0), ids)
    with pytest.raises(ValueError, match="uses 'model'"):
        explain(torch.no_grad()(lambda ids: model(ids, table, 0)), ids)
    with pytest.raises(ValueError, match="uses 'cache', a dict"):
        explain(lambda ids: cache["keys"].add_(1) + ids, ids)
    assert not model.layers[0].k_cache.any()
    report = explain(lambda model, ids: model(ids, table.add_(1), 0), model, ids)
    assert report.rewritten == 1
    assert torch.equal(table, torch.arange(4))  # tensors are safe
    assert not model.layers[0].k_cache.any()


@torch.no_grad()
def test_inference_mode():
    model = hugging_face("llama")
    cache = prefilled(model)
    before = state(cache)
    with torch.inference_mode():
        assert explain(model, IDS[:, 10:11], past_key_values=cache).rewritten == 2
    check_state(cache, before)


@torch.no_grad()
def test_an_error_of_the_model_is_the_callers():
    def wrong(q, k):
        return F.scaled_dot_product_attention(q, k, k[..., :3]) @ q

    with pytest.raises(Exception, match=r"size|shape"):
        explain(wrong, queries(), new())
