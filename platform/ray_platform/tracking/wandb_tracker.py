"""Weights & Biases: the tracker that writes to it. Only this module imports wandb."""

import glob
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import wandb

from ray_platform.contracts import ConfigError
from ray_platform.tracking.config import TrackingConfig
from ray_platform.tracking.tracker import MetricPoint, ModelPackage, NestedValues, RunStatus, TrackedData, Tracker, preview_of

STEP, AGE = "step", "system/age_seconds"  # x-axes of the curves: W&B's own step can only grow, and a resumed run goes back
_SETTINGS = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "save_code": False,
    "x_disable_stats": True,  # the load of all nodes is in the journal
    "init_timeout": 60.0,  # seconds; then the connection is tried again later
    "finish_timeout": 120.0,
    "x_transaction_log_flush_interval": 1.0,  # what is lost if W&B's local process is killed
}


class WandbTracker(Tracker):
    """Writer of one W&B run in the project `tracking.experiment`.

    W&B's environment variables apply, such as WANDB_API_KEY, WANDB_ENTITY and WANDB_MODE=offline. Its files are in the output
    folder, or below WANDB_DIR; what an outage leaves there, and all of an offline run, is sent by `wandb sync`.
    """

    @classmethod
    def check(cls, config: TrackingConfig, output_dir: str) -> None:
        """Raise ConfigError without credentials, and for an offline run that no local folder holds."""
        is_offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        if is_offline and _folder(output_dir) is None and "WANDB_DIR" not in os.environ:
            raise ConfigError(
                f"tracking.backends: wandb is offline, and {output_dir} is not a local folder; set WANDB_DIR to a local one"
            )
        if not is_offline and os.environ.get("WANDB_MODE") != "disabled" and not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "tracking.backends: wandb has no API key; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
            )

    def __init__(self, config: TrackingConfig, output_dir: str, run_id: str) -> None:
        """Start a run, or continue `run_id`. Raises wandb's errors if the service does not answer."""
        folder = None if "WANDB_DIR" in os.environ else _folder(output_dir) or tempfile.mkdtemp(prefix="wandb_")
        try:
            self._run = wandb.init(
                project=config.experiment,
                id=run_id or None,
                resume="allow",
                name=config.run_name or None,
                group=config.parent_run_id or None,
                dir=folder,
                reinit="create_new",  # a process may write several runs
                settings=wandb.Settings(**_SETTINGS),
            )
        except wandb.Error:
            raise
        except Exception:
            wandb.teardown()  # its local process died; the next attempt starts another one
            raise
        self._run.define_metric("*", step_metric=STEP, step_sync=False)
        self._run.define_metric("system/*", step_metric=AGE, step_sync=False)
        self._run.config.update({"tags": dict(config.tags)}, allow_val_change=True)

    def run_id(self) -> str:
        return self._run.id

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        self._run.notes = self._run.notes or description
        self._run.config.update({"tags": {**self._run.config["tags"], **tags}}, allow_val_change=True)

    def log_params(self, config: NestedValues) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        for point in points:
            prefix, axis = ("system/", AGE) if point.is_system else ("", STEP)
            metrics = {f"{prefix}{name}": value for name, value in point.metrics.items()}
            self._run.log({**metrics, axis: point.step, "_timestamp": point.time})
        self._run.status()  # `log` does not notice that W&B's local process has died; this waits for its answer

    def log_data(self, data: Sequence[TrackedData]) -> None:
        self._run.config.update({"datasets": [asdict(part) for part in data]}, allow_val_change=True)

    def log_bytes(self, data: bytes, path: str) -> None:
        file = Path(self._run.dir, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        self._run.save(glob.escape(str(file)), base_path=self._run.dir, policy="now")
        if preview := preview_of(path):
            name, step = preview
            self._run.log({name: wandb.Image(str(file)), STEP: step})

    def log_folder(self, folder: str, path: str) -> None:
        self._log_artifact(folder, path.replace("/", "-"), "files")

    def log_model(self, folder: str, package: ModelPackage) -> None:
        """Store the exported folder as an artifact of the type `model`, without what `package` adds for MLflow."""
        self._log_artifact(folder, "model", "model")

    def _log_artifact(self, folder: str, name: str, kind: str) -> None:
        artifact = wandb.Artifact(f"{name}-{self._run.id}", kind)
        if "://" in folder:
            artifact.add_reference(folder, checksum=False)
        else:
            artifact.add_dir(folder)
        self._run.log_artifact(artifact)
        if not self._run.offline:
            artifact.wait()

    def end(self, status: RunStatus) -> None:
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)


def _folder(output_dir: str) -> str | None:
    return None if "://" in output_dir else output_dir
