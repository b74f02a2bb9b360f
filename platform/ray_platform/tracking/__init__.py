"""Experiment tracking with MLflow, which no other package imports: parameters, metrics, previews, data sets and models.

A failure of the tracker is logged as a warning, once for each kind of call, and never stops a training.
The names are imported on first use: configurations import `TrackingConfig`, and `--help` must not wait for Ray and MLflow.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_platform.tracking.handle import TrackerHandle, start_tracker
    from ray_platform.tracking.records import DataSet, ModelPackage
    from ray_platform.tracking.store import TrackingConfig, metric_history, tracking_uri, ui_command
    from ray_platform.tracking.tracker import RunStatus, Tracker

_MODULES = {
    "TrackerHandle": "handle",
    "start_tracker": "handle",
    "DataSet": "records",
    "ModelPackage": "records",
    "TrackingConfig": "store",
    "metric_history": "store",
    "tracking_uri": "store",
    "ui_command": "store",
    "RunStatus": "tracker",
    "Tracker": "tracker",
}
__all__ = [
    "DataSet",
    "ModelPackage",
    "RunStatus",
    "Tracker",
    "TrackerHandle",
    "TrackingConfig",
    "metric_history",
    "start_tracker",
    "tracking_uri",
    "ui_command",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
