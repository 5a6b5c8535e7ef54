"""Keys and values that a call returns: which begin a cache, and which are something else."""

import pytest
import torch
from torch.nn import functional as F

from decoquant_compile.patterns import births
from tests.graphs import BATCH, CHANNELS, HEADS, SLOTS, capture

TOKENS = 5


def projected(x, weight):
    return (x @ weight).unflatten(-1, (HEADS, CHANNELS)).transpose(1, 2)


def begun(function, *args, held=()):
    """How many tensors of a function's results are caches, and the graph after."""
    recorder, _ = capture(function, *args)
    (normal,) = recorder.graphs
    held = [p for p in normal.placeholders if normal.source(p) in held]
    found = births.begin(normal.graph, normal.outputs, [value for value, _ in normal.mutations], held)
    normal.gm.recompile()
    return found, normal


def arguments():
    width = HEADS * CHANNELS
    return torch.randn(BATCH, TOKENS, width), torch.randn(width, width), torch.randn(width, width)


def attended(x, wk, wv):
    k, v = projected(x, wk), projected(x, wv)
    return F.scaled_dot_product_attention(projected(x, wv + 1), k, v), k, v


def both(x, wk, wv):
    return attended(x, wk, wv)


def keys_alone(x, wk, wv):
    return attended(x, wk, wv)[:2]


def used_elsewhere(x, wk, wv):
    out, k, v = attended(x, wk, wv)
    return out, k, v, v.sum()


def an_encoder(x, wk, wv):
    hidden = torch.tanh(x @ wk)
    return F.scaled_dot_product_attention(projected(x, wk), projected(hidden, wk), projected(hidden, wv)), hidden


def a_state_that_is_pooled(x, wk, wv):
    hidden = torch.tanh(x @ wk)
    return F.scaled_dot_product_attention((x @ wv)[:, None], hidden[:, None], hidden[:, None]), hidden


def side_by_side(x, wk, wv):
    both = torch.cat([x @ wk, x @ wv], -1)
    k, v = both.chunk(2, -1)
    return F.scaled_dot_product_attention((x @ wv + 1)[:, None], k[:, None], v[:, None]), both


def counted(x, wk, wv):
    out, k, v = attended(x, wk, wv)
    return out, k, v, torch.count_nonzero(k)


def a_view_too(x, wk, wv):
    out, k, v = attended(x, wk, wv)
    return out, k, v, v.flatten()


def without_attention(x, wk, wv):
    return x, projected(x, wk), projected(x, wv)


def of_ranks_two(x, wk, wv):
    return F.scaled_dot_product_attention(x[0], x[0] @ wk, x[0] @ wv), x[0] @ wk, x[0] @ wv


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (both, 2),
        (keys_alone, 0),
        (used_elsewhere, 0),
        (an_encoder, 0),
        (a_state_that_is_pooled, 0),
        (side_by_side, 1),
        (counted, 0),
        (a_view_too, 0),
        (without_attention, 0),
        (of_ranks_two, 0),
    ],
)
def test_what_begins_a_cache(function, count):
    found, normal = begun(function, *arguments())
    assert len(found) == count
    for cache, tokens in found.items():
        assert cache in normal.outputs
        assert tokens not in normal.outputs
        assert torch.equal(torch.tensor(cache.meta["val"].shape), torch.tensor(tokens.meta["val"].shape))


def moved(x, wk, wv):
    k, v = (x @ wk)[:, :, None], (x @ wv)[:, :, None]
    return F.scaled_dot_product_attention((x @ wv + 1)[:, None], k.transpose(1, 2), v.transpose(1, 2)), k, v


def test_a_single_token_may_leave_open_where_slots_are():
    x, *weights = arguments()
    assert len(begun(both, x[:, :1], *weights)[0]) == 2
    assert len(begun(moved, x, *weights)[0]) == 2
    assert not begun(moved, x[:1, :1], *weights)[0]


def blend(x, wk, wv, old_k, old_v):
    """A way to write that is not known: the sum of what was and what is new."""
    k, v = (
        old_k + F.pad(projected(x, wk), (0, 0, 0, SLOTS - TOKENS)),
        old_v + F.pad(projected(x, wv), (0, 0, 0, SLOTS - TOKENS)),
    )
    return F.scaled_dot_product_attention(projected(x, wk), k, v), k, v


def test_what_is_made_of_an_older_cache_is_none_that_begins():
    assert not begun(blend, *arguments(), *torch.zeros(2, BATCH, HEADS, SLOTS, CHANNELS))[0]


def rotated(x, wk, wv, table):
    k, v = projected(x, wk) * table, projected(x, wv)
    return F.scaled_dot_product_attention(projected(x, wk), k, v), k, v


def test_a_table_is_no_cache_unless_it_is_held():
    args = *arguments(), torch.randn(1, 1, TOKENS, CHANNELS)
    assert len(begun(rotated, *args)[0]) == 2
    assert not begun(rotated, *args, held=["L['table']"])[0]


def test_the_graph_does_the_same_and_can_be_put_back():
    args = arguments()
    found, normal = begun(both, *args)
    given = {f"L['{name}']": x for name, x in zip(("x", "wk", "wv"), args, strict=True)}
    inputs = [given[normal.source(p)] for p in normal.placeholders]
    expected = attended(*args)
    torch.testing.assert_close(normal.gm(*inputs)[1], expected, rtol=0, atol=0)
    kept, gone = found
    births.undo(found, {kept})
    normal.graph.lint()
    assert kept in normal.outputs
    assert found[gone] in normal.outputs
    assert found[gone].users
