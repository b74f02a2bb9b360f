"""Tracking of runs: parameters, metrics, previews, datasets and models, written to MLflow, to JSON lines, or to your own tracker.

`start_run` opens a run. Nothing else in the platform imports MLflow.
"""

from ray_platform.tracking.config import RUN_RECORD, RunRecord, TrackingConfig, read_run_record, tracking_uri
from ray_platform.tracking.runs import metric_history, run_record, start_run
from ray_platform.tracking.tracker import ModelPackage, RunMetadata, TrackedData, Tracker

__all__ = [
    "RUN_RECORD",
    "ModelPackage",
    "RunMetadata",
    "RunRecord",
    "TrackedData",
    "Tracker",
    "TrackingConfig",
    "metric_history",
    "read_run_record",
    "run_record",
    "start_run",
    "tracking_uri",
]
