"""Write forms: what a graph puts where in a cache tensor. Each is checked against what the write does."""

import pytest
import torch
import torch.nn.functional as F

from decoquant_compile.patterns.cache import CacheWrite, parse, parse_turns
from decoquant_compile.patterns.reject import Problem, Reason
from tests.graphs import BATCH, CHANNELS, HEADS, SLOTS, cache, capture, new


def written(write, *args, dynamic=None):
    """Parse the write that `write(cache, ...)` does to its first argument."""

    def function(*args):
        write(*args)
        return args[0].sum()

    recorder, _ = capture(function, *args, dynamic=dynamic)
    ((value, buffer),) = recorder.graphs[0].mutations
    return parse(buffer, value)


def symbol(value):
    return value if isinstance(value, int) else value.meta["val"]


def test_index_copy():
    write = written(lambda c, p, x: c.index_copy_(-2, p, x), cache(), torch.tensor([3, 5]), new(2))
    assert (write.form, write.slot_dim, write.wraps) == ("index_copy", 2, False)
    assert tuple(write.positions.meta["val"].shape) == (2,)
    assert tuple(write.new.meta["val"].shape) == (BATCH, HEADS, 2, CHANNELS)
    assert write.seen is write.value


def test_index_put():
    def assign(c, p, x):
        c[:, :, p] = x

    write = written(assign, cache(), torch.tensor([3, -1]), new(2))
    assert (write.form, write.slot_dim, write.wraps) == ("index_put", 2, True)


def test_index_put_in_slots_before_heads():
    def assign(c, p, x):
        c[:, p] = x

    write = written(assign, cache().transpose(1, 2).contiguous(), torch.tensor([3, 4]), new(2).transpose(1, 2))
    assert (write.form, write.slot_dim) == ("index_put", 1)
    assert tuple(write.new.meta["val"].shape) == (BATCH, 2, HEADS, CHANNELS)


def test_scatter_of_more_tokens_than_there_are_indices():
    def write(c, p, x):
        c.scatter_(2, p.view(1, 1, -1, 1).expand(BATCH, HEADS, -1, CHANNELS), x)

    parsed = written(write, cache(), torch.tensor([3, 4]), new(5))
    assert parsed.form == "scatter"
    assert tuple(parsed.new.meta["val"].shape) == (BATCH, HEADS, 2, CHANNELS)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("spelling", ["index", "column", "scatter"])
def test_each_sequence_at_its_own_positions(spelling, tokens):
    def write(c, p, x):
        rows = torch.arange(BATCH)
        if spelling == "scatter":
            c.scatter_(2, p[:, None, :, None].expand_as(x), x)
        elif spelling == "column" and tokens == 1:
            c[rows, :, p[:, 0]] = x[:, :, 0]
        else:
            c[rows[:, None], :, p] = x.transpose(1, 2)

    places = torch.arange(BATCH)[:, None] + torch.arange(tokens)
    parsed = written(write, cache(), places, new(tokens))
    assert parsed.is_ragged
    assert parsed.slot_dim == 2
    assert tuple(parsed.positions.meta["val"].shape) == (BATCH, tokens)
    assert tuple(parsed.new.meta["val"].shape) == (BATCH, HEADS, tokens, CHANNELS)


@pytest.mark.parametrize("spelling", ["assign", "assign_batch", "narrow"])
def test_slices(spelling):
    def write(c, x):
        if spelling == "assign":
            c[:, :, 3:5] = x
        elif spelling == "assign_batch":
            c[:BATCH, :, 3:5] = x
        else:
            c.narrow(2, 3, 2).copy_(x)

    parsed = written(write, cache(), new(2))
    assert (parsed.form, parsed.slot_dim, parsed.start) == ("slice", 2, 3)
    assert parsed.new.op == "placeholder"


def test_a_slice_from_the_end():
    def write(c, x):
        c[:, :, -4:-2] = x

    assert written(write, cache(), new(2)).start == SLOTS - 4


