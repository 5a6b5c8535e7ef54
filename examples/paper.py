"""What the DecoQuant paper (arXiv 2405.12591) shows, in kind, on the real Gemma-3-270M.

Each part stands for a table or figure of the paper: accuracy and perplexity on a quantised cache (table2), ranges of
the values (table4, with figure 1), errors of the local tensors (figure4), of other splits (figure5), bytes and latency
against length (figure6). `--save` and `--load` are its "offline" use: a prompt is packed once and read by any later
process. Numbers are of this model and machine, so only their order compares with the paper's.
"""

from __future__ import annotations

import functools
import hashlib
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import gemma
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import decoquant_compile
from decoquant_compile.bench.decode import static_cache
from decoquant_compile.kernels import codec, mpo
from decoquant_compile.quality.emulate import Emulation, emulated
from decoquant_compile.quality.text import technical, windows

SINKS, WINDOW = 4, 64
AMORTISED = 8192  # tokens over which the overhead of a stored cache is spread in the tables
ROOM = 64  # slots of a saved cache beyond its prompt
WARM_UP = 5  # steps that may compile

# Groups of channels at the small sites; the paper gives no shape for more than two.
SITES = {2: (16,), 3: (4, 16), 4: (4, 4, 16)}

console = Console()


@dataclass(frozen=True)
class Setting:
    """What the parts measure."""

    windows: int
    prompt: int
    continuation: int
    layers: int
    lengths: tuple[int, ...]
    steps: int


@dataclass(frozen=True)
class Part:
    """A table or figure: what is printed, and how it is drawn."""

    table: Table
    note: str
    draw: Callable[[Any], None]


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    return table


# Quantisers: what a cache tensor [1, heads, tokens, head_dim] reads as after it was stored

Quantiser = Callable[[Tensor, "Tensor | None", codec.Role], Tensor]
"""The second argument: the queries of keys, by KV head, ``[1, heads, group, tokens, head_dim]``."""


def as_matrix(x: Tensor) -> Tensor:
    """The paper's matrix ``[tokens, heads * head_dim]`` of one layer's keys or values."""
    return x[0].transpose(0, 1).flatten(1)


def as_cache(matrix: Tensor, like: Tensor) -> Tensor:
    """Inverse of `as_matrix`."""
    return matrix.unflatten(1, (like.shape[1], -1)).transpose(0, 1)[None]


def round_to_nearest(bits: int) -> Quantiser:
    """One scale per token over all channels."""
    return lambda x, _query, _role: as_cache(mpo.fake_quantise(as_matrix(x), bits, -1), x)


def literal(bits: int, groups: Sequence[int] = SITES[2]) -> Quantiser:
    """The paper's cache variant: the large tensor quantised with one scale per token, the small one in 16 bits."""

    def quantise(x: Tensor, _query: Tensor | None, _role: codec.Role) -> Tensor:
        matrix = as_matrix(x)
        large, *small = mpo.decompose(matrix, mpo.cache_shape(*matrix.shape, groups))
        return as_cache(mpo.reconstruct([quantised_large(large, bits), *(t.half().float() for t in small)]), x)

    return quantise


def quantised_large(tensor: Tensor, bits: int) -> Tensor:
    """``[1, tokens, channels, bond]`` with one scale per token."""
    return mpo.fake_quantise(tensor, bits, (0, 2, 3))


def quantised_small(tensor: Tensor, bits: int) -> Tensor:
    """``[bond, 1, group, bond]`` with one scale per row of the left bond."""
    return mpo.fake_quantise(tensor, bits, (1, 2, 3))


def packed(bits: int) -> Quantiser:
    """This package's codec, fitted on the tokens it stores."""

    def quantise(x: Tensor, query: Tensor | None, role: codec.Role) -> Tensor:
        weight = None if query is None else codec.weights(query.square().mean((2, 3)))
        fitted = codec.fit(x.mean(2), x.var(2, correction=0), weight, role=role)
        parameters = codec.Parameters(*(p[:, :, None] for p in fitted))
        weight = None if weight is None else weight[:, :, None]
        codes, gain = codec.encode(x, parameters, weight, role=role, bits=bits)
        return codec.decode(codec.lookup(codes, bits), gain, parameters)

    return quantise


