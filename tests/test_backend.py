"""The backend as users see it: what is rewritten, what is left alone, and what happens when something goes wrong."""

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CompileConfig, StaticCache

from decoquant_compile import CacheTensor, _compat, backend, decoquant_backend, nbytes, restore, runtime
from decoquant_compile.report import Report, Untouched
from tests.end_to_end.models import VOCAB, hugging_face
from tests.graphs import BATCH, CHANNELS, HEADS, SLOTS, cached_arguments, new, queries

EXACT = {"options": {"bits": 16}}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def step(q, k, v, keys, values, positions, mask):
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def attend(q, k, v):
    """Attention without a cache."""
    return F.scaled_dot_product_attention(q * 2, k, v, enable_gqa=True) + 1


def copies(arguments):
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)


@torch.no_grad()
def eager(function, arguments):
    """The result of `function` and what it makes of its arguments."""
    arguments = copies(arguments)
    return function(*arguments), arguments


def check(function, arguments, *, got, after):
    expected, written = eager(function, arguments)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    for ours, theirs in zip(after, written, strict=True):
        torch.testing.assert_close(ours[:] if isinstance(ours, CacheTensor) else ours, theirs)


@contextlib.contextmanager
def reports():
    """The reports of the graphs that are compiled or that run inside."""
    report = Report()
    runtime.OPEN.append(report)
    yield report.graphs
    runtime.OPEN.remove(report)


@dataclasses.dataclass
class Spy:
    """A backend that notes the graphs it is given, and a compiler that notes those it gets."""

    monkeypatch: pytest.MonkeyPatch
    given: list = dataclasses.field(default_factory=list)
    compiled: list = dataclasses.field(default_factory=list)
    patches: list = dataclasses.field(default_factory=list)
    _decoquant_backend: bool = True

    def __post_init__(self):
        compile_fx = _compat.compile_fx

        def compiler(gm, inputs, config_patches=None):
            self.compiled.append(gm)
            self.patches.append(config_patches)
            return compile_fx(gm, inputs, config_patches=config_patches)

        self.monkeypatch.setattr(_compat, "compile_fx", compiler)

    def __call__(self, gm, inputs, **kwargs):
        self.given.append(gm)
        return decoquant_backend(gm, inputs, **kwargs)


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


# What is rewritten


@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_a_cached_attention_runs_packed(spy, tokens):
    arguments = cached_arguments(tokens)
    ours = copies(arguments)
    fn = torch.compile(step, backend=spy, **EXACT)
    check(step, arguments, got=fn(*ours), after=ours)
    assert type(ours[3]) is type(ours[4]) is CacheTensor
    assert spy.compiled[0] is not spy.given[0]
    assert len(spy.compiled) == 1


@torch.no_grad()
def test_fewer_bits_take_fewer_bytes():
    """At the sizes of a real head; sinks and window, exact, are 16 of 2048 tokens."""
    shape = (1, 2, 2048, 64)
    q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64)
    held = {}
    for bits in (16, 8, 4, 2):
        torch.manual_seed(0)
        keys, values = (torch.randn(shape).bfloat16() for _ in range(2))
        dense = nbytes([keys, values]).total
        torch.compile(step, backend=decoquant_backend, options={"bits": bits, "sinks": 4, "window": 12}, dynamic=False)(
            q.bfloat16(), k.bfloat16(), v.bfloat16(), keys, values, torch.tensor([2047]), None
        )
        assert type(keys) is type(values) is CacheTensor
        assert nbytes([keys, values]).dense == 0
        held[bits] = nbytes([keys, values]).packed / dense
    assert held[2] < held[4] < held[8] < 0.6
    assert held[4] < 0.32
    assert held[16] > 0.99


@pytest.mark.parametrize("kind", ["boolean", "additive", "per head", "per sequence"])
@torch.no_grad()
def test_masks_are_honoured_exactly(kind):
    """Also where they are no causal masks; slots that were never written count as the zeros they hold."""
    arguments = list(cached_arguments(2))
    for cache in arguments[3:5]:
        cache[:, :, 9:] = 0
    sizes = {"boolean": (1, 1), "additive": (1, 1), "per head": (1, 2 * HEADS), "per sequence": (BATCH, 1)}[kind]
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(*sizes, 2, SLOTS, generator=generator)
    mask = 4 * mask if kind in ("additive", "per head") else mask > 0.4
    assert bool((mask[..., 9:] != 0).any())
    arguments[-1] = mask
    ours = copies(arguments)
    fn = torch.compile(step, backend=decoquant_backend, **EXACT)
    check(step, arguments, got=fn(*ours), after=ours)
    assert type(ours[3]) is CacheTensor
    # The graph now reads a handle, and the mask may be any other one.
    arguments = [*arguments[:-1], mask.flip(-1)]
    arguments[3], arguments[4] = (eager(step, arguments)[1][i] for i in (3, 4))
    ours = [*ours[:-1], mask.flip(-1)]
    check(step, arguments, got=fn(*ours), after=ours)