def test_a_symbolic_slice_start_is_a_node():
    def write(c, x, start: int):
        c[:, :, start : start + 1] = x

    torch._dynamo.reset()
    parsed = written(write, cache(), new(), 3, dynamic=True)
    assert parsed.form == "slice"
    assert isinstance(symbol(parsed.start), torch.SymInt)


def test_a_write_that_casts():
    def write(c, x):
        c[:, :, 3:4] = x

    parsed = written(write, cache(torch.bfloat16), new())
    assert parsed.form == "slice"
    assert parsed.new.meta["val"].dtype == torch.float32


@pytest.mark.parametrize("last", [-1, SLOTS - 1])
def test_roll(last):
    def write(c, x):
        rolled = c.roll(-1, dims=-2)
        rolled[:, :, torch.tensor([last])] = x
        c.copy_(rolled)

    parsed = written(write, cache(), new())
    assert (parsed.form, parsed.kept, parsed.slot_dim) == ("roll", SLOTS, 2)
    assert tuple(parsed.new.meta["val"].shape) == (BATCH, HEADS, 1, CHANNELS)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_shift_in_place(tokens, dynamic):
    def write(c, x):
        t = x.shape[2]
        c[:, :, :-t] = c[:, :, t:].clone()
        c[:, :, -t:] = x

    parsed = written(write, cache(), new(tokens), dynamic=dynamic)
    assert (parsed.form, parsed.slot_dim) == ("roll", 2)
    assert parsed.seen.target is torch.ops.aten.slice_scatter.default
    assert tuple(parsed.new.meta["val"].shape)[2] == tokens or dynamic


@pytest.mark.parametrize(("shift", "tokens"), [(1, 3), (3, 3)])
def test_a_shift_of_a_cache_that_was_not_full(shift, tokens):
    def write(c, x):
        c[:, :, :-shift] = c[:, :, shift:].clone()
        c[:, :, -tokens:] = x

    parsed = written(write, cache(), new(tokens))
    assert (parsed.form, parsed.kept, parsed.slot_dim) == ("roll", SLOTS + shift - tokens, 2)


@pytest.mark.parametrize(
    "places", [(slice(-3), slice(2, -1), slice(-3, None)), (slice(-2), slice(2, None), slice(-3, -1))]
)
def test_other_shifts_in_place_are_not(places):
    to, of, last = places

    def write(c, x):
        c[:, :, to] = c[:, :, of].clone()
        c[:, :, last] = x

    tokens = len(range(SLOTS)[last])
    assert isinstance(written(write, cache(), new(tokens)), Problem)


def test_roll_of_one_sequence_keeps_four_dims():
    def write(c, x):
        rolled = c.roll(-1, dims=-2)
        rolled[:, :, torch.tensor([-1])] = x
        c.copy_(rolled)

    parsed = written(write, cache()[:1].clone(), new()[:1])
    assert tuple(parsed.new.meta["val"].shape) == (1, HEADS, 1, CHANNELS)


@pytest.mark.parametrize(("low", "high", "tokens"), [(1, None, 3), (0, 14, 5), (2, 9, 12)])
def test_append(low, high, tokens):
    def write(c, x):
        c.copy_(torch.cat([c[:, :, low:high], x], 2)[:, :, -SLOTS:])

    dense, added = cache(), new(tokens)
    parsed = written(write, dense.clone(), added)
    assert (parsed.form, parsed.kept, parsed.offset) == ("append", high or SLOTS, low)
    assert parsed.seen.target is torch.ops.aten.cat.default
    # What the attributes promise.
    expected = dense.clone()
    write(expected, added)
    assert torch.equal(torch.cat([dense[:, :, : parsed.kept], added], 2)[:, :, -SLOTS:], expected)


def test_append_of_as_many_as_fall_off():
    def write(c, x):
        c.copy_(torch.cat([c[:, :, 2:], x], 2))

    parsed = written(write, cache(), new(2))
    assert (parsed.form, parsed.kept, parsed.offset) == ("append", SLOTS, 2)


