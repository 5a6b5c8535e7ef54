"""Hand-written models that keep their caches in buffers and write them by `index_put` or by slice assignment."""

import copy

import pytest
import torch

from tests.end_to_end.harness import SMALL, assert_packed, distance, noise, packing, shown, write_forms
from tests.end_to_end.models import BufferModel, prompts


def buffers(model):
    return [cache for layer in model.layers for cache in (layer.k_cache, layer.v_cache)]


def arguments(ids, start):
    return ids, torch.arange(start, start + ids.shape[1]), start


class Pair:
    """A compiled model and its dense twin, which get the same calls."""

    def __init__(self, model, bits, dynamic):
        self.model, self.twin, self.bits = model, copy.deepcopy(model), bits
        self.forward = torch.compile(model.forward, dynamic=dynamic)

    def feed(self, ids, chunks, start=0):
        """Feed `ids` in chunks, from position `start` on, and compare the logits of each.

        With 16 bits the twin is dense from its first call on. Otherwise it gets what the compiled model's caches show
        after the call, and writes the call's own tokens again.
        """
        for size, tokens in zip(chunks, ids.split(chunks, 1), strict=True):
            got = self.forward(*arguments(tokens, start))
            twin = self.twin if self.bits == 16 else shown(self.model)
            assert distance(got, twin(*arguments(tokens, start))) < noise(self.bits), (start, size)
            start += size

    def clear(self):
        for cache in (*buffers(self.model), *buffers(self.twin)):
            cache.zero_()


@pytest.mark.parametrize(
    ("form", "bits", "dynamic"),
    [
        pytest.param(form, bits, dynamic, marks=[] if usual else pytest.mark.slow)
        for form in ("put", "slice")
        for bits in (16, 4)
        for dynamic, usual in ((None, True), (True, bits == 16), (False, False))
    ],
)
@torch.no_grad()
def test_several_prompts_in_the_same_buffers(form, bits, dynamic):
    model = BufferModel(form)
    with packing(bits=bits, **SMALL) as session:
        pair = Pair(model, bits, dynamic)
        pair.feed(prompts(1, 43), [40, 1, 1, 1])  # prefilled in the compiled region, in one chunk
        assert_packed(buffers(model))
        # Some positions go back and are written again, as when a draft model's tokens are rejected: at first those that
        # still stand in the window, then others.
        pair.feed(prompts(1, 9, seed=1), [3, 1, 5], start=40)
        pair.feed(prompts(1, 9, seed=2), [3, 5, 1], start=25)
        # A second prompt over what the first one left: masked, and longer than what is written at first.
        pair.feed(prompts(1, 33, seed=3), [12, 19, 1, 1])
        pair.clear()
        pair.feed(prompts(1, 70, seed=4), [7, 1, 60, 1, 1])
        assert_packed(buffers(model))
    assert write_forms(session) == {"index_put" if form == "put" else "slice"}


@torch.no_grad()
def test_left_overs_of_a_prompt_do_not_reach_the_next():
    """A prompt after another one, without clearing, gives what it gives in fresh buffers."""
    ids = prompts(1, 60, seed=1)
    with packing(bits=4, **SMALL):
        model = BufferModel("put")
        forward = torch.compile(model.forward)
        forward(*arguments(prompts(1, 90), 0))
        used = [forward(*arguments(tokens, at)) for at, tokens in ((0, ids[:, :50]), (50, ids[:, 50:]))]
        for cache in buffers(model):
            cache.zero_()
        fresh = [forward(*arguments(tokens, at)) for at, tokens in ((0, ids[:, :50]), (50, ids[:, 50:]))]
        assert distance(torch.cat(used, 1), torch.cat(fresh, 1)) < 1e-2
