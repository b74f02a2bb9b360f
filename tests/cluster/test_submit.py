"""The lines of docs/clusters.md submit a job to a head that somebody else started."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from ray_platform.local_head import LocalHead
from tests.support.documentation import ROOT, Shell, blocks_run_by, readers_environment


@pytest.mark.ray
@pytest.mark.slow
def test_the_documented_lines_submit_a_job_with_its_commit(training_shards, tmp_path):
    """The client has the address and the token, and nothing else of it. tests/end_to_end/test_bare_environment.py trains."""
    (block,) = blocks_run_by(__file__, "docs/clusters.md")
    with LocalHead(num_cpus=2) as head:
        environment = readers_environment() | {name: head.env[name] for name in ("RAY_AUTH_TOKEN", "no_proxy", "NO_PROXY")}
        environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment["PATH"]))
        words = {
            "http://head.example.com:8265": head.address,
            "--recipe demo": "--recipe demo --dry-run",
            "s3://my-bucket/my-shards": str(training_shards),
            "s3://my-bucket/my-run": str(tmp_path / "run"),
            "http://mlflow:5000": f"sqlite:///{tmp_path / 'mlflow.db'}",
        }
        output = Shell(tmp_path, environment, words, start=ROOT).run(block)
        headers = {"Authorization": f"Bearer {head.env['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(f"{head.address}/api/jobs/my-run", headers=headers)) as reply:
            variables = json.load(reply)["runtime_env"]["env_vars"]
    assert '"shards": 4' in output
    assert "Job 'my-run' succeeded" in output
    commit = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    assert variables["DIFFDIS_GIT_COMMIT"].removesuffix("-dirty") == commit, "the run records it (test_run_description.py)"
