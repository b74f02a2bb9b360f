"""Tracked run of a sweep or a comparison, above the runs of its trials or arms."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray_platform import storage
from ray_platform.redaction import redacted_values
from ray_platform.tracking import Tracker, TrackingConfig, run_metadata, tracking_uri
from ray_platform.tracking.code_version import code_version
from ray_platform.train.launch import TRACKED


def open_parent_run(
    tracking: TrackingConfig, output_dir: str, recipe: str, description: str, command: str, params: Mapping[str, Any]
) -> tuple[Tracker, TrackingConfig]:
    """Start the tracked run of an output folder, or continue the one that an earlier call started there.

    Args:
        tracking: store and experiment; an empty run name is replaced by the recipe and the date.
        output_dir: absolute folder or s3:// URL.
        recipe: name of the recipe.
        description: Markdown for the run's page.
        command: command line that started the job, without secrets.
        params: nested parameters of the run.

    Returns:
        The tracker of the run, and the config with which the runs below it are tracked.
    """
    url = storage.join(output_dir, TRACKED)
    run_id = storage.read_json(url)["run_id"] if storage.exists(url) else ""
    tracker = Tracker(replace(tracking, run_name=tracking.run_name or run_metadata.dated(recipe)), output_dir, run_id)
    tracker.describe(run_metadata.with_command(description, command), run_metadata.tags(recipe, output_dir, code_version()))
    tracker.log_params(params)
    uri = tracking_uri(tracking, output_dir)
    tracked = {"tracking_uri": uri, "experiment": tracking.experiment, "run_id": tracker.run_id()}
    storage.write_bytes(url, json.dumps(redacted_values(tracked), indent=2).encode())
    return tracker, TrackingConfig(uri, tracking.experiment, parent_run_id=tracker.run_id())
