"""Run jobs/pretrain.py with ranks that record the samples they train on in /tmp/records of their host.

Every step has a minimum duration, so that the run is still training when a test disturbs its hosts.
"""

import functools
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDS = "/tmp/records"
SECONDS_A_STEP = 0.2  # at least


def paced(build_task):
    task = build_task()
    prepare = task.precompute_step_loss

    def slowly(parts, seeds, control, progress):
        time.sleep(SECONDS_A_STEP)
        return prepare(parts, seeds, control, progress)

    task.precompute_step_loss = slowly
    return task


def main():
    sys.path[:0] = [str(ROOT / "jobs"), str(ROOT / "platform"), str(ROOT)]
    from diffdis_platform.config.pretrain import PretrainConfig
    from tests.support import recorded_pretrain  # functions sent to the workers must not be in __main__
    from tests.support.recording import recording

    plain = PretrainConfig.run

    def run(self, *arguments):
        made = plain(self, *arguments)
        return replace(made, build_task=functools.partial(recording, RECORDS, recorded_pretrain.paced, made.build_task))

    PretrainConfig.run = run
    runpy.run_path(str(ROOT / "jobs" / "pretrain.py"), run_name="__main__")


if __name__ == "__main__":
    main()
