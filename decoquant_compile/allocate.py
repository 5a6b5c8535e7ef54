"""Widths of the caches of a model under a budget: an average number of bits per element.

What a cache of width b costs in quality is taken to be its sensitivity times the distortion D(b) of the codebook
(mean squared error of a standard normal); what it costs in memory is its elements times b. Keys are more sensitive than
values, and long caches than short ones, but less than in proportion to their length. So the budget goes first where it
buys most: to keys before values, and to sliding windows before long caches. Layers that are alike share what is left
over, the first ones first.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from decoquant_compile.kernels.codec import CODED_BITS, Role

_WIDTHS: Final = tuple(sorted(CODED_BITS))

_DISTORTION: Final = {2: 0.1175, 3: 0.03454, 4: 0.009501, 5: 0.002499, 8: 1.2e-4}
"""Of the Lloyd-Max codebooks; at 8 bits of the uniform grid up to the largest of 64 to 256 channels."""

_SENSITIVITY: Final = {"key": 2.5, "value": 1.0}
"""Errors of keys hurt more: the softmax amplifies them. The ratio of the KL divergences of Gemma-3-270M with only its
keys and with only its values at 3 bits (0.0043 and 0.0017)."""

_LENGTH_POWER: Final = 0.5
"""Of the elements in the sensitivity. On Gemma-3-270M at 2,048 tokens, a layer over all of them weighs about 4.4 times
as much as one over a window of 512, at 16 times the elements of a cache of 8,192."""


@dataclass(frozen=True)
class Holding:
    """One cache tensor that takes part in a budget.

    Attributes:
        role: keys or values.
        elements: of the dense tensor.
    """

    role: Role
    elements: int


def allocate(holdings: Sequence[Holding], bits: float) -> list[int]:
    """Bits of each cache tensor: their average, weighted by elements, is at most `bits`.

    Args:
        holdings: the cache tensors of a model, in its order.
        bits: average per element, at least 2.

    Raises:
        ValueError: `bits` is below the narrowest width.
    """
    if bits < _WIDTHS[0]:
        raise ValueError(f"bits={bits!r}: no cache can be narrower than {_WIDTHS[0]} bits")
    widths = [_WIDTHS[0]] * len(holdings)
    left = (bits - _WIDTHS[0]) * sum(h.elements for h in holdings)
    queue: list[tuple[float, int]] = []

    def offer(at: int) -> None:
        holding, now = holdings[at], widths[at]
        wider = _next(now)
        if wider is not None:
            sensitivity = _SENSITIVITY[holding.role] * holding.elements**_LENGTH_POWER
            gain = sensitivity * (_DISTORTION[now] - _DISTORTION[wider])
            heapq.heappush(queue, (-gain / (holding.elements * (wider - now)), at))

    for at in range(len(holdings)):
        offer(at)
    while queue:
        _, at = heapq.heappop(queue)
        wider = _next(widths[at])
        assert wider is not None
        price = holdings[at].elements * (wider - widths[at])
        if price > left + math.ulp(left):
            continue  # too wide a step for what is left; a smaller cache may still take one
        left -= price
        widths[at] = wider
        offer(at)
    return widths


def _next(width: int) -> int | None:
    at = _WIDTHS.index(width) + 1
    return _WIDTHS[at] if at < len(_WIDTHS) else None
