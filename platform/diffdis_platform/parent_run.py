"""Tracked run of a sweep or a comparison, above the runs of its trials or arms."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.config.sweep import SweepConfig
from ray_platform.lease import Lease
from ray_platform.tracking import RunMetadata, Tracker, TrackingConfig, start_run, tracking_uri
from ray_platform.tracking.run_metadata import append_command, code_version, dated_name, run_tags


@contextlib.contextmanager
def start_parent_run(
    config: CompareConfig | SweepConfig, kind: str, recipe: str, command: str, params: Mapping[str, Any]
) -> Iterator[tuple[Tracker, TrackingConfig]]:
    """Start the tracked run of an output folder, or continue the one that an earlier call started there.

    Args:
        config: its output folder and tracking; an empty run name is replaced by the recipe and the date.
        kind: `sweep` or `comparison`.
        recipe: name of the recipe.
        command: command line that started the job, without secrets.
        params: nested parameters of the run.

    Yields:
        The tracker of the run, and the config with which the runs below it are tracked.

    Raises:
        ConfigError: another process holds the lease of the output folder.
    """
    tracking, folder = config.tracking, config.output_dir
    text = f"A {kind} by the recipe `{recipe}`; its runs are those below this one. Report: `{folder}/report.html`."
    tags = run_tags(recipe, folder, code_version())
    metadata = RunMetadata(dated_name(recipe), append_command(text, command), tags, params)
    with Lease(folder, kind), start_run(tracking, folder, metadata, resume=True, record=True) as tracker:
        yield tracker, replace(tracking, uri=tracking_uri(tracking, folder), parent_run_id=tracker.run_id() or folder)
