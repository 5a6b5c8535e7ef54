"""Codecs inside the attention of the plain model: whole windows at once, no cache.

The queries of the prompt attend to exact keys and values, as in every engine. Each later query sees the tokens before
it as its scheme holds them at that moment: in 16 bits as long as they are sinks or stand in the window, and otherwise
as they come back from the store. Masks are the model's own, so that sliding-window layers stay what they are.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from decoquant_compile.kernels import codec
from decoquant_compile.kernels.format import REFIT_GROWTH
from decoquant_compile.options import Options

_NAME: Final = "decoquant_emulation"
_ROWS: Final = 256
"""Queries whose logits stand in memory at a time."""


class Scheme(Protocol):
    """How a cache is held."""

    @property
    def sinks(self) -> int:
        """Tokens at the start that stay in 16 bits."""

    def stored(self, x: Tensor, grouped: Tensor | None, role: codec.Role, prompt: int) -> Tensor:
        """What comes back of each token once it is stored.

        Args:
            x: keys or values, float32 ``[batch, heads, length, head_dim]``.
            grouped: queries of each KV head, float32 ``[batch, heads, group, length, head_dim]``; None for values.
            role: what `x` is.
            prompt: number of leading tokens that are stored at once.

        Returns:
            Like `x`.
        """

    def exact(self, role: codec.Role, length: int, prompt: int) -> Tensor:
        """For each query, the first of the newest tokens that it sees in 16 bits, int64 ``[length]``."""


# ----------------------------------------------------------------------------------------------------------------- ours


class _Fitted(NamedTuple):
    """What tokens are encoded with: of each head, ``[batch, heads, 1, head_dim]``."""

    parameters: codec.Parameters
    weight: Tensor | None


class _Statistics:
    """Of the tokens so far; each fit halves the weight of those before it, as `store` does."""

    def __init__(self, x: Tensor) -> None:
        self.count, self.mean, self.deviation = 0, torch.zeros_like(x[:, :, 0]), torch.zeros_like(x[:, :, 0])
        self.energy: Tensor | None = None

    def add(self, x: Tensor, grouped: Tensor | None) -> None:
        """Tokens ``[batch, heads, tokens, head_dim]``, with their queries if those were seen."""
        added, mean = x.shape[2], x.mean(2)
        shift, total = mean - self.mean, self.count + added
        self.deviation += (x - mean[:, :, None]).square().sum(2) + shift**2 * (self.count * added / total)
        self.mean += shift * (added / total)
        self.count = total
        if grouped is not None:
            energy = grouped.square().sum((2, 3))
            self.energy = energy if self.energy is None else self.energy + energy

    def fit(self, role: codec.Role) -> _Fitted:
        """Parameters for the tokens that follow."""
        weight = None if self.energy is None else codec.weights(self.energy)
        parameters = codec.fit(self.mean, self.deviation / self.count, weight, role=role)
        self.count -= self.count // 2
        self.deviation *= 0.5
        if self.energy is not None:
            self.energy *= 0.5
        return _Fitted(
            codec.Parameters(*(p[:, :, None] for p in parameters)), None if weight is None else weight[:, :, None]
        )


def _store(x: Tensor, fitted: _Fitted, role: codec.Role, bits: int) -> Tensor:
    """What tokens come back as."""
    codes, gain = codec.encode(x, fitted.parameters, fitted.weight, role=role, bits=bits)
    return codec.decode(codec.lookup(codes, bits), gain, fitted.parameters)


@dataclass(frozen=True)
class Ours:
    """This package's recipe, emulated: a control of the real operators, and the means to quantise one layer alone.

    Attributes:
        options: as of the backend; not an average over caches of different widths.
        queries: whether the prompt's queries are known to the fit (compiled prefill) or not (eager prefill).
    """

    options: Options
    queries: bool

    @property
    def sinks(self) -> int:
        """Tokens at the start that stay in 16 bits."""
        return self.options.sinks

    def exact(self, role: codec.Role, length: int, prompt: int) -> Tensor:  # noqa: ARG002 - the same for both
        """See `Scheme`."""
        return (torch.arange(length) + 1 - self.options.window).clamp_min(0)

    def stored(self, x: Tensor, grouped: Tensor | None, role: codec.Role, prompt: int) -> Tensor:
        """Fitted on the prompt, and again whenever the number of tokens has grown enough; see `Scheme`."""
        own = self.options.key_bits if role == "key" else self.options.value_bits
        bits = int(self.options.bits) if own is None else own
        length = x.shape[2]
        if bits == 16:
            return x
        out, begin, end, statistics = x.clone(), self.sinks, max(prompt, self.sinks + 1), _Statistics(x)
        while begin < length:
            seen = grouped is not None and (self.queries or begin >= prompt)
            statistics.add(x[:, :, begin:end], grouped[:, :, :, begin:end] if seen and grouped is not None else None)
            fitted = statistics.fit(role)
            # The prompt is encoded by the fit on itself, later tokens by the fit on those before them
            first = self.sinks if begin == self.sinks else end
            last = min(length, self.sinks + math.ceil(REFIT_GROWTH * (end - self.sinks)))
            out[:, :, first:last] = _store(x[:, :, first:last], fitted, role, bits)
            if last == length:
                break
            begin, end = end, last
        return out


# ------------------------------------------------------------------------------------------------------------ attention


@dataclass(frozen=True)
class Emulation:
    """A scheme at work in some layers of a model.

    Attributes:
        scheme: how the caches are held; None to attend exactly everywhere.
        prompt: tokens whose queries attend exactly.
        layers: that it works in; None for all.
        roles: of what it is applied to.
    """

    scheme: Scheme | None
    prompt: int
    layers: frozenset[int] | None = None
    roles: frozenset[codec.Role] = frozenset({"key", "value"})

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """An attention function of transformers.

        Args:
            module: the attention; its ``layer_idx`` tells the layer.
            query: ``[batch, query heads, length, head_dim]``.
            key: ``[batch, heads, length, head_dim]``.
            value: ``[batch, heads, length, value head_dim]``.
            attention_mask: additive, ``[batch, 1, length, length]``.
            scaling: of the logits.
            softcap: of the logits, as in Gemma 2.
            s_aux: a logit for each query head that takes part in the softmax and in nothing else, as in GPT-OSS.
        """
        dtype, length = query.dtype, query.shape[2]
        query, key, value = query.float(), key.float(), value.float()
        grouped = query.unflatten(1, (key.shape[1], -1))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        works = self.scheme is not None and (self.layers is None or getattr(module, "layer_idx", None) in self.layers)
        keys = self._side(key, grouped, "key") if works else None
        values = self._side(value, None, "value") if works else None
        rows = []
        for begin in range(0, length, _ROWS):
            at = slice(begin, min(begin + _ROWS, length))
            end = at.stop
            logits = _dot(grouped[:, :, :, at], key[:, :, :end])
            if keys is not None:
                exact = self._exact(keys.exact, at, key.device)
                logits = torch.where(exact, logits, _dot(grouped[:, :, :, at], keys.stored[:, :, :end]))
            logits = logits * scale
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            logits = logits + attention_mask[:, :, None, at, :end]
            weights = _softmax(logits, s_aux)
            if values is None:
                rows.append(weights @ value[:, :, None, :end])
            else:
                kept = weights * self._exact(values.exact, at, value.device)
                rows.append(kept @ value[:, :, None, :end] + (weights - kept) @ values.stored[:, :, None, :end])
        return torch.cat(rows, 3).flatten(1, 2).transpose(1, 2).to(dtype).contiguous(), None

    def _side(self, x: Tensor, grouped: Tensor | None, role: codec.Role) -> "_Side | None":
        if role not in self.roles:
            return None
        assert self.scheme is not None
        stored = self.scheme.stored(x, grouped, role, self.prompt)
        return _Side(stored, self.scheme.exact(role, x.shape[2], self.prompt))

    def _exact(self, first: Tensor, at: slice, device: torch.device) -> Tensor:
        """Which tokens are exact for the queries of some rows, bool ``[rows, tokens]``."""
        assert self.scheme is not None
        row, column = torch.arange(at.start, at.stop)[:, None], torch.arange(at.stop)
        return ((row < self.prompt) | (column < self.scheme.sinks) | (column >= first[at, None])).to(device)


class _Side(NamedTuple):
    """Keys or values of one layer: as they come back from the store, and `Scheme.exact`."""

    stored: Tensor
    exact: Tensor


def _dot(grouped: Tensor, key: Tensor) -> Tensor:
    return grouped @ key[:, :, None].transpose(-1, -2)


def _softmax(logits: Tensor, s_aux: Tensor | None) -> Tensor:
    if s_aux is None:
        return torch.softmax(logits, -1)
    extra = s_aux.float().view(logits.shape[1], logits.shape[2], 1, 1).expand(*logits.shape[:-1], 1)
    return torch.softmax(torch.cat([logits, extra], -1), -1)[..., :-1]


@contextlib.contextmanager
def emulated(model: PreTrainedModel, emulation: Emulation, *, otherwise: str) -> Iterator[None]:
    """Run the model's attentions as `emulation` says while the block is open.

    Args:
        model: whose attentions go through transformers' registry.
        emulation: what they do.
        otherwise: the implementation of attention that the model has outside of the block.
    """
    AttentionInterface.register(_NAME, emulation.attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(otherwise)
