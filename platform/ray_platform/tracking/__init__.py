"""MLflow, which nothing else imports: what a run was given, how its metrics went, its previews, data sets and models.

A tracker's failure is a warning, once for each kind of call, and never an error: it must not stop a training.
"""

from ray_platform.tracking.handle import TrackerHandle, start_tracker
from ray_platform.tracking.records import DataSet, ModelPackage
from ray_platform.tracking.store import TrackingConfig, metric_history, tracking_uri, ui_command
from ray_platform.tracking.tracker import RunStatus, Tracker

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
