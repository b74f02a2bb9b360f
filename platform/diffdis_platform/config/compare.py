"""Configuration of the controlled comparison."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.many_runs import reject_fields_of_runs
from diffdis_platform.config.parse import check_output_dir, with_fields
from diffdis_platform.config.pretrain import PretrainConfig
from ray_platform.contracts import ConfigError
from ray_platform.tracking import TrackingConfig

TASKS = ("joint", "generation", "alignment", "clip")
ARMS: dict[str, dict[str, Any]] = {
    **{task: {"objective.task": task} for task in TASKS},
    # Both masks with one draw per image: several draws need the one-way mask.
    "joint_mask": {"objective.task": "joint", "model.query_visibility": "joint", "objective.num_draws": 1},
    "one_way_mask": {"objective.task": "joint", "model.query_visibility": "one_way", "objective.num_draws": 1},
}


@dataclass(frozen=True)
class CompareConfig:
    """Arms and seeds of a comparison, and the config that all runs share."""

    output_dir: str = ""
    """Absolute folder or s3:// URL of the comparison."""
    arms: tuple[str, ...] = TASKS
    """Arms to compare: joint, generation, alignment, clip, joint_mask, one_way_mask, and names from own_arms."""
    own_arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Your own arms, as '{"name": {"objective.num_draws": 1}}'; an arm sets fields of model and objective, and train.num_steps,
    such as the steps of `clip` that take as long as those of `joint`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds. The arms of a seed are trained on the same samples in the same order."""
    selection_seeds: tuple[int, ...] = ()
    """Seeds on which settings were chosen, such as lambda or the learning rate. The paired differences and the claim are about
    the other ones."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Training of all arms; an arm changes some of its fields."""
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation of every run. Arms that cannot generate images skip evaluation.quality. With quality.best_of, joint arms rank
    their own images, and those of the generation arms are ranked by the model of the clip arm with the same seed."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in ("arms", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name}: {list(values)}; give at least one, and no duplicates")
        for name in ("seeds", "selection_seeds"):
            if (lowest := min(getattr(self, name), default=0)) < 0:
                raise ConfigError(f"{name}: {lowest} is below 0; use seeds from 0")
        if taken := sorted(self.own_arms.keys() & ARMS.keys()):
            raise ConfigError(f"own_arms: {taken[0]} is a predefined arm; use another name")
        if invalid := [name for name in self.own_arms if not re.fullmatch(r"[\w-]{1,64}", name)]:
            raise ConfigError(f"own_arms: invalid name {invalid[0]!r}; use up to 64 letters, digits, - and _")
        if unknown := [name for name in self.arms if name not in ARMS | self.own_arms]:
            raise ConfigError(f"arms: no such arm ({unknown[0]}); use {', '.join(ARMS | self.own_arms)}")

    def check(self) -> None:
        """Check the fields of every arm, and that no field is set that the comparison sets. Raises ConfigError."""
        check_output_dir(self.output_dir)
        reject_fields_of_runs(
            "comparison",
            self.pretrain,
            self.evaluation,
            ("pretrain.train.seed", self.pretrain.train.seed, "use seeds"),
            ("evaluation.name", self.evaluation.name, "leave it out: a model has the name of its arm"),
            ("evaluation.quality.ranker", self.evaluation.quality.ranker, "use the arm clip, which ranks images of generation"),
        )
        for arm in self.arms:
            for name in self.fields_of(arm):
                if not name.startswith(("model.", "objective.")) and name != "train.num_steps":
                    raise ConfigError(
                        f"own_arms.{arm}: {name} is not a field of model or objective; an arm changes only those, and "
                        "train.num_steps"
                    )
            task = self.pretrain_of(arm, self.seeds[0]).objective.task
            if task == "generation" and self.evaluation.quality.best_of > 1 and "clip" not in self.arms:
                raise ConfigError(
                    f"evaluation.quality.best_of: the arm {arm} cannot rank its images; add the arm clip, whose model can, or "
                    "use 1"
                )

    def fields_of(self, arm: str) -> dict[str, Any]:
        """Return the fields in which the arm differs from `pretrain`."""
        return (ARMS | self.own_arms)[arm]

    def runs(self) -> list[tuple[str, int]]:
        """Return (arm, seed) in the order in which they run: all arms of a seed first, and clip before the arms that it ranks."""

        def is_ranked_by_clip(arm: str) -> bool:
            return self.evaluation.quality.best_of > 1 and self.pretrain_of(arm, 0).objective.task == "generation"

        return [(arm, seed) for seed in self.seeds for arm in sorted(self.arms, key=is_ranked_by_clip)]

    def run_dir(self, arm: str, seed: int) -> str:
        return f"{self.output_dir.rstrip('/')}/runs/{arm}_seed{seed}"

    def pretrain_of(self, arm: str, seed: int) -> PretrainConfig:
        """Return the config of a run's training. Raises ConfigError for an invalid field or value of the arm."""
        try:
            config = with_fields(self.pretrain, self.fields_of(arm))
        except ConfigError as error:
            raise ConfigError(f"own_arms.{arm}: {error}") from None
        train = dataclasses.replace(config.train, seed=seed, resume="auto")
        return dataclasses.replace(config, output_dir=self.run_dir(arm, seed), train=train, tracking=self.tracking)

    def evaluation_of(self, arm: str, seed: int) -> EvalConfig:
        """Return the config of the evaluation of a run's exported model."""
        url, quality = self.run_dir(arm, seed), self.evaluation.quality
        task = self.pretrain_of(arm, seed).objective.task
        if task in ("alignment", "clip"):
            quality = dataclasses.replace(quality, prompts="")
        elif task == "generation" and quality.best_of > 1:  # it cannot rank its own images
            quality = dataclasses.replace(quality, ranker=f"{self.run_dir('clip', seed)}/export")
        return dataclasses.replace(
            self.evaluation,
            checkpoint=f"{url}/export",
            name=arm,
            output_dir=f"{url}/evaluation",
            quality=quality,
            tracking=self.tracking,
        )
