"""Configuration of the controlled comparison."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.parse import check_output_dir, with_fields
from diffdis_platform.config.pretrain import PretrainConfig
from ray_platform.contracts import ConfigError
from ray_platform.tracking import TrackingConfig

TASKS = ("joint", "generation", "alignment", "clip")
ARMS: dict[str, dict[str, Any]] = {
    **{task: {"objective.task": task} for task in TASKS},
    # The masks side by side, with one draw an image: more need the one-way mask.
    "joint_mask": {"objective.task": "joint", "model.query_visibility": "joint", "objective.num_draws": 1},
    "one_way_mask": {"objective.task": "joint", "model.query_visibility": "one_way", "objective.num_draws": 1},
}


@dataclass(frozen=True)
class CompareConfig:
    """Which arms are compared, on which seeds, and what all of them have in common."""

    output_dir: str = ""  # absolute folder or s3:// URL
    arms: tuple[str, ...] = TASKS  # of these, joint_mask, one_way_mask and own_arms
    own_arms: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {field of model.* or objective.*: value}
    seeds: tuple[int, ...] = (0, 1, 2)  # a seed's arms have the same samples in the same order
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)  # of all arms
    evaluation: EvalConfig = field(default_factory=EvalConfig)  # images are drawn by the arms that can
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in ("arms", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name}: {list(values)}; give at least one, and none twice")
        if self.seeds and min(self.seeds) < 0:
            raise ConfigError(f"seeds: {min(self.seeds)} is below 0")
        if taken := sorted(self.own_arms.keys() & ARMS.keys()):
            raise ConfigError(f"own_arms: there is an arm {taken[0]} already; take another name")
        if odd := [name for name in self.own_arms if not re.fullmatch(r"[\w-]{1,64}", name)]:
            raise ConfigError(f"own_arms: {odd[0]!r}; a name has up to 64 letters, digits, - and _")
        if unknown := [name for name in self.arms if name not in ARMS | self.own_arms]:
            raise ConfigError(f"arms: there is no {unknown[0]}; there are {', '.join(ARMS | self.own_arms)}")

    def check(self) -> None:
        """Every arm's fields, and that nothing is set which a comparison sets itself. Raises ConfigError."""
        check_output_dir(self.output_dir)
        train = self.pretrain.train
        for name, given, instead in (
            ("pretrain.output_dir", self.pretrain.output_dir, "output_dir"),
            ("pretrain.tracking", self.pretrain.tracking != TrackingConfig(), "tracking"),
            ("pretrain.train.seed", train.seed, "seeds"),
            ("pretrain.train.resume", train.resume != "none", "nothing: the same command goes on"),
            ("evaluation.output_dir", self.evaluation.output_dir, "output_dir"),
            ("evaluation.checkpoint", self.evaluation.checkpoint, "nothing: each run's own model is evaluated"),
            ("evaluation.tracking", self.evaluation.tracking != TrackingConfig(), "tracking"),
        ):
            if given:
                raise ConfigError(f"{name}: is set by the comparison; give {instead}")
        for arm in self.arms:
            for name in self.fields_of(arm):
                if not name.startswith(("model.", "objective.")):
                    raise ConfigError(f"own_arms.{arm}: {name}; an arm has fields of model and objective, all else is equal")
            self.pretrain_of(arm, self.seeds[0])

    def fields_of(self, arm: str) -> dict[str, Any]:
        """By which the arm differs from what all have in common."""
        return (ARMS | self.own_arms)[arm]

    def run_dir(self, arm: str, seed: int) -> str:
        return f"{self.output_dir.rstrip('/')}/runs/{arm}_seed{seed}"

    def pretrain_of(self, arm: str, seed: int) -> PretrainConfig:
        """Raises ConfigError for a field or value of the arm that does not exist."""
        try:
            config = with_fields(self.pretrain, self.fields_of(arm))
        except ConfigError as error:
            raise ConfigError(f"own_arms.{arm}: {error}") from None
        train = dataclasses.replace(config.train, seed=seed, resume="auto")
        return dataclasses.replace(config, output_dir=self.run_dir(arm, seed), train=train, tracking=self.tracking)

    def evaluation_of(self, arm: str, seed: int) -> EvalConfig:
        """Of the run's exported model."""
        url, quality = self.run_dir(arm, seed), self.evaluation.quality
        if self.pretrain_of(arm, seed).objective.task in ("alignment", "clip"):
            quality = dataclasses.replace(quality, prompts="")
        return dataclasses.replace(
            self.evaluation,
            checkpoint=f"{url}/export",
            output_dir=f"{url}/evaluation",
            quality=quality,
            tracking=self.tracking,
        )
