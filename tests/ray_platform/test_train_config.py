"""The fields of a training run, the division of its batches, and DeepSpeed's configuration."""

import pytest
import torch

from ray_platform.contracts import ConfigError
from ray_platform.train.config import BatchPlan, TrainConfig


@pytest.mark.parametrize(("fields", "steps"), [({"log_every": 4}, [4, 8, 12]), ({"log_every": 4, "control_every": 6}, [6, 12])])
def test_control_metrics_are_computed_with_the_log_or_at_their_own_interval(fields, steps):
    config = TrainConfig(**fields)
    assert [step for step in range(1, 13) if config.is_control_due(step)] == steps


def test_the_configuration_of_deepspeed_can_be_extended():
    from ray_platform.train.engine import deepspeed_config

    more = {"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    config = deepspeed_config(TrainConfig(zero_stage=2, deepspeed=more), 4, 2)
    assert (config["zero_optimization"]["stage"], config["zero_optimization"]["reduce_bucket_size"]) == (2, 7)
    assert config["wall_clock_breakdown"]


@pytest.mark.parametrize(("zero_stage", "overlaps"), [(1, False), (2, True), (3, True)])
def test_zero_1_does_not_wait_for_the_backward_pass_of_a_gpu(monkeypatch, zero_stage, overlaps):
    """DeepSpeed waits where communication overlaps the backward pass, as that of each micro-batch does under ZeRO 2."""
    from ray_platform.train.engine import deepspeed_config

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert deepspeed_config(TrainConfig(zero_stage=zero_stage), 4, 2)["zero_optimization"]["overlap_comm"] == overlaps


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((128, 8, 16), (16, 1)), ((128, 4, 16), (16, 2)), ((128, 7, 16), (9, 2)), ((8, 1, 4), (4, 2)), ((3, 4, 4), (1, 1)),
        # The smallest number of micro-batches would lose samples; slightly more do not. A prime number of samples must lose some.
        ((50, 1, 16), (10, 5)), ((25, 1, 10), (5, 5)), ((37, 1, 16), (12, 3)),
    ],
)  # fmt: skip
def test_a_global_batch_is_divided_into_micro_batches(arguments, expected):
    plan = BatchPlan.of(*arguments)
    assert (plan.micro_batch_size, plan.num_micro_batches) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"num_workers": (4, 2)}, {"num_workers": 0}, {"global_batch_size": 1, "num_workers": 2}, {"precision": "fp16"},
        {"offload_optimizer": True, "zero_stage": 0}, {"ema_decay": 1.0}, {"max_loss_factor": 1.0}, {"stop_at_step": -1},
        {"keep_every": 1500}, {"max_minutes": -1.0}, {"checkpoint_minutes": -1.0}, {"log_every": 0}, {"eval_weights": "ema"},
        {"heldout_every": 0, "heldout_sources": ("a",)},
        {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"min_lr_factor": 1.1}, {"cooldown_steps": 5},
        {"cooldown_steps": 0, "lr_schedule": "wsd"}, {"cooldown_steps": 100, "lr_schedule": "wsd", "num_steps": 150},
        {"deepspeed": {"wall_clock_breakdown": True}, "zero_stage": 0}, {"compile": True, "zero_stage": 3},
        {"channels_last": True, "zero_stage": 1},
        {"gpus_per_worker": 2}, {"rewarm_steps": -1},
    ],
)  # fmt: skip
def test_invalid_fields_are_named(fields):
    with pytest.raises(ConfigError, match=f"train.{next(iter(fields))}"):
        TrainConfig(**fields)


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"train_batch_size": 64}, "global_batch_size"), ({"train_micro_batch_size_per_gpu": 4}, "micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, "global_batch_size"), ({"gradient_clipping": 0.5}, "gradient_clipping"),
        ({"bf16": {"enabled": True}}, "precision"), ({"fp16": {"enabled": True}}, "precision"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer"), ({"scheduler": {"type": "WarmupLR"}}, "lr_schedule"),
        ({"zero_optimization": {"stage": 3}}, "zero_stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ],
)  # fmt: skip
def test_a_setting_of_deepspeed_that_a_field_determines_names_the_field(setting, field):
    with pytest.raises(ConfigError, match=rf"^train\.deepspeed\.{next(iter(setting))}.*train\.{field}\b"):
        TrainConfig(deepspeed=setting)


@pytest.mark.parametrize("seconds", [1.0, 600.0, 7200.0])
def test_gloo_and_nccl_wait_longer_than_the_hang_detector(seconds):
    assert TrainConfig(hang_seconds=seconds).collective_timeout_s > 10 * seconds
