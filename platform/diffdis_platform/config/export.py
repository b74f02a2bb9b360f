"""Configuration of the export of a checkpoint."""

import re
from dataclasses import dataclass, field

from diffdis_platform.config.parse import check_output_dir
from ray_platform.contracts import ConfigError
from ray_platform.storage_config import StorageConfig

_WEIGHTS = re.compile(r"best|weights|ema|ema_(width_)?(0?\.\d+|\d\.?\d*e-\d+)")


def check_weights(weights: str) -> None:
    """Raise ConfigError for a name that no weights of a checkpoint can have."""
    if not _WEIGHTS.fullmatch(weights):
        raise ConfigError(
            f"weights: {weights!r}; use best, weights, ema, or the name of an EMA, such as ema_0.999 or ema_width_0.1"
        )


@dataclass(frozen=True)
class ExportConfig:
    """The checkpoint to export, and the folder of the exported model."""

    checkpoint: str = ""
    """A step_* folder, or a run's output_dir for its newest checkpoint; local or s3://."""
    output_dir: str = ""
    """Absolute folder or s3:// URL of the exported model."""
    weights: str = "best"
    """Which weights: weights, ema, ema_<decay> or ema_width_<width>, which is reconstructed if the run stored other widths.
    `best` are those that the run scored (its train.eval_weights)."""
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def check(self) -> None:
        """Raise ConfigError if a required field is missing."""
        if not self.checkpoint:
            raise ConfigError("checkpoint: give a step_* folder of a run's checkpoints, or the run's output_dir")
        check_output_dir(self.output_dir)
