"""Inductor's cache on disk serves another process, and keeps formats apart."""

import json
import os
import subprocess
import sys

import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

import decoquant_compile

HEADS, SLOTS, CHANNELS = 2, 128, 16


def function(qkv, keys, values, positions, mask):
    q, k, v = qkv.split((2 * HEADS, HEADS, HEADS), 1)
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


def run(bits):
    """Fill a cache in two chunks; print what Inductor's cache did, and a sum over the results."""
    generator = torch.Generator().manual_seed(0)
    caches = [torch.zeros(1, HEADS, SLOTS, CHANNELS) for _ in range(2)]
    results = []
    with decoquant_compile.enable(bits=bits) as session:
        compiled = torch.compile(function, dynamic=False)
        for start, tokens in ((0, 100), (100, 5), (105, 5)):
            qkv = torch.randn(1, 4 * HEADS, tokens, CHANNELS, generator=generator)
            positions = torch.arange(start, start + tokens)
            mask = (torch.arange(SLOTS) <= positions[:, None])[None, None]
            results.append(compiled(qkv, *caches, positions, mask))
    assert session.report().rewritten == len(list(session.report().findings)) > 0
    found = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}
    print(json.dumps({**found, "result": [result.flatten().tolist() for result in results]}))  # noqa: T201


def in_another_process(bits, folder):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, __file__, str(bits)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_hits_the_cache_and_another_format_misses_it(tmp_path):
    first = in_another_process(4, tmp_path)
    second = in_another_process(4, tmp_path)
    other = in_another_process(3, tmp_path)
    assert first["miss"] >= 2
    assert first["bypass"] == second["bypass"] == other["bypass"] == 0
    assert (second["hit"], second["miss"]) == (first["hit"] + first["miss"], 0)
    assert second["result"] == first["result"]
    assert other["miss"] == first["miss"]
    assert other["result"] != first["result"]


if __name__ == "__main__":
    run(int(sys.argv[1]))
