"""Whole decode steps of models of real width over synthetic static caches: time of a step, bytes, resident set."""

import importlib.util
import json
import math
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psutil
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, QuantizedCache, StaticCache

import decoquant_compile
from decoquant_compile.bench import memory
from decoquant_compile.bench.attention import TEMPLATE
from decoquant_compile.bench.timing import Row, interleave, relate

WARM_UP: Final = 3
BASE: Final = "inductor"

ARMS: Final = {
    BASE: "plain Inductor, static cache in bfloat16",
    "decoquant": "this package, the same static cache at each number of bits",
    "hf": "Hugging Face's QuantizedCache, run eagerly as it must be: quanto and hqq at 4 bits, fp8",
}
_QUANTIZED: Final = {"hf-quanto": "optimum.quanto", "hf-hqq": "hqq", "hf-fp8": "torch"}
"""Arm and the package that it needs."""
_HELD: Final = ("keys", "values", "_quantized_keys", "_quantized_values")
"""Where the layers of a QuantizedCache keep their tensors."""

GEMMA: Final = pathlib.Path.home() / ".cache" / "decoquant_compile" / "gemma-3-270m"
"""Where the examples unpack the real weights."""


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        bits: widths of the packed caches.
        arms: keys of `ARMS`.
        threads: numbers of threads.
        rounds: timed steps of each arm and number of threads.
        resident: run each arm in a process of its own as well, for its resident set.
    """

    bits: tuple[int, ...] = (4,)
    arms: tuple[str, ...] = tuple(ARMS)
    threads: tuple[int, ...] = (1,)
    rounds: int = 9
    resident: bool = False

    def names(self) -> list[str]:
        """The single arms."""
        names = [BASE] if BASE in self.arms else []
        names += [f"decoquant-{bits}" for bits in self.bits] if "decoquant" in self.arms else []
        return names + (list(_QUANTIZED) if "hf" in self.arms else [])


# --------------------------------------------------------------------------------------------------------------- models


def _llama1b() -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2**18,
        tie_word_embeddings=True,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _gemma() -> PreTrainedModel:
    if (GEMMA / "complete").exists():
        return transformers.AutoModelForCausalLM.from_pretrained(GEMMA, dtype=torch.bfloat16)
    config = transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        max_position_embeddings=2**18,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


MODELS: Final[dict[str, Callable[[], PreTrainedModel]]] = {"llama1b": _llama1b, "gemma": _gemma}
"""Llama 3.2 1B's sizes with random weights; Gemma-3-270M, with the real weights where an example has unpacked them."""


def load(name: str) -> PreTrainedModel:
    """The model of that name, ready to decode."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    return MODELS[name]().eval()


# --------------------------------------------------------------------------------------------------------------- caches


def _random(heads: int, tokens: int, head_dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, heads, tokens, head_dim, generator=generator).bfloat16()


def empty_cache(model: PreTrainedModel, slots: int) -> StaticCache:
    """A static cache in bfloat16 without tokens; its tensors are there."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=slots)
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, torch.bfloat16, torch.device("cpu"))
    return cache


def static_cache(model: PreTrainedModel, context: int, steps: int) -> StaticCache:
    """A static cache in which `context` random tokens stand and `steps` more have room.

    The tokens are standard normal, `TEMPLATE` different ones repeated.
    """
    cache = empty_cache(model, context + steps)
    layers: list[Any] = cache.layers
    for layer in layers:
        template = _random(layer.num_heads, TEMPLATE, layer.k_head_dim)
        filled = min(context, layer.max_cache_len)
        for tensor in (layer.keys, layer.values):
            for begin in range(0, filled, TEMPLATE):
                count = min(TEMPLATE, filled - begin)
                tensor[:, :, begin : begin + count] = template[:, :, :count]
        layer.cumulative_length.fill_(context)
        if layer.is_sliding:
            layer.cumulative_length_int = context
    return cache


