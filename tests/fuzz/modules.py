"""Random attention over random caches: a `Case` says what, `Module` does it, `cases` draws one.

A case is a plain form (layout, write, read, grouping, attention) and up to two twists, each a small change of the kind
that a matcher overlooks: other places for the values, a part of the heads, an escaping cache, a wrong softmax.
"""

import math
import random
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

LAYOUTS = {  # which of (batch, heads, slots, channels) each dim of the cache tensors is
    "BHSD": (0, 1, 2, 3),
    "BSHD": (0, 2, 1, 3),
    "SBHD": (2, 0, 1, 3),
    "HBSD": (1, 0, 2, 3),
    "BHDS": (0, 1, 3, 2),
}
WRITES = (
    "index_copy",
    "index_put",
    "slice",
    "narrow",
    "scatter",
    "where",
    "roll",
    "shift",
    "cat",
    "append",
    "grow",
    "begin",
    "functional",
)
GROUPINGS = ("repeat_interleave", "expand", "enable_gqa", "view")
PRODUCTS = ("matmul", "einsum", "bmm", "baddbmm")
SCALES = ("query", "key", "after", "divided", "both", "late", "none")
MASKINGS = ("add", "where", "masked_fill", "finfo", "none")


@dataclass(frozen=True)
class Case:
    """One module and one way to call it.

    Attributes:
        batch, heads, groups, slots, channels: sizes; there are `heads * groups` query heads.
        layout: of both caches, of `LAYOUTS`.
        write: how new tokens get into the caches; with "begin" there are none before the first call.
        read: "whole" or "prefix", what is read of them.
        grouping: how key-value heads meet query heads.
        form: "sdpa", or one of `PRODUCTS`.
        scale: where the logits are scaled; "late": by a tensor, after they are masked.
        masking: how the mask is applied; boolean or additive by `additive`.
        mask_shape: which dims of the mask are more than 1, of "bhq".
        softcap, float32: of the softmax that is spelled out.
        twists: changes, of `TWISTS`.
        chunks: tokens of each call.
        filled: the caches hold something before the first call: "zeros", "some" slots, "all".
        dynamic: as `torch.compile` takes it.
        seed: of all random values.
    """

    batch: int = 1
    heads: int = 1
    groups: int = 1
    slots: int = 8
    channels: int = 4
    layout: str = "BHSD"
    write: str = "index_copy"
    read: str = "whole"
    grouping: str = "repeat_interleave"
    form: str = "sdpa"
    scale: str = "after"
    masking: str = "where"
    additive: bool = False
    mask_shape: str = "q"
    softcap: bool = False
    float32: bool = False
    twists: tuple[str, ...] = ()
    chunks: tuple[int, ...] = (2, 1)
    filled: str = "zeros"
    dynamic: bool | None = None
    seed: int = 0


TWISTS = (
    # tokens
    "new scaled", "new from one head", "new strided", "new swapped", "values are keys", "new rounded",
    # places
    "values elsewhere", "values flipped", "negative places", "wrapped places", "far places", "constant places",
    # targets
    "half the batch", "half the heads", "half the channels", "one tensor", "shared memory", "keys only",
    "one pair", "flat heads",
    # several writes
    "in turns", "written twice", "written again elsewhere", "a slot cleared", "scaled in place", "cleared first",
    "counter",
    # reads
    "reordered", "reordered after", "reordered in place", "rolled back",
    "read before", "offset", "strided", "flipped", "gathered", "rolled", "one rolled", "rounded", "times one",
    "plus one", "projected", "by slot", "centred", "normed", "crossed", "same twice", "tiled", "fewer heads",
    "channels reversed", "extra views", "heads reversed", "cropped",
    # attention
    "wrong dim", "sigmoid", "masked after", "renormalised", "weights returned", "logits returned", "last dropped",
    "mask from keys", "chosen", "query from values", "temperature", "sink", "softmax twice", "causal", "positive bias",
    "tanh only", "by hand", "by logarithms",
    # escapes
    "returns keys", "returns sum", "zeros counted", "returns view", "second attention", "residual", "reads slot",
    "returns old", "shape only",
)  # fmt: skip

NEVER = {
    *(
        "half the batch",
        "rounded",
        "tiled",
        "wrong dim",
        "sigmoid",
        "masked after",
        "weights returned",
        "logits returned",
    ),
    *("last dropped", "softmax twice", "returns old", "zeros counted"),
}
"""Twists after which the attention must not be rewritten, whatever the form, where they have an effect."""


