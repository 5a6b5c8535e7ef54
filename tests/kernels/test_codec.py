"""Codec mathematics: codebooks, rotation, weights, fit, noise shaping, gains, and the round trip's error."""

import itertools
import math
import statistics

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


def fitted(x, role, weight=None):
    return codec.fit(x.mean(0), x.var(0, correction=0), weight, role=role)


def round_trip(x, parameters, role, bits):
    codes, gain = codec.encode(x, parameters, None, role=role, bits=bits)
    entry = codec.lookup(codes, bits)
    return codec.decode(entry, gain, parameters)


def spread_over(decades, *shape, seed):
    """Numbers from ``10 ** -decades`` to 1, uniform on a logarithmic scale."""
    return 10 ** (-decades * torch.rand(shape, generator=torch.Generator().manual_seed(seed)))


def weights_over(decades, head_dim, seed):
    return codec.weights(spread_over(decades, head_dim, seed=seed))


def leaf_of(head_dim):
    """Number of neighbouring channels that are rounded at once."""
    size, order = head_dim, head_dim & -head_dim
    while order > 1 and size > codec.leaf(head_dim):
        size, order = size // 2, order // 2
    return size


class Metric:
    """Tokens and what they are encoded as in the metric of `codec.cost`, in float64."""

    def __init__(self, x, parameters, weight, codes, bits):
        mean, scale = parameters.mean.float(), parameters.scale.float()
        self.price = codec.cost(scale, weight).double()
        self.token = ((x.clamp(-codec.LIMIT, codec.LIMIT) - mean) * scale).clamp(-(2.0**24), 2.0**24).double()
        rotation = codec.rotate(torch.eye(x.shape[-1])).double()
        self.entry = codec.lookup(codes, bits).double() @ rotation.T
        self.power = self.product(self.token, self.token)
        self.inner = self.product(self.token, self.entry)
        self.norm = self.product(self.entry, self.entry)
        self.cosine = self.inner / (self.power * self.norm).sqrt().clamp_min(1e-300)

    def product(self, a, b):
        return (a * b * self.price).sum(-1)

    def error(self, gain):
        """Norm of the error of tokens read with `gain`."""
        error = self.token - gain.double()[..., None] * self.entry
        return self.product(error, error).sqrt()


def moments_of_a_normal(bits, radius):
    """``E[u y]`` and ``E[u^2]`` of a standard normal ``y`` and the nearest entry ``u`` times `radius`."""
    book = [entry / codec.steps(bits) * radius for entry in codec.entries(bits)]
    density = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    mass = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))
    edges = [-40.0, *((a + b) / 2 for a, b in itertools.pairwise(book)), 40.0]
    parts = list(zip(book, edges, edges[1:], strict=False))
    inner = sum(u * (density(a) - density(b)) for u, a, b in parts)
    return inner, sum(u * u * (mass(b) - mass(a)) for u, a, b in parts)


def cosine_of_a_normal(bits):
    """Of the angle between a long normal token and its entries, rounded with the codec's middle radius."""
    inner, norm = moments_of_a_normal(bits, statistics.mean(codec.radii(bits)))
    return inner / math.sqrt(norm)


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_codebook_is_lloyd_max(bits):
    inner, norm = moments_of_a_normal(bits, 1)
    assert LLOYD_MAX[bits] * 0.999 < 1 - 2 * inner + norm < LLOYD_MAX[bits] * 1.01


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
    weight = weights_over(3, head_dim, tokens)
    x *= spread_over(2, head_dim, seed=tokens + 1)
    parameters = fitted(x, role, weight if role == "key" else None)
    codes, gain = codec.encode(x, parameters, weight, role=role, bits=bits)
    for i in range(0, tokens, 7):
        one, its_gain = codec.encode(x[i : i + 1], parameters, weight, role=role, bits=bits)
        assert torch.equal(one[0], codes[i])
        assert its_gain == gain[i]


