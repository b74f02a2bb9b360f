"""jobs/pretrain.py itself, whose ranks write down what they train on, each on its own host: in /tmp/records."""

import functools
import runpy
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDS = "/tmp/records"


def main():
    sys.path[:0] = [str(ROOT / "jobs"), str(ROOT / "platform"), str(ROOT)]
    from recipes.config import PretrainConfig
    from tests.recording import recording

    plain = PretrainConfig.run

    def run(self, recipe):
        made = plain(self, recipe)
        return replace(made, build_task=functools.partial(recording, RECORDS, made.build_task))

    PretrainConfig.run = run
    runpy.run_path(str(ROOT / "jobs" / "pretrain.py"), run_name="__main__")


if __name__ == "__main__":
    main()