class Module(torch.nn.Module):
    """What a case says, on caches that are arguments."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.order = LAYOUTS[case.layout]
        self.slot = self.order.index(2)
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))
        self.register_buffer("projection", torch.eye(case.channels).flip(0) * 1.25)
        self.register_buffer("temperature", torch.tensor(1.75))

    def stored(self, x):
        return x.permute(self.order)

    def canonical(self, x):
        if x.dim() == 3:
            x = x.unflatten(2, (self.case.heads, self.case.channels))
        return x.permute([self.order.index(d) for d in range(4)])

    def forward(self, q, k, v, mask, positions, start, keys, values):
        """Attention [batch, query heads, queries, channels], what else escapes, and the caches that follow."""
        tokens = q.shape[2]
        if "in turns" not in self.case.twists or tokens == 1 or self.case.write in ("grow", "begin", "functional"):
            return self.turn(q, k, v, mask, positions, start, keys, values)
        outs, extra = [], []
        for first, size in ((0, 1), (1, tokens - 1)):
            of_turn = (x.narrow(2, first, size) if x.shape[2] > 1 else x for x in (q, k, v, mask))
            places = positions.narrow(0, first, size)
            out, more, *_ = self.turn(*of_turn, places, start + first, keys, values)
            outs.append(out)
            extra += more
        return torch.cat(outs, 2), extra, None, None

    def turn(self, q, k, v, mask, positions, start, keys, values):  # noqa: PLR0915 - one line for each twist
        """The same, once."""
        case, twists = self.case, self.case.twists
        extra = []
        paired = "one pair" in twists and case.write == "begin"
        if case.write == "begin":
            k, v = k @ self.projection, v @ self.projection
        if keys is not None and keys.dim() == 5:
            paired = True
            keys, values = keys.unbind(0)
        if "new scaled" in twists:
            k, v = k * 1.5, v.exp()
        if "new from one head" in twists:
            k, v = k[:, :1].expand(k.shape), v[:, :1].expand(v.shape)
        if "new strided" in twists:
            k, v = k.transpose(2, 3).contiguous().transpose(2, 3), v.flip(2)
        if "new swapped" in twists:
            k, v = v, k
        if "values are keys" in twists:
            v = k
        if "new rounded" in twists:
            k = k.to(torch.bfloat16)
        if "returns old" in twists and keys is not None:
            extra.append(keys[..., :1].clone())
        old = keys, values
        if "read before" in twists and keys is not None:
            old = keys.clone(), values.clone()
        if "cleared first" in twists and keys is not None:
            keys.zero_()
        if "counter" in twists:
            self.counter.add_(k.shape[2])
            extra.append(self.counter + 1)
        places = value_places = positions
        if "wrapped places" in twists:
            places = value_places = (positions + 3) % case.slots
        if "far places" in twists:
            places = value_places = case.slots - 1 - positions
        if "negative places" in twists and case.write in ("index_put", "slice"):
            places = value_places = positions - case.slots
        if "constant places" in twists:
            places = value_places = torch.arange(k.shape[2])
        if "values elsewhere" in twists:
            value_places = (positions + 1) % case.slots
        if "values flipped" in twists:
            value_places = positions.flip(0)
        value_start = min(start + 1, case.slots - k.shape[2]) if "values elsewhere" in twists else start
        seen_keys, keys = self.put(keys, k, places, start)
        if "keys only" in twists and values is not None:
            seen_values = values
        else:
            seen_values, values = self.put(values, v, value_places, value_start)
        if "written twice" in twists:
            seen_keys, keys = self.put(keys, k * 2, places, start)
        if "written again elsewhere" in twists:
            keys.select(self.slot, 0).copy_(self.stored(k[:, :, :1]).select(self.slot, 0))
        if "a slot cleared" in twists:
            values.select(self.slot, 1).zero_()
        if "scaled in place" in twists:
            keys.mul_(1.25)
        if "read before" in twists and old[0] is not None:
            seen_keys, seen_values = old
        out = self.attend(q, self.canonical(seen_keys), self.canonical(seen_values), mask, start + k.shape[2], extra)
        if "returns keys" in twists:
            extra.append(keys)
        if "returns sum" in twists:
            extra.append(keys.sum() + values.sum())
        if "zeros counted" in twists:
            extra.append((keys == 0).sum())
        if "returns view" in twists:
            extra.append(values.select(self.slot, 0))
        if "reads slot" in twists:
            out = out + self.canonical(seen_values)[:, :1, 1:2]
        if "shape only" in twists:
            out = out * keys.shape[self.slot]
        if case.write not in ("grow", "begin", "functional"):
            return out, extra, None, None
        return out, extra, *((torch.stack([keys, values]), values[:0]) if paired else (keys, values))

    def put(self, cache, new, places, start):  # noqa: PLR0915
        """(what the attention sees, what the cache is afterwards)."""
        case, dim, tokens = self.case, self.slot, new.shape[2]
        twists = case.twists
        if cache is None:
            new = self.stored(new).contiguous()
            return new, new
        target = cache
        if "half the batch" in twists:
            batch = self.order.index(0)
            size = (case.batch + 1) // 2
            target, new = target.narrow(batch, 0, size), new[:size]
        if "half the heads" in twists:
            heads = self.order.index(1)
            size = (case.heads + 1) // 2
            target, new = target.narrow(heads, 0, size), new[:, :size]
        if "half the channels" in twists:
            channels = self.order.index(3)
            size = case.channels // 2
            target, new = target.narrow(channels, size, size), new[..., :size]
        new = self.stored(new)
        if target.dim() == 3:
            new = new.flatten(2)
        write = case.write
        if "reordered in place" in twists and target.dim() == 4 and write not in ("grow", "begin", "functional"):
            batch = self.order.index(0)
            target.copy_(target.index_select(batch, torch.arange(target.shape[batch]).flip(0)))
        if write == "index_copy":
            target.index_copy_(dim, places, new.to(target.dtype))
        elif write == "index_put":
            target[(*[slice(None)] * dim, places)] = new.to(target.dtype)
        elif write == "slice":
            if "negative places" in twists:
                start = start - case.slots
                end = start + tokens if start + tokens < 0 else None
                target[(*[slice(None)] * dim, slice(start, end))] = new.to(target.dtype)
            else:
                target[(*[slice(None)] * dim, slice(start, start + tokens))] = new.to(target.dtype)
        elif write == "narrow":
            target.narrow(dim, start, tokens).copy_(new)
        elif write == "scatter":
            shape = [1] * target.dim()
            shape[dim] = tokens
            target.scatter_(dim, places.view(shape).expand(new.shape), new.to(target.dtype))
        elif write == "where":
            shape = [1] * target.dim()
            shape[dim] = target.shape[dim]
            if tokens == 1:
                at = (torch.arange(target.shape[dim]) == places).view(shape)
                target.copy_(torch.where(at, new.to(target.dtype), target))
            else:
                target.narrow(dim, start, tokens).copy_(new)
        elif write == "roll":
            rolled = target.roll(-tokens, dim)
            last = torch.arange(-tokens, 0) if tokens > 1 else torch.tensor([-1])
            rolled[(*[slice(None)] * dim, last)] = new.to(target.dtype)
            target.copy_(rolled)
        elif write == "shift":
            left = target.shape[dim] - tokens
            target.narrow(dim, 0, left).copy_(target.narrow(dim, tokens, left).clone())
            target.narrow(dim, left, tokens).copy_(new)
        elif write == "cat":
            target.copy_(torch.cat([target.narrow(dim, tokens, target.shape[dim] - tokens), new.to(target.dtype)], dim))
        elif write == "append":
            whole = torch.cat([target, new.to(target.dtype)], dim)
            target.copy_(whole.narrow(dim, tokens, target.shape[dim]))
            return (whole, cache) if target is cache else (cache, cache)
        elif write in ("grow", "begin"):
            batch, others = self.order.index(0), torch.arange(case.batch).flip(0)
            if "reordered" in twists:
                target = target.index_select(batch, others)
            if "rolled back" in twists:
                target = target.narrow(dim, 0, max(0, target.shape[dim] - 1))
            whole = torch.cat([target, new.to(target.dtype)], dim)
            if "reordered after" in twists:
                return whole, whole.index_select(batch, others)
            if "cropped" in twists and whole.shape[dim] > case.slots:
                whole = whole[(*[slice(None)] * dim, slice(-case.slots, None))]
            return whole, whole
        elif write == "functional":
            whole = target.index_copy(dim, places, new.to(target.dtype))
            return whole, whole
        return cache, cache

    def attend(self, q, keys, values, mask, end, extra):
        """The attention over canonical keys and values."""
        case, twists = self.case, self.case.twists
        if case.read == "prefix" and case.write not in ("append", "grow", "begin"):
            keys, values = keys[:, :, :end], values[:, :, :end]
        if "crossed" in twists:
            keys, values = values, keys
        if "same twice" in twists:
            values = keys
        if "offset" in twists:
            keys, values = keys[:, :, 1:], values[:, :, 1:]
        if "strided" in twists:
            keys, values = keys[:, :, ::2], values[:, :, ::2]
        if "flipped" in twists:
            keys, values = keys.flip(2), values.flip(2)
        if "gathered" in twists:
            index = torch.arange(keys.shape[2] - 1, -1, -1)
            keys, values = keys.index_select(2, index), values[:, :, index]
        if "rolled" in twists:
            keys, values = keys.roll(1, 2), values.roll(1, 2)
        if "one rolled" in twists:
            keys = keys.roll(1, 2)
        keys, values = self.compute(keys, values)
        if "fewer heads" in twists:
            keys, values = keys[:, :1].expand(keys.shape), values[:, :1].expand(values.shape)
        if "channels reversed" in twists:
            keys = keys.flip(3)
        if "heads reversed" in twists:
            values = values.flip(1)
        if "extra views" in twists:
            keys = keys.unsqueeze(0).squeeze(0).transpose(1, 2).contiguous().transpose(1, 2)
            values = values.reshape(values.shape[0], values.shape[1], -1).unflatten(2, (-1, case.channels))
        if "mask from keys" in twists:
            mask = mask[..., : keys.shape[2]] & (keys.sum((1, 3), keepdim=True).transpose(2, 3) > -1e9)
        mask = mask[..., : keys.shape[2]]
        if "chosen" in twists:
            liked = keys.amax((1, 3)).mean(0).topk(max(1, keys.shape[2] // 2)).indices
            mask = mask & (torch.zeros(keys.shape[2]).scatter(0, liked, 1.0) > 0)
        if "query from values" in twists:
            q = q + values.mean((2, 3), keepdim=True).repeat_interleave(case.groups, 1)
        if "causal" in twists:
            mask = mask & (torch.arange(keys.shape[2]) <= torch.arange(q.shape[2])[:, None] + end)
        out = self.product(q, keys, values, mask, extra)
        if "second attention" in twists:
            out = out + self.product(q * 0.5, keys, values, mask, extra)
        if "residual" in twists:
            out = out + values[:, :1, :1]
        return out

    def compute(self, keys, values):
        """What is computed of keys and values between cache and attention."""
        twists = self.case.twists
        if "rounded" in twists:
            keys = keys.to(torch.bfloat16).to(keys.dtype)
        if "times one" in twists:
            values = values * 1.0
        if "plus one" in twists:
            keys = keys + 1
        if "projected" in twists:
            weights = torch.arange(4.0 * self.case.channels**2).sin().view(2 * self.case.channels, -1)
            keys, values = (torch.cat([keys, values], -1) @ weights).chunk(2, -1)
        if "by slot" in twists:
            values = values * torch.arange(values.shape[2])[:, None].cos()
        if "normed" in twists:
            keys = F.normalize(keys, dim=-1) * 3
        if "centred" in twists:
            keys = keys - keys.mean(2, keepdim=True)
        return keys, values

    def product(self, q, keys, values, mask, extra):
        case, twists = self.case, self.case.twists
        groups, sdpa = case.groups, case.form == "sdpa"
        grouping = case.grouping
        if grouping == "enable_gqa" and not sdpa:
            grouping = "expand"
        if grouping == "view" and (sdpa or case.form in ("bmm", "baddbmm")):
            grouping = "expand"
        if "tiled" in twists:
            keys, values = keys.repeat(1, groups, 1, 1), values.repeat(1, groups, 1, 1)
        elif grouping == "repeat_interleave":
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        elif grouping == "expand":
            b, h, s, d = keys.shape
            keys = keys[:, :, None].expand(b, h, groups, s, d).reshape(b, h * groups, s, d)
            values = values[:, :, None].expand(b, h, groups, s, d).reshape(b, h * groups, s, d)
        if sdpa:
            return self.sdpa(q, keys, values, mask, enable_gqa=grouping == "enable_gqa" and "tiled" not in twists)
        if grouping == "view" and "tiled" not in twists:
            out = self.eager(q.unflatten(1, (case.heads, groups)), keys[:, :, None], values[:, :, None], mask, extra)
            return out.flatten(1, 2)
        return self.eager(q, keys, values, mask, extra)

    def bias(self, mask, dtype):
        """The mask as a number that is added."""
        twists = self.case.twists
        least = torch.finfo(dtype).min if self.case.masking == "finfo" else -math.inf
        bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, least)
        if "positive bias" in twists:
            bias = bias + torch.linspace(-1, 1, mask.shape[-1])
        return bias

    def sdpa(self, q, keys, values, mask, *, enable_gqa):
        case, twists = self.case, self.case.twists
        how = {"enable_gqa": enable_gqa}
        if case.scale != "none":
            how["scale"] = {"query": 1.0, "key": 0.3, "both": 2, "divided": 0.5}.get(case.scale)
        if "sigmoid" in twists or case.masking == "none":
            return F.scaled_dot_product_attention(q, keys, values, is_causal=case.additive, **how)
        mask = self.bias(mask, q.dtype) if case.additive else mask
        if "wrong dim" in twists:
            keys, values = keys.transpose(1, 2).transpose(1, 2), values.flip(2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, **how)

    def eager(self, q, keys, values, mask, extra):  # noqa: PLR0915
        case, twists = self.case, self.case.twists
        s = case.channels**-0.5
        if case.scale in ("query", "both"):
            q = q * (s if case.scale == "query" else s**0.5)
        if case.scale in ("key", "both"):
            keys = keys * (s if case.scale == "key" else s**0.5)
        if q.dim() == 5 and mask.dim() == 4:
            mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (case.heads, case.groups))
        kt = keys.transpose(-1, -2)
        if case.form == "einsum":
            axes = "bhgtd,bhgsd->bhgts" if q.dim() == 5 else "bhtd,bhsd->bhts"
            scores = torch.einsum(axes, q, keys.expand(*q.shape[:-2], *keys.shape[-2:]) if q.dim() == 5 else keys)
        elif case.form in ("bmm", "baddbmm") and q.dim() == 4:
            flat, other = q.flatten(0, 1), kt.flatten(0, 1)
            if case.form == "bmm":
                scores = torch.bmm(flat, other).unflatten(0, q.shape[:2])
            else:
                base = torch.zeros(flat.shape[0], flat.shape[1], other.shape[2])
                scores = torch.baddbmm(base, flat, other, beta=1.0, alpha=0.5).unflatten(0, q.shape[:2])
        else:
            scores = q @ kt
        if case.scale == "after":
            scores = scores * s
        if case.scale == "divided":
            scores = scores / math.sqrt(case.channels)
        if "tanh only" in twists:
            scores = scores.tanh()
        if case.softcap:
            scores = (scores / 2.0).tanh() * 2.0
        if case.masking in ("add", "finfo"):
            scores = scores + self.bias(mask, scores.dtype)
        elif case.masking == "where":
            scores = torch.where(mask, scores, -math.inf)
        elif case.masking == "masked_fill":
            scores = scores.masked_fill(~mask, -math.inf)
        if case.scale == "late":
            scores = scores / self.temperature
        if "temperature" in twists:
            scores = scores * 0.7
        if "logits returned" in twists:
            extra.append(scores)
        dim = -2 if "wrong dim" in twists else -1
        if "sink" in twists:
            scores = torch.cat([scores, torch.ones(*scores.shape[:-1], 1)], -1)
        if "sigmoid" in twists:
            weights = scores.sigmoid()
        elif "by hand" in twists:
            weights = (scores - scores.amax(dim, keepdim=True)).exp()
            weights = weights / weights.sum(dim, keepdim=True)
        elif "by logarithms" in twists:
            weights = (scores - scores.logsumexp(dim, keepdim=True)).exp()
        else:
            weights = scores.softmax(dim, dtype=torch.float32 if case.float32 else None).to(q.dtype)
        if "sink" in twists:
            weights = weights[..., :-1]
        if "softmax twice" in twists:
            weights = weights.softmax(-1)
        if "masked after" in twists:
            weights = weights * mask
        if "renormalised" in twists:
            weights = weights / weights.sum(-1, keepdim=True)
        if "last dropped" in twists:
            weights = weights * (torch.arange(weights.shape[-1]) < weights.shape[-1] - 1)
        if "weights returned" in twists:
            extra.append(weights)
        if case.form == "einsum":
            axes = "bhgts,bhgsd->bhgtd" if q.dim() == 5 else "bhts,bhsd->bhtd"
            if q.dim() == 5:
                values = values.expand(*q.shape[:-2], *values.shape[-2:])
            return torch.einsum(axes, weights, values)
        if case.form in ("bmm", "baddbmm") and q.dim() == 4:
            return torch.bmm(weights.flatten(0, 1), values.flatten(0, 1)).unflatten(0, q.shape[:2])
        return weights @ values


def random_case(choose):
    """A case, by `choose(values)` for each of its parts."""
    slots = choose(range(6, 17))
    write, form = choose((*WRITES, *WRITES[:4], *WRITES[6:10], "begin")), choose(("sdpa", "sdpa", *PRODUCTS))
    room = 2 * slots if write in ("roll", "shift", "cat", "append", "grow", "begin") else slots
    chunks = []
    for _ in range(choose((1, 2, 2, 3, 4))):
        if size := min(choose((1, 1, 1, 2, 3, 5)), room - sum(chunks), slots - 1):
            chunks.append(size)
    return Case(
        batch=choose((1, 2, 3)),
        heads=choose((1, 2, 3)),
        groups=choose((1, 1, 2, 3)),
        slots=slots,
        channels=choose((4, 8, 6, 16)),
        layout=choose(("BHSD", "BHSD", *LAYOUTS)),
        write=write,
        read=choose(("whole", "whole", "prefix")),
        grouping=choose(GROUPINGS),
        form=form,
        scale=choose(SCALES),
        masking=choose(MASKINGS),
        additive=choose((False, True)),
        mask_shape=choose(("q", "bq", "bhq", "b", "hq")),
        softcap=form != "sdpa" and choose((False, False, True)),
        float32=choose((False, True)),
        twists=tuple(dict.fromkeys(choose(TWISTS) for _ in range(choose((0, 0, 1, 1, 2))))),
        chunks=tuple(chunks),
        filled=choose(("zeros", "zeros", "some", "all")),
        dynamic=choose((None, None, False, False, True)),
        seed=choose(range(2**16)),
    )


@st.composite
def cases(draw):
    """The same as a strategy of hypothesis, which shrinks; its choices are far from uniform."""
    return random_case(lambda values: draw(st.sampled_from(values)))


def seeded_case(seed):
    """The same, uniformly at random."""
    return random_case(random.Random(seed).choice)


def caches(case):
    """The two cache tensors before the first call, or None."""
    if case.write == "begin":
        return None, None
    generator = torch.Generator().manual_seed(case.seed)
    order = LAYOUTS[case.layout]
    slots = 0 if case.write == "grow" else case.slots
    shape = (case.batch, case.heads, slots, case.channels)
    pair = torch.zeros(2, *shape)
    if case.filled != "zeros":
        content = torch.randn(2, *shape, generator=generator)
        written = torch.rand(slots, generator=generator) < (0.5 if case.filled == "some" else 2)
        pair = content * written[:, None]
    if "shared memory" in case.twists:
        stacked = pair.permute(0, *(1 + d for d in order)).contiguous()
        return stacked[0], stacked[1]
    if "one tensor" in case.twists:
        both = torch.cat([pair[0], pair[1]], 3).permute(order).contiguous()
        keys, values = both.chunk(2, order.index(3))
        return keys, values
    keys, values = (side.permute(order).clone(memory_format=torch.contiguous_format) for side in pair)
    if "one pair" in case.twists and case.write != "functional":
        return torch.stack([keys, values]), torch.zeros(0)
    if "flat heads" in case.twists and case.layout == "BSHD":
        return keys.flatten(2), values.flatten(2)
    return keys, values


def arguments(case):
    """(q, k, v, mask, positions, start) of each call."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    rand = lambda *shape: torch.randn(shape, generator=generator)
    start = 0
    for tokens in case.chunks:
        at = start if case.write in ("grow", "begin") else min(start, case.slots - tokens)
        b, h, q = ((n if letter in case.mask_shape else 1) for n, letter in
                   ((case.batch, "b"), (case.heads * case.groups, "h"), (tokens, "q")))  # fmt: skip
        columns = sum(case.chunks) + case.slots
        mask = torch.rand(b, h, q, columns, generator=generator) < 0.6
        mask[..., int(torch.randint(0, at + tokens, (), generator=generator))] = True
        yield (
            rand(case.batch, case.heads * case.groups, tokens, case.channels),
            rand(case.batch, case.heads, tokens, case.channels),
            rand(case.batch, case.heads, tokens, case.channels),
            mask,
            torch.arange(at, at + tokens),
            at,
        )
        start += tokens
