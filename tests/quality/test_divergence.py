import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoquant_compile.quality import divergence
from decoquant_compile.quality.divergence import Divergence, chunks, compare

SEEDS = st.integers(0, 2**16)


def logs(*shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(*shape, generator=generator) * scale, -1)


@given(SEEDS, st.sampled_from([0.1, 1.0, 10.0]))
def test_divergence_is_what_its_definition_says_in_double_precision(seed, scale):
    p, q = logs(7, 50, seed=seed, scale=scale), logs(7, 50, seed=seed + 1, scale=scale)
    expected = (p.double().exp() * (p.double() - q.double())).sum(-1)
    torch.testing.assert_close(divergence.divergence(p, q).double(), expected, rtol=1e-4, atol=1e-6)


def test_a_small_divergence_survives_rounding():
    p = torch.log_softmax(logs(64, 4096, seed=0).double(), -1)
    noise = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)) * 1e-3
    q = torch.log_softmax(p + noise, -1)
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(divergence.divergence(p.float(), q.float()).double(), expected, rtol=0.02, atol=0)


def test_a_distribution_does_not_diverge_from_itself():
    p = logs(3, 100, seed=0, scale=20.0)
    assert divergence.divergence(p, p).abs().max() == 0


def test_comparison_in_chunks_is_comparison_at_once(monkeypatch):
    states, other = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    following = torch.randint(0, 8, (2, 5))
    ticks = []
    whole = compare(states, {"a": other}, following, lambda x: x, 8)["a"]
    monkeypatch.setattr(divergence, "_ELEMENTS", 24)
    parts = compare(states, {"a": other}, following, lambda x: x, 8, lambda: ticks.append(1))["a"]
    assert len(ticks) == chunks(10, 8) == 4
    for name in ("kl", "agree", "loss"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    p, q = torch.log_softmax(states, -1), torch.log_softmax(other, -1)
    torch.testing.assert_close(whole.kl, (p.exp() * (p - q)).sum(-1))
    assert torch.equal(whole.agree, states.argmax(-1) == other.argmax(-1))
    torch.testing.assert_close(whole.loss, (p - q).gather(-1, following[..., None])[..., 0])


def test_summary_and_bins():
    kl = torch.tensor([[1.0, 3.0, 2.0], [2.0, 10.0, 0.0]])
    found = Divergence(kl, torch.tensor([[True, False, True], [True, True, True]]), -kl)
    summary = found.summary()
    assert summary["kl_mean"] == pytest.approx(3.0)
    assert summary["kl_mean_error"] == pytest.approx(1.0)  # means 2 and 4: standard deviation sqrt(2), over sqrt(2)
    assert summary["kl_median"] == 2.0
    assert summary["kl_99"] == summary["kl_99.9"] == summary["kl_max"] == 10.0
    assert summary["top1"] == pytest.approx(5 / 6)
    assert summary["ln_ppl_ratio"] == pytest.approx(-3.0)
    assert found.by_position(torch.tensor([5, 8, 11])) == [(5, 5, 1.5), (8, 8, 6.5), (11, 11, 1.0)]


def test_one_window_has_no_standard_error():
    summary = Divergence(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 4)).summary()
    assert math.isnan(summary["kl_mean_error"])
    assert summary["kl_mean"] == 1
