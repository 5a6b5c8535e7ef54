"""Inputs that hold many caches: which graphs take them apart, and which only look so."""

import pytest
import torch

from decoquant_compile.patterns.stacks import distribute, gathered, split
from tests.graphs import BATCH, CHANNELS, HEADS, SLOTS, capture, new


def stack(*counts):
    return torch.zeros(*counts, BATCH, HEADS, SLOTS, CHANNELS)


def read(write, cache, *args):
    """What is read of the write that `write(cache, ...)` does to its first argument."""

    def function(*args):
        result = write(*args)
        return result if isinstance(result, torch.Tensor) else args[1] + 1

    recorder, _ = capture(function, cache, *args)
    ((value, buffer),) = recorder.graphs[0].mutations
    return split(buffer, value)


def both(c, p, x):
    c[0][:, :, p], c[1][:, :, p] = x, x * 2


def test_each_part_is_written_and_then_read():
    def write(c, p, x):
        before = c[1].sum()
        both(c, p, x)
        return before + c[0].sum() + c[1].sum()

    found = read(write, stack(2), torch.tensor([3]), new())
    assert (found.axis, len(found.values)) == (0, 2)
    parts = [value for _, value in found.selections if isinstance(value, int)]
    assert sorted(set(parts)) == [0, 1]
    after = [value for _, value in found.selections if not isinstance(value, int)]
    assert set(after) <= set(found.values)


def test_a_part_that_is_written_twice_becomes_the_second_write():
    def write(c, p, x):
        both(c, p, x)
        c[0][:, :, p + 1] = x * 3
        return c[0].sum()

    found = read(write, stack(2), torch.tensor([3]), new())
    last = found.selections[-1][1]
    assert last is found.values[0]
    assert last not in found.values[1:]


def test_parts_along_an_inner_dim_and_from_behind():
    def write(c, p, x):
        for i in range(3):
            c[:, -1 - i, :, p] = x

    found = read(write, stack(3).transpose(0, 1).contiguous(), torch.tensor([3]), new())
    assert (found.axis, len(found.values)) == (1, 3)


@pytest.mark.parametrize(
    "write",
    [
        lambda c, p, x: [c[0].index_copy_(2, p, x)],
        lambda c, p, x: (both(c, p, x), c.sum())[1],
        lambda c, p, x: (both(c, p, x), c[:, 0].sum())[1],
        lambda c, p, x: (both(c, p, x), c.flatten(0, 1)[0].sum())[1],
        lambda c, p, x: [both(c, p, x), c.mul_(2)],
        lambda c, p, x: [c.index_copy_(3, p, torch.stack([x, x]))],
    ],
    ids=["one of two", "whole", "another dim", "view", "scaled", "together"],
)
def test_other_uses_are_no_stack(write):
    assert read(write, stack(2), torch.tensor([3]), new()) is None


def of_result(function, *args):
    recorder, _ = capture(function, *args)
    outputs = [x for x in recorder.graphs[0].outputs if x is not None]
    return gathered(outputs[0]), recorder.graphs[0]


def grown(past, k, v):
    return torch.stack([torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)])


def test_what_grows_part_by_part():
    found, graph = of_result(lambda past, k, v: (grown(past, k, v),), stack(2), new(), new())
    assert found is not None
    buffer, parts = found
    assert buffer is graph.placeholders[0]
    assert (parts.axis, [value for _, value in parts.selections]) == (0, [0, 1])


@pytest.mark.parametrize(
    "function",
    [
        lambda past, k, v: (grown(past, k, v) + past.sum(),),
        lambda past, k, v: (grown(past, k, v), past.sum()),
        lambda past, k, v: (torch.stack([torch.cat([past[0], k], 2), torch.cat([past[0], v], 2)], 1),),
        lambda past, k, v: (torch.stack([torch.cat([past[0], k], 2), torch.cat([k, v, v[:, :, :0]], 2)]),),
        lambda past, k, v: (torch.stack([torch.cat([past[i], k], 2) for i in (0, 1, 1)]),),
    ],
    ids=["computed", "whole read", "another dim", "from elsewhere", "more parts"],
)
def test_other_results_are_no_stack(function):
    one = torch.zeros(2, BATCH, HEADS, 1, CHANNELS)
    assert of_result(function, one, new(), new())[0] is None


def test_stacked_tokens_behind_a_tensor_are_tokens_behind_its_parts():
    def function(past, k, v):
        present = torch.cat([past, torch.stack([k, v], 1)], -2)
        return present, present[:, 1] * 2

    past, k, v = torch.randn(BATCH, 2, HEADS, 5, CHANNELS), new(), new()
    recorder, expected = capture(function, past, k, v)
    normal = recorder.graphs[0]
    found = gathered(distribute(normal.outputs[0]))
    assert found is not None
    assert normal.source(found[0]) == "L['past']"
    assert (found[1].axis, len(found[1].values), len(found[1].selections)) == (1, 2, 3)
    given = {"L['past']": past, "L['k']": k, "L['v']": v}
    normal.gm.recompile()
    _, results = normal.gm(*(given[normal.source(node)] for node in normal.placeholders))
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda past, k, v: (torch.cat([past, torch.stack([k, v])], 0),),
        lambda past, k, v: (torch.cat([torch.stack([k, v]), past], 3),),
        lambda past, k, v: (torch.cat([past, torch.stack([k, v])], 3) + 1,),
        lambda past, k, v: (torch.cat([past, torch.stack([k, v])], 3), past.sum()),
    ],
    ids=["more parts", "before", "computed", "whole read"],
)
def test_what_is_not_distributed(function):
    recorder, _ = capture(function, torch.zeros(2, BATCH, HEADS, 1, CHANNELS), new(), new())
    output = recorder.graphs[0].outputs[0]
    assert distribute(output) is output
