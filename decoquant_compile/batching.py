"""Stretches of a graph under `vmap`, as in the making of block masks, to the operators that they come down to."""

from dataclasses import dataclass, field

from torch import fx

from decoquant_compile import _compat


@dataclass
class _Stretch:
    """Nodes from where a `vmap` is entered until all are left."""

    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def inputs(self) -> list[fx.Node]:
        """What they take from outside."""
        inside = set(self.nodes)
        return list(dict.fromkeys(n for node in self.nodes for n in node.all_input_nodes if n not in inside))

    @property
    def outputs(self) -> list[fx.Node]:
        """Those that others take."""
        inside = set(self.nodes)
        return [node for node in self.nodes if any(user not in inside for user in node.users)]


def unbatched(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of Dynamo's without `vmap`; the graph itself if it has none, or one that cannot be traced alone.

    The tracer of the normal form does not know functorch. A stretch is traced alone, on fake tensors that Dynamo made.

    Args:
        gm: Dynamo's graph. It is not changed.
    """
    stretches = _stretches(gm.graph)
    if not stretches:
        return gm
    replaced = {stretch.nodes[0]: (stretch, _traced(gm, stretch)) for stretch in stretches}
    if any(traced is None for _, traced in replaced.values()):
        return gm
    within = {node for stretch in stretches for node in stretch.nodes}
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.nodes:
        if node in replaced:
            stretch, traced = replaced[node]
            assert traced is not None
            env |= zip(stretch.outputs, _inlined(graph, traced, [env[n] for n in stretch.inputs]), strict=True)
        if node not in within:
            env[node] = graph.node_copy(node, env.__getitem__)
        if node.op == "placeholder":
            _compat.copy_input_source(env[node], node)
    flat = fx.GraphModule(gm, graph)
    flat.meta.update(gm.meta)
    _compat.copy_parameter_sources(flat, gm)
    return flat


def _stretches(graph: fx.Graph) -> list[_Stretch]:
    """The stretches of a graph; none if it holds other transforms."""
    found: list[_Stretch] = []
    depth = 0
    for node in graph.nodes:
        step = _compat.VMAP_STEPS.get(node.target)
        if step is None and _compat.is_functorch(node.target):
            return []
        if depth == 0 and step is not None:
            found.append(_Stretch())
        if depth or step is not None:
            found[-1].nodes.append(node)
        depth += step or 0
    return [] if depth else found


def _traced(gm: fx.GraphModule, stretch: _Stretch) -> fx.GraphModule | None:
    """What a stretch does, in ATen operators."""
    graph = fx.Graph()
    env = {node: graph.placeholder(node.name) for node in stretch.inputs}
    for node in stretch.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in stretch.outputs))
    values = [node.meta.get("example_value") for node in stretch.inputs]
    if any(value is None for value in values):
        return None
    traced = _compat.trace_alone(fx.GraphModule(gm, graph), values)
    if traced is None or traced.graph.find_nodes(op="get_attr"):
        return None
    return traced


def _inlined(graph: fx.Graph, traced: fx.GraphModule, inputs: list[fx.Node]) -> list[fx.Node]:
    """Put a traced stretch at the end of a graph; its results."""
    env = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = {"example_value": node.meta.get("val")}
    results: tuple[fx.Node, ...] = traced.graph.output_node().args[0]  # type: ignore[assignment]
    assert all(isinstance(x, fx.Node) for x in results)
    return [env[x] for x in results]
