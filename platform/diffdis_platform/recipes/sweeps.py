"""Recipes of `diffdis sweep`."""

from dataclasses import replace
from typing import Any

from diffdis_platform.config.evaluate import EvalConfig, QualityConfig, ScoringConfig
from diffdis_platform.config.sweep import SPACE, SweepConfig
from diffdis_platform.recipes.demo import DEMO_DATA, demo
from diffdis_platform.recipes.sd_v1_laion import sd_v1_laion

# For a model trained from scratch, the learning rates matter most, and lambda is small (docs/comparison.md).
DEMO_SPACE: dict[str, dict[str, Any]] = {
    "objective.lr_unet": {"low": 3e-4, "high": 2e-3, "log": True},
    "objective.lr_new": {"low": 3e-4, "high": 2e-3, "log": True},
    "objective.lambda_alignment": {"low": 0.004, "high": 1.0, "log": True},
    "train.micro_batch_size": {"values": [16, 32, 64]},  # at equal samples: more steps, or more negatives
    "evaluation.quality.guidance_scales": SPACE["evaluation.quality.guidance_scales"],
}


def demo_sweep() -> SweepConfig:
    """Return the sweep of the demo, which runs two trials at a time on two CPU cores."""
    base, heldout = demo(), DEMO_DATA / "wds_heldout_style"
    return SweepConfig(
        pretrain=replace(
            base,
            data=replace(base.data, sources=(str(DEMO_DATA / "train"),)),
            train=replace(
                base.train, num_workers=1, micro_batch_size=64, warmup_steps=30, checkpoint_every=10_000, preview_every=0
            ),
        ),
        evaluation=EvalConfig(
            suite="demo",
            data_roots=(str(DEMO_DATA),),
            scoring=ScoringConfig(num_draws=4),
            quality=QualityConfig(prompts=str(heldout / "classnames.txt"), reference=str(heldout), num_images=128, num_steps=20),
        ),
        space=DEMO_SPACE,
        num_trials=8,
        samples=15_360,
        num_milestones=2,
    )


def sd_v1_laion_sweep() -> SweepConfig:
    """Return the sweep at the paper's size, with the one-way mask.

    Set the fields of sd_v1_laion, evaluation.data_roots and evaluation.quality.
    """
    base = sd_v1_laion()
    return SweepConfig(
        pretrain=base,
        evaluation=EvalConfig(gpus_per_worker=1.0, quality=QualityConfig(num_images=10_000)),
        samples=2_000_000,
        num_trials=16,
    )
