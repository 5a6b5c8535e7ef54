"""The main job: Gemma-3-270M generates from a long prompt with a packed KV cache; the 16-bit cache is gone.

Shows what was rewritten, the bytes before and after, the speed beside plain Inductor, the agreement with the model on a
16-bit cache, and the text.
"""

from __future__ import annotations

import gc
import pathlib
import statistics
import time
from dataclasses import dataclass
from typing import Any

import click
import gemma
import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import CompileConfig, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

import decoquant_compile

PROMPT = 3072
POSITIONS = 256
WARM_UP = 4  # tokens whose step may compile


@dataclass
class Run:
    """One arm: its tokens, the seconds of each step, the bytes of its cache and of the process."""

    tokens: torch.Tensor
    seconds: list[float]
    cache: decoquant_compile.Bytes
    resident: int

    @property
    def speed(self) -> float:
        """Tokens per second, from the median step after the graphs are compiled."""
        return 1 / statistics.median(self.seconds[WARM_UP:])


class Clock(BaseStreamer):
    """Advances a progress bar and notes the time of each token."""

    def __init__(self, progress: Progress, label: str, total: int) -> None:
        self.progress, self.task = progress, progress.add_task(label, total=total)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note one token; the first call brings the prompt."""
        if self.times or value.numel() == 1:
            self.progress.advance(self.task)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is buffered."""


def generate(model: PreTrainedModel, prompt: torch.Tensor, tokens: int, progress: Progress, label: str) -> Run:
    """Generate greedily: `generate` prefills eagerly and decodes compiled; the backend is the caller's."""
    compile_config = CompileConfig(backend="inductor", mode=None, fullgraph=False)
    compile_config._compile_all_devices = True  # `generate` compiles on accelerators only, unless told
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + tokens)
    clock = Clock(progress, label, tokens)
    out = model.generate(
        prompt,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        past_key_values=cache,
        compile_config=compile_config,
        streamer=clock,
    )
    steps = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
    gc.collect()
    return Run(out[0, prompt.shape[1] :], steps, decoquant_compile.nbytes(cache), psutil.Process().memory_info().rss)


@torch.no_grad()
def agreement(
    model: PreTrainedModel, ids: torch.Tensor, prompt: int, options: dict[str, Any], progress: Progress
) -> torch.Tensor:
    """KL divergence (nats) to the 16-bit model and top-1 agreement of the next token, at each teacher-forced position.

    Returns:
        [2, positions]: KL(16-bit || packed), and 1 where both rank the same token first.
    """
    positions = ids.shape[1] - prompt
    task = progress.add_task(f"agreement over {positions} teacher-forced positions", total=positions)
    exact = torch.log_softmax(model(ids, logits_to_keep=positions, use_cache=False).logits[0].float(), -1)
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    rows = []
    forward = torch.compile(model.forward, backend=decoquant_compile.decoquant_backend, options=options)
    for at in range(positions):
        token = ids[:, prompt + at : prompt + at + 1]
        packed = torch.log_softmax(forward(token, past_key_values=cache).logits[0, -1].float(), -1)
        row = exact[at]
        rows.append(torch.stack([(row.exp() * (row - packed)).sum(), (row.argmax() == packed.argmax()).float()]))
        progress.advance(task)
    return torch.stack(rows, 1)


def compare(plain: Run, packed: Run) -> Table:
    """Speed and bytes of both arms."""
    table = Table(title="plain Inductor beside decoquant", title_justify="left")
    for column in ("", "16-bit cache, Inductor", "packed cache"):
        table.add_column(column, justify="right" if column else "left")
    mib = lambda n: f"{n / 2**20:.2f} MiB"
    table.add_row("decode", f"{plain.speed:.2f} tokens/s", f"{packed.speed:.2f} tokens/s")
    table.add_row("cache, dense tensors", mib(plain.cache.dense), mib(packed.cache.dense))
    table.add_row("cache, packed state", mib(plain.cache.packed), mib(packed.cache.packed))
    ratio = packed.cache.total / plain.cache.total
    table.add_row("cache in all", mib(plain.cache.total), f"{mib(packed.cache.total)} ({ratio:.3f})")
    table.add_row("resident set of the process", mib(plain.resident), mib(packed.resident))
    return table


def plot(path: pathlib.Path, plain: Run, packed: Run, rows: torch.Tensor) -> None:
    """KL by position, speed and bytes, as one picture."""
    import matplotlib as mpl  # noqa: PLC0415  # only this option needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), width_ratios=(3, 1, 1), layout="constrained")
    left.semilogy(rows[0].clamp_min(1e-7), ".", markersize=3)
    left.axhline(float(rows[0].mean()), color="black", linewidth=1, label=f"mean {rows[0].mean():.4f}")
    left.set(title="KL divergence to the 16-bit model", xlabel="position after the prompt", ylabel="nats")
    left.legend()
    labels = ["16-bit", "packed"]
    middle.bar(labels, [plain.speed, packed.speed])
    middle.set(title="tokens per second")
    right.bar(labels, [plain.cache.total / 2**20, packed.cache.total / 2**20])
    right.set(title="cache, MiB")
    figure.savefig(path, dpi=120)


@click.command(help=__doc__)
@click.option("--bits", type=click.Choice(["16", "8", "5", "4", "3", "2"]), default="4", show_default=True)
@click.option(
    "--tokens", type=click.IntRange(min=WARM_UP + 4), default=64, show_default=True, help="Tokens to generate."
)
@click.option(
    "--prompt-file", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path), help="Text to go on from."
)
@click.option(
    "--plot", "picture", type=click.Path(dir_okay=False, path_type=pathlib.Path), help="Write a picture (.png)."
)
def main(bits: str, tokens: int, prompt_file: pathlib.Path | None, picture: pathlib.Path | None) -> None:
    """Run both arms and show the tables."""
    console = Console()
    with console.status("loading Gemma-3-270M"):
        model, tokenizer = gemma.load()
    text = prompt_file.read_text() if prompt_file else gemma.text()
    ids = tokenizer(text[: 8 * (PROMPT + POSITIONS)], return_tensors="pt").input_ids[:, : PROMPT + POSITIONS]
    if ids.shape[1] < POSITIONS + 8:
        raise click.ClickException(
            f"the prompt has {ids.shape[1]} tokens: at least {POSITIONS + 8} are needed, "
            f"of which the last {POSITIONS} measure agreement"
        )
    prompt = ids.shape[1] - POSITIONS
    options = {"bits": int(bits)}
    with Progress(console=console, transient=True) as progress:
        plain = generate(model, ids[:, :prompt], tokens, progress, "generate, 16-bit cache, plain Inductor")
        with decoquant_compile.enable(**options) as session:
            packed = generate(model, ids[:, :prompt], tokens, progress, f"generate, {bits}-bit cache")
        rows = agreement(model, ids, prompt, options, progress)
    console.print(session.report())
    console.print(compare(plain, packed))
    same = int((plain.tokens == packed.tokens).long().cumprod(0).sum())
    console.print(
        f"{prompt} prompt tokens, {bits} bits; over {rows.shape[1]} teacher-forced positions: mean KL "
        f"{rows[0].mean():.4f} nats, top-1 agreement {rows[1].mean():.3f}; "
        f"greedy text equal for {same} of {tokens} tokens"
    )
    console.rule("text")
    console.print(tokenizer.decode(packed.tokens, skip_special_tokens=True), highlight=False, markup=False)
    if picture is not None:
        plot(picture, plain, packed, rows)
        console.print(f"picture: {picture}")


if __name__ == "__main__":
    main()
