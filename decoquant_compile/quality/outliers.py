"""Keys with a few channels 20 to 50 times larger than the others: ``python -m decoquant_compile.quality.outliers``.

Such channels are what breaks plain quantisation, and no model that is small enough for a quick check has them; so they
are made. What is compared is the output of one attention over quantised keys with that over exact ones (values are
exact): relative squared error, after the prompt. Everything is emulated, as in `decoquant_compile.quality.emulate`.
"""

import itertools
import json
import math
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal, NamedTuple, get_args

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from decoquant_compile.kernels.format import Format
from decoquant_compile.options import Options
from decoquant_compile.quality.emulate import Emulation, Ours, Scheme
from decoquant_compile.quality.rivals import Rival, parse

Kind = Literal["spread", "shifted", "rotating"]
"""Of outlying channels: "spread": their deviation is large; "shifted": their mean is large, and their deviation a tenth
of it; "rotating": shifted ones in low-frequency rotary pairs before RoPE, as in LLaMA."""

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

_HEAD_DIM: Final = 128
_GROUP: Final = 4  # queries of a KV head
_RANK: Final = 24  # of what most of a key's variance lies in
_OUTLIERS: Final = 4
_BASE: Final = 1e4  # of RoPE


class Sample(NamedTuple):
    """Queries ``[1, group, length, head_dim]``, keys and values ``[1, 1, length, head_dim]``."""

    query: Tensor
    key: Tensor
    value: Tensor


def sample(kind: Kind, length: int, seed: int) -> Sample:
    """A head whose queries look for one earlier token each, through noise."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    latent = normal(length, _RANK) @ (normal(_HEAD_DIM, _RANK) / _RANK**0.5).T * 0.8 + normal(length, _HEAD_DIM) * 0.6
    latent /= latent.std()
    if kind == "rotating":
        half = _HEAD_DIM // 2
        low = half - 1 - torch.randperm(20, generator=generator)[: _OUTLIERS // 2]
        channels = torch.cat((low, low + half))
    else:
        channels = torch.randperm(_HEAD_DIM, generator=generator)[:_OUTLIERS]
    amplitude = 20 + 30 * torch.rand(_OUTLIERS, generator=generator)
    mean, deviation = 0.3 * normal(_HEAD_DIM), torch.ones(_HEAD_DIM)
    if kind == "spread":
        deviation[channels] = amplitude
    else:
        mean[channels] = amplitude * normal(_OUTLIERS).sign()
        deviation[channels] = amplitude * (0.1 if kind == "shifted" else 0.15)
    key = latent * deviation + mean
    # Each query is near one of the tokens so far.
    wanted = (torch.rand(_GROUP, length, generator=generator) * torch.arange(1, length + 1)).long()
    query = (latent[wanted] * 0.10 + normal(_GROUP, length, _HEAD_DIM) * 0.15) / deviation * _HEAD_DIM**0.5
    if kind == "rotating":
        key, query = rope(key), rope(query)
    value = normal(length, _HEAD_DIM) * (0.3 + torch.rand(_HEAD_DIM, generator=generator))
    return Sample(query[None], key[None, None], (value * (0.5 * normal(length, 1)).exp())[None, None])


def rope(x: Tensor) -> Tensor:
    """Rotary positions, pairs half a head apart, of ``[..., length, head_dim]``."""
    length, head_dim = x.shape[-2:]
    frequency = _BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    cosine, sine = (f(torch.cat((angle, angle), 1)).float() for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cosine + torch.cat((-b, a), -1) * sine


def attend(scheme: Scheme | None, made: Sample, prompt: int) -> Tensor:
    """The attention's output after the prompt, keys being held by `scheme`; None: exactly."""
    length = made.key.shape[2]
    mask = torch.full((length, length), -math.inf).triu(1)[None, None]
    emulation = Emulation(scheme, prompt, roles=frozenset({"key"}))
    return emulation.attend(torch.nn.Module(), *made, mask)[0][:, prompt:]


def error(got: Tensor, exact: Tensor) -> float:
    """Relative squared error."""
    return float((got - exact).square().sum() / exact.square().sum())


def key_bits(scheme: Ours | Rival, tokens: int) -> float:
    """Stored bits per element of the keys of one head that holds so many tokens."""
    if isinstance(scheme, Rival):
        return scheme.key.nbits(tokens, 1, _HEAD_DIM, scheme.sinks) / (tokens * _HEAD_DIM)
    options = scheme.options
    form = Format("key", int(options.bits), _HEAD_DIM, torch.bfloat16, options.sinks, options.window)
    return 8 * form.layout(1, 1, tokens).nbytes / (tokens * _HEAD_DIM)


@dataclass(frozen=True)
class Row:
    """What was measured of one method.

    Attributes:
        method: its name.
        bits: stored, per element of the keys, at 8,192 tokens.
        errors: mean relative squared error by kind of outliers.
    """

    method: str
    bits: float
    errors: dict[Kind, float]


def measure(schemes: Mapping[str, Ours | Rival], seeds: int, length: int, prompt: int) -> list[Row]:
    """A row for each scheme, by stored bits."""
    rows = {name: Row(name, key_bits(s, 8192), dict.fromkeys(KINDS, 0.0)) for name, s in schemes.items()}
    with Progress(transient=True) as progress:
        task = progress.add_task("attend", total=len(schemes) * len(KINDS) * seeds)
        for kind, seed in itertools.product(KINDS, range(seeds)):
            made = sample(kind, length, seed)
            exact = attend(None, made, prompt)
            for name, scheme in schemes.items():
                rows[name].errors[kind] += error(attend(scheme, made, prompt), exact) / seeds
                progress.advance(task)
    return sorted(rows.values(), key=lambda row: row.bits)


_METHODS: Final = (
    "kivi:4+window,kivi-g128:4+window,kivi:3+window,kivi-g128:3+window,kivi:2+window,kivi-g128:2+window,"
    "turboquant:4+window,q4_0+hadamard+window,paper:4+window"
)


@click.command(help=__doc__)
@click.option("--bits", default="5,4,3,2", show_default=True, metavar="BITS,...", help="Widths of our keys.")
@click.option(
    "--methods", default=_METHODS, show_default=True, metavar="METHOD,...", help="Rivals, as for the instrument."
)
@click.option("--seeds", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--length", type=click.IntRange(min=256), default=2048, show_default=True)
@click.option("--prompt", type=click.IntRange(min=128), default=512, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=pathlib.Path), metavar="FILE.json")
@torch.no_grad()
def main(bits: str, methods: str, seeds: int, length: int, prompt: int, out: pathlib.Path | None) -> None:
    """Measure and show a table."""
    schemes: dict[str, Ours | Rival] = {}
    try:
        for width in filter(None, bits.split(",")):
            for queries in (True, False):
                name = f"decoquant:{width}, queries {'seen' if queries else 'unseen'}"
                schemes[name] = Ours(Options(bits=int(width)), queries)
        schemes |= {method: parse(method) for method in filter(None, methods.split(","))}
    except ValueError as wrong:
        raise click.UsageError(str(wrong)) from wrong
    rows = measure(schemes, seeds, length, prompt)
    table = Table(title="keys with outliers: relative squared error of the attention's output", title_justify="left")
    for column in ("method", "bits of keys at 8,192 tokens", *KINDS):
        table.add_column(column)
    for row in rows:
        table.add_row(row.method, f"{row.bits:.2f}", *(f"{row.errors[kind]:.5f}" for kind in KINDS))
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
