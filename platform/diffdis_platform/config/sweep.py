"""The command line of jobs/sweep.py, and the sweeps that can be started by name."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from diffdis_platform.config.arguments import Parser, resolve
from diffdis_platform.config.command_line import recipe_name
from diffdis_platform.config.evaluate import EvalConfig, QualityConfig, ScoringConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes.demo import DEMO_DATA, demo
from diffdis_platform.recipes.sd_v1_laion import sd_v1_laion_one_way
from ray_platform.contracts import ConfigError
from ray_platform.sweep.schedulers import SchedulerName
from ray_platform.sweep.sweep import SearchName
from ray_platform.tracking import TrackingConfig

# What the method leaves open: the losses' weights, where the text query's noise lies, and guidance.
SPACE: dict[str, dict[str, Any]] = {
    "objective.lambda_alignment": {"low": 0.02, "high": 4.0, "log": True},
    "model.schedule.gamma": {"low": 0.03, "high": 0.5, "log": True},
    "objective.query_timestep_min": {"low": 0, "high": 700},
    "objective.caption_dropout": {"low": 0.0, "high": 0.3},
    "objective.temperature": {"low": 0.03, "high": 0.3, "log": True},
    "evaluation.quality.guidance_scales": {"low": 1.0, "high": 6.0},
}

# Of a model that is trained from scratch, the rates come first, and lambda is small (docs/comparison.md).
DEMO_SPACE: dict[str, dict[str, Any]] = {
    "objective.lr_unet": {"low": 3e-4, "high": 2e-3, "log": True},
    "objective.lr_new": {"low": 3e-4, "high": 2e-3, "log": True},
    "objective.lambda_alignment": {"low": 0.004, "high": 1.0, "log": True},
    "train.micro_batch_size": {"values": [16, 32, 64]},  # at equal samples: more steps against more negatives
    "evaluation.quality.guidance_scales": SPACE["evaluation.quality.guidance_scales"],
}


@dataclass(frozen=True)
class SweepConfig:
    """What is tried, on what budget, and what counts."""

    output_dir: str = ""  # absolute folder or s3:// URL
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)  # what all trials share; its own values are the first trial
    evaluation: EvalConfig = field(default_factory=EvalConfig)  # of a trial at each milestone
    # Fields of pretrain (objective.temperature) and of evaluation (evaluation.scoring.num_draws), each with {values: [...]} or
    # {low: ..., high: ..., log: true}.
    space: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(SPACE))
    search: SearchName = "optuna"  # optuna: TPE on all objectives at once; a grid needs values everywhere
    scheduler: SchedulerName = "asha"  # who goes on at a milestone; pbt: the lower ones take over from the higher ones
    reduction: int = 2  # of ASHA: at a milestone the upper 1 / reduction go on; its milestones grow by this factor
    num_trials: int = 12  # with the recipe's own values; of a grid: 0, or as many as it has points
    samples: int = 1_000_000  # that a whole trial is trained on; train.num_steps follows
    num_milestones: int = 3  # at which a trial is evaluated; the last one is the end of its budget
    objectives: dict[str, Literal["max", "min"]] = field(
        default_factory=lambda: {"accuracy": "max", "fd_efficientnet_lite0": "min"}
    )  # the scheduler goes by the first
    seed: int = 0  # of the search; the trials train with pretrain.train.seed, all of them
    max_concurrent: int = 0  # trials side by side; 0: as many as there is room for
    registered_model: str = "diffdis-sweep"  # the best trials and the front become its versions in MLflow; empty: none
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # of the sweep's run and of its trials'

    def __post_init__(self) -> None:
        if self.reduction < 2 or self.num_milestones < 1 or self.samples < 1 or self.max_concurrent < 0:
            raise ConfigError("reduction: at least 2; num_milestones and samples: at least 1; max_concurrent: at least 0")
        if not self.space or not self.objectives:
            raise ConfigError("space and objectives: give at least one field and one metric")
        if self.search != "grid" and self.num_trials < 2:
            raise ConfigError(f"num_trials: {self.num_trials}; the recipe's own values and at least one more")
        if self.scheduler == "pbt" and self.search == "optuna":
            raise ConfigError("search: optuna proposes new trials, and pbt changes those that there are; take random or grid")


def demo_sweep() -> SweepConfig:
    """Two trials side by side on two CPU cores."""
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
    """The paper's size with the one-way mask. Give what sd_v1_laion needs, evaluation.data_roots and evaluation.quality."""
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
