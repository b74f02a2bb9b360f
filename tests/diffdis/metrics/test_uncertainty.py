"""Standard errors and paired intervals: known formulas, and the spread over many samples of a known distribution."""

import math

import numpy as np
import pytest

from diffdis.metrics.retrieval import RetrievalRanks
from diffdis.metrics.uncertainty import Outcomes
from diffdis.metrics.zero_shot import ZeroShotScores


def test_an_accuracy_has_the_error_of_a_fraction():
    hits = np.repeat([1, 0], [300, 700])
    outcomes = Outcomes(hits)
    assert outcomes.mean == 0.3
    assert outcomes.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 1000), rel=1e-12)
    assert outcomes.standard_error == pytest.approx(0.0145, abs=1e-4), "1.5 points at 1,000 images"


def test_the_mean_over_classes_has_the_error_of_independent_classes():
    groups = np.repeat([0, 1, 3], [10, 40, 50])  # class 2 has no images
    hits = np.concatenate([np.arange(10) < 4, np.arange(40) < 30, np.arange(50) < 50]).astype(int)
    outcomes = Outcomes(hits, groups)
    assert outcomes.mean == pytest.approx((0.4 + 0.75 + 1.0) / 3)
    expected = math.sqrt(0.4 * 0.6 / 10 + 0.75 * 0.25 / 40) / 3
    assert outcomes.standard_error == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [0, 1])
def test_equal_outcomes_have_the_error_of_wilsons_interval(value):
    """Wilson (1927): 0 of n has the 95 % interval [0, z^2 / (n + z^2)], such as [0, 8.8 %] for 40."""
    outcomes = Outcomes(np.full(40, value))
    assert outcomes.mean == value
    assert 1.959964 * outcomes.standard_error == pytest.approx(0.08762, abs=1e-5)
    captions = Outcomes(np.full(200, value), clusters=np.repeat(np.arange(40), 5))
    assert captions.standard_error == outcomes.standard_error, "40 images, not 200 captions"
    perfect = Outcomes(np.full(40, value), groups=np.repeat(np.arange(10), 4))
    assert perfect.standard_error == outcomes.standard_error
    assert outcomes.minus(outcomes) == (0.0, pytest.approx(-0.08762, abs=1e-5), pytest.approx(0.08762, abs=1e-5))
    other = Outcomes(np.full(40, 1 - value))
    assert sorted(map(abs, outcomes.minus(other)[1:])) == [pytest.approx(1 - 0.08762, abs=1e-5), 1.0]


def test_equal_captions_of_an_image_count_once():
    """Five copies of each outcome have the error of one."""
    hits = np.random.default_rng(0).random(200) < 0.6
    clusters = np.repeat(np.arange(200), 5)
    copied = Outcomes(np.repeat(hits, 5), clusters=clusters)
    assert copied.standard_error == pytest.approx(Outcomes(hits).standard_error, rel=1e-12)
    assert copied.standard_error > 2 * Outcomes(np.repeat(hits, 5)).standard_error


def test_a_paired_difference_is_mcnemars():
    """Of 1,000 images, 60 are right for the first model only and 40 for the second only."""
    a = np.repeat([1, 1, 0, 0], [500, 60, 40, 400])
    b = np.repeat([1, 0, 1, 0], [500, 60, 40, 400])
    mean, low, high = Outcomes(a).minus(Outcomes(b))
    error = math.sqrt(60 + 40 - (60 - 40) ** 2 / 1000) / 1000
    assert mean == pytest.approx(0.02)
    assert (low, high) == (pytest.approx(0.02 - 1.959964 * error), pytest.approx(0.02 + 1.959964 * error))
    apart = math.hypot(Outcomes(a).standard_error, Outcomes(b).standard_error)
    assert error < apart / 2, "pairing removes what both models have in common"
    with pytest.raises(ValueError, match="outcomes of 1000 and 3 samples"):
        Outcomes(a).minus(Outcomes(a[:3]))


def test_the_interval_covers_the_true_difference_in_19_of_20_cases():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        hard = rng.random(400)
        a, b = hard < 0.55 + 0.1 * rng.standard_normal(400), hard < 0.5 + 0.1 * rng.standard_normal(400)
        _, low, high = Outcomes(a).minus(Outcomes(b))
        covered += low <= 0.05 <= high
    assert 930 <= covered <= 970


def test_zero_shot_scores_and_recalls_have_errors_of_their_metrics():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 300)
    scores = ZeroShotScores(labels, rng.permuted(np.tile(np.arange(6), (300, 1)), axis=1)[:, :5], 6)
    assert {name: each.mean for name, each in scores.outcomes.items()} == pytest.approx(scores.metrics)
    few = ZeroShotScores(labels % 3, np.full((300, 5), [0, 1, 2, -1, -1]), 3)
    assert set(few.outcomes) == {"acc1", "mean_per_class_recall"}, "acc5 over three classes is not defined"
    images, texts = (rng.standard_normal((n, 8)).astype(np.float32) for n in (20, 60))
    is_readable = np.arange(20) != 3
    ranks = RetrievalRanks.of(images, texts, np.repeat(np.arange(20), 3), is_readable)
    recalls = ranks.recalls()
    assert {name: each.mean for name, each in ranks.outcomes().items()} == pytest.approx(recalls)
    assert len(recalls) == 6
    assert 0 < recalls["image_retrieval_recall@5"] < 1