def test_append_to_a_symbolic_number_of_tokens():
    def write(c, x, held: int):
        c.copy_(torch.cat([c[:, :, :held], x], 2)[:, :, -SLOTS:])

    torch._dynamo.reset()
    c, x = cache(), new(12)
    for t in (c, x):
        torch._dynamo.mark_static(t)
    parsed = written(write, c, x, 9, dynamic=True)
    assert (parsed.form, parsed.offset) == ("append", 0)
    assert isinstance(symbol(parsed.kept), torch.SymInt)


def test_replace():
    def write(c, x):
        c.copy_(x[:, :, -SLOTS:])

    parsed = written(write, cache(), new(SLOTS + 3))
    assert (parsed.form, parsed.kept, parsed.slot_dim) == ("replace", 0, 2)
    assert parsed.new.op == "placeholder"


def at(position):
    return torch.arange(SLOTS) == position


@pytest.mark.parametrize("position", [3, SLOTS - 1, SLOTS, SLOTS + 4, -1])
@pytest.mark.parametrize("spelling", ["where", "where_small", "blend", "blend_in_place"])
def test_one_token_where_the_slot_has_its_number(spelling, position):
    def write(c, p, x):
        hot = at(p)[None, None, :, None]
        if spelling == "where":
            c.copy_(torch.where(hot, x, c))
        elif spelling == "where_small":
            c.copy_(torch.where((torch.arange(SLOTS)[:, None] == p[:, None]), x, c))
        elif spelling == "blend":
            c.copy_(hot.to(x.dtype) * x + c * (1 - hot.to(x.dtype)))
        else:
            hot = hot.to(x.dtype)
            c.mul_(1 - hot).add_(hot * x)

    dense, places, added = cache(), torch.tensor([position]), new()
    parsed = written(write, dense.clone(), places, added)
    assert (parsed.form, parsed.slot_dim, parsed.wraps) == ("where", 2, False)
    assert tuple(parsed.new.meta["val"].shape) == tuple(added.shape)
    # What the attributes promise: negative places are dropped.
    (place,) = evaluated(parsed.positions, places).tolist()
    expected = dense.clone()
    write(expected, places, added)
    if place >= 0:
        dense[:, :, place] = added[:, :, 0]
    assert torch.equal(dense, expected)


def evaluated(node, value):
    """The value of a node that is computed from one input."""
    if node.op == "placeholder":
        return value
    args = torch.fx.map_arg(node.args, lambda n: evaluated(n, value))
    return node.target(*args, **node.kwargs)


def test_scatter():
    def write(c, p, x):
        c.scatter_(2, p.view(1, 1, -1, 1).expand_as(x), x)

    parsed = written(write, cache(), torch.tensor([3, 5]), new(2))
    assert (parsed.form, parsed.slot_dim, parsed.wraps) == ("scatter", 2, False)
    assert tuple(parsed.positions.meta["val"].shape) == (2,)


def test_one_slot_at_an_integer():
    def write(c, x):
        c[:, :, -2] = x[:, :, 0]

    parsed = written(write, cache(), new())
    assert (parsed.form, parsed.slot_dim, parsed.start) == ("slice", 2, SLOTS - 2)
    assert tuple(parsed.new.meta["val"].shape) == (BATCH, HEADS, 1, CHANNELS)


@pytest.mark.parametrize("spelling", ["index_copy", "slice", "index_put"])
def test_the_first_sequences(spelling):
    def write(c, p, x):
        part = c[:1]
        if spelling == "index_copy":
            part.index_copy_(2, p, x)
        elif spelling == "slice":
            c[:1, :, 3:5] = x
        else:
            part[:, :, p] = x

    parsed = written(write, cache(), torch.tensor([3, 5]), new(2)[:1])
    assert (parsed.form, parsed.slot_dim, parsed.partial) == (spelling, 2, 0)
    assert parsed.buffer.op == "placeholder"
    assert tuple(parsed.new.meta["val"].shape) == (1, HEADS, 2, CHANNELS)


