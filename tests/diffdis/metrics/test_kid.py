"""KID against torchmetrics, torch-fidelity and what its definition gives by hand."""

import math

import numpy as np
import pytest
import torch

from diffdis.metrics import image_quality
from diffdis.metrics.image_quality import kernel_distance, squared_discrepancy
from tests.diffdis.metrics.peers import functions_of


def features(num, seed=0, width=24, shift=0.0):
    return (np.random.default_rng(seed).standard_normal((num, width)) + shift).astype(np.float32)


def test_a_subset_equals_torchmetrics_and_torch_fidelity():
    from torchmetrics.image.kid import poly_mmd

    x, y = (features(200, seed, shift=0.2 * seed).astype(np.float64) for seed in (0, 1))
    found = squared_discrepancy(x, y)
    assert found == pytest.approx(poly_mmd(torch.from_numpy(x), torch.from_numpy(y)).item(), rel=1e-10)
    peer = functions_of("metric_kid", "mmd2", "kernel_poly")
    kernels = [peer["kernel_poly"](a, b) for a, b in ((x, x), (x, y), (y, y))]
    assert found == pytest.approx(peer["mmd2"](*kernels), rel=1e-10)
    assert squared_discrepancy(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(found, rel=1e-5)


def test_the_whole_metric_agrees_with_torch_fidelity_up_to_its_draw_of_subsets(monkeypatch):
    monkeypatch.setattr(image_quality, "KID_SUBSET_SIZE", 100)
    x, y = features(400), features(300, seed=1, shift=0.3)
    found = kernel_distance(x, y)
    names = ("kid_features_to_metric", "kernel_mmd", "kernel_poly", "kernel_rbf", "mmd2")
    peer = functions_of("metric_kid", *names)
    peer |= {"tqdm": lambda steps, **_: steps, "KEY_METRIC_KID_MEAN": "mean", "KEY_METRIC_KID_STD": "std"}
    theirs = peer["kid_features_to_metric"](torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=100, verbose=False)
    error = theirs["std"] * math.sqrt(2 / 100)  # of the difference of two means over 100 subsets
    assert abs(found.mean - theirs["mean"]) < 4 * error
    assert found.std == pytest.approx(theirs["std"], rel=0.4)
    assert found.mean > 10 * error
    assert found == kernel_distance(x, y)


def test_two_points():
    """Where all features of a set are equal: k(a, a) + k(b, b) - 2 k(a, b), with k(x, y) = (x·y / d + 1)^3."""
    a, b = np.array([1.0, 2.0]), np.array([0.0, -1.0])
    found = kernel_distance(np.tile(a, (7, 1)), np.tile(b, (5, 1)))
    assert found.mean == pytest.approx(3.5**3 + 1.5**3 - 2 * 0.0**3)
    assert found.std == pytest.approx(0.0, abs=1e-12)


def test_it_is_unbiased_however_few_the_images():
    """Over many pairs of small sets of one distribution the mean is 0 within four standard errors; the biased one is not."""
    found = [kernel_distance(features(10, seed), features(10, seed + 10_000)).mean for seed in range(300)]
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    assert min(found) < 0
    # The diagonal that the unbiased estimate leaves out: k(x, x) - E k(x, y) over 10, for both sets.
    assert 4 * error < 0.1 * 2 * (7.0 - 1.0) / 10


def test_a_subset_that_is_everything_is_measured_once():
    x, y = features(50), features(50, seed=1)
    found = kernel_distance(x, y)
    assert found.mean == pytest.approx(squared_discrepancy(x, y), rel=1e-5)
    assert found.std == 0.0


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="features of 24 and 8 dimensions"):
        kernel_distance(features(5), features(5, width=8))
    with pytest.raises(ValueError, match="KID of 1 and 5 features"):
        kernel_distance(features(1), features(5))