@dataclass(frozen=True)
class Stored:
    """A scheme of `decoquant_compile.quality.emulate`: the prompt is stored, what follows it stays exact.

    Attributes:
        quantise: what the prompt reads as.
        windowed: whether its first tokens and a recent window stay exact too, as in this package's cache.
    """

    quantise: Quantiser
    windowed: bool

    @property
    def sinks(self) -> int:
        """Tokens at the start that stay exact."""
        return SINKS if self.windowed else 0

    def stored(self, x: Tensor, grouped: Tensor | None, role: codec.Role, prompt: int) -> Tensor:
        """What comes back of each token."""
        out = x.clone()
        queries = None if grouped is None else grouped[:, :, :, :prompt]
        out[:, :, :prompt] = self.quantise(x[:, :, :prompt], queries, role)
        return out

    def exact(self, _role: codec.Role, length: int, prompt: int) -> Tensor:
        """For each query, the first of the newest tokens that it sees exactly."""
        recent = torch.arange(length) + 1 - WINDOW if self.windowed else torch.full((length,), prompt)
        return recent.clamp(0, prompt)


@dataclass(frozen=True)
class Study:
    """The model, the text and what was captured of it, each made when a part first needs it."""

    setting: Setting

    @functools.cached_property
    def loaded(self) -> tuple[PreTrainedModel, Any]:
        """The model in float32 and its tokenizer."""
        return gemma.load(torch.float32)

    @functools.cached_property
    def ids(self) -> Tensor:
        """Windows of real text, ``[windows, prompt + continuation]``."""
        length = self.setting.prompt + self.setting.continuation
        try:
            return windows(technical(), self.loaded[1], self.setting.windows, length)
        except ValueError as error:
            raise click.ClickException(str(error)) from error

    @functools.cached_property
    def matrices(self) -> list[tuple[int, str, Tensor]]:
        """(layer, "K" or "V", matrix ``[tokens, channels]``) of the first prompt, in evenly spread layers."""
        model = self.loaded[0]
        seen: list[Tensor] = []

        def record(x: Tensor, _query: Tensor | None, _role: codec.Role) -> Tensor:
            seen.append(as_matrix(x))
            return x

        prompt = self.setting.prompt
        with emulated(model, Emulation(Stored(record, windowed=False), prompt), otherwise="sdpa"):
            model(self.ids[:1, :prompt], use_cache=False, logits_to_keep=1)
        layers = torch.linspace(0, len(seen) // 2 - 1, self.setting.layers).round().int().unique().tolist()
        return [(layer, name, seen[2 * layer + at]) for layer in layers for at, name in enumerate("KV")]


# Table 2


def table2(study: Study) -> Part:
    """Accuracy and perplexity of a continuation that is scored on the quantised cache of its prompt."""
    setting, (model, _) = study.setting, study.loaded
    head_dim, channels = model.config.head_dim, model.config.head_dim * model.config.num_key_value_heads
    amortised = {
        "RTN": 16 / channels,
        "DecoQuant, as published": 16 / channels + 16 * 16**2 / (channels * AMORTISED),
        "our codec": 16 / head_dim + 32 / AMORTISED,
        "our codec, 4 sinks, window 64": 16 / head_dim + (32 + 16 * (SINKS + WINDOW)) / AMORTISED,
    }
    make: dict[str, Callable[[int], Quantiser]] = dict(
        zip(amortised, (round_to_nearest, literal, packed, packed), strict=True)
    )
    arms: list[tuple[str, int, Quantiser]] = [("16-bit", 16, lambda x, _query, _role: x)]
    arms += [(name, bits, make[name](bits)) for bits in (8, 4, 2) for name in make]
    table = new_table(
        f"Table 2: {setting.continuation} tokens scored on the cache of {setting.prompt}, {setting.windows} windows",
        *("method", "W-A", f"bits at {AMORTISED}", "last-token accuracy", "perplexity"),
    )
    scores: dict[tuple[str, int], float] = {}
    for name, bits, quantise in track(arms, "table2", console=console, transient=True):
        hits, losses = [], []
        scheme = Stored(quantise, windowed="sinks" in name)
        with emulated(model, Emulation(scheme, setting.prompt), otherwise="sdpa"):
            for window in study.ids:
                logits = model(window[None], use_cache=False, logits_to_keep=setting.continuation + 1).logits[0, :-1]
                target = window[setting.prompt :]
                hits.append((logits.argmax(-1) == target).float())
                losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        hit, loss = torch.cat(hits), torch.cat(losses)
        scores[name, bits] = math.exp(loss.mean())
        stored = f"{bits + amortised.get(name, 0):.2f}"
        error = float(hit.std() / len(hit) ** 0.5)
        table.add_row(name, f"16-{bits}", stored, f"{hit.mean():.3f} ± {error:.3f}", f"{scores[name, bits]:.2f}")

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name in make:
            axes.plot([8, 4, 2], [scores[name, bits] for bits in (8, 4, 2)], "o-", label=name)
        axes.axhline(scores["16-bit", 16], color="black", linewidth=1, label="16-bit")
        axes.set(xlabel="bits of a code", ylabel="perplexity", yscale="log", xticks=[2, 4, 8])
        axes.legend()

    note = (
        "Every token of the continuation counts as the last one of what stands before it; the paper scores one token "
        "of each LAMBADA passage, in a single pass that reads no cache. Standard errors are over tokens."
    )
    return Part(table, note, draw)


# Table 4 and figure 1


def table4(study: Study) -> Part:
    """How wide the values of keys, values and their local tensors spread."""
    table = new_table(
        f"Table 4: interquartile range and crest factor, {study.setting.prompt} tokens",
        *("matrix", "IQR", "T_L", "T_S", "crest factor", "of T_L", "of T_S"),
    )

    def spread(x: Tensor) -> float:
        low, high = torch.quantile(x.flatten(), torch.tensor([0.25, 0.75]))
        return float(high - low)

    def crest(x: Tensor) -> float:
        """Mean over the rows that share a scale."""
        x = x[x.any(-1)]
        return float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())

    rows: list[tuple[str, list[float]]] = []
    shown: dict[str, list[Tensor]] = {}
    for layer, name, matrix in study.matrices:
        large, small = mpo.decompose(matrix, mpo.cache_shape(*matrix.shape))
        parts = [matrix, large.flatten(2)[0], small.flatten(1)]
        shown[f"layer {layer + 1} {name}"] = parts
        rows.append((f"layer {layer + 1} {name}", [*map(spread, parts), *map(crest, parts)]))
    for name, values in rows:
        table.add_row(name, *(f"{value:.3f}" for value in values))
    for name in "KV":
        mean = [statistics.mean(column) for column in zip(*(v for n, v in rows if n.endswith(name)), strict=True)]
        table.add_row(f"mean {name}", *(f"{value:.3f}" for value in mean))

    layers = sorted({layer + 1 for layer, _, _ in study.matrices})

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        middle = list(shown)[len(shown) // 4 * 2]
        left.boxplot([x.flatten() / x.square().mean().sqrt() for x in shown[middle]], whis=(0, 100))
        left.set(title=f"values over their rms, {middle}", yscale="symlog", xticks=[1, 2, 3])
        left.set_xticklabels(["matrix", "T_L", "T_S"])
        for name in "KV":
            mine = [values for label, values in rows if label.endswith(name)]
            for at, tensor in ((3, name), (4, f"T_L of {name}")):
                right.plot(layers, [values[at] for values in mine], "o-" if at == 3 else "o--", label=tensor)
        right.set(title="crest factor of a token, max / rms", xlabel="layer", xticks=layers)
        right.legend()

    note = (
        "A range says nothing by itself: the split sqrt(S) makes it narrow, and the scale of a token undoes that. What "
        "a quantiser with one scale per token sees is the crest factor, and it falls far less than the range."
    )
    return Part(table, note, draw)


# Figures 4 and 5


def relative_error(got: Tensor, matrix: Tensor) -> float:
    return float((got - matrix).norm() / matrix.norm())


def error_table(title: str, rows: dict[str, dict[int, float]], share: dict[str, float]) -> Table:
    """Errors by method and bits, with the share of 16-bit storage at 4 bits."""
    widths = list(next(iter(rows.values())))
    table = new_table(title, "method", *(f"{bits} bits" for bits in widths), "bytes at 4 bits / 16-bit")
    for name, errors in rows.items():
        table.add_row(name, *(f"{errors[bits]:.3f}" for bits in widths), f"{share[name]:.3f}")
    return table


def draw_errors(figure: Any, rows: dict[str, dict[int, float]]) -> None:
    axes = figure.subplots()
    for name, errors in rows.items():
        axes.plot(list(errors), list(errors.values()), "o-", label=name)
    axes.set(xlabel="bits", ylabel="relative error", xticks=list(next(iter(rows.values()))))
    axes.legend()


def share_of_storage(tokens: int, channels: int, small: int, *, both: bool) -> float:
    """Bytes over those of 16 bits: 4-bit codes, one 16-bit scale per token, `small` elements of other tensors."""
    return (tokens * channels * 4 + tokens * 16 + small * (4 if both else 16)) / (tokens * channels * 16)


Method = Callable[[Tensor], Callable[[int], Tensor]]
"""Factorises a matrix; what it returns reconstructs the matrix from factors quantised to a number of bits."""


def direct(matrix: Tensor) -> Callable[[int], Tensor]:
    """The matrix itself, one scale per token."""
    return lambda bits: mpo.fake_quantise(matrix, bits, -1)


def mean_errors(
    study: Study, methods: dict[str, Method], widths: Sequence[int], label: str
) -> dict[str, dict[int, float]]:
    """Relative error of each method at each width, averaged over the captured matrices."""
    sums = {name: dict.fromkeys(widths, 0.0) for name in methods}
    for _, _, matrix in track(study.matrices, label, console=console, transient=True):
        for name, method in methods.items():
            quantised = method(matrix)
            for bits in widths:
                sums[name][bits] += relative_error(quantised(bits), matrix) / len(study.matrices)
    return sums


def figure4(study: Study) -> Part:
    """Which tensors may be quantised, and how many there should be."""
    _, _, matrix = study.matrices[0]
    tokens, channels = matrix.shape

    def method(groups: Sequence[int], *, both: bool) -> Method:
        def factorised(matrix: Tensor) -> Callable[[int], Tensor]:
            large, *small = mpo.decompose(matrix, mpo.cache_shape(*matrix.shape, groups))
            return lambda bits: mpo.reconstruct(
                [quantised_large(large, bits), *(quantised_small(t, bits) if both else t for t in small)]
            )

        return factorised

    methods: dict[str, Method] = {"RTN": direct}
    share = {"RTN": share_of_storage(tokens, channels, 0, both=False)}
    for n, groups in SITES.items():
        small = sum(t.numel() for t in mpo.decompose(matrix, mpo.cache_shape(tokens, channels, groups))[1:])
        for both in (False, True):
            name = f"n = {n}, {'all tensors' if both else 'T_L only'}"
            methods[name] = method(groups, both=both)
            share[name] = share_of_storage(tokens, channels, small, both=both)
    rows = mean_errors(study, methods, (2, 3, 4), "figure4")
    note = (
        "The paper gives no shape for n > 2; here the further sites take further factors of the channels: groups of "
        f"{', '.join(str(math.prod(groups)) for groups in SITES.values())} channels. What falls with n is the error of "
        "T_L alone, as its group grows; the small tensors grow with the square of it, and tolerate coarse codes less."
    )
    table = error_table(f"Figure 4: relative error of K and V, {tokens} tokens", rows, share)
    return Part(table, note, lambda figure: draw_errors(figure, rows))


def figure5(study: Study) -> Part:
    """The balanced split beside other factorisations of the same matrix, at equal bits."""
    tokens, channels = study.matrices[0][2].shape
    group = SITES[2][0]

    def balanced(grouped: Tensor) -> tuple[Tensor, Tensor]:
        large, small = mpo.decompose(grouped, [(len(grouped), 1), (1, group)])
        return large.flatten(2)[0], small.flatten(1)

    def by_svd(grouped: Tensor) -> tuple[Tensor, Tensor]:
        u, values, v = torch.linalg.svd(grouped, full_matrices=False)
        return u * values, v

    def method(split: Callable[[Tensor], tuple[Tensor, Tensor]], *, both: bool) -> Method:
        def factorised(matrix: Tensor) -> Callable[[int], Tensor]:
            large, small = split(matrix.reshape(-1, group))

            def quantised(bits: int) -> Tensor:
                codes = mpo.fake_quantise(large.reshape(matrix.shape), bits, -1).reshape(large.shape)
                return (codes @ (mpo.fake_quantise(small, bits, -1) if both else small)).reshape(matrix.shape)

            return quantised

        return factorised

    splits = {"MPO, balanced": balanced, "SVD, U S by V": by_svd, "QR, Q by R": torch.linalg.qr}
    methods: dict[str, Method] = {"RTN": direct}
    share = {"RTN": share_of_storage(tokens, channels, 0, both=False)}
    for name, split in splits.items():
        for both in (False, True):
            label = f"{name}, {'both' if both else 'T_L only'}"
            methods[label] = method(split, both=both)
            share[label] = share_of_storage(tokens, channels, group**2, both=both)
    rows = mean_errors(study, methods, (2, 4), "figure5")
    note = (
        "The paper does not say how its SVD is split; here the tokens keep the singular values. QR stood far behind "
        "the balanced split in the paper; on this model it does not."
    )
    table = error_table(f"Figure 5: relative error by factorisation, {tokens} tokens", rows, share)
    return Part(table, note, lambda figure: draw_errors(figure, rows))


# Figure 6


def timed(model: PreTrainedModel, forward: Callable[..., Any], length: int, steps: int) -> tuple[float, int]:
    """Median seconds of a decode step, and the bytes of the cache after it."""
    cache = static_cache(model, length, steps + WARM_UP)
    seconds = []
    for _ in range(WARM_UP + steps):
        begin = time.perf_counter()
        forward(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[WARM_UP:]), decoquant_compile.nbytes(cache).total


def figure6(study: Study) -> Part:
    """Bytes and seconds of a decode step against the length of the cache, measured."""
    setting = study.setting
    model, _ = gemma.load()
    arms = {"16-bit, Inductor": ("inductor", None), "packed, 4 bits": ("decoquant", {"bits": 4})}
    compiled = {
        name: torch.compile(model.forward, backend=backend, options=options, dynamic=True, recompile_limit=64)
        for name, (backend, options) in arms.items()
    }
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in arms}
    # Both arms at one length, then the next: a change in what else the machine does meets both.
    work = [(name, length) for length in setting.lengths for name in arms]
    for name, length in track(work, "figure6", console=console, transient=True):
        results[name].append(timed(model, compiled[name], length, setting.steps))
    table = new_table(
        f"Figure 6: decode of Gemma-3-270M (bfloat16, {torch.get_num_threads()} threads), median of {setting.steps}",
        *("tokens", "cache, 16-bit", "packed", "ratio", "ms, 16-bit", "packed", "speed-up"),
    )
    for length, dense, small in zip(setting.lengths, *results.values(), strict=True):
        mib = [f"{n / 2**20:.2f} MiB" for n in (dense[1], small[1])]
        ms = [f"{1e3 * seconds:.1f}" for seconds in (dense[0], small[0])]
        table.add_row(f"{length}", *mib, f"{small[1] / dense[1]:.3f}", *ms, f"{dense[0] / small[0]:.2f}")

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for name, values in results.items():
            left.plot(setting.lengths, [n / 2**20 for _, n in values], "o-", label=name)
            right.plot(setting.lengths, [1e3 * seconds for seconds, _ in values], "o-", label=name)
        left.set(title="cache, MiB", xlabel="tokens", ylim=0)
        right.set(title="decode step, ms", xlabel="tokens", ylim=0)
        left.legend()

    note = (
        "Bytes are those of live tensors. Of the 18 layers 15 hold 512 tokens at most, where sinks, window and fitted "
        "parameters weigh more; this model's weights, not its cache, take most of a step. The paper's figure is of a "
        "70B model and names no machine."
    )
    return Part(table, note, draw)


