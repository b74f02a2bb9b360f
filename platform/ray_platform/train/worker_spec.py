"""What the driver of a training run passes to its workers."""

from dataclasses import dataclass
from typing import Any

from ray_platform import storage
from ray_platform.data.catalog import Catalog
from ray_platform.data.config import DataConfig
from ray_platform.formats import FileFormat
from ray_platform.tracking import TrackedRun
from ray_platform.train.config import TrainConfig

SUMMARY = "train_summary.json"  # in output_dir: the result of a finished run
SUMMARY_FORMAT = FileFormat("summary of a run")


@dataclass(frozen=True)
class WorkerSpec:
    """Everything that a worker needs to train. Built once per launch by `Run.fit`, consumed by `worker.train_worker`."""

    build_task: bytes  # the pickled function that returns the Task, which Ray Train's controller need not import
    data: DataConfig
    train: TrainConfig
    catalog: Catalog
    output_dir: str
    launch: str  # names this launch's checkpoints
    tracker: TrackedRun
    hang_detector: Any  # handle of the HangDetector actor
    heldout: Any  # Ray reference to the validation samples, a Batch; or None
    params: dict[str, Any]  # resolved configuration
    code_version: str

    @property
    def export_dir(self) -> str:
        return storage.join(self.output_dir, "export")
