"""Bit planes in tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels import codec, tiles

ROLES = st.sampled_from(("key", "value"))
BITS = st.sampled_from(codec.CODED_BITS)


def planes_of(role, bits, head_dim, slots, batch=2, heads=2):
    return tuple(
        torch.randint(0, 256, (batch, heads, *shape), dtype=torch.uint8)
        for shape in tiles.shapes(role, bits, head_dim, slots)
    )


@given(ROLES, BITS, st.sampled_from((1, 16, 24, 64, 80, 96, 192)), st.integers(1, 200), st.data())
@settings(deadline=None, max_examples=60)
def test_round_trip(role, bits, head_dim, slots, data):
    """What is written is read back, and no other token changes."""
    planes = planes_of(role, bits, head_dim, slots)
    before = tiles.read(planes, slice(0, slots), role=role, bits=bits, head_dim=head_dim)
    chosen = data.draw(st.lists(st.integers(0, slots - 1), unique=True, max_size=20))
    codes = torch.randint(0, 2**bits, (len(chosen), 2, head_dim)).to(torch.uint8)
    row = torch.tensor([slot % 2 for slot in chosen], dtype=torch.int64)
    slot = torch.tensor(chosen, dtype=torch.int64)
    tiles.write(planes, codes, row, slot, role=role, bits=bits)
    before[row, :, slot] = codes
    assert torch.equal(tiles.read(planes, slice(0, slots), role=role, bits=bits, head_dim=head_dim), before)
    first = data.draw(st.integers(0, slots - 1))
    part = tiles.read(planes, slice(first, slots), role=role, bits=bits, head_dim=head_dim)
    assert torch.equal(part, before[:, :, first:])


@given(ROLES, BITS, st.integers(0, 127), st.integers(0, 95))
@settings(deadline=None, max_examples=60)
def test_a_code_stands_where_the_documentation_says(role, bits, token, channel):
    planes = tuple(plane.zero_() for plane in planes_of(role, bits, 96, 128, batch=1, heads=1))
    codes = torch.zeros(1, 1, 96, dtype=torch.uint8)
    codes[0, 0, channel] = 2**bits - 1
    tiles.write(planes, codes, torch.tensor([0]), torch.tensor([token]), role=role, bits=bits)
    along, across = (channel, token) if role == "key" else (token % 64, channel)
    for plane, width in zip(planes, codec.planes(bits), strict=True):
        row, rest = divmod(along, 32 // width)
        lane, byte = divmod(rest, 4)
        if role == "key":
            at = (0, 0, token // 16, row, across % 16, byte)
        else:
            at = (0, 0, token // 64, across // 16, row, across % 16, byte)
        assert int(plane[at]) == (2**width - 1) << (lane * width)
        assert int((plane != 0).sum()) == 1


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("role", ["key", "value"])
def test_packed_size(role, head_dim):
    for bits in codec.CODED_BITS:
        sizes = [torch.Size(shape).numel() for shape in tiles.shapes(role, bits, head_dim, 128)]
        assert sum(sizes) * 8 == bits * head_dim * 128
