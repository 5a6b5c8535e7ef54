"""How far one distribution of the next token is from another: Kullback-Leibler divergence, agreement, perplexity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

_ELEMENTS: Final = 2**24
"""Logits that stand in memory at a time, of each of the distributions compared."""

_BINS: Final = 8


@dataclass(frozen=True)
class Divergence:
    """Of one method from the exact model, at every compared position.

    Attributes:
        kl: ``KL(exact || method)`` in nats, float32 ``[windows, positions]``.
        agree: whether both put the same token first, bool ``[windows, positions]``.
        loss: what the method adds to the negative log-likelihood of the token that follows, in nats, float32
            ``[windows, positions]``.
    """

    kl: Tensor
    agree: Tensor
    loss: Tensor

    def summary(self) -> dict[str, float]:
        """Mean, quantiles and standard errors over windows; with one window, the standard errors are nan."""
        kl = self.kl.double().flatten()
        quantile = lambda share: kl.sort().values[min(len(kl) - 1, int(share * len(kl)))].item()
        return {
            "kl_mean": kl.mean().item(),
            "kl_mean_error": _error(self.kl),
            "kl_median": kl.median().item(),
            "kl_99": quantile(0.99),
            "kl_99.9": quantile(0.999),
            "kl_max": kl.max().item(),
            "top1": self.agree.double().mean().item(),
            "top1_error": _error(self.agree),
            "ln_ppl_ratio": self.loss.double().mean().item(),
            "ln_ppl_ratio_error": _error(self.loss),
        }

    def by_position(self, positions: Tensor) -> list[tuple[int, int, float]]:
        """Mean KL divergence along the window.

        Args:
            positions: of the columns, int64 ``[positions]``, ascending.

        Returns:
            Up to eight bins: first position, last position, mean in nats.
        """
        columns = torch.arange(len(positions)).chunk(_BINS)
        return [(int(positions[c[0]]), int(positions[c[-1]]), self.kl[:, c].double().mean().item()) for c in columns]


def _error(x: Tensor) -> float:
    """Standard error of the mean, from the means of windows."""
    means = x.double().mean(1)
    return (means.std() / len(means) ** 0.5).item() if len(means) > 1 else float("nan")


def _distribution(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1)


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """``KL(exact || other)`` in nats.

    Summed as ``q - p + p (log p - log q)``: no term is negative, so that what is left of a small divergence after
    rounding is not the difference of large numbers.

    Args:
        exact: log-probabilities, float32 ``[..., vocabulary]``.
        other: the same of the other distribution.
    """
    p = exact.exp()
    return (p * (exact - other)).add_(other.exp()).sub_(p).clamp_min_(0).sum(-1)


def compare(
    exact: Tensor,
    others: Mapping[str, Tensor],
    following: Tensor,
    logits: Callable[[Tensor], Tensor],
    vocabulary: int,
    tick: Callable[[], Any] = lambda: None,
) -> dict[str, Divergence]:
    """Compares any number of methods with the exact model.

    Args:
        exact: states of the exact model, ``[windows, positions, width]``.
        others: states of each method.
        following: the token that really follows, int64 ``[windows, positions]``.
        logits: maps states to logits.
        vocabulary: number of logits of a state.
        tick: called for each of the chunks that `chunks` counts.
    """
    size = _chunk(vocabulary)
    found: dict[str, list[Tensor]] = {name: [] for name in others}
    flat = following.flatten()[:, None]
    states = {name: state.flatten(0, 1) for name, state in others.items()}
    for begin, reference in enumerate(exact.flatten(0, 1).split(size)):
        at = slice(begin * size, (begin + 1) * size)
        p = _distribution(logits(reference))
        first, likelihood = p.argmax(-1), p.gather(-1, flat[at])[:, 0]
        for name, state in states.items():
            q = _distribution(logits(state[at]))
            agree = (q.argmax(-1) == first).float()
            found[name].append(torch.stack([divergence(p, q), agree, likelihood - q.gather(-1, flat[at])[:, 0]]))
        tick()
    rows = {name: torch.cat(parts, 1).unflatten(1, following.shape) for name, parts in found.items()}
    return {name: Divergence(kl, agree.bool(), loss) for name, (kl, agree, loss) in rows.items()}


def chunks(positions: int, vocabulary: int) -> int:
    """Number of chunks in which `compare` goes over that many positions of all windows."""
    return -(-positions // _chunk(vocabulary))


def _chunk(vocabulary: int) -> int:
    return max(1, _ELEMENTS // vocabulary)
