"""Open a tracked run: `start_run` is the one way, for a training, an evaluation, a sweep or a comparison."""

import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import ray

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, one_line
from ray_platform.formats import FileFormat
from ray_platform.json_values import JsonObject
from ray_platform.placement import log_restart, start_on_this_node
from ray_platform.redaction import is_redacted, redacted, redacted_values
from ray_platform.retry import RETRY_SECONDS
from ray_platform.tracking.config import RUN_RECORD, RUN_RECORD_FORMAT, RunRecord, TrackingConfig, read_run_record, tracking_uri
from ray_platform.tracking.delivery import ARTIFACTS, Delivery, DeliveryState, config_of
from ray_platform.tracking.journal import JOURNAL_FORMAT, Journal
from ray_platform.tracking.tracker import ModelPackage, NestedValues, RunMetadata, RunStatus, TrackedData, Tracker

logger = logging.getLogger(__name__)

_DELIVERED = "metrics.delivered.json"  # in output_dir: a `DeliveryState` for every tracker
_STATE_FORMAT = FileFormat("record of delivered metrics")
_ANSWER_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 4000.0  # longer than a tracker may take
_FLUSH_TIMEOUT_S = 60.0  # for the calls of a process that ends, while the writer's process is restarted


@contextlib.contextmanager
def start_run(
    config: TrackingConfig,
    output_dir: str,
    metadata: RunMetadata | None = None,
    *,
    run_id: str = "",
    resume: bool = False,
    record: bool = False,
    in_actor: bool = False,
) -> Iterator["TrackedRun"]:
    """Open a tracked run; it ends as FINISHED, or as FAILED if the block raises. The tracker's methods never raise.

    Everything is written to the journal in `output_dir` first. Trackers receive it from there as soon as they answer, with
    what earlier runs in this folder could not deliver.

    Args:
        config: which trackers receive the run, and where.
        output_dir: the job's output folder, local or s3://.
        metadata: description of the run; None: only add to an existing run.
        run_id: the run to continue; empty: see `resume`.
        resume: continue the run of `output_dir`, if it has one; otherwise start a new one.
        record: write `mlflow.json` to `output_dir`, from which a resumed job continues in the same run.
        in_actor: write from an actor on this node, so that slow storage does not delay training steps. The tracker can then be
            sent to workers.

    Raises:
        DataError: `mlflow.json` cannot be read or written.
    """
    if metadata:
        config = replace(config, run_name=config.run_name or metadata.name)
    config = replace(config, tags=_redacted_tags(config.tags))
    known = read_run_record(output_dir) if resume else None
    run_id = run_id or (known["run_id"] if known else "")
    if not config.services:
        run_id = run_id or uuid.uuid4().hex
    if record:
        write_run_record(config, output_dir, run_id)
    writer = ActorWriter(config, output_dir, record) if in_actor else RunWriter(config, output_dir, record)
    tracker = TrackedRun(writer, run_id)
    tracker.start(config, continues=resume)
    status: RunStatus = "FAILED"
    try:
        if metadata:
            tracker.log_params(metadata.params)
            tracker.describe(metadata.description, metadata.tags)
            tracker.log_data(metadata.data)
        yield tracker
        status = "FINISHED"
    finally:
        tracker.end(status)


def write_run_record(config: TrackingConfig, output_dir: str, run_id: str) -> None:
    """Write `mlflow.json`. Raises StorageError."""
    record = RunRecord(tracking_uri=tracking_uri(config, output_dir), experiment=config.experiment, run_id=run_id)
    content = RUN_RECORD_FORMAT.stamp(redacted_values(record))
    storage.write_bytes(storage.join(output_dir, RUN_RECORD), json.dumps(content, indent=2).encode())


def run_record(config: TrackingConfig, output_dir: str, tracker: Tracker) -> RunRecord:
    """Return the address of the run that `tracker` writes."""
    return RunRecord(tracking_uri=tracking_uri(config, output_dir), experiment=config.experiment, run_id=tracker.run_id())


def metric_history(uri: str, run_id: str, prefix: str, output_dir: str) -> dict[int, dict[str, float]]:
    """Return the metrics of a run whose names start with `prefix`, by step; empty if they cannot be read.

    They are read from MLflow's store at `uri` unless it is empty, and from the journal in `output_dir`, which also has those that
    MLflow has not received yet. Of a metric that was logged twice at a step (a resumed run does that), the later value counts.
    """
    points: list[tuple[int, str, float]] = []
    try:
        if uri and run_id:
            from ray_platform.tracking.mlflow_tracker import read_history  # its import takes a second

            points = read_history(uri, run_id, prefix)
    except Exception as error:
        logger.warning("tracking: the metrics of run %s cannot be read from MLflow: %s", run_id, one_line(error))
    try:
        lines = [entry for entry, _ in Journal(output_dir).entries() if "metrics" in entry]
        points += [(line["step"], name, value) for line in lines for name, value in line["metrics"].items()]
    except storage.StorageError as error:
        logger.warning("tracking: the journal of run %s cannot be read: %s", run_id, error)
    history: dict[int, dict[str, float]] = {}
    for step, name, value in sorted(points, key=lambda point: point[0]):
        if name.startswith(prefix):
            history.setdefault(step, {})[name] = value
    return history


