"""Keys and values that can be made from some slots of a cache alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from decoquant_compile.patterns import blocks
from decoquant_compile.patterns.attention import cores
from decoquant_compile.patterns.core import AttentionCore
from decoquant_compile.patterns.match import RebuiltSite
from tests.graphs import BATCH, CHANNELS, HEADS, SLOTS, assemble, cache, capture, project, queries, results_of

T = torch.randn(HEADS, SLOTS, CHANNELS)
W = torch.randn(CHANNELS, CHANNELS)


def expansion(prepare, dynamic=None):
    """How keys and values `prepare(cache)` come from the cache, with the graph, its inputs and its attention."""

    def function(c, q):
        prepared = prepare(c)
        key, value = prepared if isinstance(prepared, tuple) else (prepared, c)
        return F.scaled_dot_product_attention(q[..., : key.shape[-1]], key, value)

    inputs = {"L['c']": cache(), "L['q']": queries(heads=HEADS), "G['T']": T, "G['W']": W}
    recorder, _ = capture(function, *list(inputs.values())[:2], dynamic=dynamic)
    (graph,) = recorder.graphs
    (core,) = cores(graph.graph)
    assert isinstance(core, AttentionCore)
    start = next(n for n in graph.placeholders if graph.source(n) == "L['c']")
    arguments = [inputs.get(graph.source(n)) for n in graph.placeholders]
    return blocks.expansion(core, {start: 2}), graph.gm, arguments, core


def rotate(x):
    a, b = x.chunk(2, -1)
    return x * T.cos() + torch.cat([-b, a], -1) * T.sin()


def turn(x):
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * T[..., :2].mean()).flatten(-2)


def both(x):
    k, v = F.linear(x, torch.cat([W, W])).split([CHANNELS, CHANNELS], -1)
    return k, v.sin()


ALONE = [
    torch.exp,
    rotate,
    turn,
    assemble,
    project,
    both,
    lambda x: F.layer_norm(x, (CHANNELS,)),
    lambda x: x @ W,
    lambda x: (W @ x.mT).mT,
    lambda x: torch.einsum("bhsc,ec->bhse", x, W),
    lambda x: torch.where(T > 0, x, T),
    lambda x: torch.stack([x, T[None].expand(BATCH, -1, -1, -1)], 2)[:, :, 0],
    lambda x: torch.cat([x[:, :1].expand(-1, HEADS, -1, -1), T[None].expand(BATCH, -1, -1, -1)], -1)[..., :CHANNELS],
    lambda x: (x[:, :, : SLOTS - 2].cos(), x[:, :, : SLOTS - 2]),
]


@pytest.mark.parametrize("prepare", ALONE)
@torch.no_grad()
def test_each_slot_is_made_from_the_same_slot_alone(prepare):
    """Other slots of the cache may be anything."""
    found, gm, arguments, core = expansion(prepare)
    assert found is not None

    def operands():
        interpreter = fx.Interpreter(gm, garbage_collect_values=False)
        interpreter.run(*arguments)
        return [interpreter.env[node].clone() for node in (core.key, core.value)]

    before, at = operands(), [3, SLOTS - 3]
    changed = next(x for x in arguments if x is not None and x.shape == (BATCH, HEADS, SLOTS, CHANNELS))
    changed[:, :, at] += 1
    for x, y in zip(before, operands(), strict=True):
        slots = (x != y).any(-1).any(0).any(0).nonzero().flatten().tolist()
        assert set(slots) <= set(at)
    assert any(not torch.equal(x, y) for x, y in zip(before, operands(), strict=True))


def test_with_symbolic_sizes():
    for prepare in (torch.exp, lambda x: x @ W, lambda x: x[:, :, : x.shape[2]].sin()):
        assert expansion(prepare, dynamic=True)[0] is not None


def test_what_else_varies_along_the_slots_is_known():
    found, _, _, _ = expansion(rotate)
    assert sorted(found.along.values()) == [1, 1]
    assert not found.empty
    found, _, _, _ = expansion(assemble)
    assert [dim for node, dim in found.along.items() if node in found.empty] == [2]
    assert set(found.others).isdisjoint(found.nodes)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda x: x.cumsum(2),
        lambda x: x.flip(2),
        lambda x: x.roll(1, 2),
        lambda x: x.softmax(2),
        lambda x: x - x.mean(2, keepdim=True),
        lambda x: x * x.amax(),
        lambda x: x[:, :, torch.arange(SLOTS).flip(0)],
        lambda x: (x[:, :, 1:], x[:, :, 1:]),
        lambda x: (x[:, :, ::2], x[:, :, ::2]),
        lambda x: (torch.cat([x, x], 2), torch.cat([x, x], 2)),
        lambda x: F.pad(x, (0, 0, 1, 0))[:, :, :SLOTS],
        lambda x: (x @ x.mT) @ x,
        lambda x: torch.einsum("bhsc,bhsd->bhsd", x, x),
        lambda x: torch.einsum("bhsc,hsd->bhsd", x, T),
        lambda x: torch.stack([x, x], 3).flatten(2, 3)[:, :, :SLOTS],
        lambda x: x.transpose(1, 2).reshape(BATCH, HEADS, SLOTS, CHANNELS),
        lambda x: F.dropout(x, 0.5),
        lambda x: x.sort(2)[0],
        lambda x: (x.sin(), T[None].expand(BATCH, -1, -1, -1)),
        lambda x: torch.matmul(x.transpose(0, 2), W.expand(SLOTS, 1, -1, -1)).transpose(0, 2),
    ],
)
def test_what_takes_more_than_a_slot_is_refused(prepare):
    assert expansion(prepare)[0] is None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_attention_that_is_not_understood_is_left_as_it_is(monkeypatch, dropout):
    monkeypatch.setattr(blocks, "LENGTH", 4)

    def step(q, k, v, keys, values, at):
        keys.index_copy_(2, at, k), values.index_copy_(2, at, v)
        return F.scaled_dot_product_attention(q, keys.sin(), values, dropout_p=dropout)

    operands = [queries(heads=HEADS), *(torch.randn(BATCH, HEADS, 1, CHANNELS) for _ in range(2)), cache(), cache()]
    (site,) = results_of(step, *operands, torch.tensor([3]))
    assert isinstance(site, RebuiltSite)
    assert (site.expansion is None) == (dropout > 0)
