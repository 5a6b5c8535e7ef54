"""One near miss for each reason: looks like a cached attention, is none that we rewrite, and says why."""

import pytest
import torch
import torch.nn.functional as F

from decoquant_compile.patterns.match import RebuiltSite, Site
from decoquant_compile.patterns.reject import Reason
from tests.graphs import BATCH, CHANNELS, GROUPS, HEADS, SLOTS, cached_arguments, new, queries, results_of

MISSES = {}


def miss(reason, make=cached_arguments, **how):
    """Register a function whose only attention must stay as it is for this reason.

    `rebuilt`: how many caches are stored packed all the same, and rebuilt for it.
    """

    def register(function):
        MISSES[f"{reason.name}-{function.__name__}"] = reason, function, make, how
        return function

    return register


def write(keys, values, positions, k, v):
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)


def attend(q, k, v, mask=None, **how):
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **how)


def test_the_common_part_is_a_site():
    def function(q, k, v, keys, values, positions, mask):
        write(keys, values, positions, k, v)
        return attend(q, keys, values, mask)

    (site,) = results_of(function, *cached_arguments())
    assert isinstance(site, Site)


@miss(Reason.NO_CACHE)
def computed(q, k, v, keys, values, positions, mask):
    return attend(q, k.exp(), v.sin())


@miss(Reason.READ_ONLY_CACHE)
def cross_attention(q, k, v, keys, values, positions, mask):
    return attend(q, keys, values, mask)


@miss(Reason.ONLY_ONE_CACHED)
def keys_only(q, k, v, keys, values, positions, mask):
    keys.index_copy_(2, positions, k)
    return attend(q, keys, v.expand(keys.shape).sin(), mask)


@miss(Reason.ONLY_ONE_CACHED)
def values_only(q, k, v, keys, values, positions, mask):
    values.index_copy_(2, positions, v)
    return attend(q, keys, values, mask)


@miss(Reason.CACHE_BORN_INSIDE)
def born(q, k, v, keys, values, positions, mask):
    keys, values = torch.ones(keys.shape), torch.full(values.shape, 0.5)
    write(keys, values, positions, k, v)
    return attend(q, keys, values, mask), keys, values


@miss(Reason.GROWING_CACHE)
def growing_between_others(q, k, v, keys, values, positions, mask):
    keys, values = torch.cat([k, keys, k], 2), torch.cat([v, values, v], 2)
    return attend(q, keys, values), keys, values


@miss(Reason.GROWING_CACHE)
def growing_from_a_part(q, k, v, keys, values, positions, mask):
    keys, values = torch.cat([keys[:, :, 2:], k], 2), torch.cat([values[:, :, 2:], v], 2)
    return attend(q, keys, values), keys, values


@miss(Reason.UNKNOWN_WRITE)
def growing_and_cropped_at_the_end(q, k, v, keys, values, positions, mask):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return attend(q, keys, values), keys[:, :, :-1], values[:, :, :-1]


@miss(Reason.CACHE_VALUE_ESCAPES, rebuilt=2)
def growing_and_used(q, k, v, keys, values, positions, mask):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return attend(q, keys, values), keys, values, keys.sum()


@miss(Reason.CACHE_VALUE_ESCAPES)
def growing_and_returned_twice(q, k, v, keys, values, positions, mask):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return attend(q, keys, values), keys, values, values.transpose(1, 2)


@miss(Reason.POSITIONS_DIFFER, rebuilt=2)
def growing_only_by_keys(q, k, v, keys, values, positions, mask):
    keys = torch.cat([keys, k], 2)
    write(values, values.clone(), positions, v, v)
    return attend(q, keys[:, :, : values.shape[2]], values), keys


@miss(Reason.CACHE_VALUE_ESCAPES, rebuilt=2)
def a_new_cache_beside_the_old_one(q, k, v, keys, values, positions, mask):
    after = keys.index_copy(2, positions, k), values.index_copy(2, positions, v)
    return attend(q, *after, mask), *after, keys + 1


@miss(Reason.READ_ONLY_CACHE, rebuilt=2)
def a_new_cache_and_attention_over_the_old_one(q, k, v, keys, values, positions, mask):
    after = keys.index_copy(2, positions, k), values.index_copy(2, positions, v)
    return attend(q, keys, values, mask), *after


