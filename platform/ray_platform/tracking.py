"""MLflow, which nothing else imports: what a run was given, how its metrics went, its previews and exported models.

A tracker's failure is a warning, once for each kind of call, and never an error: it must not stop a training.
"""

import contextlib
import json
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_platform.redaction import redacted, redacted_values

logger = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# What servers of all versions accept; the full values are in the run's config.yaml.
_MAX_PARAM_LENGTH = 500
_MAX_KEY_LENGTH = 250
_MAX_PARAMS_A_CALL = 100
_PARENT_TAG = "mlflow.parentRunId"
# A server that hangs must not fill the memory with calls that wait: those beyond are dropped.
_MAX_WAITING_CALLS = 1000
_LATEST_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go.

    Attributes:
        uri: an MLflow server or `sqlite:////absolute/path.db`; empty: `mlflow.db` in the run's output folder.
        experiment: the MLflow experiment.
        run_name: the run's name; empty: MLflow invents one.
        parent_run_id: the MLflow run of the same store that shows this one below itself; empty: none.
    """

    uri: str = ""
    experiment: str = "diffdis"
    run_name: str = ""
    parent_run_id: str = ""


def tracking_uri(config: TrackingConfig, output: str) -> str:
    """The store that a run with this output folder writes to.

    Raises:
        ValueError: `config.uri` is empty and `output` is no folder of this machine.
    """
    if config.uri:
        return config.uri
    if "://" in output:
        raise ValueError(f"MLflow's database cannot live in {output}: set tracking.uri to a server or a sqlite:/// path")
    return f"sqlite:///{Path(output).absolute() / 'mlflow.db'}"


def metric_history(uri: str, run_id: str, prefix: str) -> dict[int, dict[str, float]]:
    """What a run logged under names that begin with `prefix`, by step; empty where its store does not answer.

    Of a metric that was logged twice at a step (a resumed run does that), the later value.
    """
    found: dict[int, dict[str, float]] = {}
    try:
        client = _client(uri)
        for name in client.get_run(run_id).data.metrics:
            if name.startswith(prefix):
                for metric in sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp):
                    found.setdefault(metric.step, {})[name] = metric.value
    except Exception as error:
        logger.warning("tracking: the metrics of run %s cannot be read: %s", run_id, redacted(str(error)))
    return dict(sorted(found.items()))


def ui_command(uri: str, port: int = 5000) -> str:
    """The one command that opens MLflow's pages over the store at `uri`."""
    if uri.startswith(("http://", "https://")):
        return shlex.join((sys.executable, "-m", "webbrowser", uri))
    # One reader needs neither four servers nor MLflow's job runners, which take seconds to start and to end.
    settings = ("env", "MLFLOW_DISABLE_TELEMETRY=true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false")
    server = (sys.executable, "-m", "mlflow", "ui", "--workers", "1")
    return shlex.join((*settings, *server, "--backend-store-uri", uri, "--port", str(port)))