def where_even(c, x):
    c.copy_(torch.where(torch.arange(SLOTS)[:, None] % 2 == 0, x, c))


def where_one_channel(c, x):
    c.copy_(torch.where(torch.arange(CHANNELS) == 3, x, c[:, :, :1]).expand_as(c))


def where_each_its_own(c, x):
    c.copy_(torch.where(torch.arange(SLOTS)[:, None] == torch.arange(BATCH)[:, None, None, None], x, c))


def where_not(c, x):
    c.copy_(torch.where(at(3)[:, None], c, x))


def where_counting_from_one(c, x):
    c.copy_(torch.where(torch.arange(1, SLOTS + 1)[:, None] == 3, x, c))


def blend_of_halves(c, x):
    c.mul_(0.5).add_(0.5 * x)


def blend_of_others(c, x):
    hot = at(3).to(x.dtype)[:, None]
    c.mul_(1 - at(4).to(x.dtype)[:, None]).add_(hot * x)


def scatter_channels_apart(c, x):
    c.scatter_(2, torch.arange(CHANNELS).expand(BATCH, HEADS, 1, CHANNELS), x)


def scatter_some_heads(c, x):
    c.scatter_(2, torch.full((1,), 3).expand(BATCH, 1, 1, CHANNELS), x)


def last_sequences(c, x):
    c[1:, :, 3:4] = x[1:]


def roll_up(c, x):
    rolled = c.roll(1, dims=2)
    rolled[:, :, torch.tensor([0])] = x
    c.copy_(rolled)


def roll_and_put_first(c, x):
    rolled = c.roll(-1, dims=2)
    rolled[:, :, torch.tensor([0])] = x
    c.copy_(rolled)


def roll_two(c, x):
    rolled = c.roll([-1, -1], dims=[2, 1])
    rolled[:, :, torch.tensor([-1])] = x
    c.copy_(rolled)


def accumulate(c, x):
    c.index_put_(
        [torch.arange(BATCH)[:, None], torch.tensor([[0, 1]]), torch.tensor([[3, 3]])], x[:, :, 0], accumulate=True
    )


def head_of_the_concatenation(c, x):
    c.copy_(torch.cat([c[:, :, 1:], x, x], 2)[:, :, :SLOTS])


def not_the_tail(c, x):
    c.copy_(torch.cat([c, x], 2)[:, :, :SLOTS])


def every_second_slot(c, x):
    c[:, :, ::8] = x.expand(BATCH, HEADS, 2, CHANNELS)


def one_for_all(c, x):
    c[:, :, torch.tensor([3, 4])] = x


def after_zeroing(c, x):
    c.zero_()
    c.index_copy_(2, torch.tensor([3]), x)


def part_of_the_heads(c, x):
    c[:, :1, 3:4] = x[:, :1]


WRITES = [
    *(where_even, where_one_channel, where_each_its_own, where_not, where_counting_from_one),
    *(blend_of_halves, blend_of_others, scatter_channels_apart, scatter_some_heads),
    *(roll_up, roll_and_put_first, roll_two, accumulate, head_of_the_concatenation, not_the_tail),
]


@pytest.mark.parametrize(
    "write", [*WRITES, every_second_slot, one_for_all, after_zeroing, part_of_the_heads], ids=lambda f: f.__name__
)
def test_what_is_not_understood_is_a_problem(write):
    problem = written(write, cache(), new())
    assert isinstance(problem, Problem)
    assert problem.reason is Reason.UNKNOWN_WRITE


def test_other_sequences_than_the_first_are_a_problem():
    assert written(last_sequences, cache(), new()).reason is Reason.PARTIAL_BATCH


