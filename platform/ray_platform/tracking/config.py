"""Configuration of tracking, and the record of where a run is tracked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from ray_platform.contracts import ConfigError
from ray_platform.formats import FileFormat

RUN_RECORD_FORMAT = FileFormat("run record")
RUN_RECORD = "mlflow.json"  # in output_dir: a `RunRecord`, from which a resumed job continues in the same run
JOURNAL_ONLY = "jsonl"  # in `TrackingConfig.backends`: no tracker
# Import paths, so that only the process that writes a run imports MLflow (a second).
TRACKERS = {
    "mlflow": "ray_platform.tracking.mlflow_tracker:MlflowTracker",
    "tensorboard": "ray_platform.tracking.tensorboard_tracker:TensorBoardTracker",
    "wandb": "ray_platform.tracking.wandb_tracker:WandbTracker",
}


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go, and how the run is called there."""

    uri: str = ""
    """MLflow server or sqlite:////absolute/path.db. Empty: mlflow.db in the run's output folder."""
    experiment: str = "diffdis"
    """MLflow experiment, and project of W&B."""
    run_name: str = ""
    """Name of the run. Empty: the recipe, its start time and its seed."""
    parent_run_id: str = ""
    """MLflow run of the same store that shows this one below itself, or the output folder of that run. Empty: none."""
    tags: dict[str, str] = field(default_factory=dict)
    """Your own tags, such as '{"team": "vision"}'."""
    log_model: bool = True
    """Store the exported model in MLflow too, so that MLflow can load and serve it."""
    registered_model: str = ""
    """Registered model of which the run's model becomes a version. Empty: none."""
    system_metrics_seconds: float = 10.0
    """Seconds between two samples of the CPUs, memory, disks, network and GPUs of every node. 0: none."""
    backends: tuple[str, ...] = ("mlflow",)
    """Trackers that receive the run: mlflow, tensorboard, wandb, or your own as module:Class; all of them receive the same.
    metrics.jsonl in the output folder always has everything; `jsonl` alone means no tracker. The ID of the run is that of MLflow,
    or else of the first tracker that has one."""

    def __post_init__(self) -> None:
        for backend in self.backends:
            if backend not in (*TRACKERS, JOURNAL_ONLY) and ":" not in backend:
                names = ", ".join((*TRACKERS, JOURNAL_ONLY))
                raise ValueError(f"tracking.backends: no tracker {backend!r}; use {names}, or the import path module:Class")

    @property
    def services(self) -> tuple[str, ...]:
        """The entries of `backends` that need a tracker."""
        return tuple(backend for backend in self.backends if backend != JOURNAL_ONLY)


class RunRecord(TypedDict):
    """Address of a tracked run."""

    tracking_uri: str
    experiment: str
    run_id: str


def tracking_uri(config: TrackingConfig, output_dir: str) -> str:
    """Return the MLflow store that a run with this output folder writes to; empty if MLflow is not among the backends.

    Raises:
        ConfigError: `config.uri` is empty and `output_dir` is not a local folder.
    """
    if "mlflow" not in config.backends:
        return ""
    if config.uri:
        return config.uri
    if "://" in output_dir:
        raise ConfigError(
            f"tracking.uri: empty, but {output_dir} cannot hold MLflow's database; give an MLflow server or a sqlite:/// path"
        )
    from sqlalchemy.engine import URL  # late: see `read_run_record`

    path = str(Path(output_dir).absolute() / "mlflow.db")
    uri = URL.create("sqlite", database=path).render_as_string()
    # With the shorter scheme, MLflow creates the folder that is named as the quoted path.
    return uri if uri == f"sqlite:///{path}" else URL.create("sqlite+pysqlite", database=path).render_as_string()


def read_run_record(output_dir: str) -> RunRecord | None:
    """Return the run that is recorded in `output_dir`, or None. Secrets in its URI are redacted."""
    from ray_platform import storage  # late: every configuration imports this module, and pyarrow and fsspec take long

    url = storage.join(output_dir, RUN_RECORD)
    if not storage.exists(url):
        return None
    return RunRecord(**RUN_RECORD_FORMAT.read(storage.read_json(url), RunRecord.__annotations__, url))  # type: ignore[typeddict-item]