PARTS: dict[str, Callable[[Study], Part]] = {
    "table2": table2,
    "table4": table4,
    "figure4": figure4,
    "figure5": figure5,
    "figure6": figure6,
}


# A compressed prompt


def follow(forward: Callable[..., Any], cache: StaticCache, token: Tensor, steps: int) -> Tensor:
    """Logits of a greedy continuation, ``[steps, vocabulary]``."""
    rows = []
    for _ in range(steps):
        rows.append(forward(input_ids=token.view(1, 1), past_key_values=cache).logits[0, -1])
        token = rows[-1].argmax()
    return torch.stack(rows)


def packed_forward(model: PreTrainedModel) -> Callable[..., Any]:
    return torch.compile(model.forward, backend="decoquant", options={"bits": 4}, recompile_limit=64)


def tell(tokenizer: Any, logits: Tensor) -> None:
    digest = hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()[:16]
    console.print(
        f"logits {tuple(logits.shape)}: sha256 {digest}; continuation: {tokenizer.decode(logits.argmax(-1))!r}"
    )


def beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".logits.safetensors")


def save(path: pathlib.Path, tokens: int, steps: int) -> None:
    """Pack the cache of a prompt, save it, go on from it, and keep the logits beside it."""
    model, tokenizer = gemma.load()
    ids = tokenizer(gemma.text()[: 12 * tokens], return_tensors="pt").input_ids[:, :tokens]
    cache = StaticCache(config=model.config, max_cache_len=tokens + ROOM)
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    dense = decoquant_compile.nbytes(cache).total
    forward = packed_forward(model)
    token = forward(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1].argmax()
    held = decoquant_compile.nbytes(cache)
    decoquant_compile.save(cache, path)
    size = path.stat().st_size
    console.print(
        f"{tokens} tokens: {dense} bytes at 16 bits, {held.packed} packed and {held.dense} of counters; "
        f"{path.name} has {size} bytes, {size - held.total} of them the header"
    )
    logits = follow(forward, cache, token, steps)
    save_file({"first": token, "logits": logits, "slots": torch.tensor(tokens + ROOM)}, beside(path))
    tell(tokenizer, logits)


