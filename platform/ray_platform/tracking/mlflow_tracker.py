"""MLflow: the tracker that writes to it, and what can be read there. Only this module and `node_metrics` import it."""

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ray_platform import storage
from ray_platform.json_values import flat_fields
from ray_platform.tracking.config import RunRecord, TrackingConfig, read_run_record, tracking_uri
from ray_platform.tracking.tracker import (
    Columns,
    MetricPoint,
    ModelPackage,
    NestedValues,
    RunStatus,
    TrackedData,
    Tracker,
    preview_of,
)

logger = logging.getLogger(__name__)

# Limits that servers of all versions accept; the full values are in the run's config.yaml.
_MAX_PARAM_LENGTH = 500
_MAX_KEY_LENGTH = 250
_MAX_PARAMS_PER_CALL, _MAX_METRICS_PER_CALL = 100, 1000
_MAX_TAG_LENGTH = 5000
_PARENT_TAG, _NOTE_TAG, _CONTEXT_TAG = "mlflow.parentRunId", "mlflow.note.content", "mlflow.data.context"
_CONNECTED_TAG = "mlflow.connectedAt"  # MLflow's pages do not show tags of its own prefix
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow then shows the pages of trainings, not those of chats
_SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
_SETTINGS |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_PORT = 5000  # of the pages
_UPLOAD_TIMEOUT = "600"  # seconds for a server to store a large file; the timeout for metrics is shorter
# The first section of the charts of a run, which MLflow sorts by name: copies of these metrics, and the preview images.
_OVERVIEW = "_overview"
_MAIN_METRICS = (
    *("train/loss_generation", "train/loss_alignment", "train/samples_per_second"),
    *("alignment/retrieval", "alignment/retrieval_chance", "alignment/retrieval_shuffled_images"),
)
_TYPES = {str: "string", int: "long", float: "double", bool: "boolean"}


