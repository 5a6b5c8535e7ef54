"""Random caches and attentions that the interpreter can do in a second or two."""

import math
from random import Random

import torch

from decoquant_compile.kernels import codec
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState
from decoquant_compile.kernels.triton import launch
from tests.kernels.cpu.cases import Attention, Source, Tokens, fill, mask_of
from tests.kernels.triton.interpret import interpreted

BITS = (*codec.CODED_BITS, 16)
HEAD_DIMS = (64, 128, 16, 24, 80, 96, 40, 256)
SLOTS = (65, 128, 1, 63, 64, 200, 300)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attend(case: Attention, *, ptx=False):
    forms = case.keys.format, case.values.format
    return launch.attend(*case.operands, *forms, sink=case.sink, sequences=case.sequences, wrap=interpreted, ptx=ptx)


def sink_of(source: Source, heads: int) -> torch.Tensor | None:
    """A logit for each query head, as large as those of the keys or far from them; none for some heads; or None."""
    if source.chance(50):
        return None
    sink = source.normal(heads) * source.choice((1, 3, 30))
    return sink.masked_fill(source.uniform(heads) < source.choice((0, 0, 0.3)), -math.inf)


def dequantise(state: CacheState, *stretch):
    operands = state.buffer, state.batch, state.heads, state.slots, state.format
    return launch.dequantise(*operands, *stretch, wrap=interpreted, ptx=False)


def attention(random: Random) -> Attention:
    """Any attention on a small cache, one or two programs of each kernel."""
    source = Source(random)
    dtype = source.choice(DTYPES)
    head_dim = source.choice(HEAD_DIMS)
    value_dim = source.choice((head_dim, head_dim, *HEAD_DIMS[:4]))
    batch, heads = source.choice(((1, 1), (1, 1), (2, 1), (1, 2)))
    groups = source.choice((4, 1, 2, 3, 8, 12))
    slots = source.choice(SLOTS)
    kept = [(source.choice((0, 4)), source.choice((0, 3, 32)))] * 2
    if source.chance(20):
        kept[1] = (2, 5)
    bits = [source.choice(BITS)] * 2
    if source.chance(30):
        bits[1] = source.choice(BITS)
    keys, values = (
        CacheState.empty(Format(role, width, size, dtype, *copies), batch, heads, slots, "cpu")
        for role, width, size, copies in zip(("key", "value"), bits, (head_dim, value_dim), kept, strict=True)
    )
    of_keys, of_values = (Tokens(source, batch, heads, size, dtype) for size in (head_dim, value_dim))
    end = fill(source, keys, values, of_keys, of_values)

    queries = source.choice((1, 1, 1, 2, 5))
    count = source.choice((1, queries, queries, 0, 7))
    start = source.choice((end, end, max(0, end - count), 0, slots - 1))
    positions = torch.arange(start, start + count)
    if source.chance(20):
        positions = source.integers(-2, slots + 3, count)
    length = source.choice((slots, slots, slots + 20, max(1, end), source.randint(1, slots + 5)))
    of_query = source.choice((dtype, dtype, *DTYPES))
    return Attention(
        query=source.laid_out(source.normal(batch, heads * groups, queries, head_dim).to(of_query)),
        keys=keys,
        values=values,
        key=source.laid_out(of_keys.make(count, source.choice((dtype, of_query)))),
        value=source.laid_out(of_values.make(count, source.choice((dtype, of_query)))),
        positions=positions,
        mask=mask_of(source, batch, heads * groups, queries, length, source.choice((of_query, of_query, *DTYPES))),
        scale=source.choice((None, None, 0.3 / head_dim**0.5)),
        softcap=source.choice((None, None, None, 20.0)),
        first=source.choice((0, 0, 0, -3, 5)),
        length=length,
        sink=sink_of(source, heads * groups),
    )
