"""The virtual environment of the tests, and others whose Python records the calls of pip instead of installing packages."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BITSANDBYTES = str(Path(sys.prefix) / "apart")  # the folder into which install.py installs it


def write_environment(folder: Path, script: str) -> Path:
    """Return an environment whose `python` writes its arguments to a file, and then runs a shell script."""
    venv = folder / "venv"
    (venv / "lib" / "python3" / "site-packages").mkdir(parents=True)
    (venv / "bin").mkdir()
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {venv}/calls\n{script}\n')
    python.chmod(0o755)
    (venv / "bin" / "pip").touch()  # venv writes it last
    return venv


def make_setup(venv: Path, *assignments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `make setup` for an environment."""
    command = ["make", "--no-print-directory", "setup", f"VENV={venv}", *assignments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=check)


def recorded_calls(venv: Path) -> list[str]:
    """Return the arguments of each call of the environment's Python."""
    return (venv / "calls").read_text().splitlines()