def deliver_journal(output_dir: str, uri: str = "") -> list[str]:
    """Deliver what the trackers of an output folder have not received. Return a line for each that does not answer.

    Args:
        output_dir: the output folder of a run that is not active.
        uri: replaces the run's own tracking URI.

    Raises:
        DataError: the folder has no run.
        ConfigError: the run's tracking URI contains a secret, which was not saved.
    """
    headers = [entry["run"] for entry, _ in Journal(output_dir).entries() if "run" in entry]
    if not headers:
        raise DataError(f"{output_dir}: has no run with a journal; give the output folder of a run")
    config = config_of(headers[-1])
    if is_redacted(uri or config.uri):
        raise ConfigError(f"--uri: a secret in it was not saved ({config.uri}); give the complete URI")
    has_record = storage.exists(storage.join(output_dir, RUN_RECORD))
    return RunWriter(replace(config, uri=uri or config.uri), output_dir, has_record).end()


# --- writer --------------------------------------------------------------------------------------------------------------


class RunWriter:
    """Writes the journal of a run, and has threads that deliver it to the trackers. The only writer of its output folder."""

    def __init__(self, config: TrackingConfig, output_dir: str, record: bool) -> None:
        """`record`: write the id of the run to `mlflow.json` when the first tracker has one."""
        self._config, self._output_dir, self._record = config, output_dir, record
        self._state_url, self._recorded, self._lock = storage.join(output_dir, _DELIVERED), "", threading.Lock()
        with storage.retrying_for(RETRY_SECONDS):
            self._journal = Journal(output_dir)
            self._states = {name: self._saved_state(name) for name in config.services}
        self._deliveries = [
            Delivery(name, config, output_dir, self._journal, state, self._save) for name, state in self._states.items()
        ]
        log_restart("tracking: the process that writes the run died and was restarted; nothing that was sent to it is lost")

    def append(self, entry: JsonObject, data: bytes | None = None) -> None:
        """Write an entry to the journal. `data`: the content of its artifact."""
        if data is not None:
            try:
                storage.write_bytes(storage.join(self._output_dir, ARTIFACTS, entry["artifact"]), data)
            except storage.StorageError as error:
                logger.warning("tracking: an artifact is lost: %s", error)
                return
        self._journal.append(entry)
        for delivery in self._deliveries:
            delivery.notify()

    def run_id(self) -> str:
        """Return the id of the run in MLflow, or else at the first tracker that has one; empty if it has not answered."""
        for delivery in self._deliveries:
            delivery.wait_for_run()
        return self._known_run_id()

    def _known_run_id(self) -> str:
        if "mlflow" in self._states:
            return self._states["mlflow"].run_id
        return next((state.run_id for state in self._states.values() if state.run_id), "")

    def end(self) -> list[str]:
        """Wait until the trackers have received everything. Return a line for each that has not."""
        self._journal.flush()
        problems = {delivery.backend: problem for delivery in self._deliveries if (problem := delivery.finish())}
        with contextlib.suppress(storage.StorageError):
            self._save()
        return [
            f"{name} has not received the end of the run; {self._journal.url} has everything; deliver it with --resume auto, "
            f"or with `diffdis deliver --output_dir {self._output_dir}`: {problem}"
            for name, problem in problems.items()
        ]

    def _saved_state(self, backend: str) -> DeliveryState:
        try:
            saved = storage.read_json(self._state_url) if storage.exists(self._state_url) else {}
            _STATE_FORMAT.check_version(saved, self._state_url)
        except (DataError, ValueError) as error:
            logger.warning("%s; everything is delivered again", error)
            saved = {}
        names = [item.name for item in fields(DeliveryState)]
        return DeliveryState(**_STATE_FORMAT.read(saved.get(backend, {}), names, self._state_url))

    def _save(self) -> None:
        """Save how far every tracker has got. Called by the threads of deliveries."""
        with self._lock, storage.retrying_for(0):
            states = {name: asdict(state) for name, state in self._states.items()}
            storage.write_bytes(self._state_url, json.dumps(_STATE_FORMAT.stamp(states), indent=1).encode())
            run_id = self._known_run_id()
            if self._record and run_id and run_id != self._recorded:
                write_run_record(self._config, self._output_dir, run_id)
                self._recorded = run_id


