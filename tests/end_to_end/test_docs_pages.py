"""The commands of the docs, page by page in their order, as a reader would run them.

docs/quickstart.md is walked in a clone of this repository with nothing but that page: it installs from the network and takes an
hour on two cores, half of it `make test`, which is left out only where DIFFDIS_TESTED_COMMIT names the commit that is cloned (for
a CI that has just run `make test` on it).
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
from tests.support.tiny_checkpoints import WIDTH, save_stable_diffusion
from tests.support.training import write_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]


def shell_in_checkout(tmp_path, words, environment):
    """A shell of a reader who stands in the checkout, with its environment active."""
    return Shell(tmp_path, environment | {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}, words, start=ROOT)


@contextlib.contextmanager
def mlflow_ui(shell, block, port):
    """A client of what the page's command serves."""
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
    words = {"REPOSITORY": str(ROOT), "/data/my-": f"{data}/my-", "--port 5000": f"--port {port}"}
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


# Put there, and read back, by a process of its own: this one has no credentials.
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
    """Against a real S3 server that holds some shards."""
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


# What describes the random weights in Stable Diffusion's layout, and a run of some steps on a CPU.
SMALL = f"""--recipe sd_v1_laion --model.image_size 16 --data.image_size 16 --model.unet.sample_size 8
 --model.unet.block_out_channels [16,32] --model.unet.layers_per_block 1
 --model.unet.down_block_types '["CrossAttnDownBlock2D","DownBlock2D"]'
 --model.unet.up_block_types '["UpBlock2D","CrossAttnUpBlock2D"]'
 --model.unet.attention_head_dim 2 --model.unet.norm_num_groups 8
 --model.text_encoder.token_dim {WIDTH} --model.text_encoder.embedding_dim {WIDTH}
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
    assert "opens as DiffDisPipeline, diffusers' UNet2DConditionModel, diffusers' StableDiffusionPipeline" in shell.run(export)
    shell.run(use)
    assert Image.open(tmp_path / "heart.png").size == (16, 16)
