"""Tracked run of a sweep or a comparison, above the runs of its trials or arms."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from ray_platform.tracking import RunMetadata, Tracker, TrackingConfig, read_run_record, start_run, tracking_uri
from ray_platform.tracking.run_metadata import append_command, code_version, dated_name, run_tags


@contextlib.contextmanager
def start_parent_run(
    tracking: TrackingConfig, output_dir: str, recipe: str, description: str, command: str, params: Mapping[str, Any]
) -> Iterator[tuple[Tracker, TrackingConfig]]:
    """Start the tracked run of an output folder, or continue the one that an earlier call started there.

    Args:
        tracking: trackers and store; an empty run name is replaced by the recipe and the date.
        output_dir: absolute folder or s3:// URL.
        recipe: name of the recipe.
        description: Markdown for the run's page.
        command: command line that started the job, without secrets.
        params: nested parameters of the run.

    Yields:
        The tracker of the run, and the config with which the runs below it are tracked.
    """
    tags = run_tags(recipe, output_dir, code_version())
    metadata = RunMetadata(dated_name(recipe), append_command(description, command), tags, params)
    known = read_run_record(output_dir)
    with start_run(tracking, output_dir, metadata, run_id=known["run_id"] if known else "", record=True) as tracker:
        uri, parent = tracking_uri(tracking, output_dir), tracker.run_id()
        yield tracker, TrackingConfig(uri, tracking.experiment, parent_run_id=parent, backends=tracking.backends)
