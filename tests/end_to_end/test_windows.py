"""Windows of a fixed length that a graph is given and returns, their oldest slots gone, in the spellings there are."""

import pytest
import torch
from torch.nn import functional as F

from decoquant_compile import CacheTensor
from tests.end_to_end.harness import NOISE, SMALL, distance, packing

BATCH, HEADS, SLOTS, CHANNELS = 2, 2, 24, 16
CALLS = [5, 1, 1, 1, 3, *[1] * 12]


def shifted(old, new):
    window = torch.cat([old[:, :, new.shape[2] :], new], 2)
    return window, window


def rolled(old, new):
    window = torch.roll(old, -new.shape[2], 2)
    window[:, :, -new.shape[2] :] = new
    return window, window


def cut(old, new):
    whole = torch.cat([old, new], 2)
    return whole, whole[:, :, -SLOTS:]


def put_together_twice(old, new):
    """What is attended to, and what is kept."""
    return torch.cat([old, new], 2), torch.cat([old[:, :, new.shape[2] :], new[:, :, -SLOTS:]], 2)


def model(slide):
    def step(q, new, cache, length: int):
        (keys, first), (values, second) = (slide(*pair) for pair in zip(cache, new, strict=True))
        slots, tokens = keys.shape[2], q.shape[2]
        places = torch.arange(slots) + length + tokens - slots
        mask = (places >= 0) & (places <= torch.arange(length, length + tokens)[:, None])
        return F.scaled_dot_product_attention(q, keys, values, mask), (first, second)

    return step


@torch.no_grad()
def conversation(step):
    generator = torch.Generator().manual_seed(0)
    cache, length, found = tuple(torch.zeros(BATCH, HEADS, SLOTS, CHANNELS) for _ in range(2)), 0, []
    for tokens in CALLS:
        q, *new = torch.randn(3, BATCH, HEADS, tokens, CHANNELS, generator=generator)
        out, cache = step(q, new, cache, length)
        length += tokens
        found.append((out, cache))
    return found


@pytest.mark.parametrize("slide", [shifted, rolled, cut, put_together_twice])
@pytest.mark.parametrize("bits", [16, 8])
def test_windows_are_packed(slide, bits):
    torch._dynamo.reset()
    step = model(slide)
    with packing(bits=bits, **SMALL) as session:
        found = conversation(torch.compile(step, dynamic=False))
    for (out, cache), (expected, dense) in zip(found, conversation(step), strict=True):
        assert distance(out, expected) < (NOISE if bits == 16 else 0.05)
        assert all(isinstance(x, CacheTensor) for x in cache)
        if bits == 16:
            assert all(torch.equal(x.dense(), y) for x, y in zip(cache, dense, strict=True))
    assert {finding.outcome for graph in session.report().graphs for finding in graph.findings} == {"rewritten"}
