"""Calls of compiled graphs: which run packed, which run dense, and what they leave in the caches."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import decoquant_compile
from decoquant_compile import CacheTensor, backend, decoquant_backend, enable, explain, restore, runtime
from decoquant_compile.kernels.format import Format
from decoquant_compile.report import Finding, GraphReport, Report, Untouched
from decoquant_compile.runtime import run_dense
from decoquant_compile.takeover import Claim, take_over
from tests.graphs import cached_arguments

SHAPE = (2, 3, 8, 4)
EXACT = {"bits": 16}
RESTORED = "they are dense again"


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@pytest.fixture
def graphs():
    """Reports of the graphs that run in a test."""
    report = Report()
    runtime.OPEN.append(report)
    yield report.graphs
    runtime.OPEN.remove(report)


def handle(seed=0, shape=SHAPE, bits=16, dims=(0, 1, 2, 3)):
    """A cache tensor that is packed, and its content."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    dense = tensor.clone()
    take_over([Claim(tensor, dims, Format("key", bits, shape[dims[3]], tensor.dtype))], lengths=[None], masks=[None])
    return tensor, dense


def step(q, k, v, keys, values, positions, mask):
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def packed(function, **options):
    return torch.compile(function, backend=decoquant_backend, options=EXACT | options)


def copies(arguments):
    return tuple(a.clone() for a in arguments)


@torch.no_grad()
def check_step(fn, arguments, function=step):
    """A call must give what the function gives, and leave the same in the caches."""
    theirs = tuple((a.dense() if isinstance(a, CacheTensor) else a).clone() for a in arguments)
    expected = function(*theirs)
    torch.testing.assert_close(fn(*arguments), expected, rtol=0, atol=2e-6)
    for ours, wanted in zip(arguments, theirs, strict=True):
        torch.testing.assert_close(ours[:] if isinstance(ours, CacheTensor) else ours, wanted)


# Dense graphs over handles


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_dense_graph_reads_and_stores(graphs, mode):
    def f(cache, x):
        cache[:, :, 3] = x
        return cache.sum(-1)

    cache, dense = handle()
    x = torch.ones(2, 3, 4)
    with mode():
        torch.testing.assert_close(packed(f)(cache, x), f(dense, x))
    assert type(cache) is CacheTensor
    assert torch.equal(cache, dense)
    (graph,) = graphs
    assert (graph.calls, graph.dense_calls) == (1, 1)


VIEWS = {
    "slots": lambda t: t[:, :, 2:5],
    "head": lambda t: t[:, 1],
    "turned": lambda t: t.transpose(1, 2),
}


@pytest.mark.parametrize("name", VIEWS)
@torch.no_grad()
def test_a_cache_and_its_view_stay_aliases(name):
    def f(cache, view):
        before = cache * 1
        view.add_(1)
        return before, cache * 1

    cache, dense = handle()
    got = packed(f)(cache, VIEWS[name](cache))
    torch.testing.assert_close(got, f(dense, VIEWS[name](dense)))
    assert torch.equal(cache, dense)


@torch.no_grad()
def test_results_that_alias_a_cache_write_through():
    def f(cache):
        cache.add_(1)
        return cache[:, :, 2:4], cache.sum()

    cache, dense = handle()
    part, total = packed(f)(cache)
    assert torch.equal(total, f(dense)[1])
    assert type(part) is CacheTensor
    assert type(total) is Tensor
    part.zero_()
    dense[:, :, 2:4] = 0
    assert torch.equal(cache, dense)


@torch.no_grad()
def test_results_outlive_the_restored_cache():
    cache, dense = handle()
    fn = packed(lambda cache: cache[:, :, 2:4])
    fn(cache)
    with pytest.warns(UserWarning, match=RESTORED):
        part = fn(cache)
    assert type(cache) is type(part) is Tensor
    assert torch.equal(cache, dense)
    part.zero_()
    assert not cache[:, :, 2:4].any()


def test_a_call_without_a_counted_write_is_stored():
    """Autograd does not count writes to `data`."""
    cache, dense = handle()
    run_dense(lambda t: [t.data[:, :, 1].add_(1)], [cache], [0], GraphReport("0/0"))
    dense[:, :, 1] += 1
    assert type(cache) is CacheTensor
    assert torch.equal(cache, dense)


def test_a_graph_that_fails_stores_nothing():
    def fails(t):
        t.add_(1)
        raise ArithmeticError

    cache, dense = handle()
    report = GraphReport("0/0")
    for _ in range(3):
        with pytest.raises(ArithmeticError):
            run_dense(fails, [cache], [0], report)
    assert type(cache) is CacheTensor
    assert torch.equal(cache, dense)
    assert report.dense_calls == cache.dense_calls == 0


