"""Sites of real models and of the usual hand-written caches."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    StaticCache,
)

from decoquant_compile.patterns.match import CacheRead, Site
from tests.graphs import BATCH, CHANNELS, GROUPS, HEADS, Recorder, cached_arguments, interpret, results_of

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOW = 8
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=WINDOW),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL | {"num_key_value_heads": 1},
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def run(name, chunks, *, early=False, dynamic=None, mask=None):
    """Feed a model `chunks` tokens at a time, the first eagerly unless `early`, and check the logits."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="sdpa").eval()
    recorder = Recorder(interpret)
    compiled = torch.compile(model.forward, backend=recorder, dynamic=dynamic)
    config = model.config
    ours, theirs = (StaticCache(config=config, max_cache_len=32) for _ in range(2))
    batch = 1 if mask is None else mask.shape[0]
    if early:
        heads, channels = config.num_key_value_heads, config.head_dim
        ours.early_initialization(batch, heads, channels, torch.float32, torch.device("cpu"))
    held = 0
    with torch.no_grad():
        for number, tokens in enumerate(chunks):
            ids, held = torch.randint(0, 64, (batch, tokens)), held + tokens
            extra = {}
            if mask is not None:
                extra["attention_mask"] = F.pad(mask, (0, held - mask.shape[1]), value=1)
            step = compiled if early or number else model
            logits = step(input_ids=ids, past_key_values=ours, use_cache=True, **extra).logits
            expected = model(input_ids=ids, past_key_values=theirs, use_cache=True, **extra).logits
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert not recorder.refused
    return recorder


def sites(results):
    assert all(isinstance(r, Site) for r in results), results
    return results


def forms(recorder):
    """For each graph, the form of each layer's writes."""
    assert all(s.key.form == s.value.form for results in recorder.results for s in sites(results))
    return [tuple(s.key.form for s in results) for results in recorder.results]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_full_attention(name):
    recorder = run(name, [5, 1, 1])
    assert forms(recorder) == [("index_copy",) * 2]
    for site in recorder.results[0]:
        assert site.read == CacheRead(0, after_write=True)
        assert (site.key_dims, site.groups) == ((0, 1, 2, 3), 2)
        assert site.core.mask is not None
        assert site.key.positions is site.value.positions
    buffers = [n for s in recorder.results[0] for n in (s.key.buffer, s.value.buffer)]
    sources = [recorder.graphs[0].source(n) for n in buffers]
    expected = [f"layers[{i}].{kind}" for i in (0, 1) for kind in ("keys", "values")]
    assert [s[s.index("layers") :] for s in sources] == expected


def test_compiled_prefill_of_an_existing_cache():
    assert forms(run("llama", [5, 1], early=True)) == [("index_copy",) * 2] * 2


def test_every_form_of_a_sliding_window():
    recorder = run("mistral", [5, 1, 4, 3, 1, 1])
    kinds = forms(recorder)
    assert kinds == [("index_copy",) * 2, ("append",) * 2, ("append",) * 2, ("roll",) * 2]
    filling, full, decode = (results[0] for results in recorder.results[1:])
    # The window fills: slots [0, held) are kept, held being an input of the graph.
    assert filling.read == CacheRead(0, after_write=False)
    assert isinstance(filling.key.kept.meta["val"], torch.SymInt)
    # The window is full: its first slot falls off before the attention.
    assert (full.read, full.key.kept) == (CacheRead(1, after_write=False), WINDOW)
    assert (decode.read, decode.key.kept) == (CacheRead(0, after_write=True), WINDOW)


def test_a_prompt_longer_than_the_window():
    recorder = run("mistral", [11, 1], early=True)
    assert forms(recorder) == [("replace",) * 2, ("roll",) * 2]
    for site in recorder.results[0]:
        assert site.read is None
        assert site.key.new.meta["val"].shape[2] == 11


def test_a_hybrid_model_with_one_key_value_head():
    recorder = run("gemma3", [5, 1, 1, 1, 1, 1])
    assert forms(recorder) == [("index_copy",) * 2, ("index_copy",) * 2, ("roll", "index_copy")]
    assert {s.groups for results in recorder.results for s in results} == {4}


