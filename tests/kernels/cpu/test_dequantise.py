"""The dense cache in C++ equals the reference's of the same buffer."""

from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels import reference
from decoquant_compile.kernels.format import NO_EPOCH, Format
from decoquant_compile.kernels.state import CacheState
from tests.kernels.cpu.cases import BITS, DTYPES, HEAD_DIMS, Source, Tokens, Writer

STEP = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Relative distance from one number to the next where results are rounded to fewer digits."""

ROUNDING = 2e-6
"""Of float32 sums in another order, relative to what is added up: about log2(256) + 4 roundings."""


def summands(state, tokens):
    """Float64 like `tokens`: the size of what is added up to each of their numbers, which may cancel."""
    sections = state.sections()
    ring = (sections.header[0] + torch.arange(state.slots)) % state.slots
    number = torch.where(sections.epochs == NO_EPOCH, 0, sections.epochs.long())[:, ring]
    row = torch.arange(state.batch)[:, None]
    scale = sections.scales[row, number].transpose(1, 2).double()
    mean = sections.means[row, number].transpose(1, 2).double() if sections.means.shape[1] else torch.zeros_like(scale)
    rotated = ((tokens - mean) * scale).square().sum(-1, keepdim=True).sqrt()
    return tokens.abs() + mean.abs() + rotated / scale.where(scale > 0, 1)


def assert_reads_like_the_oracle(native, state):
    operands = state.buffer, state.batch, state.heads, state.slots
    before = state.buffer.clone()
    expected = reference.dequantise(*operands, state.format)
    got = native.dequantise(*operands, state.format.key())
    assert torch.equal(state.buffer, before)
    assert got.is_contiguous()
    for first, length in ((0, state.slots // 2), (state.slots // 3, 5), (state.slots - 1, 300), (state.slots + 2, 3)):
        start = torch.tensor([first // 2])
        part = native.dequantise_stretch(*operands, first - first // 2, length, state.format.key(), None, start)
        whole = F.pad(got, (0, 0, 0, max(0, first + length - state.slots)))
        assert torch.equal(part.view(torch.uint8), whole[:, :, first : first + length].contiguous().view(torch.uint8))
    if state.format.bits == 16:
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
        return
    assert got.dtype == expected.dtype
    assert torch.equal((got == 0).all(-1), (expected == 0).all(-1))
    size = summands(state, expected.double())
    error = (got.double() - expected.double()).abs()
    # Below the least normal number the distance to the next stays what it is there.
    digits = expected.double().abs().clamp_min(torch.finfo(got.dtype).tiny)
    assert (error <= STEP[got.dtype] * digits + ROUNDING * size).all()


@given(random=st.randoms(use_true_random=False), count=st.integers(0, 5))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_equals_the_oracle(native, random, count):
    writer = Writer(random)
    for _ in range(count):
        writer.write().expected(writer.state)
    assert_reads_like_the_oracle(native, writer.state)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("head_dim", [1, 7, *HEAD_DIMS])
def test_every_format(native, bits, role, head_dim):
    for dtype in DTYPES:
        state = CacheState.empty(Format(role, bits, head_dim, dtype, 4, 8), 2, 2, 129, "cpu")
        tokens = Tokens(Source(Random(0)), 2, 2, head_dim, dtype)
        reference.store(state.buffer, tokens.make(129), torch.arange(129), None, None, 129, 0, 0, state.format)
        assert_reads_like_the_oracle(native, state)
        reference.store(
            state.buffer, tokens.make(70), torch.arange(50, 120), None, None, 129, 61, 0, state.format
        )  # the ring has turned, and some slots are empty
        assert_reads_like_the_oracle(native, state)


@pytest.mark.parametrize("bits", [16, 4])
def test_threads_change_nothing(native, threads, bits):
    state = CacheState.empty(Format("key", bits, 64, torch.float32), 1, 2, 1000, "cpu")
    tokens = Tokens(Source(Random(0)), 1, 2, 64, torch.float32)
    reference.store(state.buffer, tokens.make(900), torch.arange(900), None, None, 1000, 0, 0, state.format)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(native.dequantise(state.buffer, 1, 2, 1000, state.format.key()))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
