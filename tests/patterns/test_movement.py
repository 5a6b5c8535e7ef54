"""`peel` says where each element of a moved tensor came from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from decoquant_compile.patterns.movement import MOVEMENT, Repeat, Span, is_identity, peel, plain

aten = torch.ops.aten


def trace(function, *inputs):
    """The graph of a function of tensors, as ATen calls, and the node that it returns."""
    gm = make_fx(function)(*inputs)
    (result,) = gm.graph.output_node().all_input_nodes
    return gm, result


def gather(source, axes):
    """What `axes` says a tensor made from `source` is, element by element."""
    for d, span in enumerate(axes.spans):
        source = source.narrow(d, span.first, span.length)
    sizes = []
    index = [torch.zeros((), dtype=torch.long)] * source.dim()
    for n, atoms in enumerate(axes.dims):
        parts = [a.factor if isinstance(a, Repeat) else source.shape[a] for a in atoms]
        sizes.append(math.prod(parts))
        coordinate = torch.arange(sizes[-1]).reshape([-1] + [1] * (len(axes.dims) - n - 1))
        for atom, size in zip(reversed(atoms), reversed(parts), strict=True):
            if not isinstance(atom, Repeat):
                index[atom] = coordinate % size
            coordinate = coordinate // size
    return source[tuple(index)].expand(sizes)


UNDERSTOOD = ("transpose", "permute", "unsqueeze", "squeeze", "expand", "repeat", "interleave", "clone", "cast")
ALL = (*UNDERSTOOD, "slice", "select", "merge", "split")


def draw_step(draw, shape, kinds):
    """One movement op for a tensor of this shape."""
    rank = len(shape)
    dim = draw(st.integers(0, rank - 1))
    other = draw(st.integers(0, rank - 1))
    kind = draw(st.sampled_from(kinds))
    size = shape[dim]
    if kind == "transpose":
        return lambda x: x.transpose(dim, other)
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        return lambda x: x.permute(order)
    if kind == "unsqueeze":
        return lambda x: x.unsqueeze(dim)
    if kind == "squeeze":
        return lambda x: x.squeeze(dim)
    if kind == "expand":
        factor = draw(st.integers(1, 3))
        return lambda x: x.unsqueeze(dim).expand([*shape[:dim], factor, *shape[dim:]])
    if kind == "slice":
        first = draw(st.integers(-size, size - 1))
        end = draw(st.integers(first % size + 1, size + 2))
        return lambda x: aten.slice.Tensor(x, dim, first, end)
    if kind == "select" and rank > 2:
        at = draw(st.integers(-size, size - 1))
        return lambda x: x.select(dim, at)
    if kind == "repeat":
        reps = draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank + 1))
        return lambda x: x.repeat(reps)
    if kind == "interleave":
        factor = draw(st.integers(1, 3))
        return lambda x: aten.repeat_interleave.self_int(x, factor, dim)
    if kind == "merge" and dim + 1 < rank:
        return lambda x: x.reshape([*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :]])
    if kind == "split" and size % 2 == 0:
        return lambda x: x.reshape([*shape[:dim], 2, size // 2, *shape[dim + 1 :]])
    if kind == "cast":
        return lambda x: x.to(torch.float64)
    return lambda x: x.clone()


@st.composite
def chains(draw, kinds=ALL):
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    source = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    steps, x = [], source
    for _ in range(draw(st.integers(0, 6))):
        step = draw_step(draw, list(x.shape), kinds)
        if step(x).dim() == 0 or not 0 < step(x).numel() <= 4096:
            break
        steps.append(step)
        x = step(x)
    return source, steps


def run(steps, x):
    for step in steps:
        x = step(x)
    return x


def at(gm, node, source):
    """The value of one node of a graph with one input."""
    interpreter = torch.fx.Interpreter(gm, garbage_collect_values=False)
    interpreter.run(source)
    return interpreter.env[node]


@settings(deadline=None, max_examples=150)
@given(chains())
def test_axes_describe_what_eager_execution_does(chain):
    source, steps = chain
    gm, result = trace(lambda x: run(steps, x) + 0, source)
    moved = result.all_input_nodes[0]
    walk = peel(moved)
    expected = at(gm, moved, source)
    got = gather(at(gm, walk.source, source), walk.axes)
    assert got.shape == expected.shape
    assert torch.equal(got.to(expected.dtype), expected)


@settings(deadline=None, max_examples=60)
@given(chains(UNDERSTOOD))
def test_walks_without_slices_and_splits_reach_the_start(chain):
    source, steps = chain
    _, result = trace(lambda x: run(steps, x) + 0, source)
    assert peel(result.all_input_nodes[0]).source.op == "placeholder"


@settings(deadline=None, max_examples=60)
@given(chains(), st.data())
def test_views_that_change_nothing_change_no_axes(chain, data):
    source, steps = chain
    noise = [
        aten.alias.default,
        lambda x: aten.view.default(x.contiguous(), list(x.shape)),
        lambda x: aten.slice.Tensor(x, 0, 0, 2**63 - 1),
        lambda x: x.unsqueeze(0).squeeze(0),
        lambda x: x.expand(x.shape),
    ]
    noisy = []
    for step in steps:
        noisy += [step, data.draw(st.sampled_from(noise))]
    bare = peel(trace(lambda x: run(steps, x) + 0, source)[1].all_input_nodes[0])
    more = peel(trace(lambda x: run(noisy, x) + 0, source)[1].all_input_nodes[0])
    if bare.source.op == "placeholder":
        assert more.source.op == "placeholder"
        assert more.axes == bare.axes


def last(function, *shape):
    """`peel` of what a function makes from one tensor."""
    _, result = trace(lambda x: function(x) + 0, torch.randn(shape))
    return peel(result.all_input_nodes[0])


def test_repeat_kv_puts_the_repetition_inside_the_head():
    walk = last(lambda x: x[:, :, None].expand(3, 2, 4, 5, 6).reshape(3, 8, 5, 6), 3, 2, 5, 6)
    assert walk.axes.dims == ((0,), (1, Repeat(4)), (2,), (3,))


def test_repeat_puts_the_repetition_outside_the_head():
    assert last(lambda x: x.repeat(1, 4, 1, 1), 3, 2, 5, 6).axes.dims == ((0,), (Repeat(4), 1), (2,), (3,))


def test_slices_compose():
    walk = last(lambda x: x[:, 2:7].transpose(0, 1)[1:3], 3, 9)
    assert walk.axes.spans == (Span(0, 3), Span(3, 2))
    assert walk.axes.dims == ((1,), (0,))


def test_dims_of_size_one_leave_no_trace():
    assert last(lambda x: x.reshape(5, 1, 6), 1, 5, 6).axes.dims == ((1,), (), (2,))


def test_a_dim_that_is_split_ends_the_walk_there():
    walk = last(lambda x: x.reshape(3, 2, 4).transpose(0, 1), 3, 8)
    assert walk.source.op == "call_function"
    assert walk.axes.dims == ((1,), (0,), (2,))


def test_casts_are_recorded_and_casts_to_integers_end_the_walk():
    assert last(lambda x: x.to(torch.bfloat16).to(torch.float32), 3, 4).axes.dtypes == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )
    assert last(lambda x: x.to(torch.int32), 3, 4).source.target in (aten._to_copy.default, aten.to.dtype)


def test_a_step_other_than_one_ends_the_walk():
    assert last(lambda x: x[::2], 6, 4).source.target is aten.slice.Tensor


def test_copy_and_a_scatter_over_everything_give_their_second_argument():
    base, part = torch.randn(3, 4), torch.randn(3, 4)
    _, result = trace(lambda a, b: aten.slice_scatter.default(a, aten.copy.default(a, b), 0, 0, 3) + 0, base, part)
    walk = peel(result.all_input_nodes[0])
    assert walk.source.name.startswith("b")
    assert is_identity(walk)
    assert plain(result.all_input_nodes[0]) is walk.source


def test_a_scatter_into_a_part_is_no_movement():
    _, result = trace(lambda a, b: aten.slice_scatter.default(a, b, 0, 1, 3) + 0, torch.randn(5, 4), torch.randn(2, 4))
    assert peel(result.all_input_nodes[0]).source.target is aten.slice_scatter.default


def test_plain_keeps_casts_transposes_and_slices():
    assert plain(last(lambda x: x.to(torch.float64).clone(), 4, 4).nodes[-1]).op == "call_function"
    assert plain(last(lambda x: x.transpose(0, 1).clone(), 4, 4).nodes[-1]).target is aten.transpose.int
    assert plain(last(lambda x: x[:, :2].clone(), 4, 4).nodes[-1]).target is aten.slice.Tensor


def test_until_stops_the_walk():
    _, result = trace(lambda x: x.transpose(0, 1).clone().unsqueeze(0) + 0, torch.randn(3, 4))
    clone = result.all_input_nodes[0].args[0]
    assert peel(result.all_input_nodes[0], until={clone}).source is clone


@pytest.mark.parametrize("target", sorted(MOVEMENT, key=str), ids=str)
def test_every_operator_of_the_table_exists(target):
    assert isinstance(target, torch._ops.OpOverload)
    assert not target._schema.is_mutable


def test_constant_factors_are_passed_over_if_asked():
    def function(x, y):
        return (2 * (x.flatten(0, 1) * torch.tensor(0.5)).unflatten(0, (2, 3)) / 4 * torch.full([], 3.0)).mT

    gm, result = trace(function, torch.ones(2, 3, 4, 5), torch.ones(5))
    (source, _) = gm.graph.find_nodes(op="placeholder")
    walk = peel(result, scaled=True)
    assert (walk.source, walk.factor) == (source, 0.75)
    assert walk.axes.dims == ((0,), (1,), (3,), (2,))
    assert peel(result).source is not source
    gm, result = trace(lambda x, y: x * y / y[0], torch.ones(4, 5), torch.ones(5))
    assert peel(result, scaled=True) == peel(result)
