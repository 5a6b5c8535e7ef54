"""What the end-to-end tests share: compiled functions under `enable`, feeding in chunks, and distances of logits."""

import contextlib
import copy

import torch
from torch._inductor import config as inductor_config
from transformers import StaticCache

import decoquant_compile
from decoquant_compile import CacheTensor
from decoquant_compile._compat import ATEN_KERNELS

NOISE = 2e-5


def noise(bits):
    """What logits may differ by in floats: a packed cache is read with queries and weights of 15 bits."""
    return NOISE if bits == 16 else 2e-3


# So small that nearly every token is read from its code.
SMALL = {"sinks": 2, "window": 8}


@contextlib.contextmanager
def packing(*, inductor=ATEN_KERNELS, **options):
    """`enable(**options)`; on leaving, every attention of every graph must have been rewritten and must have run so."""
    torch.compiler.reset()
    with inductor_config.patch(inductor), decoquant_compile.enable(**options) as session:
        yield session
    report = session.report()
    assert report.caches, f"nothing was taken over\n{report}"
    for graph in report.graphs:
        assert graph.findings, f"{graph.name}\n{report}"
        assert all(finding.rewritten for finding in graph.findings), f"{graph.name}\n{report}"
        assert graph.calls > graph.dense_calls == 0, f"{graph.name}\n{report}"


def write_forms(session):
    """The ways in which the compiled graphs write their caches."""
    return {finding.write for finding in session.report().findings}


def static_cache(model, batch=1, slots=96, *, early=True):
    """A static cache; `early` allocates it, which a prefill that is itself compiled needs."""
    cache = StaticCache(config=model.config, max_cache_len=slots)
    if early:
        config = model.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        cache.early_initialization(batch, heads, head_dim, model.dtype, torch.device("cpu"))
    return cache


@torch.no_grad()
def feed(forward, ids, chunks, cache, *, eager=None, mask=None):
    """Logits of all tokens, fed in chunks; the first chunk goes through `eager` if that is given.

    `mask` is Hugging Face's attention mask over `ids`, 0 for padding; positions count from the first other token.
    """
    rows, at = [], 0
    for size in chunks:
        call = forward if at or eager is None else eager
        extra = {}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            extra = {"attention_mask": mask[:, : at + size], "position_ids": positions[:, at : at + size]}
        rows.append(call(input_ids=ids[:, at : at + size], past_key_values=cache, **extra).logits.float())
        at += size
    return torch.cat(rows, 1)


def shown(holder):
    """A dense copy of a cache, or of a model with caches, as the handles in it show their content."""
    return decoquant_compile.restore(copy.deepcopy(holder))


def distance(got, expected):
    """Largest difference, in standard deviations of what is expected."""
    return float((got - expected).abs().max() / expected.std())


def tensors(cache):
    """The keys and values of a static cache."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def assert_packed(caches):
    """No cache tensor is dense."""
    assert [type(tensor) for tensor in caches] == [CacheTensor] * len(caches)
    assert decoquant_compile.nbytes(caches).dense == 0
