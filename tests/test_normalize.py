"""Normal form and back: the same results, the same writes, the same aliases as plain Inductor."""

import copy
import unittest.mock
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.compile_fx import compile_fx

from decoquant_compile import _compat
from decoquant_compile.normalize import finish, normalise, unsupported
from tests.graphs import Recorder, cached_arguments, capture, interpret

aten = torch.ops.aten


def tensors(values):
    return [x for x in values if isinstance(x, torch.Tensor)]


def check_round_trip(function, *arguments, compiler=interpret, dynamic=None):
    """Results and written arguments must be those of eager execution; return the recorder and the outputs."""
    ours, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
    with torch.no_grad():
        expected = function(*theirs)
    recorder, got = capture(function, *ours, compiler=compiler, dynamic=dynamic)
    assert not recorder.refused
    torch.testing.assert_close(got, expected)
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b)
    return recorder, ours, got


def step(q, k, v, keys, values, positions, mask, length):
    positions = positions + length
    length.add_(q.shape[2])
    keys.index_copy_(2, positions, k)
    values[:, :, positions] = v
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True) * 2


@pytest.mark.parametrize("compiler", [interpret, compile_fx], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [None, True])
def test_round_trip(compiler, dynamic):
    arguments = *cached_arguments(2), torch.tensor(1)
    recorder, *_ = check_round_trip(step, *arguments, compiler=compiler, dynamic=dynamic)
    normal = recorder.graphs[0]
    assert [normal.source(p) for p in normal.placeholders if normal.source(p).endswith("'keys']")] != []


def test_the_normal_form_is_functional_and_whole():
    recorder, _ = capture(step, *cached_arguments(2), torch.tensor(1))
    (normal,) = recorder.graphs
    calls = [n for n in normal.graph.nodes if n.op == "call_function"]
    assert not any(n.target._schema.is_mutable for n in calls)
    assert aten.scaled_dot_product_attention.default in {n.target for n in calls}
    assert aten._assert_tensor_metadata.default not in {n.target for n in calls}
    written = {normal.source(target): value.target for value, target in normal.mutations}
    assert written == {
        "L['keys']": aten.index_copy.default,
        "L['values']": aten.index_put.default,
        "L['length']": aten.add.Tensor,
    }
    assert len(normal.outputs) == 1


def test_a_graph_is_traced_once():
    """Tracing is nearly all of what our passes take."""
    runs = []

    def backend(gm, inputs):
        run = torch.fx.Interpreter.run
        with unittest.mock.patch.object(torch.fx.Interpreter, "run", autospec=True, side_effect=run) as counted:
            normalise(gm, inputs)
        runs.append(counted.call_count)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(step, backend=backend)(*cached_arguments(2), torch.tensor(1))
    assert runs == [1]


# Calls of which many are alike but for what a key could miss: a tensor given twice, 1 and 1.0 and True, strides, views
# and writes in between.
CALLS = (
    lambda x, _: x * x,
    lambda x, y: x * y,
    lambda x, _: x + 1,
    lambda x, _: x + 1.0,
    lambda x, _: x * True,
    lambda x, y: torch.cat((x, y, x)).narrow(0, 0, 3),
    F.linear,
    lambda x, _: x.t(),
    lambda x, y: x.add_(y.clone()),
    lambda x, _: x[1:2].mul_(2).expand(3, 3) * 1,
    lambda x, _: x.sum(0, keepdim=True).expand(3, 3) * 1,
    lambda x, _: x.to(torch.float32).abs(),
    lambda x, _: F.dropout(x, 0.5, training=False),
    lambda x, y: torch.where(y > 0, x, y),
    lambda x, _: x.contiguous(),
)