def load(path: pathlib.Path) -> None:
    """Go on from a saved cache and compare with the logits beside it."""
    model, tokenizer = gemma.load()
    expected = load_file(beside(path))
    cache = StaticCache(config=model.config, max_cache_len=int(expected["slots"]))
    decoquant_compile.load(cache, path)
    console.print(f"loaded {decoquant_compile.nbytes(cache).packed} packed bytes; no prompt was run")
    logits = follow(packed_forward(model), cache, expected["first"], len(expected["logits"]))
    tell(tokenizer, logits)
    difference = (logits.float() - expected["logits"].float()).abs().max()
    equal = "equal" if torch.equal(logits, expected["logits"]) else "not equal"
    console.print(f"beside those of the process that saved it: {equal}, largest difference {difference:.2g}")


def chosen(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    names = value.split(",") if value else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise click.BadParameter(f"{unknown[0]!r}; there are {', '.join(PARTS)}")
    return names


File = click.Path(dir_okay=False, path_type=pathlib.Path)


@click.command(help=__doc__)
@click.option("--only", callback=chosen, default="", help="Parts, separated by commas: table2,figure4.")
@click.option("--windows", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--prompt", type=click.IntRange(min=128), default=256, show_default=True, help="Tokens that are stored.")
@click.option(
    "--continuation", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens scored on them."
)
@click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True, help="Layers of the error studies.")
@click.option("--lengths", default="1024,2048,4096,8192", show_default=True, help="Tokens of figure6.")
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Decode steps of figure6.")
@click.option("--plot", "folder", type=click.Path(file_okay=False, path_type=pathlib.Path), help="Write pictures here.")
@click.option("--save", "to", type=File, help="Only pack a prompt and save its cache.")
@click.option("--load", "of", type=File, help="Only go on from a saved cache.")
@torch.no_grad()
def main(
    only: list[str],
    windows: int,
    prompt: int,
    continuation: int,
    layers: int,
    lengths: str,
    steps: int,
    folder: pathlib.Path | None,
    to: pathlib.Path | None,
    of: pathlib.Path | None,
) -> None:
    """Run the parts, or save or load a prompt."""
    if to is not None:
        save(to, prompt, 4)
    if of is not None:
        load(of)
    if to is not None or of is not None:
        return
    try:
        sizes = tuple(int(length) for length in lengths.split(","))
    except ValueError:
        raise click.BadParameter(f"{lengths!r} is not a list of numbers", param_hint="--lengths") from None
    study = Study(Setting(windows, prompt, continuation, layers, sizes, steps))
    for name in only:
        part = PARTS[name](study)
        console.print(part.table)
        console.print(part.note, style="italic")
        if folder is not None:
            picture(folder / f"{name}.png", part)


def picture(path: pathlib.Path, part: Part) -> None:
    """Draw a part into a file."""
    import matplotlib as mpl  # noqa: PLC0415  # only this option needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = plt.figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(str(part.table.title))
    part.draw(figure)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    console.print(f"picture: {path}")


if __name__ == "__main__":
    main()
