"""The backend: gate, normalise, match, rewrite, compile. A graph that is not understood goes to Inductor untouched."""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import fx

from decoquant_compile import _compat
from decoquant_compile.allocate import Holding
from decoquant_compile.batching import unbatched
from decoquant_compile.dims import Dims
from decoquant_compile.handle import CacheTensor, format_of, is_whole
from decoquant_compile.kernels.codec import Role
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import GrowingState
from decoquant_compile.normalize import Normal, fixed_numbers, normalise, records_gradients, unsupported
from decoquant_compile.options import Options
from decoquant_compile.patterns import births, canonical, softmax
from decoquant_compile.patterns.attention import computed_scales
from decoquant_compile.patterns.cache import CacheWrite
from decoquant_compile.patterns.match import Held, RebuiltSite, Site, match
from decoquant_compile.patterns.reject import Reason, Reject
from decoquant_compile.patterns.symbols import shape
from decoquant_compile.report import Finding, GraphReport, Untouched
from decoquant_compile.rewrite import rewrite
from decoquant_compile.runtime import DenseGraph, PackedGraph, announce
from decoquant_compile.selections import Selections, select
from decoquant_compile.stacks import Stack, unstack, with_parts

log = logging.getLogger("decoquant_compile")

Compiled: TypeAlias = Callable[..., Any]
Plan: TypeAlias = Site | RebuiltSite
"""A site to rewrite."""


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


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, patches: Mapping[str, Any]
) -> Compiled:
    """Compile one graph of Dynamo's under checked options."""
    report = GraphReport(_compat.graph_name())
    _warn_near_limit(report)
    compiled: Compiled | None = None
    with contained(report):
        compiled = packed(gm, example_inputs, options, patches, report, _compat.compile_fx)
    announce(report)
    log.info("%s", report)
    return compiled or untouched(gm, example_inputs, patches, report, _compat.compile_fx)


@contextlib.contextmanager
def contained(report: GraphReport) -> Iterator[None]:
    """Turn a failure of ours into a reason in the report, with a warning; Dynamo's own control flow passes."""
    try:
        yield
    except Exception as error:
        if _compat.is_restart(error):
            raise
        report.untouched, report.detail = Untouched.INTERNAL_ERROR, f"{type(error).__name__}: {error}"
        report.findings.clear()
        log.exception("graph %s: our pass failed, the graph goes to Inductor untouched", report.name)
        warnings.warn(f"decoquant_compile: {report}; the cache stays dense", stacklevel=2)


@dataclass(frozen=True)
class Found:
    """What is to be rewritten in a graph.

    Attributes:
        normal: the normal form.
        plans: at least one.
        formats: the packed format of each cache, by the node that stands for it.
        selections: parts of inputs and results, taken out of the normal form.
        stacks: inputs that hold many caches, taken apart in the normal form.
        inputs: of the normal form.
    """

    normal: Normal
    plans: list[Plan]
    formats: dict[fx.Node, Format]
    selections: Selections
    stacks: tuple[Stack, ...]
    inputs: Sequence[Any]


def find(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, report: GraphReport) -> Found | None:
    """Normalise a graph and say what to rewrite in it, with a row in the report for each attention.

    Returns:
        What to rewrite; None, with the reason in the report, where the graph must stay as it is.
    """
    if not mentions_attention(gm):
        report.untouched = Untouched.NO_ATTENTION
        return None
    if records_gradients(example_inputs):
        report.untouched = Untouched.GRADIENTS
        return None
    flat = unbatched(gm)
    if (why := unsupported(flat, example_inputs)) is not None:
        report.untouched, report.detail = Untouched.UNSUPPORTED, why
        return None
    _compat.make_constant(fixed_numbers(gm))  # Inductor asks for it, too, but later, once all is traced
    whole: set[int] = set()
    found, findings, left = _search(gm, flat, example_inputs, options, whole)
    while left and (found.plans or options.max_rewrites is not None):
        whole |= left  # as it came, the graph writes them in place
        found, findings, left = _search(gm, flat, example_inputs, options, whole)
    for finding in findings:
        log.debug("graph %s: %s", report.name, finding)
    report.findings += findings
    if not found.plans:
        report.untouched = Untouched.NO_SITE
        return None
    return found


