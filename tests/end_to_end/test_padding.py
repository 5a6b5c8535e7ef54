"""Batches whose sequences are padded on the left."""

import pytest
import torch
from transformers import CompileConfig

from tests.end_to_end.harness import NOISE, SMALL, assert_packed, distance, feed, packing, static_cache, tensors
from tests.end_to_end.models import hugging_face, prompts

FLIPS = 1e-2
"""Standard deviations: rounding may move single elements to a neighbouring code; 4 bits as a whole cost 0.1 to 1."""

LENGTHS = (40, 27, 12)
NAMES = ("llama", "qwen3", "mistral", "gemma3", "llama-eager", "gemma2-eager")


def left_padded(rows):
    """A batch of sequences and Hugging Face's mask over it."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat((torch.zeros(width - len(row), dtype=torch.long), row)) for row in rows])
    return ids, (ids != 0).long()


def normal(*params):
    """All pairs of a model and a number of bits; those not named are slow."""
    return [
        pytest.param(name, bits, marks=[] if (name, bits) in params else pytest.mark.slow)
        for name in NAMES
        for bits in (16, 8, 4, 2)
    ]


def tolerance(bits):
    return NOISE if bits == 16 else FLIPS


@pytest.mark.parametrize(("name", "bits"), normal(("llama", 16), ("mistral", 4)))
def test_rows_are_their_single_runs(name, bits):
    """The prompts are prefilled in the compiled region, then come single tokens and a chunk."""
    # A chunk that carries a sliding layer over its edge is attended before it is stored, elsewhere after: the exact
    # window is then older by the chunk. A padded row is nearer to the edge than its single run.
    slides = name in ("mistral", "gemma3", "gemma2-eager")
    model, rest = hugging_face(*name.split("-")), [1, 1, 1] if slides and bits < 16 else [1, 6, 1]
    rows = [prompts(length + sum(rest), seed=length) for length in LENGTHS]
    ids, mask = left_padded(rows)
    chunks = [max(LENGTHS), *rest]
    with packing(bits=bits, **SMALL):
        forward, cache = torch.compile(model.forward), static_cache(model, batch=len(rows))
        together = feed(forward, ids, chunks, cache, mask=mask)
        assert_packed(tensors(cache))
        for number, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
            mine = together[number, -len(row) :]
            alone = feed(forward, row[None], [length, *rest], static_cache(model), mask=torch.ones_like(row[None]))[0]
            assert distance(mine, alone) < tolerance(bits), length
    if bits == 16:
        dense = feed(model, ids, chunks, static_cache(model, batch=len(rows)), mask=mask)
        assert distance(together[mask == 1], dense[mask == 1]) < NOISE


def generate(model, rows, tokens=16):
    """Greedy tokens after each row and their logits, through `generate`: it prefills eagerly and compiles the rest."""
    ids, mask = left_padded(rows)
    config = CompileConfig()
    config._compile_all_devices = True  # on CPU `generate` does not compile unless told
    cache = static_cache(model, early=False)
    result = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        compile_config=config,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[:, ids.shape[1] :], torch.stack(result.logits, 1), cache


@pytest.mark.parametrize(("name", "bits"), normal(("gemma3", 4), ("qwen3", 8)))
def test_rows_are_their_single_runs_in_generate(name, bits):
    model = hugging_face(*name.split("-"))
    rows = [prompts(length, seed=length) for length in LENGTHS]
    with packing(bits=bits, **SMALL):
        tokens, logits, cache = generate(model, rows)
        assert_packed(tensors(cache))
        for number, row in enumerate(rows):
            own_tokens, own_logits, _ = generate(model, [row])
            assert torch.equal(tokens[number], own_tokens[0])
            assert distance(logits[number], own_logits[0]) < tolerance(bits)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "gemma3" else pytest.mark.slow) for n in NAMES])
def test_greedy_tokens_at_8_bits_are_those_of_the_dense_model(name):
    """With Inductor's own kernels; a new cache and other prompts need no other graphs."""
    model = hugging_face(*name.split("-"))
    with packing(bits=8, inductor={}, **SMALL) as session:
        compiled = 0
        for seed in range(3):
            rows = [prompts(length, seed=seed + length) for length in LENGTHS]
            with torch.compiler.set_stance("force_eager"):
                expected_tokens, expected_logits, _ = generate(model, rows)
            tokens, logits, cache = generate(model, rows)
            assert_packed(tensors(cache))
            assert compiled in (0, len(session.report().graphs))
            compiled = len(session.report().graphs)
            for row in range(len(rows)):
                same = int((tokens[row] == expected_tokens[row]).long().cumprod(0).sum())
                error = distance(logits[row, : same + 1], expected_logits[row, : same + 1])
                assert error < 0.2
                if same < tokens.shape[1]:  # only a near-tie may be decided the other way
                    first, second = expected_logits[row, same].topk(2).values
                    assert first - second < 2 * error * expected_logits.std()