@settings(deadline=None, max_examples=60)
@given(program=st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_calls_that_are_alike_are_recorded_as_the_tracer_would(program):
    def function(*inputs):
        values = list(inputs)
        for call, i, j in program:
            values.append(call(values[i % len(values)], values[j % len(values)]))
        return tuple(x * 1 for x in values)  # no views of inputs

    def described(normal):
        values = [n.meta["val"] for n in normal.graph.nodes if "val" in n.meta]
        return [n.format_node() for n in normal.graph.nodes], [(x.shape, x.stride(), x.dtype) for x in values]

    inputs = torch.randn(3, 3), torch.randn(3, 3).t(), torch.randn(3, 6)[:, ::2]
    recorder, *_ = check_round_trip(function, *inputs)
    with unittest.mock.patch.object(_compat._Recorder, "call", lambda _, run, *call: run(*call)):
        through_all_modes, *_ = check_round_trip(function, *inputs)
    assert described(recorder.graphs[0]) == described(through_all_modes.graphs[0])


LAYERS = 20


def test_layers_alike_go_through_the_modes_of_the_tracer_once():
    def function(x, w):
        for _ in range(LAYERS):
            x = F.silu(F.linear(x, w)) * x + w
        return x

    recorded = []
    record = _compat._Recorder._record
    with unittest.mock.patch.object(
        _compat._Recorder, "_record", lambda *given: recorded.append(given[1].op) or record(*given)
    ):
        check_round_trip(function, torch.rand(3, 3) / 4, torch.rand(3, 3) / 4)
    assert Counter(recorded) == dict.fromkeys(
        (aten.linear.default, aten.silu.default, aten.mul.Tensor, aten.add.Tensor), LAYERS - 1
    )


@pytest.mark.parametrize("written", ["tensor", "result"])
@pytest.mark.parametrize(
    "dropout",
    [
        torch.nn.Dropout(0.5).eval(),
        lambda x: F.dropout(x, 0.0),
        lambda x: F.dropout(input=x, training=False, inplace=True),
        lambda x: torch.dropout(x, p=0.5, train=False),
    ],
    ids=["module", "zero", "names", "torch"],
)
def test_dropout_that_drops_nothing_is_its_tensor(dropout, written):
    def function(x):
        x = x * 1
        y = dropout(x)
        (x if written == "tensor" else y).add_(1)
        return x * 1, y * 1

    check_round_trip(function, torch.randn(3))


def test_what_is_copied_from_may_share_memory():
    def function(cache, k, v):
        cache[:, 0] = k
        cache.narrow(1, 1, 1).copy_(v[:, None])
        return cache * 2

    both = torch.randn(2, 2, 4)
    check_round_trip(function, torch.zeros(2, 3, 4), *both.unbind(0))


@pytest.mark.parametrize("written", ["tensor", "result", "neither"])
@pytest.mark.parametrize(
    "share",
    [
        lambda x: torch.einsum("ij->ji", x),
        lambda x: torch.broadcast_tensors(x, x)[0],
        lambda x: x.sum_to_size(3, 3),
        lambda x: torch.meshgrid(x[0], x[0], indexing="ij")[0],
    ],
    ids=["einsum", "broadcast_tensors", "sum_to_size", "meshgrid"],
)
def test_writes_to_what_a_whole_operator_shares_are_refused(share, written):
    def function(x):
        x = x * 1
        y = share(x)
        if written != "neither":
            (x if written == "tensor" else y[:1, :1]).add_(1)
        return x * 1, y * 1

    recorder, _ = capture(function, torch.randn(3, 3))
    assert ["shares with its arguments" in why for why in recorder.refused] == [True] * (written != "neither")


def test_sizes_that_nothing_needs_are_no_nodes_while_tracing():
    created = []

    def backend(gm, inputs):
        with unittest.mock.patch.object(torch.fx.Graph, "create_node", autospec=True, side_effect=create) as made:
            normal = normalise(gm, inputs)
        created.append((made.call_count, len(normal.graph.nodes)))
        return gm.forward

    create = torch.fx.Graph.create_node
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(step, backend=backend, dynamic=True)(*cached_arguments(2), torch.tensor(1))
    ((made, left),) = created
    assert made < 2 * left


def test_long_sums_of_sizes():
    def function(x, y, n: int):
        for _ in range(600):
            n = n + x.shape[0]
        return y.add_(x * n)

    check_round_trip(function, torch.ones(3), torch.zeros(3), 5, dynamic=True)


@pytest.mark.parametrize("change", ["t_", "unsqueeze_"])
def test_inputs_of_another_shape_than_before_are_an_error(change):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="sizes, strides or storage"):
        capture(lambda x: getattr(x.mul_(2), change)(*[0] * (change == "unsqueeze_")) + 1, torch.randn(3, 4))


