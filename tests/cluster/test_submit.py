"""The three lines of docs/clusters.md submit a job to a head that somebody else started."""

import os
import sys
from pathlib import Path

import pytest

from ray_platform.local_head import LocalHead
from tests.support.documentation import ROOT, Shell, blocks_run_by, readers_environment


@pytest.mark.ray
@pytest.mark.slow
def test_three_lines_submit_a_job(training_shards, tmp_path):
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
    assert '"shards": 4' in output
    assert "Job 'my-run' succeeded" in output
