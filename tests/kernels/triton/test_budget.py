"""Builds for GPUs that need not be there: a decode step spills nothing, loops stay within a budget of instructions."""

import functools

import pytest
import torch

from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.triton import launch
from decoquant_compile.kernels.triton.build import TARGETS, Build, size, statistics
from tests.kernels.triton.cases import BITS

TILE = 64
"""Tokens of one turn of the loop over packed tokens."""


def decode_builds(target, bits, head_dim=128, groups=4, queries=1, only=None):
    """The kernels of a decoding step, and of a read."""
    dtype = torch.bfloat16
    forms = [Format(role, bits, head_dim, dtype) for role in ("key", "value")]
    states = [torch.empty(form.layout(1, 2, 4096).nbytes, dtype=torch.uint8) for form in forms]
    query = torch.empty(1, 2 * groups, queries, head_dim, dtype=dtype)
    new = torch.empty(1, 2, queries, head_dim, dtype=dtype)
    mask = torch.empty(1, 1, queries, 4096, dtype=torch.bool)
    build = Build(target, only)
    operands = query, *states, new, new, torch.arange(queries), mask, None, None, 4096, 0, 4096
    launch.attend(*operands, *forms, wrap=build, ptx=target != "gfx942")
    launch.dequantise(states[0], 1, 2, 4096, forms[0], wrap=build, ptx=target != "gfx942")
    return build.kernels


@functools.cache
def built(*args, **kwargs):
    """Statistics of those kernels, by name."""
    return {kernel.metadata.name: statistics(kernel) for kernel in decode_builds(*args, **kwargs)}


def spilling(found):
    return {name: kernel.spills for name, kernel in found.items() if kernel.spills}


def loop_length(found):
    return size(found["split"].loop("IMMA"))


@pytest.mark.parametrize(
    "target", [t if t in ("sm_90", "gfx942") else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS]
)
def test_nothing_spills_at_four_bits(target):
    found = built(target, 4)
    assert set(found) == {"plan", "fold", "split", "exact", "combine", "dequantise"}
    assert spilling(found) == {}


@pytest.mark.parametrize(("bits", "budget"), [(4, 17), (2, 13)])
def test_instructions_per_token(bits, budget):
    """Of a warp, keys and values of one KV head with four query heads: scores, softmax, weighted sums.

    Codes come from shared memory, where asynchronous copies of 16 bytes put them while the tile before was worked on.
    They lie there, as in the cache, so that each thread reads the operands of its own products in whole words and
    unpacks them in registers: `ldmatrix`, which deals out elements that are unpacked already, has no part in that.
    What goes through it are the weights of the softmax, from the result of one product to the operand of the other.
    """
    found = built("sm_90", bits)
    assert found["split"].spills == 0
    assert found["split"].warps == 1
    assert 0 < loop_length(found) <= budget * TILE
    loop = found["split"].loop("IMMA")
    # 64 x 128 x 8 products in instructions of 16 x 8 x 32; for 4 bits twice, once for each half of the codes
    assert loop["IMMA"] == 2 * (TILE * 128 * 8) // (16 * 8 * 32) * (2 if bits == 4 else 1)
    assert loop["LDGSTS.128"] == loop["LDGSTS"] == 2 * (TILE * 128 * bits // 8) // (32 * 16)  # all codes of a tile
    assert loop["LDSM"] > 0


def test_eight_query_heads():
    """Twice the rows of products: no registers to fetch ahead, but none spilled."""
    (found,) = (statistics(kernel) for kernel in decode_builds("sm_90", 4, groups=8, only=("split",)))
    assert found.spills == 0
    assert 0 < size(found.loop("IMMA")) <= 21 * TILE


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 80])
def test_everything_builds(target, bits, head_dim):
    assert spilling(built(target, bits, head_dim)) == {}
    # Sixteen queries fill the registers of NVIDIA: a few words of what attends to exact tokens may spill.
    spilled = spilling(built(target, bits, head_dim, queries=16))
    assert spilled.keys() <= (set() if target == "gfx942" else {"exact"})
    assert max(spilled.values(), default=0) <= 24  # bytes of a thread


def test_bytes_per_token():
    """At most 0.27 of a bfloat16 cache's, codes, gains and parameter sets of both caches of a long context."""
    slots = 32768
    read = 0
    for role in ("key", "value"):
        layout = Format(role, 4, 128, torch.bfloat16).layout(1, 8, slots)
        sections = layout.views(torch.empty(layout.nbytes, dtype=torch.uint8))
        for section in (*sections.planes, sections.gains, sections.epochs):
            read += section.nbytes
    assert read / slots / 8 / (2 * 128 * 2) <= 0.27
