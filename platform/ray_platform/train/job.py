"""What a worker is told."""

from dataclasses import dataclass
from typing import Any

from ray_platform import storage
from ray_platform.data.catalog import Catalog
from ray_platform.data.config import DataConfig
from ray_platform.tracking import Tracker
from ray_platform.train.config import TrainConfig


@dataclass(frozen=True)
class Job:
    """It travels to the workers by way of Ray Train's controller, which need not import what the workers train."""

    build_task: bytes  # the pickled function that returns the Task
    data: DataConfig
    train: TrainConfig
    catalog: Catalog
    output_dir: str
    launch: str  # names this launch's checkpoints
    tracker: Tracker
    watch: Any  # the Watch's actor
    heldout: Any  # a reference to Heldout, or None
    params: dict[str, Any]
    code_version: str

    @property
    def export_dir(self) -> str:
        return storage.join(self.output_dir, "export")
