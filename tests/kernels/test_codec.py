"""Codec mathematics: codebooks, packing, rotation, fit, and the round trip's error."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoquant_compile.kernels import codec
from decoquant_compile.kernels.codec import Parameters

BITS = st.sampled_from(codec.CODED_BITS)
ROLES = st.sampled_from(("key", "value"))
HEAD_DIMS = st.integers(1, 40) | st.sampled_from((64, 80, 96, 127, 128, 192, 256))
# Least mean squared error of a standard normal: Max, "Quantizing for minimum distortion", 1960, table I
LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


def identity(head_dim):
    return Parameters(torch.zeros(head_dim, dtype=torch.bfloat16), torch.ones(head_dim, dtype=torch.bfloat16))


def fitted(x, role, bits, weight=None):
    return codec.fit(x.mean(0), x.var(0, correction=0), weight, role=role, bits=bits)


def round_trip(x, parameters, role, bits):
    codes, gain = codec.encode(x, parameters, role=role, bits=bits)
    entry = codec.lookup(codes, bits)
    return codec.decode(entry, gain, parameters)


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_codebook_is_lloyd_max(bits):
    book = [entry / codec.steps(bits) for entry in codec.entries(bits)]
    density = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    mass = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))
    edges = [-40.0, *((a + b) / 2 for a, b in itertools.pairwise(book)), 40.0]
    error = 1.0
    for u, a, b in zip(book, edges, edges[1:], strict=False):
        error += u * u * (mass(b) - mass(a)) - 2 * u * (density(a) - density(b))
    assert LLOYD_MAX[bits] * 0.999 < error < LLOYD_MAX[bits] * 1.01


@pytest.mark.parametrize("bits", codec.CODED_BITS)
def test_entries_are_ascending_int8(bits):
    book = codec.entries(bits)
    assert list(book) == sorted(set(book))
    assert len(book) == 2**bits
    assert min(book) >= -128
    assert max(book) <= 127


@pytest.mark.parametrize("bits", codec.CODED_BITS)
def test_lookup(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8).view(2, -1)
    expected = torch.tensor(codec.entries(bits)).view(2, -1) / codec.steps(bits)
    torch.testing.assert_close(codec.lookup(codes, bits), expected)


@given(HEAD_DIMS)
@settings(deadline=None)
def test_rotation_is_orthonormal(head_dim):
    eye = torch.eye(head_dim)
    matrix = codec.rotate(eye)
    torch.testing.assert_close(matrix @ matrix.T, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.unrotate(matrix), eye, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_rotation_spreads_an_outlier(head_dim):
    odd = head_dim // (head_dim & -head_dim)
    largest = codec.rotate(torch.eye(head_dim)).abs().max()
    assert largest <= math.sqrt((2 if odd > 1 else 1) / head_dim) + 1e-6


@given(st.sampled_from((16, 64, 256)), st.integers(1, 33), BITS, ROLES)
@settings(deadline=None, max_examples=30)
def test_encoding_does_not_depend_on_what_is_encoded_together(head_dim, tokens, bits, role):
    x = torch.randn(tokens, head_dim, generator=torch.manual_seed(tokens))
    parameters = fitted(x, role, bits)
    codes, gain = codec.encode(x, parameters, role=role, bits=bits)
    for i in range(0, tokens, 7):
        one, its_gain = codec.encode(x[i : i + 1], parameters, role=role, bits=bits)
        assert torch.equal(one[0], codes[i])
        assert its_gain == gain[i]


def test_fit_balances_channels():
    deviation = torch.tensor([0.1, 1.0, 10.0, 100.0])
    x = torch.randn(4096, 4, generator=torch.manual_seed(0)) * deviation + torch.tensor([3.0, 0.0, -5.0, 7.0])
    mean, scale = fitted(x, "key", 4)
    torch.testing.assert_close(mean.float(), x.mean(0), rtol=2**-8, atol=0.02)
    torch.testing.assert_close((scale / scale[1]).float(), deviation**-0.5, rtol=0.04, atol=0)
    _, scale = fitted(x, "key", 4, weight=torch.tensor([1.0, 1.0, 1.0, 1e6]))
    expected = (0.8 * 4e6 / (1e6 + 3) + 0.2) ** 0.25 / 0.2**0.25
    assert float(scale[3] / scale[1]) == pytest.approx(0.1 * expected, rel=0.04)


def test_fit_of_values_keeps_the_mean_and_balances_only_two_bits():
    x = torch.randn(512, 8, generator=torch.manual_seed(0)) * torch.arange(1, 9) + 3
    mean, scale = fitted(x, "value", 4)
    assert mean.count_nonzero() == 0
    assert (scale == scale[0]).all()
    second = x.square().mean(0)
    _, scale = fitted(x, "value", 2)
    torch.testing.assert_close((scale / scale[0]).float(), (second[0] / second) ** 0.25, rtol=0.02, atol=0)


@given(HEAD_DIMS, BITS, ROLES, st.floats(-30, 30), st.integers(2, 100), st.integers(0, 2**31))
@settings(deadline=None)
def test_fitted_tokens_have_unit_mean_square(head_dim, bits, role, exponent, tokens, seed):
    # A mean of at most a few deviations: otherwise room is left for later tokens
    x = (torch.randn(tokens, head_dim, generator=torch.manual_seed(seed)) + 1) * 2.0**exponent
    mean, scale = fitted(x, role, bits)
    y = (x - mean.float()) * scale.float()
    assert float(y.square().mean()) == pytest.approx(1, rel=0.02)


def test_zero_weights_count_as_none():
    x = torch.randn(64, 8, generator=torch.manual_seed(0))
    assert torch.equal(fitted(x, "key", 4).scale, fitted(x, "key", 4, weight=torch.zeros(8)).scale)


@st.composite
def tokens(draw):
    """Tokens of all kinds: normal, heavy-tailed, sparse, constant, with huge and dead channels, at any scale."""
    head_dim = draw(HEAD_DIMS)
    generator = torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(draw(st.integers(1, 6)), head_dim, generator=generator)
    kind = draw(st.sampled_from(("normal", "heavy", "sparse", "constant", "channels", "rotated")))
    if kind == "heavy":
        x = x**7
    elif kind == "sparse":
        x = x * (torch.rand(x.shape, generator=generator) < 2 / head_dim)
    elif kind == "constant":
        x = torch.full_like(x, float(x[0, 0]))
    elif kind == "channels":
        x = x * 10 ** (4 * torch.rand(head_dim, generator=generator) - 2) * (torch.rand(head_dim) < 0.9)
    elif kind == "rotated":  # one outlier in the domain of the codes
        x = codec.unrotate(one_hot(head_dim, draw(st.integers(0, head_dim - 1))) + 1e-3 * x)
    return x * 2.0 ** draw(st.integers(-20, 20))


def one_hot(size, index):
    return torch.eye(size)[index]


@given(tokens(), BITS, ROLES, st.booleans())
@settings(deadline=None, max_examples=400)
def test_round_trip_is_within_the_bound_for_any_token(x, bits, role, fit_to_it):
    head_dim = x.shape[-1]
    # With parameters of its own, or those of a sequence with the same scale
    parameters = fitted(x if fit_to_it else x.abs().mean() * torch.randn(64, head_dim), role, bits)
    codes, gain = codec.encode(x, parameters, role=role, bits=bits)
    entry = codec.lookup(codes, bits)
    y = codec.rotate((x - parameters.mean.float()) * parameters.scale.float())
    norm = y.norm(dim=-1)
    peak = y.abs().amax(-1) / (norm / head_dim**0.5).clamp_min(1e-30)
    peak = peak.clamp(1, head_dim**0.5)
    error = (entry * gain.float()[:, None] - y).norm(dim=-1)
    rounding = entry.norm(dim=-1) * (gain.float() * 2**-11 + 2**-25)
    bound = norm * codec.error_bound(peak, head_dim=head_dim, role=role, bits=bits)
    assert (error <= bound * 1.001 + norm * 1e-4 + rounding).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_bound_is_that_of_the_codebook_for_tokens_inside_it(bits):
    """Not vacuous: near the widest gap an error of that size occurs."""
    book = [entry / codec.steps(bits) for entry in codec.entries(bits)]
    gap = max(b - a for a, b in itertools.pairwise(book))
    sine = gap / 2
    bound = codec.error_bound(torch.tensor(1.2), head_dim=64, role="key", bits=bits)
    assert float(bound) == pytest.approx(sine / math.sqrt(1 - sine**2), rel=1e-5)


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("bits", codec.CODED_BITS)
def test_error_on_a_normal_is_the_theoretical_one(bits, role):
    x = torch.randn(4096, 128, generator=torch.manual_seed(0))
    parameters = fitted(x, role, bits)
    error = float((round_trip(x, parameters, role, bits) - x).square().mean())
    distortion = LLOYD_MAX.get(bits, 5e-5)
    # The unbiased gain makes the error orthogonal to the token: tan^2 instead of sin^2 of the angle
    expected = distortion / (1 - distortion) if role == "key" else 2 - 2 * math.sqrt(1 - distortion)
    assert error == pytest.approx(expected, rel=0.05 if bits < 8 else 0.2)


@given(st.integers(2, 64), BITS, st.integers(0, 2**31))
@settings(deadline=None)
def test_gains(head_dim, bits, seed):
    x = torch.randn(5, head_dim, generator=torch.manual_seed(seed))
    y = codec.rotate(x)
    for role in ("key", "value"):
        codes, gain = codec.encode(x, identity(head_dim), role=role, bits=bits)
        yhat = codec.lookup(codes, bits) * gain.float()[:, None]
        got = (y * yhat).sum(-1) if role == "key" else yhat.square().sum(-1)
        torch.testing.assert_close(got, y.square().sum(-1), rtol=2e-3, atol=1e-6)


@given(tokens(), BITS)
@settings(deadline=None)
def test_folding_into_query_and_output(x, bits):
    head_dim = x.shape[-1]
    parameters = fitted(x, "key", bits)
    mean, scale = (part.float() for part in parameters)
    codes, gain = codec.encode(x, parameters, role="key", bits=bits)
    entry = codec.lookup(codes, bits)
    dense = codec.decode(entry, gain, parameters).double()
    query = torch.randn(3, head_dim, generator=torch.manual_seed(0)).double()
    folded = codec.rotate((query / scale).float()) @ entry.T * gain.float() + query.float() @ mean[:, None]
    size = query.abs() @ (dense - mean).abs().T + query.abs() @ mean.abs()[:, None].double()
    assert ((folded - query @ dense.T).abs() <= 1e-4 * size.amax() + 1e-30).all()
    weights = torch.rand(3, len(x))
    out = codec.unrotate((weights * gain.float()) @ entry) / scale + mean * weights.sum(-1, keepdim=True)
    size = weights.double() @ dense.abs()
    assert ((out - weights.double() @ dense).abs() <= 1e-4 * size.amax() + 1e-30).all()


@given(
    st.lists(st.sampled_from((0.0, 1.0, -1.0, 1e-38, 1e-8, 65504.0, -3e38, 3e38)), min_size=1, max_size=24),
    BITS,
    ROLES,
    st.sampled_from((0.0, 1.0, 1e-30, 1e15)),
)
@settings(deadline=None)
def test_extreme_tokens_stay_finite(numbers, bits, role, fitted_scale):
    x = torch.tensor(numbers)[None]
    parameters = fitted(torch.randn(8, len(numbers)) * fitted_scale, role, bits)
    codes, gain = codec.encode(x, parameters, role=role, bits=bits)
    assert gain.isfinite().all()
    assert (gain >= 0).all()
    decoded = codec.decode(codec.lookup(codes, bits), gain, parameters)
    assert decoded.isfinite().all()


def test_error_bound_refuses_what_it_does_not_cover():
    with pytest.raises(ValueError, match="head_dim below"):
        codec.error_bound(torch.tensor(1.0), head_dim=2**16, role="key", bits=8)


def test_constants_made_while_tracing_are_not_kept():
    from torch._subclasses import FakeTensorMode

    head_dim = 8 * 1021  # no other test has made its constants
    with FakeTensorMode():
        codec.rotate(torch.zeros(2, head_dim))
    assert codec.rotate(torch.ones(2, head_dim)).abs().sum() > 0
