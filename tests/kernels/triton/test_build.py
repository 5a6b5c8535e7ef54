"""Builds for GPUs that are not there tell what the machine code costs."""

import pytest
import torch
import triton
import triton.language as tl

from decoquant_compile.kernels.triton.build import TARGETS, Build, statistics


@triton.jit
def _product(X, Y, OUT, steps, N: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    total = tl.zeros([N, N], tl.float32)
    for step in tl.range(0, steps):
        total = tl.dot(tl.load(X + step * N * N + at), tl.load(Y + step * N * N + at), total)
    tl.store(OUT + at, total)


def built(target, **options):
    x = torch.empty(4, 64, 64, dtype=torch.float16)
    build = Build(target, **options)
    build(_product)[(1,)](x, x, torch.empty(64, 64), 4, N=64, num_warps=1, num_stages=3)
    return statistics(build.kernels[0])


@pytest.mark.parametrize("target", TARGETS)
def test_statistics(target):
    found = built(target)
    assert found.warps == 1
    assert found.shared > 0
    assert found.spills == 0
    assert found.registers > 64
    if target == "gfx942":
        assert any("mfma" in name for name in found.instructions)
        return
    loop = found.loop("HMMA")
    assert loop["HMMA"] == 4 * 8 * 4
    assert loop["LDGSTS.128"] > 0
    assert sum(loop.values()) > loop["HMMA"]
    assert not found.loop("IMMA")


def test_spills_are_seen():
    assert built("sm_90", maxnreg=96).spills > 0
