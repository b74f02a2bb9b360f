"""The Fréchet distance against known answers, torchmetrics and torch-fidelity."""

import math

import numpy as np
import pytest
import torch

from diffdis.metrics import image_quality
from diffdis.metrics.image_quality import Moments, extrapolated_distance, frechet_distance, frechet_distance_of_features
from tests.diffdis.metrics.peers import functions_of

WIDTH = 48


def features(num, seed=0, width=WIDTH):
    """Like a network's: float32, correlated, of unequal spread, above 0, with a mean that is large against the spread."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(100).standard_normal((width, width)) * np.arange(1, width + 1) ** -0.5
    shift = 0.1 * np.random.default_rng(seed + 1).standard_normal(width)
    return np.maximum(3.0 + 0.2 * random.standard_normal((num, width)) @ mixing + shift, 0.0).astype(np.float32)


def rotation(width=WIDTH):
    return np.linalg.qr(np.random.default_rng(7).standard_normal((width, width)))[0]


def gaussian(mean, covariance, n=1000):
    return Moments(n, np.asarray(mean, dtype=np.float64), np.asarray(covariance) * (n - 1))


def test_moments_are_those_of_numpy_and_keep_small_spreads():
    x = features(500)
    found = Moments.of(x)
    np.testing.assert_allclose(found.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-11, atol=1e-16)
    far = x.astype(np.float64) + 1e6  # sums of raw squares would keep no digit of the covariance in float32
    np.testing.assert_allclose(Moments.of(far).covariance, found.covariance, rtol=1e-6, atol=1e-9)


def test_moments_do_not_depend_on_order_or_sharding(monkeypatch):
    x = features(1001)
    whole = Moments.of(x)
    for seed in range(3):
        random = np.random.default_rng(seed)
        cuts = np.sort(random.choice(np.arange(1, 1001), 9, replace=False))
        parts = [Moments.of(part) for part in np.split(x, cuts)]
        total = None
        for place in random.permutation(len(parts)):
            total = parts[place] if total is None else total.merge(parts[place])
        assert total.n == 1001
        np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(total.second, whole.second, rtol=1e-11, atol=1e-13)
        assert frechet_distance(total, whole) < 1e-12 * np.trace(whole.covariance)
    monkeypatch.setattr(image_quality, "MAX_ROWS", 100)
    np.testing.assert_allclose(Moments.of(x).second, whole.second, rtol=1e-11, atol=1e-13)


def test_commuting_covariances():
    """|m1 - m2|^2 + sum (sqrt a - sqrt b)^2, over ten orders of magnitude."""
    random = np.random.default_rng(0)
    a, b = 10.0 ** random.uniform(-8, 2, WIDTH), 10.0 ** random.uniform(-8, 2, WIDTH)
    m1, m2, q = random.standard_normal(WIDTH), random.standard_normal(WIDTH), rotation()
    expected = ((m1 - m2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(gaussian(m1, q * a @ q.T), gaussian(m2, q * b @ q.T)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("scale", [0.5, 1.01, 3.0])
def test_a_scaled_covariance(scale):
    s = Moments.of(features(400)).covariance
    expected = (1 - scale) ** 2 * np.trace(s)
    mean = np.zeros(WIDTH)
    assert frechet_distance(gaussian(mean, s), gaussian(mean, scale**2 * s)) == pytest.approx(expected, rel=1e-7)


def test_self_a_shift_and_symmetry():
    a, b = Moments.of(features(300)), Moments.of(features(200, seed=5))
    assert frechet_distance(a, a) < 1e-12 * np.trace(a.covariance)
    shifted = Moments(a.n, a.mean + 0.5, a.second)
    assert frechet_distance(a, shifted) == pytest.approx(WIDTH * 0.25, rel=1e-12)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 0.1


@pytest.mark.parametrize(("n", "m"), [(200, 300), (2000, 60)])
def test_equals_torchmetrics_and_torch_fidelity(n, m):
    from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

    x, y = features(n), features(m, seed=3)
    a, b = Moments.of(x), Moments.of(y)
    ours = frechet_distance(a, b)
    moments = [torch.from_numpy(part) for part in (a.mean, a.covariance, b.mean, b.covariance)]
    assert ours == pytest.approx(_compute_fid(*moments).item(), rel=1e-6)
    metric = FrechetInceptionDistance(feature=HandedThrough())
    metric.update(torch.from_numpy(x).double(), real=True)
    metric.update(torch.from_numpy(y).double(), real=False)
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)
    peer = functions_of("metric_fid", "fid_features_to_statistics", "fid_statistics_to_metric")
    statistics = [peer["fid_features_to_statistics"](torch.from_numpy(part).double()) for part in (x, y)]
    assert ours == pytest.approx(peer["fid_statistics_to_metric"](*statistics, False)["fid"], rel=1e-6)


class HandedThrough(torch.nn.Module):
    """torchmetrics takes a network; here the features are there already."""

    num_features = WIDTH

    def forward(self, x):
        return x


@pytest.mark.parametrize("n", [2, 20, WIDTH - 1, WIDTH, WIDTH + 1, 200])
@pytest.mark.parametrize("m", [30, 500])
def test_fewer_features_than_dimensions(n, m):
    x, reference = features(n), Moments.of(features(m, seed=3))
    expected = frechet_distance(Moments.of(x), reference)
    assert frechet_distance_of_features(x, reference) == pytest.approx(expected, rel=1e-9)
    # And the definition itself, by roots of the eigenvalues of S1 S2, of which those of nothing but rounding are left out.
    s1, s2 = Moments.of(x).covariance, reference.covariance
    values = np.sort(np.linalg.eigvals(s1 @ s2).real)[-min(n - 1, m - 1, WIDTH) :]
    plain = ((Moments.of(x).mean - reference.mean) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.sqrt(values.clip(0)).sum()
    assert expected == pytest.approx(plain, rel=1e-6)


def test_features_that_never_vary_change_nothing():
    x, y = features(300), features(200, seed=3)
    expected = frechet_distance(Moments.of(x), Moments.of(y))
    padded = [np.pad(part, ((0, 0), (0, 5))) for part in (x, y)]
    assert frechet_distance(*(Moments.of(part) for part in padded)) == pytest.approx(expected, rel=1e-9)


def test_the_extrapolated_distance_has_no_bias_of_few_images():
    """Gaussians whose distance is known. The plain distance of 600 images is far above it, the extrapolated one near."""
    width, num = 32, 600
    spread = np.arange(1, width + 1) ** -0.5
    reference = gaussian(np.zeros(width), np.diag(spread**2), 10**9)
    expected = 0.1**2 * (spread**2).sum() + 0.1**2  # sum (1.1 s - s)^2, and a shift of 0.1 in one dimension
    plain, found = [], []
    for seed in range(40):
        x = np.random.default_rng(seed).standard_normal((num, width)) * 1.1 * spread
        x[:, 0] += 0.1
        plain.append(frechet_distance(Moments.of(x), reference))
        found.append(extrapolated_distance(x, reference))
    assert found[-1] == extrapolated_distance(x, reference)
    error = np.std(found) / math.sqrt(len(found))
    assert 3 * error < 0.02
    assert np.mean(plain) > expected + 0.035
    assert abs(np.mean(found) - expected) < 3 * error


def test_the_points_of_the_extrapolation_are_distances_of_growing_subsets():
    x, reference = features(2 * WIDTH), Moments.of(features(500, seed=3))  # below and above the number of dimensions
    for inverse, distance in image_quality._growing(x, reference):
        expected = frechet_distance(Moments.of(x[: round(1 / inverse)]), reference)
        assert distance == pytest.approx(expected, rel=1e-9)


def test_what_cannot_be_compared_is_named():
    a = Moments.of(features(100))
    with pytest.raises(ValueError, match="features of 48 and 8 dimensions cannot be compared"):
        frechet_distance(a, Moments.of(features(100, width=8)))
    with pytest.raises(ValueError, match="at least two are needed"):
        frechet_distance(a, Moments.of(features(1)))
    with pytest.raises(ValueError, match="at least two are needed"):
        frechet_distance_of_features(features(1), a)
    with pytest.raises(ValueError, match="extrapolation from 29 images: at least 30"):
        extrapolated_distance(features(29), a)
    broken = features(9)
    broken[4, 0] = np.nan
    with pytest.raises(ValueError, match="features of image 4 are not finite"):
        Moments.of(broken)
    with pytest.raises(ValueError, match=r"shape \(0, 48\)"):
        Moments.of(features(0))
