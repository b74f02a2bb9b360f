"""The wheel in an environment that holds the dependencies, and in a folder that holds no checkout."""

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def diffdis(wheel, tmp_path_factory):
    """diffdis(*arguments) -> the finished command `diffdis` of an environment with the wheel, run in a folder of its own."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    packages = next((folder / "venv" / "lib").glob("python3*")) / "site-packages"
    # A folder named in a .pth file is added without its own .pth files, so an editable installation stays out.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS", "RAY_AUTH_MODE", "VIRTUAL_ENV")}
    (folder / "work").mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(python.with_name("diffdis")), *arguments]
        done = subprocess.run(command, cwd=folder / "work", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return run


@pytest.mark.ranks
def test_the_wheel_holds_three_typed_packages_with_their_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "diffdis",
        "diffdis_platform",
        "ray_platform",
    }
    assert {f"{package}/py.typed" for package in ("diffdis", "diffdis_platform", "ray_platform")} <= set(names)
    assert {"diffdis_platform/demo/fxemoji_names.txt", "ray_platform/evaluate/sets.json"} <= set(names)
    templates = {
        path.relative_to(ROOT / "platform").as_posix() for path in (ROOT / "platform").rglob("templates/*") if path.is_file()
    }
    assert templates <= set(names)


@pytest.mark.slow
def test_the_wheel_trains_and_generates(diffdis, shards, tmp_path):
    assert diffdis("--version").stdout.startswith("diffdis ")
    out = tmp_path / "run"
    arguments = [
        "pretrain", "--recipe", "demo", "--data.sources", str(shards), "--output_dir", str(out), "--train.num_workers", "1",
        "--train.num_steps", "2", "--train.micro_batch_size", "4", "--train.preview_every", "0",
    ]  # fmt: skip
    assert '"workers": 1' in diffdis(*arguments, "--dry-run").stdout
    assert "step 2/2" in diffdis(*arguments).stdout
    images = ["--output_dir", str(tmp_path / "images"), "--captions", "red heart", "blue car", "--num_steps", "2"]
    diffdis("generate", "--model", str(out / "export"), *images)
    assert json.loads((tmp_path / "images" / "captions.json").read_text()) == {
        "000000.png": "red heart",
        "000001.png": "blue car",
    }
    manifest = json.loads(next(out.glob("checkpoints/step_*/complete.json")).read_text())
    assert manifest["code_version"].startswith("version-")
