"""Compiled prefills of random tokens into empty static caches, and the part of them that fit and encode take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from transformers import PreTrainedModel

from decoquant_compile.bench import memory
from decoquant_compile.bench.decode import BASE, Arm, dense_bytes, empty_cache, held_bytes, slots_of_layers
from decoquant_compile.bench.timing import Row, interleave, on_threads, relate
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState

WARM_UP: Final = 1
"""The call that compiles."""

_STORE: Final = "store-"


@dataclass(frozen=True)
class Settings:
    """What to measure: plain Inductor, and at each number of bits this package and its writes alone.

    Attributes:
        bits: widths of the packed caches.
        threads: numbers of threads.
        rounds: timed prefills of each arm and number of threads.
    """

    bits: tuple[int, ...] = (4,)
    threads: tuple[int, ...] = (1,)
    rounds: int = 3

    def names(self) -> list[str]:
        """The single arms."""
        return [BASE, *(f"decoquant-{bits}" for bits in self.bits), *(f"{_STORE}{bits}" for bits in self.bits)]


# ----------------------------------------------------------------------------------------------------------------- arms


def _whole(arm: Arm, model: PreTrainedModel, context: int) -> Callable[[], None]:
    """A prefill as `generate` does it, into a new cache, so that one to be packed is taken over each time."""
    forward = arm.forward(model)
    tokens = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))

    def call() -> None:
        arm.cache = empty_cache(model, context)
        forward(input_ids=tokens, past_key_values=arm.cache, logits_to_keep=1)

    return call


def _writes(arm: Arm, model: PreTrainedModel, context: int) -> Callable[[], None]:
    """The writes of such a prefill, as the rewritten graph makes them, into new states of all layers."""
    config = model.config
    bits = int(arm.name.removeprefix(_STORE))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        # The heads of a token stand together, as projections give them
        torch.randn(1, context, heads, config.head_dim, generator=generator).bfloat16().transpose(1, 2)
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    writes = (
        (Format("key", bits, config.head_dim, torch.bfloat16), key, query),
        (Format("value", bits, config.head_dim, torch.bfloat16), value, None),
    )
    layers = slots_of_layers(model, context)
    causal = torch.ones(1, 1, context, context, dtype=torch.bool).tril()
    masks = {slots: causal.triu(1 - slots) for slots in set(layers)}

    def call() -> None:
        arm.cache = []
        for slots in layers:
            shift = context - slots  # what a sliding window has no slots for moves out as the prompt moves in
            for form, new, queries in writes:
                state = CacheState.empty(form, 1, config.num_key_value_heads, slots, "cpu")
                positions = torch.arange(-shift, slots)
                state.write(new, positions, shift=shift, query=queries, mask=masks[slots], first=-shift)
                arm.cache.append(state.buffer)

    return call


# ------------------------------------------------------------------------------------------------------------------ run


@torch.no_grad()
def measure(
    model: PreTrainedModel, shape: str, context: int, settings: Settings, tell: Callable[[str], object]
) -> list[Row]:
    """Measures all arms at one length of the prompt.

    Args:
        model: of `decode.load`.
        shape: its name.
        context: tokens of the prompt; the caches have as many slots.
        settings: what to measure.
        tell: called with what is going on.

    Returns:
        A row for each arm and number of threads, in this order of threads.
    """
    names = settings.names()
    # What each arm holds, a new cache and the states that take it over; the model's masks and ours
    if reason := memory.lack((len(names) + 2) * dense_bytes(model, context) + 4 * context**2):
        return [Row(shape, context, threads, name, note=reason) for threads in settings.threads for name in names]
    rows = []
    for threads in settings.threads:
        now = f"{shape}, {context} tokens, {threads} threads"
        tell(now)
        arms = [Arm(name, None) for name in names]
        with on_threads(threads):
            calls = {
                arm.name: (_writes if arm.name.startswith(_STORE) else _whole)(arm, model, context) for arm in arms
            }
            seconds = interleave(calls, rounds=settings.rounds, warm_up=WARM_UP, after=partial(tell, now))
        measured = [
            Row(shape, context, threads, arm.name, seconds[arm.name], held_bytes(arm.cache), note=arm.note())
            for arm in arms
        ]
        compare(measured)
        rows += measured
    return rows


def compare(rows: Sequence[Row]) -> None:
    """Fills in how whole prefills compare, and what share of plain Inductor's the writes alone would take."""
    writes = [row for row in rows if row.arm.startswith(_STORE)]
    relate([row for row in rows if row not in writes], {"Inductor": (BASE,)})
    base = next(row.median for row in rows if row.arm == BASE)
    for row in writes:
        row.prefill_share = row.median / base if row.median and base else None