class Tracker:
    """One writer of one MLflow run. No method raises; without a store they all do nothing."""

    def __init__(self, config: TrackingConfig, output: str, run_id: str = "") -> None:
        """Start a run, or go on with `run_id` where the store knows it."""
        self._run_id = ""
        self._warned: set[str] = set()
        self._latest: tuple[int, dict[str, float]] = (-1, {})
        self._client: Any = None
        with self._tolerated("start"):
            uri = tracking_uri(config, output)
            client = _client(uri)
            self._run_id = self._open_run(client, config, uri, run_id)
            self._client = client  # only now: a tracker without a run has nothing to write to

    def run_id(self) -> str:
        """The MLflow run, to be kept with checkpoints; empty where there is none."""
        return self._run_id

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
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            batch = [Metric(name, number, now, step) for name, number in numbers.items()]
            self._client.log_batch(self._run_id, metrics=batch)

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

    def register_model(self, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> None:
        """Register what `run_id` made as a version of the model `name`; where it is one already, renew its tags.

        `source`: where the model is, such as `runs:/<run_id>/model`.
        """
        if self._client is None:
            return
        with self._tolerated("registry"):
            known = [model for model in self._client.search_registered_models() if model.name == name]
            if not known:
                self._client.create_registered_model(name)
            versions = self._client.search_model_versions(f"name='{name}'") if known else []
            version = next((found.version for found in versions if found.run_id == run_id), None)
            if version is None:
                self._client.create_model_version(name, source, run_id, tags=dict(tags))
                return
            for key, value in tags.items():
                self._client.set_model_version_tag(name, version, key, value)

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
                return run_id
        experiment = _experiment(client, config.experiment, uri)
        tags = {_PARENT_TAG: config.parent_run_id} if config.parent_run_id else {}
        return client.create_run(experiment, run_name=config.run_name or None, tags=tags).info.run_id

    @contextlib.contextmanager
    def _tolerated(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("tracking: %s failed, said once; the run goes on: %s", kind, redacted(str(error)))


# In a process of its own, so that a slow store delays no step.
TrackerActor: Any = ray.remote(num_cpus=0)(Tracker)


class TrackerHandle:
    """What the driver and rank 0 hold of a `TrackerActor`; it can be sent to workers. No method raises.

    The `log_` methods do not wait for the store.
    """

    def __init__(self, actor: Any) -> None:
        """`actor`: the `TrackerActor`, or None for a tracker that does nothing."""
        self._actor = actor
        self._last_call: Any = None
        self._warned: set[str] = set()
        self._latest: tuple[int, dict[str, float]] = (-1, {})

    def run_id(self) -> str:
        """See `Tracker.run_id`. Waits until the run is started."""
        return self._ask("run_id") or ""

    def log_params(self, config: Mapping[str, Any]) -> None:
        """See `Tracker.log_params`."""
        self._send("log_params", config)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker.log_metrics`."""
        self._send("log_metrics", metrics, step)

    def log_bytes(self, data: bytes, path: str) -> None:
        """See `Tracker.log_bytes`."""
        self._send("log_bytes", data, path)

    def log_folder(self, folder: str, path: str) -> None:
        """See `Tracker.log_folder`: the folder is one of the driver's machine, and stays until `end`."""
        self._send("log_folder", folder, path)

    def latest(self) -> tuple[int, dict[str, float]]:
        """See `Tracker.latest`. While the store is slow, what was known before."""
        with self._tolerated():
            if self._actor is not None:
                call = self._actor.latest.remote()
                if ray.wait([call], timeout=_LATEST_TIMEOUT_S)[0]:
                    self._latest = ray.get(call)
        return self._latest

    def end(self, status: RunStatus) -> None:
        """Mark the run as over, once everything that this process sent is written."""
        self._ask("end", status)

    def _send(self, method: str, *arguments: Any) -> None:
        # The call before is looked at, not waited for: that is how a dead actor is noticed.
        with self._tolerated():
            if self._last_call is not None and ray.wait([self._last_call], timeout=0)[0]:
                ray.get(self._last_call)
        with self._tolerated():
            if self._actor is not None:
                self._last_call = getattr(self._actor, method).remote(*arguments)

    def _ask(self, method: str, *arguments: Any) -> Any:
        with self._tolerated():
            if self._actor is not None:
                return ray.get(getattr(self._actor, method).remote(*arguments), timeout=_ANSWER_TIMEOUT_S)
        return None

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            kind = type(error).__name__
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("tracking: the tracker takes no calls, said once; the run goes on: %s", redacted(str(error)))

    def __getstate__(self) -> dict[str, Any]:
        """A reference to a call belongs to the process that made it."""
        return self.__dict__ | {"_last_call": None}


def start_tracker(config: TrackingConfig, output: str, run_id: str = "") -> TrackerHandle:
    """Start the run's one writer beside the driver, whose files it writes; to be called by the driver.

    Args:
        config: where to.
        output: the run's output folder.
        run_id: the MLflow run to go on with, after a resume.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    try:
        options = TrackerActor.options(scheduling_strategy=here, max_pending_calls=_MAX_WAITING_CALLS)
        return TrackerHandle(options.remote(config, output, run_id))
    except Exception as error:
        logger.warning("tracking: no tracker could be started; the run goes on without: %s", redacted(str(error)))
        return TrackerHandle(None)


def _client(uri: str) -> Any:
    """An MLflow client that is quiet, gives up in seconds, and tells nobody that it was used. MLflow reads these late."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient  # a second, which only the process that writes should spend

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def _experiment(client: Any, name: str, uri: str) -> str:
    """The id of an experiment, made where it is missing. Artifacts go beside an SQLite file, else where the server says."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    artifacts = None
    if uri.startswith("sqlite:///"):
        artifacts = str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts")
    try:
        return client.create_experiment(name, artifact_location=artifacts)
    except Exception:
        found = client.get_experiment_by_name(name)  # another run was faster
        if found is None:
            raise
        return found.experiment_id


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
