"""The command `diffdis`: help, version and errors, without importing the libraries that a command needs."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffdis import __version__
from diffdis_platform.cli import COMMANDS, main
from diffdis_platform.commands import demo
from ray_platform.contracts import ConfigError
from ray_platform.lease import Lease
from tests.support.environments import BITSANDBYTES

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "ray", "mlflow", "diffusers", "transformers", "optuna", "pyarrow"}
# Every command with --help and with a misspelled field; then commands that fail for a file that does not exist.
PARSE_ALL = f"""
import contextlib, io, sys
from diffdis_platform.cli import COMMANDS, main
def run(*argv):
    error = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        main(argv)
    return error.getvalue()
for command in COMMANDS:
    run(command, "--help")
    misspelled = run(command, "--zutput_dri", "x")
    assert misspelled.startswith("error: ") and misspelled.count(chr(10)) == 1, command
print(sorted({HEAVY!r} & sys.modules.keys()))
out, roots = ("--output_dir", sys.argv[1]), ("--data_roots", sys.argv[1])
for line in (
    ("pretrain", "--dry-run", "--data.sources", "/none", *out), ("pretrain", "--dry-run", "--output_dir", "/proc/x"),
    ("inspect", "--data.sources", "/none", *out), ("precompute", "--data.sources", "/none", *out),
    ("eval", "--checkpoint", "/none", "--data_roots", "/none", *out),
    ("export", "--checkpoint", "/none", *out), ("sizing", "--gpu", "H999"),
    ("generate", "--model", "/none", "--captions", "a", *out), ("sweep", "--pretrain.data.sources", "/none", *out),
    ("compare", "--pretrain.data.sources", "/none", *out),
    ("eval", "--checkpoint", "/", "--data_roots", "/none", *out), ("eval", "--checkpoint", "/", "--suite", "cifar", *roots, *out),
    ("eval", "--checkpoint", "/", "--suite", "quick", *roots, *out),
    ("eval", "--checkpoint", "/", *roots, "--output_dir", "/proc/x"), ("eval", "--checkpoint", "/", "--suite", "/no.yaml", *out),
    ("eval", "--checkpoint", "/", *roots, "--class_names", "/none", *out),
    ("eval", "--checkpoint", "/", *roots, "--quality.prompts", "/none", "--quality.reference", "/", *out),
    ("distance", "--generated", "/none", "--reference", "/", "--networks", "[efficientnet_lite0]", *out),
):
    print(run(*line), end="")
print(sorted({HEAVY!r} & sys.modules.keys()))
"""


@pytest.mark.ranks
def test_help_and_commands_with_errors_need_no_heavy_library(tmp_path):
    path = {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "PATH": "/usr/bin:/bin"}
    program = [sys.executable, "-c", PARSE_ALL, str(tmp_path / "out")]
    done = subprocess.run(program, env=path, capture_output=True, text=True, check=True)
    parsed, *errors, failed = done.stdout.splitlines()
    fields = ["data.sources", "output_dir", "data.sources", "data.sources", "checkpoint", "checkpoint", "gpu", "model"]
    assert [line.split(": ")[:2] for line in errors] == [
        ["error", field]
        for field in (
            *(*fields, "pretrain.data.sources", "pretrain.data.sources"),
            *("data_roots", "suite", "data_roots", "output_dir", "suite", "class_names"),
            *("quality.prompts", "generated"),
        )
    ]
    assert (parsed, failed) == ("[]", "['pyarrow']"), "storage is needed to find a file"


@pytest.mark.ranks
def test_commands_do_not_show_that_a_package_lacks_an_optional_one():
    """bitsandbytes, which diffusers imports, warns as the first line of `make demo`."""
    code = "from diffdis_platform.cli import main; import bitsandbytes; main(['export'])"
    path = {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}:{BITSANDBYTES}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if "gemm" in line] == []
    assert "error: checkpoint: give a step_" in done.stderr


def test_help_version_and_errors(capsys):
    assert main(["--help"]) == main([]) == main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in COMMANDS)
    assert printed.endswith(f"diffdis {__version__}\n")
    assert (main(["train"]), main(["pretrain", "--train.num_stpes", "3"])) == (2, 1)
    unknown, misspelt = capsys.readouterr().err.splitlines()
    assert unknown == "error: train: no such command; did you mean pretrain?"
    assert misspelt == "error: --train.num_stpes: no such field; did you mean --train.num_steps?"


@pytest.mark.parametrize("argument", ["--output_dir=/x", "--data.sources=/x", "--dry-run", "--recipe=sd_v1_laion"])
def test_the_demo_rejects_what_it_sets_itself(argument):
    assert demo.parse_arguments(["--train.num_steps=3"]).config.train.num_steps == 3
    with pytest.raises(ConfigError, match=f"^(--)?{argument.partition('=')[0][2:]}[^\n]*$"):
        demo.parse_arguments([argument])


def test_the_run_of_an_active_folder_is_not_delivered(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").touch()
    with Lease(str(tmp_path), "first"):
        assert main(["deliver", "--output_dir", str(tmp_path)]) == 1
    assert main(["deliver", "--output_dir", str(tmp_path)]) == main(["deliver", "--output_dir", str(tmp_path / "none")]) == 1
    active, without_run, missing = capsys.readouterr().err.splitlines()
    assert "is in use by launch first" in active
    assert without_run.startswith(f"error: {tmp_path}: has no run")
    assert missing == f"error: output_dir: {tmp_path / 'none'}: no such file or folder; correct the path"


def test_every_script_only_runs_a_command():
    for script in (ROOT / "jobs").glob("[a-z]*.py"):
        text = script.read_text()
        assert text.count("\n") <= 30
        assert any(f'run("{command}")' in text for command in COMMANDS), script
