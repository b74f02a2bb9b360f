"""What a run hands to its tracker, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataSet:
    """Samples that a run read."""

    name: str
    digest: str  # changes when the samples do
    url: str  # where they are
    context: str  # what for: training, heldout, evaluation
    counts: Mapping[str, int] = field(default_factory=dict)  # num_samples, num_bytes, …: those that are known


@dataclass(frozen=True)
class ModelPackage:
    """How a model that was exported as a folder becomes one that MLflow loads where nothing of ours is installed.

    A column's or result's type is one of MLflow's names (`string`, `binary`, `double`), in a list for an array.
    """

    entry: str  # a file of Python whose mlflow.models.set_model gets a PythonModel; its artifact `model` is the folder
    code: tuple[str, ...]  # folders of packages to carry along
    requirements: tuple[str, ...]  # what has to be installed, by the names of PyPI
    columns: Mapping[str, Any]  # of the input; each may be missing
    results: Mapping[str, Any]  # of the output
    params: Mapping[str, Any]  # name -> default; lists are of strings
    example: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # an input, by column
    example_params: Mapping[str, Any] = field(default_factory=dict)
