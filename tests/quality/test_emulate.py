import pytest
import torch
import transformers

from decoquant_compile.options import Options
from decoquant_compile.quality import rivals
from decoquant_compile.quality.emulate import Emulation, Ours, emulated
from tests.quality import tiny

PROMPT, LENGTH = 40, 120

MODELS = {
    "llama": (transformers.LlamaForCausalLM, tiny.config),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        lambda: transformers.Gemma2Config(
            vocab_size=260,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=16,
            attn_logit_softcapping=0.5,
            query_pre_attn_scalar=8,
        ),
    ),
    "gpt-oss": (
        transformers.GptOssForCausalLM,
        lambda: transformers.GptOssConfig(
            vocab_size=260,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=16,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
    ),
}


class Marked:
    """Stored keys or values are zeros: what a query still sees, it sees exactly."""

    sinks = 2

    def __init__(self, window):
        self.window = window
        self.seen = []

    def stored(self, x, grouped, role, prompt):
        self.seen.append((role, None if grouped is None else tuple(grouped.shape), prompt))
        return torch.zeros_like(x)

    def exact(self, role, length, prompt):
        return (torch.arange(length) + 1 - self.window).clamp_min(0)


def ids():
    return torch.randint(0, 260, (1, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def states(model, emulation=None, otherwise="eager"):
    model.set_attn_implementation(otherwise)
    if emulation is None:
        return model.model(ids(), use_cache=False).last_hidden_state
    with emulated(model, emulation, otherwise=otherwise):
        return model.model(ids(), use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_with_nothing_stored_it_is_the_models_attention(name):
    cls, configuration = MODELS[name]
    model = tiny.model(cls, configuration())
    torch.testing.assert_close(states(model, Emulation(None, 0)), states(model), rtol=1e-4, atol=1e-5)


def test_the_model_gets_its_attention_back():
    model = tiny.model()
    before = states(model, otherwise="sdpa")
    with pytest.raises(RuntimeError, match="inside"), emulated(model, Emulation(None, 0), otherwise="sdpa"):
        raise RuntimeError("inside")
    assert torch.equal(model.model(ids(), use_cache=False).last_hidden_state, before)


def test_queries_of_the_prompt_are_exact_and_later_ones_are_not():
    model = tiny.model()
    exact, found = states(model), states(model, Emulation(rivals.parse("rtn:2"), PROMPT))
    torch.testing.assert_close(found[:, :PROMPT], exact[:, :PROMPT], rtol=1e-4, atol=1e-5)
    assert (found[:, PROMPT:] - exact[:, PROMPT:]).norm(dim=-1).min() > 1e-3


@pytest.mark.parametrize("role", ["key", "value"])
def test_sinks_and_window_are_exact(role):
    """One attention by itself: with the stored tokens zero, the output is the sum over sinks and window alone."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, LENGTH, 8, generator=generator) for h in (4, 2, 2))
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
    scheme = Marked(window=10)
    found, _ = Emulation(scheme, PROMPT, roles=frozenset({role})).attend(
        torch.nn.Identity(), query, key, value, mask, scaling=0.5
    )
    assert scheme.seen == [(role, (1, 2, 2, LENGTH, 8) if role == "key" else None, PROMPT)]
    at, columns = 100, torch.arange(101)
    exact = (columns < 2) | (columns > at - 10)
    for head in range(4):
        k, v = key[0, head // 2, :101].clone(), value[0, head // 2, :101].clone()
        (k if role == "key" else v)[~exact] = 0
        expected = torch.softmax(k @ query[0, head, at] * 0.5, 0) @ v
        torch.testing.assert_close(found[0, at, head], expected, rtol=1e-4, atol=1e-5)


def test_layers_and_roles_are_chosen():
    model = tiny.model()
    rival = rivals.parse("rtn:3")
    exact = states(model)
    moved = lambda **where: (states(model, Emulation(rival, PROMPT, **where)) - exact).norm().item()
    everything = moved()
    assert moved(layers=frozenset({7})) < 1e-3 * everything
    assert moved(roles=frozenset()) < 1e-3 * everything
    parts = [moved(layers=frozenset({at}), roles=frozenset({role})) for at in range(2) for role in ("key", "value")]
    assert all(1e-2 * everything < part < 1.5 * everything for part in parts)
    assert len(set(parts)) == 4


def test_ours_has_16_bits_and_falls_with_the_bits():
    model = tiny.model()
    exact = states(model)
    moved = [
        (states(model, Emulation(Ours(Options(bits=bits, window=16), queries=True), PROMPT)) - exact).norm().item()
        for bits in (16, 8, 4, 2)
    ]
    assert moved[0] < 1e-3
    assert moved[0] < moved[1] < moved[2] < moved[3]


def test_ours_is_fitted_to_queries_only_where_they_are_known():
    x = torch.randn(1, 2, LENGTH, 32, generator=torch.Generator().manual_seed(0))
    grouped = torch.randn(1, 2, 2, LENGTH, 32) * torch.logspace(-2, 2, 32)
    known, unknown = (Ours(Options(bits=3), queries=queries) for queries in (True, False))
    plain = unknown.stored(x, None, "key", 100)
    assert torch.equal(unknown.stored(x, grouped, "key", 100)[:, :, :100], plain[:, :, :100])
    assert not torch.equal(known.stored(x, grouped, "key", 100)[:, :, :100], plain[:, :, :100])
    assert torch.equal(known.stored(x, None, "value", 100), unknown.stored(x, None, "value", 100))
    assert torch.equal(known.stored(x, grouped, "key", 100)[:, :, :4], x[:, :, :4])
