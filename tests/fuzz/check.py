"""Runs a case compiled and plain, and says what differs."""

import contextlib
import copy
import itertools
import logging
import warnings
from dataclasses import dataclass, field

import torch

from decoquant_compile import CacheTensor, _compat, decoquant_backend, restore
from decoquant_compile.backend import compile_graph
from decoquant_compile.options import Options
from tests.fuzz.modules import Module, arguments, caches

NOISE = 2e-5


@dataclass
class Result:
    """What became of a case.

    Attributes:
        rewritten: attentions rewritten, over all its graphs.
        reasons: why others were not.
        wrong: what differs; empty if nothing does.
        invalid: the case is none: plain PyTorch refuses it.
    """

    rewritten: int = 0
    reasons: list[str] = field(default_factory=list)
    wrong: str = ""
    invalid: str = ""


@contextlib.contextmanager
def interpreted():
    """Graphs, rewritten or not, run node by node in place of Inductor's code."""
    patch = _compat.compile_fx
    _compat.compile_fx = lambda gm, example_inputs, config_patches=None: gm.forward
    try:
        yield
    finally:
        _compat.compile_fx = patch


def run(case, forward):
    """Outputs, extras and cache contents after each call."""
    keys, values = caches(case)
    for q, k, v, mask, positions, start in arguments(case):
        out, extra, next_keys, next_values = forward(q, k, v, mask, positions, start, keys, values)
        if next_keys is not None:
            keys, values = next_keys, next_values
        dense = restore(copy.deepcopy((keys, values))) if isinstance(keys, CacheTensor) else (keys, values)
        yield [out.clone(), *(e.clone() for e in extra)], [x.clone() for x in dense]


def plain(case):
    """The same, without torch.compile."""
    return list(run(case, Module(case)))


def check(case, *, inductor=False):
    """Compile a case with 16 bits and compare it with plain PyTorch.

    Args:
        case: the case.
        inductor: compile with Inductor, and compare graphs that were not rewritten with plain Inductor's results;
            otherwise graphs run node by node, and they are compared with eager PyTorch.
    """
    result = Result()
    torch.compiler.reset()
    with torch.no_grad(), warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        try:
            expected = plain(case)
        except (RuntimeError, IndexError, ValueError) as error:
            result.invalid = f"{type(error).__name__}: {error}"
            return result
        stack.enter_context(_compat.quick_compile() if inductor else interpreted())
        reports = []
        import decoquant_compile.backend as backend_module

        original = backend_module.announce

        def announce(report):
            if report not in reports:
                reports.append(report)
            original(report)

        backend_module.announce = announce
        stack.callback(setattr, backend_module, "announce", original)
        module = Module(case)
        if inductor and case.dynamic is not None:
            pass
        compiled = torch.compile(module, backend=decoquant_backend, options={"bits": 16, "sinks": 1, "window": 3}, dynamic=case.dynamic)
        try:
            got = list(run(case, compiled))
        except Exception as error:  # noqa: BLE001
            result.wrong = f"raises {type(error).__name__}: {error}"
            got = []
        findings = [f for report in reports for f in report.findings]
        result.rewritten = sum(f.rewritten for f in findings)
        result.reasons = [f.outcome for f in findings if not f.rewritten]
        for report in reports:
            if report.untouched is not None and not report.findings:
                result.reasons.append(report.untouched.name)
                if report.untouched.name == "INTERNAL_ERROR":
                    result.wrong = result.wrong or f"internal error: {report.detail}"
        if result.wrong:
            return result
        if inductor and not result.rewritten:
            torch.compiler.reset()
            expected = list(run(case, torch.compile(Module(case), dynamic=case.dynamic)))
        exact = not result.rewritten
        for call, ((got_out, got_caches), (out, held)) in enumerate(zip(got, expected, strict=True)):
            for what, a, b in itertools.chain(
                ((f"result {i}", a, b) for i, (a, b) in enumerate(zip(got_out, out, strict=True))),
                (("keys", got_caches[0], held[0]), ("values", got_caches[1], held[1])),
            ):
                if (why := differ(a, b, exact=exact)) is not None:
                    result.wrong = f"call {call}, {what}: {why}"
                    return result
    return result


def differ(got, expected, *, exact):
    """How two tensors differ, None if they do not."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {list(got.shape)} for {expected.dtype} {list(expected.shape)}"
    if exact:
        return None if torch.equal(got.nan_to_num(123.0), expected.nan_to_num(123.0)) else f"not bit-identical, by {(got - expected).abs().max()}"
    if not expected.is_floating_point():
        return None if torch.equal(got, expected) else "other integers"
    numbers = ~expected.isnan()  # a query that may attend to nothing: ours gives zeros
    got, expected = got[numbers].float(), expected[numbers].float()
    if torch.equal(got, expected) or not numbers.any():
        return None
    finite = expected.isfinite()
    if not torch.equal(got[~finite], expected[~finite]):
        return "other infinities"
    got, expected = got[finite], expected[finite]
    error = float((got - expected).abs().max())
    spread = max(float(expected.abs().max()), 1e-3)
    return None if error <= NOISE * spread + 1e-6 else f"by {error} of {spread}"