class MlflowTracker(Tracker):
    """Writer of one MLflow run."""

    def __init__(self, config: TrackingConfig, output_dir: str, run_id: str) -> None:
        """Start a run, or continue `run_id` unless it was deleted. Raises MLflow's errors if the store does not answer."""
        self._config = config
        uri = tracking_uri(config, output_dir)
        self._client = open_client(uri)
        self._run_id = self._continue_run(run_id) or self._start_run(uri)

    def _continue_run(self, run_id: str) -> str:
        from mlflow.exceptions import MlflowException

        if not run_id:
            return ""
        try:
            is_deleted = self._client.get_run(run_id).info.lifecycle_stage == "deleted"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            is_deleted = True
        if is_deleted:
            logger.warning("tracking: run %s does not exist in MLflow any more; a new one is started", run_id)
            return ""
        self._client.update_run(run_id, status="RUNNING")
        # A new value: the run counts as open only if the store can be written.
        self._set_tags(run_id, {**self._config.tags, _CONNECTED_TAG: str(time.time())})
        return run_id

    def _start_run(self, uri: str) -> str:
        config = self._config
        experiment = _open_experiment(self._client, config.experiment, uri)
        parent = config.parent_run_id
        if "/" in parent:
            record = read_run_record(parent)
            parent = record["run_id"] if record else ""
            if not parent:
                raise ConnectionError(f"{config.parent_run_id}: its run, the parent of this one, has not started in MLflow yet")
        tags = dict(config.tags) | ({_PARENT_TAG: parent} if parent else {})
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

    def log_params(self, config: NestedValues) -> None:
        """Record the leaves as params (`train.lr`) and all of it as the artifact `config.yaml`.

        MLflow's params never change: a resumed run keeps the first values, and `config.yaml` has the latest.
        """
        from mlflow.entities import Param

        try:
            known = self._client.get_run(self._run_id).data.params
            leaves = ((key[:_MAX_KEY_LENGTH], str(value)[:_MAX_PARAM_LENGTH]) for key, value in flat_fields(config))
            new = [Param(key, value) for key, value in leaves if key not in known]
            for start in range(0, len(new), _MAX_PARAMS_PER_CALL):
                self._client.log_batch(self._run_id, params=new[start : start + _MAX_PARAMS_PER_CALL])
        finally:
            self._client.log_dict(self._run_id, json.loads(json.dumps(config, default=str)), "config.yaml")

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        """MLflow's databases ignore a point that they have (with its time), so a call of unknown outcome can be repeated."""
        from mlflow.entities import Metric

        metrics = []
        for point in points:
            named = {f"system/{name}" if point.is_system else name: value for name, value in point.metrics.items()}
            named |= {f"{_OVERVIEW}/{name.rpartition('/')[2]}": named[name] for name in _MAIN_METRICS if name in named}
            metrics += [Metric(name, value, int(1000 * point.time), point.step) for name, value in named.items()]
        for start in range(0, len(metrics), _MAX_METRICS_PER_CALL):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _MAX_METRICS_PER_CALL])

    def log_bytes(self, data: bytes, path: str) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            self._client.log_artifacts(self._run_id, scratch)
        if preview := preview_of(path):
            name, step = preview
            self._log_image(data, f"{_OVERVIEW}/{name}", step)

    def _log_image(self, data: bytes, key: str, step: int) -> None:
        """Log an image for the slider over the steps that MLflow's charts have, unless an earlier call did."""
        # `log_image` names a file by its key, its step, the time and a random number, with separators that depend on the store.
        stored = re.compile(rf"images/{re.escape(key).replace('/', '.')}.step.{step}\D.*")
        if not any(stored.fullmatch(file.path) for file in self._client.list_artifacts(self._run_id, "images")):
            self._client.log_image(self._run_id, Image.open(io.BytesIO(data)), key=key, step=step)

    def log_folder(self, folder: str, path: str) -> None:
        self._client.log_artifacts(self._run_id, folder, path)

    def log_model(self, folder: str, package: ModelPackage) -> None:
        """Store an MLflow model named `model` with the run's latest metrics: a signature, an input example and no pickle.

        Only through the client: MLflow's `log_model` works on the current store and run of the process.
        """
        from mlflow.entities import LoggedModelOutput, Metric

        run = self._client.get_run(self._run_id)
        model = self._client.create_logged_model(run.info.experiment_id, "model", source_run_id=self._run_id, model_type="pyfunc")
        status = "FAILED"
        try:
            with tempfile.TemporaryDirectory(prefix="model_") as scratch:
                _save_model(f"{scratch}/saved", folder, package, model, self._run_id)
                with _environment("MLFLOW_HTTP_REQUEST_TIMEOUT", _UPLOAD_TIMEOUT):
                    self._client.log_model_artifacts(model.model_id, f"{scratch}/saved")
            status = "READY"
        finally:
            self._client.finalize_logged_model(model.model_id, status)
        latest = [metric for metric in run.data.to_proto().metrics if not metric.key.startswith("system/")]
        step = max((metric.step for metric in latest), default=0)
        self._client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step)])
        metrics = [Metric(m.key, m.value, m.timestamp, m.step, model_id=model.model_id) for m in latest if m.step == step]
        self._client.log_batch(self._run_id, metrics=metrics[:_MAX_METRICS_PER_CALL])
        if self._config.registered_model:
            own_tags = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
            self.register_model(self._config.registered_model, "", self._run_id, own_tags)

    def register_model(self, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        client = self._client
        outputs = client.get_run(run_id).outputs
        models = [client.get_logged_model(output.model_id) for output in outputs.model_outputs] if outputs else []
        newest = max(models, key=lambda model: model.creation_timestamp, default=None)
        source = f"models:/{newest.model_id}" if newest else source
        try:
            client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            client.create_registered_model(name)
        versions = client.search_model_versions(f"name='{name}' and run_id='{run_id}'")  # few: a search returns a single page
        version = next((v.version for v in versions if v.source == source), None)
        if version is None:
            with _environment("MLFLOW_TRACKING_URI", client.tracking_uri):  # where MLflow resolves models:/
                client.create_model_version(name, source, run_id, tags=dict(tags), model_id=newest.model_id if newest else None)
            return
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)

    def end(self, status: RunStatus) -> None:
        self._client.set_terminated(self._run_id, status)

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            run_tags = [RunTag(name[:_MAX_KEY_LENGTH], value[:_MAX_TAG_LENGTH]) for name, value in tags.items()]
            self._client.log_batch(run_id, tags=run_tags)