def _search(
    gm: fx.GraphModule, flat: fx.GraphModule, example_inputs: Sequence[Any], options: Options, whole: Collection[int]
) -> tuple[Found, list[Finding], set[int]]:
    """Normalise a graph and say what to rewrite in it.

    Args:
        gm: the graph that Dynamo traced.
        flat: the same without `vmap`.
        example_inputs: its inputs.
        options: checked.
        whole: places of tensors that are not to be taken apart, nor selected from outside of the graph.

    Returns:
        What to rewrite; a row for each attention; the places of those that must stay whole, but are not in `whole`.
    """
    normal = normalise(flat, example_inputs)
    canonical.fold(normal.graph)
    softmax.fold(normal.graph)
    traced = gm.graph.find_nodes(op="placeholder")
    _compat.make_constant(traced[normal.placeholders.index(node)] for node in computed_scales(normal.graph))
    selections = select(normal, _handles(normal, example_inputs), whole)
    example_inputs = selections.of_examples(example_inputs)
    held = _handles(normal, example_inputs)
    returned = () if _compat.is_cut(gm) else normal.outputs
    begun = births.begin(normal.graph, returned, [value for value, _ in normal.mutations], held)
    stacks = unstack(normal, begun, whole)
    inputs, placeholders = with_parts(example_inputs, stacks), normal.placeholders
    tensor_of = {
        cache: stack.place
        for stack in stacks
        for cache in (*(placeholders[i] for i in stack.positions), *(normal.outputs[i] for i in stack.results))
    }
    results = match(normal, _held(normal, inputs))
    formats = _formats([r for r in results if not isinstance(r, Reject)], normal, inputs, options)
    findings: list[Finding] = []
    planned: dict[int, Plan] = {}  # by the number of the finding
    # The tensors that are packed by now, and the places of those with several caches.
    limited: set[fx.Node | int] = set()
    for result in results:
        finding, plan = _decide(result, normal, formats, options, limited, tensor_of)
        if plan is not None:
            first = _caches(plan)[0][1].cache
            limited.add(tensor_of.get(first, first))
            planned[len(findings)] = plan
        findings.append(finding)
    left: set[int] = set()
    while more := _incomplete(tensor_of, planned.values()) - left:
        left |= more
        for number, plan in list(planned.items()):
            if shared := [t for _, write, _ in _caches(plan) if (t := tensor_of.get(write.cache)) in left]:
                why = f"in {normal.source(placeholders[shared[0]])}" if shared[0] >= 0 else f"in result {~shared[0]}"
                findings[number] = replace(findings[number], outcome=Reason.SHARED_TENSOR.name, detail=why)
                del planned[number]
    caches = [(write, dims) for plan in planned.values() for _, write, dims in _caches(plan)]
    left |= selections.unserved(normal, caches)
    births.undo(begun, {write.cache for write, _ in caches})
    found = Found(normal, list(planned.values()), formats, selections, stacks, inputs)
    return found, findings, left


def _incomplete(tensor_of: Mapping[fx.Node, int], plans: Collection[Plan]) -> set[int]:
    """The places of tensors that hold caches of which not all are planned for."""
    planned = {node for plan in plans for _, write, _ in _caches(plan) for node in (write.cache, write.buffer)}
    return {place for cache, place in tensor_of.items() if cache not in planned}


def _handles(normal: Normal, example_inputs: Sequence[Any]) -> list[fx.Node]:
    """The inputs of a graph that are handles."""
    return [node for node, x in zip(normal.placeholders, example_inputs, strict=True) if isinstance(x, CacheTensor)]


def _held(normal: Normal, example_inputs: Sequence[Any]) -> dict[fx.Node, Held]:
    """The inputs of a graph that are whole handles."""
    handles = [(node, x) for node, x in zip(normal.placeholders, example_inputs, strict=True) if is_whole(x)]
    return {node: Held(x._dims, isinstance(x._state, GrowingState)) for node, x in handles if x._parts is None}


def mentions_attention(gm: fx.GraphModule) -> bool:
    """Whether a graph of Dynamo's can hold attention at all. Costs nothing, and keeps us out of mask frames."""
    words = ("scaled_dot_product", "softmax", "flex_attention")
    return any(
        any(word in str(node.target) or word in getattr(node.target, "__name__", "") for word in words)
        or "exp" in (node.target, getattr(node.target, "__name__", ""))  # of a softmax spelled out
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if node.op in ("call_function", "call_method")
    )


def _decide(
    result: Site | RebuiltSite | Reject,
    normal: Normal,
    formats: Mapping[fx.Node, Format],
    options: Options,
    packed: Collection[fx.Node | int],
    tensor_of: Mapping[fx.Node, int],
) -> tuple[Finding, Plan | None]:
    """What becomes of an attention.

    Args:
        result: what it is.
        normal: the graph.
        formats: of all caches.
        options: checked.
        packed: the tensors of the first caches of the attentions before that are rewritten, by place if they hold more.
        tensor_of: the place of the tensor that holds a cache, where it holds others, too.
    """
    if isinstance(result, Reject):
        return Finding.of(result, ""), None
    writes = [write for _, write, _ in _caches(result)]
    first, limit = writes[0], options.max_rewrites
    source = "" if first.born else normal.source(first.buffer)
    if limit is not None and len(packed) >= limit and tensor_of.get(first.cache, first.cache) not in packed:
        why = f"max_rewrites={limit}"
        return replace(Finding.of(result, source, why), outcome="MAX_REWRITES"), None
    held = (formats[write.cache] for write in writes)
    return Finding.of(result, source, " ".join(f"{f.role[0].upper()}{f.bits}" for f in held)), result


