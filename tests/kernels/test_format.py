"""Formats, their keys, and the layout of a state's buffer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels import codec
from decoquant_compile.kernels.format import ALIGNMENT, UNSET, Format

formats = st.builds(
    Format,
    st.sampled_from(("key", "value")),
    st.sampled_from((16, *codec.CODED_BITS)),
    st.integers(1, 300),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    st.integers(0, 8),
    st.integers(0, 128),
)


@given(formats)
def test_key_round_trip(form):
    assert Format.parse(form.key()) == form
    assert not set(form.key()) & set("\"' \n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 6}, "bits must be one of 16, 8, 5, 4, 3, 2, got 6"),
        ({"bits": 0}, "got 0"),
        ({"role": "query"}, 'role must be "key" or "value", got \'query\''),
        ({"dtype": torch.float64}, "dtype must be one of float32, bfloat16, float16, got torch.float64"),
        ({"head_dim": 0}, "head_dim must be an integer of at least 1, got 0"),
        ({"head_dim": 64.0}, "head_dim must be an integer"),
        ({"sinks": -1}, "sinks must be an integer of at least 0, got -1"),
        ({"window": -5}, "window must be"),
    ],
)
def test_wrong_fields_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Format(**{"role": "key", "bits": 4, "head_dim": 64, "dtype": torch.bfloat16} | change)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "v0:key:4:64:bfloat16:4:64",
        "v4:key:4:64:bfloat16:4",
        "v4:key:four:64:bfloat16:4:64",
        "v4:key:4:64:bfloat17:4:64",
        "v4:both:4:64:bfloat16:4:64",
        "v4:key:7:64:bfloat16:4:64",
    ],
)
def test_wrong_keys_are_refused(key):
    with pytest.raises(ValueError, match=r"format key|role must be|bits must be"):
        Format.parse(key)


def test_pass_through_has_no_window():
    form = Format("key", 16, 64, torch.float16, sinks=4, window=64)
    assert (form.sinks, form.window) == (0, 0)
    assert form == Format("key", 16, 64, torch.float16, 0, 0)


@given(formats, st.integers(1, 4), st.integers(1, 4), st.integers(1, 300))
@settings(deadline=None)
def test_sections_are_aligned_disjoint_views(form, batch, heads, slots):
    layout = form.layout(batch, heads, slots)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.clear(buffer)
    end = 0
    for offset, dtype, shape in layout.spans:
        assert offset % ALIGNMENT == 0
        assert offset >= end
        end = offset + torch.empty(shape, dtype=dtype).nbytes
    assert end <= layout.nbytes
    sections = layout.views(buffer)
    flat = [part for section in sections for part in (section if isinstance(section, tuple) else (section,))]
    for part in flat:
        assert part.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    if form.bits == 16:
        assert sections.raw.shape == (batch, heads, slots, form.head_dim)
        assert sections.planes == ()
    else:
        assert sections.raw.numel() == 0
        assert (sections.gains < 0).all()
        assert (sections.window_positions == UNSET).all()
        assert 3 <= sections.scales.shape[1] < 255
        assert sections.means.shape[1] == (sections.scales.shape[1] if form.role == "key" else 0)


@pytest.mark.parametrize("bits", codec.CODED_BITS)
def test_size_of_a_long_cache_is_bits_plus_a_gain(bits):
    slots, head_dim = 65536, 128
    nbytes = Format("key", bits, head_dim, torch.bfloat16).layout(1, 1, slots).nbytes
    per_number = nbytes * 8 / (slots * head_dim)
    assert bits + 16 / head_dim < per_number < bits + 16 / head_dim + 0.15


def test_layout_refuses_empty_sizes():
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        Format("key", 4, 64, torch.bfloat16).layout(1, 1, 0)


@pytest.mark.parametrize(
    "buffer", [torch.empty(3, dtype=torch.uint8), torch.empty(64), torch.empty(2, 64, dtype=torch.uint8)]
)
def test_views_refuse_another_buffer(buffer):
    with pytest.raises(ValueError, match="a state buffer of this format is a contiguous uint8 tensor of"):
        Format("key", 4, 64, torch.bfloat16).layout(1, 1, 16).views(buffer)