@torch.no_grad()
def test_other_inputs_are_mutated_as_before():
    def function(q, k, v, keys, values, positions, mask, length, history):
        out = step(q, k, v, keys, values, positions + length, mask)
        length.add_(q.shape[2])
        history[:, 1:] = history[:, :-1].clone()
        history[:, 0] = out.sum((1, 2, 3))
        return out

    arguments = (*cached_arguments(2), torch.tensor(3), torch.zeros(BATCH, 4))
    ours, theirs = copies(arguments), copies(arguments)
    fn = torch.compile(function, backend=decoquant_backend, **EXACT)
    for _ in range(3):
        got, expected = fn(*ours), function(*theirs)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    assert type(ours[3]) is CacheTensor
    assert int(ours[7]) == 9
    torch.testing.assert_close(ours[8], theirs[8])


@torch.no_grad()
def test_max_rewrites_bisects():
    def function(q, k, v, first, second, positions, mask):
        return step(step(q, k, v, *first, positions, mask), k, v, *second, positions, mask)

    q, k, v, keys, values, positions, mask = cached_arguments()
    for allowed in range(3):
        torch.compiler.reset()
        first, second = copies((keys, values)), copies((values, keys))
        fn = torch.compile(function, backend=decoquant_backend, options={"bits": 16, "max_rewrites": allowed})
        with reports() as graphs:
            got = fn(q, k, v, first, second, positions, mask)
        expected = function(q, k, v, copies((keys, values)), copies((values, keys)), positions, mask)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
        assert [type(t) is CacheTensor for t in (*first, *second)] == [allowed > 0] * 2 + [allowed > 1] * 2
        (graph,) = graphs
        assert [f.outcome for f in graph.findings] == ["rewritten"] * allowed + ["MAX_REWRITES"] * (2 - allowed)


@torch.no_grad()
def test_max_rewrites_leaves_no_cache_to_some_of_its_attentions():
    def function(q, k, v, first, second, positions, mask):
        q = step(step(q, k, v, *first, positions, mask), k, v, *second, positions, mask)
        one, other = (F.scaled_dot_product_attention(q, *x, mask, enable_gqa=True) for x in (first, second))
        return one + other

    q, k, v, keys, values, positions, mask = cached_arguments()
    first, second = copies((keys, values)), copies((values, keys))
    fn = torch.compile(function, backend=decoquant_backend, options={"bits": 16, "max_rewrites": 1})
    with reports() as graphs:
        got = fn(q, k, v, first, second, positions, mask)
    expected = function(q, k, v, copies((keys, values)), copies((values, keys)), positions, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    assert [type(t) is CacheTensor for t in (*first, *second)] == [True, True, False, False]
    assert [f.outcome for f in graphs[0].findings] == ["rewritten", "MAX_REWRITES"] * 2


@torch.no_grad()
def test_inference_mode():
    arguments = cached_arguments()
    fn = torch.compile(step, backend=decoquant_backend, **EXACT)
    with torch.inference_mode():
        inside = copies(arguments)  # tensors of inference mode
        check(step, arguments, got=fn(*inside), after=inside)
    ours = copies(arguments)
    with torch.inference_mode():
        check(step, arguments, got=fn(*ours), after=ours)
    assert type(inside[3]) is type(ours[3]) is CacheTensor
    # a handle made in either mode serves the other
    with torch.inference_mode():
        expected, got = step(*inside), fn(*ours)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


# What is left alone


def left_alone(spy, function, arguments, untouched, *outcomes):
    """`function` compiles to what plain Inductor makes of the same graph, and the report says why."""
    ours, theirs = copies(arguments), copies(arguments)
    with reports() as graphs:
        got = torch.compile(function, backend=spy, **EXACT)(*ours)
    assert len(spy.given) == 1
    assert spy.compiled[0] is spy.given[0]
    (graph,) = graphs
    assert graph.untouched is untouched
    assert [f.outcome for f in graph.findings] == list(outcomes)
    torch.compiler.reset()
    expected = torch.compile(function, backend="inductor")(*theirs)
    for a, b in zip([*got, *ours], [*expected, *theirs], strict=True):
        assert type(a) is type(b)
        assert not isinstance(a, Tensor) or torch.equal(a, b)
    return got, graph


@torch.no_grad()
def test_attention_without_a_cache_reaches_inductor_untouched(spy):
    left_alone(spy, lambda q, k: [attend(q, k.exp(), k.sin())], (queries(5), new(5)), Untouched.NO_SITE, "NO_CACHE")


@torch.no_grad()
def test_a_graph_without_attention_reaches_inductor_untouched(spy):
    left_alone(spy, lambda x: [(x @ x.mT).relu()], (queries(5),), Untouched.NO_ATTENTION)


@pytest.mark.parametrize("escape", ["value", "slice", "count", "other cache"])
@torch.no_grad()
def test_a_cache_whose_value_escapes_reaches_inductor_untouched(spy, escape):
    def function(q, k, v, keys, values, positions, mask, other):
        out = step(q, k, v, keys, values, positions, mask)
        match escape:
            case "value":
                return out, values == 0
            case "slice":
                return out, keys[:, :, :2] > 1
            case "count":
                return out, keys.count_nonzero()
            case "other cache":
                other.copy_(keys)
                return out, other.round()

    arguments = (*cached_arguments(), torch.zeros(BATCH, HEADS, SLOTS, CHANNELS))
    _, graph = left_alone(spy, function, arguments, Untouched.NO_SITE, "CACHE_VALUE_ESCAPES")
    assert "still needed by" in graph.findings[0].detail
    assert "CACHE_VALUE_ESCAPES" in str(graph)


def test_training_is_left_alone(spy):
    def losses(backend):
        torch.manual_seed(0)
        torch.compiler.reset()
        model = nn.Linear(CHANNELS, CHANNELS)
        step = torch.compile(lambda q, k, v: attend(model(q), model(k), v).square().mean(), backend=backend)
        q, k, v = queries(5), new(5), new(5)
        loss = step(q, k, v)
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())]

    with reports() as graphs:
        ours = losses(spy)
    assert spy.compiled[0] is spy.given[0]
    assert [g.untouched for g in graphs] == [Untouched.GRADIENTS]
    assert "no_grad" in str(graphs[0])
    for a, b in zip(ours, losses("inductor"), strict=True):
        assert torch.equal(a, b)


