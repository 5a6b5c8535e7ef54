"""How far the packed cache moves Gemma-3-270M: KL divergence and top-1 agreement, measured through the real operators.

Several windows of real text are decoded as one batch, teacher-forced, one token at a time, by the compiled model on its
packed cache. Beside it stands an emulation of the same recipe: the plain model, with keys and values quantised and
dequantised by the codec inside its attention. The two should agree; what differs between them is everything that this
package adds around the codec.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import click
import gemma
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, StaticCache
from transformers.masking_utils import eager_mask

import decoquant_compile
from decoquant_compile.kernels import codec


@dataclass(frozen=True)
class Setting:
    """What is measured: windows of `length` tokens, of which the first `prompt` are attended exactly."""

    key_bits: int
    value_bits: int
    length: int
    prompt: int
    every: int
    sinks: int = 4
    window: int = 64

    @property
    def positions(self) -> list[int]:
        """Positions whose next-token distribution is compared."""
        return list(range(self.prompt, self.length, self.every))


class Emulation:
    """The recipe inside an attention function of transformers: whole windows at once, no cache.

    Attributes:
        queries: whether the prompt's queries are known to the fit (compiled prefill) or not (eager prefill).
    """

    def __init__(self, setting: Setting, *, queries: bool) -> None:
        self.setting, self.queries = setting, queries

    def attend(
        self,
        _module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Exact attention for the prompt, attention over quantised keys and values after it."""
        s, groups = self.setting, query.shape[1] // key.shape[1]
        grouped = query.unflatten(1, (key.shape[1], groups))
        stored_key = self._stored(key, grouped, "key", s.key_bits)
        stored_value = self._stored(value, None, "value", s.value_bits)
        row = torch.arange(s.length)[:, None]
        column = torch.arange(s.length)
        exact = (row < s.prompt) | (column < s.sinks) | (column > row - s.window)
        dot = lambda k: torch.einsum("bhgqd,bhkd->bhgqk", grouped, k)
        logits = torch.where(exact, dot(key), dot(stored_key)) * scaling + attention_mask[:, :, None, :, : s.length]
        weights = torch.softmax(logits, -1)
        out = (weights * exact) @ value[:, :, None] + (weights * ~exact) @ stored_value[:, :, None]
        return out.flatten(1, 2).transpose(1, 2).contiguous(), None

    def _stored(self, x: Tensor, grouped: Tensor | None, role: codec.Role, bits: int) -> Tensor:
        """Tokens as they come back from the store: fitted on the prompt, refitted whenever their number has doubled."""
        s = self.setting
        if bits == 16:
            return x
        out, begin, end, weight = x.clone(), s.sinks, s.prompt, None
        while begin < s.length:
            tokens = x[:, :, begin:end]
            if grouped is not None and (self.queries or begin >= s.prompt):
                weight = grouped[:, :, :, begin:end].square().mean((2, 3))
            mean, variance = tokens.mean(2), tokens.var(2, correction=0)
            parameters = codec.fit(mean, variance, weight, role=role, bits=bits)
            parameters = codec.Parameters(*(p[:, :, None] for p in parameters))
            # The prompt is encoded by the fit on itself; later tokens by the fit on those before them.
            first = s.sinks if begin == s.sinks else end
            last = min(s.length, s.sinks + 2 * (end - s.sinks))
            codes, gain = codec.encode(x[:, :, first:last], parameters, role=role, bits=bits)
            entry = codec.lookup(codes, bits)
            out[:, :, first:last] = codec.decode(entry, gain, parameters)
            if last == s.length:
                break
            begin, end = end, last
        return out


def hidden(model: PreTrainedModel, ids: Tensor, attention: str) -> Tensor:
    """Last hidden states of whole windows, [windows, length, width]."""
    model.set_attn_implementation(attention)
    return torch.cat([model.model(window[None], use_cache=False).last_hidden_state for window in ids])


