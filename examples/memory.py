"""Bytes that a packed cache gives back: live tensors and the process's resident set, one fresh process for each arm.

The model is tiny but for its cache (layers x batch x length, head size 128, bfloat16), which is filled with random
tokens as an eager prefill would fill it; then a few tokens are decoded, compiled.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import click
import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table

import decoquant_compile

MIB = 2**20
HEADS, HEAD_DIM, STEPS = 2, 128, 4


@torch.no_grad()
def arm(bits: int, layers: int, batch: int, length: int) -> dict[str, float]:
    """Run one arm in this process; 0 bits is plain Inductor. Values in MiB."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2 * length,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(batch, HEADS, HEAD_DIM, torch.bfloat16, torch.device("cpu"))
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tensor[:, :, : length - STEPS].normal_()
        layer.cumulative_length.fill_(length - STEPS)
    before = decoquant_compile.nbytes(cache).total / MIB
    backend, options = ("inductor", None) if bits == 0 else (decoquant_compile.decoquant_backend, {"bits": bits})
    step = torch.compile(model.forward, backend=backend, options=options)
    for _ in range(STEPS):
        step(input_ids=torch.zeros(batch, 1, dtype=torch.long), past_key_values=cache)
    return {
        "before": before,
        "after": decoquant_compile.nbytes(cache).total / MIB,
        "resident": psutil.Process().memory_info().rss / MIB,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


@click.command(help=__doc__)
@click.option("--bits", type=click.Choice(["16", "8", "5", "4", "3", "2"]), default="4", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--length", type=click.IntRange(min=256), default=32768, show_default=True)
@click.option("--arm", "only", type=int, hidden=True, help="Run this arm here and print it as JSON.")
def main(bits: str, layers: int, batch: int, length: int, only: int | None) -> None:
    """Run both arms and show the table."""
    if only is not None:
        click.echo(json.dumps(arm(only, layers, batch, length)))
        return
    rows = {}
    for name, value in (("plain Inductor", "0"), (f"decoquant, {bits} bits", bits)):
        command = [sys.executable, __file__, "--arm", value, "--layers", layers, "--batch", batch, "--length", length]
        done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)  # noqa: S603
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    table = Table(title="MiB")
    for column in ("", "cache before", "cache after", "resident set", "its peak"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.1f}" for key in ("before", "after", "resident", "peak")))
    console = Console()
    console.print(table)
    dense, packed = rows.values()
    saving, freed = dense["after"] - packed["after"], dense["resident"] - packed["resident"]
    console.print(
        f"cache: {packed['after'] / dense['after']:.4f} of the dense one; the resident set is smaller by "
        f"{freed:.1f} MiB, {freed / saving:.3f} of the saving"
    )


if __name__ == "__main__":
    main()