# What goes wrong


def fail(*_, **__):
    raise ZeroDivisionError("injected")


def probe_fails(rewrite):
    def rewritten(*arguments):
        result = rewrite(*arguments)
        return dataclasses.replace(result, probe=dataclasses.replace(result.probe, graph=fail))

    return rewritten


def compile_fails_once(compile_fx):
    calls = []

    def compiler(*arguments, **kwargs):
        calls.append(arguments)
        return fail() if len(calls) == 1 else compile_fx(*arguments, **kwargs)

    return compiler


STAGES = {
    "unsupported": (backend, "unsupported", lambda _: fail),
    "normalise": (backend, "normalise", lambda _: fail),
    "match": (backend, "match", lambda _: fail),
    "rewrite": (backend, "rewrite", lambda _: fail),
    "compile_fx": (_compat, "compile_fx", compile_fails_once),
    "probe": (backend, "rewrite", probe_fails),
    "takeover": (runtime, "take_over", lambda _: fail),
}


@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_a_failure_of_ours_costs_only_the_packing(stage, monkeypatch, caplog):
    owner, name, broken = STAGES[stage]
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    arguments = cached_arguments(2)
    ours = copies(arguments)
    fn = torch.compile(step, backend=decoquant_backend, **EXACT)
    with reports() as graphs, pytest.warns(UserWarning, match="dense") as caught, caplog.at_level(logging.WARNING):
        got = fn(*ours)
    check(step, arguments, got=got, after=ours)
    assert type(ours[3]) is type(ours[4]) is Tensor
    assert any("injected" in str(w.message) for w in caught)
    assert any("injected" in r.getMessage() or "injected" in str(r.exc_info) for r in caplog.records)
    assert "injected" in str(graphs[0]) + graphs[0].obstacle
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        fn(*ours)


@torch.no_grad()
def test_a_cache_that_somebody_else_looks_into_stays_dense_while_they_do():
    arguments = cached_arguments()
    ours = copies(arguments)
    fn = torch.compile(step, backend=decoquant_backend, **EXACT)
    looks = ours[3][:, :, :4]
    with reports() as graphs:
        with pytest.warns(UserWarning, match=r"the cache stays dense: .*shares its memory") as caught:
            got = fn(*ours)
        check(step, arguments, got=got, after=ours)
        assert torch.equal(looks, ours[3][:, :, :4])
        assert type(ours[3]) is type(ours[4]) is Tensor  # all or none
        fn(*ours)
        assert len(caught) == 1
        (graph,) = graphs
        assert (graph.calls, graph.dense_calls) == (2, 2)
        assert "shares its memory" in graph.obstacle
        del looks
        arguments = copies(ours)
        check(step, arguments, got=fn(*ours), after=ours)
        assert type(ours[3]) is type(ours[4]) is CacheTensor
        assert (graph.calls, graph.dense_calls) == (3, 2)


