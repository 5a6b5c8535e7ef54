"""Synthetic keys with outliers."""

import json

import pytest
import torch
from click.testing import CliRunner

from decoquant_compile import Options
from decoquant_compile.quality.emulate import Ours
from decoquant_compile.quality.outliers import KINDS, attend, error, key_bits, main, rope, sample
from decoquant_compile.quality.rivals import parse


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_channels_stand_out(kind):
    key = sample(kind, 512, 0).key[0, 0]
    size = key.square().mean(0).sqrt()
    assert 2 <= int((size > 8 * size.median()).sum()) <= 4


def test_samples_depend_on_their_seed_alone():
    assert torch.equal(sample("rotating", 300, 3).query, sample("rotating", 300, 3).query)
    assert not torch.equal(sample("rotating", 300, 3).query, sample("rotating", 300, 4).query)


def test_rope_keeps_products_of_tokens_at_a_distance():
    x = torch.randn(16).expand(40, 16)
    turned = rope(x)
    torch.testing.assert_close(turned[3] @ turned[10], turned[20] @ turned[27], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_error_falls_with_bits_and_is_zero_where_all_is_exact(kind):
    made = sample(kind, 400, 0)
    exact = attend(None, made, 200)
    errors = [error(attend(Ours(Options(bits=bits), queries=True), made, 200), exact) for bits in (8, 4, 2)]
    assert 0 < 4 * errors[0] < errors[1]
    assert 4 * errors[1] < errors[2]
    assert error(attend(Ours(Options(bits=2, window=400), queries=True), made, 200), exact) == 0


def test_bits_count_everything():
    assert 4.1 < key_bits(Ours(Options(bits=4), queries=True), 8192) < 4.6
    assert 5 < key_bits(parse("kivi:4"), 8192) < 5.3


def test_the_command_writes_what_it_shows(tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["--bits", "4", "--methods", "kivi:2", "--seeds", "1", "--length", "300", "--prompt", "150"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(path)])
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert [row["method"] for row in rows] == ["kivi:2", "decoquant:4, queries seen", "decoquant:4, queries unseen"]
    assert all(0 < row["errors"][kind] < 2 for row in rows for kind in KINDS)


def test_a_wrong_method_is_named():
    result = CliRunner().invoke(main, ["--methods", "best"])
    assert result.exit_code == 2
    assert "'best' is no method" in result.output
