"""What `diffdis sizing` advises for a run that needs more memory than a GPU has."""

from dataclasses import replace

import pytest

from diffdis_platform.sizing.counts import Counts, Encoders
from diffdis_platform.sizing.estimate import SmallerRun, memory, smaller_run
from ray_platform.train.config import BatchPlan, TrainConfig

# A gigabyte of activations per sample, and a model as large as the paper's.
COUNTS = Counts(
    trained=10**9, frozen=0, num_tensors=1_000, launches=1_500, flops=1e12, executed_flops=1e12, activation_bytes=24 * 10**9,
    row_bytes=16_128, embedding_dim=768, encoders=Encoders(10**8, 2 * 10**8, 0.0, 1e9, 10**9),
)  # fmt: skip
TRAIN = TrainConfig(precision="bf16", zero_stage=0, gpus_per_worker=1)


def needed(zero_stage: int, size: int) -> float:
    counts = replace(COUNTS, activation_bytes=size * 10**9)
    return memory(counts, replace(TRAIN, zero_stage=zero_stage), BatchPlan(8, size, 24 // size), live=True).total


@pytest.mark.parametrize(
    ("available", "advised"),
    [
        (needed(1, 24), SmallerRun(1, 24)),
        (needed(1, 24) - 1, SmallerRun(1, 12)),  # not ZeRO 2, whose second bucket takes more than it shards
        (needed(1, 12) - 1, SmallerRun(2, 12)),  # ZeRO 1 accumulates gradients in float32
        (needed(2, 8), SmallerRun(2, 8)),
        (needed(2, 3), SmallerRun(2, 3)),
        (needed(2, 1) - 1, None),
    ],
)
def test_the_largest_micro_batch_and_the_lowest_stage_that_fit_are_advised(available, advised):
    assert smaller_run(COUNTS, TRAIN, BatchPlan(8, 24, 1), True, available) == advised


def test_channels_last_keeps_zero_0():
    train = replace(TRAIN, channels_last=True)
    assert smaller_run(COUNTS, train, BatchPlan(8, 24, 1), True, needed(0, 12)) == SmallerRun(0, 12)


def test_a_run_under_zero_3_keeps_it():
    train = replace(TRAIN, zero_stage=3)
    assert smaller_run(COUNTS, train, BatchPlan(8, 24, 1), True, needed(3, 12)) == SmallerRun(3, 12)
