"""The command line of jobs/sizing.py: a recipe, a data set, numbers of GPUs, and what is assumed of the cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diffdis_platform.config.arguments import Parser, resolve
from diffdis_platform.config.command_line import RECIPES, recipe_name
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.sizing.cluster import Cluster
from diffdis_platform.sizing.datasets import DATASETS, Dataset
from ray_platform.contracts import ConfigError


@dataclass(frozen=True)
class SizingConfig:
    """What is asked. Raises ConfigError for a value that cannot be."""

    num_gpus: tuple[int, ...] = (1, 8, 64, 256, 1024)
    dataset: str = "laion_400m"  # a published one
    num_pairs: float = 0.0  # 0: the data set's
    pair_kb: float = 0.0  # of a shard, a pair; 0: the data set's as published, scaled to shard_px
    shard_px: int = 0  # size of the pictures in the shards; 0: as published
    inputs: Literal["live", "precomputed"] = "live"
    epochs: float = 1.0
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)  # as of jobs/pretrain.py
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        if not self.num_gpus or min(self.num_gpus) < 1:
            raise ConfigError(f"num_gpus: {list(self.num_gpus)}; give numbers from 1, as in [1,8,64]")
        if self.dataset not in DATASETS:
            raise ConfigError(f"dataset: {self.dataset} is not known; there are {', '.join(DATASETS)}")
        for name in ("num_pairs", "pair_kb", "shard_px"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: {getattr(self, name)} is not a number from 0")
        if not 0 < self.epochs < float("inf"):
            raise ConfigError(f"epochs: {self.epochs} is not above 0")

    @property
    def data(self) -> Dataset:
        return DATASETS[self.dataset].changed(self.num_pairs, 1e3 * self.pair_kb, self.shard_px)


def parse(arguments: Sequence[str]) -> SizingConfig:
    """Raises ConfigError, in one line, for a recipe, field or value that does not exist."""
    recipes = {"sd_v1_laion": RECIPES["sd_v1_laion"], **RECIPES}  # the first is the default
    name = recipe_name(arguments, recipes)
    parser = Parser(prog="jobs/sizing.py", description="How fast, how large and how dear a run is, on how many GPUs.")
    parser.add_argument("--recipe", default=name, help=f"what is trained; one of {', '.join(RECIPES)}")
    parser.add_class_arguments(SizingConfig, default=SizingConfig(pretrain=RECIPES[name]()))
    values, _ = resolve(parser, arguments)
    return SizingConfig(**{name: getattr(values, name) for name in SizingConfig.__dataclass_fields__})
