"""The driver of a sweep is killed in the middle; the same command ends with the trials of one that was not."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ray_platform.local_head import LocalHead
from tests.ray_platform.sweep.curves import notes

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head():
    with LocalHead(num_cpus=2) as head:
        yield head


def start(head, output, folder, search, seconds):
    folder.mkdir(exist_ok=True)
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "platform"))
    command = [sys.executable, "-m", "tests.ray_platform.sweep.driver", str(output), str(folder), search, str(seconds)]
    env = head.env | {"PYTHONPATH": path, "TUNE_GLOBAL_CHECKPOINT_S": "0.2"}  # seconds; a segment takes less than those of use
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finished(driver):
    out, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0
    return json.loads(out.splitlines()[-1])


def trial_processes(head):
    found = []
    for process in head.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end while it is looked at
            if "ImplicitFunc" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_killed_sweep_goes_on_to_the_same_trials(head, tmp_path, search):
    whole = finished(start(head, tmp_path / "whole", tmp_path / "notes_whole", search, 0))
    driver = start(head, tmp_path / "cut", tmp_path / "notes", search, 0.5)
    while len([note for note in notes(tmp_path / "notes") if note["what"] == "train"]) < 5:
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 60
    while trial_processes(head) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not trial_processes(head), "the trials ended with their driver"
    before = len(notes(tmp_path / "notes"))
    restored = finished(start(head, tmp_path / "cut", tmp_path / "notes", search, 0))
    assert restored["groups"] == []

    def of(found):
        return [(o["name"], o["state"], len(o["history"])) for o in found["outcomes"]]

    expected = [(f"trial_{i:03d}", "finished", 3) for i in range(5)]
    assert of(restored) == of(whole) == expected, [o["error"] for o in restored["outcomes"]]
    if search == "random":  # optuna's depend on the order in which trials end
        assert [o["values"] for o in restored["outcomes"]] == [o["values"] for o in whole["outcomes"]]
    again = [note for note in notes(tmp_path / "notes")[before:] if note["what"] == "train"]
    assert len(again) < 15, "what was reached is not done again"
