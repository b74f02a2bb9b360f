"""The interface of trackers, and the records that a run passes to them. docs/extending.md shows how to add a tracker."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ray_platform.tracking.config import TrackingConfig

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
NestedValues = Mapping[str, Any]  # a configuration: numbers, texts, lists and further mappings by field
Columns = Mapping[str, str | list[str]]  # one of MLflow's types (`string`, `binary`, `double`) per column; in a list: an array


@dataclass(frozen=True)
class TrackedData:
    """A dataset that a run reads."""

    name: str
    digest: str  # changes when the samples do
    url: str
    context: str  # training, heldout or evaluation
    counts: Mapping[str, int] = field(default_factory=dict)  # num_samples, num_bytes, …: those that are known


@dataclass(frozen=True)
class MetricPoint:
    """Metrics of one moment."""

    time: float  # seconds since 1970
    step: int  # of the training; of `is_system` the age of the run in seconds
    metrics: Mapping[str, float]
    is_system: bool = False  # the load of a node


@dataclass(frozen=True)
class ModelPackage:
    """How an exported model becomes a model that MLflow loads where this project is not installed."""

    entry: str  # a Python file that calls mlflow.models.set_model with a PythonModel; its artifact `model` is the exported folder
    code: tuple[str, ...]  # folders of packages to store with the model
    requirements: tuple[str, ...]  # PyPI names of the packages to install
    columns: Columns  # of the input; each is optional
    results: Columns  # of the output
    params: NestedValues  # name -> default; lists contain strings
    example: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # an input, by column
    example_params: NestedValues = field(default_factory=dict)


@dataclass(frozen=True)
class RunMetadata:
    """Name and description of a new run, for the users who look for it in the tracker."""

    name: str  # used if `tracking.run_name` is empty
    description: str  # Markdown
    tags: Mapping[str, str]
    params: NestedValues  # the resolved configuration
    data: Sequence[TrackedData] = ()


_PREVIEW = re.compile(r"([\w-]+)/step_(\d+)\.png")


def preview_of(path: str) -> tuple[str, int] | None:
    """Return name and step of an artifact that shows a step: `previews/step_000100.png` -> previews, 100. None for others."""
    match = _PREVIEW.fullmatch(path)
    return (match[1], int(match[2])) if match else None


class Tracker(Protocol):
    """Writer of one run.

    A class that inherits from it implements only the methods that its service supports; the others do nothing. They are called in
    a thread that may wait, with arguments without secrets. When a method raises, the run is opened again and the call is repeated
    until the service answers. A call that fails ten times, or with a ValueError or TypeError, is skipped with a warning. After
    the process was killed, the calls of the last seconds may be repeated.
    """

    def __init__(self, config: TrackingConfig, output_dir: str, run_id: str) -> None:
        """Open the run, or continue `run_id`. May raise any exception if the service does not answer."""

    @classmethod
    def check(cls, config: TrackingConfig, output_dir: str) -> None:
        """Raise ConfigError for settings with which the tracker cannot work. Called before a run starts; asks no service."""
        return

    def run_id(self) -> str:
        """Return the id under which the run can be continued; empty if the tracker has none."""
        return ""

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        """Set tags, and the description (Markdown) unless the run already has one: a user may have written a better one."""

    def log_params(self, config: NestedValues) -> None:
        """Record a nested configuration."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics at a step. NaN and infinities are recorded as well."""

    def log_system(self, metrics: Mapping[str, float]) -> None:
        """Record the load of a node, such as `node_0/cpu_utilization_percentage`."""

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        """Record metrics of several moments, in their order. Override it if your service takes times or many points at once."""
        for point in points:
            if point.is_system:
                self.log_system(point.metrics)
            else:
                self.log_metrics(point.metrics, point.step)

    def log_data(self, data: Sequence[TrackedData]) -> None:
        """Record the datasets that the run reads, each once."""

    def log_bytes(self, data: bytes, path: str) -> None:
        """Store `data` as the artifact `path`, such as `previews/step_000100.png`."""

    def log_folder(self, folder: str, path: str) -> None:
        """Store the content of `folder`, a local folder, as artifacts below `path`."""

    def log_model(self, folder: str, package: ModelPackage) -> None:
        """Store the exported model in `folder` (local or s3://), and register it if that is configured."""

    def register_model(self, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> None:
        """Register the newest model of the run `run_id` as a version of the model `name`, or renew the tags of that version.

        `source` is the URL of the model for a run that stored none.
        """

    def end(self, status: RunStatus) -> None:
        """Mark the run as ended. It can be continued later."""
