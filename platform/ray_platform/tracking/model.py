"""An exported folder -> a model of MLflow's: with a signature, an input example, and no pickle in it."""

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_platform import storage
from ray_platform.tracking.records import ModelPackage

_UPLOAD_TIMEOUT = "600"  # seconds until a server has put a large file away: metrics need an answer sooner
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_TYPES = {str: "string", int: "long", float: "double", bool: "boolean"}


def log_model(client: Any, run_id: str, name: str, folder: str, package: ModelPackage, step: int) -> str:
    """Store what `folder` (of this machine, or s3://) holds as a model that `run_id` made at `step`; returns the model's id.

    By the client alone: MLflow's own `log_model` works on the process's current store and run.
    """
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    experiment = client.get_run(run_id).info.experiment_id
    made = client.create_logged_model(experiment, name, source_run_id=run_id, model_type="pyfunc")
    status = "FAILED"
    try:
        with tempfile.TemporaryDirectory(prefix="model_") as scratch, _patience():
            exported, saved = folder, f"{scratch}/saved"
            if "://" in folder:
                exported = f"{scratch}/export"
                storage.get_folder(folder, Path(exported))
            mlflow.pyfunc.save_model(
                saved,
                python_model=package.entry,  # a file: an object would be pickled
                code_paths=list(package.code),
                artifacts={"model": exported},
                signature=_signature(package),
                input_example=_example(package),
                pip_requirements=[f"{of}=={importlib.metadata.version(of)}" for of in package.requirements],
                mlflow_model=Model(
                    artifact_path=made.artifact_location, run_id=run_id, model_uuid=made.model_id, model_id=made.model_id
                ),
            )
            client.log_model_artifacts(made.model_id, saved)
        status = "READY"
    finally:
        client.finalize_logged_model(made.model_id, status)
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step)])
    return made.model_id


def latest_model(client: Any, run_id: str) -> str:
    """The id of the model that a run logged last; empty where it logged none."""
    outputs = client.get_run(run_id).outputs
    models = outputs.model_outputs if outputs else []
    return max(models, key=lambda model: model.step).model_id if models else ""


def _signature(package: ModelPackage) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec

    params = [
        ParamSpec(name, "string", default, shape=(-1,))
        if isinstance(default, list)
        else ParamSpec(name, _TYPES[type(default)], default)
        for name, default in package.params.items()
    ]
    return ModelSignature(_schema(package.columns), _schema(package.results), ParamSchema(params))


def _schema(columns: Any) -> Any:
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    types = {n: Array(DataType[of[0]]) if isinstance(of, list) else DataType[of] for n, of in columns.items()}
    return Schema([ColSpec(of, name, required=False) for name, of in types.items()])


def _example(package: ModelPackage) -> Any:
    import pandas as pd

    return (pd.DataFrame(package.example), dict(package.example_params)) if package.example else None


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """MLflow reads its time limit at every request."""
    before = os.environ.get(_TIMEOUT)
    os.environ[_TIMEOUT] = _UPLOAD_TIMEOUT
    try:
        yield
    finally:
        os.environ.pop(_TIMEOUT)
        if before is not None:
            os.environ[_TIMEOUT] = before
