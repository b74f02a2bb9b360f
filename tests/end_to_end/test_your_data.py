"""The commands of docs/your_data.md, in its order, against a real S3 server that holds some shards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documentation import ROOT, Shell, blocks_run_by, readers_environment
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.support.training import write_shards

pytestmark = [pytest.mark.slow, pytest.mark.s3, pytest.mark.timeout(1800)]

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


def test_the_page(tmp_path):
    server = S3Server(tmp_path / "s3")
    server.start()
    try:
        walk(tmp_path, server)
    finally:
        server.stop()


def walk(tmp_path, server):
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
    # The page's reader stands in the checkout, with its environment active.
    shell = Shell(tmp_path, environment | {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}, words, start=ROOT)
    keys, inspect, train, encode = blocks_run_by(__file__, "docs/your_data.md")

    shell.run(keys)
    assert "4 of 4 shards inspected" in shell.run(inspect)
    assert json.loads(store("get", "s3://tests/my-inspection/inspection.json"))["samples"]["used"] == 240
    said = shell.run(train)
    assert '"shards": 4' in said
    assert "step 20/20" in said
    said = shell.run(encode)
    assert "4 of 4 shards, 240 samples" in said
    assert "step 20/20" in said
    for run in ("my-run", "my-second-run"):
        summary = json.loads(store("get", f"s3://tests/{run}/train_summary.json"))
        assert (summary["num_steps"], summary["skipped"]) == (20, {})
        assert store("get", f"s3://tests/{run}/export/diffdis.json")