def test_inputs_keep_order_source_and_tags():
    seen = []

    def backend(gm, inputs):
        normal = normalise(gm, inputs)
        finished = finish(normal)
        ours, theirs = (g.graph.find_nodes(op="placeholder") for g in (finished, gm))
        assert [p._dynamo_source for p in ours] == [p._dynamo_source for p in theirs]
        seen.extend(p.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") for p in ours)
        assert finished.meta["dynamo_compile_id"] == gm.meta["dynamo_compile_id"]
        assert finished._param_name_to_source == gm._param_name_to_source
        return compile_fx(finished, inputs)

    torch._dynamo.reset()
    x, y = torch.randn(3), torch.randn(3)
    torch._dynamo.mark_static_address(y)
    with torch.no_grad():
        torch.compile(lambda x, y: y.add_(x), backend=backend)(x, y)
    assert sorted(str(s) for s in seen) == ["None", "unguarded"]


def test_writes_dropped_from_the_mutations_do_not_happen():
    def backend(gm, inputs):
        normal = normalise(gm, inputs)
        normal.mutations = [(v, t) for v, t in normal.mutations if normal.source(t) == "L['y']"]
        return interpret(finish(normal), inputs)

    torch._dynamo.reset()
    x, y = torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        result = torch.compile(lambda x, y: x.add_(1) + y.add_(2), backend=backend)(x, y)
    assert (x[0], y[0], result[0]) == (0, 2, 3)


def test_replaced_nodes_stay_in_mutations_and_outputs():
    def backend(gm, inputs):
        normal = normalise(gm, inputs)
        (node,) = normal.graph.find_nodes(op="call_function", target=aten.add.Tensor)
        with normal.graph.inserting_before(node):
            other = normal.graph.call_function(aten.mul.Tensor, (node.args[0], 5))
        node.replace_all_uses_with(other)
        normal.graph.erase_node(node)
        assert [v for v, _ in normal.mutations] == [other]
        return interpret(finish(normal), inputs)

    torch._dynamo.reset()
    x = torch.full((3,), 2.0)
    with torch.no_grad():
        torch.compile(lambda x: x.add_(1) * 1, backend=backend)(x)
    assert x[0] == 10


def test_dynamos_graph_is_not_changed():
    texts = []

    def backend(gm, inputs):
        texts.append(str(gm.graph))
        finish(normalise(gm, inputs))
        texts.append(str(gm.graph))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(step, backend=backend)(*cached_arguments(2), torch.tensor(1))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("compiler", [interpret, compile_fx], ids=lambda f: f.__name__)
def test_a_written_input_that_is_returned_stays_the_input(compiler):
    def function(q, keys):
        return F.scaled_dot_product_attention(q, keys, keys), keys.add_(1)

    q = torch.randn(1, 2, 3, 4)
    _, arguments, (_, returned) = check_round_trip(function, q, q.clone(), compiler=compiler)
    returned.zero_()
    assert not arguments[1].any()


def test_views_of_unwritten_inputs_stay_views():
    _, arguments, view = check_round_trip(
        lambda x, y: (y.add_(1), x[1:])[1], torch.randn(4), torch.randn(4), compiler=compile_fx
    )
    view.zero_()
    assert not arguments[0][1:].any()


def test_symbolic_integers_in_and_out():
    def function(x, y, n: int):
        y[n : n + 1] = x
        return y[: n + 1] * n, n + 1

    torch._dynamo.reset()
    recorder = Recorder(compile_fx)
    compiled = torch.compile(function, backend=recorder, dynamic=True)
    with torch.no_grad():
        for n in (2, 3, 5):
            ours, theirs = torch.zeros(8), torch.zeros(8)
            got, expected = compiled(torch.ones(1), ours, n), function(torch.ones(1), theirs, n)
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(ours, theirs)
    assert len(recorder.graphs) == 1


def test_guards_are_those_of_the_plain_backend():
    """The round trip must not specialise what Inductor leaves symbolic."""
    counts = []
    for backend in (Recorder(compile_fx), torch._dynamo.testing.CompileCounterWithBackend("inductor")):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, y: (x @ y).softmax(-1) @ y.mT, backend=backend, dynamic=True)
        with torch.no_grad():
            for n, m in ((3, 4), (5, 6), (7, 8), (9, 2)):
                compiled(torch.randn(n, m), torch.randn(m, n))
        counts.append(len(backend.graphs))
    assert counts == [1, 1]


def test_a_float_input_restarts_the_analysis_and_works():
    torch._dynamo.reset()
    recorder = Recorder(compile_fx)
    compiled = torch.compile(lambda x, f: x * f, backend=recorder, dynamic=True)
    with torch.no_grad():
        for f in (0.5, 1.5, 2.5):
            torch.testing.assert_close(compiled(torch.ones(3), f), torch.full((3,), f))


def _put(cache, new):
    cache.copy_(new)


@pytest.mark.parametrize("compiler", [interpret, compile_fx], ids=lambda f: f.__name__)
def test_constants_of_the_graph(compiler):
    def function(x, y):
        y[torch.tensor([-1])] = x
        return y * torch.tensor([1.0, 2.0, 3.0])

    check_round_trip(function, torch.ones(1), torch.zeros(3), compiler=compiler)


def test_custom_operators_that_write():
    with torch.library._scoped_library("normalise_tests", "FRAGMENT") as library:
        library.define("put(Tensor(a!) cache, Tensor new) -> ()")
        library.impl("put", _put, "CompositeExplicitAutograd")
        torch.library.register_fake("normalise_tests::put", lambda cache, new: None, lib=library)

        def function(cache, x):
            torch.ops.normalise_tests.put(cache, x)
            return cache * 2

        check_round_trip(function, torch.zeros(3), torch.ones(3), compiler=compile_fx)


