"""The memory of a dense cache is given back."""

import gc
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


def full_cache():
    """Keys and values of 32 MiB each, all slots but the last filled."""
    return [
        torch.randn(1, HEADS, SLOTS, CHANNELS, dtype=torch.bfloat16).index_fill_(2, torch.tensor([SLOTS - 1]), 0)
        for _ in range(2)
    ]


def decode(step, caches):
    qkv = torch.randn(1, 4 * HEADS, 1, CHANNELS, dtype=torch.bfloat16)
    return step(qkv, *caches, torch.tensor([SLOTS - 1]), torch.ones(1, 1, 1, SLOTS, dtype=torch.bool))


def test_four_bits_take_a_quarter_and_the_dense_storage_is_gone():
    caches = full_cache()
    storages = [weakref.ref(cache.untyped_storage()) for cache in caches]
    before = decoquant_compile.nbytes(caches)
    assert before == decoquant_compile.Bytes(packed=0, dense=64 * MIB)
    torch.compiler.reset()
    with decoquant_compile.enable(bits=4) as session:
        decode(torch.compile(function), caches)
    held = decoquant_compile.nbytes(caches)
    assert held.dense == 0
    assert held.packed <= 0.28 * before.dense
    assert session.report().bytes() == (before.dense, held.packed)
    assert all(storage() is None or storage().nbytes() == 0 for storage in storages)
    states = [weakref.ref(cache._state) for cache in caches]
    del caches
    gc.collect()
    assert [state() for state in states] == [None, None]
    assert session.report().bytes() == (0, 0)


def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


def measure():
    """Print the MiB that a cache adds to the process: dense, packed, and when it is gone."""
    torch.compiler.reset()
    with decoquant_compile.enable(bits=4):
        step = torch.compile(function)
        decode(step, full_cache())  # whatever compiling needs is in use from here on
        start = resident()
        caches = full_cache()
        dense = resident()
        decode(step, caches)
        packed = resident()
        del caches
        gone = resident()
    print(*((now - start) / MIB for now in (dense, packed, gone)))  # noqa: T201


def test_the_process_shrinks():
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    dense, packed, gone = map(float, run.stdout.split())
    assert dense > 48
    assert packed < dense - 32  # 47 less, were nothing else going on
    assert gone < dense - 48


if __name__ == "__main__":
    measure()
