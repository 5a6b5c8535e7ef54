import dataclasses

import pytest

from decoquant_compile import Options
from decoquant_compile.allocate import Holding

PAIR = [Holding("key", 100), Holding("value", 100)]


def test_own_names_and_inductor_names_are_split():
    own, patches = Options.parse({"bits": 3, "key_bits": 5, "max_autotune": True, "triton.cudagraphs": False})
    assert own == Options(bits=3, key_bits=5)
    assert own.widths(PAIR) == [5, 3]
    assert patches == {"max_autotune": True, "triton.cudagraphs": False}


def test_a_mode_becomes_inductor_settings():
    own, patches = Options.parse(None, "reduce-overhead")
    assert own == Options()
    assert patches["triton.cudagraphs"] is True


def test_an_unknown_mode_names_itself():
    with pytest.raises(ValueError, match="mode='fastest'"):
        Options.parse(None, "fastest")


def test_an_unknown_option_lists_the_valid_ones():
    with pytest.raises(ValueError, match="option 'bit' is not known: expected one of bits, key_bits, value_bits"):
        Options.parse({"bit": 4})


@pytest.mark.parametrize("name", ["bits", "key_bits", "value_bits"])
@pytest.mark.parametrize("value", [0, 1, 32, 1.9, 8.1, float("nan"), "4", True])
def test_wrong_bits_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value!r}: expected one of 16, 8, 5, 4, 3, 2"):
        Options(**{name: value})


@pytest.mark.parametrize("name", ["key_bits", "value_bits"])
@pytest.mark.parametrize("value", [6, 7, 3.2, 4.0])
def test_only_bits_can_be_an_average(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value!r}: expected one of"):
        Options(**{name: value})


@pytest.mark.parametrize("bits", [2.0, 3.2, 4.0, 6, 7, 7.9])
def test_an_average_is_met_by_unequal_widths(bits):
    options = Options(bits=bits)
    widths = options.widths(PAIR * 40)
    assert bits - 0.2 <= sum(widths) / len(widths) <= bits


def test_an_average_leaves_no_room_for_bits_of_keys():
    with pytest.raises(ValueError, match=r"bits=3.2 is an average over keys and values: leave out key_bits"):
        Options(bits=3.2, key_bits=4)


@pytest.mark.parametrize("name", ["sinks", "window", "max_rewrites"])
@pytest.mark.parametrize("value", [-1, 1.5, "2", False])
def test_wrong_counts_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value!r}"):
        Options(**{name: value})


def test_the_newest_token_is_always_exact():
    with pytest.raises(ValueError, match="window=0: expected at least 1"):
        Options(window=0)


def test_bits_may_not_be_none():
    with pytest.raises(ValueError, match="bits=None"):
        Options(bits=None)


def test_options_are_frozen_and_comparable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().bits = 2
    assert hash(Options(bits=2)) == hash(Options(bits=2))


def test_an_average_is_not_the_equal_width():
    # Equal options share a backend, and so their compiled graphs.
    assert Options(bits=4) != Options(bits=4.0)
    assert len({Options(bits=4), Options(bits=4.0), Options(bits=4.0)}) == 2
    assert "averages" not in Options.names()
