"""The interpreter computes what a GPU would."""

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.triton.interpret import interpreted


@triton.jit
def _arithmetic(X, Y, OUT, SUM, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(X + n)
    y = tl.load(Y + n)
    tl.store(OUT + n, x * y + (x + 1.0).to(tl.bfloat16))
    tl.store(SUM, tl.sum(x.to(tl.float32) * y.to(tl.float32)).to(tl.bfloat16))


@triton.jit
def _product(X, Y, OUT, N: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    tl.store(OUT + at, tl.dot(tl.load(X + at), tl.load(Y + at)))


@triton.jit
def _lookup(X, OUT, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(X + n)
    text: tl.constexpr = "{ .reg .b32 t; and.b32 t, $2, 0x77777777; prmt.b32 $0, $3, $4, t; shr.u32 $1, $2, 16; }"
    a, b = tl.inline_asm_elementwise(
        text, "=r,=r,r,n,n", [x, 0x03020100, 0x07060504], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )
    tl.store(OUT + n, a)
    tl.store(OUT + N + n, b)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_bfloat16_is_rounded_to_nearest_even(generator):
    x, y = (torch.randn(256, generator=generator).bfloat16() for _ in range(2))
    out, total = torch.empty_like(x), torch.empty(1, dtype=torch.bfloat16)
    interpreted(_arithmetic)[(1,)](x, y, out, total, N=256)
    assert torch.equal(out, x * y + (x + 1.0))
    torch.testing.assert_close(total, (x.float() * y.float()).sum()[None].bfloat16())


def test_products_of_bfloat16(generator):
    x, y = (torch.randn(32, 32, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(32, 32)
    interpreted(_product)[(1,)](x, y, out, N=32)
    torch.testing.assert_close(out, x.float() @ y.float())


def test_inline_assembly():
    x = torch.tensor([0x76543210, 0x12348F9A, -1, 0], dtype=torch.int64).to(torch.int32)
    out = torch.empty(8, dtype=torch.int32)
    interpreted(_lookup)[(1,)](x, out, N=4)
    nibbles = (x[:, None] >> (4 * torch.arange(4))) & 7
    assert torch.equal(out[:4], (nibbles << (8 * torch.arange(4))).sum(1).int())
    assert torch.equal(out[4:], ((x.long() & 0xFFFFFFFF) >> 16).int())


def test_nothing_stays_patched():
    """The compiler works in the same process, and a kernel is no plain function outside of a launch."""
    x = torch.zeros(4, dtype=torch.bfloat16)
    interpreted(_arithmetic)[(1,)](x, x, x.clone(), torch.empty(1, dtype=torch.bfloat16), N=4)
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        tl.sum(None)
