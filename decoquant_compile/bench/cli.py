"""The command line of the benchmark."""

import itertools
import json
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Final, TypeVar

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from decoquant_compile.bench import attention, cuda, decode, machine, memory, prefill, report
from decoquant_compile.bench.timing import Row
from decoquant_compile.command_line import out as out_option

_BITS: Final = ("16", "8", "5", "4", "3", "2")
_T = TypeVar("_T")


def _several(item: Callable[[str], _T]) -> Callable[[str], tuple[_T, ...]]:
    """A type for values of one type separated by commas; a repeated one counts once."""
    return lambda text: tuple(dict.fromkeys(item(part.strip()) for part in text.split(",")))


def _choice(names: Collection[str]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in names:
            raise click.BadParameter(f"{text!r} is not one of {', '.join(names)}")
        return text

    return convert


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise click.BadParameter(f"{text!r}: expected an integer from 1 to 9999")
    return int(text)


def _context(text: str) -> int:
    """A number of tokens; 32k is 32768."""
    found = re.fullmatch(r"(\d{1,9})(k?)", text.lower())
    tokens = int(found[1]) * (1024 if found[2] else 1) if found else 0
    if tokens < 2:
        raise click.BadParameter(f"{text!r} is no context length: expected at least 2 tokens, such as 512 or 32k")
    return tokens


def _shape(text: str) -> attention.Shape:
    """A shape by name or by its sizes."""
    if text in attention.SHAPES:
        return attention.SHAPES[text]
    if not re.fullmatch(r"([1-9]\d{0,5}x){3}[1-9]\d{0,5}", text):
        raise click.BadParameter(
            f"{text!r} is no shape: expected {', '.join(attention.SHAPES)}, or BATCHxQUERY_HEADSxHEADSxHEAD_DIM "
            "such as 1x32x8x128"
        )
    batch, query_heads, heads, head_dim = map(int, text.split("x"))
    if query_heads % heads:
        raise click.BadParameter(f"{text!r}: {query_heads} query heads are no multiple of {heads} KV heads")
    return attention.Shape(text, batch, query_heads, heads, head_dim)


_OUT: Final = out_option("Write the results as .json or draw them as .png", ".json", ".png")
_THREADS: Final = click.option("--threads", type=_several(_positive), default="1", show_default=True, metavar="N,...")
_MODELS: Final = click.option(
    "--shape",
    "shapes",
    type=_several(_choice(decode.MODELS)),
    default="llama1b,gemma",
    show_default=True,
    metavar="MODEL,...",
    help=f"Of {', '.join(decode.MODELS)}.",
)


def _contexts(default: str, text: str = "Tokens in the cache.") -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--context",
        "contexts",
        type=_several(_context),
        default=default,
        show_default=True,
        metavar="N,...",
        help=text,
    )


def _bits(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--bits",
        type=_several(_choice(_BITS)),
        default=default,
        show_default=True,
        metavar="BITS,...",
        help=f"Widths of the packed caches, of {', '.join(_BITS)}.",
    )


