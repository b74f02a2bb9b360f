"""The command `diffdis`: help, version and errors, without importing the libraries that a command needs."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffdis import __version__
from diffdis_platform.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "ray", "mlflow", "diffusers", "transformers", "optuna", "pyarrow"}
PARSE_ALL = f"""
import contextlib, io, sys
from diffdis_platform.cli import COMMANDS, main
for command in COMMANDS:
    if command != "demo":
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            main([command, "--help"])
print(sorted({HEAVY!r} & sys.modules.keys()))
"""


@pytest.mark.ranks
def test_the_help_of_all_commands_needs_no_heavy_library():
    path = {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", PARSE_ALL], env=path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_version_and_errors(capsys):
    assert main(["--help"]) == main([]) == main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in COMMANDS)
    assert printed.endswith(f"diffdis {__version__}\n")
    assert (main(["train"]), main(["pretrain", "--train.num_stpes", "3"])) == (2, 1)
    unknown, misspelt = capsys.readouterr().err.splitlines()
    assert unknown.startswith("error: train: no such command; choose one of pretrain")
    assert misspelt == "error: --train.num_stpes: no such field; did you mean --train.num_steps?"


def test_every_script_only_runs_a_command():
    for script in (ROOT / "jobs").glob("[a-z]*.py"):
        text = script.read_text()
        assert text.count("\n") <= 30
        assert any(f'run_command("{command}"' in text for command in COMMANDS), script
