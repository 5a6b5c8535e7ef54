"""Tensors that hold many caches: those of all layers, keys and values, in one; written in place or growing."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import decoquant_compile
from decoquant_compile import CacheTensor, decoquant_backend
from tests.end_to_end.harness import SMALL, assert_packed, distance, noise, packing, shown

LAYERS, BATCH, HEADS, SLOTS, CHANNELS, GROUPS = 3, 2, 2, 48, 16, 2
CALLS = [9, 1, 1, 6, 1, 12, 1]


def heads_of(tokens):
    """Queries, keys and values [batch, heads, tokens, channels] of each layer."""
    return [layer.split([HEADS * GROUPS, HEADS, HEADS], 1) for layer in tokens]


class Layers(nn.Module):
    """Attentions one after the other over [layers, batch, heads of queries, keys and values, tokens, channels]."""

    def __init__(self, write, *shapes):
        super().__init__()
        self.write = write
        names = ("cache", "values") if len(shapes) <= 2 else [f"cache_{i}" for i in range(len(shapes))]
        for name, shape in zip(names, shapes, strict=False):
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, tokens, start):
        positions = start + torch.arange(tokens.shape[-2])
        mask, x = torch.arange(SLOTS) <= positions[:, None], 0
        for number, (q, k, v) in enumerate(heads_of(tokens)):
            keys, values = self.write(self, number, k, v, positions)
            x = F.scaled_dot_product_attention(q + x, keys, values, mask, enable_gqa=True)
        return x

    @property
    def caches(self):
        return list(self.buffers())


def layer_first(model, layer, k, v, positions):
    model.cache[layer, 0, :, :, positions], model.cache[layer, 1, :, :, positions] = k, v
    return model.cache[layer, 0], model.cache[layer, 1]


def layer_second(model, layer, k, v, positions):
    model.cache[0, layer].index_copy_(2, positions, k)
    model.cache[1, layer].index_copy_(2, positions, v)
    return model.cache[0, layer], model.cache[1, layer]


def batch_first(model, layer, k, v, positions):
    for cache, new in ((model.cache, k), (model.values, v)):
        cache[:, layer].index_copy_(2, positions, new)
    return model.cache[:, layer], model.values[:, layer]


def backwards(model, layer, k, v, positions):
    """The last layer stands first, with a negative index; slots before heads."""
    for cache, new in ((model.cache, k), (model.values, v)):
        cache[-1 - layer][:, positions] = new.transpose(1, 2)
    return model.cache[-1 - layer].transpose(1, 2), model.values[-1 - layer].transpose(1, 2)


def alone(model, layer, k, v, positions):
    """The same in a tensor for each cache, to compare with."""
    caches = model.caches[2 * layer : 2 * layer + 2]
    for cache, new in zip(caches, (k, v), strict=True):
        cache.index_copy_(2, positions, new)
    return caches


def unbound(model, layer, k, v, positions):
    keys, values = model.cache[layer].unbind(0)
    keys[:, :, positions], values[:, :, positions] = k, v
    return keys, values


WRITES = {
    layer_first: [(LAYERS, 2, BATCH, HEADS, SLOTS, CHANNELS)],
    layer_second: [(2, LAYERS, BATCH, HEADS, SLOTS, CHANNELS)],
    batch_first: [(BATCH, LAYERS, HEADS, SLOTS, CHANNELS)] * 2,
    backwards: [(LAYERS, BATCH, SLOTS, HEADS, CHANNELS)] * 2,
    unbound: [(LAYERS, 2, BATCH, HEADS, SLOTS, CHANNELS)],
    alone: [(BATCH, HEADS, SLOTS, CHANNELS)] * 2 * LAYERS,
}
STACKED = [write for write in WRITES if write is not alone]


def calls(sizes=CALLS):
    generator, start = torch.Generator().manual_seed(0), 0
    for tokens in sizes:
        yield (
            torch.randn(LAYERS, BATCH, HEADS * (GROUPS + 2), tokens, CHANNELS, generator=generator),
            torch.tensor(start),
        )
        start += tokens


@pytest.mark.parametrize(
    ("write", "bits", "dynamic"),
    [
        *((write, 4, None) for write in STACKED),
        (layer_first, 16, None),
        (batch_first, 4, True),
        *(pytest.param(write, 16, True, marks=pytest.mark.slow) for write in STACKED),
    ],
)
@torch.no_grad()
def test_each_cache_is_read_from_its_codes(write, bits, dynamic):
    """At 16 bits it is the dense tensor; at 4 bits what caches in tensors of their own give."""
    model, twin = Layers(write, *WRITES[write]), Layers(alone, *WRITES[alone])
    with packing(bits=bits, **SMALL) as session:
        compiled = torch.compile(model, dynamic=dynamic)
        reference = twin if bits == 16 else torch.compile(twin, dynamic=dynamic)
        for call in calls():
            assert distance(compiled(*call), reference(*call)) < noise(16)
        assert_packed(model.caches)
        number = sum(weakly.state() is not None for weakly in session.report().caches)
        assert number == 2 * LAYERS * (1 if bits == 16 else 2)
    report = session.report()
    assert {(f.form, f.outcome) for f in report.findings} == {("sdpa", "rewritten")}
    if bits != 16:
        assert decoquant_compile.nbytes(model) == decoquant_compile.nbytes(twin)


@torch.no_grad()
def test_a_filled_tensor_is_taken_over_and_given_back():
    model, twin = (Layers(layer_first, *WRITES[layer_first]) for _ in range(2))
    first, *others = calls()
    model(*first), twin(*first)
    with packing(bits=16, **SMALL):
        compiled = torch.compile(model)
        for call in others[:2]:
            assert distance(compiled(*call), twin(*call)) < noise(16)
        cache = model.cache
        decoquant_compile.restore(model)
        assert type(cache) is torch.Tensor
        assert cache is model.cache
        torch.testing.assert_close(cache, twin.cache)
        for call in others[2:4]:
            assert distance(compiled(*call), twin(*call)) < noise(16)
        assert_packed(model.caches)


@torch.no_grad()
def test_eager_code_reads_and_writes_a_handle_of_many_caches():
    model, twin = (Layers(layer_first, *WRITES[layer_first]) for _ in range(2))
    with packing(bits=16, **SMALL):
        compiled = torch.compile(model)
        steps = calls()
        for call, _ in zip(steps, range(2), strict=False):
            compiled(*call), twin(*call)
        for each in (model, twin):
            each.cache[1, 0, :, :, 3] = 2.0  # one cache
            each.cache[..., 4, :] *= 0.5  # all of them
            each.cache[2, 1].index_fill_(1, torch.tensor([0]), 0.25)
        assert "caches=6" in repr(model.cache)
        torch.testing.assert_close(model.cache + 0, twin.cache)
        copied, deep = model.cache.clone(), copy.deepcopy(model.cache)
        for call in steps:
            assert distance(compiled(*call), twin(*call)) < noise(16)
        assert_packed([model.cache, copied, deep])
        assert bool((copied[1, 0, :, :, 3] == 2.0).all())
        torch.testing.assert_close(copied + 0, deep + 0)
        assert not torch.equal(copied + 0, model.cache + 0)
        model.cache.zero_()
        assert type(model.cache) is torch.Tensor
        assert not model.cache.any()


@torch.no_grad()
def test_a_call_in_another_format_packs_all_caches_anew():
    class Cache:
        def __init__(self):
            self.cache = torch.zeros(WRITES[layer_first][0])

    def run(cache, tokens, start):
        positions = start + torch.arange(tokens.shape[-2])
        mask, x = torch.arange(SLOTS) <= positions[:, None], 0
        for layer, (q, k, v) in enumerate(heads_of(tokens)):
            keys, values = layer_first(cache, layer, k, v, positions)
            x = F.scaled_dot_product_attention(q + x, keys, values, mask, enable_gqa=True)
        return x

    torch.compiler.reset()
    in_8, in_4 = (torch.compile(run, backend=decoquant_backend, options={"bits": bits, **SMALL}) for bits in (8, 4))
    steps, one, other = list(calls([9, 1, 1])), Cache(), Cache()
    for fn, cache in ((in_8, one), (in_4, other)):
        for step in steps[:2]:
            fn(cache, *step)
    sizes = [decoquant_compile.nbytes(cache).packed for cache in (one, other)]
    before = shown(one)
    got = in_4(one, *steps[2])  # its graph is compiled for handles of 4 bits
    assert_packed([one.cache])
    assert decoquant_compile.nbytes(one).packed == sizes[1] < sizes[0]
    assert distance(got, run(before, *steps[2])) < 0.5
    assert not torch.equal(shown(one).cache, before.cache)


@torch.no_grad()
def test_a_saved_tensor_of_many_caches_is_loaded_packed(tmp_path):
    model, fresh, grown = (Layers(layer_first, *WRITES[layer_first]) for _ in range(3))
    with packing(bits=4, **SMALL):
        compiled, steps = torch.compile(model), calls()
        for call, _ in zip(steps, range(3), strict=False):
            compiled(*call)
        cache = {"all": model.cache}
        decoquant_compile.save(cache, tmp_path / "cache.safetensors")
        decoquant_compile.load({"all": fresh.cache}, tmp_path / "cache.safetensors")
        assert_packed([fresh.cache])
        assert torch.equal(fresh.cache + 0, model.cache + 0)
        found = decoquant_compile.load({"all": None}, tmp_path / "cache.safetensors")
        grown.cache = found["all"]
        call = next(steps)
        expected = compiled(*call)
        for each in (fresh, grown):
            torch.testing.assert_close(torch.compile(each)(*call), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_cache_that_stays_dense_keeps_the_others_of_its_tensor_dense():
    """The last layer counts what it holds; nothing is packed, and the reason says why."""

    class Counting(Layers):
        def forward(self, tokens, start):
            return super().forward(tokens, start) + (self.cache[LAYERS - 1, 0] > 0).any()

    model, twin = (Counting(layer_first, *WRITES[layer_first]) for _ in range(2))
    torch.compiler.reset()
    compiled = torch.compile(model, backend=decoquant_backend)
    for call in calls([9, 1]):
        torch.testing.assert_close(compiled(*call), twin(*call))
    assert type(model.cache) is torch.Tensor
    report = decoquant_compile.explain(model, *next(calls()))
    outcomes = [finding.outcome for finding in report.graphs[0].findings]
    assert outcomes == ["SHARED_TENSOR"] * (LAYERS - 1) + ["CACHE_VALUE_ESCAPES"]


@torch.no_grad()
def test_other_caches_are_packed_beside_a_tensor_that_stays_dense():
    class Mixed(Layers):
        def __init__(self):
            super().__init__(layer_first, *WRITES[layer_first])
            self.keys_alone, self.values_alone = (
                nn.Buffer(torch.zeros(BATCH, HEADS, SLOTS, CHANNELS)) for _ in range(2)
            )

        def forward(self, tokens, start):
            (q, k, v), positions = heads_of(tokens)[0], start + torch.arange(tokens.shape[-2])
            self.keys_alone.index_copy_(2, positions, k)
            self.values_alone.index_copy_(2, positions, v)
            mask = torch.arange(SLOTS) <= positions[:, None]
            y = F.scaled_dot_product_attention(q, self.keys_alone, self.values_alone, mask, enable_gqa=True)
            return super().forward(tokens, start) + y + (self.cache[0, 0] > 0).any()

    model, twin = Mixed(), Mixed()
    torch.compiler.reset()
    with decoquant_compile.enable(bits=16, **SMALL) as session:
        compiled = torch.compile(model)
        for call in calls([9, 1, 1]):
            assert distance(compiled(*call), twin(*call)) < noise(16)
    assert type(model.cache) is torch.Tensor
    assert_packed([model.keys_alone, model.values_alone])
    assert [graph.rewritten for graph in session.report().graphs] == [1] * len(session.report().graphs)


@torch.no_grad()
def test_a_tensor_that_is_written_in_part_stays_dense():
    model, twin = (Layers(layer_first, *WRITES[layer_first]) for _ in range(2))
    torch.compiler.reset()
    compiled = torch.compile(model, backend=decoquant_backend)
    for tokens, start in calls([9, 1]):
        torch.testing.assert_close(compiled(tokens[:2], start), twin(tokens[:2], start))
    assert type(model.cache) is torch.Tensor


@torch.no_grad()
def test_max_rewrites_counts_a_tensor_of_many_caches_as_one():
    model = Layers(layer_first, *WRITES[layer_first])
    with packing(bits=16, max_rewrites=1, **SMALL):
        compiled = torch.compile(model)
        for call in calls([9, 1]):
            compiled(*call)
        assert_packed(model.caches)


def gpt2(tokens, start, past):
    """Keys and values of each layer in one tensor, as the first ports of GPT-2 returned them."""
    present, x, positions = [], 0, start + torch.arange(tokens.shape[-2])
    for (q, k, v), before in zip(heads_of(tokens), past, strict=True):
        keys, values = before.unbind(0)
        keys, values = torch.cat([keys, k], -2), torch.cat([values, v], -2)
        mask = torch.arange(keys.shape[2]) <= positions[:, None]
        x = F.scaled_dot_product_attention(q + x, keys, values, mask, enable_gqa=True)
        present.append(torch.stack([keys, values]))
    return x, present


def all_layers(tokens, start, past):
    present, x, positions = [], 0, start + torch.arange(tokens.shape[-2])
    for layer, (q, k, v) in enumerate(heads_of(tokens)):
        keys, values = torch.cat([past[:, layer, 0], k], -2), torch.cat([past[:, layer, 1], v], -2)
        mask = torch.arange(keys.shape[2]) <= positions[:, None]
        x = F.scaled_dot_product_attention(q + x, keys, values, mask, enable_gqa=True)
        present.append(torch.stack([keys, values], 1))
    return x, torch.stack(present, 1)


def together(tokens, start, past):
    """Keys and values are stacked before they are concatenated."""
    present, x, positions = [], 0, start + torch.arange(tokens.shape[-2])
    for (q, k, v), before in zip(heads_of(tokens), past, strict=True):
        present.append(torch.cat([before, torch.stack([k, v], 1)], -2))
        keys, values = present[-1].unbind(1)
        mask = torch.arange(keys.shape[2]) <= positions[:, None]
        x = F.scaled_dot_product_attention(q + x, keys, values, mask, enable_gqa=True)
    return x, present


WINDOW = 16


def sliding(tokens, _, past):
    present, x = [], 0
    for (q, k, v), before in zip(heads_of(tokens), past, strict=True):
        keys, values = torch.cat([before[0], k], -2), torch.cat([before[1], v], -2)
        mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - q.shape[2])
        x = F.scaled_dot_product_attention(q + x, keys, values, mask, enable_gqa=True)
        present.append(torch.stack([keys[:, :, -WINDOW:], values[:, :, -WINDOW:]]))
    return x, present


def functional(tokens, start, past):
    """Caches of a fixed size that are returned changed."""
    present, x, positions = [], 0, start + torch.arange(tokens.shape[-2])
    for (q, k, v), before in zip(heads_of(tokens), past, strict=True):
        keys, values = before[0].index_copy(2, positions, k), before[1].index_copy(2, positions, v)
        x = F.scaled_dot_product_attention(
            q + x, keys, values, torch.arange(SLOTS) <= positions[:, None], enable_gqa=True
        )
        present.append(torch.stack([keys, values]))
    return x, present


GROWING = {
    gpt2: lambda: [torch.zeros(2, BATCH, HEADS, 0, CHANNELS) for _ in range(LAYERS)],
    all_layers: lambda: torch.zeros(BATCH, LAYERS, 2, HEADS, 0, CHANNELS),
    together: lambda: [torch.zeros(BATCH, 2, HEADS, 0, CHANNELS) for _ in range(LAYERS)],
    sliding: lambda: [torch.zeros(2, BATCH, HEADS, 0, CHANNELS) for _ in range(LAYERS)],
    functional: lambda: [torch.zeros(2, BATCH, HEADS, SLOTS, CHANNELS) for _ in range(LAYERS)],
}


def tensors_of(past):
    return past if isinstance(past, list) else [past]


@pytest.mark.parametrize(
    ("function", "bits"),
    [
        *((function, 16) for function in GROWING),
        (gpt2, 4),
        *(pytest.param(f, 4, marks=pytest.mark.slow) for f in (all_layers, together)),
    ],
)
@torch.no_grad()
def test_growing_tensors_of_many_caches(function, bits):
    past = before = GROWING[function]()
    with packing(bits=bits, **SMALL) as session:
        compiled = torch.compile(function)
        for call in calls():
            got, past = compiled(*call, past)
            expected, after = function(*call, before)
            assert distance(got, expected) < noise(bits)
            assert_packed(tensors_of(past))
            before = after if bits == 16 else shown(past)
    write = "index_copy" if function is functional else "cat"
    findings = session.report().findings
    assert {(f.form, f.write, f.outcome) for f in findings} == {("sdpa", write, "rewritten")}
    torch.testing.assert_close(shown(past), before)


@torch.no_grad()
def test_two_continuations_and_beams_of_a_growing_tensor():
    with packing(bits=16, **SMALL):
        compiled, steps = torch.compile(gpt2), calls()
        _, past = compiled(*next(steps), GROWING[gpt2]())
        first, second = next(steps), next(steps)
        ends = [compiled(*call, past)[1] for call in (first, second)]
        chosen = [layer.index_select(1, torch.tensor([1, 1])) for layer in past]
        assert all(type(layer) is CacheTensor for layer in chosen)
        expected, dense = gpt2(*second, shown(chosen))
        got, last = compiled(*second, chosen)
        assert distance(got, expected) < noise(16)
        torch.testing.assert_close(shown(last), dense)
        for call, end in zip((first, second), ends, strict=True):
            torch.testing.assert_close(shown(end), gpt2(*call, shown(past))[1])


@torch.no_grad()
def test_one_tensor_handed_in_for_two_layers():
    """Which of the results continues it is no matter of the graph."""
    past = [torch.randn(2, BATCH, HEADS, 5, CHANNELS)] * LAYERS
    before = past
    torch.compiler.reset()
    with decoquant_compile.enable(bits=16, **SMALL):
        compiled = torch.compile(gpt2)
        for call in calls([3, 1, 1]):
            got, past = compiled(call[0], call[1] + 5, past)
            expected, before = gpt2(call[0], call[1] + 5, before)
            assert distance(got, expected) < noise(16)
    torch.testing.assert_close(shown(past), before)


@pytest.mark.parametrize(
    "cut",
    [lambda x: x[..., :6, :], lambda x: x[..., 1:, :], lambda x: x[:], lambda x: x.flip(0).flip(0)],
    ids=["crop", "window", "all", "copy"],
)
@torch.no_grad()
def test_a_view_of_a_growing_tensor_is_continued(cut):
    with packing(bits=16, **SMALL):
        compiled, steps = torch.compile(gpt2), calls()
        _, past = compiled(*next(steps), GROWING[gpt2]())
        tokens, _ = next(steps)
        views = [cut(layer) for layer in past]
        call = tokens, torch.tensor(views[0].shape[-2])
        expected, dense = gpt2(*call, [cut(layer) for layer in shown(past)])
        got, after = compiled(*call, views)
        assert distance(got, expected) < noise(16)
        torch.testing.assert_close(shown(after), dense)
        assert_packed(after)


@torch.no_grad()
def test_layers_of_a_growing_tensor_are_continued_apart():
    """What one graph returns in one tensor another takes layer by layer."""
    with packing(bits=16, **SMALL):
        steps = calls()
        _, past = torch.compile(all_layers)(*next(steps), GROWING[all_layers]())
        call = next(steps)
        layers = [layer.transpose(0, 1) for layer in past.unbind(1)]
        expected, _ = gpt2(*call, [x.transpose(0, 1) for x in shown(past).unbind(1)])
        got, _ = torch.compile(gpt2)(*call, layers)
        assert distance(got, expected) < noise(16)


def returned_too(keys, values, other):
    return keys, values, torch.stack([keys, values])


def first_part_too(keys, values, other):
    present = torch.stack([keys, values])
    return present[0], present


def twice(keys, values, other):
    present = torch.stack([keys, values])
    return present, present


def keys_again(keys, values, other):
    return (torch.stack([keys, values, keys]),)


def with_others(keys, values, other):
    return torch.stack([keys, values]), torch.stack([other, other])


@pytest.mark.parametrize("results", [returned_too, first_part_too, twice, keys_again, with_others])
@torch.no_grad()
def test_results_beside_a_growing_tensor(results):
    """Whatever is packed of it: results are those of dense tensors, also after writes to one of them."""

    def function(tokens, start, past):
        (q, k, v), positions = heads_of(tokens)[0], start + torch.arange(tokens.shape[-2])
        keys, values = torch.cat([past[0], k], -2), torch.cat([past[1], v], -2)
        mask = torch.arange(keys.shape[2]) <= positions[:, None]
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True), *results(keys, values, q)

    parts = 3 if results is keys_again else 2
    past = before = torch.zeros(parts, BATCH, HEADS, 0, CHANNELS)
    torch.compiler.reset()
    compiled = torch.compile(function, backend=decoquant_backend, options={"bits": 16, **SMALL})
    for call in calls([9, 1, 1, 1]):
        got, expected = compiled(*call, past), function(*call, before)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one + 0, other, rtol=0, atol=1e-5)
        at = next(i for i, x in enumerate(expected) if x.dim() == 5)
        past, before = got[at], expected[at]
        for each in (past, before):
            each[-1].mul_(0.5)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one + 0, other, rtol=0, atol=1e-5)
    if results in (twice, with_others):
        assert_packed([past])


@pytest.mark.parametrize(
    "result", [Tensor.contiguous, lambda x: x.to(torch.float32), lambda x: x + 0, lambda x: x[1, 0]]
)
@torch.no_grad()
def test_a_tensor_that_is_returned_as_well(result):
    class Returning(Layers):
        def forward(self, tokens, start):
            return super().forward(tokens, start), result(self.cache)

    model, twin = (Returning(layer_first, *WRITES[layer_first]) for _ in range(2))
    compiled = torch.compile(model, backend=decoquant_backend, options={"bits": 16, **SMALL})
    torch.compiler.reset()
    for call in calls([9, 1, 1, 1]):
        (got, cache), (expected, dense) = compiled(*call), twin(*call)
        assert distance(got, expected) < noise(16)
        torch.testing.assert_close(cache + 0, dense)


@pytest.mark.parametrize("write", STACKED)
@torch.no_grad()
def test_a_tensor_that_is_returned_itself(write):
    class Returning(Layers):
        def forward(self, tokens, start):
            return super().forward(tokens, start), self.caches[0], self.caches[-1]

    model, twin = (Returning(write, *WRITES[write]) for _ in range(2))
    given = model.caches
    with packing(bits=16, **SMALL):
        compiled = torch.compile(model)
        for call in calls([9, 1, 1, 1]):
            (got, *held), (expected, *dense) = compiled(*call), twin(*call)
            assert distance(got, expected) < noise(16)
            assert held[0] is given[0]
            assert held[1] is given[-1]
            assert_packed(held)
            for mine, theirs in zip(held, dense, strict=True):
                torch.testing.assert_close(mine + 0, theirs)


@torch.no_grad()
def test_index_select_of_a_dim_that_is_none():
    model = Layers(layer_first, *WRITES[layer_first])
    with packing(bits=16, **SMALL):
        compiled = torch.compile(model)
        for call in calls([9, 1]):
            compiled(*call)
        with pytest.raises(IndexError):
            model.cache.index_select(8, torch.tensor([0]))
        chosen = model.cache.index_select(0, torch.tensor([1]))
        assert torch.equal(chosen, shown(model).cache[1:2])


@torch.no_grad()
def test_max_rewrites_leaves_room_beside_a_tensor_that_stays_dense():
    class Mixed(Layers):
        def __init__(self):
            super().__init__(layer_first, *WRITES[layer_first])
            for name in ("own_keys", "own_values"):
                self.register_buffer(name, torch.zeros(BATCH, HEADS, SLOTS, CHANNELS))

        def forward(self, tokens, start):
            y = super().forward(tokens, start)
            (q, k, v), positions = heads_of(tokens)[0], start + torch.arange(tokens.shape[-2])
            keys, values = self.own_keys.index_copy_(2, positions, k), self.own_values.index_copy_(2, positions, v)
            mask = torch.arange(SLOTS) <= positions[:, None]
            z = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
            return y + z + (self.cache[0, 0] > 0).any()

    model, twin = Mixed(), Mixed()
    compiled = torch.compile(model, backend=decoquant_backend, options={"bits": 16, "max_rewrites": 1, **SMALL})
    torch.compiler.reset()
    for call in calls([9, 1]):
        torch.testing.assert_close(compiled(*call), twin(*call), rtol=0, atol=1e-4)
    assert_packed([model.own_keys, model.own_values])
    assert type(model.cache) is Tensor


@torch.no_grad()
def test_an_input_that_grows_and_is_overwritten():
    """The result continues it, and the call puts something else in its place."""

    def function(tokens, start, past):
        (q, k, v), positions = heads_of(tokens)[0], start + torch.arange(tokens.shape[-2])
        keys, values = torch.cat([past[0], k], -2), torch.cat([past[1], v], -2)
        mask = torch.arange(keys.shape[2]) <= positions[:, None]
        y = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        past.copy_(torch.ones_like(past))
        return y, torch.stack([keys, values])

    past = torch.randn(2, BATCH, HEADS, 5, CHANNELS)
    before = past.clone()
    compiled = torch.compile(function, backend=decoquant_backend, options={"bits": 16, **SMALL})
    torch.compiler.reset()
    for tokens, start in calls([2, 1, 1]):
        got, after = compiled(tokens, start + 5, past)
        expected, dense = function(tokens, start + 5, before)
        assert distance(got, expected) < noise(16)
        assert torch.equal(past + 0, before)
        torch.testing.assert_close(after + 0, dense)
        past, before = after, dense
