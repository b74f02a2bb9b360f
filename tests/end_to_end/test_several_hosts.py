"""A training run across hosts with separate addresses survives a link that is cut temporarily or permanently."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

from tests.support import hosts

BENCHMARK = hosts.ROOT / "tests" / "benchmarks" / "several_hosts.py"


def run(folder: str, *cuts: str) -> tuple[dict, str]:
    """Return (result, full output). The hosts need a separate network and therefore a separate process."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in (hosts.ROOT, hosts.ROOT / "platform")),
        "TMPDIR": folder,
    }
    command = [sys.executable, str(BENCHMARK), "--cuts", *cuts]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.timeout(1200)
def test_a_run_across_hosts_loses_nothing_when_a_link_is_cut():
    """`ray job submit` to three hosts with S3 on a fourth, ZeRO 2.

    The run waits out a cut of ten seconds. After the permanent loss of a host, it resumes from its newest checkpoint on the spare
    host.
    """
    if reason := hosts.reason_unavailable():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as folder:  # a short path, because the path of a socket in it is limited to 107 bytes
        found, said = run(folder, "worker", "replaced")
    assert found["finished"], said
    assert found["exit_code"] == 0, said
    assert (found["num_hosts"], found["num_samples_lost"], found["num_samples_doubled"]) == (5, 0, 0), said
    assert found["epochs_in_ledger"] == found["num_epochs"], said
    short, lasting = found["cuts"]
    assert not short["noticed"], said
    assert "resuming from s3://tests/run/checkpoints" in lasting["noticed"], said
    assert found["num_steps_done_twice"] > 0, "the second cut came between two checkpoints"