def test_a_second_write_is_a_problem():
    def write(c, x):
        c.index_copy_(2, torch.tensor([3]), x)
        c.index_copy_(2, torch.tensor([4]), x)

    assert written(write, cache(), new()).reason is Reason.TWO_WRITES


def test_writes_in_turn_each_into_what_the_one_before_made():
    def write(c, x):
        c.index_copy_(2, torch.tensor([3]), x)
        c[:, :, 4:5] = x * 2

    recorder, _ = capture(lambda c, x: write(c, x) or F.scaled_dot_product_attention(x, x, x), cache(), new())
    ((value, buffer),) = recorder.graphs[0].mutations
    first, second = parse_turns(buffer, value)
    assert (first.form, second.form) == ("index_copy", "slice")
    assert {first.cache, second.cache} == {buffer}
    assert first.seen in second.seen.all_input_nodes
    assert second.start == 4


def whole(c, x):
    c.index_copy_(2, torch.tensor([3]), x)
    c.zero_()


def moved(c, x):
    c.index_copy_(2, torch.tensor([3]), x)
    c.copy_(torch.cat([c[:, :, 1:], x], 2))


@pytest.mark.parametrize("write", [whole, moved])
def test_what_cannot_follow_a_write(write):
    recorder, _ = capture(lambda c, x: write(c, x) or F.scaled_dot_product_attention(x, x, x), cache(), new())
    ((value, buffer),) = recorder.graphs[0].mutations
    assert isinstance(parse_turns(buffer, value), Problem)


def test_a_mutated_bias_is_no_cache_write():
    recorder, _ = capture(lambda b, q: b.add_(1).sum() + F.scaled_dot_product_attention(q, q, q).sum(), new(), new())
    ((value, buffer),) = recorder.graphs[0].mutations
    assert not isinstance(parse(buffer, value), CacheWrite)


def halves(write, dim=0, order=(0, 1)):
    """`write` into both halves of a pair of caches."""

    def both(c, *args):
        for index in order:
            write(c.select(dim, index), *args)

    return both


def put(c, p, x):
    c[:, :, p] = x


def between(c, p, x):
    c[:, :, 3:5] = x


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (-1, 0), (-2, -1)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("write", "form"), [(put, "index_put"), (between, "slice"), (lambda c, p, x: c.index_copy_(2, p, x), "index_copy")]
)
def test_both_halves_of_one_tensor(write, form, dim, order):
    pair = cache().unsqueeze(dim).repeat_interleave(2, dim)
    parsed = written(halves(write, dim, order), pair, torch.tensor([3, 4]), new(2))
    assert (parsed.form, parsed.slot_dim) == (form, 3)
    sizes = [BATCH, HEADS, 2, CHANNELS]
    sizes.insert(dim, 2)
    assert list(parsed.new.meta["val"].shape) == sizes
    assert parsed.seen is parsed.value


def one_half(c, p, x):
    put(c[0], p, x)
    put(c[0], p + 1, x)


def other_positions(c, p, x):
    put(c[0], p, x)
    put(c[1], p + 1, x)


def other_forms(c, p, x):
    put(c[0], p, x)
    between(c[1], p, x)


def rolled(c, p, x):
    for half in c:
        moved = half.roll(-1, 2)
        moved[:, :, -1:] = x[:, :, :1]
        half.copy_(moved)


def of_three(c, p, x):
    put(c[0], p, x)
    put(c[2], p, x)


@pytest.mark.parametrize(
    ("write", "reason", "count"),
    [
        (one_half, Reason.TWO_WRITES, 2),
        (other_positions, Reason.POSITIONS_DIFFER, 2),
        (other_forms, Reason.POSITIONS_DIFFER, 2),
        (rolled, Reason.TWO_WRITES, 2),
        (of_three, Reason.TWO_WRITES, 3),
    ],
)
def test_no_halves(write, reason, count):
    problem = written(write, torch.stack([cache()] * count), torch.tensor([3, 4]), new(2))
    assert isinstance(problem, Problem)
    assert problem.reason == reason
