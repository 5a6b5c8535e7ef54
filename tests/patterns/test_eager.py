"""Attention spelled out: what is read is what the graph computes, and what cannot be read says why."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from decoquant_compile.patterns.attention import AttentionCore, cores
from decoquant_compile.patterns.reject import Reason, Reject
from tests.graphs import BATCH, CHANNELS, GROUPS, HEADS, SLOTS, capture

QUERIES = 3
ALL = HEADS * GROUPS

FORMS = {}


def form(**expected):
    """Register attention of q over k and v with a mask, and what its core must be."""

    def register(function):
        FORMS[function.__name__] = function, expected
        return function

    return register


def repeat(*tensors):
    return tuple(x[:, :, None].expand(-1, -1, GROUPS, -1, -1).reshape(BATCH, ALL, SLOTS, CHANNELS) for x in tensors)


def additive(mask):
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


@form(scale=1.0, mask=None)
def plain(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT).softmax(-1) @ v


@form(scale=0.25, mask=torch.float32)
def usual(q, k, v, mask):
    k, v = repeat(k, v)
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.25 + additive(mask)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.5, training=False), v).transpose(1, 2).contiguous()


@form(scale=1 / 8, mask=None)
def scaled_before_and_after(q, k, v, mask):
    k, v = repeat(k, v)
    return (q * 0.5 @ k.mT / 4 * 0.5).softmax(-1) @ v


@form(scale=0.25, mask=None)
def scaled_by_constant_tensors(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT / torch.tensor(2.0) * torch.full([], 0.5)).softmax(-1) @ v


@form(scale=0.5, mask=None)
def scaled_by_a_number_in_a_tensor(q, k, v, mask):
    k, v = repeat(k, v)
    return (0.5 * (q @ k.mT / v[0, 0, 0, 0].exp())).softmax(-1) @ v


@form(scale=1.0, mask=None)
def scaled_by_a_tensor_for_each_head(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT * v[:1, :, :1, :1].exp()).softmax(-1) @ v


@form(scale=1.0, mask=torch.float32)
def masked_before_a_tensor_scales(q, k, v, mask):
    k, v = repeat(k, v)
    logits = torch.where(mask, q @ k.mT, torch.finfo(torch.float32).min)
    return (logits / v[0, 0, :1, 0].exp().clamp_min(1) + additive(mask)).softmax(-1) @ v


@form(scale=1.0, mask=torch.float32)
def biased_before_a_tensor_for_each_head_scales(q, k, v, mask):
    k, v = repeat(k, v)
    bias = torch.linspace(-1, 1, SLOTS).expand(1, 1, QUERIES, SLOTS)
    return ((q @ k.mT + bias) * v[:1, :, :1, :1].exp()).softmax(-1) @ v


@form(scale=1.0, mask=torch.bool)
def hidden_before_a_tensor_for_each_head_scales(q, k, v, mask):
    k, v = repeat(k, v)
    return ((q @ k.mT).masked_fill(~mask, -math.inf) * v[:1, :, :1, :1].exp()).softmax(-1) @ v


@form(scale=1.0, mask=torch.bool)
def one_head_summed_away(q, k, v, mask):
    logits = torch.einsum("bhqd,bzkd->bhqk", q, k[:, :1]).masked_fill(~mask, -math.inf)
    return torch.einsum("bhqk,bzkd->bhqd", logits.softmax(-1), v[:, :1])


@form(scale=1.0, mask=torch.bool)
def boolean(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v


@form(scale=1.0, mask=torch.bool)
def boolean_by_where(q, k, v, mask):
    k, v = repeat(k, v)
    return torch.where(mask, q @ k.mT, -torch.inf).softmax(-1) @ v


@form(scale=1.0, mask=torch.float32)
def finite_by_where(q, k, v, mask):
    k, v = repeat(k, v)
    logits = q @ k.mT
    return torch.where(mask, logits, torch.full([], torch.finfo(logits.dtype).min)).softmax(-1) @ v


@form(scale=1.0, mask=torch.float32)
def filled_where_the_mask_is(q, k, v, mask):
    k, v = repeat(k, v)
    return torch.where(~mask, torch.tensor(-1e4), q @ k.mT).softmax(-1) @ v


@form(scale=0.5, mask=torch.float32)
def masks_between_scales(q, k, v, mask):
    """Added, scaled, replaced, added, shifted."""
    k, v = repeat(k, v)
    bias = torch.arange(SLOTS) * torch.arange(ALL)[:, None, None] * 0.1
    logits = ((q @ k.mT + bias) * 0.5).masked_fill(~mask, torch.finfo(torch.float32).min)
    return (logits - bias.flip(0) + 3).softmax(-1) @ v


@form(scale=1.0, mask=torch.float32)
def masks_of_two_kinds(q, k, v, mask):
    """What both mask is -inf; a query to which each masks a part weighs both parts alike."""
    k, v = repeat(k, v)
    late = torch.arange(SLOTS) > 9
    early = torch.arange(SLOTS) < 12
    least = torch.finfo(torch.float32).min
    logits = torch.where(late & mask, q @ k.mT, torch.tensor(least)) + torch.where(early & mask, 0.0, least)
    return logits.softmax(-1) @ v


@form(scale=3.0, mask=torch.float32)
def replaced_twice(q, k, v, mask):
    k, v = repeat(k, v)
    logits = (q @ k.mT).masked_fill(~mask, -1e9).masked_fill(mask.flip(-1), -torch.inf)
    return (logits.masked_fill(mask.roll(1, -1), -3e38) * 3).softmax(-1) @ v


@form(scale=1.0, mask=torch.float32)
def bounded_from_below(q, k, v, mask):
    k, v = repeat(k, v)
    logits = q @ k.mT + torch.where(mask, 0.0, -torch.inf)
    return torch.max(logits, torch.tensor(torch.finfo(torch.float32).min)).clamp_min(-3e38).softmax(-1) @ v


@form(scale=0.2, softcap=1.5, mask=torch.float32)
def capped(q, k, v, mask):
    k, v = repeat(k, v)
    return (torch.tanh(q @ k.mT * 0.2 / 1.5) * 1.5 + additive(mask)).softmax(-1) @ v


@form(scale=-0.3, softcap=3.0, mask=None)
def capped_by_other_numbers(q, k, v, mask):
    k, v = repeat(k, v)
    return (-3 * torch.tanh(q @ k.mT * 0.1)).softmax(-1) @ v


@form(scale=0.5, mask=torch.bool, enable_gqa=True)
def grouped_by_a_view(q, k, v, mask):
    q = q.view(BATCH, HEADS, GROUPS, QUERIES, CHANNELS)
    logits = (q @ k[:, :, None].mT * 0.5).masked_fill(~mask[:, :, None], -math.inf)
    return (logits.softmax(-1) @ v[:, :, None]).flatten(1, 2)


@form(scale=1.0, mask=torch.float32, enable_gqa=True)
def grouped_einsum(q, k, v, mask):
    q = q.view(BATCH, HEADS, GROUPS, QUERIES, CHANNELS).permute(0, 3, 1, 2, 4)
    bias = torch.arange(HEADS)[:, None, None, None] * torch.arange(SLOTS) * 0.1
    logits = torch.einsum("btkgd,bksd->bkgts", q, k) + bias
    return torch.einsum("bkgts,bksd->btkgd", logits.softmax(-1), v)


@form(scale=0.5, mask=torch.float32)
def einsum_with_queries_first(q, k, v, mask):
    k, v = (x.transpose(1, 2) for x in repeat(k, v))
    logits = torch.einsum("bshd,bthd->bsht", q.transpose(1, 2), k) * 0.5
    return torch.einsum("bsht,bthd->bshd", (logits + additive(mask).transpose(1, 2)).softmax(-1), v)


@form(scale=1.0, mask=None)
def values_before_weights(q, k, v, mask):
    k, v = repeat(k, v)
    return torch.einsum("bhkd,bhqk->hbqd", v, torch.einsum("bhkd,bhqd->bhqk", k, q).softmax(-1))


@form(scale=0.5, mask=torch.float32)
def heads_in_the_batch(q, k, v, mask):
    k, v = (x.reshape(BATCH * ALL, SLOTS, CHANNELS) for x in repeat(k, v))
    alibi = torch.arange(BATCH * ALL)[:, None, None] * torch.arange(SLOTS) * 0.1
    logits = torch.baddbmm(alibi, q.reshape(BATCH * ALL, -1, CHANNELS), k.mT, beta=0.5, alpha=0.5)
    weights = (logits.view(BATCH, ALL, QUERIES, SLOTS) + additive(mask)).softmax(-1)
    return torch.bmm(weights.view(BATCH * ALL, QUERIES, SLOTS), v)


@form(scale=0.5, mask=None)
def input_that_counts_for_nothing(q, k, v, mask):
    k, v = (x.reshape(BATCH * ALL, SLOTS, CHANNELS) for x in repeat(k, v))
    logits = torch.baddbmm(torch.ones(1), q.reshape(BATCH * ALL, -1, CHANNELS), k.mT, beta=0, alpha=0.5)
    return torch.bmm(logits.view(BATCH, ALL, QUERIES, SLOTS).softmax(-1).flatten(0, 1), v)


def sinks(heads=ALL):
    return torch.arange(heads) * 0.7 - 1


@form(scale=0.5, mask=torch.float32, sink=True)
def with_sinks(q, k, v, mask):
    """As gpt-oss: the maximum goes before the softmax."""
    k, v = repeat(k, v)
    logits = torch.matmul(q, k.transpose(2, 3)) * 0.5 + additive(mask)
    logits = torch.cat([logits, sinks().reshape(1, -1, 1, 1).expand(BATCH, -1, QUERIES, -1)], -1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    weights = F.dropout(F.softmax(logits, -1, dtype=logits.dtype)[..., :-1], 0.5, training=False)
    return torch.matmul(weights.to(v.dtype), v).transpose(1, 2).contiguous()


@form(scale=-0.25, mask=torch.bool, sink=True)
def with_sinks_first_scaled_and_cast(q, k, v, mask):
    k, v = repeat(k, v)
    logits = (q @ k.mT * -0.5).masked_fill(~mask, -math.inf)
    logits = torch.cat([sinks()[:, None, None].expand(BATCH, -1, QUERIES, 1).double(), logits], -1).float() * 0.5
    return (logits - logits.amax(-1, keepdim=True)).softmax(-1)[..., 1:] @ v


@form(scale=0.2, softcap=1.5, mask=torch.float32, sink=True)
def with_sinks_beside_capped_logits(q, k, v, mask):
    k, v = repeat(k, v)
    logits = torch.tanh(q @ k.mT * 0.2 / 1.5) * 1.5 + additive(mask)
    return torch.cat([logits, sinks().view(1, -1, 1, 1).expand(BATCH, -1, QUERIES, 1)], -1).softmax(-1)[..., :-1] @ v


@form(scale=0.5, mask=torch.bool, enable_gqa=True, sink=True)
def with_sinks_of_grouped_heads(q, k, v, mask):
    q = q.view(BATCH, HEADS, GROUPS, QUERIES, CHANNELS)
    logits = (q @ k[:, :, None].mT * 0.5).masked_fill(~mask[:, :, None], -math.inf)
    logits = torch.cat([logits, sinks().view(1, HEADS, GROUPS, 1, 1).expand(BATCH, -1, -1, QUERIES, -1)], -1)
    return (logits.softmax(-1)[..., :-1] @ v[:, :, None]).flatten(1, 2)


@form(scale=0.5, mask=None, sink=True)
def with_sinks_of_heads_in_the_batch(q, k, v, mask):
    k, v = (x.reshape(BATCH * ALL, SLOTS, CHANNELS) for x in repeat(k, v))
    logits = torch.bmm(q.reshape(BATCH * ALL, -1, CHANNELS), k.mT) * 0.5
    logits = torch.cat([logits, sinks().repeat(BATCH)[:, None, None].expand(-1, QUERIES, 1)], -1)
    return torch.bmm(logits.view(BATCH, ALL, QUERIES, -1).softmax(-1).flatten(0, 1)[..., :-1], v)


@form(scale=1.0, mask=None, sink=True)
def one_more_in_the_sum(q, k, v, mask):
    k, v = repeat(k, v)
    return F.pad(q @ k.mT, (1, 0)).softmax(-1)[..., 1:] @ v


@form(scale=0.5, mask=torch.float32, sink=True)
def scaled_by_the_share_that_a_sink_leaves(q, k, v, mask):
    """As Granite with sliding windows."""
    k, v = repeat(k, v)
    logits = torch.matmul(q, k.transpose(2, 3)) * 0.5 + additive(mask)
    share = (torch.logsumexp(logits, -1) - sinks().view(1, -1, 1)).to(torch.float32).sigmoid()
    out = torch.matmul(F.softmax(logits, -1, dtype=torch.float32).to(q.dtype), v)
    return (out * share.unsqueeze(-1).to(out.dtype)).transpose(1, 2).contiguous()


@form(scale=0.5, mask=None, sink=True)
def scaled_by_the_share_that_one_sink_leaves(q, k, v, mask):
    k, v = repeat(k, v)
    logits = q @ k.mT * 0.5
    return torch.sigmoid(logits.logsumexp(-1, keepdim=True) - sinks()[1]) * (logits.softmax(-1) @ v)


@form(scale=1.0, mask=None)
def one_key_value_head(q, k, v, mask):
    return (q @ k[:, :1].mT).softmax(-1) @ v[:, :1]


@form(scale=0.5, mask=torch.bfloat16)
def half_precision(q, k, v, mask):
    q, k, v = (x.bfloat16() for x in (q, *repeat(k, v)))
    weights = (q @ k.mT * 0.5 + additive(mask).bfloat16()).float().softmax(-1)
    return weights.bfloat16() @ v


@form(scale=0.5, mask=None)
def logits_in_float32(q, k, v, mask):
    k, v = (x.bfloat16() for x in repeat(k, v))
    weights = ((q.bfloat16().float() @ k.float().mT) * 0.5).softmax(-1)
    return weights.to(v.dtype) @ v


def arguments():
    torch.manual_seed(0)
    q = torch.randn(BATCH, ALL, QUERIES, CHANNELS)
    k, v = (torch.randn(BATCH, HEADS, SLOTS, CHANNELS) for _ in range(2))
    mask = torch.rand(BATCH, 1, QUERIES, SLOTS) < 0.6
    mask[1, 0, 1] = False  # one query attends to nothing
    return q, k, v, mask


class Values(fx.Interpreter):
    """Keeps what every node computes."""

    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)


def attention(core, values):
    """What a core says, in float32, and what the graph computes."""
    query, key, value = (values.env[n] for n in (core.query, core.key, core.value))
    if core.enable_gqa or key.shape[1] == 1:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = query.float() @ key.float().mT * core.scale
    if core.softcap is not None:
        logits = core.softcap * torch.tanh(logits / core.softcap)
    if core.mask is not None:
        mask = values.env[core.mask]
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    if core.sink is None:
        weights = logits.softmax(-1)
    else:
        sink = values.env[core.sink]
        assert (sink.shape, sink.dtype) == (query.shape[1:2], torch.float32)
        column = sink[:, None, None].expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    out = (weights @ value.float()).to(query.dtype)
    for target, others in core.result:
        out = target(out, *others)
    return out, values.env[core.node]


def captured(function, args, dynamic=None):
    """The normalised graph of a function, and its attentions."""
    recorder, _ = capture(function, *args, dynamic=dynamic)
    (normal,) = recorder.graphs
    return normal, cores(normal.graph)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_read_is_what_the_graph_computes(name):
    function, expected = FORMS[name]
    normal, (core,) = captured(function, args := arguments())
    assert isinstance(core, AttentionCore), core
    assert core.form == "eager"
    assert not core.is_causal
    assert core.scale == pytest.approx(expected["scale"])
    assert core.softcap == pytest.approx(expected.get("softcap"))
    assert core.enable_gqa is expected.get("enable_gqa", False)
    assert (core.sink is not None) is expected.get("sink", False)
    assert (None if core.mask is None else core.mask.meta["val"].dtype) is expected["mask"]
    assert [len(n.meta["val"].shape) for n in (core.query, core.key, core.value)] == [4, 4, 4]
    values = Values(normal.gm)
    local = dict(zip(("q", "k", "v", "mask"), args, strict=True))
    values.run(*(local[normal.source(p).split("'")[1]] for p in normal.placeholders))
    got, whole = attention(core, values)
    assert got.dtype == whole.dtype
    tolerance = 2e-2 if "half" in name or "float32" in name else 2e-6
    torch.testing.assert_close(got, whole, rtol=0, atol=tolerance, equal_nan=True)


def test_reading_adds_nothing_that_the_graph_needs():
    function, _ = FORMS["heads_in_the_batch"]
    recorder, _ = capture(function, *arguments())
    (normal,) = recorder.graphs
    cores(normal.graph)
    normal.graph.eliminate_dead_code()
    once = [n.format_node() for n in normal.graph.nodes]
    recorder, _ = capture(function, *arguments())
    cores(recorder.graphs[0].graph)
    recorder.graphs[0].graph.eliminate_dead_code()
    assert [n.format_node() for n in recorder.graphs[0].graph.nodes] == once


def test_to_ask_for_a_size_is_no_use_of_logits_and_weights():
    normal, (before,) = captured(FORMS["boolean"][0], arguments())
    for node in list(normal.graph.nodes):
        if node.op == "call_function":
            with normal.graph.inserting_after(node):
                normal.graph.call_function(torch.ops.aten.sym_size.int, (node, 0))
    (after,) = cores(normal.graph)
    assert (after.node, after.scale) == (before.node, before.scale)


def test_symbolic_lengths_are_read():
    def function(q, k, v, mask):
        k, v = (x.repeat_interleave(GROUPS, 1).flatten(0, 1) for x in (k, v))
        logits = torch.bmm(q.flatten(0, 1), k.mT).view(BATCH, ALL, q.shape[2], -1)
        return torch.bmm((logits + mask).softmax(-1).flatten(0, 1), v)

    q, k, v, mask = arguments()
    args = q, k, v, additive(mask)
    for tensor in args:
        torch._dynamo.mark_dynamic(tensor, 2)
    torch._dynamo.mark_dynamic(args[3], 3)
    _, (core,) = captured(function, args)
    assert isinstance(core, AttentionCore), core
    assert any(isinstance(n, torch.SymInt) for n in core.key.meta["val"].shape)


MISSES = {}


def miss(reason, detail):
    """Register attention that must be found, and not read, with words of the detail."""

    def register(function):
        MISSES[function.__name__] = function, reason, detail
        return function

    return register


@miss(Reason.ATTENTION_FORM, "softmax over dim -2")
def over_the_queries(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT).softmax(-2) @ v


@miss(Reason.ATTENTION_FORM, "scaled by")
def scaled_for_each_key(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT * torch.arange(SLOTS)).softmax(-1) @ v


@miss(Reason.ATTENTION_FORM, "second operand")
def divided_by_the_logits(q, k, v, mask):
    k, v = repeat(k, v)
    return (v[:, :, :1, :1] / (q @ k.mT)).softmax(-1) @ v


@miss(Reason.ATTENTION_FORM, "relu")
def rectified(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT).relu().softmax(-1) @ v


@miss(Reason.MASK_FORM, "masked logits become -10000")
def replaced_by_too_little_before_a_tensor_scales(q, k, v, mask):
    k, v = repeat(k, v)
    return ((q @ k.mT).masked_fill(~mask, -1e4) / v[0, 0, 0, 0, None].exp()).softmax(-1) @ v


@miss(Reason.ATTENTION_FORM, "bounds the logits by -1")
def bounded(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT).clamp_min(-1).softmax(-1) @ v


@miss(Reason.ATTENTION_FORM, "bounds the logits by cumsum")
def bounded_by_tensor(q, k, v, mask):
    k, v = repeat(k, v)
    return torch.maximum(q @ k.mT, torch.full([1], 1.0).cumsum(0)).softmax(-1) @ v


def with_a_column(q, k, column):
    return torch.cat([q @ k.mT, column.expand(BATCH, ALL, QUERIES, -1)], -1)


@miss(Reason.ATTENTION_FORM, "another sink for each batch or query")
def sinks_of_the_queries(q, k, v, mask):
    k, v = repeat(k, v)
    return with_a_column(q, k, q[..., :1]).softmax(-1)[..., :-1] @ v


@miss(Reason.ATTENTION_FORM, "another sink for each batch or query")
def sinks_of_the_batches(q, k, v, mask):
    k, v = repeat(k, v)
    return with_a_column(q, k, q[:, :1, :1, :1]).softmax(-1)[..., :-1] @ v


@miss(Reason.ATTENTION_FORM, "joins 2 columns")
def two_sinks(q, k, v, mask):
    k, v = repeat(k, v)
    return with_a_column(q, k, torch.ones(ALL, 1, 2)).softmax(-1)[..., :-2] @ v


@miss(Reason.ATTENTION_FORM, "between the softmax and the values")
def a_key_dropped_for_a_sink(q, k, v, mask):
    k, v = repeat(k, v)
    return with_a_column(q, k, torch.ones(ALL, 1, 1)).softmax(-1)[..., 1:] @ v


@miss(Reason.ATTENTION_FORM, "has a value")
def a_sink_with_a_value(q, k, v, mask):
    k, v = repeat(k, v)
    return with_a_column(q, k, torch.ones(ALL, 1, 1)).softmax(-1) @ F.pad(v, (0, 0, 0, 1))


@miss(Reason.ATTENTION_FORM, "before they are masked")
def a_sink_that_is_masked(q, k, v, mask):
    k, v = repeat(k, v)
    logits = with_a_column(q, k, torch.ones(ALL, 1, 1)) + F.pad(additive(mask), (0, 1), value=-5.0)
    return logits.softmax(-1)[..., :-1] @ v


@miss(Reason.ATTENTION_FORM, "before they are masked")
def the_maximum_taken_off_before_a_sink_joins(q, k, v, mask):
    k, v = repeat(k, v)
    logits = q @ k.mT
    logits = logits - logits.amax(-1, keepdim=True)
    return F.pad(logits, (0, 1)).softmax(-1)[..., :-1] @ v


@miss(Reason.ATTENTION_FORM, "3 is added")
def shifted_before_a_sink_joins(q, k, v, mask):
    k, v = repeat(k, v)
    return F.pad(q @ k.mT + 3, (0, 1)).softmax(-1)[..., :-1] @ v


@miss(Reason.ATTENTION_FORM, "between the product and the softmax")
def the_maximum_of_the_queries_taken_off(q, k, v, mask):
    k, v = repeat(k, v)
    logits = (q @ k.mT).mT
    return (logits - logits.amax(-1, keepdim=True)).mT.softmax(-1) @ v


@miss(Reason.ATTENTION_FORM, "not the share of a sink")
def scaled_by_the_share_of_another_head(q, k, v, mask):
    k, v = (x[:, :1].expand(-1, QUERIES, -1, -1) for x in (k, v))
    logits = q[:, :QUERIES] @ k.mT
    share = torch.sigmoid(logits.logsumexp(-1) - sinks(QUERIES)[:, None])
    return share.transpose(1, 2).unsqueeze(-1) * (logits.softmax(-1) @ v)


@miss(Reason.WEIGHTS_ESCAPE, "logsumexp")
def scaled_by_another_function_of_the_sum(q, k, v, mask):
    k, v = repeat(k, v)
    logits = q @ k.mT
    return torch.tanh(logits.logsumexp(-1, keepdim=True) - 1) * (logits.softmax(-1) @ v)


@miss(Reason.WEIGHTS_ESCAPE, "used by")
def the_sum_is_returned(q, k, v, mask):
    k, v = repeat(k, v)
    logits = q @ k.mT
    sums = logits.logsumexp(-1, keepdim=True)
    return torch.sigmoid(sums - sinks()[:, None, None]) * (logits.softmax(-1) @ v), sums


@miss(Reason.ATTENTION_FORM, "joins two products")
def two_scores(q, k, v, mask):
    k, v = repeat(k, v)
    return (q[..., :4] @ k[..., :4].mT + q[..., 4:] @ k[..., 4:].mT).softmax(-1) @ v


@miss(Reason.ATTENTION_FORM, "capped")
def masked_before_the_cap(q, k, v, mask):
    k, v = repeat(k, v)
    return torch.tanh(q @ k.mT + additive(mask)).softmax(-1) @ v


@miss(Reason.ATTENTION_FORM, "not the only one")
def capped_twice(q, k, v, mask):
    k, v = repeat(k, v)
    return torch.tanh(torch.tanh(q @ k.mT)).softmax(-1) @ v


@miss(Reason.ATTENTION_FORM, "in place of logits")
def replaced_by_a_tensor(q, k, v, mask):
    k, v = repeat(k, v)
    return torch.where(mask, q @ k.mT, v[..., :1].mean()).softmax(-1) @ v


@miss(Reason.ATTENTION_FORM, "between the softmax and the values")
def weights_masked(q, k, v, mask):
    k, v = repeat(k, v)
    return ((q @ k.mT).softmax(-1) * mask) @ v


@miss(Reason.ATTENTION_FORM, "between the product and the softmax")
def transposed(q, k, v, mask):
    k, v = repeat(k, v)
    return (k @ q.mT).mT.softmax(-1) @ v


@miss(Reason.ATTENTION_FORM, "between the softmax and the values")
def weights_transposed(q, k, v, mask):
    k, v = repeat(k, v)
    return v.mT @ (q @ k.mT).softmax(-1).mT


@miss(Reason.ATTENTION_FORM, "not a product of weights and values")
def summed_over_the_queries(q, k, v, mask):
    (k,) = repeat(k)
    return torch.einsum("bhqk,bhqd->bhkd", (q @ k.mT).softmax(-1), q)


@miss(Reason.ATTENTION_FORM, "over more than the channels")
def heads_summed_away(q, k, v, mask):
    logits = torch.einsum("bhqd,bzkd->bhqk", q, k)
    return torch.einsum("bhqk,bzkd->bhqd", logits.softmax(-1), v)


@miss(Reason.ATTENTION_FORM, "sums over more than the keys")
def two_dims_summed(q, k, v, mask):
    k, v = repeat(k, v)
    return torch.einsum("bhqk,bhkd->bqd", (q @ k.mT).softmax(-1), v)


@miss(Reason.ATTENTION_FORM, "more elements")
def batches_only_in_the_mask(q, k, v, mask):
    k, v = repeat(k, v)
    return (q[:1] @ k[:1].mT + additive(mask)).softmax(-1) @ v


@miss(Reason.WEIGHTS_ESCAPE, "softmax")
def weights_returned(q, k, v, mask):
    k, v = repeat(k, v)
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


@miss(Reason.WEIGHTS_ESCAPE, "matmul")
def logits_returned(q, k, v, mask):
    k, v = repeat(k, v)
    logits = q @ k.mT
    return logits.softmax(-1) @ v, logits.amax(-1)


@miss(Reason.WEIGHTS_ESCAPE, "softmax")
def weights_used_twice(q, k, v, mask):
    k, v = repeat(k, v)
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights @ k


@miss(Reason.MASK_FORM, "does not hide")
def masked_by_a_small_number(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT).masked_fill(~mask, -100.0).softmax(-1) @ v


@miss(Reason.MASK_FORM, "does not hide")
def mask_turned_round(q, k, v, mask):
    k, v = repeat(k, v)
    return ((q @ k.mT).masked_fill(~mask, -1e9) * -1).softmax(-1) @ v


@miss(Reason.MASK_FORM, "meets another mask")
def masked_beside_a_bias(q, k, v, mask):
    k, v = repeat(k, v)
    return ((q @ k.mT).masked_fill(~mask, -1e9) + torch.arange(SLOTS) * 0.1).softmax(-1) @ v


@miss(Reason.MASK_FORM, "meets another mask")
def masked_by_two_numbers(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT).masked_fill(~mask, -1e9).masked_fill(mask.flip(-1), -1e4).softmax(-1) @ v


@miss(Reason.MASK_FORM, "int64")
def integers_added(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT + torch.arange(SLOTS)).softmax(-1) @ v


@miss(Reason.DROPOUT, "0.5")
def dropped(q, k, v, mask):
    k, v = repeat(k, v)
    return F.dropout((q @ k.mT).softmax(-1), 0.5) @ v


@miss(Reason.ATTENTION_RANK, "3 dims")
def without_heads(q, k, v, mask):
    return (q[:, 0] @ k[:, 0].mT).softmax(-1) @ v[:, 0]


@miss(Reason.ATTENTION_RANK, "1 dims")
def of_one_query(q, k, v, mask):
    weights = torch.einsum("d,kd->k", q[0, 0, 0], k[0, 0]).softmax(-1)
    return torch.einsum("k,kd->d", weights, v[0, 0])


@miss(Reason.ATTENTION_FORM, "-1e+06 is added")
def shifted_below_the_mask(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT - 1e6).masked_fill(~mask, -1e4).softmax(-1) @ v


@miss(Reason.ATTENTION_FORM, "scaled by inf")
def scaled_without_bound(q, k, v, mask):
    k, v = repeat(k, v)
    return (q @ k.mT * torch.inf).softmax(-1) @ v


@miss(Reason.LAYOUT, "in another way")
def heads_regrouped(q, k, v, mask):
    k, v = repeat(k, v)
    weights = (q @ k.mT).softmax(-1).view(ALL, BATCH, QUERIES, SLOTS)
    return weights @ v.reshape(ALL, BATCH, SLOTS, CHANNELS)


@miss(Reason.LAYOUT, "queries of shape")
def one_query_head(q, k, v, mask):
    k, v = repeat(k, v)
    return (q[:, :1] @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("name", MISSES)
def test_what_is_not_read_says_why(name):
    function, reason, detail = MISSES[name]
    _, (reject,) = captured(function, arguments())
    assert isinstance(reject, Reject), reject
    assert (reject.reason, detail in reject.detail) == (reason, True), reject
