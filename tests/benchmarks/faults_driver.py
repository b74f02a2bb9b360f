"""Driver of one launch of the run that faults.py disturbs: `python faults_driver.py FOLDER NAME --resume auto`."""

import argparse
import functools
import sys
import time
from dataclasses import replace
from pathlib import Path

from tests.benchmarks import own_ray  # noqa: F401  # isort: skip (before ray)

from diffdis.config import tiny
from ray_platform.contracts import UserError
from ray_platform.tracking import TrackingConfig
from ray_platform.train.config import TrainConfig
from ray_platform.train.launch import Run
from tests.support.recording import recording
from tests.support.training import diffdis_run

NUM_STEPS, CHECKPOINT_EVERY = 10_000, 10  # of the schedule; the last launch stops earlier


def make_run(folder: Path, name: str, stop_at_step: int, resume: str, uri: str) -> Run:
    model = replace(tiny(), text_encoder=replace(tiny().text_encoder, path=str(folder / "text_encoder")))
    fields = {"num_steps": NUM_STEPS, "zero_stage": 2, "warmup_steps": 5, "ema_decay": 0.99, "checkpoint_every": CHECKPOINT_EVERY}
    fields |= {"max_failures": TrainConfig().max_failures, "resume": resume, "stop_at_step": stop_at_step}
    run = diffdis_run(model, folder / "shards", folder / name, **fields)
    build_task = functools.partial(recording, str(folder / name / "records"), run.build_task)
    return replace(run, build_task=build_task, tracking=TrackingConfig(uri))


def set_clock_back(seconds: float) -> None:
    """Let the clock of this process, which names the launch, be behind by so many seconds."""
    now, to_utc = time.time, time.gmtime
    time.time = lambda: now() - seconds
    time.gmtime = lambda at=None: to_utc(time.time() if at is None else at)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--stop-at-step", type=int, default=0)
    parser.add_argument("--resume", default="none")
    parser.add_argument("--uri", default="")
    parser.add_argument("--seconds-back", type=float, default=0.0)
    arguments = parser.parse_args()
    set_clock_back(arguments.seconds_back)
    try:
        make_run(arguments.folder, arguments.name, arguments.stop_at_step, arguments.resume, arguments.uri).fit()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
