"""A trace of a few steps, to be opened in Perfetto or chrome://tracing."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ray_platform import storage
from ray_platform.contracts import one_line

logger = logging.getLogger(__name__)

WAIT, WARM_UP, ACTIVE = 3, 1, 3  # steps


class Profiler:
    """Of this rank: `ACTIVE` steps, after some that are not typical. The trace goes to output_dir/profile."""

    def __init__(self, output_dir: str):
        self.folder = storage.join(output_dir, "profile")
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profile: Any = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profile.start()

    def step(self) -> None:
        """After every step."""
        self._profile.step()

    def stop(self) -> None:
        self._profile.stop()

    def _write(self, done: Any) -> None:
        """A trace that cannot be written costs a warning, never the run."""
        try:
            with tempfile.TemporaryDirectory(prefix="profile_") as folder:
                done.export_chrome_trace(str(Path(folder) / "rank_00000.json.gz"))
                storage.put_folder(Path(folder), self.folder)
        except Exception as error:
            logger.warning("the profiler's trace could not be written; training goes on: %s", one_line(error))