class ActorWriter:
    """Handle of the driver and of rank 0 to a `RunWriter` in an actor on the driver's node, whose process Ray restarts."""

    def __init__(self, config: TrackingConfig, output_dir: str, record: bool) -> None:
        self._actor = start_on_this_node(RunWriter, config, output_dir, record)
        self._calls: list[Any] = []  # without an answer: Ray sends them again to a process that was restarted
        self._is_warned = False

    def append(self, entry: JsonObject, data: bytes | None = None) -> None:
        """Send an entry to the writer. Does not wait for it."""
        try:
            self._calls.append(self._actor.append.remote(entry, data))
            done, self._calls = ray.wait(self._calls, num_returns=len(self._calls), timeout=0)
            ray.get(done)
        except Exception as error:
            self._warn(error)

    def flush(self) -> None:
        """Wait until the writer has what this process has sent, which is lost with this process otherwise."""
        if self._calls:
            ray.wait(self._calls, num_returns=len(self._calls), timeout=_FLUSH_TIMEOUT_S)

    def run_id(self) -> str:
        try:
            return ray.get(self._actor.run_id.remote(), timeout=_ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            self._warn(error)
            return ""

    def end(self) -> list[str]:
        try:
            return ray.get(self._actor.end.remote(), timeout=_END_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            return [f"the process that writes the run does not answer ({one_line(error, max_length=200)})"]

    def _warn(self, error: Exception) -> None:
        if not self._is_warned:
            self._is_warned = True
            logger.warning("tracking: the process that writes the run failed (logged once): %s", one_line(error, max_length=300))

    def __getstate__(self) -> object:
        """A reference to a call belongs to the process that made it."""
        return self.__dict__ | {"_calls": []}


class TrackedRun(Tracker):
    """A run that is being tracked. No method raises, and no argument reaches the journal or a tracker with a secret in it.

    No method waits for a tracker, except `run_id` and `end`.
    """

    def __init__(self, writer: RunWriter | ActorWriter, run_id: str) -> None:
        """`run_id`: the id of a run that is continued, or that no tracker gives an id."""
        self._writer, self._run_id, self._warned = writer, run_id, set[str]()

    def start(self, config: TrackingConfig, continues: bool) -> None:
        """Begin the run in the journal. `continues`: without a known id it is the one with which the folder's journal ends."""
        tracking = asdict(config) | {"uri": redacted(config.uri)}
        self._append(run=JOURNAL_FORMAT.stamp({"run_id": self._run_id, "continues": continues, "tracking": tracking}))
        self.flush()  # calls of other processes can overtake this one, and what precedes it in the journal belongs to no run

    def run_id(self) -> str:
        """Return the run's id; empty as long as no tracker has answered."""
        return self._writer.run_id() or self._run_id

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        self._append(description=redacted(description), tags=_redacted_tags(tags))

    def log_params(self, config: NestedValues) -> None:
        self._append(params=redacted_values(config))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Values that are not numbers are left out."""
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError):
                if name not in self._warned:
                    self._warned.add(name)
                    logger.warning("tracking: metric %s is not a number in step %d (logged once)", name, step)
        self._append(step=step, metrics=numbers)

    def log_system(self, metrics: Mapping[str, float]) -> None:
        self._append(system=dict(metrics))

    def log_data(self, data: Sequence[TrackedData]) -> None:
        self._append(data=[asdict(replace(part, url=redacted(part.url))) for part in data])

    def log_bytes(self, data: bytes, path: str) -> None:
        self._append(data, artifact=path)

    def log_folder(self, folder: str, path: str) -> None:
        self._append(folder=folder, path=path)

    def log_model(self, folder: str, package: ModelPackage) -> None:
        self._append(model=folder, package=asdict(package))

    def register_model(self, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> None:
        self._append(registered_model=name, source=source, run_id=run_id, tags=_redacted_tags(tags))

    def flush(self) -> None:
        """Wait until what this process logged is in the journal, or cannot be written now."""
        if isinstance(self._writer, ActorWriter):
            self._writer.flush()

    def end(self, status: RunStatus) -> None:
        """End the run, and wait until the trackers have received it, as far as they answer."""
        self._append(status=status)
        for line in self._writer.end():
            logger.warning("tracking: %s", line)

    def _append(self, content: bytes | None = None, **values: Any) -> None:
        self._writer.append({"time": time.time()} | values, content)


def _redacted_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: redacted(str(value)) for name, value in tags.items()}
