"""`make setup` shows its steps, what is downloaded and how long it takes. A stand-in for pip installs nothing."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import install
from tests.support.environments import ROOT, make_setup, recorded_calls, write_environment

pytestmark = pytest.mark.ranks  # starts processes

PIP = """
echo "WARNING: Location of an index is ignored"
echo "Collecting torch"
echo "  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (181.5 MB)"
echo "  Using cached ninja-1.13.0-py3-none-any.whl (180 kB)"
echo "Installing collected packages: torch, ninja"
"""
FAILING = 'echo "ERROR: Could not find a version that satisfies the requirement deepspeed"; exit 1'


def test_without_a_terminal_there_is_a_line_per_step(tmp_path):
    venv = write_environment(tmp_path, PIP)
    done = make_setup(venv)
    first, *lines = done.stdout.splitlines()
    assert first.startswith(f"installing into {venv}: about ")
    assert [re.sub(r"0:0\d", "0:00", line) for line in lines] == [
        f"step {number} of 5: {title} … 0:00, 182 MB downloaded"
        for number, title in enumerate(
            (
                *("torch and build tools", "DeepSpeed", "this project and its dependencies", "libraries that tests compare with"),
                "bitsandbytes for its tests",
            ),
            1,
        )
    ]
    assert "WARNING" in (venv / "install.log").read_text()
    assert "step" not in make_setup(venv).stdout, "nothing is left to install"


def test_a_terminal_shows_what_is_being_done(tmp_path):
    venv = write_environment(tmp_path, PIP + "sleep 1.2")
    parent, child = pty.openpty()
    command = [sys.executable, "install.py", str(venv), "demo"]
    with subprocess.Popen(command, cwd=ROOT, stdout=child, env=os.environ | {"COLUMNS": "150"}) as process:
        os.close(child)
        shown = b""
        while chunk := _read(parent):
            shown += chunk
    os.close(parent)
    assert process.returncode == 0
    assert b"step 1 of 3: torch and build tools  0:00, 182 MB downloaded, installing 0 of 2 packages" in shown
    assert len(shown.splitlines()) >= 4


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the last process that wrote to it has ended
        return b""


def test_a_step_that_fails_ends_the_installation_and_shows_the_end_of_pips_output(tmp_path):
    venv = write_environment(tmp_path, f'case "$*" in *deepspeed*) {FAILING};; esac')
    done = make_setup(venv, check=False)
    assert done.returncode != 0
    assert "ERROR: Could not find a version that satisfies the requirement deepspeed" in done.stderr
    assert f"error: DeepSpeed: pip ended with status 1; see {venv / 'install.log'}" in done.stderr
    assert not (venv / ".installed").exists()


def test_every_step_uses_the_tested_versions(tmp_path):
    venv = write_environment(tmp_path, "")
    make_setup(venv, "EXTRAS=demo,eval")
    calls = recorded_calls(venv)
    assert len(calls) == 3
    assert all("install --progress-bar off --constraint constraints.txt" in call for call in calls)
    assert calls[-1].endswith("--no-build-isolation --editable .[demo,eval]")


def test_an_old_python_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 1))
    assert install.main(Path("/nowhere"), "demo") == 1
    assert "make setup SYSTEM_PYTHON=" in capsys.readouterr().err
    assert make_setup(write_environment(tmp_path, ""), "SYSTEM_PYTHON=echo").stdout.startswith("install.py ")


def test_an_environment_without_pip_is_created_again(tmp_path, monkeypatch, capsys):
    """Creating it was interrupted, or the system has no ensurepip, as Debian without its package python3-venv."""
    venv = write_environment(tmp_path, "")
    (venv / "bin" / "pip").unlink()
    monkeypatch.setattr(install.sys, "executable", "false")
    assert install.main(venv, "demo") == 1
    assert f"error: {venv}: the virtual environment could not be created" in capsys.readouterr().err
