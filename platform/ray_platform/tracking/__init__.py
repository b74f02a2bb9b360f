"""Tracking of runs: parameters, metrics, previews, datasets and models, written to a
journal in the output folder, and from there to MLflow or your own tracker.

`start_run` opens a run. Nothing else in the platform imports MLflow. `runs` is imported on first use: every configuration imports
`TrackingConfig`, and `--help` must not wait for Ray and the storage libraries.
"""

from typing import TYPE_CHECKING, Any

from ray_platform.tracking.config import RUN_RECORD, RunRecord, TrackingConfig, read_run_record, tracking_uri
from ray_platform.tracking.tracker import MetricPoint, ModelPackage, RunMetadata, TrackedData, Tracker

if TYPE_CHECKING:
    from ray_platform.tracking.runs import TrackedRun, metric_history, run_record, start_run

__all__ = ["RUN_RECORD", "MetricPoint", "ModelPackage", "RunMetadata", "RunRecord", "TrackedData", "Tracker", "TrackingConfig"]
__all__ += ["TrackedRun", "metric_history", "read_run_record", "run_record", "start_run", "tracking_uri"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ray_platform.tracking import runs

    return getattr(runs, name)
