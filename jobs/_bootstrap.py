"""Imported by every script in this folder: puts the root of the checkout and `platform/` on the path, and runs a command.

`python jobs/x.py` puts only `jobs/` on the path of the driver; `ray_platform.connect` sets the path of the workers.
"""

import importlib.util
import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
for _folder in (str(_ROOT / "platform"), str(_ROOT)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

if importlib.util.find_spec("jsonargparse") is None:
    sys.exit(f"error: {sys.executable} does not have this project's packages; run `make setup`, then use .venv/bin/python")

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one bar per loaded file clutters the log


def run(command: str) -> None:
    """Run a command of `diffdis` with the arguments of this process, and exit with its status."""
    from diffdis_platform.cli import run_command

    sys.exit(run_command(command, sys.argv[1:]))