def test_regions_without_gradients():
    def function(x):
        with torch.no_grad():
            y = x.sin()
        return y.cos()

    torch._dynamo.reset()
    recorder = Recorder(compile_fx)
    x = torch.randn(3)
    torch.testing.assert_close(torch.compile(function, backend=recorder)(x), function(x))
    assert len(recorder.graphs) == 1


def test_inference_mode():
    torch._dynamo.reset()
    recorder = Recorder(compile_fx)
    with torch.inference_mode():
        ours, theirs = torch.zeros(3), torch.zeros(3)
        got = torch.compile(lambda x: x.add_(1).sin(), backend=recorder)(ours)
        torch.testing.assert_close(got, theirs.add_(1).sin())
        torch.testing.assert_close(ours, theirs)
    assert len(recorder.graphs) == 1


class Handle(torch.Tensor):
    """Stands for a cache handle: any look at its data raises."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.data_ptr, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy):
            raise AssertionError(f"{function} reads data")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def test_handles_with_freed_storage():
    forms = []

    def backend(gm, inputs):
        assert unsupported(gm, inputs) is None
        normal = normalise(gm, inputs)
        forms.extend(value.target for value, _ in normal.mutations)
        finish(normal)
        return lambda *_: (torch.zeros(3),)

    handle = torch.zeros(2, 8)
    handle.untyped_storage().resize_(0)
    handle.__class__ = Handle
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda c, x: c.index_copy_(0, torch.tensor([1]), x).sum(), backend=backend)(
            handle, torch.ones(1, 8)
        )
    assert forms == [aten.index_copy.default]
    assert handle.untyped_storage().nbytes() == 0


def refused(function, *arguments, grad=False):
    recorder, _ = capture(function, *arguments, compiler=compile_fx, grad=grad)
    (why,) = recorder.refused
    return why


def test_vmap_is_refused_and_still_runs():
    def function(x):
        return torch.vmap(lambda row: row.softmax(-1))(x)

    assert "functorch" in refused(function, torch.randn(3, 4))


def test_autocast_is_refused():
    def region(x):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x

    x = torch.randn(3, 3)
    assert "autocast" in refused(region, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in refused(lambda x: x @ x, x)


def test_gradients_are_refused():
    x = torch.randn(3, requires_grad=True)
    assert "gradients" in refused(lambda x: x.sin(), x, grad=True)

    def inside(x):
        with torch.enable_grad():
            return x.sin()

    assert "gradients" in refused(inside, x)


def test_aliased_inputs_that_are_written_are_refused():
    pool = torch.zeros(2, 4)
    assert "share memory" in refused(lambda a, b: a.add_(1) + b, pool[0], pool[1:].squeeze(0)[:4])
    assert "share memory" in refused(lambda a, b: a.copy_(b + 1).sum() + b, pool, pool[0])


def test_aliased_inputs_that_are_only_read_are_not():
    pool = torch.zeros(2, 4)
    recorder, _ = capture(lambda a, b, c: c.add_(a + b), pool[0], pool[1], torch.zeros(4))
    assert not recorder.refused


def test_views_of_written_inputs_are_refused():
    assert "view of an input" in refused(lambda x: x.add_(1)[1:], torch.zeros(4))


def test_views_made_in_place_work():
    check_round_trip(lambda x: (x * 2).t_().unsqueeze_(0) + 1, torch.randn(3, 4))


def test_lengths_of_keys_values_and_mask_are_guarded():
    def function(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask)

    torch._dynamo.reset()
    recorder = Recorder(compile_fx)
    compiled = torch.compile(function, backend=recorder, dynamic=True)
    with torch.no_grad():
        for n in (5, 7):
            q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, n, 8), torch.randn(2, 3, n, 8)
            mask = torch.ones(1, 1, 4, n, dtype=torch.bool)
            torch.testing.assert_close(compiled(q, k, v, mask), function(q, k, v, mask))
        assert len(recorder.graphs) == 1
        with pytest.raises((RuntimeError, torch._dynamo.exc.TorchDynamoException)):
            compiled(q, k, v[:, :, 1:], mask)


def test_higher_order_operators_are_refused():
    def function(x):
        return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))

    assert "higher-order" in refused(function, torch.randn(3))


def test_outside_dynamo_is_refused():
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    assert "Dynamo" in unsupported(gm, [torch.zeros(3)])


@pytest.mark.parametrize(("rate", "training", "stays"), [(0.5, False, 0), (0.0, True, 0), (0.5, True, 1)])
def test_dropout_that_does_nothing_is_left_out(rate, training, stays):
    recorder, _ = capture(lambda x: F.dropout(x.exp(), rate, training) + 1, torch.ones(4))
    assert len(recorder.graphs[0].graph.find_nodes(op="call_function", target=aten.dropout.default)) == stays
    if not stays:
        check_round_trip(lambda x: F.dropout(x, rate, training), torch.ones(4))
