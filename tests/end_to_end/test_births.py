"""Caches that the first call makes of its own keys and values, as code does that begins with no cache at all."""

import pytest
import torch
from torch.nn import functional as F

import decoquant_compile
from decoquant_compile import CacheTensor
from tests.end_to_end.harness import NOISE, SMALL, distance, noise, packing

BATCH, HEADS, CHANNELS = 2, 2, 16


def attention(q, keys, values):
    """Of the last tokens."""
    mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


WIDTH = 32
PROJECTIONS = [torch.randn(WIDTH, h * CHANNELS, generator=torch.Generator().manual_seed(h)) / 4 for h in (4, 2, 3)]


def projected(x):
    """Queries, keys and values."""
    heads = (2 * HEADS, HEADS, HEADS)
    products = (x @ weight[:, : h * CHANNELS] for weight, h in zip(PROJECTIONS, heads, strict=True))
    return [y.unflatten(-1, (-1, CHANNELS)).transpose(1, 2) for y in products]


def pair(x, past):
    q, k, v = projected(x)
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    return attention(q, k, v), (k, v)


def slots_first(x, past):
    q, k, v = projected(x)
    k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    if past is not None:
        k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    return attention(q, k.transpose(1, 2), v.transpose(1, 2)), (k, v)


def stacked(x, past):
    q, k, v = projected(x)
    if past is not None:
        k, v = (torch.cat([old, new], 2) for old, new in zip(past.unbind(0), (k, v), strict=True))
    present = torch.stack([k, v])
    return attention(q, present[0], present[1]), present


def keys_transposed(x, past):
    q, k, v = projected(x)
    k = k.transpose(2, 3).contiguous()
    if past is not None:
        k, v = torch.cat([past[0], k], 3), torch.cat([past[1], v], 2)
    return attention(q, k.transpose(2, 3), v), (k, v)


def side_by_side(x, past):
    """Keys and values in one tensor: rebuilt."""
    q, k, v = projected(x)
    both = torch.cat([k, v], -1)
    if past is not None:
        both = torch.cat([past, both], 2)
    k, v = both.split(CHANNELS, -1)
    return attention(q, k, v), both


def rotated(x, past):
    """Keys that get their positions after every read: rebuilt."""
    q, k, v = projected(x)
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    turned = k * torch.arange(k.shape[2])[:, None].cos()
    return attention(q, turned, v), (k, v)


def one_head(x, past):
    """Keys and values of three dims: rebuilt."""
    q, k, v = projected(x)
    k, v = k[:, 0], v[:, 0]
    if past is not None:
        k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    return attention(q, k[:, None], v[:, None]), (k, v)


REBUILT = {side_by_side, rotated, one_head}


def calls(chunks):
    generator = torch.Generator().manual_seed(0)
    for tokens in chunks:
        yield torch.randn(BATCH, tokens, WIDTH, generator=generator)


def tensors(cache):
    return [cache] if isinstance(cache, torch.Tensor) else list(cache)


@pytest.mark.parametrize("model", [pair, slots_first, stacked, keys_transposed, *REBUILT])
@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_the_first_call_packs(model, dynamic):
    cache = twin = None
    with packing(bits=16) as session:
        compiled = torch.compile(model, dynamic=dynamic)
        for x in calls([20, 1, 1, 5, 1]):
            expected, twin = model(x, twin)
            got, cache = compiled(x, cache)
            torch.testing.assert_close(got, expected, atol=NOISE, rtol=NOISE)
            for mine, theirs in zip(tensors(cache), tensors(twin), strict=True):
                assert isinstance(mine, CacheTensor)
                torch.testing.assert_close(mine.dense(), theirs, atol=0, rtol=0)
    assert {f.write for f in session.report().findings} == {"cat"}
    assert {"rebuilt" in f.form for f in session.report().findings} == {model in REBUILT}


