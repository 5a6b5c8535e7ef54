"""The command line of the coverage table."""

import contextlib
import logging
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Final

import click
import transformers
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from decoquant_compile.command_line import out as out_option
from decoquant_compile.coverage import architectures, report, timing
from decoquant_compile.coverage.cells import ATTENTIONS, BOUNDS, CACHES, OWN, PREFILLS, Cell, measure
from decoquant_compile.coverage.idioms import IDIOMS

_WRITERS: Final = {".json": report.document, ".md": report.markdown}


def _several(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A type for names of `known`, separated by commas."""

    def convert(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return convert


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' talk and our warnings: the reasons are in the table."""
    log, theirs = logging.getLogger("decoquant_compile"), transformers.logging.get_verbosity()
    level = log.level
    transformers.logging.set_verbosity_error()
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        transformers.logging.set_verbosity(theirs)


@click.command(help="Say which attentions of which architectures are rewritten, and why the others are not.")
@click.option(
    "--only",
    type=_several([*IDIOMS, *architectures.names()]),
    default=",".join([*IDIOMS, *architectures.names()]),
    show_default="all idioms and all architectures of transformers",
    metavar="NAME,...",
    help="Architectures as transformers names them (llama, t5:seq2seq) and hand-written idioms (GptFast).",
)
@click.option(
    "--attention", type=_several(ATTENTIONS), default=",".join(ATTENTIONS), show_default=True, metavar="NAME,..."
)
@click.option("--cache", type=_several(CACHES), default=",".join(CACHES), show_default=True, metavar="NAME,...")
@click.option("--prefill", type=_several(PREFILLS), default=",".join(PREFILLS), show_default=True, metavar="NAME,...")
@click.option(
    "--check",
    is_flag=True,
    help="Compare the logits and the likeliest tokens with plain PyTorch's, too, at "
    + " and ".join(f"{bits} bits (up to {bound:g} standard deviations)" for bits, bound in BOUNDS.items())
    + ". The rewritten graphs run node by node.",
)
@click.option(
    "--compiled", is_flag=True, help="With --check: compile the rewritten graphs by Inductor (a minute for each model)."
)
@click.option("--time", "timed", is_flag=True, help="Only measure what share of a compile the matcher takes.")
@click.option(
    "--known",
    type=click.Path(dir_okay=False, exists=True, path_type=pathlib.Path),
    multiple=True,
    metavar="FILE",
    help="Take from the .json of an earlier run what it has of the models asked for; may be given again.",
)
@out_option(f"Write the results as {' or '.join(_WRITERS)}", *_WRITERS)
@_quiet()
def main(
    only: tuple[str, ...],
    attention: tuple[str, ...],
    cache: tuple[str, ...],
    prefill: tuple[str, ...],
    check: bool,
    compiled: bool,
    timed: bool,
    known: tuple[pathlib.Path, ...],
    out: tuple[pathlib.Path, ...],
) -> None:
    """Measure cell after cell, show the table, write the results."""
    if compiled and not check:
        raise click.UsageError("--compiled says how to --check; give both")
    console = Console()
    if timed:
        for growing in (False, True):
            console.print(str(timing.measure(growing=growing)), highlight=False)
        return
    cells: list[Cell] = []
    settings = {"attention": attention, "cache": cache, "prefill": prefill, "check": check, "compiled": compiled}
    earlier: dict[tuple[str, str], list[Cell]] = {}
    for path in known:
        for cell in report.read(path.read_text(encoding="utf-8")):
            earlier.setdefault((cell.subject, cell.attention), []).append(cell)
    jobs = [(name, kind) for name in only for kind in (attention[:1] if name in IDIOMS else attention)]
    bars = (
        *Progress.get_default_columns()[:-1],
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*bars, console=console, transient=True) as progress:
        task = progress.add_task("coverage", total=len(jobs), now="")
        for name, kind in jobs:
            progress.update(task, now=f"{name} {kind}")
            done = earlier.get((name, OWN if name in IDIOMS else kind))
            cells += done or measure(name, kind, cache, prefill, tuple(BOUNDS) if check else (), compiled=compiled)
            for path in out:  # at once: an interrupted run can be gone on with
                path.write_text(_WRITERS[path.suffix](cells, settings), encoding="utf-8")
            progress.advance(task)
    console.print(report.tables(cells))
    for path in out:
        console.print(f"written: {path}")
