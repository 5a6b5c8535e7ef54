"""Keys and values whose caches have other orders of dims than each other."""

import pytest
import torch

from decoquant_compile import CacheTensor
from tests.end_to_end.harness import NOISE, SMALL, packing

BATCH, HEADS, SLOTS, CHANNELS = 2, 2, 48, 16
ORDERS = {  # of keys and of values: which of (batch, heads, slots, channels) each dim is
    "keys transposed": ((0, 1, 3, 2), (0, 1, 2, 3)),
    "keys slots first": ((2, 0, 1, 3), (0, 1, 2, 3)),
    "values before heads": ((0, 1, 2, 3), (0, 2, 1, 3)),
}


def attention(q, keys, values, admitted):
    weights = (q @ keys.mT / CHANNELS**0.5).masked_fill(~admitted, -torch.inf).softmax(-1)
    return weights @ values


def usual(x, order):
    return x.permute([order.index(d) for d in range(4)])


def fixed(orders):
    def model(q, k, v, start, cache):
        positions = start + torch.arange(k.shape[2])
        for x, new, order in zip(cache, (k, v), orders, strict=True):
            x.index_copy_(order.index(2), positions, new.permute(order))
        keys, values = map(usual, cache, orders)
        return attention(q, keys, values, torch.arange(SLOTS) <= positions[:, None]), cache

    return model


def growing(orders):
    def model(q, k, v, start, cache):
        grown = tuple(
            torch.cat([x, new.permute(order)], order.index(2))
            for x, new, order in zip(cache, (k, v), orders, strict=True)
        )
        keys, values = map(usual, grown, orders)
        admitted = torch.arange(keys.shape[2]) <= start + torch.arange(k.shape[2])[:, None]
        return attention(q, keys, values, admitted), grown

    return model


def calls():
    generator, start = torch.Generator().manual_seed(0), 0
    for tokens in (20, 1, 1, 5, 1):
        qkv = [torch.randn(BATCH, HEADS, tokens, CHANNELS, generator=generator) for _ in range(3)]
        yield *qkv, torch.tensor(start)
        start += tokens


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("make", [fixed, growing])
@pytest.mark.parametrize("bits", [16, 8])
@torch.no_grad()
def test_each_has_its_own(name, make, bits):
    orders = ORDERS[name]
    model, slots = make(orders), SLOTS if make is fixed else 0
    sizes = BATCH, HEADS, slots, CHANNELS
    cache, twin = (tuple(torch.zeros([sizes[d] for d in order]) for order in orders) for _ in range(2))
    with packing(bits=bits, **SMALL) as session:
        compiled = torch.compile(model)
        for call in calls():
            expected, twin = model(*call, twin)
            got, cache = compiled(*call, cache)
            for mine, theirs in zip(cache, twin, strict=True):
                assert isinstance(mine, CacheTensor)
                assert mine.shape == theirs.shape
                if bits == 16:
                    assert torch.equal(mine.dense(), theirs)
            error = (got - expected).norm() / expected.norm()
            assert error < (NOISE if bits == 16 else 0.05)
    assert {f.form for f in session.report().findings} == {"eager"}
