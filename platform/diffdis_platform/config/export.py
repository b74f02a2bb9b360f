"""Configuration of the export of a checkpoint."""

from dataclasses import dataclass, field

from diffdis_platform.config.parse import check_output_dir
from ray_platform.contracts import ConfigError
from ray_platform.storage_config import StorageConfig


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

    def check(self) -> None:
        """Raise ConfigError if a required field is missing."""
        if not self.checkpoint:
            raise ConfigError("checkpoint: give a step_* folder of a run's checkpoints, or the run's output_dir")
        check_output_dir(self.output_dir)
