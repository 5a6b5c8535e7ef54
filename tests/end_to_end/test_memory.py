"""The memory of a dense cache is given back."""

import gc
import json
import os
import subprocess
import sys
import weakref

import psutil
import torch
from torch.nn import functional as F

import decoquant_compile

MIB = 2**20
HEADS, SLOTS, CHANNELS = 8, 16384, 128


def function(qkv, keys, values, positions, mask):
    q, k, v = qkv.split((2 * HEADS, HEADS, HEADS), 1)
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def cache(slots):
    """Keys and values, all slots but the last filled; 32 MiB each with `SLOTS`."""
    shape = (1, HEADS, slots, CHANNELS)
    return [torch.randn(shape, dtype=torch.bfloat16).index_fill_(2, torch.tensor([slots - 1]), 0) for _ in range(2)]


def decode(step, tensors):
    slots = tensors[0].shape[2]
    qkv = torch.randn(1, 4 * HEADS, 1, CHANNELS, dtype=torch.bfloat16)
    step(qkv, *tensors, torch.tensor([slots - 1]), torch.ones(1, 1, 1, slots, dtype=torch.bool))


def measure():
    """The life of a cache: bytes, and what it adds to the process, when it is dense, packed and gone."""

    def resident():
        gc.collect()
        return psutil.Process().memory_info().rss - start

    start = 0
    with decoquant_compile.enable(bits=4) as session:
        step = torch.compile(function)
        for slots in (256, 512):  # the second graph is for any number of slots; compiling takes memory of its own
            decode(step, cache(slots))
        graphs = len(session.report().graphs)
        start = resident()
        tensors = cache(SLOTS)
        dense = resident()
        before = decoquant_compile.nbytes(tensors)
        decode(step, tensors)
        packed = resident()
        after = decoquant_compile.nbytes(tensors)
        reported = session.report().bytes()
        states = [weakref.ref(tensor._state) for tensor in tensors]
        assert len(session.report().graphs) == graphs
        del tensors
        gone = resident()
    return {
        "resident": [dense, packed, gone],
        "before": [before.dense, before.packed],
        "after": [after.dense, after.packed],
        "reported": reported,
        "left": sum(state() is not None for state in states),
        "reported at the end": session.report().bytes(),
    }


def test_at_4_bits_the_cache_takes_little_more_than_a_quarter():
    # Else glibc keeps freed blocks of this size for itself.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    whole = 64 * MIB
    assert found["before"] == [whole, 0]
    dense, packed = found["after"]
    assert dense == 0
    assert 0.25 * whole < packed <= 0.28 * whole
    assert found["reported"] == [whole, packed]
    slack = whole / 8
    for name, expected, got in zip(("dense", "packed", "gone"), (whole, packed, 0), found["resident"], strict=True):
        assert abs(got - expected) < slack, (name, got / MIB)
    assert found["left"] == 0
    assert found["reported at the end"] == [0, 0]


if __name__ == "__main__":
    print(json.dumps(measure()))  # noqa: T201