@given(HEAD_DIMS, st.floats(0, 6), st.integers(-60, 40), st.integers(0, 2**31))
@settings(deadline=None)
def test_weights_average_one_at_any_scale(head_dim, decades, exponent, seed):
    energy = spread_over(decades, 3, head_dim, seed=seed)
    weight = codec.weights(energy)
    assert weight.dtype == torch.bfloat16
    assert (weight > 0).all()
    torch.testing.assert_close(weight.float().mean(-1), torch.ones(3), rtol=2**-8, atol=0)
    assert torch.equal(codec.weights(energy * 2.0**exponent), weight)
    relative = energy / energy.mean(-1, keepdim=True)
    expected = relative + codec.IDENTITY_SHARE * (1 - relative)
    torch.testing.assert_close(weight.float(), expected, rtol=2**-8, atol=0)


def test_no_queries_weigh_all_channels_alike():
    energy = torch.zeros(2, 8)
    energy[1, 3] = 1e-42
    assert torch.equal(codec.weights(energy)[0], torch.ones(8, dtype=torch.bfloat16))
    assert (codec.weights(energy)[1] > 0).all()
    x = torch.randn(64, 8, generator=torch.manual_seed(0))
    assert torch.equal(fitted(x, "key").scale, fitted(x, "key", codec.weights(energy[0])).scale)


def test_fit_of_keys_whitens_half_way():
    deviation = torch.tensor([0.1, 1.0, 10.0, 100.0])
    x = torch.randn(4096, 4, generator=torch.manual_seed(0)) * deviation + torch.tensor([3.0, 0.0, -5.0, 7.0])
    mean, scale = fitted(x, "key")
    torch.testing.assert_close(mean.float(), x.mean(0), rtol=2**-8, atol=0.02)
    torch.testing.assert_close((scale / scale[1]).float(), deviation**-0.75, rtol=0.04, atol=0)
    weight = torch.tensor([0.2, 0.2, 0.2, 3.4]).bfloat16()
    _, scale = fitted(x, "key", weight)
    assert float(scale[3] / scale[1]) == pytest.approx(100**-0.75 * 17**0.125, rel=0.04)


def test_fit_of_values_whitens_and_keeps_the_mean():
    x = torch.randn(512, 8, generator=torch.manual_seed(0)) * torch.arange(1, 9) + 3
    mean, scale = fitted(x, "value")
    assert mean.count_nonzero() == 0
    second = x.square().mean(0)
    torch.testing.assert_close((scale / scale[0]).float(), (second[0] / second).sqrt(), rtol=0.02, atol=0)


@given(HEAD_DIMS, ROLES, st.floats(-30, 30), st.integers(2, 100), st.floats(0, 2), st.integers(0, 2**31))
@settings(deadline=None)
def test_fitted_tokens_have_unit_mean_square(head_dim, role, exponent, tokens, decades, seed):
    # A mean of at most a few deviations: otherwise room is left for later tokens
    x = torch.randn(tokens, head_dim, generator=torch.manual_seed(seed)) + 1
    x *= spread_over(decades, head_dim, seed=seed) * 2.0**exponent
    weight = weights_over(4, head_dim, seed) if role == "key" else None
    mean, scale = fitted(x, role, weight)
    y = (x - mean.float()) * scale.float()
    assert float(y.square().mean()) == pytest.approx(1, rel=0.02)


@given(HEAD_DIMS, ROLES, st.integers(-40, 40), st.integers(0, 2**31))
@settings(deadline=None)
def test_fit_follows_the_scale(head_dim, role, exponent, seed):
    generator = torch.manual_seed(seed)
    mean, variance = torch.randn(head_dim, generator=generator), spread_over(5, head_dim, seed=seed)
    weight = weights_over(4, head_dim, seed) if role == "key" else None
    once = codec.fit(mean, variance, weight, role=role)
    scaled = codec.fit(mean * 2.0**exponent, variance * 4.0**exponent, weight, role=role)
    assert torch.equal(scaled.mean, once.mean * 2.0**exponent)
    torch.testing.assert_close(scaled.scale.float() * 2.0**exponent, once.scale.float(), rtol=2**-7, atol=0)


def test_cost_is_that_of_errors_before_the_balance():
    scale, weight = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 2.0, 0.5]).bfloat16()
    assert torch.equal(codec.cost(scale, None), torch.tensor([1, 1 / 4, 1 / 16]))
    assert torch.equal(codec.cost(8 * scale, weight), torch.tensor([1 / 2, 1 / 2, 1 / 32]))


