"""The Dockerfile passes the linter, follows the steps of `make setup`, and copies files that exist in the repository."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.cluster.manifests import CLUSTER, IMAGE_ROOT, ROOT, pinned

DOCKERFILE = CLUSTER / "Dockerfile"
EXTRAS = "demo,eval,server,lora,tensorboard,wandb,bitsandbytes"

pytestmark = pytest.mark.ranks


def instructions():
    """Return [(instruction, arguments)], with continuation lines joined."""
    joined = re.sub(r"\\\n\s*", " ", "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line]


def copied():
    for name, arguments in instructions():
        if name == "COPY":
            *sources, _ = [word for word in arguments.split() if not word.startswith("--")]
            yield from sources


def installed(*assignments):
    """Return the commands that `make setup` runs in a folder where nothing is installed."""
    command = ["make", "--dry-run", "setup", "VENV=/nowhere/venv", *assignments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_linter_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_installs_by_make_setup_with_the_pinned_versions():
    (step,) = [arguments for name, arguments in instructions() if name == "RUN" and "pip" in arguments.lower()]
    assert step.endswith(f"make setup EXTRAS={EXTRAS}"), "a step of its own could drift from the Makefile's"
    assert 'PIP_EXTRA_INDEX_URL="${TORCH_INDEX}"' in step, "which makes the CPU variant"
    commands = installed(f"EXTRAS={EXTRAS}")
    assert f'--editable ".[{EXTRAS}]"' in commands
    assert commands.count("--constraint constraints.txt") == commands.count("pip --disable-pip-version-check install") == 4
    assert ("clip-benchmark" in commands, "clip-benchmark" in installed()) == (False, True), "the peers come with dev"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.split(",")) <= extras.keys()
    assert all(pinned(requirement.partition("[")[0]) for requirement in extras["server"])


def test_it_runs_as_a_user_needs_a_token_and_has_the_tools_that_kuberay_calls():
    values = dict(instructions())
    assert values["USER"] == "1000"
    assert "RAY_AUTH_MODE=token" in values["ENV"]
    packages = next(text for name, text in instructions() if name == "RUN" and "apt-get install" in text).split()
    assert {"bash", "wget"} <= set(packages)


def test_the_copied_files_are_enough_for_a_job(tmp_path):
    """Runs in a copy of the image's files, with an interpreter that has the dependencies but not this project."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(allowed) == sorted(copied())
    assert ("WORKDIR", IMAGE_ROOT) in instructions()
    for source in copied():
        subprocess.run(["cp", "-r", str(ROOT / source), str(tmp_path / source)], check=True)
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    script = str(tmp_path / "jobs" / "sweep.py")  # it imports everything that the other jobs import
    program = (
        f"import sys, runpy; sys.path = [p for p in sys.path if p != {packages!r}] + [{packages!r}]; "
        f"sys.argv = ['sweep.py', '--help']; sys.path.insert(0, {str(tmp_path / 'jobs')!r}); "
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--output_dir" in done.stdout