def _save_model(path: str, export: str, package: ModelPackage, model: Any, run_id: str) -> None:
    """Save the exported model in `export` (local or s3://) as the MLflow model `model` in the local folder `path`."""
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec

    params = [
        ParamSpec(name, "string", default, shape=(-1,))
        if isinstance(default, list)
        else ParamSpec(name, _TYPES[type(default)], default)
        for name, default in package.params.items()
    ]
    with tempfile.TemporaryDirectory(prefix="export_") as scratch:
        if "://" in export:
            storage.get_folder(export, Path(scratch))
            export = scratch
        mlflow.pyfunc.save_model(
            path,
            python_model=package.entry,  # a file: an object would be pickled
            code_paths=list(package.code),
            artifacts={"model": export},
            signature=ModelSignature(_schema(package.columns), _schema(package.results), ParamSchema(params)),
            input_example=(pd.DataFrame(package.example), dict(package.example_params)) if package.example else None,
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in package.requirements],
            mlflow_model=Model(
                artifact_path=model.artifact_location, run_id=run_id, model_uuid=model.model_id, model_id=model.model_id
            ),
        )


def _schema(columns: Columns) -> Any:
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    types = {name: Array(DataType[of[0]]) if isinstance(of, list) else DataType[of] for name, of in columns.items()}
    return Schema([ColSpec(of, name, required=False) for name, of in types.items()])


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within the block; MLflow reads its settings at every use."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def read_history(uri: str, run_id: str, prefix: str) -> list[tuple[int, str, float]]:
    """Return the step, name and value of all metrics of a run whose names start with `prefix`, in the order of their writing."""
    client = open_client(uri)
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith(prefix)]
    metrics = [metric for name in names for metric in client.get_metric_history(run_id, name)]
    return [(metric.step, metric.key, metric.value) for metric in sorted(metrics, key=lambda metric: metric.timestamp)]


def run_page(record: RunRecord, port: int = _PORT) -> str:
    """Return the URL of the run's curves, on its server or on the one that `ui_command` starts. Raises MLflow's errors.

    Without `workflowType`, MLflow's pages are those of language model traces.
    """
    uri, run_id = record["tracking_uri"], record["run_id"]
    server = uri.rstrip("/") if uri.startswith(("http://", "https://")) else f"http://127.0.0.1:{port}"
    experiment = open_client(uri).get_run(run_id).info.experiment_id
    return f"{server}/#/experiments/{experiment}/runs/{run_id}/model-metrics?workflowType=machine_learning"


def ui_command(uri: str, port: int = _PORT) -> str:
    """Return the command that starts MLflow's pages for the store at `uri`, or opens those of a server."""
    if uri.startswith(("http://", "https://")):
        return shlex.join((sys.executable, "-m", "webbrowser", uri))
    # One reader needs neither four servers nor MLflow's job runners, which take seconds to start and to end.
    settings = ("env", "MLFLOW_DISABLE_TELEMETRY=true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false")
    server = (sys.executable, "-m", "mlflow", "ui", "--workers", "1")
    return shlex.join((*settings, *server, "--backend-store-uri", uri, "--port", str(port)))


def open_client(uri: str) -> Any:
    """Return an MLflow client that logs little, gives up in seconds and sends no telemetry."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # after the settings, which MLflow reads when it is imported

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def _open_experiment(client: Any, name: str, uri: str) -> str:
    """Return the id of an experiment, created if need be. Artifacts go next to an SQLite file, or where the server puts them."""
    from sqlalchemy.engine import make_url

    if (experiment := client.get_experiment_by_name(name)) is not None:
        return experiment.experiment_id
    artifacts = None
    if uri.startswith("sqlite"):
        artifacts = (Path(make_url(uri).database or "").absolute().parent / "mlartifacts").as_uri()
    try:
        return client.create_experiment(name, artifact_location=artifacts, tags=_KIND)
    except Exception:
        if (experiment := client.get_experiment_by_name(name)) is None:  # another run may have created it meanwhile
            raise
        return experiment.experiment_id
