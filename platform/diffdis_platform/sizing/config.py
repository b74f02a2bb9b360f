"""Configuration of `diffdis sizing`."""

from dataclasses import dataclass, field, replace
from typing import Literal

from diffdis_platform.commands.pretrain import parse_arguments
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.sizing.constants import DATASETS, Constants, DatasetSize
from ray_platform.contracts import ConfigError


@dataclass(frozen=True)
class SizingConfig:
    """The run whose size is predicted, the numbers of GPUs, and the constants of the model. Raises ConfigError."""

    recipe: str = "sd_v1_laion"  # recipe of the run
    run_config: str = ""  # config.yaml of the run, instead of a recipe; `diffdis pretrain --dry-run` prints one
    num_gpus: tuple[int, ...] = (1, 8, 64, 256, 1024)
    image_size: int = 0  # pixels; 0: that of the run
    micro_batch_size: int = 0  # samples per GPU; 0: that of the run
    dataset: str = "laion_400m"  # or laion_5b
    num_pairs: float = 0.0  # 0: those of the dataset
    epochs: float = 1.0
    inputs: Literal["live", "precomputed"] = "live"
    gpu: str = "H100"
    constants: dict[str, float] = field(default_factory=dict)  # other values of the model's constants, as {mfu: 0.2}
    json: str = ""  # file for all figures

    def __post_init__(self) -> None:
        if not self.num_gpus or min(self.num_gpus) < 1:
            raise ConfigError(f"num_gpus: {list(self.num_gpus)}; give numbers from 1, such as 1 8 64")
        if self.dataset not in DATASETS:
            raise ConfigError(f"dataset: {self.dataset} is unknown; choose one of {', '.join(DATASETS)}")
        if not 0 <= self.num_pairs < float("inf") or not 0 < self.epochs < float("inf"):
            raise ConfigError(f"num_pairs and epochs: {self.num_pairs:g} and {self.epochs:g}; give positive numbers")
        if self.image_size < 0 or self.image_size % 8 or self.micro_batch_size < 0:
            raise ConfigError("image_size and micro_batch_size: give positive numbers, and a multiple of 8 for image_size")
        Constants().with_values(self.constants)

    def run(self) -> PretrainConfig:
        """Return the configuration of the run. Raises ConfigError for a recipe or a file that cannot be read."""
        source = ["--config", self.run_config] if self.run_config else ["--recipe", self.recipe]
        run = parse_arguments(source).config
        if px := self.image_size:
            factor = run.model.image_size // run.model.unet.sample_size
            unet = replace(run.model.unet, sample_size=px // factor)
            run = replace(run, model=replace(run.model, image_size=px, unet=unet), data=replace(run.data, image_size=px))
        if self.micro_batch_size:
            run = replace(run, train=replace(run.train, micro_batch_size=self.micro_batch_size))
        return run

    def data(self, image_size: int) -> DatasetSize:
        """Return the size of the dataset; shards smaller than `image_size` are assumed to be written again at that size."""
        data = DATASETS[self.dataset]
        px = max(image_size, data.shard_px)
        return DatasetSize(self.num_pairs or data.num_pairs, data.pair_bytes * (px / data.shard_px) ** 2, px)
