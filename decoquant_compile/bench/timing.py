"""Interleaved timing and the arithmetic of its results."""

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Row:
    """One arm at one point of a sweep.

    Attributes:
        shape: name of the attention's shape or of the model.
        context: tokens in the cache.
        threads: torch's threads; 0 where a GPU was measured.
        arm: what was measured.
        seconds: of each call; empty if the arm did not run, and `note` says why.
        nbytes: `attention`: bytes read by one call; `decode`, `prefill`: bytes that the cache holds.
        error: relative error against dense attention over the dequantised cache; None if not checked.
        note: more about the arm.
        resident: resident set in bytes of a process that runs this arm alone; None if not measured.
        peak: the highest it was; of `attention` on a GPU: most bytes allocated there, the caches included.
        ratios: how many times faster than the arms of that name.
        read_share: bytes per second as a share of those of the pure read; None if not measured.
        prefill_share: seconds of the writes of a prefill as a share of plain Inductor's; None for other arms.
    """

    shape: str
    context: int
    threads: int
    arm: str
    seconds: list[float] = field(default_factory=list)
    nbytes: int = 0
    error: float | None = None
    note: str = ""
    resident: int | None = None
    peak: int | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    read_share: float | None = None
    prefill_share: float | None = None

    @property
    def median(self) -> float | None:
        """Median seconds of a call; None if the arm did not run."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def p10(self) -> float | None:
        """Tenth percentile of the seconds of a call, the nearest one measured; None if the arm did not run."""
        return sorted(self.seconds)[round((len(self.seconds) - 1) / 10)] if self.seconds else None

    @property
    def speed(self) -> float | None:
        """Bytes per second at the median; None if the arm did not run."""
        return self.nbytes / self.median if self.median else None


def wall(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def interleave(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int,
    after: Callable[[], object] = lambda: None,
    clock: Callable[[Callable[[], object]], float] = wall,
) -> dict[str, list[float]]:
    """Times each arm once per round, in a new order each round, so that no arm always follows the same one.

    Args:
        arms: what to call, by name.
        rounds: timed calls of each.
        warm_up: calls of each before that, not timed.
        after: called after each round.
        clock: makes a call and tells its seconds.

    Returns:
        Seconds of each timed call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    shuffle = random.Random(0).shuffle  # noqa: S311  # no secret
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(warm_up + rounds):
            shuffle(order)
            for name in order:
                taken = clock(arms[name])
                if number >= warm_up:
                    seconds[name].append(taken)
            after()
    finally:
        if collecting:
            gc.enable()
    return seconds


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Gives torch `count` threads; Inductor's code is compiled for a number of them, so what there is of it goes."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def relate(rows: Iterable[Row], bases: Mapping[str, Sequence[str]]) -> None:
    """Fills in `Row.ratios` of rows measured together.

    Args:
        rows: of one shape, context and number of threads.
        bases: for each name of a ratio the arms it compares with; the fastest of them counts.
    """
    rows = list(rows)
    for name, arms in bases.items():
        fastest = min((row.median for row in rows if row.arm in arms and row.median), default=None)
        for row in rows:
            if fastest and row.median:
                row.ratios[name] = fastest / row.median
