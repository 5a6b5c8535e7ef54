"""The operators: registration, fakes, functionalisation, compilation."""

import pytest
import torch

from decoquant_compile.kernels import codec, ops, reference
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState

BATCH, HEADS, SLOTS, HEAD_DIM = 2, 2, 32, 16


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state_of(role, bits, written=20, dtype=torch.float32):
    state = CacheState.empty(Format(role, bits, HEAD_DIM, dtype, 2, 4), BATCH, HEADS, SLOTS, "cpu")
    state.write(normal(BATCH, HEADS, written, HEAD_DIM), torch.arange(written))
    return state


def store_args(state, tokens=3, mask=None, shift=0):
    new, query = normal(BATCH, HEADS, tokens, HEAD_DIM, seed=1), normal(BATCH, 4, tokens, HEAD_DIM, seed=2)
    return (state.buffer, new, torch.arange(20, 20 + tokens), query, mask, SLOTS, shift, 0, state.format.key())


def attend_args(keys, values, tokens=3, mask=None, dtype=torch.float32):
    new = normal(BATCH, HEADS, tokens, HEAD_DIM, seed=1).to(dtype)
    query = normal(BATCH, 4, tokens, HEAD_DIM, seed=2).to(dtype)
    forms = (keys.format.key(), values.format.key())
    return (
        query,
        keys.buffer,
        values.buffer,
        new,
        new,
        torch.arange(20, 20 + tokens),
        mask,
        None,
        None,
        SLOTS,
        0,
        23,
        *forms,
    )


@pytest.mark.parametrize("bits", [16, *codec.CODED_BITS])
@pytest.mark.parametrize("tokens", [1, 3])
def test_opcheck_store(bits, tokens):
    mask = torch.ones(BATCH, 1, 1, 23, dtype=torch.bool)
    torch.library.opcheck(ops.store, store_args(state_of("key", bits), tokens))
    torch.library.opcheck(ops.store, store_args(state_of("value", bits), tokens, mask, shift=1))


