"""Builds for GPUs that are not there tell what the machine code costs."""

import re

import pytest
import torch
import triton
import triton.language as tl

from decoquant_compile.kernels.triton.build import TARGETS, Build, Loop, Statistics, size, statistics


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
        loop = found.loop("v_mfma")
        assert 0 < size(loop) < size(found.instructions)
        # 64 x 64 x 64 products in instructions of m x n x k
        name, count = next((name, count) for name, count in loop.items() if name.startswith("v_mfma"))
        m, n, k = map(int, re.search(r"_(\d+)x(\d+)x(\d+)_", name).groups())
        assert count * m * n * k == 64**3
        return
    loop = found.loop("HMMA")
    assert loop["HMMA"] == 4 * 8 * 4
    assert loop["LDGSTS.128"] > 0
    assert size(loop) == sum(loop.values()) - loop["LDGSTS.128"] > loop["HMMA"]
    assert not found.loop("IMMA")


def test_only_kernels_that_are_asked_for():
    build = Build("sm_90", only=("other",))
    assert build(_product)[(1,)](*[torch.empty(4, 64, 64)] * 3, 4, N=64) is None
    assert build.kernels == []


def test_the_innermost_loop_with_an_instruction_counts():
    loops = (
        Loop(0, 90, {"A": 5, "B": 3}),
        Loop(10, 60, {"A": 4, "B": 1}),
        Loop(20, 30, {"C": 2}),
        Loop(70, 80, {"A": 1}),
    )
    found = Statistics(1, 0, 0, 1, {}, loops)
    assert [found.loop(name) for name in "ABCD"] == [loops[1].instructions, loops[1].instructions, {"C": 2}, {}]


def test_spills_are_seen():
    assert built("sm_90", maxnreg=96).spills > 0