def test_symbolic_shapes():
    assert forms(run("gemma3", [5, 1, 1, 3, 3, 1], dynamic=True)) == [
        ("index_copy", "index_copy"),
        ("append", "index_copy"),
        ("append", "index_copy"),
        ("roll", "index_copy"),
    ]


def test_a_batch_with_padding_on_the_left():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    recorder = run("llama", [5, 1, 3], mask=mask)
    assert set(forms(recorder)) == {("index_copy",) * 2}
    assert all(s.core.mask is not None for results in recorder.results for s in results)


def index_put(q, k, v, keys, values, positions, mask):
    keys[:, :, positions] = k
    values[:, :, positions] = v
    k, v = (x.repeat_interleave(GROUPS, dim=1) for x in (keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_gpt_fast():
    (site,) = sites(results_of(index_put, *cached_arguments()))
    assert (site.key.form, site.key.wraps, site.groups) == ("index_put", True, GROUPS)
    assert site.read == CacheRead(0, after_write=True)


def test_gpt_fast_prefill():
    (site,) = sites(results_of(index_put, *cached_arguments(4)))
    assert site.key.new.meta["val"].shape[2] == 4


def test_an_index_put_in_slots_before_heads():
    def function(q, k, v, keys, values, positions, mask):
        keys[:, positions] = k.transpose(1, 2)
        values[:, positions] = v.transpose(1, 2)
        k, v = (x.transpose(1, 2) for x in (keys, values))
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    q, k, v, keys, values, positions, mask = cached_arguments()
    keys, values = (x.transpose(1, 2).contiguous() for x in (keys, values))
    (site,) = sites(results_of(function, q, k, v, keys, values, positions, mask))
    assert (site.key.slot_dim, site.key_dims, site.groups) == (1, (0, 2, 1, 3), GROUPS)


def test_slices_of_a_growing_prefix():
    def function(q, k, v, keys, values, start: int):
        end = start + k.shape[2]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        return F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], enable_gqa=True)

    (site,) = sites(results_of(function, *cached_arguments()[:5], 3))
    assert (site.key.form, site.key.start, site.read) == ("slice", 3, CacheRead(0, after_write=True))
    assert site.core.key.meta["val"].shape[2] == 4


def test_slices_in_slots_before_heads_at_a_symbolic_start():
    def function(q, k, v, keys, values, start: int):
        end = start + k.shape[1]
        keys[:BATCH, start:end] = k
        values[:BATCH, start:end] = v

        def repeat_kv(x):
            x = x[:BATCH, :end, :, None].expand(BATCH, end, HEADS, GROUPS, CHANNELS)
            return x.reshape(BATCH, end, HEADS * GROUPS, CHANNELS).transpose(1, 2)

        return F.scaled_dot_product_attention(q, repeat_kv(keys), repeat_kv(values))

    q, *rest = cached_arguments()[:5]
    (site,) = sites(results_of(function, q, *(x.transpose(1, 2).contiguous() for x in rest), 3, dynamic=True))
    assert (site.key.form, site.key_dims, site.groups) == ("slice", (0, 2, 1, 3), GROUPS)
    assert isinstance(site.key.start.meta["val"], torch.SymInt)


def test_a_read_that_starts_later():
    def function(q, k, v, keys, values, positions, mask):
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return F.scaled_dot_product_attention(q, keys[:, :, 2:9], values[:, :, 2:9], mask[..., 2:9], enable_gqa=True)

    (site,) = sites(results_of(function, *cached_arguments()))
    assert site.read == CacheRead(2, after_write=True)


def test_a_window_shifted_by_concatenation():
    def function(q, k, v, keys, values, positions, mask):
        keys.copy_(torch.cat([keys[:, :, 1:], k], 2))
        values.copy_(torch.cat([values[:, :, 1:], v], 2))
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    (site,) = sites(results_of(function, *cached_arguments()))
    assert (site.key.form, site.read) == ("append", CacheRead(1, after_write=False))


