"""The backend: gate, normalise, match, rewrite, compile. A graph that is not understood goes to Inductor untouched."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from decoquant_compile import _compat
from decoquant_compile.handle import CacheTensor
from decoquant_compile.kernels.format import Format
from decoquant_compile.normalize import Normal, normalise, unsupported
from decoquant_compile.options import Options
from decoquant_compile.patterns.match import Site, match
from decoquant_compile.patterns.reject import Reject
from decoquant_compile.report import Finding, GraphReport, Untouched
from decoquant_compile.rewrite import rewrite
from decoquant_compile.runtime import DenseGraph, PackedGraph, announce

log = logging.getLogger("decoquant_compile")

Compiled = Callable[..., Any]


def decoquant_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Backend of `torch.compile`: Inductor, with KV caches held in low-bit form.

    Args:
        gm: the graph that Dynamo traced.
        example_inputs: its inputs.
        mode: a mode of `torch.compile`, such as "reduce-overhead".
        options: names of `Options` (`bits`, `key_bits`, `value_bits`, `sinks`, `window`, `max_rewrites`); every other
            name is an option of Inductor.

    Returns:
        A callable in Dynamo's convention.

    Raises:
        ValueError: an option or the mode is not known or not valid.
    """
    own, patches = Options.parse(options, mode)
    return compile_graph(gm, example_inputs, own, patches)


decoquant_backend._decoquant_backend = True  # type: ignore[attr-defined]  # how a handle knows its own compiler


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, patches: dict[str, Any]) -> Compiled:
    """Compile one graph of Dynamo's under checked options."""
    frame, entry = _compat.entries_of_this_frame()
    report = GraphReport(f"{frame}/{entry - 1}")
    _warn_near_limit(report, entry)
    compiled = _try_rewrite(gm, example_inputs, options, patches, report)
    announce(report)
    log.info("%s", report)
    if compiled is None:
        compiled = _untouched(gm, example_inputs, patches, report)
    return compiled


def find(gm: fx.GraphModule, example_inputs: Sequence[Any], report: GraphReport) -> tuple[Normal, list[Site | Reject]] | None:
    """Normalise and match one graph; None, with the reason in the report, where it must stay as it is."""
    if not mentions_attention(gm):
        report.untouched = Untouched.NO_ATTENTION
        return None
    if _compat.has_grad_inputs(example_inputs):
        report.untouched = Untouched.GRADIENTS
        return None
    if (why := unsupported(gm, example_inputs)) is not None:
        report.untouched, report.detail = Untouched.UNSUPPORTED, why
        return None
    normal = normalise(gm, example_inputs)
    return normal, match(normal)


def _try_rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, patches: dict[str, Any], report: GraphReport
) -> Compiled | None:
    """The rewritten graph, compiled; None, with the reason in the report, where there is nothing to rewrite."""
    try:
        found = find(gm, example_inputs, report)
        if found is None:
            return None
        normal, results = found
        sites = within_policy(results, options, report, normal)
        if not sites:
            report.untouched = Untouched.NO_SITE
            return None
        before = str(normal.gm.graph) if log.isEnabledFor(logging.DEBUG) else ""
        formats = [_formats(site, example_inputs, options, normal) for site in sites]
        rewritten = rewrite(normal, sites, formats)
        _log_graphs(before, rewritten.gm)
        kept = [example_inputs[i] for i in rewritten.kept]
        fn = _compat.compile_fx(rewritten.gm, [*kept, *rewritten.examples], config_patches=patches)
    except Exception as error:
        if _compat.is_restart(error):
            raise
        report.untouched, report.detail = Untouched.INTERNAL_ERROR, f"{type(error).__name__}: {error}"
        report.findings.clear()
        log.exception("graph %s: our pass failed, the graph goes to Inductor untouched", report.name)
        warnings.warn(f"decoquant_compile: {report}; the cache stays dense", stacklevel=2)
        return None
    bound = {b.index for b in rewritten.bindings}
    handles = tuple(i for i in rewritten.kept if isinstance(example_inputs[i], CacheTensor) and i not in bound)
    return PackedGraph(fn, rewritten.kept, rewritten.bindings, rewritten.probe, gm, report, handles)


def _untouched(gm: fx.GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any], report: GraphReport) -> Compiled:
    """The same graph, compiled by Inductor; handles among its inputs are read dense at each call."""
    handles = tuple(i for i, x in enumerate(example_inputs) if isinstance(x, CacheTensor))
    fn = _compat.compile_fx(gm, list(example_inputs), config_patches=patches)
    return DenseGraph(fn, handles, report) if handles else fn


def mentions_attention(gm: fx.GraphModule) -> bool:
    """Whether a graph, as Dynamo traced it, can hold attention at all. Costs nothing, and keeps us out of mask frames."""
    words = ("scaled_dot_product", "softmax", "flex_attention")
    return any(
        any(word in str(node.target) or word in getattr(node.target, "__name__", "") for word in words)
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if node.op in ("call_function", "call_method")
    )


def within_policy(results: Sequence[Site | Reject], options: Options, report: GraphReport, normal: Normal) -> list[Site]:
    """The sites to rewrite, with a row in the report for each attention."""
    sites: list[Site] = []
    for result in results:
        source = normal.source(result.key.buffer) if isinstance(result, Site) else ""
        if isinstance(result, Site) and options.max_rewrites is not None and len(sites) >= options.max_rewrites:
            where = result.core.node.name
            report.findings.append(
                Finding(where, source, result.key.form, result.core.form, "MAX_REWRITES", f"max_rewrites={options.max_rewrites}")
            )
            continue
        bits = (options.bits_of_keys, options.bits_of_values)
        report.findings.append(Finding.of(result, source, f"K{bits[0]} V{bits[1]}"))
        log.debug("graph %s: %s", report.name, report.findings[-1])
        if isinstance(result, Site):
            sites.append(result)
    return sites


def _formats(site: Site, example_inputs: Sequence[Any], options: Options, normal: Normal) -> tuple[Format, Format]:
    """Packed formats of a site: those of the handles, if it is held already, else as the options say."""
    formats = []
    for role, write, bits in (("key", site.key, options.bits_of_keys), ("value", site.value, options.bits_of_values)):
        tensor = example_inputs[list(normal.placeholders).index(write.buffer)]
        if isinstance(tensor, CacheTensor) and tensor._state is not None:
            formats.append(tensor._state.format)
            continue
        exact = bits == 16
        assert isinstance(tensor, Tensor)
        formats.append(
            Format(
                role=role,  # type: ignore[arg-type]
                bits=bits,
                head_dim=tensor.shape[site.dims[3]],
                dtype=tensor.dtype,
                sinks=0 if exact else options.sinks,
                window=0 if exact else options.window,
            )
        )
    return formats[0], formats[1]


def _log_graphs(before: str, after: fx.GraphModule) -> None:
    if before:
        log.debug("normalised graph:\n%s", before)
        log.debug("rewritten graph:\n%s", after.graph)
    _compat.trace_artifact("rewritten", lambda: str(after.graph))


def _warn_near_limit(report: GraphReport, entry: int) -> None:
    """A frame at Dynamo's limit runs eagerly from then on: dense, and out of our sight."""
    limit = _compat.recompile_limit_now()
    if entry >= limit:
        warnings.warn(
            f"decoquant_compile: graph {report.name} is entry {entry} of its frame and Dynamo's recompile_limit is {limit}: "
            "the next new shape or cache will run eagerly and dense. Raise the limit: torch.compile(..., recompile_limit=64), "
            "torch._dynamo.config.recompile_limit, or enable(recompile_limit=64).",
            stacklevel=2,
        )