def test_a_graph_may_clear_the_cache():
    cache, _ = handle()
    report = GraphReport("0/0")
    run_dense(lambda t: [t.zero_()], [cache], [0], report)
    assert type(cache) is Tensor
    assert not cache.any()
    assert not vars(cache)
    assert report.dense_calls == 1


def test_calls_over_views_count_for_the_cache():
    cache, dense = handle()
    report = GraphReport("0/0")
    run_dense(lambda a, b: [a + b], [cache[0], cache[1]], [0, 1], report)
    assert (report.dense_calls, cache.dense_calls) == (1, 1)
    view = cache[1]
    with pytest.warns(UserWarning, match=f"^decoquant_compile: 1 packed cache tensors.*{RESTORED}"):
        (result,) = run_dense(lambda a: [a + 1], [view], [0], report)
    assert type(cache) is Tensor
    assert torch.equal(cache, dense)
    assert torch.equal(view, dense[1])
    assert torch.equal(result, dense[1] + 1)
    assert run_dense(lambda a: [a * 1], [view], [0], report)[0].equal(dense[1])


@pytest.mark.parametrize("tokens", [0, 2])
def test_a_dense_copy_in_the_place_of_a_cache_is_told(tokens):
    """It would be unquantised from then on, and nobody knew."""
    packed_keys, dense = handle()
    report = GraphReport("0/0", findings=[Finding("sdpa", "", "", "sdpa", "UNKNOWN_WRITE")])
    more = torch.zeros(*SHAPE[:2], tokens, SHAPE[3])
    with pytest.warns(
        UserWarning, match=r"1 packed cache tensors .* could not be rewritten .* in their places is dense"
    ):
        (result,) = run_dense(lambda a: [torch.cat((a, more), 2)], [packed_keys], [0], report)
    assert torch.equal(result[:, :, : SHAPE[2]], dense)


@pytest.mark.parametrize("use", [lambda a: a[:, :, :3] * 2, lambda a: a.sum(2), lambda a: a, lambda a: a.double()])
def test_other_results_are_not_told(use):
    packed_keys, _ = handle()
    report = GraphReport("0/0", findings=[Finding("sdpa", "", "", "sdpa", "UNKNOWN_WRITE")])
    run_dense(lambda a: [use(a)], [packed_keys], [0], report)  # a warning would be an error


# Caches that cannot be taken over


@torch.no_grad()
def test_a_call_that_runs_dense_counts_once(graphs):
    arguments = cached_arguments()
    fn = packed(step)
    check_step(fn, arguments)
    *_, keys, values, _, _ = arguments
    looks = restore(values)[:]
    with pytest.warns(UserWarning, match=r"the cache stays dense: L\['values'\] shares its memory"):
        check_step(fn, arguments)
    assert type(keys) is CacheTensor
    assert type(values) is Tensor
    assert sum(g.dense_calls for g in graphs) == 1
    del looks
    check_step(fn, arguments)
    assert type(values) is CacheTensor


@torch.no_grad()
def test_many_obstacles_make_a_short_message():
    """Of each cache tensor by its name, three at most."""

    def layers(q, k, v, caches, positions, mask):
        return sum(step(q, k, v, keys, values, positions, mask) for keys, values in caches)

    q, k, v, keys, values, positions, mask = cached_arguments()
    caches = [(keys.clone(), values.clone()) for _ in range(3)]
    looks = [(a[:], b[:]) for a, b in caches]
    with pytest.warns(UserWarning, match=r"L\['caches'\]\[0\]\[0\] shares.*\[1\]\[0\] shares[^;]*; and 3 more$"):
        packed(layers)(q, k, v, caches, positions, mask)
    assert all(
        torch.equal(a, c) for pair, views in zip(caches, looks, strict=True) for a, c in zip(pair, views, strict=True)
    )


@torch.no_grad()
def test_the_dense_form_is_not_brought_back_by_a_forced_backend():
    arguments = cached_arguments()
    looks = arguments[3][:]
    with enable(bits=16) as session:
        fn = torch.compile(step)
        with pytest.warns(UserWarning, match="the cache stays dense"):
            check_step(fn, arguments)
        check_step(fn, arguments)
        (graph,) = session.report().graphs
        assert (graph.calls, graph.dense_calls) == (2, 2)
        del looks
        check_step(fn, arguments)
    assert type(arguments[3]) is CacheTensor
    assert (graph.calls, graph.dense_calls) == (3, 2)


