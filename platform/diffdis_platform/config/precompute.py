"""The command line of jobs/precompute.py: model and data as a recipe of jobs/pretrain.py has them."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffdis.config import DiffDisConfig
from diffdis.encoder import FrozenEncoder, describe_encoders
from diffdis.warm_start import resolve_encoder_paths
from diffdis_platform.config.arguments import Parser, resolve
from diffdis_platform.config.command_line import RECIPES, recipe_name
from diffdis_platform.config.pretrain import check_model
from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.data.config import DataConfig
from ray_platform.data.precompute import Encoders
from ray_platform.placement import check_labels


@dataclass(frozen=True)
class PrecomputeConfig:
    """What is encoded, by what, and where it goes."""

    output_dir: str = ""  # absolute folder or s3:// URL of the precomputed shards
    num_encoders: int = 1  # actors, side by side
    gpus_per_encoder: float = 0.0  # 0.5: two share a GPU; 0: on CPUs
    cpus_per_encoder: float = 1.0
    placement: dict[str, str] = field(default_factory=dict)  # labels of the nodes that encode, as {pool: gpu}; empty: any
    batch_size: int = 64  # images that an encoder takes at a time
    model: DiffDisConfig = field(default_factory=DiffDisConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if self.num_encoders < 1 or self.batch_size < 1:
            raise ConfigError("num_encoders and batch_size: at least 1")
        if self.gpus_per_encoder < 0 or self.cpus_per_encoder <= 0:
            raise ConfigError("gpus_per_encoder cannot be negative, and cpus_per_encoder must be above 0")
        check_labels("placement", self.placement)

    def encoders(self) -> Encoders:
        model = resolve_encoder_paths(self.model)
        check_model(model, self.data)
        return Encoders(
            functools.partial(storage.with_cached_folders, FrozenEncoder, model),
            storage.with_cached_folders(describe_encoders, model),
            self.num_encoders,
            self.gpus_per_encoder,
            self.cpus_per_encoder,
            self.batch_size,
            self.placement,
        )


def parse(arguments: Sequence[str]) -> PrecomputeConfig:
    """Raises ConfigError, in one line, for a recipe, field or value that does not exist."""
    name = recipe_name(arguments, RECIPES)
    recipe = RECIPES[name]()
    parser = Parser(prog="jobs/precompute.py", description="Encode images and captions once, for many epochs and runs.")
    parser.add_argument("--recipe", default=name, help=f"whose model and data to take; one of {', '.join(RECIPES)}")
    parser.add_class_arguments(PrecomputeConfig, default=PrecomputeConfig(model=recipe.model, data=recipe.data))
    values, _ = resolve(parser, arguments)
    config = PrecomputeConfig(**{name: getattr(values, name) for name in PrecomputeConfig.__dataclass_fields__})
    if "://" not in config.output_dir and not os.path.isabs(config.output_dir):
        raise ConfigError(f"output_dir: {config.output_dir or 'empty'}; give an absolute folder or an s3:// URL")
    return config
