"""`ray job submit` against a head whose environment holds the dependencies and not this project."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import importlib.util, sys
for name in ("ray_platform", "diffdis", "diffdis_platform"):
    assert importlib.util.find_spec(name) is None, name
from pathlib import Path
root = Path(sys.argv[1])
sys.path.insert(0, str(root / "platform"))
from ray_platform.local_head import LocalHead, submit
with LocalHead(num_cpus=2) as head:
    sys.exit(submit(head, ["python", "jobs/pretrain.py", *sys.argv[2:]], root, {}))
"""


@pytest.mark.slow
def test_a_submitted_job_needs_only_the_dependencies(training_shards, tmp_path):
    """The project's root on the path comes from --working-dir alone. Two workers and their reads fit two CPUs."""
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False, symlinks=True)
    packages = next((bare / "lib").glob("python3*")) / "site-packages"
    # A folder named in a .pth file is added without its own .pth files, so an editable install stays out.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    output = tmp_path / "out"
    arguments = [
        "--recipe", "demo", "--data.sources", str(training_shards), "--output_dir", str(output),
        "--train.num_steps", "4", "--train.micro_batch_size", "4", "--train.preview_every", "0", "--train.log_every", "2",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_AUTH_MODE", "VIRTUAL_ENV")}
    environment["PATH"] = os.pathsep.join([str(bare / "bin"), str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(
        [str(bare / "bin" / "python"), "-c", SCRIPT, str(ROOT), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    summary = json.loads((output / "train_summary.json").read_text())
    assert (summary["num_steps"], summary["num_workers"], summary["zero_stage"]) == (4, 2, 2)
    assert "step 4/4" in done.stdout
