"""The project works in an environment that has only its dependencies: as a wheel, and as a job of `ray job submit`."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("PYTHONPATH", "RAY_ADDRESS", "RAY_AUTH_MODE", "VIRTUAL_ENV")
SMALL = [
    "--recipe", "demo", "--train.num_steps", "4", "--train.micro_batch_size", "4", "--train.preview_every", "0",
    "--train.log_every", "2",
]  # fmt: skip
SUBMIT = """
import importlib.util, sys
for name in ("ray_platform", "diffdis", "diffdis_platform"):
    assert importlib.util.find_spec(name) is None, name
from pathlib import Path
root = Path(sys.argv[1])
sys.path.insert(0, str(root / "platform"))
from ray_platform.local_head import LocalHead, submit
with LocalHead(num_cpus=2) as head:
    sys.exit(submit(head, ["python", "jobs/pretrain.py", *sys.argv[2:]], root, {}, root / 'outputs' / 'job.log'))
"""


@pytest.fixture
def bare_python(tmp_path):
    """Return (interpreter of such an environment, run(*command)). run executes in an empty folder and returns the output."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = next((tmp_path / "venv" / "lib").glob("python3*")) / "site-packages"
    # Python ignores .pth files in a folder that a .pth file adds, so the editable installation is not visible.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment["PATH"] = os.pathsep.join([str(python.parent), str(Path(sys.executable).parent), environment["PATH"]])
    (tmp_path / "work").mkdir()

    def run(*command: str) -> str:
        done = subprocess.run(list(map(str, command)), cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return python, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.ranks
def test_the_wheel_holds_three_typed_packages_with_their_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"diffdis", "diffdis_platform", "ray_platform"}
    assert {f"{package}/py.typed" for package in packages} <= names
    assert {"diffdis_platform/demo/fxemoji_names.txt", "ray_platform/evaluate/sets.json"} <= names
    platform = ROOT / "platform"
    assert {path.relative_to(platform).as_posix() for path in platform.rglob("templates/*") if path.is_file()} <= names


@pytest.mark.slow
def test_the_wheel_trains_and_generates(wheel, bare_python, training_shards, tmp_path):
    python, run = bare_python
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    diffdis, out = python.with_name("diffdis"), tmp_path / "run"
    assert run(diffdis, "--version").startswith("diffdis ")
    arguments = ["pretrain", "--data.sources", training_shards, "--output_dir", out, "--train.num_workers", "1", *SMALL]
    assert '"workers": 1' in run(diffdis, *arguments, "--dry-run")
    assert "step 4/4" in run(diffdis, *arguments)
    captions = ["--captions", "red heart", "blue car", "--num_steps", "2"]
    run(diffdis, "generate", "--model", out / "export", "--output_dir", tmp_path / "images", *captions)
    images = json.loads((tmp_path / "images" / "captions.json").read_text())
    assert images == {"000000.png": "red heart", "000001.png": "blue car"}
    manifest = json.loads(next(out.glob("checkpoints/*/step_*/complete.json")).read_text())
    assert manifest["code_version"].startswith("version-")


@pytest.mark.slow
def test_a_submitted_job_needs_only_the_dependencies(bare_python, training_shards, tmp_path):
    """The project's root is on the path only because of --working-dir. Two workers and their reads fit on two CPUs."""
    python, run = bare_python
    arguments = ["--data.sources", training_shards, "--output_dir", tmp_path / "out", *SMALL]
    assert "step 4/4" in run(python, "-c", SUBMIT, ROOT, *arguments)
    summary = json.loads((tmp_path / "out" / "train_summary.json").read_text())
    assert (summary["num_steps"], summary["num_workers"], summary["zero_stage"]) == (4, 2, 0)