@miss(Reason.UNKNOWN_WRITE)
def a_new_cache_from_some_slot_on(q, k, v, keys, values, positions, mask):
    at = (torch.arange(SLOTS) >= positions)[:, None]
    after = torch.where(at, k, keys), torch.where(at, v, values)
    return attend(q, *after, mask), *after


@miss(Reason.READ_BEFORE_WRITE, rebuilt=2)
def read_before_write(q, k, v, keys, values, positions, mask):
    out = attend(q, keys.clone(), values.clone(), mask)
    write(keys, values, positions, k, v)
    return out


@miss(Reason.UNKNOWN_WRITE)
def up_to_a_slot(q, k, v, keys, values, positions, mask):
    at = (torch.arange(SLOTS) <= positions)[:, None]
    keys.copy_(torch.where(at, k, keys))
    values.copy_(torch.where(at, v, values))
    return attend(q, keys, values, mask)


@miss(Reason.TWO_WRITES)
def twice(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    write(keys, values, positions + 1, v, k)
    return attend(q, keys, values, mask)


@miss(Reason.PARTIAL_BATCH, rebuilt=2)
def part_of_the_batch_written(q, k, v, keys, values, positions, mask):
    keys[:1, :, 3:4] = k[:1]
    values[:1, :, 3:4] = v[:1]
    return attend(q, keys, values, mask)


@miss(Reason.PARTIAL_BATCH, rebuilt=2)
def part_of_the_batch_read(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q[:1], keys[:1], values[:1], mask)


@miss(Reason.POSITIONS_DIFFER, rebuilt=2)
def different_positions(q, k, v, keys, values, positions, mask):
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions + 1, v)
    return attend(q, keys, values, mask)


@miss(Reason.POSITIONS_DIFFER, rebuilt=2)
def different_forms(q, k, v, keys, values, positions, mask):
    keys.index_copy_(2, positions, k)
    values[:, :, 3:4] = v
    return attend(q, keys, values, mask)


@miss(Reason.POSITIONS_DIFFER, rebuilt=2)
def different_reads(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys[:, :, 1:9], values[:, :, 2:10])


@miss(Reason.SAME_TENSOR, rebuilt=1)
def keys_are_values(q, k, v, keys, values, positions, mask):
    keys.index_copy_(2, positions, k)
    return attend(q, keys, keys, mask)


@miss(Reason.RAGGED, rebuilt=2)
def each_sequence_at_its_own_positions(q, k, v, keys, values, positions, mask):
    own = positions + torch.arange(BATCH)[:, None]
    keys[torch.arange(BATCH)[:, None], :, own] = k.transpose(1, 2)
    values[torch.arange(BATCH)[:, None], :, own] = v.transpose(1, 2)
    return attend(q, keys, values, mask)


@miss(Reason.UNKNOWN_WRITE)
def sequences_swapped(q, k, v, keys, values, positions, mask):
    own = positions + torch.arange(BATCH)[:, None]
    keys[torch.arange(BATCH).flip(0)[:, None], :, own] = k.transpose(1, 2)
    values[torch.arange(BATCH).flip(0)[:, None], :, own] = v.transpose(1, 2)
    return attend(q, keys, values, mask)


@miss(Reason.UNKNOWN_WRITE)
def each_head_at_its_own_positions(q, k, v, keys, values, positions, mask):
    own = (positions + torch.arange(HEADS)[:, None])[None, :, :, None].expand_as(k)
    keys.scatter_(2, own, k)
    values.scatter_(2, own, v)
    return attend(q, keys, values, mask)


@miss(Reason.SAME_TENSOR)
def tied(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, k)
    return attend(q, k, k)


@miss(Reason.SHARED_CACHE, number=2, rebuilt=2)
def keys_and_values_swapped_by_another(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys, values, mask) + attend(q + 1, values, keys, mask)


