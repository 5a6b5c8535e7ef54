"""Whatever is done to a cache, taken over, restored and taken again, equals the same done to a dense tensor."""

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.nn import functional as F

from decoquant_compile import decoquant_backend
from decoquant_compile.handle import CacheTensor
from decoquant_compile.kernels.format import Format
from decoquant_compile.takeover import Claim, Obstructed, obstacle, restore, take_over
from tests.end_to_end.harness import ATEN_KERNELS

HEADS, SLOTS, CHANNELS = 2, 9, 8
MAX_BATCH, MAX_VIEWS = 4, 6
SEEDS = st.integers(0, 2**16)

VIEWS = {
    "slots": lambda t: t.narrow(0, 0, 1),
    "last": lambda t: t[..., -1:],
    "transposed": lambda t: t.transpose(0, -1),
    "extra dimension": lambda t: t.unsqueeze(0),
    "data": lambda t: t.data,
    "detached": lambda t: t.detach(),
    "middle": lambda t: t.narrow(t.dim() // 2, t.shape[t.dim() // 2] // 2, 1),
    "flat": lambda t: t.reshape(-1) if t.is_contiguous() else t[:1],
    "operator": lambda t: torch.ops.aten.select.int(t, 0, 0) if t.dim() > 1 else t[:],
}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()  # the machines' layouts would look like dynamic sizes of one


def attend(keys, values, query, new, positions, mask, dims):
    """One decoding step over caches in a layout, grouped queries."""
    keys.index_copy_(dims[2], positions, new)
    values.index_copy_(dims[2], positions, new)
    return F.scaled_dot_product_attention(query, keys.permute(dims), values.permute(dims), mask, enable_gqa=True)


class Lifecycle(RuleBasedStateMachine):
    """`cache` is under test, `model` the dense tensor with the same history; `views` are pairs of views of them."""

    bits: int
    dims: tuple[int, int, int, int]
    step: Callable[..., Tensor]

    @initialize(batch=st.integers(1, 2), seed=SEEDS, used=st.integers(0, SLOTS))
    def start(self, batch, seed, used):
        sizes = (batch, HEADS, SLOTS, CHANNELS)
        self.model = self._random([sizes[self.dims.index(i)] for i in range(4)], seed)
        self._canonical(self.model)[:, :, used:] = 0
        self.cache = self.model.clone()
        self.views = []
        self.pack()

    def _canonical(self, tensor):
        return tensor.permute(self.dims)

    def _random(self, shape, seed):
        return torch.randn(list(shape), generator=torch.Generator().manual_seed(seed))

    def _close(self, ours, theirs, rounding=0.0):
        if self.bits != 16 and type(self.cache) is not Tensor:
            # Parameters may be those of one or two left-over tokens; a lost one would be off by 1.
            rounding = 0.1 * float(self.model.abs().max()) + 1e-6
        return torch.allclose(ours, theirs, rtol=0, atol=rounding) if rounding else torch.equal(ours, theirs)

    def _both(self, operation, *, inference=False):
        with torch.inference_mode(inference):
            operation(self.cache)
            operation(self.model)

    def _replace(self, operation):
        """The operation gives another cache; the old one is gone, and its views with it."""
        self.cache, self.model = operation(self.cache), operation(self.model)
        self.views.clear()

    # Life

    @precondition(lambda self: type(self.cache) is Tensor)
    @rule()
    def pack(self):
        # A value, as in the compiled step; and its error bound needs no statistics.
        claim = Claim(self.cache, self.dims, Format("value", self.bits, CHANNELS, torch.float32, 1, 2))
        try:
            take_over([claim], lengths=[None], masks=[None])
        except Obstructed:
            assert self.views
            assert type(self.cache) is Tensor
        else:
            assert type(self.cache) is CacheTensor

    @rule()
    def restore(self):
        assert restore(self.cache) is self.cache
        assert type(self.cache) is Tensor
        assert bool(self.views) or obstacle(self.cache, self.dims) is None

    @rule(how=st.sampled_from(["zero_", "fill", "view"]), inference=st.booleans())
    def reset(self, how, inference):
        self._both(
            {"zero_": lambda t: t.zero_(), "fill": lambda t: t.fill_(0), "view": lambda t: t[:].zero_()}[how],
            inference=inference,
        )
        assert type(self.cache) is Tensor

    # A compiled step takes the cache over, stores one token and gives the attention's output.

    @rule(slot=st.integers(0, SLOTS - 1), causal=st.booleans(), seed=SEEDS)
    def compiled_step(self, slot, causal, seed):
        batch = self._canonical(self.model).shape[0]
        shape = list(self.model.shape)
        shape[self.dims[2]] = 1
        keys, new = self._random(self.model.shape, seed), self._random(shape, seed + 1)
        query = self._random((batch, 2 * HEADS, 1, CHANNELS), seed + 2)
        mask = (torch.arange(SLOTS) <= (slot if causal else SLOTS)).view(1, 1, 1, SLOTS)
        arguments = (query, new, torch.tensor([slot]), mask, self.dims)
        packs = type(self.cache) is CacheTensor or obstacle(self.cache, self.dims) is None
        with torch.no_grad(), inductor_config.patch(ATEN_KERNELS), warnings.catch_warnings():
            warnings.simplefilter("ignore" if self.views else "error")  # a view of a dense cache keeps it dense
            ours = self.step(keys.clone(), self.cache, *arguments)
        assert (type(self.cache) is CacheTensor) is packs
        assert self._close(ours, attend(keys, self.model, *arguments), rounding=2e-5)

    # Writes

    @rule(slots=st.lists(st.integers(0, SLOTS - 1), min_size=1, unique=True), seed=SEEDS, inference=st.booleans())
    def index_copy(self, slots, seed, inference):
        shape = list(self.model.shape)
        shape[self.dims[2]] = len(slots)
        new = self._random(shape, seed)
        self._both(lambda t: t.index_copy_(self.dims[2], torch.tensor(slots), new), inference=inference)

    @rule(start=st.integers(0, SLOTS), stop=st.integers(0, SLOTS), seed=SEEDS, inference=st.booleans())
    def assign_slice(self, start, stop, seed, inference):
        def operation(tensor):
            part = self._canonical(tensor)[:, :, start:stop]
            part[:] = self._random(part.shape, seed)

        self._both(operation, inference=inference)

    @rule(seed=SEEDS, inference=st.booleans())
    def copy_all(self, seed, inference):
        new = self._random(self.model.shape, seed)
        self._both(lambda t: t.copy_(new), inference=inference)

    @rule(value=st.floats(-2, 2, width=16), inference=st.booleans())
    def add(self, value, inference):
        self._both(lambda t: t.add_(value), inference=inference)

    @rule(slot=st.integers(0, SLOTS - 1), value=st.floats(-2, 2, width=16))
    def masked_fill(self, slot, value):
        shape = [1] * 4
        shape[self.dims[2]] = SLOTS
        mask = (torch.arange(SLOTS) == slot).view(shape)
        self._both(lambda t: t.masked_fill_(mask, value))

    @rule(length=st.integers(0, SLOTS))
    def crop(self, length):
        def operation(tensor):
            self._canonical(tensor)[:, :, length:] = 0

        self._both(operation)

    # Views

    @precondition(lambda self: len(self.views) < MAX_VIEWS)
    @rule(kind=st.sampled_from(sorted(VIEWS)), of=st.integers(0, MAX_VIEWS), inference=st.booleans())
    def view(self, kind, of, inference):
        ours, theirs = self.views[of] if of < len(self.views) else (self.cache, self.model)
        with torch.inference_mode(inference):
            self.views.append((VIEWS[kind](ours), VIEWS[kind](theirs)))

    @precondition(lambda self: self.views)
    @rule(of=st.integers(0, MAX_VIEWS - 1), seed=SEEDS, inference=st.booleans())
    def write_through_view(self, of, seed, inference):
        ours, theirs = self.views[of % len(self.views)]
        new = self._random(theirs.shape, seed)
        with torch.inference_mode(inference):
            ours.copy_(new)
            theirs.copy_(new)

    @rule()
    def forget_views(self):
        self.views.clear()

    # Copies

    @rule(operation=st.sampled_from([torch.clone, copy.deepcopy]))
    def copy(self, operation):
        old, dense = self.cache, self.model.clone()
        kind = type(old)
        self._replace(operation)
        assert type(self.cache) is kind
        old.add_(1)
        assert self._close(self.cache, dense)

    @rule(data=st.data())
    def select_sequences(self, data):
        batch = self.model.shape[self.dims[0]]
        index = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=MAX_BATCH))
        self._replace(lambda t: t.index_select(self.dims[0], torch.tensor(index)))

    @precondition(lambda self: self.model.shape[self.dims[0]] <= MAX_BATCH // 2)
    @rule()
    def repeat_sequences(self):
        self._replace(lambda t: t.repeat_interleave(2, dim=self.dims[0]))

    @rule()
    def save_and_load(self):
        file = io.BytesIO()
        torch.save({"cache": self.cache, "views": [ours for ours, _ in self.views]}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert type(loaded["cache"]) is Tensor
        assert self._close(loaded["cache"], self.model)
        assert all(self._close(ours, theirs) for ours, (_, theirs) in zip(loaded["views"], self.views, strict=True))

    @rule()
    def read_in_a_transform(self):
        result = torch.vmap(lambda x: self.cache + x)(torch.zeros(2))
        assert self._close(result[1], self.model)

    @invariant()
    def equal(self):
        assert self._close(self.cache, self.model)
        assert all(self._close(ours, theirs) for ours, theirs in self.views)
        if self.bits != 16:  # what the cache holds now is what later operations start from
            self.model.copy_(self.cache)


def machine(bits, dims, examples):
    options = {"key_bits": 16, "value_bits": bits, "sinks": 1, "window": 2}
    step = torch.compile(attend, backend=decoquant_backend, options=options, recompile_limit=64)
    case = type("Machine", (Lifecycle,), {"bits": bits, "dims": dims, "step": staticmethod(step)}).TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=25, deadline=None)
    return case


TestExact = machine(16, (0, 1, 2, 3), 100)
TestExactOtherLayout = machine(16, (0, 2, 1, 3), 40)
TestEightBits = machine(8, (0, 1, 2, 3), 100)
