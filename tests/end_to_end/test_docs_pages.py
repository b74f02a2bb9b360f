"""The commands in the docs work when run page by page, in order, as a reader would run them.

docs/quickstart.md runs in a fresh clone of this repository with only the commands of that page. It installs from the network and
takes an hour on two cores. Half of it is `make test`, which is skipped only if DIFFDIS_TESTED_COMMIT is the cloned commit (for a
CI that has just run `make test` on it).
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image

from tests.support.documentation import ROOT, Shell, blocks_run_by, readers_environment
from tests.support.processes import free_ports
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.support.tiny_checkpoints import save_stable_diffusion
from tests.support.training import write_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]


def shell_in_checkout(tmp_path, words, environment):
    """Return a reader's shell in the checkout, with its environment active."""
    return Shell(tmp_path, environment | {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}, words, start=ROOT)


@contextlib.contextmanager
def mlflow_ui(shell, block, port):
    """Yield a client of the MLflow server that the page's command starts."""
    process, url, deadline = shell.start(block), f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            with contextlib.suppress(OSError):
                assert b"<title>MLflow</title>" in urllib.request.urlopen(url, timeout=20).read()
                break
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "the UI does not answer"
            time.sleep(0.2)
        yield MlflowClient(url)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)


def only_run(client, filter_string=""):
    (run,) = client.search_runs([client.get_experiment_by_name("diffdis").experiment_id], filter_string)
    return run


def test_quickstart(tmp_path, monkeypatch):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is not a git checkout, so it cannot be cloned")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    port, data, demo_run = free_ports(1)[0], tmp_path / "data", tmp_path / "diffdis" / "outputs" / "demo"
    data.mkdir()
    words = {"REPOSITORY": str(ROOT), "/tmp/my-": f"{data}/my-", "--port 5000": f"--port {port}"}
    shell = Shell(tmp_path, readers_environment(), words)
    demo, run, ui, evaluate, use, tests = blocks_run_by(__file__, "docs/quickstart.md")

    shell.run(demo)
    score = json.loads((demo_run / "summary.json").read_text())["zero_shot"]["heldout_style"]
    assert score["acc1"] > 5 * score["chance"]
    files = "grid.png export/diffdis.json config.yaml mlflow.db mlflow.json catalog.json train_summary.json"
    assert not [name for name in files.split() if not (demo_run / name).exists()]

    output = shell.run(run)
    assert '"starts_from": "the beginning"' in output, "the dry run says what would run"
    assert "step 160/160" in output
    assert f"done: the model is in {data / 'my-run' / 'export'}" in output
    config = yaml.safe_load((data / "my-run" / "config.yaml").read_text())
    assert (config["objective"]["lambda_alignment"], config["train"]["num_steps"]) == (0.5, 160)

    with mlflow_ui(shell, ui, port) as client:
        tracked = only_run(client, "params.`objective.lambda_alignment` = '0.5'")
        assert tracked.info.status == "FINISHED"
        curves = {"train/loss_generation", "train/loss_alignment", "alignment/retrieval_shuffled_images"}
        assert curves <= tracked.data.metrics.keys()
        previews = [file.path for file in client.list_artifacts(tracked.info.run_id, "previews")]
        assert "previews/step_00000160.png" in previews

    output = shell.run(evaluate)
    assert f"in {data / 'my-model'}; opens as DiffDisPipeline" in output
    images = ["000000.png", "000001.png", "captions.json", "grid.png"]
    assert sorted(path.name for path in (data / "my-images").iterdir()) == images
    assert (data / "my-evaluation" / "report.html").exists()
    assert f"done: {data / 'my-evaluation' / 'report.html'}" in output
    with mlflow_ui(shell, ui, port) as client:
        assert any(name.startswith("eval/") for name in only_run(client).data.metrics), "the evaluation is on its run"
    assert shell.run(use).count("tensor(") == 2

    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if os.environ.get("DIFFDIS_TESTED_COMMIT") != head:
        shell.run(tests)


# A separate process writes and reads the objects, because this process has no credentials.
STORE = """
import sys
from pathlib import Path
from ray_platform import storage
if sys.argv[1] == "put":
    storage.put_folder(Path(sys.argv[3]), sys.argv[2])
else:
    sys.stdout.buffer.write(storage.read_bytes(sys.argv[2]))
"""


@pytest.mark.s3
def test_your_data(tmp_path):
    """Runs against a real S3 server with some shards."""
    server = S3Server(tmp_path / "s3")
    server.start()
    try:
        train_on_own_data(tmp_path, server)
    finally:
        server.stop()


def train_on_own_data(tmp_path, server):
    environment = readers_environment()
    with_keys = environment | server.environment | {"PYTHONPATH": str(ROOT / "platform")}

    def store(*arguments):
        command = [sys.executable, "-c", STORE, *map(str, arguments)]
        return subprocess.run(command, env=with_keys, check=True, capture_output=True).stdout

    store("put", "s3://tests/my-shards", write_shards(tmp_path / "shards", num_shards=4, samples_per_shard=60))
    (tmp_path / "data").mkdir()
    words = {
        "MY_KEY": ACCESS_KEY, "MY_SECRET": SECRET_KEY, "https://s3.example.com": server.endpoint,
        "s3://my-bucket/": "s3://tests/", "/data/mlflow.db": f"{tmp_path}/data/mlflow.db",
    }  # fmt: skip
    shell = shell_in_checkout(tmp_path, words, environment)
    keys, inspect, train, encode = blocks_run_by(__file__, "docs/your_data.md")

    shell.run(keys)
    assert "4 of 4 shards inspected" in shell.run(inspect)
    assert json.loads(store("get", "s3://tests/my-inspection/inspection.json"))["samples"]["used"] == 240
    for block, line in ((train, '"shards": 4'), (encode, "4 of 4 shards, 240 samples")):
        output = shell.run(block)
        assert line in output
        assert "step 20/20" in output
    for run in ("my-run", "my-second-run"):
        summary = json.loads(store("get", f"s3://tests/{run}/train_summary.json"))
        assert (summary["num_steps"], summary["skipped"]) == (20, {})
        assert store("get", f"s3://tests/{run}/export/diffdis.json")


# Options that match the size of the small random weights and limit the run to a few steps on a CPU.
SMALL = """--recipe sd_v1_laion --model.image_size 16 --data.image_size 16
 --model.head.num_layers 1 --model.head.width 32 --model.head.num_heads 2
 --train.num_workers 1 --train.gpus_per_worker 0 --train.cpus_per_worker 0.5 --train.micro_batch_size 4 --train.num_steps 4
 --train.preview_every 0""".replace("\n", "")


def test_from_stable_diffusion(tmp_path):
    save_stable_diffusion(tmp_path / "stable-diffusion-v1")
    shards = write_shards(tmp_path / "shards")
    words = {
        "--recipe sd_v1_laion": SMALL, "/models/stable-diffusion-v1": f"{tmp_path}/stable-diffusion-v1",
        "/data/my-shards": str(shards), "/data/my-sd-": f"{tmp_path}/my-sd-", "/data/heart.png": f"{tmp_path}/heart.png",
    }  # fmt: skip
    shell = shell_in_checkout(tmp_path, words, readers_environment())
    train, export, use = blocks_run_by(__file__, "docs/from_stable_diffusion.md")

    assert f"done: the model is in {tmp_path}/my-sd-run/export" in shell.run(train)
    assert "opens as DiffDisPipeline, diffusers' StableDiffusionPipeline" in shell.run(export)
    shell.run(use)
    assert Image.open(tmp_path / "heart.png").size == (16, 16)
