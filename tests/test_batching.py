"""Graphs without `vmap`: the same values, by operators alone."""

import pytest
import torch
from torch.func import grad, vmap
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from decoquant_compile import _compat
from decoquant_compile.batching import unbatched
from tests.end_to_end.harness import SMALL, assert_packed, noise, packing
from tests.graphs import BATCH, CHANNELS, GROUPS, HEADS, SLOTS


def once(x, y):
    return vmap(lambda a, b: (a * b).sum())(x, y) + 1


def nested(x, y):
    return vmap(vmap(lambda a, b: a + 2 * b, in_dims=(0, None)), in_dims=(None, 0))(x, y)


def two(x, y):
    return vmap(torch.dot)(x, y) + vmap(lambda a: a.cumsum(0))(x.T).sum(0)


def in_place(x, y):
    def first(a, b):
        room = a.new_zeros(5)
        room[:4] = a
        return room * b.sum()

    return vmap(first)(x, y)


def of_sizes(x, y):
    return vmap(lambda i: torch.arange(x.shape[1]) <= i)(torch.arange(x.shape[0])).int() + y.int()


def compiled(function, *arguments, dynamic=None):
    """(Dynamo's graph, it without `vmap`, what that computes)."""
    seen = []

    def backend(gm, inputs):
        flat = unbatched(gm)
        seen.append((gm, flat))
        return flat.forward

    torch.compiler.reset()
    with torch.no_grad():
        result = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*arguments)
    ((gm, flat),) = seen
    return gm, flat, result


def holds_vmap(gm):
    return any(node.target in _compat.VMAP_STEPS for node in gm.graph.nodes)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [once, nested, two, in_place, of_sizes])
def test_the_same_values(function, dynamic):
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    gm, flat, result = compiled(function, x, y, dynamic=dynamic)
    assert holds_vmap(gm)
    assert not holds_vmap(flat)
    torch.testing.assert_close(result, function(x, y))
    names = [[node.name for node in graph.graph.find_nodes(op="placeholder")] for graph in (gm, flat)]
    assert names[0] == names[1]


def test_a_graph_without_is_itself():
    gm, flat, _ = compiled(lambda x: x + 1, torch.ones(3))
    assert flat is gm


@pytest.mark.parametrize(
    "function",
    [
        grad(lambda a: (a * a).sum()),
        vmap(lambda a: a + torch.tensor([1.0, 2.0, 3.0])),
    ],
)
def test_what_is_not_understood_stays(function):
    gm, flat, _ = compiled(function, torch.ones(2, 3))
    assert flat is gm
    assert _compat.functorch_depth() == 0


def test_a_stretch_that_fails_leaves_no_transform_behind(monkeypatch):
    def failing(*_, **__):
        torch._C._functorch._vmap_increment_nesting(2, "error")
        torch._C._functorch._vmap_increment_nesting(3, "error")
        raise RuntimeError

    monkeypatch.setattr(_compat.proxy_tensor, "make_fx", lambda *_, **__: failing)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    gm, flat, result = compiled(once, x, y)
    assert flat is gm
    assert _compat.functorch_depth() == 0
    torch.testing.assert_close(result, once(x, y))


@torch.no_grad()
def test_a_block_mask_that_the_graph_makes():
    def function(q, k, v, keys, values, positions):
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        first = positions[0]
        blocks = create_block_mask(lambda b, h, i, j: j <= i + first, None, None, q.shape[2], SLOTS, device="cpu")
        return flex_attention(q, keys, values, block_mask=blocks, enable_gqa=True)

    generator = torch.Generator().manual_seed(0)
    caches = [torch.zeros(BATCH, HEADS, SLOTS, CHANNELS) for _ in range(2)]
    dense = [cache.clone() for cache in caches]
    with packing(bits=16, **SMALL) as session:
        ours = torch.compile(function)
        for positions in (torch.arange(7), torch.arange(7, 8), torch.arange(8, 9)):
            sizes = HEADS * GROUPS, HEADS, HEADS
            new = [torch.randn(BATCH, n, len(positions), CHANNELS, generator=generator) for n in sizes]
            got = ours(*new, *caches, positions)
            for cache, tokens in zip(dense, new[1:], strict=True):
                cache.index_copy_(2, positions, tokens)
            seen = torch.arange(SLOTS) <= positions[:, None]
            expected = torch.nn.functional.scaled_dot_product_attention(new[0], *dense, seen, enable_gqa=True)
            torch.testing.assert_close(got, expected, rtol=0, atol=noise(16))
        assert_packed(caches)
    assert {finding.form for finding in session.report().findings} == {"flex"}
