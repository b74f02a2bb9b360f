"""Count and time what a training step of Stable Diffusion's depth costs the host, next to an earlier commit.

    PYTHONPATH=platform:. python tests/benchmarks/host_step.py [--rounds 5] [--before COMMIT]

The recipe's model has all its layers and heads at width 32, with 2 samples per step, in the real engine: one rank, one thread. So
its CPU time is nearly all of it the host's work of starting operations. The bytes are counted at full size on fake tensors. The
two commits take turns. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.measuring import in_turns, medians, ratio

ROOT = Path(__file__).resolve().parents[2]
BEFORE = "3a3489c"  # the last commit before the step was made faster
SETTINGS = [f"{visibility}_zero_{stage}" for visibility in ("one_way", "joint") for stage in (0, 1, 2)]


class Contender:
    """A process of host_step_contender.py that runs steps of one setting in the code of one folder."""

    def __init__(self, code: Path, setting: str):
        paths = os.pathsep.join(map(str, (code / "platform", code)))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, str(Path(__file__).with_name("host_step_contender.py")), setting]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=code
        )

    def ask(self, question: str) -> Any:
        """Return the answer to `cpu_ms`, `counts` or `gigabytes`."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"{' '.join(map(str, self.process.args))}: ended without an answer")  # type: ignore[arg-type]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def check_out(commit: str, folder: Path) -> None:
    """Write the files of a commit to a folder."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)


def measure(setting: str, before: Path, rounds: int) -> dict[str, float]:
    """Return the counts of a setting, and its CPU time next to that of the code in `before`."""
    with ExitStack() as stack:
        contenders = {"now": Contender(ROOT, setting), "before": Contender(before, setting)}
        for contender in contenders.values():
            stack.callback(contender.close)
        found: dict[str, float] = contenders["now"].ask("counts")
        measured = in_turns({name: partial(c.ask, "cpu_ms") for name, c in contenders.items()}, rounds)
        found |= {"cpu_ms": medians(measured)["now"], "cpu_ratio": ratio(measured, "now", "before")}
        if setting == "recipe":
            found["gigabytes"] = contenders["now"].ask("gigabytes")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", default=BEFORE, help="commit to compare with")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check_out(arguments.before, Path(folder))
        measured = {setting: measure(setting, Path(folder), arguments.rounds) for setting in ("recipe", *SETTINGS)}
    print(json.dumps(measured.pop("recipe") | {"before": arguments.before, "settings": measured}))


if __name__ == "__main__":
    main()