@pytest.mark.parametrize("model", [pair, stacked, rotated])
@torch.no_grad()
def test_at_few_bits(model):
    cache = twin = None
    with packing(bits=8, **SMALL):
        compiled = torch.compile(model)
        for x in calls([40, *[1] * 6]):
            expected, twin = model(x, twin)
            got, cache = compiled(x, cache)
            assert ((got - expected).norm() / expected.norm()) < 0.05


@torch.no_grad()
def test_two_continuations_of_one_first_call():
    prompt, left, right = calls([20, 1, 1])
    _, past = pair(prompt, None)
    expected = [pair(x, past)[0] for x in (left, right)]
    with packing(bits=16):
        compiled = torch.compile(pair)
        _, packed = compiled(prompt, None)
        for x, want in zip((left, right), expected, strict=True):
            torch.testing.assert_close(compiled(x, packed)[0], want, atol=NOISE, rtol=NOISE)


@torch.no_grad()
def test_cross_attention_that_the_first_call_projects():
    project = torch.randn(CHANNELS * HEADS, 2 * CHANNELS * HEADS) / 6

    def model(q, encoded, past):
        if past is None:
            past = tuple(x.unflatten(-1, (HEADS, CHANNELS)).transpose(1, 2) for x in (encoded @ project).chunk(2, -1))
        return F.scaled_dot_product_attention(q, *past, enable_gqa=True), past

    encoded, queries = torch.randn(BATCH, 30, CHANNELS * HEADS), [torch.randn(BATCH, 4, n, CHANNELS) for n in (3, 1, 1)]
    with packing(bits=16) as session:
        compiled, past, twin = torch.compile(model), None, None
        for q in queries:
            expected, twin = model(q, encoded, twin)
            got, past = compiled(q, encoded, past)
            assert all(isinstance(x, CacheTensor) for x in past)
            assert distance(got, expected) < noise(16)
    assert [f.write for f in session.report().findings] == ["cat", "read"]


@torch.no_grad()
def test_a_cropped_cache_that_is_read():
    """The last slots are attended to and returned, also where their number is symbolic."""
    slots = 16

    def model(x, past):
        q, k, v = projected(x)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            if k.shape[2] > slots:
                k, v = k[:, :, -slots:], v[:, :, -slots:]
        return attention(q, k, v), (k, v)

    for dynamic in (None, True):
        cache = twin = None
        with packing(bits=16):
            compiled = torch.compile(model, dynamic=dynamic)
            for x in calls([12, 1, 1, 1, 1, 1, 1, 3, 1]):
                expected, twin = model(x, twin)
                got, cache = compiled(x, cache)
                torch.testing.assert_close(got, expected, atol=NOISE, rtol=NOISE)
                assert [x.shape for x in cache] == [x.shape for x in twin]
                assert torch.equal(cache[0].dense(), twin[0])


@torch.no_grad()
def test_what_lives_across_a_graph_break_is_no_cache():
    def model(x):
        q, k, v = projected(x)
        out = attention(q, k, v)
        torch._dynamo.graph_break()
        return out, k.norm(dim=-1).topk(4).indices, v.sum(2)

    x = torch.randn(BATCH, 40, WIDTH)
    torch.compiler.reset()
    with pytest.warns(UserWarning, match="no attention was rewritten"), decoquant_compile.enable(bits=4, **SMALL):
        got = torch.compile(model)(x)
    for mine, theirs in zip(got, model(x), strict=True):
        torch.testing.assert_close(mine, theirs)


@torch.no_grad()
def test_the_result_of_attention_has_the_strides_that_it_had():
    def model(x, past):
        q, k, v = projected(x)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True), (k, v)

    past = None
    with packing(bits=16):
        compiled = torch.compile(model)
        for x in calls([20, 3, 1]):
            expected, _ = model(x, None)
            out, past = compiled(x, past)
            assert out.stride() == expected.stride()
            assert out.transpose(1, 2).view(BATCH, x.shape[1], -1).is_contiguous()
