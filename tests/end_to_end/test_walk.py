"""A newcomer's walk: the commands of docs/quickstart.md, in its order, in a clone of this repository with nothing but that page.

Put in place of the reader's own words are the repository's address, folders below /data, and the UI's port; all else is run as it
stands there. It installs from the network and takes an hour on two cores, half of it `make test`, which is left out only where
DIFFDIS_TESTED_COMMIT names the very commit that is cloned: for a CI that has just run `make test` on it.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request

import pytest
import yaml

from tests.support.documentation import ROOT, Shell, blocks_run_by, readers_environment
from tests.support.processes import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]


def git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout.strip()


class Ui:
    """What the page's command serves, until the end of a `with` block: MLflow's REST API, which its pages call, too."""

    def __init__(self, shell, block, port):
        self.shell, self.block, self.url = shell, block, f"http://127.0.0.1:{port}"

    def __enter__(self):
        self.process = self.shell.start(self.block)
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                assert b"<title>MLflow</title>" in self.get("/")
                return self
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline, "the UI does not answer"
            time.sleep(0.2)

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.communicate(timeout=60)

    def get(self, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as reply:
            return reply.read()

    def runs(self, experiment, filter_=""):
        """As the UI's table of an experiment's runs asks for them."""
        found = json.loads(self.get(f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={experiment}"))["experiment"]
        body = {"experiment_ids": [found["experiment_id"]], "filter": filter_}
        return json.loads(self.get("/api/2.0/mlflow/runs/search", body)).get("runs", [])

    def files(self, run, path):
        reply = json.loads(self.get(f"/api/2.0/mlflow/artifacts/list?run_id={run['info']['run_id']}&path={path}"))
        return [file["path"] for file in reply.get("files", [])]


def names(run, kind):
    return {entry["key"]: entry["value"] for entry in run["data"][kind]}


def check_demo(clone):
    summary = json.loads((clone / "outputs" / "demo" / "summary.json").read_text())
    assert summary["zero_shot"]["heldout_style"]["acc1"] > 5 * summary["zero_shot"]["heldout_style"]["chance"]
    for name in (
        "grid.png",
        "export/diffdis.json",
        "config.yaml",
        "mlflow.db",
        "mlflow.json",
        "catalog.json",
        "train_summary.json",
    ):
        assert (clone / "outputs" / "demo" / name).exists(), name


def check_run(said, data):
    assert '"starts_from": "the beginning"' in said, "the dry run says what would run"
    assert "step 160/160" in said
    assert f"done: the model is in {data / 'my-run' / 'export'}" in said
    config = yaml.safe_load((data / "my-run" / "config.yaml").read_text())
    assert (config["objective"]["lambda_alignment"], config["train"]["num_steps"]) == (0.5, 160)


def check_ui(ui):
    (run,) = ui.runs("diffdis", "params.`objective.lambda_alignment` = '0.5'")
    assert run["info"]["status"] == "FINISHED"
    curves = {"train/loss_generation", "train/loss_alignment", "alignment/retrieval_shuffled_images"}
    assert curves <= names(run, "metrics").keys()
    assert "previews/step_00000160.png" in ui.files(run, "previews")


def check_pictures_and_scores(said, data):
    assert f"in {data / 'my-model'}; opens as DiffDisPipeline" in said
    assert sorted(path.name for path in (data / "my-images").iterdir()) == [
        "000000.png",
        "000001.png",
        "captions.json",
        "grid.png",
    ]
    assert (data / "my-evaluation" / "report.html").exists()
    assert f"done: {data / 'my-evaluation' / 'report.html'}" in said


def test_the_walk(tmp_path):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout, so that it cannot be cloned")
    port, data, clone = free_ports(1)[0], tmp_path / "data", tmp_path / "diffdis"
    data.mkdir()
    words = {"REPOSITORY": str(ROOT), "/data/my-": f"{data}/my-", "--port 5000": f"--port {port}"}
    shell = Shell(tmp_path, readers_environment(), words)
    demo, run, ui, evaluate, use, tests = blocks_run_by(__file__, "docs/quickstart.md")

    shell.run(demo)
    check_demo(clone)
    check_run(shell.run(run), data)
    with Ui(shell, ui, port) as served:
        check_ui(served)
    check_pictures_and_scores(shell.run(evaluate), data)
    with Ui(shell, ui, port) as served:
        (found,) = served.runs("diffdis")
        assert any(name.startswith("eval/") for name in names(found, "metrics")), "the evaluation is on the run that it is of"
    assert shell.run(use).count("tensor(") == 2
    if os.environ.get("DIFFDIS_TESTED_COMMIT") == git("rev-parse", "HEAD"):
        return
    shell.run(tests)
