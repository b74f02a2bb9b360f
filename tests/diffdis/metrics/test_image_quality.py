"""The metrics of generated images match known values, torchmetrics and torch-fidelity."""

import math

import numpy as np
import pytest
import torch

from diffdis.metrics import image_quality
from diffdis.metrics.image_quality import (
    Moments,
    clip_score,
    extrapolated_distance,
    frechet_distance,
    frechet_distance_of_features,
    inception_score,
    kernel_distance,
    precision_recall,
    squared_discrepancy,
)
from tests.diffdis.metrics.peers import functions_of

WIDTH = 48


def features(num, seed=0, width=WIDTH):
    """Return features like a network's: float32, correlated, of unequal variance, positive, with a mean above the spread."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(100).standard_normal((width, width)) * np.arange(1, width + 1) ** -0.5
    shift = 0.1 * np.random.default_rng(seed + 1).standard_normal(width)
    return np.maximum(3.0 + 0.2 * random.standard_normal((num, width)) @ mixing + shift, 0.0).astype(np.float32)


def gaussian(mean, covariance, n=1000):
    return Moments(n, np.asarray(mean, dtype=np.float64), np.asarray(covariance) * (n - 1))


# --- The Fréchet distance -------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_numpy_whatever_the_order_and_the_parts(monkeypatch):
    x = features(1001)
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-11, atol=1e-16)
    far = x.astype(np.float64) + 1e6  # in float32, sums of raw squares would lose all digits of the covariance
    np.testing.assert_allclose(Moments.of(far).covariance, moments.covariance, rtol=1e-6, atol=1e-9)
    parts = [Moments.of(part) for part in np.split(x, [1, 17, 400, 990])]
    merged = parts[3].merge(parts[0]).merge(parts[4]).merge(parts[1].merge(parts[2]))
    monkeypatch.setattr(image_quality, "MAX_ROWS", 100)
    for other in (merged, Moments.of(x)):
        assert other.n == 1001
        np.testing.assert_allclose(other.mean, moments.mean, rtol=1e-14)
        np.testing.assert_allclose(other.second, moments.second, rtol=1e-11, atol=1e-13)


def test_commuting_covariances():
    """|m1 - m2|^2 + sum (sqrt a - sqrt b)^2, over ten orders of magnitude."""
    random = np.random.default_rng(0)
    rotation = np.linalg.qr(np.random.default_rng(7).standard_normal((WIDTH, WIDTH)))[0]
    a, b = 10.0 ** random.uniform(-8, 2, WIDTH), 10.0 ** random.uniform(-8, 2, WIDTH)
    m1, m2 = random.standard_normal(WIDTH), random.standard_normal(WIDTH)
    expected = ((m1 - m2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    first, second = gaussian(m1, rotation * a @ rotation.T), gaussian(m2, rotation * b @ rotation.T)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(first, first) < 1e-12 * np.trace(first.covariance)


@pytest.mark.parametrize(("n", "m"), [(200, 300), (2000, 60)])
def test_equals_torchmetrics_and_torch_fidelity(n, m):
    from torchmetrics.image.fid import _compute_fid

    x, y = features(n), features(m, seed=3)
    a, b = Moments.of(x), Moments.of(y)
    distance = frechet_distance(a, b)
    moments = [torch.from_numpy(part) for part in (a.mean, a.covariance, b.mean, b.covariance)]
    assert distance == pytest.approx(_compute_fid(*moments).item(), rel=1e-6)
    peer = functions_of("metric_fid", "fid_features_to_statistics", "fid_statistics_to_metric")
    statistics = [peer["fid_features_to_statistics"](torch.from_numpy(part).double()) for part in (x, y)]
    assert distance == pytest.approx(peer["fid_statistics_to_metric"](*statistics, False)["fid"], rel=1e-6)
    padded = [np.pad(part, ((0, 0), (0, 5))) for part in (x, y)]  # features that never vary change nothing
    assert frechet_distance(*(Moments.of(part) for part in padded)) == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize("n", [2, 20, WIDTH - 1, WIDTH, WIDTH + 1, 200])
@pytest.mark.parametrize("m", [30, 500])
def test_fewer_features_than_dimensions(n, m):
    x, reference = features(n), Moments.of(features(m, seed=3))
    expected = frechet_distance(Moments.of(x), reference)
    assert frechet_distance_of_features(x, reference) == pytest.approx(expected, rel=1e-9)
    # Also compare with the definition: square roots of the eigenvalues of S1 S2, without those that are only rounding errors.
    s1, s2 = Moments.of(x).covariance, reference.covariance
    values = np.sort(np.linalg.eigvals(s1 @ s2).real)[-min(n - 1, m - 1, WIDTH) :]
    plain = ((Moments.of(x).mean - reference.mean) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.sqrt(values.clip(0)).sum()
    assert expected == pytest.approx(plain, rel=1e-6)


def test_the_extrapolated_distance_has_no_bias_of_few_images():
    """For Gaussians with a known distance, the plain distance of 600 images is far too large, the extrapolated one is close."""
    width, num = 32, 600
    spread = np.arange(1, width + 1) ** -0.5
    reference = gaussian(np.zeros(width), np.diag(spread**2), 10**9)
    expected = 0.1**2 * (spread**2).sum() + 0.1**2  # sum (1.1 s - s)^2 plus a shift of 0.1 in one dimension
    plain, extrapolated = [], []
    for seed in range(40):
        x = np.random.default_rng(seed).standard_normal((num, width)) * 1.1 * spread
        x[:, 0] += 0.1
        plain.append(frechet_distance(Moments.of(x), reference))
        extrapolated.append(extrapolated_distance(x, reference))
    assert extrapolated[-1] == extrapolated_distance(x, reference)
    error = np.std(extrapolated) / math.sqrt(len(extrapolated))
    assert 3 * error < 0.02
    assert np.mean(plain) > expected + 0.035
    assert abs(np.mean(extrapolated) - expected) < 3 * error


def test_the_points_of_the_extrapolation_are_distances_of_growing_subsets():
    x, reference = features(2 * WIDTH), Moments.of(features(500, seed=3))  # below and above the number of dimensions
    for inverse, distance in image_quality._growing(x, reference):
        expected = frechet_distance(Moments.of(x[: round(1 / inverse)]), reference)
        assert distance == pytest.approx(expected, rel=1e-9)


# --- KID ------------------------------------------------------------------------------------------------------------------------


def kid_features(num, seed=0, width=24, shift=0.0):
    return (np.random.default_rng(seed).standard_normal((num, width)) + shift).astype(np.float32)


def test_a_subset_equals_torchmetrics_and_torch_fidelity():
    from torchmetrics.image.kid import poly_mmd

    x, y = (kid_features(200, seed, shift=0.2 * seed).astype(np.float64) for seed in (0, 1))
    discrepancy = squared_discrepancy(x, y)
    assert discrepancy == pytest.approx(poly_mmd(torch.from_numpy(x), torch.from_numpy(y)).item(), rel=1e-10)
    peer = functions_of("metric_kid", "mmd2", "kernel_poly")
    kernels = [peer["kernel_poly"](a, b) for a, b in ((x, x), (x, y), (y, y))]
    assert discrepancy == pytest.approx(peer["mmd2"](*kernels), rel=1e-10)
    assert squared_discrepancy(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(discrepancy, rel=1e-5)


def test_kid_agrees_with_torch_fidelity_up_to_its_choice_of_subsets(monkeypatch):
    monkeypatch.setattr(image_quality, "KID_SUBSET_SIZE", 100)
    x, y = kid_features(400), kid_features(300, seed=1, shift=0.3)
    distance = kernel_distance(x, y)
    peer = functions_of("metric_kid", "kid_features_to_metric", "kernel_mmd", "kernel_poly", "kernel_rbf", "mmd2")
    peer |= {"tqdm": lambda steps, **_: steps, "KEY_METRIC_KID_MEAN": "mean", "KEY_METRIC_KID_STD": "std"}
    theirs = peer["kid_features_to_metric"](torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=100, verbose=False)
    error = theirs["std"] * math.sqrt(2 / 100)  # standard error of the difference of two means over 100 subsets
    assert abs(distance.mean - theirs["mean"]) < 4 * error
    assert distance.std == pytest.approx(theirs["std"], rel=0.4)
    assert distance.mean > 10 * error
    assert distance == kernel_distance(x, y)


def test_kid_of_two_points():
    """If all features of a set are equal, KID is k(a, a) + k(b, b) - 2 k(a, b), with k(x, y) = (x·y / d + 1)^3."""
    a, b = np.array([1.0, 2.0]), np.array([0.0, -1.0])
    distance = kernel_distance(np.tile(a, (7, 1)), np.tile(b, (5, 1)))
    assert distance.mean == pytest.approx(3.5**3 + 1.5**3 - 2 * 0.0**3)
    assert distance.std is None, "every subset contains all of the smaller set"


def test_kid_is_unbiased_however_few_the_images():
    """Over many pairs of small sets from one distribution, the mean is 0 within four standard errors; a biased mean is not."""
    means = [kernel_distance(kid_features(10, seed), kid_features(10, seed + 10_000)).mean for seed in range(300)]
    error = np.std(means) / math.sqrt(len(means))
    assert abs(np.mean(means)) < 4 * error
    assert min(means) < 0
    # The unbiased estimate omits the diagonal, whose contribution is (k(x, x) - E k(x, y)) / 10 for each set.
    assert 4 * error < 0.1 * 2 * (7.0 - 1.0) / 10


def test_a_subset_that_is_everything_is_measured_once():
    x, y = kid_features(50), kid_features(50, seed=1)
    assert kernel_distance(x, y) == (pytest.approx(squared_discrepancy(x, y), rel=1e-5), None)


# --- CLIPScore and errors -------------------------------------------------------------------------------------------------------


def test_the_scale_of_clip_score_and_that_no_pair_counts_below_0():
    assert clip_score(np.array([1.0, 0.5, -1.0], dtype=np.float32)) == 50.0
    assert clip_score(np.array([0.25])) / 40 == 2.5 * 0.25  # the scale of Hessel et al.


def broken():
    x = features(9)
    x[4, 0] = np.nan
    return x


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: frechet_distance(a, Moments.of(features(100, width=8))), "features of 48 and 8 dimensions cannot be compared"),
        (lambda a: frechet_distance(a, Moments.of(features(1))), "at least two are needed"),
        (lambda a: frechet_distance_of_features(features(1), a), "at least two are needed"),
        (lambda a: extrapolated_distance(features(29), a), "extrapolation from 29 images: at least 30"),
        (lambda a: Moments.of(broken()), "features of image 4 are not finite"),
        (lambda a: Moments.of(features(0)), r"shape \(0, 48\)"),
        (lambda a: kernel_distance(features(5), features(5, width=8)), "features of 48 and 8 dimensions"),
        (lambda a: kernel_distance(features(1), features(5)), "KID of 1 and 5 features"),
        (lambda a: clip_score(np.array([])), "CLIPScore of 0 cosines"),
        (lambda a: clip_score(np.array([0.1, np.nan])), "CLIPScore of 2 cosines"),
    ],
)
def test_what_cannot_be_measured_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(Moments.of(features(100)))


# --- Precision, recall and the Inception Score ----------------------------------------------------------------------------------


def test_precision_and_recall_equal_torch_fidelitys():
    peer = functions_of("metric_prc", "calc_cdist_full", "calculate_precision_recall_full")["calculate_precision_recall_full"]
    generated, real = kid_features(150), kid_features(200, seed=1, shift=0.5)
    found = precision_recall(generated, real)
    assert found == pytest.approx(peer(torch.from_numpy(generated), torch.from_numpy(real)))
    assert 0.1 < found.precision < 0.9
    assert found.precision != found.recall


def test_precision_is_fidelity_and_recall_is_diversity():
    real = kid_features(200)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)
    narrow = precision_recall(real.mean(axis=0) + 1e-3 * kid_features(200, seed=1), real)
    assert narrow.precision == 1
    assert narrow.recall < 0.05


def test_the_inception_score_equals_torch_fidelitys():
    peer = functions_of("metric_isc", "isc_features_to_metric")
    peer |= {"KEY_METRIC_ISC_MEAN": "mean", "KEY_METRIC_ISC_STD": "std"}
    logits = 3 * kid_features(123, width=20)
    theirs = peer["isc_features_to_metric"](torch.from_numpy(logits))
    assert inception_score(logits) == pytest.approx((theirs["mean"], theirs["std"]), rel=1e-9)
    one_class_per_image = 1e3 * np.eye(20, dtype=np.float32)[np.arange(2000) % 20]
    assert inception_score(one_class_per_image).mean == pytest.approx(20, rel=0.1)
    assert inception_score(np.zeros((50, 20), dtype=np.float32)).mean == pytest.approx(1)


@pytest.mark.parametrize(("metric", "num"), [(lambda x: precision_recall(x, x), 3), (inception_score, 9)])
def test_too_few_images_are_named(metric, num):
    with pytest.raises(ValueError, match=f"of {num}.*images: at least {num + 1}"):
        metric(kid_features(num))
