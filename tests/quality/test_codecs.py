import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoquant_compile.quality.codecs import (
    Factors,
    Grouped,
    PerChannel,
    VarianceNormalised,
    asymmetric,
    half_quadratic,
    llama_cpp,
    lloyd_max,
    normalised_lloyd_max,
    small_tensor,
    symmetric,
)

ROUNDINGS = {
    "symmetric": symmetric,
    "asymmetric": asymmetric,
    "hqq": half_quadratic,
    "lloyd-max": normalised_lloyd_max,
}
SEEDS = st.integers(0, 2**16)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(x, y):
    return ((x - y).norm() / x.norm()).item()


def codecs(bits):
    return {
        "token": Grouped(symmetric, bits, None, 16),
        "block": Grouped(asymmetric, bits, 32, 32),
        "rotated": Grouped(normalised_lloyd_max, bits, 2**30, 16, rotated=True),
        "channel": PerChannel(bits, 32),
        "factors": Factors(bits),
        "factors-n3": Factors(bits, before=(4,)),
        "factors-n4": Factors(bits, before=(4, 4)),
        "keys of kvarn": VarianceNormalised(bits, "channel"),
        "values of kvarn": VarianceNormalised(bits, "token"),
    }


# ------------------------------------------------------------------------------------------------------------ roundings


@given(SEEDS, st.sampled_from(sorted(ROUNDINGS)), st.sampled_from([2, 3, 4, 5]))
@settings(deadline=None)
def test_a_row_has_no_more_values_than_codes(seed, name, bits):
    rows = ROUNDINGS[name](normal(6, 64, seed=seed), bits)
    assert max(len(row.unique()) for row in rows) <= 2**bits - (name == "symmetric")


