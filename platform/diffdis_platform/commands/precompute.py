"""`diffdis precompute`: encode shards once; the result is a source for `diffdis pretrain` with the same model.

Without RAY_ADDRESS, this machine's CPUs encode.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffdis.config import DiffDisConfig, resolve_encoder_paths
from diffdis_platform.commands import connect_cluster, list_sources
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, check_output_dir, parse
from diffdis_platform.config.pretrain import PretrainConfig, check_model
from diffdis_platform.recipes import recipes_of
from ray_platform.contracts import ConfigError
from ray_platform.data.config import DataConfig
from ray_platform.placement import check_labels
from ray_platform.storage_config import StorageConfig

if TYPE_CHECKING:
    from ray_platform.data.precompute import EncoderPool, PrecomputeProgress

INTERRUPTED = "stopped; the same command continues"

HELP = CommandHelp(
    "precompute",
    "Encode images and captions once, for many epochs and runs, with the model and data of a recipe.",
    examples=("--recipe sd_v1_laion --data.sources s3://bucket/laion --output_dir s3://bucket/latents --num_encoders 8",),
    fields=(
        *("output_dir", "data.sources", "data.image_size", "num_encoders", "gpus_per_encoder", "cpus_per_encoder", "batch_size"),
        *("model.autoencoder.path", "model.text_encoder.path", "model.warm_start"),
    ),
)


@dataclass(frozen=True)
class PrecomputeConfig:
    """The data, the encoders of a model, and the folder of the precomputed shards."""

    output_dir: str = ""
    """Absolute folder or s3:// URL of the precomputed shards."""
    num_encoders: int = 1
    """Number of actors that encode in parallel."""
    gpus_per_encoder: float = 0.0
    """GPUs per actor. 0.5: two share a GPU; 0: CPUs only."""
    cpus_per_encoder: float = 1.0
    """CPUs per actor."""
    placement: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that encode, such as '{"pool": "gpu"}'. Empty: any node."""
    batch_size: int = 64
    """Images per forward pass of an encoder."""
    model: DiffDisConfig = field(default_factory=DiffDisConfig)
    data: DataConfig = field(default_factory=DataConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if self.num_encoders < 1 or self.batch_size < 1:
            raise ConfigError("num_encoders and batch_size: must be at least 1")
        if self.gpus_per_encoder < 0 or self.cpus_per_encoder <= 0:
            raise ConfigError("gpus_per_encoder must not be negative, and cpus_per_encoder must be above 0")
        check_labels("placement", self.placement)

    def check(self) -> None:
        """Raise ConfigError for an output_dir that a job cannot write to."""
        check_output_dir(self.output_dir)

    def encoders(self) -> "EncoderPool":
        """Return what builds the encoders, how many there are and what they need. Raises ConfigError."""
        from diffdis.encoder import FrozenEncoder, describe_encoders
        from ray_platform.cached_folders import with_cached_folders
        from ray_platform.data.precompute import EncoderPool

        model = resolve_encoder_paths(self.model)
        check_model(model, self.data)
        return EncoderPool(
            functools.partial(with_cached_folders, FrozenEncoder, model),
            with_cached_folders(describe_encoders, model),
            self.num_encoders,
            self.gpus_per_encoder,
            self.cpus_per_encoder,
            self.batch_size,
            self.placement,
        )


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[PrecomputeConfig]:
    recipes = {name: _encoding_for(recipe) for name, recipe in recipes_of(PretrainConfig).items()}
    return parse(PrecomputeConfig, argv, HELP, recipes=recipes)


def _encoding_for(recipe: Callable[..., PretrainConfig]) -> Callable[..., PrecomputeConfig]:
    @functools.wraps(recipe)  # also its parameters, and that it is deprecated
    def build(**parameters: Any) -> PrecomputeConfig:
        config = recipe(**parameters)
        return PrecomputeConfig(model=config.model, data=config.data)

    return build


def main(argv: Sequence[str]) -> int:
    config = parse_arguments(argv).config
    check_model(resolve_encoder_paths(config.model), config.data)
    catalog = list_sources("data.sources", config.data)
    from ray_platform.data.precompute import check, precompute
    from ray_platform.terminal import ProgressBar

    check(catalog, config.data)
    encoders = config.encoders()
    connect_cluster(config.output_dir)
    bar, progress = ProgressBar(), None
    for progress in precompute(catalog, config.data, encoders, config.output_dir):
        bar.update("shards", progress.shards_done, progress.shards, _progress_text(progress))
    if progress is None:
        print("all shards were precomputed already")
    else:
        print(f"done: precomputed shards are in {config.output_dir}")
        if progress.shards_lost:
            print(
                f"{progress.shards_lost} of {progress.shards} shards are left out, because storage did not return them (see the "
                "warnings); run the same command again to add them"
            )
    return 0


def _progress_text(progress: "PrecomputeProgress") -> str:
    from ray_platform.terminal import left_text

    return f"{progress.samples:,} samples  {progress.samples_per_second:.0f} samples/s  {left_text(progress.seconds_left)}"
