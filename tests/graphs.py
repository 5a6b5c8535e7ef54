"""Normalised graphs of functions, captured through `torch.compile`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from decoquant_compile.normalize import Normal, finish, normalise, unsupported
from decoquant_compile.patterns import canonical
from decoquant_compile.patterns.match import Site, match

if TYPE_CHECKING:
    from collections.abc import Callable

    from decoquant_compile.patterns.reject import Reject


def interpret(gm: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
    """Run a graph node by node."""
    return torch.fx.Interpreter(gm).run


@dataclass
class Recorder:
    """A backend that normalises every graph and matches it.

    Attributes:
        compiler: compiles the finished graph, so that the round trip runs; None runs Dynamo's graph.
        graphs: the normalised graphs.
        results: what `match` says of each graph.
        refused: why graphs were not normalised.
    """

    compiler: Callable[..., Any] | None = None
    graphs: list[Normal] = field(default_factory=list)
    results: list[list[Site | Reject]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def __call__(self, gm, example_inputs):
        if (why := unsupported(gm, example_inputs)) is not None:
            self.refused.append(why)
            return gm.forward if self.compiler is None else self.compiler(gm, example_inputs)
        normal = normalise(gm, example_inputs)
        canonical.fold(normal.graph)
        self.graphs.append(normal)
        self.results.append(match(normal))
        return gm.forward if self.compiler is None else self.compiler(finish(normal), example_inputs)


def capture(function, *args, compiler=None, dynamic=None, grad=False) -> tuple[Recorder, Any]:
    """Compile and call `function`; the recorder and the result."""
    torch._dynamo.reset()
    recorder = Recorder(compiler)
    with torch.set_grad_enabled(grad):
        result = torch.compile(function, backend=recorder, fullgraph=True, dynamic=dynamic)(*args)
    return recorder, result


def results_of(function, *args, dynamic=None) -> list[Site | Reject]:
    """What `match` says of the one graph of `function`."""
    recorder, _ = capture(function, *args, dynamic=dynamic)
    assert not recorder.refused
    (results,) = recorder.results
    return results


# One small attention over a cache: the sizes that the tests share.
BATCH, HEADS, GROUPS, SLOTS, CHANNELS = 2, 2, 2, 16, 8


def queries(tokens=1, heads=HEADS * GROUPS) -> torch.Tensor:
    return torch.randn(BATCH, heads, tokens, CHANNELS)


def new(tokens=1) -> torch.Tensor:
    return torch.randn(BATCH, HEADS, tokens, CHANNELS)


def cache(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(BATCH, HEADS, SLOTS, CHANNELS).to(dtype)


def cached_arguments(tokens=1) -> tuple[torch.Tensor, ...]:
    """Query, keys, values, key cache, value cache, positions, mask."""
    mask = torch.ones(1, 1, tokens, SLOTS, dtype=torch.bool)
    return queries(tokens), new(tokens), new(tokens), cache(), cache(), torch.arange(3, 3 + tokens), mask


def assemble(x):
    """Twice the channels, put together in a buffer, every other one of them."""
    whole = x.new_empty(BATCH, HEADS, SLOTS, 2 * CHANNELS)
    whole[..., CHANNELS:] = x.exp()
    whole[..., :CHANNELS] = x
    return whole[..., ::2]


def project(x):
    """A linear map over the channels of all heads."""
    x = F.linear(x.transpose(1, 2).reshape(BATCH, SLOTS, -1), torch.ones(3 * HEADS * CHANNELS, HEADS * CHANNELS))
    return x.view(BATCH, SLOTS, 3, HEADS, CHANNELS).unbind(2)[1].transpose(1, 2)