def nearest(z, bits):
    """Codes of the entries nearest to float64 numbers in units of the radius."""
    book = torch.tensor(codec.entries(bits)).double() / codec.steps(bits)
    if bits == 8:
        book[0] = -1e9  # the grid is symmetric
    return torch.searchsorted((book[1:] + book[:-1]) / 2, z).to(torch.uint8)


def radius_of(y, bits, factor):
    if bits == 8:
        return y.abs().amax(-1, keepdim=True) * (32 / 127)
    return y.square().mean(-1, keepdim=True).sqrt() * factor


@given(HEAD_DIMS, BITS, ROLES, st.floats(0.01, 100), st.integers(0, 2**31))
@settings(deadline=None)
def test_a_flat_price_gives_the_nearest_entries(head_dim, bits, role, scale, seed):
    """At one of the radii: that of least error."""
    x = torch.randn(6, head_dim, generator=torch.manual_seed(seed))
    parameters = Parameters(identity(head_dim).mean, identity(head_dim).scale * scale)
    weight = 3 * identity(head_dim).scale
    codes, _ = codec.encode(x, parameters, weight, role=role, bits=bits)
    y = codec.rotate(x * parameters.scale.float()).double()
    radii = [radius_of(y, bits, factor) for factor in codec.radii(bits)]
    least = torch.stack([codec.lookup(nearest(y / radius, bits), bits) * radius - y for radius in radii]).norm(dim=-1)
    off = torch.stack([codec.lookup(codes, bits) * radius - y for radius in radii]).norm(dim=-1)
    torch.testing.assert_close(off.amin(0), least.amin(0), rtol=1e-4, atol=1e-6 * float(y.norm(dim=-1).max()))


@pytest.mark.parametrize("bits", codec.CODED_BITS)
@pytest.mark.parametrize("head_dim", [1, 7, 8, 12, 16, 18, 24, 40, 64, 80, 96, 128, 160])
def test_shaping_is_error_feedback_over_the_factors_of_the_metric(bits, head_dim):
    """Against a dense block elimination of ``M = R^T diag(price) R`` in float64, leaf by leaf.

    Given the errors made so far, the errors that cost least in the channels to come are ``-M_cc^-1 M_cb e_b``: their
    targets move by as much.
    """
    x = torch.randn(128, head_dim, generator=torch.manual_seed(head_dim))
    y = codec.rotate(x)
    price = spread_over(4, head_dim, seed=head_dim)
    radius = radius_of(y, bits, 1)
    rotation = codec.rotate(torch.eye(head_dim)).double()
    metric = rotation.T @ torch.diag(price.double()) @ rotation
    targets, leaf = y.double(), leaf_of(head_dim)
    expected = []
    for begin in range(0, head_dim, leaf):
        here, later = slice(begin, begin + leaf), slice(begin + leaf, head_dim)
        chosen = nearest(targets[:, here] / radius, bits)
        error = targets[:, here] - (codec.lookup(chosen, bits) * radius).double()
        moved = torch.linalg.solve(metric[later, later], metric[later, here] @ error.T).T
        targets = torch.cat((targets[:, : begin + leaf], targets[:, later] + moved), 1)
        expected.append(chosen)
    codes, reached = shape(x, price, radius, bits)
    differ = (codes != torch.cat(expected, 1)).any(1)  # a coordinate on a threshold, and what follows from it
    assert int(differ.sum()) <= 1
    torch.testing.assert_close(reached, codec.unrotate(codec.lookup(codes, bits) * radius), rtol=1e-4, atol=1e-5)


