"""Where a run is tracked, and what can be read there."""

import logging
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_platform.redaction import redacted

logger = logging.getLogger(__name__)

_KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages then show what a training has, and no chats


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go, and how the run is called there.

    Attributes:
        uri: an MLflow server or `sqlite:////absolute/path.db`; empty: `mlflow.db` in the run's output folder.
        experiment: the MLflow experiment.
        run_name: the run's name; empty: the recipe, when it began, and its seed.
        parent_run_id: the MLflow run of the same store that shows this one below itself; empty: none.
        tags: tags of your own, such as '{"team": "vision"}'.
        log_model: store the exported model there too, so that MLflow can load and serve it.
        registered_model: the registered model of which the run's model becomes a version; empty: none.
        system_metrics_seconds: between two looks at the CPUs, memory, disks, network and GPUs of every node; 0: none.
    """

    uri: str = ""
    experiment: str = "diffdis"
    run_name: str = ""
    parent_run_id: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    log_model: bool = True
    registered_model: str = ""
    system_metrics_seconds: float = 10.0


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
        client = open_client(uri)
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


def open_client(uri: str) -> Any:
    """An MLflow client that is quiet, gives up in seconds, and tells nobody that it was used. MLflow reads these late."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient  # a second, which only the process that writes should spend

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def open_experiment(client: Any, name: str, uri: str) -> str:
    """The id of an experiment, made where it is missing. Artifacts go beside an SQLite file, else where the server says."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    artifacts = None
    if uri.startswith("sqlite:///"):
        artifacts = str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts")
    try:
        return client.create_experiment(name, artifact_location=artifacts, tags=_KIND)
    except Exception:
        found = client.get_experiment_by_name(name)  # another run was faster
        if found is None:
            raise
        return found.experiment_id
