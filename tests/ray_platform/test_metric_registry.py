"""The metric registry: labels, formats and directions of declared metrics, and the error for others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_platform.contracts import ConfigError
from ray_platform.metric_registry import METRICS, Metric, check_declared, describe_metric, find_metric, register


@pytest.mark.parametrize(
    ("name", "label", "text", "direction"),
    [
        ("eval/vtab/cifar10/acc1", "acc1, vtab/cifar10", "2.37 %", "max"),
        ("eval/zero_shot_mean", "mean zero-shot accuracy", "2.37 %", "max"),
        ("eval/flickr30k/image_retrieval_recall_at_1", "image retrieval R@1, flickr30k", "2.37 %", "max"),
        ("text_retrieval_recall@10", "text retrieval R@10", "2.37 %", "max"),
        ("retrieval_recall_at_1", "retrieval R@1", "2.37 %", "max"),
        ("retrieval_r5", "retrieval R@5", "2.37 %", "max"),
        ("eval/fd_efficientnet_lite0/guidance_3", "FD-efficientnet_lite0, guidance 3", "0.0237", "min"),
        ("eval/fid_infinity/guidance_1.5", "FID ∞, guidance 1.5", "0.0237", "min"),
        ("fd_inception_infinity", "FD-inception ∞", "0.0237", "min"),
        ("kid_efficientnet_lite0_std", "KID-efficientnet_lite0, standard deviation", "0.0237", None),
        ("eval/kid_inception_best_of_4/guidance_3", "KID-inception, best of 4, guidance 3", "0.0237", "min"),
        ("accuracy_heldout_style", "accuracy, heldout_style", "2.37 %", "max"),
        ("heldout/image_to_text_r1", "image to text R@1, heldout", "2.37 %", "max"),
        ("eval/curve/cars/num_steps_10_num_draws_4", "acc1 with 10 steps and 4 draws, curve/cars", "2.37 %", "max"),
        ("train/loss_alignment", "loss alignment, train", "0.0237", "min"),
    ],
)
def test_tracked_names_have_labels_formats_and_directions(name, label, text, direction):
    metric = find_metric(name)
    assert (metric.label, metric.text(0.0237), metric.direction) == (label, text, direction)
    assert metric.text(None) == metric.difference_text(float("nan")) == "–"


def test_a_metric_that_is_not_declared_is_an_error_that_names_it():
    for name in ("psnr", "eval/cars/lpips", "fd_", "ssim"):
        with pytest.raises(ConfigError, match=f"{name}.*METRICS"):
            check_declared(["acc1", name])
    plain = describe_metric("eval/cars/structural_similarity")
    assert (plain.label, plain.direction, plain.text(1.5)) == ("structural similarity, cars", None, "1.50")


def test_one_entry_declares_a_metric_and_a_second_one_is_an_error():
    with pytest.raises(ConfigError, match="acc1"):
        register(Metric("acc1", "again", "max"))
    with pytest.raises(ConfigError, match="fd_"):
        register(Metric("fd_{network}", "again", "max"))
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@given(st.floats(0, 1), st.floats(0, 1))
def test_better_follows_the_direction(a, b):
    assert find_metric("accuracy").is_better(a, b) == (a > b)
    assert find_metric("fid").is_better(a, b) == (a < b)
    assert find_metric("fid").best([a, b]) == min(a, b)
    assert not describe_metric("anything").is_better(a, b)


def test_spreads_and_differences_have_the_digits_of_their_values():
    assert find_metric("accuracy").spread_text(0.0576, 0.004) == "0.40"
    assert find_metric("fd").spread_text(53.43, 1.3333) == "1.33"
    assert find_metric("accuracy").difference_text(0.0052) == "+0.52 points"
    assert find_metric("fd").difference_text(-12.56) == "−12.56"
    assert [find_metric(name).text(value) for name, value in (("seconds", 2862), ("flops", 1.4e15), ("samples", 163840))] == [
        "47.7 min", "1.4 P", "163,840",
    ]  # fmt: skip
