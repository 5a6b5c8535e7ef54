import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoquant_compile.quality import rivals
from decoquant_compile.quality.rivals import STANDARD, Window, parse, widths

HEADS, HEAD_DIM = 8, 64


def first(window, length, prompt, block=1):
    return window.first(length, prompt, block).tolist()


# -------------------------------------------------------------------------------------------------------------- windows


def test_a_sliding_window_holds_the_newest_tokens_with_the_querys_own():
    assert first(Window("sliding", 3), 7, 0) == [0, 0, 0, 1, 2, 3, 4]
    assert first(Window("sliding", 0), 4, 0) == [1, 2, 3, 4]  # nothing is exact, not even the token itself


def test_a_sliding_window_keeps_blocks_whole():
    assert first(Window("sliding", 2), 9, 0, block=4) == [0, 0, 0, 0, 0, 4, 4, 4, 4]


def test_blocks_gather_from_the_start():
    assert first(Window("blocks", 4), 9, 5) == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def test_after_the_prompt_all_of_it_is_stored():
    assert first(Window("after-prompt", 4), 12, 3) == [3, 3, 3, 3, 3, 3, 3, 7, 7, 7, 7, 11]


@given(
    kind=st.sampled_from(["sliding", "blocks"]),
    length=st.integers(1, 40),
    prompt=st.integers(1, 50),
    block=st.sampled_from([1, 4, 16]),
)
def test_what_is_stored_stays_stored(kind, length, prompt, block):
    if kind == "blocks":
        length = -(-length // block) * block
    at = Window(kind, length).first(300, prompt, block)
    assert (at.diff() >= 0).all()
    assert (at % block == 0).all()
    held = torch.arange(300) + 1 - at
    assert held[100:].min() >= (length if kind == "sliding" else 1)
    assert held[100:].max() < length + block if kind == "sliding" else held.max() <= length


@pytest.mark.parametrize(("kind", "block"), [("sliding", 1), ("sliding", 16), ("blocks", 16)])
def test_the_mean_of_a_window_is_what_it_holds_on_average(kind, block):
    window = Window(kind, 32)
    length = 32 * 50
    after = (torch.arange(length) + 1 - window.first(length, 0, block))[320:].double()  # before the block is stored
    after[after == (32 if kind == "blocks" else -1)] = 0  # once 32 have gathered they are stored
    assert window.mean(block) == pytest.approx(after.mean().item(), abs=0.51)


# ------------------------------------------------------------------------------------------------------------- registry


@pytest.mark.parametrize("name", STANDARD)
def test_every_standard_rival_stores_and_counts(name):
    rival = parse(name)
    x = torch.randn(1, 8, 300, 64, generator=torch.Generator().manual_seed(0))
    for role in ("key", "value"):
        found = rival.stored(x, None, role, 200)
        assert found.shape == x.shape
        assert found.isfinite().all()
        block = rival.side(role).codec.block
        assert torch.equal(found[:, :, 300 // block * block :], x[:, :, 300 // block * block :])
        assert 0 < (found - x).norm() / x.norm() < 1.5
        assert rival.exact(role, 300, 200).shape == (300,)
    bits = [rival.bits(tokens, HEADS, HEAD_DIM, HEAD_DIM) for tokens in (256, 1024, 8192)]
    assert 16 >= bits[0] >= bits[1] >= bits[2] > 2


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("q4_0", 4.5),
        ("q8_0+hadamard", 8.5),
        ("rtn:4", 4 + 16 / 512),
        ("turboquant:3", 3 + 16 / 64),
        ("paper:4", 4 + 16 / 512 + 16 * 256 / (8192 * 512)),
        ("q4_0+window", 4.5 + (16 - 4.5) * 68 / 8192),
        ("rtn:K8V2", 5 + 16 / 512),
        # keys: on average 63.5 tokens wait; values: the newest 128
        ("kivi:4", 5 + 11 * (63.5 + 128) / 2 / 8192),
        ("kivi-r32:2", 3 + 13 * (15.5 + 32) / 2 / 8192),
        ("quanto:4", 4.5 + 11.5 * 63.5 / 8192),
        ("kivi:4+sinks", 5 + 11 * (67.5 + 132) / 2 / 8192),
    ],
)
def test_stored_bits_of_published_formats(name, bits):
    assert parse(name).bits(8192, HEADS, HEAD_DIM, HEAD_DIM) == pytest.approx(bits, rel=1e-4)


def test_a_cache_shorter_than_its_window_is_in_16_bits():
    assert parse("kivi:2+window").bits(32, HEADS, HEAD_DIM, HEAD_DIM) == 16


def test_keys_and_values_may_differ():
    rival = parse("kvarn")
    x = torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(0))
    errors = [(rival.stored(x, None, role, 0) - x).norm() for role in ("key", "value")]
    assert errors[0] < 0.4 * errors[1]  # 4 bits against 2
    assert parse("rtn:K2V8").key.codec != parse("rtn:K8V2").key.codec == parse("rtn:8").key.codec


def test_the_window_of_ours_replaces_the_published_one():
    rival = parse("kivi:4+window")
    assert rival.sinks == 4
    assert rival.exact("value", 200, 100)[150] == 151 - 64
    assert rival.exact("key", 200, 100)[150] == (151 - 64) // 32 * 32
    assert parse("kivi:4").exact("key", 200, 100)[150] == 128
    assert parse("kvarn+sinks").sinks == 4


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_hadamard_helps_where_channels_differ(seed):
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(seed))
    x = x * torch.where(torch.arange(64) % 32 == 5, 30.0, 1.0)
    errors = [(parse(name).stored(x, None, "key", 0) - x).norm() for name in ("q4_0", "q4_0+hadamard")]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "no method"),
        ("kivi:", "no method"),
        ("q4_0:8", "no 8 bits"),
        ("kivi:K4V1", "no 1 bits"),
        ("kivi:four", "no width"),
        ("kivi+hadamard", "no modifier"),
        ("q4_0+nothing", r"\+hadamard, \+sinks or \+window"),
    ],
)
def test_what_is_not_a_rival_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        parse(name)


def test_widths():
    assert widths("4") == (4, 4)
    assert widths("K5V4") == widths("k5v4") == (5, 4)
    for bad in ("", "K4", "V4K4", "3.2", "-4"):
        with pytest.raises(ValueError, match="no width"):
            widths(bad)


def test_every_family_is_described():
    assert {parse(name).name.split(":")[0].split("+")[0] for name in STANDARD} <= set(rivals.describe())
    assert all(rivals.describe().values())
