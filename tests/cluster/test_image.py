"""The Dockerfile passes the linter, follows the steps of `make setup`, and copies files that exist in the repository."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.cluster.manifests import CLUSTER, IMAGE_ROOT, ROOT, pinned
from tests.support.environments import make_setup, recorded_calls, write_environment

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


def test_the_linter_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_installs_by_make_setup_with_the_pinned_versions(tmp_path):
    (step,) = [arguments for name, arguments in instructions() if name == "RUN" and "pip" in arguments.lower()]
    assert step.endswith(f"make setup EXTRAS={EXTRAS}"), "a step of its own could drift from the Makefile's"
    assert 'PIP_EXTRA_INDEX_URL="${TORCH_INDEX}"' in step, "which makes the CPU variant"
    venv = write_environment(tmp_path, "")
    make_setup(venv, f"EXTRAS={EXTRAS}")
    calls = recorded_calls(venv)
    assert calls[-1].endswith(f"--editable .[{EXTRAS}]")
    assert not any("clip-benchmark" in call for call in calls), "what tests compare with comes with dev"
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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_build_steps_run_as_far_as_they_can_without_docker(tmp_path):
    """In a folder in place of /opt/diffdis: apt only simulates its step, and no user is created. Takes minutes and 4 GB."""
    image, environment = tmp_path / "image", {**os.environ, "HOME": str(tmp_path)}
    image.mkdir()
    values = {"PYTHON": "", "TORCH_INDEX": ""}
    for name, arguments in instructions():
        if name == "COPY":
            *sources, target = [word for word in arguments.split() if not word.startswith("--")]
            subprocess.run(["cp", "-r", *sources, image if target == "./" else image / target], cwd=ROOT, check=True)
        elif name == "ENV":
            pairs = [pair.partition("=") for pair in shlex.split(arguments.replace("$PATH", environment["PATH"]))]
            environment |= {key: value.replace(IMAGE_ROOT, str(image)) for key, _, value in pairs}
        elif name == "RUN" and "useradd" not in arguments:
            step = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], arguments)
            if "apt-get" in step:
                step = re.search(r"apt-get install .*?(?= &&)", step)[0] + " --simulate"
            done = subprocess.run(["sh", "-c", step], cwd=image, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def run(*command):
        return subprocess.run(command, cwd=image, env=environment, capture_output=True, text=True)

    assert run("which", "python").stdout.strip() == str(image / ".venv" / "bin" / "python")
    sizes = run("diffdis", "sizing", "--num_gpus", "8")
    assert sizes.returncode == 0, sizes.stderr
    assert run("python", "jobs/sweep.py", "--help").returncode == 0
    head = run("timeout", "60", "ray", "start", "--head", "--block", "--port=0", "--include-dashboard=false")
    assert head.returncode not in (0, 124), "Ray starts without a token"
    assert "token" in (head.stdout + head.stderr).lower()