def shape(x, price, radius, bits):
    """Codes of balanced tokens at a radius of the rotated ones, and what they stand for."""
    head_dim = x.shape[1]
    order, signs = head_dim & -head_dim, codec.signs(head_dim, x.device)
    split = (order, -1)
    codes, reached = codec._shape(
        (x * signs).unflatten(1, split),
        price.unflatten(0, split),
        radius[..., None] * order**0.5,
        bits,
        codec.leaf(head_dim),
    )
    return codes.flatten(1), reached.flatten(1) * signs


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("head_dim", [24, 64, 80, 128, 256])
def test_the_radius_of_least_error_is_kept(bits, head_dim):
    """Measured: 0.74 to 0.92 of the squared error at the middle radius alone."""
    x = torch.randn(256, head_dim, generator=torch.manual_seed(bits))
    scale, weight = spread_over(1, head_dim, seed=head_dim).bfloat16(), weights_over(2, head_dim, seed=1)
    parameters = Parameters(identity(head_dim).mean, scale)
    price, balanced = codec.cost(scale, weight), x * scale.float()
    attempts, errors = [], []
    middle = statistics.mean(codec.radii(bits))
    for factor in (*codec.radii(bits), middle):
        codes, reached = shape(balanced, price, radius_of(balanced, bits, factor), bits)
        attempts.append(codes)
        errors.append(((balanced - reached).square() * price).sum(-1))
    best = torch.stack(errors[:-1]).argmin(0)
    assert len(best.unique()) == len(codec.radii(bits))
    codes, _ = codec.encode(x, parameters, weight, role="key", bits=bits)
    differ = (codes != torch.stack(attempts)[best, torch.arange(len(x))]).any(1)
    assert int(differ.sum()) <= 1  # a tie

    kept, alone = (Metric(x, parameters, weight, c, bits) for c in (codes, attempts[-1]))
    with_best_gain = [(m.power - m.inner**2 / m.norm).mean() for m in (kept, alone)]
    assert with_best_gain[0] < 0.95 * with_best_gain[1]


@given(
    st.sampled_from((48, 64, 80, 96, 128, 192, 256)), BITS, ROLES, st.floats(2, 6), st.booleans(), st.integers(0, 2**31)
)
@settings(deadline=None, max_examples=60)
def test_shaping_beats_rounding_in_the_metric(head_dim, bits, role, decades, weigh, seed):
    """Measured: 0.5 to 0.7 of the squared error at two decades of prices, 0.2 to 0.4 at six."""
    x = torch.randn(256, head_dim, generator=torch.manual_seed(seed))
    scale = spread_over(decades / 2, head_dim, seed=seed).bfloat16()
    parameters = Parameters(identity(head_dim).mean, scale)
    x /= scale.float()
    weight = weights_over(2, head_dim, seed + 1) if weigh else None
    codes, gain = codec.encode(x, parameters, weight, role=role, bits=bits)
    shaped = Metric(x, parameters, weight, codes, bits)
    y = codec.rotate(x * scale.float())
    plain = Metric(x, parameters, weight, nearest(y.double() / radius_of(y, bits, 1), bits), bits)
    best = plain.inner / plain.norm
    assert (shaped.error(gain) ** 2).mean() < 0.85 * (plain.error(best) ** 2).mean()


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


@st.composite
def encoders(draw, head_dim, x):
    """Parameters and weights: fitted to `x`, to a sequence of its scale, or adversarial over six decades of prices."""
    seed = draw(st.integers(0, 2**31))
    weight = weights_over(draw(st.sampled_from((0, 3, 8))), head_dim, seed) if draw(st.booleans()) else None
    role = draw(ROLES)
    used = weight if role == "key" else None
    kind = draw(st.sampled_from(("own", "other", "adversarial")))
    if kind == "own":
        return role, used, fitted(x, role, used)
    other = x.abs().mean() * torch.randn(64, head_dim, generator=torch.manual_seed(seed))
    if kind == "other":
        return role, used, fitted(other, role, used)
    typical = float(x.abs().amax().clamp_min(1e-30))
    mean = other.mean(0) if role == "key" else torch.zeros(head_dim)
    return role, used, Parameters(mean.bfloat16(), (spread_over(3, head_dim, seed=seed) / typical).bfloat16())


@given(st.data(), tokens(), BITS)
@settings(deadline=None, max_examples=300)
def test_no_token_is_wrong_by_more_than_its_size(data, x, bits):
    """In the metric of the codec, up to the float16 of the gain: whatever the token, the fit and the weights."""
    role, weight, parameters = data.draw(encoders(x.shape[-1], x))
    codes, gain = codec.encode(x, parameters, weight, role=role, bits=bits)
    assert gain.dtype == torch.float16
    assert ((gain >= 0) & gain.isfinite()).all()
    metric = Metric(x, parameters, weight, codes, bits)
    size, rounding = metric.power.sqrt(), metric.norm.sqrt() * (gain.double() * 2**-11 + 2**-25)
    assert (metric.error(gain) <= 1.001 * size + rounding).all()


