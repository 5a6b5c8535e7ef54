"""Runs a case compiled and plain, and says what differs."""

import contextlib
import copy
import warnings
from dataclasses import dataclass, field, replace
from unittest import mock

import torch

from decoquant_compile import CacheTensor, _compat, backend, restore
from decoquant_compile.patterns import blocks
from tests.fuzz.modules import Case, Module, arguments, caches

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


def check(case, *, inductor=False):
    """Compile a case with 16 bits and compare all results and the caches' content with plain PyTorch's, call by call.

    Graphs run node by node, and where none was rewritten results must be eager PyTorch's bit by bit; with `inductor`
    graphs are compiled, and they must be plain Inductor's.
    """
    with torch.no_grad(), warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        try:
            expected = list(run(case, Module(case)))
        except (RuntimeError, IndexError, ValueError) as error:
            return Result(invalid=f"{type(error).__name__}: {error}")
        if inductor:
            stack.enter_context(_compat.quick_compile())
        else:
            in_place = lambda gm, example_inputs, config_patches=None: gm.forward
            stack.enter_context(mock.patch.object(_compat, "compile_fx", in_place))
        stack.enter_context(mock.patch.object(blocks, "LENGTH", (2, 5, blocks.LENGTH)[case.seed % 3]))
        reports = []
        stack.enter_context(mock.patch.object(backend, "announce", reports.append))
        torch.compiler.reset()
        options = {"bits": 16, "sinks": 1, "window": 3}
        compiled = torch.compile(Module(case), backend=backend.decoquant_backend, options=options, dynamic=case.dynamic)
        error = None
        try:
            got = list(run(case, compiled))
        except Exception as raised:  # noqa: BLE001 - plain PyTorch raises nothing
            error = raised
        result = _read(reports)
        if error is not None:
            result.wrong = f"raises {type(error).__name__}: {error}"
        if result.wrong:
            return result
        if inductor and not result.rewritten:
            torch.compiler.reset()
            expected = list(run(case, torch.compile(Module(case), dynamic=case.dynamic)))
        result.wrong = _compare(got, expected, exact=not result.rewritten)
    return result


def run(case, forward):
    """Results and cache contents after each call."""
    keys, values = caches(case)
    for q, k, v, mask, positions, start in arguments(case):
        out, extra, next_keys, next_values = forward(q, k, v, mask, positions, start, keys, values)
        if next_keys is not None:
            keys, values = next_keys, next_values
        held = restore(copy.deepcopy((keys, values))) if isinstance(keys, CacheTensor) else (keys, values)
        yield [out.clone(), *(e.clone() for e in extra)], [x.clone() for x in held]


def _read(reports):
    result = Result()
    for report in reports:
        for finding in report.findings:
            if finding.rewritten:
                result.rewritten += 1
            else:
                result.reasons.append(finding.outcome)
        if report.untouched is not None and not report.findings:
            result.reasons.append(report.untouched.name)
        if report.untouched is not None and report.untouched.name == "INTERNAL_ERROR":
            result.wrong = f"internal error: {report.detail}"
    return result


def _compare(got, expected, *, exact):
    for call, ((results, held), (want, content)) in enumerate(zip(got, expected, strict=True)):
        named = [(f"result {i}", a, b) for i, (a, b) in enumerate(zip(results, want, strict=True))]
        named += [("keys", held[0], content[0]), ("values", held[1], content[1])]
        for name, a, b in named:
            if why := _difference(a, b, exact=exact):
                return f"call {call}, {name}: {why}"
    return ""


def _difference(got, expected, *, exact):
    """How two tensors differ; "" if they do not."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {list(got.shape)} for {expected.dtype} {list(expected.shape)}"
    if exact or not expected.is_floating_point():
        same = torch.equal(got, expected) or torch.equal(got.nan_to_num(7.5), expected.nan_to_num(7.5))
        return "" if same else f"not bit-identical, by {(got - expected).abs().max()}"
    # A query that no mask admits to anything gets zeros from us, nan from a softmax that is spelled out.
    numbers = ~expected.isnan()
    got, expected = got[numbers].float(), expected[numbers].float()
    finite = expected.isfinite()
    if not torch.equal(got[~finite], expected[~finite]):
        return "other infinities"
    if not finite.any():
        return ""
    got, expected = got[finite], expected[finite]
    error, spread = float((got - expected).abs().max()), max(float(expected.abs().max()), 0.05)
    return "" if error <= NOISE * spread else f"by {error:.3g}, of values up to {spread:.3g}"


def smallest(case, fails):
    """The case with as much as possible as in a plain `Case`, while `fails(case)` holds."""
    for name, default in vars(Case()).items():
        simpler = replace(case, **{name: default})
        if simpler != case and fails(simpler):
            case = simpler
    return case
