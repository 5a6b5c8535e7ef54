"""Widths under a budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoquant_compile.allocate import Holding, allocate
from decoquant_compile.kernels.codec import CODED_BITS

HOLDINGS = st.lists(
    st.builds(Holding, st.sampled_from(["key", "value"]), st.sampled_from([1, 512, 8192, 10**9])),
    min_size=1,
    max_size=40,
)


@given(HOLDINGS, st.floats(2, 9))
def test_the_average_is_never_above_the_budget(holdings, bits):
    widths = allocate(holdings, bits)
    assert set(widths) <= set(CODED_BITS)
    total = sum(h.elements for h in holdings)
    assert sum(w * h.elements for w, h in zip(widths, holdings, strict=True)) <= bits * total * (1 + 1e-12)


@given(HOLDINGS, st.floats(2, 8))
def test_no_cache_could_still_be_widened(holdings, bits):
    widths = allocate(holdings, bits)
    left = bits * sum(h.elements for h in holdings) - sum(w * h.elements for w, h in zip(widths, holdings, strict=True))
    for width, holding in zip(widths, holdings, strict=True):
        wider = min((w for w in CODED_BITS if w > width), default=None)
        assert wider is None or holding.elements * (wider - width) > left * (1 - 1e-9)


def test_keys_come_before_values():
    assert allocate([Holding("value", 100), Holding("key", 100)], 3.5) == [3, 4]


def test_short_caches_come_before_long_ones():
    assert allocate([Holding("key", 8192), Holding("key", 512)], 3.2) == [3, 5]


def test_equal_layers_share_what_is_left_over():
    widths = allocate([Holding("key", 100)] * 10, 3.2)
    assert sorted(widths, reverse=True) == widths
    assert sum(widths) == 32


def test_a_budget_that_nothing_meets_is_named():
    with pytest.raises(ValueError, match=r"bits=1\.5: no cache can be narrower than 2 bits"):
        allocate([Holding("key", 1)], 1.5)