def decode(
    model: PreTrainedModel, ids: Tensor, setting: Setting, *, compiled_prefill: bool, tick: Callable[[], None]
) -> Tensor:
    """Hidden states at the compared positions, decoded through the compiled model on its packed cache."""
    model.set_attn_implementation("sdpa")
    config = model.config
    cache = StaticCache(config=config, max_cache_len=setting.length)
    options = {"key_bits": setting.key_bits, "value_bits": setting.value_bits}
    backend = decoquant_compile.decoquant_backend
    forward = torch.compile(model.model.forward, backend=backend, options=options, recompile_limit=64)
    cache.early_initialization(len(ids), config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    prefill = forward if compiled_prefill else model.model.forward
    prefill(input_ids=ids[:, : setting.prompt], past_key_values=cache)
    rows = {}
    for at in range(setting.prompt, setting.length):
        rows[at] = forward(input_ids=ids[:, at : at + 1], past_key_values=cache).last_hidden_state[:, -1]
        tick()
    held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert all(isinstance(t, decoquant_compile.CacheTensor) for t in held), "a layer was not rewritten"
    return torch.stack([rows[at] for at in setting.positions], 1)


def compare(model: PreTrainedModel, reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL(reference || other) in nats and mean top-1 agreement of each window, from hidden states."""
    divergence, agreement = torch.empty(len(reference)), torch.empty(len(reference))
    for at, (ours, theirs) in enumerate(zip(reference, other, strict=True)):
        sums = torch.zeros(2)
        for p, q in zip(ours.split(64), theirs.split(64), strict=True):
            p, q = (torch.log_softmax(model.lm_head(x).float(), -1) for x in (p, q))  # noqa: PLW2901
            sums += torch.stack([(p.exp() * (p - q)).sum(), (p.argmax(-1) == q.argmax(-1)).float().sum()])
        divergence[at], agreement[at] = sums / len(ours)
    return divergence, agreement


def windows(text: str, tokenizer: Callable[..., dict[str, Tensor]], count: int, length: int) -> Tensor:
    """Windows spread evenly over a text, [count, length]; each begins as a text does."""
    step = len(text) // count
    parts = [text[i * step : i * step + 12 * length] for i in range(count)]
    rows = [tokenizer(part, return_tensors="pt")["input_ids"][0, :length] for part in parts]
    if min(map(len, rows)) < length:
        raise click.ClickException(f"the text is too short for {count} windows of {length} tokens")
    return torch.stack(rows)


@click.command(help=__doc__)
@click.option("--key-bits", type=click.IntRange(2, 16), default=4, show_default=True)
@click.option("--value-bits", type=click.IntRange(2, 16), default=4, show_default=True)
@click.option("--windows", "count", type=click.IntRange(min=2), default=8, show_default=True)
@click.option("--length", type=click.IntRange(min=256), default=2048, show_default=True, help="Tokens of a window.")
@click.option("--prompt", type=click.IntRange(min=128), default=512, show_default=True, help="Tokens attended exactly.")
@click.option("--every", type=click.IntRange(min=1), default=3, show_default=True, help="Compare every n-th position.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path), help="Text to score.")
@torch.no_grad()
def main(
    key_bits: int, value_bits: int, count: int, length: int, prompt: int, every: int, text: pathlib.Path | None
) -> None:
    """Measure both prefills, each beside its emulation."""
    console = Console()
    model, tokenizer = gemma.load(torch.float32)
    setting = Setting(key_bits, value_bits, length, prompt, every)
    ids = windows(text.read_text() if text else gemma.text(), tokenizer, count, length)
    table = Table(
        title=f"K{key_bits} V{value_bits}, {count} windows of {length} tokens, prompt {prompt}", title_justify="left"
    )
    for column in ("prefill", "KL, packed", "KL, emulated", "ratio", "top-1, packed", "top-1, emulated"):
        table.add_column(column)
    AttentionMaskInterface.register("emulation", eager_mask)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("decode", total=2 * (length - prompt))
        exact = hidden(model, ids, "sdpa")[:, setting.positions]
        for name, compiled in (("eager", False), ("compiled", True)):
            AttentionInterface.register("emulation", Emulation(setting, queries=compiled).attend)
            emulated = compare(model, exact, hidden(model, ids, "emulation")[:, setting.positions])
            states = decode(model, ids, setting, compiled_prefill=compiled, tick=lambda: progress.advance(task))
            packed = compare(model, exact, states)
            show = lambda x: f"{x.mean():.5f} ± {x.std() / len(x) ** 0.5:.5f}"
            ratio = f"{packed[0].mean() / emulated[0].mean():.3f}"
            shares = [f"{x[1].mean():.4f}" for x in (packed, emulated)]
            table.add_row(name, show(packed[0]), show(emulated[0]), ratio, *shares)
    console.print(table)


if __name__ == "__main__":
    main()