def quantized_cache(model: PreTrainedModel, context: int, backend: str) -> QuantizedCache:
    """Hugging Face's quantised cache with `context` random tokens, written as a prefill would."""
    config = model.config
    axis = {"quanto": 0, "hqq": 1}
    options = {"nbits": 4, "axis_key": axis[backend], "axis_value": axis[backend]} if backend in axis else {}
    cache = QuantizedCache(backend=backend, config=config, **options)
    template = _random(config.num_key_value_heads, TEMPLATE, config.head_dim)
    tokens = template.repeat(1, 1, math.ceil(context / TEMPLATE), 1)[:, :, :context]
    for layer in range(config.num_hidden_layers):
        cache.update(tokens, tokens, layer)
    return cache


def slots_of_layers(model: PreTrainedModel, slots: int) -> list[int]:
    """What each layer has of the `slots` of a static cache: a sliding window no more than the window."""
    layers: list[Any] = StaticCache(config=model.config, max_cache_len=slots).layers
    return [int(layer.max_cache_len) for layer in layers]


def dense_bytes(model: PreTrainedModel, slots: int) -> int:
    """Bytes of a dense static cache of `slots`."""
    config = model.config
    total = sum(slots_of_layers(model, slots))
    return 2 * total * config.num_key_value_heads * config.head_dim * torch.bfloat16.itemsize


def held_bytes(cache: Any) -> int:
    """Bytes of the tensors of a cache, quantised ones included."""
    if isinstance(cache, QuantizedCache):
        parts = [_plain([getattr(layer, name) for name in _HELD if hasattr(layer, name)]) for layer in cache.layers]
        return decoquant_compile.nbytes(parts).total
    return decoquant_compile.nbytes(cache).total


def _plain(value: Any) -> Any:
    """Tensor subclasses taken apart into the tensors that they wrap."""
    if isinstance(value, dict):
        return [_plain(part) for part in value.values()]
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [_plain(getattr(value, name)) for name in names]
    return value


# ----------------------------------------------------------------------------------------------------------------- arms


class NotRunError(Exception):
    """An arm cannot run; the message says why."""


@dataclass
class Arm:
    """One model with its cache.

    Attributes:
        name: as in the tables; says how the model is compiled.
        cache: it runs with.
    """

    name: str
    cache: Any

    @classmethod
    def build(cls, name: str, model: PreTrainedModel, context: int, steps: int) -> "Arm":
        """Fill its cache.

        Raises:
            NotRunError: the arm cannot run, with the reason.
        """
        nbytes = dense_bytes(model, context + steps)
        if name in _QUANTIZED:
            if not _installed(_QUANTIZED[name]):
                raise NotRunError("not installed")
            # Dense keys and values of all layers never stand together, but those of one do, several times
            if reason := memory.lack(nbytes):
                raise NotRunError(reason)
            arm = cls(name, None)
            try:
                arm.cache = quantized_cache(model, context, name.removeprefix("hf-"))
                arm.step(model)()
            except Exception as error:  # another project's backend, in whatever state it is
                raise NotRunError(f"{type(error).__name__}: {error}") from error
            return arm
        if reason := memory.lack(nbytes if name == BASE else 2 * nbytes):  # while it is taken over, both are there
            raise NotRunError(reason)
        return cls(name, static_cache(model, context, steps))

    def forward(self, model: PreTrainedModel) -> Callable[..., Any]:
        """The model's `forward`, compiled unless the arm runs eagerly."""
        if self.name in _QUANTIZED:
            return model.forward
        backend: Any = "inductor"
        options = None
        if self.name != BASE:
            backend, options = decoquant_compile.decoquant_backend, {"bits": int(self.name.removeprefix("decoquant-"))}
        compiled: Any = torch.compile  # whose annotations lack the limit
        # Each arm, and a cache before and after it is taken over, is an entry of the same code
        return compiled(model.forward, backend=backend, options=options, recompile_limit=64)

    def step(self, model: PreTrainedModel) -> Callable[[], Tensor]:
        """A function that decodes one token."""
        forward = self.forward(model)
        token = torch.ones(1, 1, dtype=torch.long)
        return lambda: forward(input_ids=token, past_key_values=self.cache).logits

    def note(self) -> str:
        """Something is not as its name says."""
        if self.name.startswith("decoquant") and decoquant_compile.nbytes(self.cache).packed == 0:
            return "nothing was rewritten"
        return ""


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of its parent
        return False


