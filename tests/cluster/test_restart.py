"""jobs/restart.sh starts a command again until it succeeds, and never after SIGTERM."""

import signal
import subprocess
import sys

import pytest

from tests.cluster.manifests import ROOT

pytestmark = pytest.mark.ranks  # it starts processes
ATTEMPT = """
import os, signal, sys
with open(sys.argv[1], "a") as file:
    file.write("x")
number = os.path.getsize(sys.argv[1])
if sys.argv[2] == "stop":
    os.kill(os.getppid(), signal.SIGTERM)  # `ray job stop` sends it to both
    sys.exit(1)
if number < int(sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("succeeds_at", "attempts", "status"),
    [("1", 1, 0), ("3", 3, 0), ("9", 4, 128 + signal.SIGKILL), ("stop", 1, 1)],
)
def test_a_killed_command_is_started_again(tmp_path, succeeds_at, attempts, status):
    count = tmp_path / "a folder"
    done = subprocess.run(
        ["sh", ROOT / "jobs" / "restart.sh", "4", sys.executable, "-c", ATTEMPT, count, succeeds_at], check=False
    )
    assert (count.stat().st_size, done.returncode) == (attempts, status)
