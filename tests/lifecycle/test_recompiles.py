"""How often Dynamo compiles: at most twice as often as plain `torch.compile`, and its limit is not hit in silence.

A cache that becomes a handle changes its type, so a graph may be compiled once for new caches and once for held ones.
What is counted are graphs of Dynamo's; they run node by node here, since Inductor adds none.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decoquant_compile import CacheTensor, _compat, decoquant_backend, enable, restore
from tests.end_to_end.harness import assert_packed, distance, static_cache, tensors
from tests.end_to_end.models import SLIDING_WINDOW, hugging_face, prompts
from tests.graphs import cached_arguments

IDS = prompts(3, 96)

# (sequences, tokens of the prompt, slots of the cache, tokens decoded): prompts below, at and above the sliding window,
# decoding over its edge, caches of other lengths and batches.
CACHES = [
    (1, 10, 48, 18),
    (1, SLIDING_WINDOW, 48, 3),
    (2, 40, 64, 3),
    (1, 21, 96, 6),
    (3, 30, 96, 2),
    (2, SLIDING_WINDOW, 48, 3),
    (1, 60, 80, 2),
    (2, 22, 64, 4),
]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(_compat, "compile_fx", lambda gm, *_, **__: gm.forward)
    torch.compiler.reset()
    with torch.no_grad():
        yield


def plain(gm, _):
    return gm.forward


def entries():
    """How many graphs Dynamo has compiled since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def reset():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def serve(model, forward):
    """Prefill eagerly and decode each of `CACHES`; the number of entries after each, the logits, and the caches."""
    counts, logits, caches = [], [], []
    for batch, prompt, slots, steps in CACHES:
        cache = static_cache(model, slots=slots, early=False)
        model(IDS[:batch, :prompt], past_key_values=cache)
        decoded = range(prompt, prompt + steps)
        logits += [forward(IDS[:batch, at : at + 1], past_key_values=cache).logits for at in decoded]
        counts.append(entries())
        caches += tensors(cache)
    return counts, logits, caches


def ours(function, **how):
    return torch.compile(function, backend=decoquant_backend, options={"bits": 16}, **how)


@pytest.mark.parametrize(
    ("name", "packed", "dense"),
    [
        ("llama", [2, 2, 4, 6, 6, 6, 6, 6], [1, 1, 2, 3, 3, 3, 3, 3]),
        pytest.param("gemma3", [3, 4, 6, 9, 9, 9, 10, 12], [3, 3, 4, 6, 6, 6, 6, 7], marks=pytest.mark.slow),
    ],
)
def test_entries_over_eight_caches(name, packed, dense):
    """Entries after each of `CACHES`, on torch 2.13 and transformers 5.23, packed and with plain `torch.compile`."""
    model = hugging_face(name)
    reset()
    plain_counts, expected, _ = serve(model, torch.compile(model.forward, backend=plain, recompile_limit=64))
    reset()
    forward = ours(model.forward, recompile_limit=64)
    counts, logits, caches = serve(model, forward)
    assert all(distance(a, b) < 1e-4 for a, b in zip(logits, expected, strict=True))
    assert_packed(caches)
    assert all(mine <= 2 * theirs for mine, theirs in zip(counts, plain_counts, strict=True))
    assert (counts, plain_counts) == (packed, dense)
    again, _, caches = serve(model, forward)
    assert again == [counts[-1]] * len(CACHES)  # a second round brings nothing new
    assert_packed(caches)


def step(q, k, v, keys, values, positions, mask):
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def check(fn, arguments):
    dense = [a.dense() if isinstance(a, CacheTensor) else a.clone() for a in arguments]
    torch.testing.assert_close(fn(*arguments), step(*dense), rtol=0, atol=2e-6)


def test_a_graph_has_one_entry_for_new_caches_and_one_for_held_ones():
    reset()
    fn = ours(step)
    counts = []
    for _ in range(3):
        arguments = cached_arguments()
        for _ in range(3):
            check(fn, arguments)
            counts.append(entries())
        restore(arguments[3])
        check(fn, arguments)  # one of two is held
        counts.append(entries())
    assert counts == [1, 2, 2, 3] + [3] * 8


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_at_the_recompile_limit_there_is_a_warning(how):
    """The limit is reached by new shapes; what Dynamo does not compile any more is right, but dense."""
    reset()
    with torch._dynamo.config.patch(recompile_limit=2 if how == "configuration" else 8):
        fn = ours(step, dynamic=False, **({"recompile_limit": 2} if how == "argument" else {}))
        caches = [cached_arguments(tokens) for tokens in (1, 2, 3)]
        check(fn, caches[0])
        with pytest.warns(UserWarning, match=r"recompile_limit is 2: .*will run eagerly and dense") as told:
            check(fn, caches[1])
        assert len(told) == 1
        assert "torch.compile(..., recompile_limit=64)" in str(told[0].message)
        check(fn, caches[2])
        assert entries() == 2
    assert [type(arguments[3]) for arguments in caches] == [CacheTensor, CacheTensor, Tensor]


def test_a_session_raises_the_limit():
    reset()
    caches = [cached_arguments(tokens) for tokens in range(1, 13)]
    with enable(bits=16):
        fn = torch.compile(step, dynamic=False)
        for arguments in caches:
            check(fn, arguments)
    assert entries() == len(caches) > 8
    assert all(type(arguments[3]) is CacheTensor for arguments in caches)