def _arms(families: Mapping[str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--arms",
        type=_several(_choice(families)),
        default=",".join(families),
        show_default=True,
        metavar="ARM,...",
        help="; ".join(f"{name}: {text}" for name, text in families.items()) + ".",
    )


class _Run:
    """Measures point by point, shows each table as soon as it is there, and writes the results at the end."""

    def __init__(self, benchmark: report.Benchmark, settings: dict[str, Any], out: Sequence[pathlib.Path]) -> None:
        self.benchmark, self.settings, self.out = benchmark, settings, out
        self.machine = machine.describe()
        self.console = Console()
        self.huge = 0

    def __call__(self, points: Sequence[Callable[[Callable[[str], object]], list[Row]]]) -> None:
        self.console.print(machine.summary(self.machine), highlight=False)
        rows: list[Row] = []
        columns = (
            SpinnerColumn(),
            *Progress.get_default_columns()[:-1],
            TimeElapsedColumn(),
            TextColumn("{task.fields[now]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(self.benchmark, total=len(points), now="")

            def tell(now: str) -> None:
                self.huge = max(self.huge, memory.huge_bytes())
                progress.update(task, now=now)

            try:
                for point in points:
                    measured = point(tell)
                    rows += measured
                    for table in report.tables(self.benchmark, measured):
                        progress.console.print(table)
                    progress.advance(task)
            finally:  # also what an interrupted run has measured
                self._write(rows)
        self.console.print(f"at most {self.huge / 2**30:.2f} GiB of this process stood in 2 MB pages", highlight=False)
        for path in self.out:
            self.console.print(f"written: {path}")

    def _write(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        measured = report.document(self.benchmark, self.machine | {"huge_bytes": self.huge}, self.settings, rows)
        for path in self.out:
            report.write(path, measured, rows)


def _points(
    shapes: Sequence[str],
    contexts: Sequence[int],
    measure: Callable[[Any, str, int, Callable[[str], object]], list[Row]],
) -> list[Callable[[Callable[[str], object]], list[Row]]]:
    """What `measure` does with each model, by its name, at each context length."""
    models: dict[str, Any] = {}  # one at a time: the next shape displaces it

    def point(shape: str, context: int, tell: Callable[[str], object]) -> list[Row]:
        if shape not in models:
            tell(f"loading {shape}")
            models.clear()
            models[shape] = decode.load(shape)
        return measure(models[shape], shape, context, tell)

    return [partial(point, shape, context) for shape, context in itertools.product(shapes, contexts)]


@click.group(help="Measure decoquant-compile beside PyTorch on this machine.")
def main() -> None:
    """Hold the commands."""


@main.command("attention", help=f"{attention.__doc__}\n\nOn a GPU: {cuda.__doc__}")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="What to measure on; threads, pages and ring concern the CPU alone.",
)  # fmt: skip
@click.option(
    "--shape",
    "shapes",
    type=_several(_shape),
    metavar="SHAPE,...",
    help=f"Of {', '.join(attention.SHAPES)}, or BATCHxQUERY_HEADSxHEADSxHEAD_DIM.  [default: llama8b; on a GPU with "
    "batches of 1, 8 and 32]",
)
@click.option(
    "--context", "contexts", type=_several(_context), metavar="N,...",
    help="Tokens in the cache.  [default: 512,4k,32k; on a GPU 4k,32k,128k]",
)  # fmt: skip
@_bits(",".join(_BITS))
@_THREADS
@_arms(attention.FAMILIES)
@click.option("--rounds", type=click.IntRange(min=3), default=15, show_default=True, help="Timed calls of each arm.")
@_OUT
@click.option(
    "--pages", type=click.Choice(["huge", "default"]), default="huge", show_default=True,
    help="Pages of torch's caches: 2 MB, or as torch allocates them. Packed caches always ask for 2 MB.",
)  # fmt: skip
@click.option(
    "--ring", type=click.IntRange(min=1), default=768, show_default=True,
    help="MiB of caches that arms go through before they come back to the first.",
)  # fmt: skip
def attention_command(
    device: str,
    shapes: tuple[attention.Shape, ...] | None,
    contexts: tuple[int, ...] | None,
    bits: tuple[str, ...],
    threads: tuple[int, ...],
    arms: tuple[str, ...],
    rounds: int,
    pages: memory.Pages,
    ring: int,
    out: tuple[pathlib.Path, ...],
) -> None:
    """One attention."""
    measure = attention.measure
    if device == "cuda":
        try:
            cuda.require()
        except cuda.NoDeviceError as error:
            raise click.UsageError(str(error)) from error
        measure = cuda.measure
    if shapes is None:
        shapes = tuple(map(_shape, ("1x32x8x128", "8x32x8x128", "32x32x8x128") if device == "cuda" else ("llama8b",)))
    if contexts is None:
        contexts = tuple(map(_context, ("4k", "32k", "128k") if device == "cuda" else ("512", "4k", "32k")))
    settings = attention.Settings(tuple(map(int, bits)), arms, threads, rounds, ring * 2**20, pages)
    described = {"device": device, "shapes": [asdict(shape) for shape in shapes], "contexts": contexts}
    run = _Run("attention", asdict(settings) | described, out)
    points = itertools.product(shapes, contexts)
    run([partial(measure, shape, context, settings) for shape, context in points])


@main.command("roofline")
@click.option(
    "--shape",
    type=_shape,
    default="llama8b",
    show_default=True,
    help=f"Of {', '.join(attention.SHAPES)}, or BATCHxQUERY_HEADSxHEADSxHEAD_DIM.",
)
@_bits(",".join(_BITS[1:]))
@out_option("Write the results as .json or as a page .md", ".json", ".md")
def roofline_command(shape: attention.Shape, bits: tuple[str, ...], out: tuple[pathlib.Path, ...]) -> None:
    """Predict what share of a GPU's bandwidth the decode kernel can use, from its machine code; no GPU is needed.

    Where one of the GPUs is there, what it reaches is measured beside it, with the batch of the shape, over 32k tokens.
    """
    try:
        from decoquant_compile.bench import roofline  # noqa: PLC0415  # Triton is optional
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
        raise click.UsageError("the roofline needs triton: pip install 'decoquant-compile[triton]'") from missing
    if "16" in bits:
        raise click.BadParameter("'16': a cache of 16 bits has no codes", param_hint="--bits")
    console = Console()
    with console.status("") as status:
        points = roofline.run(shape, tuple(map(int, bits)), status.update)
    for table in roofline.tables(points):
        console.print(table)
    for path in out:
        roofline.write(path, points, shape)
        console.print(f"written: {path}")


@main.command("decode", help=decode.__doc__)
@_MODELS
@_contexts("512,4k,32k")
@_bits("4")
@_THREADS
@_arms(decode.ARMS)
@click.option("--rounds", type=click.IntRange(min=3), default=9, show_default=True, help="Timed steps of each arm.")
@_OUT
@click.option("--memory", "resident", is_flag=True, help="Run each arm in a process of its own for its resident set.")
def decode_command(
    shapes: tuple[str, ...],
    contexts: tuple[int, ...],
    bits: tuple[str, ...],
    threads: tuple[int, ...],
    arms: tuple[str, ...],
    rounds: int,
    resident: bool,
    out: tuple[pathlib.Path, ...],
) -> None:
    """Whole steps."""
    settings = decode.Settings(tuple(map(int, bits)), arms, threads, rounds, resident)
    run = _Run("decode", asdict(settings) | {"shapes": shapes, "contexts": contexts}, out)

    def measure(model: Any, shape: str, context: int, tell: Callable[[str], object]) -> list[Row]:
        rows = decode.measure(model, shape, context, settings, tell)
        if resident:
            decode.measure_resident(rows, tell)
        return rows

    run(_points(shapes, contexts, measure))


@main.command("prefill", help=prefill.__doc__)
@_MODELS
@_contexts("512,2k", "Tokens of the prompt.")
@_bits("4")
@_THREADS
@click.option("--rounds", type=click.IntRange(min=3), default=3, show_default=True, help="Timed prefills of each arm.")
@_OUT
def prefill_command(
    shapes: tuple[str, ...],
    contexts: tuple[int, ...],
    bits: tuple[str, ...],
    threads: tuple[int, ...],
    rounds: int,
    out: tuple[pathlib.Path, ...],
) -> None:
    """Whole prompts."""
    settings = prefill.Settings(tuple(map(int, bits)), threads, rounds)
    run = _Run("prefill", asdict(settings) | {"shapes": shapes, "contexts": contexts}, out)

    def measure(model: Any, shape: str, context: int, tell: Callable[[str], object]) -> list[Row]:
        return prefill.measure(model, shape, context, settings, tell)

    run(_points(shapes, contexts, measure))


@main.command("resident", hidden=True)
@click.argument("shape", type=click.Choice(list(decode.MODELS)))
@click.argument("context", type=int)
@click.argument("arm")
@click.argument("threads", type=int)
def resident_command(shape: str, context: int, arm: str, threads: int) -> None:
    """One arm of `decode` in this process: its resident set, as JSON."""
    click.echo(json.dumps(decode.resident(shape, context, arm, threads)))
