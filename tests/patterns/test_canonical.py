"""Spellings that become one, and those that do not: the graph does the same before and after."""

import operator

import pytest
import torch

from tests.graphs import capture, interpret

aten = torch.ops.aten
X, NEW = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 2, 4)


def folded(function, *args):
    """The graph of `function`, folded; what it computes is what `function` does."""
    recorder, got = capture(function, *args, compiler=interpret)
    assert torch.equal(got, function(*args))
    return recorder.graphs[0].graph


def targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_parts_are_selected():
    graph = folded(lambda x: x.unbind(1)[1] + 1, X)
    assert aten.unbind.int not in targets(graph)
    assert operator.getitem not in targets(graph)


@pytest.mark.parametrize("convert", [lambda x: x.type_as(x + 1), lambda x: x.to(torch.float32)])
def test_a_conversion_of_nothing_goes(convert):
    graph = folded(lambda x: convert(x) * 2, X)
    assert not {aten.type_as.default, aten.to.dtype} & set(targets(graph))


def test_a_conversion_stays():
    graph = folded(lambda x: x.to(torch.bfloat16) * 2, X)
    assert aten._to_copy.default in targets(graph)


def test_indices_become_wide():
    def put(x, new, at):
        x = x.clone()
        x[:, :, at] = new
        return x

    graph = folded(put, X, NEW, torch.tensor([3, 5], dtype=torch.int32))
    (put,) = graph.find_nodes(op="call_function", target=aten.index_put.default)
    assert put.args[1][2].meta["val"].dtype == torch.int64


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.new_ones(3, 4),
        lambda x: x.new_zeros(3, 4, dtype=torch.bool),
        lambda x: x.new_full((3, 4), 7.0),
    ],
)
def test_a_new_tensor_is_not_made_of_another(make):
    graph = folded(lambda x: make(x.exp()) + 1, X)
    assert aten.exp.default not in targets(graph)


def test_slots_around_new_ones_are_a_write():
    graph = folded(lambda x, new: torch.cat((x[:, :, :3], new, x[:, :, 5:]), 2), X, NEW)
    assert targets(graph) == [aten.slice_scatter.default]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, new: torch.cat((x[:, :, :3], new, x[:, :, 6:]), 2),  # shorter
        lambda x, new: torch.cat((x[:, :, :4], new, x[:, :, 5:]), 2),  # longer
        lambda x, new: torch.cat((x[:, :, 1:4], new, x[:, :, 5:]), 2),  # of the right size, elsewhere
        lambda x, new: torch.cat((x[:, :, :3], new, x[:, :, 4:-1]), 2),
        lambda x, new: torch.cat((x[:, :, :3], new, x[:, :, :5]), 2),
        lambda x, new: torch.cat((x[:, :, :3], new, (x + 1)[:, :, 5:]), 2),  # of two tensors
        lambda x, new: torch.cat((x[:, :, :10:3], new, x[:, :, 6:]), 2),
        lambda x, new: torch.cat((x[:, :, :3], new.double(), x[:, :, 5:]), 2),
    ],
)
def test_others_are_not(function):
    assert aten.cat.default in targets(folded(function, X, NEW))


def test_only_indices_become_wide():
    """Not the same tensor where it is what is written to."""
    at = torch.tensor([1, 0, 2], dtype=torch.int32)
    folded(lambda at: at.index_put((at,), at + 1), at)


def test_strides_stay():
    """The result of `cat` is contiguous, whatever its parts are; a write has the strides of its tensor."""
    turned = X.transpose(1, 2).contiguous().transpose(1, 2)
    graph = folded(lambda x, new: torch.cat((x[:, :, :3], new, x[:, :, 5:]), 2), turned, NEW)
    assert aten.cat.default in targets(graph)


def test_an_empty_tensor_of_one_dim():
    folded(lambda x, new: torch.cat((x[:, :, :3], new, x[:, :, 3:]), 2), X, torch.zeros(0))


@pytest.mark.parametrize("convert", [lambda x: x.type_as(x + 1), lambda x: x.to(torch.float32)])
def test_a_conversion_of_nothing_is_an_alias(convert):
    def write_to_the_source(x):
        z = x * 2
        y = convert(z)
        z.add_(1)
        return y + 0

    folded(write_to_the_source, X)


def padded(x, new):
    whole = torch.nn.functional.pad(x, (0, 0, 0, new.shape[2]))
    whole[:, :, -new.shape[2] :] = new
    return whole


def put_into_zeros(x, new):
    whole = x.new_zeros(2, 3, x.shape[2] + new.shape[2], 4)
    whole[:, :, : x.shape[2]] = x
    whole[:, :, x.shape[2] :] = new
    return whole


