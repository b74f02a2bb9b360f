"""Store an exported model as an MLflow model with a signature, an input example and no pickle, and register it."""

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_platform import storage
from ray_platform.tracking.tracker import ModelPackage

_UPLOAD_TIMEOUT = "600"  # seconds for a server to store a large file; the timeout for metrics is shorter
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_TYPES = {str: "string", int: "long", float: "double", bool: "boolean"}


def log_model(client: Any, run_id: str, name: str, folder: str, package: ModelPackage, step: int) -> str:
    """Store the exported model in `folder` (local or s3://) as a model of the run `run_id` at `step`, and return the model's id.

    Only through the client: MLflow's `log_model` works on the current store and run of the process.
    """
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    experiment = client.get_run(run_id).info.experiment_id
    model = client.create_logged_model(experiment, name, source_run_id=run_id, model_type="pyfunc")
    status = "FAILED"
    try:
        with tempfile.TemporaryDirectory(prefix="model_") as scratch, _environment(_TIMEOUT, _UPLOAD_TIMEOUT):
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
                    artifact_path=model.artifact_location, run_id=run_id, model_uuid=model.model_id, model_id=model.model_id
                ),
            )
            client.log_model_artifacts(model.model_id, saved)
        status = "READY"
    finally:
        client.finalize_logged_model(model.model_id, status)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    return model.model_id


def register_model(client: Any, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Register the newest model of the run `run_id`, or the one at `source` if there is none, as a version of the model `name`.

    If it is a version already, its tags are renewed.
    """
    outputs = client.get_run(run_id).outputs
    models = [client.get_logged_model(output.model_id) for output in outputs.model_outputs] if outputs else []
    newest = max(models, key=lambda model: model.creation_timestamp, default=None)
    source = f"models:/{newest.model_id}" if newest else source
    known = [model for model in client.search_registered_models() if model.name == name]
    if not known:
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name='{name}'") if known else []
    version = next((v.version for v in versions if v.run_id == run_id and v.source == source), None)
    if version is None:
        with _environment("MLFLOW_TRACKING_URI", client.tracking_uri):  # where MLflow resolves models:/
            client.create_model_version(name, source, run_id, tags=dict(tags), model_id=newest.model_id if newest else None)
        return
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)


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