@miss(Reason.SHARED_CACHE, among=True, rebuilt=2)
def another_attention_stays(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    tiled = (x.repeat(1, GROUPS, 1, 1) for x in (keys, values))
    return attend(q, keys, values, mask) + F.scaled_dot_product_attention(q, *tiled, mask)


@miss(Reason.CACHE_VALUE_ESCAPES, number=2, rebuilt=2)
def shared_and_summed(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(attend(q, keys, values, mask) + values.sum(), keys, values, mask)


@miss(Reason.CACHE_VALUE_ESCAPES, rebuilt=2)
def summed_as_well(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys, values, mask), keys.sum()


@miss(Reason.CACHE_VALUE_ESCAPES)
def returned(q, k, v, keys, values, positions, mask):
    return attend(q, keys.index_copy_(2, positions, k), values.index_copy_(2, positions, v), mask), keys.clone()


@miss(Reason.CACHE_VALUE_ESCAPES, rebuilt=2)
def read_before(q, k, v, keys, values, positions, mask):
    norm = keys.norm()
    write(keys, values, positions, k, v)
    return attend(q, keys, values, mask), norm


@miss(Reason.CACHE_VALUE_ESCAPES, rebuilt=2)
def the_new_token_depends_on_the_cache(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k + keys.mean(2, keepdim=True), v)
    return attend(q, keys, values, mask)


@miss(Reason.CACHE_VALUE_ESCAPES, rebuilt=2)
def the_query_depends_on_the_cache(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q + keys.mean(), keys, values, mask)


@miss(Reason.CACHE_VALUE_ESCAPES)
def the_mask_depends_on_the_cache(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys, values, mask & (keys[:1, :1, None, :, 0] != 0).squeeze(0))


@miss(Reason.CACHE_VALUE_ESCAPES)
def zeros_are_counted(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys, values, mask), keys.sum(-1).count_nonzero()


@miss(Reason.CACHE_VALUE_ESCAPES)
def signs_are_taken(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q * values.mean(2, keepdim=True).sign()[:, :1], keys, values, mask)


@miss(Reason.CACHE_VALUE_ESCAPES, rebuilt=2)
def keys_of_high_scores_are_chosen(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    scores = keys.unflatten(2, (-1, 4)).amax(3).mean((0, 1, 3))
    chosen = torch.zeros(SLOTS // 4).scatter(0, scores.topk(2).indices, 1.0).repeat_interleave(4) > 0
    return attend(q, keys, values, mask & chosen)


@miss(Reason.COMPUTE_AFTER_CACHE, rebuilt=2)
def the_cache_itself_is_returned(q, k, v, keys, values, positions, mask):
    keys, values = keys.index_copy_(2, positions, k), values.index_copy_(2, positions, v)
    return attend(q, keys * torch.arange(CHANNELS), values * 0.5, mask), keys, values


@miss(Reason.LINEAR_AFTER_CACHE)
def slots_are_mixed(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    mixed = torch.ones(SLOTS, SLOTS)
    return attend(q, mixed @ keys, mixed @ values, mask)


@miss(Reason.COMPUTE_AFTER_CACHE, rebuilt=2)
def rotated_after_the_cache(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys * torch.arange(SLOTS)[:, None].cos(), values, mask)


@miss(Reason.COMPUTE_AFTER_CACHE)
def dequantised(q, k, v, keys, values, positions, mask):
    codes = (keys.to(torch.int8), values.to(torch.int8))
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)
    return attend(q, keys.round() * 0.1, values.round() * 0.1, mask), codes[0].sum() * 0


@miss(Reason.LINEAR_AFTER_CACHE, rebuilt=2)
def latent(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    w = torch.eye(CHANNELS)
    return attend(q, F.linear(keys, w), F.linear(values, w), mask)


@miss(Reason.UNKNOWN_MOVEMENT, rebuilt=2)
def split_channels(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    swap = lambda x: x.reshape(BATCH, HEADS, SLOTS, 2, CHANNELS // 2).transpose(3, 4).reshape(x.shape)
    return attend(q, swap(keys), swap(values), mask)


@miss(Reason.UNKNOWN_MOVEMENT, rebuilt=2)
def a_slice_of_the_appended(q, k, v, keys, values, positions, mask):
    full = [torch.cat([x[:, :, 1:], y], 2) for x, y in ((keys, k), (values, v))]
    keys.copy_(full[0])
    values.copy_(full[1])
    return attend(q, full[0][:, :, 2:], full[1][:, :, 2:])


@miss(Reason.HEAD_ORDER, rebuilt=2)
def tiled_heads(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return F.scaled_dot_product_attention(q, keys.repeat(1, GROUPS, 1, 1), values.repeat(1, GROUPS, 1, 1), mask)


@miss(Reason.LAYOUT)
def attention_over_heads(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    q = q[:, :1].expand(BATCH, SLOTS, 1, CHANNELS)
    return F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2))


@miss(Reason.LAYOUT, rebuilt=2)
def part_of_the_channels(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q[..., :4], keys[..., :4], values[..., :4], mask)


@miss(Reason.LAYOUT, rebuilt=2)
def part_of_the_heads(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q[:, :2], keys[:, :1], values[:, :1], mask)


def long_queries():
    _, *rest = cached_arguments()
    return queries(5), *rest


def three_dims():
    q, k, v, keys, values, positions, mask = cached_arguments()
    flat = (x.flatten(0, 1) for x in (k, v, keys, values))
    return q, *flat, positions, mask


@miss(Reason.LAYOUT, three_dims, rebuilt=2)
def heads_folded_into_the_batch(q, k, v, keys, values, positions, mask):
    keys.index_copy_(1, positions, k)
    values.index_copy_(1, positions, v)
    keys, values = (x.unsqueeze(0) for x in (keys, values))
    return F.scaled_dot_product_attention(q[:1], keys, values, mask)


def double_precision():
    return tuple(x.double() if x.is_floating_point() else x for x in cached_arguments())


@miss(Reason.DTYPE, double_precision)
def double(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys, values, mask)


@miss(Reason.DTYPE, rebuilt=2)
def rounded_before_the_attention(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q.bfloat16(), keys.bfloat16(), values.bfloat16(), mask)


@miss(Reason.DTYPE, rebuilt=2)
def rounded_on_the_way(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys.half().float(), values.half().float(), mask)


@miss(Reason.UNDECIDED_SIZE, dynamic=True)
def symbolic_channels(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys, values, mask)


def repeated(*caches):
    return (x.repeat_interleave(GROUPS, 1) for x in caches)


@miss(Reason.ATTENTION_FORM, rebuilt=2)
def sink_of_the_query(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    keys, values = repeated(keys, values)
    logits = torch.cat([(q @ keys.mT).masked_fill(~mask, -1e9), q[..., :1]], -1)
    return logits.softmax(-1)[..., :-1] @ values


@miss(Reason.ATTENTION_FORM)
def wrong_softmax(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    keys, values = repeated(keys, values)
    return (q @ keys.mT).softmax(-2) @ values


@miss(Reason.ATTENTION_FORM, rebuilt=2)
def scaled_for_each_key(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    keys, values = repeated(keys, values)
    return (q @ keys.mT * mask).softmax(-1) @ values


@miss(Reason.ATTENTION_FORM, rebuilt=2)
def squared(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    keys, values = repeated(keys, values)
    return (q @ keys.mT).square().softmax(-1) @ values


@miss(Reason.WEIGHTS_ESCAPE, rebuilt=2)
def weights_returned(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    keys, values = repeated(keys, values)
    weights = (q @ keys.mT).softmax(-1)
    return weights @ values, weights


@miss(Reason.CACHE_VALUE_ESCAPES)
def the_mask_depends_on_the_logits(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    keys, values = repeated(keys, values)
    return torch.where(q @ keys.mT > 0, q @ keys.mT, -1e9).softmax(-1) @ values


@miss(Reason.CACHE_VALUE_ESCAPES, rebuilt=2)
def the_scale_depends_on_the_cache(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    scale = keys.norm()
    keys, values = repeated(keys, values)
    return (q @ keys.mT / scale).softmax(-1) @ values


@miss(Reason.NO_CACHE, among=True)
def queries_and_keys_swapped(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    q, others = repeated(keys, v.sin())
    return (q @ others.mT).softmax(-1) @ others


@miss(Reason.COMPUTE_AFTER_CACHE, rebuilt=2)
def values_scaled(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    keys, values = repeated(keys, values * 0.5)
    return (q @ keys.mT).softmax(-1) @ values


@miss(Reason.COMPUTE_AFTER_CACHE, rebuilt=2)
def keys_scaled_each_by_its_own_number(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys * torch.arange(CHANNELS), values, mask)


@miss(Reason.HEAD_ORDER, rebuilt=2)
def tiled_heads_spelled_out(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return (q @ keys.repeat(1, GROUPS, 1, 1).mT).softmax(-1) @ values.repeat(1, GROUPS, 1, 1)


@miss(Reason.ATTENTION_RANK, rebuilt=2)
def no_heads(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return F.scaled_dot_product_attention(q[:, 0], keys[:, 0], values[:, 0])


@miss(Reason.DROPOUT, rebuilt=2)
def dropout(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys, values, mask, dropout_p=0.5)


@miss(Reason.MASK_FORM, rebuilt=2)
def one_column(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, keys, values, mask[..., :1])


@miss(Reason.WRITE_NOT_READ, number=2, among=True)
def written_and_left(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    return attend(q, k.sin(), v.sin())


@pytest.mark.parametrize("name", MISSES)
def test_the_reason_is_exactly(name):
    reason, function, make, how = MISSES[name]
    results = results_of(function, *make(), dynamic=how.get("dynamic"))
    rebuilt = {c.write.buffer for r in results if isinstance(r, RebuiltSite) for c in r.caches}
    attentions = [r.reject if isinstance(r, RebuiltSite) else r for r in results]
    reasons = [getattr(r, "reason", "a site") for r in attentions]
    if how.get("among"):
        reasons = [r for r in reasons if r is reason]
    assert reasons == [reason] * how.get("number", 1)
    assert all(r.detail or r.reason is Reason.WRITE_NOT_READ for r in attentions)
    assert len(rebuilt) == how.get("rebuilt", 0)


def test_every_reason_has_a_near_miss():
    # The matcher sees the parts of a tensor only; whether all can be packed is found out later (test_stacks.py).
    assert {reason for reason, *_ in MISSES.values()} == set(Reason) - {Reason.SHARED_TENSOR}


def test_every_reason_has_a_text():
    assert all(len(r.value) > 20 for r in Reason)
    assert len({r.value for r in Reason}) == len(Reason)


def test_a_state_space_cache_beside_an_attention_is_left_alone():
    def function(q, k, v, keys, values, positions, mask, state, x):
        state.copy_(torch.cat([state, x], -1)[..., -4:])
        write(keys, values, positions, k, v)
        return attend(q, keys, values, mask) + state.sum()

    (site,) = results_of(function, *cached_arguments(), torch.zeros(BATCH, 3, 4), torch.ones(BATCH, 3, 1))
    assert isinstance(site, Site)


def test_a_rejected_neighbour_does_not_spoil_a_site():
    def function(q, k, v, keys, values, positions, mask, others):
        write(keys, values, positions, k, v)
        return attend(attend(q, keys, values, mask), others, others)

    site, reject = results_of(function, *cached_arguments(), new(5))
    assert isinstance(site, Site)
    assert reject.reason is Reason.READ_ONLY_CACHE


def keys_in_turns(q, k, v, keys, values, positions, mask):
    values.index_copy_(2, positions, v)
    keys.index_copy_(2, positions, k)
    first = attend(q, keys, values, mask)
    keys.index_copy_(2, positions + 1, v)
    return first + attend(q, keys, values, mask)


def in_turns_read_in_the_other_order(q, k, v, keys, values, positions, mask):
    before = keys.index_copy(2, positions, k), values.index_copy(2, positions, v)
    after = before[0].index_copy(2, positions + 1, k), before[1].index_copy(2, positions + 1, v)
    out = attend(q, *after, mask)
    out = out + attend(q, *before, mask)
    keys.copy_(after[0])
    values.copy_(after[1])
    return out


def in_turns_and_used_between(q, k, v, keys, values, positions, mask):
    write(keys, values, positions, k, v)
    first = attend(q, keys, values, mask)
    k = k * keys.sum()
    write(keys, values, positions + 1, k, v)
    return first + attend(q, keys, values, mask)


def growing_in_turns_and_used_between(q, k, v, keys, values, positions, mask):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    first = attend(q, keys, values)
    keys, values = torch.cat([keys, k * keys.mean()], 2), torch.cat([values, v], 2)
    return first + attend(q, keys, values), keys, values


def growing_in_turns_read_once(q, k, v, keys, values, positions, mask):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    first = attend(q, k, v)
    keys, values = torch.cat([keys, v], 2), torch.cat([values, k], 2)
    return first + attend(q, keys, values), keys, values


@pytest.mark.parametrize(
    ("function", "reasons"),
    [
        (growing_in_turns_and_used_between, {Reason.CACHE_VALUE_ESCAPES}),
        (growing_in_turns_read_once, {Reason.SAME_TENSOR, Reason.TWO_WRITES}),
        (keys_in_turns, {Reason.POSITIONS_DIFFER, Reason.SHARED_CACHE}),
        (in_turns_read_in_the_other_order, {Reason.READ_BEFORE_WRITE}),
        (in_turns_and_used_between, {Reason.CACHE_VALUE_ESCAPES}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_writes_in_turn_are_served_all_or_none(function, reasons):
    results = results_of(function, *cached_arguments())
    assert len(results) == 2
    assert {result.reason for result in results} == reasons
