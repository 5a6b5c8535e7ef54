import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from decoquant_compile.quality import model
from decoquant_compile.quality.model import Heads, Subject
from tests.quality import tiny

SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def gemma2():
    return tiny.model(
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(**SIZES, head_dim=32, sliding_window=16, final_logit_softcapping=0.01),
    )


def cohere():
    return tiny.model(transformers.CohereForCausalLM, transformers.CohereConfig(**SIZES, logit_scale=7.0))


def mixtral():
    return tiny.model(transformers.MixtralForCausalLM, transformers.MixtralConfig(**SIZES, num_local_experts=2))


class Shifted(transformers.LlamaForCausalLM):
    """Its logits are not a function of its decoder's last hidden states alone."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        shift = torch.nn.functional.one_hot(input_ids, output.logits.shape[-1])
        return CausalLMOutputWithPast(logits=output.logits + shift, past_key_values=output.past_key_values)


@pytest.mark.parametrize(
    "make", [tiny.model, gemma2, cohere, mixtral], ids=["llama", "softcapped", "scaled", "mixture"]
)
@torch.no_grad()
def test_logits_of_states_are_the_models(make):
    causal = make()
    subject = Subject(causal)
    assert subject.body is causal.model
    ids = torch.arange(20)[None]
    states = subject.whole(ids)
    assert states.shape == (1, 20, 64)
    assert subject.vocabulary == 260
    expected = causal(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(subject.logits(states[0]), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(subject.whole(ids), states)  # the body is itself again


@torch.no_grad()
def test_a_model_without_a_separable_head_has_its_logits_for_states():
    causal = tiny.model(Shifted)
    subject = Subject(causal)
    ids = torch.arange(20)[None]
    assert subject.body is causal
    assert torch.equal(subject.logits(subject.whole(ids)[0]), causal(input_ids=ids, use_cache=False).logits[0])


def test_the_static_cache_is_there_before_the_first_call():
    subject = Subject(gemma2())
    assert subject.heads == dict.fromkeys(range(2), Heads(2, 32, 32))
    cache = subject.static_cache(3, 40)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(3, 2, 16, 32), (3, 2, 40, 32)]


def test_a_model_without_a_cache_is_refused():
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="MambaForCausalLM has no cache of keys and values"):
        Subject(transformers.MambaForCausalLM(config).eval())


def test_a_folder_is_loaded_and_what_is_none_is_refused(tmp_path):
    subject, tokenizer = model.load(str(tiny.save(tmp_path)))
    assert subject.model.dtype == torch.float32
    assert tokenizer("ab")["input_ids"] == tiny.tokenizer()("ab")["input_ids"]
    with pytest.raises(OSError, match=r"none\.gguf"):
        model.load(str(tmp_path / "none.gguf"))
