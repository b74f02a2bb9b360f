"""The one writer of a run in MLflow: what it was given, how its metrics went, its previews, data sets and models."""

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ray_platform.redaction import redacted, redacted_values
from ray_platform.tracking.model import log_model, register_model
from ray_platform.tracking.records import DataSet, ModelPackage
from ray_platform.tracking.store import TrackingConfig, open_client, open_experiment, tracking_uri

logger = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# What servers of all versions accept; the full values are in the run's config.yaml.
_MAX_PARAM_LENGTH = 500
_MAX_KEY_LENGTH = 250
_MAX_PARAMS_A_CALL = 100
_MAX_TAG_LENGTH = 5000
_PARENT_TAG, _NOTE_TAG, _CONTEXT_TAG = "mlflow.parentRunId", "mlflow.note.content", "mlflow.data.context"


class Tracker:
    """One writer of one MLflow run. No method raises; without a store they all do nothing."""

    def __init__(self, config: TrackingConfig, output: str, run_id: str = "") -> None:
        """Start a run, or go on with `run_id` where the store knows it."""
        self._run_id = ""
        self._warned: set[str] = set()
        self._latest: tuple[int, dict[str, float]] = (-1, {})
        self._config, self._begun = config, time.time()
        self._client: Any = None
        with self._tolerated("start"):
            uri = tracking_uri(config, output)
            client = open_client(uri)
            self._run_id = self._open_run(client, config, uri, run_id)
            self._begun = client.get_run(self._run_id).info.start_time / 1000
            self._client = client  # only now: a tracker without a run has nothing to write to

    def run_id(self) -> str:
        """The MLflow run, to be kept with checkpoints; empty where there is none."""
        return self._run_id

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        """Set tags, and the description (Markdown) where the run has none yet: somebody may have written a better one."""
        if self._client is None:
            return
        with self._tolerated("tags"):
            if description and _NOTE_TAG not in self._client.get_run(self._run_id).data.tags:
                tags = {**tags, _NOTE_TAG: description}
            self._set_tags(self._client, self._run_id, tags)

    def log_data_sets(self, data_sets: Sequence[DataSet]) -> None:
        """Record what the run reads. A data set that it has already is not recorded twice."""
        if self._client is None:
            return
        with self._tolerated("data sets"):
            from mlflow.entities import Dataset, DatasetInput, InputTag

            inputs = []
            for data in data_sets:
                kind = data.url.partition("://")[0] if "://" in data.url else "local"
                source, profile = json.dumps({"uri": redacted(data.url)}), json.dumps(dict(data.counts))
                found = Dataset(data.name, data.digest, kind, source, profile=profile)
                inputs.append(DatasetInput(found, [InputTag(_CONTEXT_TAG, data.context)]))
            self._client.log_inputs(self._run_id, inputs)

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Record a nested config: its leaves as params (`train.lr`), all of it as the artifact `config.yaml`; secrets as ***.

        MLflow's params never change: a resumed run keeps the first values, and `config.yaml` is the latest.
        """
        if self._client is None:
            return
        config = redacted_values(config)
        with self._tolerated("params"):
            from mlflow.entities import Param

            known = self._client.get_run(self._run_id).data.params
            new = [
                Param(key[:_MAX_KEY_LENGTH], str(value)[:_MAX_PARAM_LENGTH])
                for key, value in _flatten(config)
                if key[:_MAX_KEY_LENGTH] not in known
            ]
            for start in range(0, len(new), _MAX_PARAMS_A_CALL):
                self._client.log_batch(self._run_id, params=new[start : start + _MAX_PARAMS_A_CALL])
        with self._tolerated("config"):
            plain = json.loads(json.dumps(config, default=str))
            self._client.log_dict(self._run_id, plain, "config.yaml")

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at a step. NaN and infinities are kept: they are news. What is no number is left out."""
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            with self._tolerated(f"metric {name}"):
                numbers[name] = float(value)
        self._latest = (step, self._latest[1] | numbers if step == self._latest[0] else numbers)
        if self._client is None:
            return
        with self._tolerated("metrics"):
            self._log_batch(numbers, step)

    def log_system(self, metrics: Mapping[str, float]) -> None:
        """Record how busy a machine is, `node_0/cpu_utilization_percentage` say; the step is the run's age in seconds."""
        if self._client is None:
            return
        with self._tolerated("system metrics"):
            self._log_batch({f"system/{name}": value for name, value in metrics.items()}, int(time.time() - self._begun))

    def log_bytes(self, data: bytes, path: str) -> None:
        """Store `data` as the artifact `path`, such as `previews/step_000100.png`."""
        if self._client is None:
            return
        with self._tolerated("artifact"), tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / Path(path).name
            file.write_bytes(data)
            folder = str(Path(path).parent)
            self._client.log_artifact(self._run_id, str(file), None if folder == "." else folder)

    def log_folder(self, folder: str, path: str) -> None:
        """Store what `folder`, one of this machine, holds as artifacts below `path`: an exported model, say."""
        if self._client is None:
            return
        with self._tolerated("folder"):
            self._client.log_artifacts(self._run_id, folder, path)

    def log_model(self, folder: str, package: ModelPackage) -> None:
        """Store what `folder` (of this machine, or s3://) holds as MLflow's model `model`, and register it where that is
        configured. The run's latest metrics are the model's."""
        if self._client is None:
            return
        with self._tolerated("model"):
            step, metrics = self._latest
            made = log_model(self._client, self._run_id, "model", folder, package, max(0, step))
            self._log_batch(metrics, max(0, step), made)
            if self._config.registered_model:
                tags = self._client.get_run(self._run_id).data.tags
                own = {name: value for name, value in tags.items() if not name.startswith("mlflow.")}
                self.register_model(self._config.registered_model, "", self._run_id, own)

    def register_model(self, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> None:
        """Register the model that `run_id` logged last as a version of the model `name`; where it is one already, renew its tags.

        `source`: where the model is, where the run logged none.
        """
        if self._client is None:
            return
        with self._tolerated("registry"):
            register_model(self._client, name, source, run_id, tags)

    def latest(self) -> tuple[int, dict[str, float]]:
        """The step and metrics last logged here; step -1 before there are any."""
        return self._latest

    def end(self, status: RunStatus) -> None:
        """Mark the run as over. It can be gone on with later."""
        if self._client is None:
            return
        with self._tolerated("end"):
            self._client.set_terminated(self._run_id, status)

    def _open_run(self, client: Any, config: TrackingConfig, uri: str, run_id: str) -> str:
        if run_id:
            with self._tolerated(f"going on with run {run_id}"):
                client.update_run(run_id, status="RUNNING")
                self._set_tags(client, run_id, config.tags)
                return run_id
        experiment = open_experiment(client, config.experiment, uri)
        tags = dict(config.tags) | ({_PARENT_TAG: config.parent_run_id} if config.parent_run_id else {})
        return client.create_run(experiment, run_name=config.run_name or None, tags=tags).info.run_id

    def _set_tags(self, client: Any, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            found = [RunTag(name[:_MAX_KEY_LENGTH], redacted(str(v))[:_MAX_TAG_LENGTH]) for name, v in tags.items()]
            client.log_batch(run_id, tags=found)

    def _log_batch(self, metrics: Mapping[str, float], step: int, model_id: str | None = None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(name, number, now, step, model_id=model_id) for name, number in metrics.items()]
        self._client.log_batch(self._run_id, metrics=batch)

    @contextlib.contextmanager
    def _tolerated(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("tracking: %s failed, said once; the run goes on: %s", kind, redacted(str(error)))


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