@pytest.mark.parametrize("other", ["inductor", "eager", "aot_eager"])
@torch.no_grad()
def test_a_handle_in_the_graph_of_another_backend_is_refused(other):
    ours = copies(cached_arguments())
    torch.compile(step, backend=decoquant_backend, **EXACT)(*ours)
    torch.compiler.reset()
    fn = torch.compile(lambda keys: keys * 2, backend=other)
    message = r"packed by decoquant_compile, but the backend is another one.*restore"
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=message):
        fn(ours[3])
    torch.compiler.reset()
    restore(ours[3])
    assert torch.equal(fn(ours[3]), ours[3] * 2)


# How it is asked for


@torch.no_grad()
def test_floats_of_modules_cost_no_second_trace(monkeypatch):
    """With `dynamic=True` they are inputs; where a function cannot take them, Dynamo has to trace the frame again."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(VOCAB, CHANNELS)
            self.scale, self.epsilon = 0.3, 1e-6

        def forward(self, ids, keys, values):
            x = self.table(ids)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
            keys, values = torch.cat((keys, x), 1), torch.cat((values, x), 1)
            return F.scaled_dot_product_attention(x, keys, values, scale=self.scale), keys, values

    traced = []
    normalise = backend.normalise
    monkeypatch.setattr(backend, "normalise", lambda *given: traced.append(given) or normalise(*given))
    model = Attention().eval()
    compiled = torch.compile(model, backend=decoquant_backend, dynamic=True)
    compiled(torch.ones(2, 1, dtype=torch.long), torch.zeros(2, SLOTS, CHANNELS), torch.zeros(2, SLOTS, CHANNELS))
    assert len(traced) == 1


@torch.no_grad()
def test_modes_and_options_arrive(spy):
    arguments = cached_arguments()
    for how, patches, bits in (
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}, 4),
        ({"options": {"bits": 8, "max_autotune": False}}, {"max_autotune": False}, 8),
        ({}, {}, 4),
    ):
        torch.compiler.reset()
        ours = copies(arguments)
        torch.compile(step, backend=spy, **how)(*ours)
        assert spy.patches[-1] == patches
        assert f"bits={bits}" in repr(ours[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit": 4}, r"option 'bit' is not known: expected one of bits, key_bits, value_bits, sinks, window"),
        ({"bits": 9}, r"bits=9: expected one of 16, 8, 5, 4, 3, 2"),
        ({"window": 0}, r"window=0: expected at least 1"),
    ],
)
@torch.no_grad()
def test_wrong_options_are_an_error(options, message):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        torch.compile(attend, backend=decoquant_backend, options=options)(queries(), new(), new())


@torch.no_grad()
def test_torch_knows_the_backend_by_name():
    assert "decoquant" in torch.compiler.list_backends()
    arguments = cached_arguments()
    ours = copies(arguments)
    got = torch.compile(step, backend="decoquant", options={"bits": 16})(*ours)
    check(step, arguments, got=got, after=ours)
    assert type(ours[3]) is CacheTensor


def test_generate_compiles_with_it(spy):
    """Hugging Face copies the configuration, backend included, and its default mode is "reduce-overhead"."""
    model = hugging_face("llama")
    prompt = torch.randint(1, VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, **how)
    config = CompileConfig(backend=decoquant_backend)
    config._compile_all_devices = True
    cache = StaticCache(config=model.config, max_cache_len=32)
    with reports() as graphs:
        got = model.generate(prompt, past_key_values=cache, compile_config=config, **how)
    assert torch.equal(got, expected)
    assert all(type(t) is CacheTensor for layer in cache.layers for t in (layer.keys, layer.values))
    assert all(g.rewritten == 2 and g.calls for g in graphs)
    assert all(patches == {"triton.cudagraphs": True} for patches in spy.patches)


# What it tells


@torch.no_grad()
def test_logging(caplog):
    ours = copies(cached_arguments())
    with caplog.at_level(logging.DEBUG, logger="decoquant_compile"):
        torch.compile(step, backend=decoquant_backend, **EXACT)(*ours)
    told = {level: [r.getMessage() for r in caplog.records if r.levelname == level] for level in ("INFO", "DEBUG")}
    assert sum("1 of 1 attentions rewritten" in text for text in told["INFO"]) == 1
    assert sum("index_copy" in text and "L['keys']" in text for text in told["DEBUG"]) == 1
    before, after = (next(t for t in told["DEBUG"] if t.startswith(name)) for name in ("normalised", "rewritten"))
    assert "scaled_dot_product_attention" in before
    assert "decoquant" in after
    assert "scaled_dot_product_attention" not in after


def test_torch_logs_reaches_our_loggers():
    code = """
import torch, decoquant_compile
torch.compile(lambda x: x + 1, backend=decoquant_compile.decoquant_backend)(torch.ones(2))
"""
    environment = {**os.environ, "TORCH_LOGS": "+decoquant_compile"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "graph 0/0: untouched, the graph holds no attention" in done.stderr