@given(st.data(), tokens(), BITS)
@settings(deadline=None, max_examples=200)
def test_gains(data, x, bits):
    """Keys keep their inner product, values their norm; entries far off 45 degrees get the gain of least error."""
    role, weight, parameters = data.draw(encoders(x.shape[-1], x))
    codes, gain = codec.encode(x, parameters, weight, role=role, bits=bits)
    metric = Metric(x, parameters, weight, codes, bits)
    least = metric.inner / metric.norm.clamp_min(1e-300)
    within = metric.power / metric.inner if role == "key" else (metric.power / metric.norm).sqrt()
    ordinary = (least > 2**-14) & (within < codec.GAIN_MAX)  # of float16's normal numbers
    near, far = metric.cosine > 0.5**0.5 + 1e-4, metric.cosine < 0.5**0.5 - 1e-4
    expected = torch.where(near, within, least)[ordinary & (near | far)]
    torch.testing.assert_close(gain.double()[ordinary & (near | far)], expected, rtol=2e-3, atol=0)
    assert not gain[metric.cosine < -1e-4].any()


def test_entries_beyond_45_degrees_happen():
    """Else the tests above would not reach that branch."""
    scale = spread_over(3, 16, seed=0).bfloat16()
    parameters = Parameters(identity(16).mean, scale)
    x = torch.randn(1000, 16, generator=torch.manual_seed(0)) / scale.float()
    codes, _ = codec.encode(x, parameters, None, role="key", bits=2)
    cosine = Metric(x, parameters, None, codes, 2).cosine
    assert 5 < int((cosine < 0.5**0.5).sum()) < 200


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("bits", codec.CODED_BITS)
def test_error_on_a_normal_is_the_theoretical_one(bits, role, monkeypatch):
    """At one radius; at the best of several it is less."""
    x = torch.randn(4096, 128, generator=torch.manual_seed(0))
    parameters = fitted(x, role)
    least = float((round_trip(x, parameters, role, bits) - x).square().mean())
    middle = statistics.mean(codec.radii(bits))
    monkeypatch.setattr(codec, "radii_table", lambda bits, device: torch.tensor([middle], device=device))
    error = float((round_trip(x, parameters, role, bits) - x).square().mean())
    assert least < 0.96 * error or bits == 8
    cosine = cosine_of_a_normal(bits) if bits < 8 else math.sqrt(1 - 5e-5)
    # The unbiased gain makes the error orthogonal to the token: tan^2 instead of sin^2 of the angle
    expected = cosine**-2 - 1 if role == "key" else 2 - 2 * cosine
    assert error == pytest.approx(expected, rel=0.05 if bits < 8 else 0.2)


@given(tokens(), BITS)
@settings(deadline=None)
def test_folding_into_query_and_output(x, bits):
    head_dim = x.shape[-1]
    weight = weights_over(3, head_dim, head_dim)
    parameters = fitted(x, "key", weight)
    mean, scale = (part.float() for part in parameters)
    codes, gain = codec.encode(x, parameters, weight, role="key", bits=bits)
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
    weight = weights_over(6, len(numbers), len(numbers)) if role == "key" else None
    parameters = fitted(torch.randn(8, len(numbers)) * fitted_scale, role, weight)
    codes, gain = codec.encode(x, parameters, weight, role=role, bits=bits)
    assert gain.isfinite().all()
    assert (gain >= 0).all()
    decoded = codec.decode(codec.lookup(codes, bits), gain, parameters)
    assert decoded.isfinite().all()


def test_constants_made_while_tracing_are_not_kept():
    from torch._subclasses import FakeTensorMode

    head_dim = 8 * 1021  # no other test has made its constants
    with FakeTensorMode():
        codec.rotate(torch.zeros(2, head_dim))
    assert codec.rotate(torch.ones(2, head_dim)).abs().sum() > 0
