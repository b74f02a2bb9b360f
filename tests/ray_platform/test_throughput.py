"""Estimates of a run's remaining time."""

import pytest
import torch

from ray_platform.train.throughput import ThroughputMeter


def test_slow_first_steps_and_single_outliers_do_not_change_the_remaining_time():
    meter = ThroughputMeter(1.0)
    for seconds in (30.0, *[1.0] * 8, 12.0, 1.0):
        meter.add({"loss": torch.tensor([1.0, 1.0])}, captions=["a"], waited=0.25 * seconds, worked=0.75 * seconds)
    assert meter.seconds_left(600) == pytest.approx(600.0)
    assert meter.seconds_left(0) == 0
