"""The Slurm script starts Ray on every node of a job, runs a command on all of them, and leaves no process behind.

Slurm is not installed. A stand-in for `srun` starts the command once per node on this machine with the variables that Slurm sets.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray

from diffdis_platform.commands import pretrain
from ray_platform.local_head import MARKER, marked_processes
from tests.cluster.manifests import CLUSTER, ROOT
from tests.support.documentation import blocks

NODES = 3
SRUN = f"""#!/usr/bin/env bash
export SLURM_LAUNCH_NODE_IPADDR={ray.util.get_node_ip_address()}
nodes={NODES}
while [ "${{1#--}}" != "$1" ]; do
    [ "$1" = --nodes=1 ] && nodes=1
    shift
done
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 1' TERM
for node in $(seq 0 $((nodes - 1))); do
    # On one machine, nodes that start at the same moment choose the same ports.
    [ "$node" -le 1 ] || until [ -S "$RAY_TMPDIR/ray/session_latest/sockets/raylet.$((node - 1))" ]; do sleep 0.2; done
    SLURM_NODEID=$node SLURM_CPUS_ON_NODE=${{SRUN_CPUS_PER_TASK:-1}} "$@" &
done
wait -n || kill $(jobs -p) 2>/dev/null  # as --kill-on-bad-exit
wait
"""
COUNT_NODES = """
import ray, sys
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def node():
    return ray.get_runtime_context().get_node_id()
alive = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
print("nodes", len(alive), "cpus", ray.cluster_resources()["CPU"])
sys.exit(7 if len(alive) == int(sys.argv[1]) else 1)
"""
NUM_STEPS = 60


@pytest.fixture
def short_folder():
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket in it is limited to 107 bytes
        yield folder


@pytest.fixture
def job(tmp_path, short_folder):
    """Return start(*command): a process that runs the script as the first node of a Slurm job."""
    tools = {"srun": SRUN, "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n'}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    marker = secrets.token_hex(8)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))} | {
        MARKER: marker, "SPT_NOENV": "1", "RAY_TMPDIR": short_folder,
        "PATH": os.pathsep.join((str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"])),
        "SLURM_NNODES": str(NODES), "SLURM_JOB_ID": str(secrets.randbelow(9000)), "SLURM_CPUS_PER_TASK": "2",
    }  # fmt: skip

    def start(*command: str) -> subprocess.Popen[str]:
        script = ["bash", str(CLUSTER / "slurm" / "ray.sbatch"), *command]
        return subprocess.Popen(script, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    yield start
    remaining = marked_processes(marker)
    for process in remaining:
        process.kill()
    assert not remaining, "the script left processes behind"


@pytest.mark.ray
@pytest.mark.slow
def test_a_command_runs_on_all_nodes_and_its_status_is_that_of_the_job(job):
    process = job("python", "-c", COUNT_NODES, str(NODES))
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 7, output
    assert f"nodes {NODES} cpus {2 * NODES:.1f}" in output


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_that_reaches_the_time_limit_is_queued_again_and_resumes(job, training_shards, tmp_path):
    command = [
        *("python", "jobs/pretrain.py", "--recipe", "demo", "--data.sources", str(training_shards), "--resume", "auto"),
        *("--output_dir", str(tmp_path / "run"), "--train.num_steps", str(NUM_STEPS), "--train.micro_batch_size", "4"),
        *("--train.log_every", "2", "--train.preview_every", "0"),
    ]
    process = job(*command)
    lines = []
    while not (lines and lines[-1].startswith("step ")):
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    process.send_signal(signal.SIGUSR1)  # as Slurm does, ten minutes before the limit
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, output
    assert "SIGTERM: saving a checkpoint" in output
    assert (tmp_path / "requeued").read_text().startswith("requeue ")
    (checkpoint,) = (tmp_path / "run").glob("checkpoints/*/step_*/complete.json")
    step = json.loads(checkpoint.read_text())["step"]
    assert 0 < step < NUM_STEPS
    process = job(*command)  # as Slurm does with a job from its queue
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert f"training from step {step} of " in output
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in output
    assert json.loads((tmp_path / "run" / "train_summary.json").read_text())["num_samples_seen"] == NUM_STEPS * 8


def test_the_documented_command_names_the_script_and_can_be_parsed():
    commands = [words for block in blocks("docs/clusters.md") if block.is_shell for words in block.commands()]
    (words,) = [words for words in commands if words[0] == "sbatch"]
    assert (ROOT / words[1]).exists()
    assert words[2:4] == ["python", "jobs/pretrain.py"]
    assert pretrain.parse_arguments(words[4:]).config.train.resume == "auto"
