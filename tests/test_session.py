"""`enable(...)`: what holds inside the block, what it says, and that nothing stays behind."""

import io
import re
import threading
import warnings

import pytest
import rich.console
import torch
import torch.nn.functional as F
from torch import Tensor

import decoquant_compile
from decoquant_compile import CacheTensor, enable, restore
from tests.graphs import cached_arguments, new, queries


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def entries():
    """How many graphs Dynamo has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def step(q, k, v, keys, values, positions, mask):
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def copies(arguments):
    return tuple(a.clone() for a in arguments)


def run(function=step, arguments=None):
    """Compile and run under whatever stance holds; the arguments as the call left them."""
    arguments = copies(cached_arguments() if arguments is None else arguments)
    with torch.no_grad():
        torch.compile(function)(*arguments)
    return arguments


def is_packed(arguments):
    return [type(t) is CacheTensor for t in arguments[3:5]]


# What holds inside


@torch.no_grad()
def test_what_is_compiled_inside_is_packed():
    arguments = cached_arguments()
    ours, theirs = copies(arguments), copies(arguments)
    with enable(bits=16):
        got = torch.compile(step)(*ours)
    torch.testing.assert_close(got, step(*theirs), rtol=0, atol=2e-6)
    assert is_packed(ours) == [True, True]
    # the caches stay packed and usable
    torch.testing.assert_close(ours[3][:], theirs[3])
    restore(ours[3])
    assert torch.equal(ours[3], theirs[3])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@torch.no_grad()
def test_other_backends_are_overridden(backend):
    ours = copies(cached_arguments())
    with enable() as session:
        torch.compile(step, backend=backend)(*ours)
    assert is_packed(ours) == [True, True]
    assert session.report().rewritten == 1


def test_other_threads_are_included():
    caches = []
    with enable() as session:
        thread = threading.Thread(target=lambda: caches.extend(run()))
        thread.start()
        thread.join()
    assert is_packed(caches) == [True, True]
    assert session.report().rewritten == 1


def test_fullgraph_makes_a_graph_break_an_error():
    def broken(*arguments):
        out = step(*arguments)
        torch._dynamo.graph_break()
        return out * 2

    with enable(fullgraph=True) as session:
        run()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            run(broken)
    assert session.report().rewritten == 1
    with enable() as session:
        assert is_packed(run(broken)) == [True, True]
    assert session.report().rewritten == 1


def test_a_mode_reaches_inductor(monkeypatch):
    patches = []
    compile_fx = decoquant_compile._compat.compile_fx

    def compiler(gm, inputs, config_patches=None):
        patches.append(config_patches)
        return compile_fx(gm, inputs, config_patches=config_patches)

    monkeypatch.setattr(decoquant_compile._compat, "compile_fx", compiler)
    with enable(mode="max-autotune-no-cudagraphs"):
        run()
    with enable():
        run()
    assert [p.get("max_autotune") for p in patches] == [True, None]


# What may not be asked


def test_blocks_cannot_be_nested():
    with enable() as session:
        with pytest.raises(RuntimeError, match="cannot be nested"), enable(bits=8):
            pass
        run()
    assert session.report().rewritten == 1
    with enable():  # the refusal left nothing behind
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit": 4}, r"option 'bit' is not known: expected one of bits, key_bits"),
        ({"bits": 1}, r"bits=1: expected one of 16, 8, 5, 4, 3, 2"),
        ({"mode": "fast"}, r"mode='fast'.*reduce-overhead"),
        ({"max_autotune": True}, r"option 'max_autotune' is Inductor's: pass it to torch.compile"),
    ],
)
def test_wrong_options_are_an_error(options, message):
    with pytest.raises(ValueError, match=message), enable(**options):
        pass
    with enable():
        run()


# Compiled graphs are kept


def test_equal_options_share_the_compiled_graphs():
    with enable(bits=8):
        caches = run()
    compiled = entries()
    with enable(bits=8) as session, warnings.catch_warnings():
        warnings.simplefilter("error")  # that nothing new is compiled is no reason to warn
        run()
        again = run()
    assert entries() == compiled
    assert "bits=8" in repr(again[3])
    assert session.report().rewritten == 1
    with enable(bits=4):
        other = run()
    assert entries() > compiled
    assert "bits=4" in repr(other[3])
    assert "bits=8" in repr(caches[3])


def test_a_block_leaves_nothing_behind():
    limit = torch._dynamo.config.recompile_limit
    accumulated = torch._dynamo.config.accumulated_recompile_limit
    with pytest.raises(KeyError, match=str(limit + 9)), enable(recompile_limit=limit + 9, fullgraph=True):
        raise KeyError(torch._dynamo.config.recompile_limit)
    assert torch._dynamo.config.recompile_limit == limit
    assert torch._dynamo.config.accumulated_recompile_limit == accumulated
    seen = []

    def backend(gm, _):
        seen.append(gm)
        return gm.forward

    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    torch.compile(broken, backend=backend)(torch.ones(3))  # its own backend, and graph breaks are allowed
    assert len(seen) == 1
    assert is_packed(run()) == [False, False]


def test_the_limit_is_never_lowered():
    with torch._dynamo.config.patch(recompile_limit=100), enable(recompile_limit=3):
        assert torch._dynamo.config.recompile_limit == 100
        run()


# What it says


def test_nothing_compiled_is_said_once():
    message = r"nothing was compiled inside enable\(\).*torch.compile\(model.forward\)"
    with pytest.warns(UserWarning, match=message) as told, enable():
        step(*cached_arguments())
    assert len(told) == 1
    assert told[0].filename == __file__


def test_nothing_rewritten_is_said_once_with_the_reasons():
    def escapes(*arguments):
        scaled = arguments[0] * 2
        torch._dynamo.graph_break()
        return step(scaled, *arguments[1:]), arguments[3] == 0

    message = "no attention was rewritten.*holds no attention.*1 CACHE_VALUE_ESCAPES"
    with pytest.warns(UserWarning, match=message) as told, enable():
        run(escapes)
    assert len(told) == 1
    assert told[0].filename == __file__


def test_graphs_compiled_before_in_which_nothing_was_rewritten():
    def computed(q, k, v):
        return F.scaled_dot_product_attention(q, k.exp(), v.sin(), enable_gqa=True) + 1

    arguments = queries(), new(), new()
    with pytest.warns(UserWarning, match="no attention was rewritten.*NO_CACHE"), enable():
        run(computed, arguments)
    with pytest.warns(UserWarning, match="If it was compiled before.*explain") as told, enable():
        run(computed, arguments)
    assert len(told) == 1


def test_an_exception_is_not_covered_by_a_warning():
    with pytest.raises(KeyError), enable():
        raise KeyError


def escaping(q, k, v, keys, values, positions, mask, other, more):
    """One attention that is rewritten and one that is not."""
    first = step(q, k, v, keys, values, positions, mask)
    return step(first, k, v, other, more, positions, mask), other == 1


def test_the_report_names_every_attention_and_the_bytes():
    arguments = cached_arguments()
    with enable(key_bits=8, value_bits=3, window=2, sinks=1) as session:
        caches = run(escaping, (*arguments, *copies(arguments[3:5])))
        run(lambda x: x + 1, (torch.ones(3),))
    report = session.report()
    assert [g.rewritten for g in report.graphs] == [1, 0]
    assert [g.calls for g in report.graphs] == [1, 0]
    done, left = report.findings
    assert (done.outcome, done.keys, done.write, done.form) == ("rewritten", "L['keys']", "index_copy", "sdpa")
    assert (left.outcome, left.form) == ("CACHE_VALUE_ESCAPES", "sdpa")
    assert [(c.source, c.role, c.bits) for c in report.caches] == [("L['keys']", "key", 8), ("L['values']", "value", 3)]
    dense, packed = report.bytes()
    assert dense == arguments[3].nbytes + arguments[4].nbytes
    assert packed == decoquant_compile.nbytes(caches[3:5]).packed
    for text in (str(report), rendered(report)):
        for word in (
            "keys",
            "index_copy",
            "sdpa",
            "rewritten",
            "K8 V3",
            "CACHE_VALUE_ESCAPES",
            "holds no attention",
        ):
            assert word in text
        assert "2 cache tensors held packed" in text
        assert f"({packed / dense:.3f})" in text
    del caches
    assert report.bytes() == (0, 0)
    assert "held packed" not in str(report)


def rendered(report):
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(report)
    return console.file.getvalue()


def test_the_report_shows_calls_that_ran_dense():
    with enable() as session:
        arguments = cached_arguments()
        looks = arguments[3][:, :, :2]
        fn = torch.compile(step)
        with torch.no_grad():
            with pytest.warns(UserWarning, match="the cache stays dense"):
                fn(*arguments)
            fn(*arguments)
            del looks
            fn(*arguments)
    assert type(arguments[3]) is not Tensor
    (graph,) = session.report().graphs
    assert (graph.calls, graph.dense_calls) == (3, 2)
    assert re.search("2 of 3 calls ran dense: .*shares its memory", str(session.report()))


def test_two_graphs_that_look_alike_are_two():
    def computed(q, k, v):
        return F.scaled_dot_product_attention(q, k.exp(), v.sin(), enable_gqa=True) + 1

    with enable() as session:
        for _ in range(2):
            torch.compiler.reset()  # Dynamo starts to count frames anew
            run(computed, (queries(), new(), new()))
        run()
    assert len(session.report().graphs) == 3
