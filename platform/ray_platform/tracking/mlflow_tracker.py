"""MLflow: the tracker that writes to it, and what can be read there. Only `mlflow_*.py` and `node_metrics.py` import it."""

import json
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_platform.redaction import redacted
from ray_platform.tracking.config import TrackingConfig, tracking_uri
from ray_platform.tracking.mlflow_model import log_model, register_model
from ray_platform.tracking.tracker import ModelPackage, RunStatus, TrackedData, Tracker

logger = logging.getLogger(__name__)

# Limits that servers of all versions accept; the full values are in the run's config.yaml.
_MAX_PARAM_LENGTH = 500
_MAX_KEY_LENGTH = 250
_MAX_PARAMS_PER_CALL = 100
_MAX_TAG_LENGTH = 5000
_PARENT_TAG, _NOTE_TAG, _CONTEXT_TAG = "mlflow.parentRunId", "mlflow.note.content", "mlflow.data.context"
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow then shows the pages of trainings, not those of chats


class MlflowTracker(Tracker):
    """Writer of one MLflow run."""

    def __init__(self, config: TrackingConfig, output_dir: str, run_id: str) -> None:
        """Start a run, or continue `run_id` if the store knows it."""
        self._config = config
        uri = tracking_uri(config, output_dir)
        self._client = open_client(uri)
        self._run_id = self._continue_run(run_id) or self._start_run(uri)
        self._start_time = self._client.get_run(self._run_id).info.start_time / 1000  # seconds
        self._step, self._metrics = 0, dict[str, float]()  # logged last

    def _continue_run(self, run_id: str) -> str:
        if run_id:
            try:
                self._client.update_run(run_id, status="RUNNING")
                self._set_tags(run_id, self._config.tags)
                return run_id
            except Exception as error:
                logger.warning("tracking: run %s cannot be continued, a new one is started: %s", run_id, redacted(str(error)))
        return ""

    def _start_run(self, uri: str) -> str:
        config = self._config
        experiment = open_experiment(self._client, config.experiment, uri)
        tags = dict(config.tags) | ({_PARENT_TAG: config.parent_run_id} if config.parent_run_id else {})
        return self._client.create_run(experiment, run_name=config.run_name or None, tags=tags).info.run_id

    def run_id(self) -> str:
        return self._run_id

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        if description and _NOTE_TAG not in self._client.get_run(self._run_id).data.tags:
            tags = {**tags, _NOTE_TAG: description}
        self._set_tags(self._run_id, tags)

    def log_data(self, data: Sequence[TrackedData]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for part in data:
            kind = part.url.partition("://")[0] if "://" in part.url else "local"
            source, profile = json.dumps({"uri": part.url}), json.dumps(dict(part.counts))
            dataset = Dataset(part.name, part.digest, kind, source, profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag(_CONTEXT_TAG, part.context)]))
        self._client.log_inputs(self._run_id, inputs)

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Record the leaves as params (`train.lr`) and all of it as the artifact `config.yaml`.

        MLflow's params never change: a resumed run keeps the first values, and `config.yaml` has the latest.
        """
        from mlflow.entities import Param

        try:
            known = self._client.get_run(self._run_id).data.params
            leaves = ((key[:_MAX_KEY_LENGTH], str(value)[:_MAX_PARAM_LENGTH]) for key, value in _flatten(config))
            new = [Param(key, value) for key, value in leaves if key not in known]
            for start in range(0, len(new), _MAX_PARAMS_PER_CALL):
                self._client.log_batch(self._run_id, params=new[start : start + _MAX_PARAMS_PER_CALL])
        finally:
            self._client.log_dict(self._run_id, json.loads(json.dumps(config, default=str)), "config.yaml")

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._metrics = (self._metrics if step == self._step else {}) | dict(metrics)
        self._step = step
        self._log_batch(metrics, step)

    def log_system(self, metrics: Mapping[str, float]) -> None:
        """The step of system metrics is the run's age in seconds."""
        self._log_batch({f"system/{name}": value for name, value in metrics.items()}, int(time.time() - self._start_time))

    def log_bytes(self, data: bytes, path: str) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / Path(path).name
            file.write_bytes(data)
            folder = str(Path(path).parent)
            self._client.log_artifact(self._run_id, str(file), None if folder == "." else folder)

    def log_folder(self, folder: str, path: str) -> None:
        self._client.log_artifacts(self._run_id, folder, path)

    def log_model(self, folder: str, package: ModelPackage) -> None:
        """Store an MLflow model named `model` with the run's latest metrics."""
        model_id = log_model(self._client, self._run_id, "model", folder, package, self._step)
        self._log_batch(self._metrics, self._step, model_id)
        if self._config.registered_model:
            tags = self._client.get_run(self._run_id).data.tags
            own_tags = {name: value for name, value in tags.items() if not name.startswith("mlflow.")}
            self.register_model(self._config.registered_model, "", self._run_id, own_tags)

    def register_model(self, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> None:
        register_model(self._client, name, source, run_id, tags)

    def end(self, status: RunStatus) -> None:
        self._client.set_terminated(self._run_id, status)

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            run_tags = [RunTag(name[:_MAX_KEY_LENGTH], value[:_MAX_TAG_LENGTH]) for name, value in tags.items()]
            self._client.log_batch(run_id, tags=run_tags)

    def _log_batch(self, metrics: Mapping[str, float], step: int, model_id: str | None = None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(name, value, now, step, model_id=model_id) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=batch)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_history(uri: str, run_id: str, prefix: str) -> dict[int, dict[str, float]]:
    """Return the metrics of a run whose names start with `prefix`, by step.

    Of a metric that was logged twice at a step (a resumed run does that), the later value counts.
    """
    history: dict[int, dict[str, float]] = {}
    client = open_client(uri)
    for name in client.get_run(run_id).data.metrics:
        if name.startswith(prefix):
            for metric in sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp):
                history.setdefault(metric.step, {})[name] = metric.value
    return dict(sorted(history.items()))


def ui_command(uri: str, port: int = 5000) -> str:
    """Return the command that opens MLflow's pages for the store at `uri`."""
    if uri.startswith(("http://", "https://")):
        return shlex.join((sys.executable, "-m", "webbrowser", uri))
    # One reader needs neither four servers nor MLflow's job runners, which take seconds to start and to end.
    settings = ("env", "MLFLOW_DISABLE_TELEMETRY=true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false")
    server = (sys.executable, "-m", "mlflow", "ui", "--workers", "1")
    return shlex.join((*settings, *server, "--backend-store-uri", uri, "--port", str(port)))


def open_client(uri: str) -> Any:
    """Return an MLflow client that logs little, gives up in seconds and sends no telemetry."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient  # after the settings, which MLflow reads when it is imported

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def open_experiment(client: Any, name: str, uri: str) -> str:
    """Return the id of an experiment, and create it if it is missing.

    Artifacts go next to an SQLite file, or where the server puts them.
    """
    if (experiment := client.get_experiment_by_name(name)) is not None:
        return experiment.experiment_id
    artifacts = None
    if uri.startswith("sqlite:///"):
        artifacts = str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts")
    try:
        return client.create_experiment(name, artifact_location=artifacts, tags=_KIND)
    except Exception:
        if (experiment := client.get_experiment_by_name(name)) is None:  # another run may have created it meanwhile
            raise
        return experiment.experiment_id
