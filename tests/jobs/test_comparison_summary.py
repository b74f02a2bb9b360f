"""Statistics of a comparison over its seeds, and its claim."""

import numpy as np
import pytest
from scipy import stats

from diffdis_platform.comparison.summary import check_claim, confidence_interval, detectable_difference, paired_differences


def test_intervals_are_those_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.1, 0.02, 5), rng.normal(0.05, 0.02, 5)
    test = stats.ttest_rel(a, b).confidence_interval(0.95)
    interval = confidence_interval(list(a - b))
    assert (interval["low"], interval["high"]) == pytest.approx((test.low, test.high))
    assert (interval["mean"], interval["n"]) == (pytest.approx((a - b).mean()), 5)
    assert confidence_interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1, "detectable": None}


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_detectable_difference_is_found_in_four_of_five_simulated_comparisons(n):
    std = 1.47
    simulated = np.random.default_rng(n).normal(detectable_difference(std, n), std, (40_000, n))
    test = stats.ttest_1samp(simulated, 0.0, axis=1)
    assert np.mean((test.pvalue < 0.05) & (test.statistic > 0)) == pytest.approx(0.8, abs=0.01)


def test_differences_cover_the_scores_and_seeds_that_both_arms_have():
    results = {
        "joint": {seed: {"accuracy": 0.3 + seed / 10, "fd": 50.0, "seconds": 9.0} for seed in (0, 1, 2)},
        "alignment": {seed: {"accuracy": 0.2, "seconds": 4.0} for seed in (1, 2, 3)},
        "joint_mask": {0: {"accuracy": 0.5, "fd": 3.0}},
        "one_way_mask": {0: {"accuracy": 0.25, "fd": 1.0}},
        "generation": {},
        "own": {0: {"accuracy": 0.5, "fd": 1.0}, 1: {"accuracy": 0.25, "fd": 1.0}},
    }
    assert paired_differences(results, ["own"])["accuracy_own_minus_alignment"]["mean"] == pytest.approx(0.05)
    del results["own"]
    paired = paired_differences(results)
    assert set(paired) == {
        "accuracy_joint_minus_alignment",
        "accuracy_joint_mask_minus_one_way_mask",
        "fd_joint_mask_minus_one_way_mask",
    }
    assert paired["accuracy_joint_minus_alignment"]["mean"] == pytest.approx(0.25)
    assert paired["accuracy_joint_minus_alignment"]["n"] == 2


@pytest.mark.parametrize(
    ("accuracy", "fd", "holds", "why"),
    [
        ((0.01, 0.03), (-5, -1), True, "over 3 seeds"),
        ((-0.01, 0.03), (-5, -1), False, "which includes zero"),
        ((0.01, 0.03), (1, 5), False, "of the opposite sign"),
        ((None, None), (-5, -1), False, "no interval"),
    ],
)
def test_the_claim_holds_if_both_intervals_are_on_the_papers_side_of_zero(accuracy, fd, holds, why):
    paired = {
        name: {"mean": 0.0, "low": low, "high": high, "n": 3}
        for name, (low, high) in (("accuracy_joint_minus_alignment", accuracy), ("fd_joint_minus_generation", fd))
    }
    claim = check_claim(paired)
    assert claim["holds"] is holds
    assert why in claim["why"]
