"""torch profiler trace of a few training steps, for Perfetto or chrome://tracing."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ray_platform import storage
from ray_platform.contracts import one_line

logger = logging.getLogger(__name__)

WAIT_STEPS, WARM_UP_STEPS, ACTIVE_STEPS = 3, 1, 3


class Profiler:
    """Records `ACTIVE_STEPS` steps of this rank after the first ones, which are not typical, and writes `output_dir/profile`."""

    def __init__(self, output_dir: str):
        self.folder = storage.join(output_dir, "profile")
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profile: Any = profile(
            activities=activities,
            schedule=schedule(wait=WAIT_STEPS, warmup=WARM_UP_STEPS, active=ACTIVE_STEPS, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profile.start()

    def step(self) -> None:
        """Call it after every step."""
        self._profile.step()

    def stop(self) -> None:
        self._profile.stop()

    def _write(self, finished: Any) -> None:
        """Write the trace; an error costs a warning, not the run."""
        try:
            with tempfile.TemporaryDirectory(prefix="profile_") as folder:
                finished.export_chrome_trace(str(Path(folder) / "rank_00000.json.gz"))
                storage.put_folder(Path(folder), self.folder)
        except Exception as error:
            logger.warning("the profiler's trace could not be written; training continues: %s", one_line(error))