@torch.no_grad()
def test_the_dense_form_keeps_the_options(monkeypatch):
    arguments = cached_arguments()
    looks = arguments[3][:]
    fn = packed(step, epilogue_fusion=False)
    seen = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: (seen.append(kwargs), compile_(*args, **kwargs))[1])
    with pytest.warns(UserWarning, match="the cache stays dense"):
        fn(*arguments)
    assert seen == [{"backend": "inductor", "options": {"epilogue_fusion": False}}]
    del looks


@torch.no_grad()
def test_a_view_of_a_packed_cache_is_no_cache_to_take_over():
    """The cache that it looks into stays as it is."""
    q, k, v, keys, values, positions, mask = cached_arguments()
    root, _ = handle(shape=tuple(keys.shape))
    fn = packed(step)
    with pytest.warns(UserWarning, match="view of a packed cache"):
        check_step(fn, (q, k, v, root[:], values, positions, mask))
    assert type(root) is CacheTensor


# Caches that are packed already


def turned(q, k, v, keys, values, positions, mask):
    """The same over caches whose slots come before the heads."""
    keys.index_copy_(1, positions, k.transpose(1, 2))
    values.index_copy_(1, positions, v.transpose(1, 2))
    return F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), mask, enable_gqa=True)


@torch.no_grad()
def test_another_layout_is_packed_anew():
    """As many heads as slots: the sizes alone do not tell the layouts apart."""
    n = 4
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 8, generator=generator) for _ in range(3))
    keys, values = (torch.randn(1, n, n, 8, generator=generator) for _ in range(2))
    arguments = (q, k, v, keys, values, torch.tensor([2]), None)

    def check(function):
        theirs = [
            a.clone() if isinstance(a, Tensor) else a for a in (q, k, v, keys[:] * 1, values[:] * 1, *arguments[5:])
        ]
        expected = function(*theirs)
        torch.testing.assert_close(packed(function)(*arguments), expected, rtol=0, atol=2e-6)
        assert type(keys) is type(values) is CacheTensor
        torch.testing.assert_close(keys[:] * 1, theirs[3])

    for function in (step, turned, step):
        check(function)


@torch.no_grad()
def test_the_report_shows_the_format_that_is_held(graphs):
    arguments = cached_arguments()
    packed(step, key_bits=8)(*arguments)
    torch.compiler.reset()
    packed(step)(*arguments)
    assert [f.detail for g in graphs for f in g.findings] == ["K8 V16"] * 2


@torch.no_grad()
def test_a_negative_position_counts_from_the_end(monkeypatch):
    def put(q, k, v, keys, values, positions, mask):
        keys[:, :, positions] = k
        values[:, :, positions] = v
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    seen = []
    take = runtime.take_over
    monkeypatch.setattr(runtime, "take_over", lambda claims, **kw: (seen.extend(kw["lengths"]), take(claims, **kw))[1])
    q, k, v, keys, values, _, mask = cached_arguments()
    check_step(packed(put), (q, k, v, keys, values, torch.tensor([-3]), mask), function=put)
    assert seen == [keys.shape[2] - 3] * 2


# Places that are computed after the attention


@torch.no_grad()
def test_places_may_be_computed_after_an_attention_over_the_new_tokens(graphs):
    def prefill(q, k, v, keys, values, start):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        positions = torch.arange(k.shape[2]) + start
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return out * 2

    q, k, v, keys, values, _, _ = cached_arguments(3)
    check_step(packed(prefill), (q, k, v, keys, values, torch.tensor(0)), function=prefill)
    assert [f.outcome for f in graphs[0].findings] == ["rewritten"]
    assert type(keys) is type(values) is CacheTensor


# explain


@torch.no_grad()
def test_explain_works_inside_enable():
    arguments = cached_arguments()
    with pytest.warns(UserWarning, match="nothing was compiled"), enable(bits=16) as session:
        report = explain(step, *arguments)
    assert [f.outcome for f in report.findings] == ["rewritten"]
    assert not session.report().graphs
    assert type(arguments[3]) is Tensor


@torch.no_grad()
def test_explain_reports_a_failure_of_ours(monkeypatch):
    def fail(*_):
        raise KeyError("broken")

    monkeypatch.setattr(backend, "match", fail)
    with pytest.warns(UserWarning, match="our pass failed"):
        report = explain(step, *cached_arguments())
    assert [(g.untouched, g.detail) for g in report.graphs] == [(Untouched.INTERNAL_ERROR, "KeyError: 'broken'")]


@torch.no_grad()
def test_explain_leaves_room_for_the_real_compilation():
    arguments = cached_arguments()
    for _ in range(10):
        assert explain(step, *arguments).rewritten == 1
    check_step(packed(step), arguments)
    assert type(arguments[3]) is CacheTensor
    assert decoquant_compile.nbytes(arguments[3]).dense == 0
