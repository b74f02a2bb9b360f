"""Config, recipes and command line of jobs/sweep.py."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from diffdis_platform.config.arguments import Parser, resolve
from diffdis_platform.config.command_line import recipe_name
from diffdis_platform.config.evaluate import EvalConfig, QualityConfig, ScoringConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes.demo import DEMO_DATA, demo
from diffdis_platform.recipes.sd_v1_laion import sd_v1_laion_one_way
from ray_platform.contracts import ConfigError
from ray_platform.sweep.config import Mode, SearchConfig
from ray_platform.tracking import TrackingConfig

# Hyperparameters that the method leaves open: loss weights, the noise of the text query, and guidance.
SPACE: dict[str, dict[str, Any]] = {
    "objective.lambda_alignment": {"low": 0.02, "high": 4.0, "log": True},
    "model.schedule.gamma": {"low": 0.03, "high": 0.5, "log": True},
    "objective.query_timestep_min": {"low": 0, "high": 700},
    "objective.caption_dropout": {"low": 0.0, "high": 0.3},
    "objective.temperature": {"low": 0.03, "high": 0.3, "log": True},
    "evaluation.quality.guidance_scales": {"low": 1.0, "high": 6.0},
}

# For a model trained from scratch, the learning rates matter most, and a small lambda is best (docs/comparison.md).
DEMO_SPACE: dict[str, dict[str, Any]] = {
    "objective.lr_unet": {"low": 3e-4, "high": 2e-3, "log": True},
    "objective.lr_new": {"low": 3e-4, "high": 2e-3, "log": True},
    "objective.lambda_alignment": {"low": 0.004, "high": 1.0, "log": True},
    "train.micro_batch_size": {"values": [16, 32, 64]},  # at equal samples: more steps against more negatives
    "evaluation.quality.guidance_scales": SPACE["evaluation.quality.guidance_scales"],
}


@dataclass(frozen=True)
class SweepConfig(SearchConfig):
    """Search over the fields of a recipe.

    `space` has fields of `pretrain` (objective.temperature) and of `evaluation` (evaluation.scoring.num_draws).
    """

    space: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(SPACE))
    objectives: dict[str, Mode] = field(default_factory=lambda: {"accuracy": "max", "fd_efficientnet_lite0": "min"})
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)  # of all trials; the baseline trial has its values
    evaluation: EvalConfig = field(default_factory=EvalConfig)  # of a trial at each milestone
    registered_model: str = "diffdis-sweep"  # MLflow model whose versions are the best trials and the front; empty: none
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # of the sweep's run and the runs of its trials


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
    """Return the sweep at the paper's size with the one-way mask.

    It needs the fields that sd_v1_laion needs, evaluation.data_roots and evaluation.quality.
    """
    base = sd_v1_laion_one_way()
    return SweepConfig(
        pretrain=base,
        evaluation=EvalConfig(gpus_per_worker=1.0, quality=QualityConfig(num_images=10_000)),
        samples=2_000_000,
        num_trials=16,
    )


RECIPES: dict[str, Callable[[], SweepConfig]] = {recipe.__name__: recipe for recipe in (demo_sweep, sd_v1_laion_sweep)}


@dataclass(frozen=True)
class Command:
    recipe: str
    config: SweepConfig
    yaml: str  # the resolved configuration


def parse(arguments: Sequence[str]) -> Command:
    """Raises ConfigError, in one line, for a recipe, field or value that does not exist."""
    name = recipe_name(arguments, RECIPES)
    parser = Parser(prog="jobs/sweep.py", description=f"Search the recipe's open choices. Recipes: {', '.join(RECIPES)}.")
    parser.add_argument("--recipe", default=name, help="the sweep to start from")
    parser.add_argument("--config", action="config", help="a saved config.yaml to start from")
    parser.add_class_arguments(SweepConfig, default=RECIPES[name]())
    values, text = resolve(parser, arguments)
    config = SweepConfig(**{item.name: getattr(values, item.name) for item in fields(SweepConfig)})
    if "://" not in config.output_dir and not os.path.isabs(config.output_dir):
        raise ConfigError(f"output_dir: {config.output_dir or 'empty'}; give an absolute folder or an s3:// URL")
    return Command(values.recipe, config, text)