@pytest.mark.parametrize("bits", [(16, 16), (4, 3), (5, 2), (8, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_attend(bits, dtype):
    keys, values = state_of("key", bits[0], dtype=dtype), state_of("value", bits[1], dtype=dtype)
    for mask in (None, torch.zeros(1, 1, 3, 23)):
        torch.library.opcheck(ops.attend, attend_args(keys, values, mask=mask, dtype=dtype))
    torch.library.opcheck(ops.attend, (*attend_args(keys, values, dtype=dtype), torch.zeros(4)))


@pytest.mark.parametrize("portable", [False, True])
def test_a_stretch_is_a_part_of_the_whole(portable):
    stretch = ops._stretch if portable else ops.dequantise_stretch
    state = state_of("key", 4)
    whole = reference.dequantise(state.buffer, BATCH, HEADS, SLOTS, state.format)
    for first, length, start in ((3, 11, None), (0, SLOTS, None), (3, 2, 4), (0, 9, SLOTS - 4), (SLOTS, 2, 1)):
        at = first + (start or 0)
        where = None if start is None else torch.tensor([start])
        arguments = (state.buffer, BATCH, HEADS, SLOTS, first, length, state.format.key(), None, where)
        part = stretch(*arguments)
        expected = torch.nn.functional.pad(whole, (0, 0, 0, length))[:, :, min(at, SLOTS) :][:, :, :length]
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
        assert part.is_contiguous()
        if not portable:
            torch.library.opcheck(ops.dequantise_stretch, arguments)
    with pytest.raises(ValueError, match="first must be at least 0, got -1"):
        stretch(state.buffer, BATCH, HEADS, SLOTS, -1, 3, state.format.key())


@pytest.mark.parametrize("bits", [16, *codec.CODED_BITS])
def test_opcheck_dequantise(bits):
    state = state_of("key", bits, dtype=torch.bfloat16)
    torch.library.opcheck(ops.dequantise, (state.buffer, BATCH, HEADS, SLOTS, state.format.key()))


def test_operators_follow_the_reference():
    keys, values = state_of("key", 4), state_of("value", 3)
    expected = keys.clone()
    args = store_args(keys)
    ops.store(*args)
    reference.store(expected.buffer, *args[1:-1], expected.format)
    dense = reference.dequantise(expected.buffer, BATCH, HEADS, SLOTS, keys.format)
    torch.testing.assert_close(ops.dequantise(keys.buffer, BATCH, HEADS, SLOTS, keys.format.key()), dense)
    args = attend_args(keys, values)
    for sink in (None, normal(4)):
        expected = reference.attend(*args[:-2], keys.format, values.format, sink)
        torch.testing.assert_close(ops.attend(*args, sink), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_store_and_attend(dynamic):
    """One graph writes and reads; order and mutation survive Inductor."""

    def step(query, key_buffer, value_buffer, key, value, positions, length):
        ops.store(key_buffer, key, positions, query, None, SLOTS, 0, 0, key_format)
        ops.store(value_buffer, value, positions, None, None, SLOTS, 0, 0, value_format)
        out = ops.attend(
            query,
            key_buffer,
            value_buffer,
            key,
            value,
            positions,
            None,
            None,
            None,
            SLOTS,
            0,
            length,
            key_format,
            value_format,
        )
        return out * 2

    keys, values = state_of("key", 4), state_of("value", 3)
    key_format, value_format = keys.format.key(), values.format.key()
    eager = keys.clone(), values.clone()
    compiled = torch.compile(step, dynamic=dynamic, fullgraph=True)
    for tokens, at in ((1, 20), (3, 21), (2, 24)):
        key, value = (normal(BATCH, HEADS, tokens, HEAD_DIM, seed=seed) for seed in (3, 4))
        query = normal(BATCH, 4, tokens, HEAD_DIM, seed=5)
        args = key, value, torch.arange(at, at + tokens), at + tokens
        got = compiled(query, keys.buffer, values.buffer, *args)
        expected = step(query, eager[0].buffer, eager[1].buffer, *args)
        torch.testing.assert_close(got, expected)
        assert torch.equal(keys.buffer, eager[0].buffer)
        assert torch.equal(values.buffer, eager[1].buffer)


def test_backward_through_the_operators_is_not_silent():
    keys, values = state_of("key", 4), state_of("value", 4)
    query, *rest = attend_args(keys, values)
    out = ops.attend(query.requires_grad_(), *rest)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        out.sum().backward()


def test_wrong_format_keys_are_named():
    state = state_of("key", 4)
    with pytest.raises(ValueError, match="expected a format key such as"):
        ops.dequantise(state.buffer, BATCH, HEADS, SLOTS, "nonsense")
    with pytest.raises(ValueError, match="a state buffer of this format"):
        ops.dequantise(state.buffer, BATCH, HEADS, SLOTS, Format("key", 8, HEAD_DIM, torch.float32).key())


def test_fakes_need_no_data():
    state = torch.empty(10, dtype=torch.uint8, device="meta")
    query = torch.empty(2, 4, 3, 16, dtype=torch.bfloat16, device="meta")
    forms = Format("key", 4, 16, torch.bfloat16).key(), Format("value", 4, 8, torch.bfloat16).key()
    out = ops.attend(query, state, state, query, query, query, None, None, None, 64, 0, 64, *forms)
    assert (out.device.type, out.shape, out.dtype) == ("meta", (2, 4, 3, 8), torch.bfloat16)
    assert out.is_contiguous()
    dense = ops.dequantise(state, 2, 3, 64, forms[1])
    assert (dense.device.type, dense.shape, dense.dtype) == ("meta", (2, 3, 64, 8), torch.bfloat16)
    ops.store(state, query, query, None, None, 64, 0, 0, forms[0])