# ------------------------------------------------------------------------------------------------------------------ run


@torch.no_grad()
def measure(
    model: PreTrainedModel, shape: str, context: int, settings: Settings, tell: Callable[[str], object]
) -> list[Row]:
    """Measures all arms at one context length; each arm decodes on from `context`, so they stay level.

    Args:
        model: of `load`.
        shape: its name.
        context: tokens in the caches before the first step.
        settings: what to measure.
        tell: called with what is going on.

    Returns:
        A row for each arm and number of threads, in this order of threads.
    """
    steps = 1 + (WARM_UP + settings.rounds) * len(settings.threads)
    arms: list[Arm] = []
    notes: dict[str, str] = {}
    before = torch.get_num_threads()
    torch.compiler.reset()
    torch.set_num_threads(settings.threads[0])
    try:
        # The caches that shrink come first, each with the step that shrinks it: the peak is one dense cache less
        for name in sorted(settings.names(), key=lambda name: not name.startswith("decoquant")):
            tell(f"{shape}, {context} tokens: filling {name}")
            try:
                arm = Arm.build(name, model, context, steps)
            except NotRunError as reason:
                notes[name] = str(reason)
                continue
            arm.step(model)()
            notes[name] = arm.note()
            arms.append(arm)
        rows = []
        for threads in settings.threads:
            tell(f"{shape}, {context} tokens, {threads} threads")
            if threads != torch.get_num_threads():
                torch.set_num_threads(threads)
                torch.compiler.reset()  # Inductor's code is compiled for a number of threads
            calls = {arm.name: arm.step(model) for arm in arms}
            seconds = interleave(calls, rounds=settings.rounds, warm_up=WARM_UP)
            held = {arm.name: held_bytes(arm.cache) for arm in arms}
            measured = [
                Row(shape, context, threads, name, seconds.get(name, []), held.get(name, 0), note=notes[name])
                for name in settings.names()
            ]
            relate(measured, {"Inductor": (BASE,)})
            rows += measured
    finally:
        torch.set_num_threads(before)
    return rows


def measure_resident(rows: Sequence[Row], tell: Callable[[str], object]) -> None:
    """Fills in the resident sets of the arms that ran, each from a fresh process."""
    for row in rows:
        if not row.seconds:
            continue
        tell(f"{row.shape}, {row.context} tokens: resident set of {row.arm}")
        command = [sys.executable, "-m", "decoquant_compile.bench", "resident", row.shape, str(row.context), row.arm]
        done = subprocess.run([*command, str(row.threads)], capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            row.note = f"no resident set: {(done.stderr.strip().splitlines() or ['the process died'])[-1]}"
            continue
        answer = json.loads(done.stdout.splitlines()[-1])
        row.resident, row.peak = answer["resident"], answer["peak"]


@torch.no_grad()
def resident(shape: str, context: int, arm: str, threads: int) -> dict[str, int]:
    """Decodes a few steps with one arm in this process.

    Returns:
        Bytes: ``resident`` after the last step, ``peak`` of the whole run, ``cache`` held.
    """
    torch.set_num_threads(threads)
    model = load(shape)
    built = Arm.build(arm, model, context, WARM_UP)
    step = built.step(model)
    for _ in range(WARM_UP):
        step()
    return {
        "resident": psutil.Process().memory_info().rss,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cache": held_bytes(built.cache),
    }
