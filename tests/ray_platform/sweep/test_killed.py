"""After the driver of a sweep is killed, the same command finishes with the same trials as an undisturbed sweep."""

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

from ray_platform.local_head import MARKER, LocalHead, marked_processes
from tests.ray_platform.sweep.curves import read_notes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def head():
    with LocalHead(num_cpus=2) as head:
        yield head


def start(head, output, notes, search, seconds):
    notes.mkdir(exist_ok=True)
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "platform"))
    command = [sys.executable, "-m", "tests.ray_platform.sweep.driver", str(output), str(notes), search, str(seconds)]
    env = head.env | {"PYTHONPATH": path, "TUNE_GLOBAL_CHECKPOINT_S": "0.2"}  # seconds; segments are shorter than real ones
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def result(driver):
    out, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0
    return json.loads(out.splitlines()[-1])


def trial_processes(head):
    running = []
    for process in marked_processes(head.env[MARKER]):
        with contextlib.suppress(psutil.NoSuchProcess):  # the process may exit in the meantime
            if "ImplicitFunc" in " ".join(process.cmdline()):
                running.append(process)
    return running


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_killed_sweep_is_resumed_with_the_same_trials(head, tmp_path, search):
    notes = tmp_path / "notes"
    uninterrupted = result(start(head, tmp_path / "uninterrupted", tmp_path / "other_notes", search, 0))
    driver = start(head, tmp_path / "killed", notes, search, 0.5)
    while len(read_notes(notes)) < 5:
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 60
    while trial_processes(head) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not trial_processes(head), "the trials end with their driver"
    num_notes = len(read_notes(notes))
    resumed = result(start(head, tmp_path / "killed", notes, search, 0))
    assert resumed["groups"] == []
    for outcomes in (resumed["outcomes"], uninterrupted["outcomes"]):
        states = [(outcome["name"], outcome["state"], len(outcome["history"])) for outcome in outcomes]
        assert states == [(f"trial_{i:03d}", "finished", 3) for i in range(5)]
    if search == "random":  # Optuna's trials depend on the order in which trials finish
        assert [o["values"] for o in resumed["outcomes"]] == [o["values"] for o in uninterrupted["outcomes"]]
    assert len(read_notes(notes)) - num_notes < 15, "segments that were reported do not run again"
