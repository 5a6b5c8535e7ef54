"""Selections of sequences or slots: what of a graph's inputs and results is one."""

import pytest
import torch
import torch.nn.functional as F

from decoquant_compile.patterns.selections import reordered, returned, taken
from tests.graphs import BATCH, CHANNELS, HEADS, SLOTS, cache, capture, new

INDEX = torch.tensor([1, 0])


def graph_of(function, *inputs):
    """The graph of a function with an attention beside it."""
    attended = lambda *args: (*function(*args), F.scaled_dot_product_attention(args[0], args[0], args[0]).sum())
    recorder, _ = capture(attended, new(), *inputs)
    return recorder.graphs[0]


@pytest.mark.parametrize(
    ("select", "found"),
    [
        (lambda c: c.index_select(0, INDEX), [("index_select", 0)]),
        (lambda c: c[INDEX], [("index", 0)]),
        (lambda c: c[:, :, :5], [("slice", 2)]),
        (lambda c: c[:, :, 3:], [("slice", 2)]),
        (lambda c: c.narrow(2, 1, 4), [("slice", 2)]),
        (lambda c: c[:, INDEX], [("index", 1)]),
        (lambda c: c[:, :, ::2], []),
        (lambda c: c.flip(0), []),
        (lambda c: c[INDEX, INDEX], []),
        (lambda c: c[0], []),
    ],
)
def test_of_inputs(select, found):
    normal = graph_of(lambda x, c: (select(c) + 1,), cache())
    selections = [selection for _, _, selection in taken(normal.graph, (), normal.placeholders)]
    assert [(selection.kind, selection.dim) for selection in selections] == found


def test_two_that_are_the_same_are_one():
    normal = graph_of(lambda x, c: (c[:, :, :5] + 1, c[:, :, :5].sin()), cache())
    ((given, node, _),) = taken(normal.graph, (), normal.placeholders)
    assert set(given.users) == {node}
    assert len(node.users) == 2


@pytest.mark.parametrize(
    "use",
    [
        lambda x, c: (c[:, :, :5] + 1, c[:, :, :4]),
        lambda x, c: (c[:, :, :5] + 1, c.sin()),
        lambda x, c: (c[:, :, :5] + 1, c.transpose(1, 2)),
    ],
)
def test_an_input_that_is_used_otherwise_stays(use):
    normal = graph_of(use, cache())
    assert not list(taken(normal.graph, (), normal.placeholders))


def test_an_input_that_is_to_be_kept_stays():
    normal = graph_of(lambda x, c: (c[:, :, :5] + 1,), cache())
    assert not list(taken(normal.graph, set(normal.placeholders), normal.placeholders))


@pytest.mark.parametrize(
    ("use", "count"),
    [
        (lambda x, c: (torch.cat([c[:, :, :5], x], 2),), 1),
        (lambda x, c: (torch.cat([c[INDEX][:, :, :5], x], 2),), 1),
        (lambda x, c: (torch.cat([x, c[:, :, :5]], 2),), 0),
        (lambda x, c: (c[:, :, :5] + 1,), 0),
    ],
)
def test_of_what_is_no_cache_yet_only_what_is_appended_to(use, count):
    assert len(list(taken(graph_of(use, cache()).graph, ()))) == count


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (lambda c, x: c.copy_(c[INDEX]), [("index", 0)]),
        (lambda c, x: c.__setitem__(slice(None), c.index_select(0, INDEX)), [("index_select", 0)]),
        (lambda c, x: c.copy_(c[:, INDEX]), [("index", 1)]),
        (lambda c, x: c.copy_(c[INDEX] + c), []),
        (lambda c, x: c.copy_(c[INDEX[:1]]), []),
        (lambda c, x: c.copy_(c[:, :, :1]), []),
        (lambda c, x: c.__setitem__(slice(0, 1), c[INDEX][:1]), []),
        (lambda c, x: c[:, :, :1].copy_(x), []),
    ],
)
def test_of_inputs_that_are_written(write, found):
    def function(x, c):
        write(c, x)
        c[:, :, 2:3] = x
        return (c + 1,)

    normal = graph_of(function, cache())
    written = [target for _, target in normal.mutations]
    assert [(selection.kind, selection.dim) for _, _, selection in reordered(written, ())] == found
    assert not list(reordered(written, written))


@pytest.mark.parametrize(
    ("select", "found"),
    [
        (lambda c: c[INDEX], ["index"]),
        (lambda c: c[:, :, :5], ["slice"]),
        (lambda c: c[INDEX][:, :, :5], ["index", "slice"]),
        (lambda c: c[:, :, -4:], []),  # a window: how the cache itself is written
        (lambda c: c * 2, []),
    ],
)
def test_of_results(select, found):
    def function(x, c):
        c = torch.cat([c, x], 2)
        return select(c), c.sum()

    normal = graph_of(function, cache())
    base, chain = returned(normal.outputs[0])
    assert [selection.kind for selection in chain] == found
    assert (base is normal.outputs[0]) == (not found)


def test_slices_of_one_product_are_no_selections():
    wide = torch.rand(BATCH, HEADS, SLOTS, 3 * CHANNELS)
    parts = lambda x, c: tuple((c * 2)[..., i * CHANNELS : (i + 1) * CHANNELS] for i in range(3))
    normal = graph_of(parts, wide)
    assert [returned(output) for output in normal.outputs[:3]] == [(output, []) for output in normal.outputs[:3]]