@pytest.mark.parametrize("name", ROUNDINGS)
def test_the_error_of_a_rounding_falls_with_the_bits(name):
    x = normal(32, 64)
    errors = [error(x, ROUNDINGS[name](x, bits)) for bits in (2, 3, 4, 5)]
    assert all(b < 0.7 * a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("rounding", [*ROUNDINGS.values(), llama_cpp], ids=[*ROUNDINGS, "llama.cpp"])
def test_zeros_and_constants_come_back(rounding):
    x = torch.stack([torch.zeros(32), torch.full((32,), 3.0), torch.full((32,), -0.5)])
    found = rounding(x, 4)
    assert found.isfinite().all()
    assert found[0].abs().max() < 1e-5
    assert (found[1:] - x[1:]).abs().max() < 0.15 * 3


def test_the_largest_entry_of_a_llama_cpp_block_is_exact_and_the_grid_is_its_own():
    x = torch.tensor([[-8.0, 7.0, 0.4, 0.6, -0.4, 8.0]])  # of equal peaks the first counts: the scale is 1
    assert llama_cpp(x, 4).tolist() == [[-8.0, 7.0, 0.0, 1.0, 0.0, 7.0]]
    assert llama_cpp(-x, 4).tolist() == [[8.0, -7.0, 0.0, -1.0, 0.0, -7.0]]
    assert torch.equal(llama_cpp(x, 8), symmetric(x, 8))


def test_the_asymmetric_grid_spans_the_row():
    x = torch.tensor([[1.0, 4.0, 2.6, 1.4]])
    assert asymmetric(x, 2).tolist() == [[1.0, 4.0, 3.0, 1.0]]


def test_half_quadratic_zero_points_pay_on_heavy_tails():
    x = normal(256, 64).sign() * normal(256, 64).abs() ** 3
    spread = lambda y: (x - y).abs().pow(0.7).mean()
    assert spread(half_quadratic(x, 3)) < spread(asymmetric(x, 3))


@pytest.mark.parametrize(
    ("bits", "decibels"),
    [(1, 4.40), (2, 9.30), (3, 14.62), (4, 20.22), (5, 26.01)],  # Jayant and Noll, Digital Coding of Waveforms, 1984
)
def test_lloyd_max_has_the_published_distortion(bits, decibels):
    entries, thresholds = lloyd_max(bits)
    x = torch.linspace(-8, 8, 200001)
    weight = torch.exp(-x.square() / 2)
    found = (weight * (x - entries[torch.bucketize(x, thresholds)]) ** 2).sum() / weight.sum()
    assert -10 * math.log10(found.item()) == pytest.approx(decibels, abs=0.01)


# --------------------------------------------------------------------------------------------------------------- codecs


@pytest.mark.parametrize("name", codecs(4))
def test_the_error_falls_with_the_bits_and_the_count_rises_with_them(name):
    x = normal(1, 8, 256, 32)
    errors = [error(x, codecs(bits)[name].store(x, 128)) for bits in (2, 3, 4, 5)]
    assert all(b < 0.75 * a for a, b in itertools.pairwise(errors))
    counts = [codecs(bits)[name].nbits(256, 8, 32) for bits in (2, 3, 4, 5)]
    assert {b - a for a, b in itertools.pairwise(counts)} == {256 * 8 * 32}


@pytest.mark.parametrize("name", codecs(4))
def test_sequences_of_a_batch_do_not_meet(name):
    codec = codecs(3)[name]
    x = normal(3, 8, 128, 32) * torch.tensor([1.0, 30.0, 0.02])[:, None, None, None]
    together = codec.store(x, 64)
    apart = torch.cat([codec.store(row[None], 64) for row in x])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", codecs(4))
@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_stored_tokens_do_not_change_when_more_arrive(name, seed):
    codec = codecs(4)[name]
    x = normal(1, 8, 256, 32, seed=seed)
    torch.testing.assert_close(codec.store(x, 128)[:, :, :128], codec.store(x[:, :, :128], 128), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", codecs(4))
def test_zeros_and_outliers_stay_finite(name):
    x = torch.zeros(1, 8, 128, 32)
    assert codecs(4)[name].store(x, 64).abs().max() < 1e-4
    x[:, 1, 5, 3] = 1e4
    found = codecs(4)[name].store(x, 64)
    assert found.isfinite().all()


def test_groups_of_a_channel_are_consecutive_tokens():
    x = normal(1, 1, 64, 4)
    found = PerChannel(3, 32).store(x, 0)
    for group in (slice(0, 32), slice(32, 64)):
        for channel in range(4):
            torch.testing.assert_close(found[0, 0, group, channel], asymmetric(x[0, 0, group, channel][None], 3)[0])


def test_one_scale_for_a_token_spans_all_heads():
    x = normal(1, 4, 3, 8)
    found = Grouped(symmetric, 4, None, 16).store(x, 0)
    torch.testing.assert_close(found[0, :, 1].flatten(), symmetric(x[0, :, 1].reshape(1, -1), 4)[0])


def test_groups_that_do_not_divide_a_head_are_refused():
    with pytest.raises(ValueError, match="32"):
        Grouped(symmetric, 4, 32, 16).store(normal(1, 1, 2, 48), 0)
    with pytest.raises(ValueError, match="256"):
        Factors(4, before=(4, 4)).store(normal(1, 1, 2, 64), 2)


@pytest.mark.parametrize("before", [(), (4,), (4, 4)])
def test_the_factors_are_lossless_at_full_rank(before):
    """Quantised to 16 bits, what is left is the rounding of the codes and of nothing else."""
    x = normal(2, 4, 300, 64) * torch.logspace(-1, 1, 64)
    assert error(x, Factors(16, before=before).store(x, 200)) < 2e-4


def test_the_factors_with_two_sites_are_the_balanced_singular_value_decomposition():
    x = normal(1, 2, 100, 32)
    rows = x.transpose(1, 2).reshape(-1, 16).double()
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    small = right.T * singular.sqrt()  # as U sqrt(S) of the transposed unfolding
    large = rows @ torch.linalg.inv(small).T
    rounded = symmetric(large.reshape(100, -1).float(), 4).double().reshape(-1, 16)
    expected = (rounded @ small.T).reshape(1, 100, 2, 32).transpose(1, 2).float()
    assert error(expected, Factors(4).store(x, 100)) < 0.02  # the small tensor is in float16: a few codes round apart


def test_more_sites_fit_structure_across_far_channels():
    x = normal(1, 4, 512, 64)
    far = torch.tensor([5.0, 0.2, 0.2, 0.2]).repeat_interleave(64)  # each quarter of the channels has its own size
    x = (x.transpose(1, 2).flatten(2) * far).unflatten(2, (4, 64)).transpose(1, 2)
    weighted = lambda before: error(x / far.view(1, 4, 1, 64), Factors(4, before).store(x, 512) / far.view(1, 4, 1, 64))
    assert weighted((4,)) < 0.8 * weighted(())


def test_a_small_tensor_splits_the_singular_values_evenly():
    gram = torch.diag(torch.tensor([16.0, 1.0])).double()[None]
    small, inverse = small_tensor(gram)
    norms = small[0].norm(dim=0).sort().values  # of the columns: the fourth roots of the Gram matrix's eigenvalues
    assert (norms[1] / norms[0]).item() == pytest.approx(2.0, rel=1e-3)
    torch.testing.assert_close(small @ inverse, torch.eye(2)[None], atol=1e-3, rtol=0)


@pytest.mark.parametrize("along", ["channel", "token"])
def test_variance_normalisation_bears_outliers_on_both_axes(along):
    x = normal(1, 1, 128, 64)
    x = x * torch.where(torch.arange(128) % 16 == 3, 20.0, 1.0)[:, None]
    plain = Grouped(asymmetric, 4, 64, 32, rotated=True) if along == "token" else PerChannel(4, 128)
    small = torch.arange(128) % 16 != 3
    normalised = VarianceNormalised(4, along).store(x, 0)
    assert error(x[:, :, small], normalised[:, :, small]) < 1.02 * error(x[:, :, small], plain.store(x, 0)[:, :, small])
    assert error(x[:, :, small], normalised[:, :, small]) < 0.25


# ----------------------------------------------------------------------------------------------------------------- bits


def test_stored_bits_are_those_of_the_formats():
    """Of 8 heads with 64 channels, 1,024 tokens."""
    per_element = lambda codec: codec.nbits(1024, 8, 64) / (1024 * 8 * 64)
    assert per_element(Grouped(symmetric, 4, None, 16)) == 4 + 16 / 512
    assert per_element(Grouped(llama_cpp, 4, 32, 16)) == 4.5  # 18 bytes for 32 elements
    assert per_element(Grouped(llama_cpp, 8, 32, 16)) == 8.5  # 34 bytes
    assert per_element(Grouped(asymmetric, 2, 64, 32)) == 2.5
    assert per_element(PerChannel(2, 32)) == 3.0
    assert per_element(Factors(4)) == 4 + 16 / 512 + 16 * 256 / (1024 * 512)
    assert math.isclose(per_element(Factors(4, (4, 4))), 4 + 16 / 512 + 16 * (256 + 16 + 256) / (1024 * 512))
    assert per_element(VarianceNormalised(4, "channel")) == 4 + (32 * 64 + 16 * 128) / (128 * 64)
    assert per_element(VarianceNormalised(2, "token")) == 2 + (32 * 128 + 16 * 64) / (128 * 64)
