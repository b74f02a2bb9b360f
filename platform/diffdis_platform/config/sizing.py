"""The command line of jobs/sizing.py: a recipe, a data set, numbers of GPUs, and what is assumed of the cluster."""

from dataclasses import dataclass, field
from typing import Literal

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