def test_attention_to_the_tokens_of_the_call_only():
    def function(q, k, v, keys, values, positions, mask):
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    (site,) = sites(results_of(function, *cached_arguments(4)))
    assert (site.read, site.key.form, site.groups) == (None, "index_copy", GROUPS)


def test_a_cache_of_half_precision_read_in_full():
    def function(q, k, v, keys, values, positions, mask):
        keys[:, :, positions] = k.to(keys.dtype)
        values[:, :, positions] = v.to(values.dtype)
        return F.scaled_dot_product_attention(q, keys.float(), values.float(), mask, enable_gqa=True)

    q, k, v, keys, values, positions, mask = cached_arguments()
    (site,) = sites(results_of(function, q, k, v, keys.bfloat16(), values.bfloat16(), positions, mask))
    assert site.key.buffer.meta["val"].dtype == torch.bfloat16


def test_one_key_value_head_broadcast_over_the_queries():
    def function(q, k, v, keys, values, positions, mask):
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return F.scaled_dot_product_attention(q, keys, values, mask)

    q, k, v, keys, values, positions, mask = cached_arguments()
    one = (x[:, :1].contiguous() for x in (k, v, keys, values))
    (site,) = sites(results_of(function, q, *one, positions, mask))
    assert site.groups == q.shape[1]


def test_a_symbolic_number_of_slots_whose_size_is_read():
    def function(q, k, v, keys, values, positions, mask):
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True), keys.shape[2] + 1

    arguments = cached_arguments()
    for tensor, dim in ((arguments[3], 2), (arguments[4], 2), (arguments[6], 3)):
        torch._dynamo.mark_dynamic(tensor, dim)
    (site,) = sites(results_of(function, *arguments))
    assert isinstance(site.key.buffer.meta["val"].shape[2], torch.SymInt)


def test_a_symbolic_window_that_rolls():
    def function(q, k, v, keys, values):
        for dense, added in ((keys, k), (values, v)):
            rolled = dense.roll(-1, dims=2)
            rolled[:, :, torch.tensor([-1])] = added
            dense.copy_(rolled)
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    arguments = cached_arguments()[:5]
    for tensor in arguments[3:]:
        torch._dynamo.mark_dynamic(tensor, 2)
    (site,) = sites(results_of(function, *arguments))
    assert isinstance(site.key.kept.meta["val"], torch.SymInt)


def test_positions_computed_twice_are_the_same():
    def function(q, k, v, keys, values, positions, mask):
        keys.index_copy_(2, positions + 1, k)
        values.index_copy_(2, positions + 1, v)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    sites(results_of(function, *cached_arguments()))


def test_two_layers_are_two_sites():
    def function(q, k, v, keys, values, positions, mask, more_keys, more_values):
        first = index_put(q, k, v, keys, values, positions, mask)
        return index_put(first, k + 1, v + 1, more_keys, more_values, positions, mask)

    arguments = cached_arguments()
    first, second = sites(results_of(function, *arguments, arguments[3] + 1, arguments[4] + 1))
    assert len({first.key.buffer, first.value.buffer, second.key.buffer, second.value.buffer}) == 4


def test_keys_scaled_after_the_cache_scale_the_logits():
    def function(q, k, v, keys, values, positions, mask, how):
        keys.index_copy_(2, positions, k * 3)  # before the cache, scaling is nothing to the attention
        values.index_copy_(2, positions, v)
        return F.scaled_dot_product_attention(q, (keys / 4).float() * 2, values, mask, enable_gqa=True, **how)

    for how, scale in (({}, CHANNELS**-0.5), ({"scale": 0.3}, 0.3)):
        (site,) = results_of(function, *cached_arguments(), how)
        assert isinstance(site, Site)
        assert site.core.scale == pytest.approx(scale / 2)


def test_new_tokens_scaled_before_the_write_are_the_operands_of_their_attention():
    def function(q, k, v, keys, values, positions, mask):
        k = k * 0.5
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        k, v = (x.repeat_interleave(GROUPS, 1) for x in (k, v))
        return (q @ k.mT).softmax(-1) @ v

    (site,) = results_of(function, *cached_arguments(4))
    assert isinstance(site, Site)
    assert (site.read, site.core.scale) == (None, 1.0)