def _caches(site: Site | RebuiltSite) -> list[tuple[Role, CacheWrite, Dims]]:
    """The caches of a site: role, write, layout."""
    if isinstance(site, RebuiltSite):
        return [(cache.side, cache.write, cache.dims) for cache in site.caches]
    return [("key", site.key, site.key_dims), ("value", site.value, site.value_dims)]


def _formats(
    sites: Sequence[Site | RebuiltSite], normal: Normal, example_inputs: Sequence[Any], options: Options
) -> dict[fx.Node, Format]:
    """Packed formats of all caches: those they are held in already, else as the options say."""
    caches: dict[fx.Node, tuple[Role, CacheWrite, Dims]] = {}
    for site in sites:
        for role, write, dims in _caches(site):
            caches.setdefault(write.cache, (role, write, dims))
    rebuilt = {c.write.cache for site in sites if isinstance(site, RebuiltSite) for c in site.caches}
    holdings = [Holding(role, math.prod(map(_compat.hint_of, shape(cache)))) for cache, (role, *_) in caches.items()]

    def choose(cache: fx.Node, bits: int) -> Format:
        role, write, dims = caches[cache]
        if not write.born:
            held = format_of(example_inputs[normal.placeholders.index(write.buffer)], dims)
            if held is not None and (held.role == role or cache in rebuilt):
                return held
        channels = shape(cache)[dims[3]]
        assert isinstance(channels, int)  # only such caches are matched
        return Format(role, bits, channels, cache.meta["val"].dtype, options.sinks, options.window)

    widths = options.widths(holdings)
    return {cache: choose(cache, bits) for cache, bits in zip(caches, widths, strict=True)}


def packed(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    patches: Mapping[str, Any],
    report: GraphReport,
    compiler: Callable[..., Compiled],
) -> Compiled | None:
    """The graph on packed caches, compiled; None, with the reason in the report, where there is nothing to rewrite.

    Args:
        gm: the graph that Dynamo traced.
        example_inputs: its inputs.
        options: checked.
        patches: options of Inductor.
        report: the graph's.
        compiler: `compile_fx`, or what takes its arguments.
    """
    found = find(gm, example_inputs, options, report)
    if found is None:
        return None
    if log.isEnabledFor(logging.DEBUG):
        log.debug("normalised graph:\n%s", str(found.normal.graph))  # as text: it is changed in place
    rewritten = rewrite(found.normal, found.plans, found.formats, found.stacks, found.selections.spent)
    log.debug("rewritten graph:\n%s", rewritten.gm.graph)
    _compat.trace_artifact("rewritten", lambda: str(rewritten.gm.graph))
    inputs = [*(_compat.canonical(found.inputs[i]) for i in rewritten.kept), *rewritten.examples]
    fn = compiler(rewritten.gm, inputs, config_patches=patches)
    bound = {binding.index for binding in rewritten.bindings} | {stack.index for stack in found.stacks}
    handles = tuple(
        at for at, i in enumerate(rewritten.kept) if isinstance(found.inputs[i], CacheTensor) and i not in bound
    )
    return PackedGraph(
        fn,
        rewritten.kept,
        handles,
        rewritten.bindings,
        found.selections,
        found.stacks,
        rewritten.probe,
        rewritten.sizes,
        report,
        gm,
        patches,
    )


def untouched(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    patches: Mapping[str, Any],
    report: GraphReport,
    compiler: Callable[..., Compiled],
) -> Compiled:
    """The same graph, compiled as it is; handles among its inputs are read dense at each call. See `packed`."""
    handles = tuple(i for i, x in enumerate(example_inputs) if isinstance(x, CacheTensor))
    fn = compiler(gm, example_inputs, config_patches=patches)
    return DenseGraph(fn, handles, report) if handles else fn


def _warn_near_limit(report: GraphReport) -> None:
    """A frame at Dynamo's limit runs eagerly from then on: dense, and out of our sight."""
    entries, limit = _compat.entries_of_this_frame(), _compat.recompile_limit_now()
    if entries >= limit:
        warnings.warn(
            f"decoquant_compile: graph {report.name} is entry {entries} of its frame and Dynamo's recompile_limit is "
            f"{limit}: the next new shape or cache will run eagerly and dense. Raise the limit: "
            "torch.compile(..., recompile_limit=64), torch._dynamo.config.recompile_limit, or "
            "enable(recompile_limit=64).",
            stacklevel=2,
        )