def copied_into_what_was_empty(x, new):
    whole = torch.empty(2, 3, x.shape[2] + new.shape[2], 4)
    whole.narrow(2, 0, x.shape[2]).copy_(x)
    whole.narrow(2, x.shape[2], new.shape[2]).copy_(new)
    return whole


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("grow", [padded, put_into_zeros, copied_into_what_was_empty])
def test_a_longer_tensor_that_is_filled_is_two_put_together(grow, dynamic):
    recorder, got = capture(grow, X, NEW, compiler=interpret, dynamic=dynamic)
    assert torch.equal(got, torch.cat([X, NEW], 2))
    (joined,) = recorder.graphs[0].graph.find_nodes(op="call_function", target=aten.cat.default)
    assert all(part.op == "placeholder" for part in joined.args[0])


def padded_before(x, new):
    whole = torch.nn.functional.pad(x, (0, 0, new.shape[2], 0))
    whole[:, :, : new.shape[2]] = new
    return whole


def padded_too_far(x, new):
    whole = torch.nn.functional.pad(x, (0, 0, 0, 5))
    whole[:, :, 10:12] = new
    return whole


def padded_along_two(x, new):
    whole = torch.nn.functional.pad(x, (0, 1, 0, 2))
    whole[:, :, 10:] = torch.nn.functional.pad(new, (0, 1))
    return whole


def over_the_old(x, new):
    whole = torch.nn.functional.pad(x, (0, 0, 0, 1))
    whole[:, :, 9:] = new
    return whole


def from_the_second(x, new):
    whole = x.new_zeros(2, 3, 12, 4)
    whole[:, :, 1:11] = x
    whole[:, :, 10:] = new
    return whole


@pytest.mark.parametrize("grow", [padded_before, padded_too_far, padded_along_two, over_the_old, from_the_second])
def test_what_is_more_than_two_put_together_stays(grow):
    assert aten.cat.default not in targets(folded(grow, X, NEW))


def rolled(x, new):
    x = x.roll(-2, 2)
    x[:, :, -2:] = new
    return x


def rolled_from_the_front(x, new):
    x = torch.roll(x, (-2,), (2,)).clone()
    x[:, :, 8:10] = new
    return x


@pytest.mark.parametrize("slide", [rolled, rolled_from_the_front])
def test_a_rolled_tensor_with_new_slots_is_two_put_together(slide):
    graph = folded(slide, X, NEW)
    (joined,) = graph.find_nodes(op="call_function", target=aten.cat.default)
    assert aten.roll.default not in targets(graph)
    assert [part.target for part in joined.args[0]] == [aten.slice.Tensor, "arg1_1"]


def rolled_further(x, new):
    x = x.roll(-3, 2)
    x[:, :, -2:] = new
    return x


def rolled_back(x, new):
    x = x.roll(2, 2)
    x[:, :, -2:] = new
    return x


def rolled_twice(x, new):
    x = x.roll((-2, 1), (2, 1))
    x[:, :, -2:] = new
    return x


def rolled_along_another(x, new):
    x = x.roll(-2, 0)
    x[:, :, -2:] = new
    return x


def rolled_and_written_before(x, new):
    x = x.roll(-2, 2)
    x[:, :, -3:-1] = new
    return x


@pytest.mark.parametrize(
    "slide", [rolled_further, rolled_back, rolled_twice, rolled_along_another, rolled_and_written_before]
)
def test_what_is_rolled_otherwise_stays(slide):
    assert aten.roll.default in targets(folded(slide, X, NEW))


def test_the_end_and_new_slots_are_the_end_of_the_whole():
    def window(x, new):
        whole = torch.cat([x, new], 2)
        return torch.cat([torch.cat([x[:, :, 2:], new[:, :, -2:]], 2), whole], 2)

    graph = folded(window, X, NEW)
    whole, _ = graph.find_nodes(op="call_function", target=aten.cat.default)
    assert {user.target for user in whole.users} == {aten.cat.default, aten.slice.Tensor}


@pytest.mark.parametrize(
    "window",
    [
        lambda x, new: torch.cat([x[:, :, 2:], new + 0], 2),  # other slots
        lambda x, new: torch.cat([x[:, :, 2:9], new], 2),  # a gap
        lambda x, new: torch.cat([x[:, :, ::2], new], 2),
        lambda x, new: torch.cat([new, x[:, :, 2:]], 2),
        lambda x, new: torch.cat([x[:, 2:].expand(2, 3, 10, 4), new], 2),
    ],
)
def test_what_is_no_end_of_the_whole_stays(window):
    def both(x, new):
        whole = torch.cat([x, new], 2)
        return torch.cat([window(x, new), whole], 2)

    assert targets(folded(both, X, NEW)).count(aten.cat.default) == 3
