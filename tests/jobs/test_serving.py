"""An exported DiffDis as MLflow keeps it: what describes it, and that it loads and answers where nothing of ours is found."""

import base64
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model, convert_input_example_to_serving_input, validate_serving_input
from PIL import Image

from diffdis.config import ObjectiveConfig
from diffdis.pipeline import DiffDisPipeline
from diffdis.task import DiffDisTask
from diffdis_platform.serving.package import model_package, red_circle
from ray_platform.tracking import TrackingConfig, tracking_uri
from ray_platform.tracking.runs import SafeTracker
from tests.support.tiny_checkpoints import draw_query_weights

CLASSES = ["red heart", "blue star", "green tree"]


def write_export(tiny_model, folder, task="joint"):
    torch.manual_seed(0)
    made = DiffDisTask(tiny_model, ObjectiveConfig(task=task), ("red heart",))
    if task == "joint":
        draw_query_weights(made.module.model)
    made.save_pretrained(made.module.state_dict(), folder)
    return folder


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    return write_export(tiny_model, tmp_path_factory.mktemp("run") / "export")


@pytest.fixture(scope="module")
def logged(exported, tmp_path_factory):
    """(the store's client, the run's id, the path of what was stored)."""
    output = tmp_path_factory.mktemp("output")
    tracker = SafeTracker(TrackingConfig(registered_model="small"), str(output))
    tracker.describe("", {"recipe": "tiny"})
    tracker.log_metrics({"train/loss": 0.5}, step=7)
    tracker.log_model(str(exported), model_package("joint"))
    tracker.end("FINISHED")
    client = MlflowClient(tracking_uri(TrackingConfig(), str(output)))
    version = client.get_model_version("small", "1")
    path = client.get_logged_model(version.source.removeprefix("models:/")).artifact_location
    return client, tracker.run_id(), Path(path.removeprefix("file://"))


@pytest.fixture(scope="module")
def model(logged):
    return mlflow.pyfunc.load_model(str(logged[2]))


def picture(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_model_is_the_runs_in_the_registry_with_its_metrics(logged):
    client, run_id, _ = logged
    version = client.get_model_version("small", "1")
    assert (version.run_id, version.status, version.tags) == (run_id, "READY", {"recipe": "tiny"})
    made = client.get_logged_model(version.source.removeprefix("models:/"))
    assert (made.name, made.source_run_id, str(made.status)) == ("model", run_id, "READY")
    assert [(metric.key, metric.value, metric.step) for metric in made.metrics] == [("train/loss", 0.5, 7)]
    assert [output.model_id for output in client.get_run(run_id).outputs.model_outputs] == [
        version.source.removeprefix("models:/")
    ]


def test_it_is_described_and_holds_no_pickle(logged):
    signature = Model.load(str(logged[2])).signature
    assert {column.name: str(column.type) for column in signature.inputs} == {
        "image": "DataType.binary", "caption": "DataType.string",
    }  # fmt: skip
    assert {spec.name: spec.default for spec in signature.params}["templates"] == ["{c}"]
    assert {"class", "score", "image", "embedding"} <= set(signature.outputs.input_names())
    files = {str(path.relative_to(logged[2])) for path in logged[2].rglob("*") if path.is_file()}
    assert {"pyfunc_model.py", "artifacts/export/diffdis.json", "code/diffdis/pipeline.py", "input_example.json"} <= files
    assert not {file for file in files if file.endswith((".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".pyc"))}
    required = (logged[2] / "requirements.txt").read_text()
    assert f"torch=={torch.__version__.split('+')[0]}" in required


@pytest.mark.ranks
def test_it_loads_and_answers_where_only_it_is_found(logged, tmp_path):
    """In a fresh process without our paths: the code is what was stored with the model."""
    script = """
import json, sys
import mlflow.pyfunc
model = mlflow.pyfunc.load_model(sys.argv[1])
found = model.predict(model.input_example, params={"classes": ["red", "blue"], "num_steps": 2})
drawn = model.predict({"caption": "red heart"}, params={"task": "generate", "num_steps": 2})
import diffdis
print(json.dumps([diffdis.__file__, found["class"][0], found["score"][0], drawn["image"][0][:4].hex()]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", script, str(logged[2])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    file, chosen, score, start = json.loads(done.stdout.strip().splitlines()[-1])
    assert file == str(logged[2] / "code" / "diffdis" / "__init__.py")
    assert (chosen in ("red", "blue"), 0.5 <= score <= 1, start) == (True, True, "89504e47")


def test_it_classifies_draws_and_embeds_as_the_pipeline_does(model, exported):
    pipeline = DiffDisPipeline.from_pretrained(exported)
    images = [picture(seed) for seed in range(40)]  # more than a batch
    found = model.predict(pd.DataFrame({"image": images}), params={"classes": CLASSES, "templates": ["a {c}"], "num_steps": 3})
    opened = [Image.open(io.BytesIO(image)) for image in images]
    expected = pipeline.classify(opened, CLASSES, ["a {c}"], num_steps=3)
    torch.testing.assert_close(torch.tensor(found["scores"].tolist()), expected)
    assert list(found["class"]) == [CLASSES[place] for place in expected.argmax(dim=1)]
    torch.testing.assert_close(torch.tensor(found["score"].tolist()), expected.amax(dim=1))

    captions = [f"caption {number}" for number in range(34)]
    drawn = model.predict(pd.DataFrame({"caption": captions}), params={"task": "generate", "num_steps": 2, "seed": 3})
    there = pipeline.generate(captions, num_inference_steps=2, seed=3)
    pixels = [np.asarray(Image.open(io.BytesIO(content)), dtype=int) for content in drawn["image"]]
    assert max(int(np.abs(ours - np.asarray(theirs, dtype=int)).max()) for ours, theirs in zip(pixels, there, strict=True)) <= 1

    mixed = pd.DataFrame({"image": [images[0], None], "caption": [None, "red heart"]})
    embedded = torch.tensor(model.predict(mixed, params={"task": "embed", "num_steps": 2})["embedding"].tolist())
    torch.testing.assert_close(embedded[:1], pipeline.embed_image(opened[:1], num_steps=2))
    torch.testing.assert_close(embedded[1:], pipeline.embed_text(["red heart"]))


def test_what_cannot_be_answered_says_why(model):
    image = pd.DataFrame({"image": [picture(0), b"GIF89a no picture"]})
    with pytest.raises(ValueError, match="classes: empty"):
        model.predict(image)
    with pytest.raises(ValueError, match="image: row 1 is not a JPEG"):
        model.predict(image, params={"classes": CLASSES})
    with pytest.raises(ValueError, match="caption: missing in row 0"):
        model.predict(image, params={"task": "generate"})
    with pytest.raises(ValueError, match="task: 'draw' is unknown"):
        model.predict(image, params={"task": "draw"})
    with pytest.raises(MlflowException, match="num_steps"):
        model.predict(image, params={"num_steps": "many"})


def test_a_server_takes_the_example_as_json(logged):
    """Through MLflow's own scoring server, where pictures are base64."""
    rows = {"image": [red_circle()]}
    asked = convert_input_example_to_serving_input((pd.DataFrame(rows), {"classes": CLASSES}))
    [[sent]] = json.loads(asked)["dataframe_split"]["data"]
    assert base64.b64decode(sent) == red_circle()
    assert validate_serving_input(str(logged[2]), asked)["class"][0] in CLASSES
    asked = convert_input_example_to_serving_input(
        (pd.DataFrame({"caption": ["red heart"]}), {"task": "generate", "num_steps": 1})
    )
    drawn = validate_serving_input(str(logged[2]), asked)["image"][0]
    assert Image.open(io.BytesIO(drawn)).size == (16, 16)


def test_a_model_of_one_task_says_what_it_cannot(tiny_model, tmp_path):
    package = model_package("generation")
    assert package.params["task"] == "generate"
    tracker = SafeTracker(TrackingConfig(), str(tmp_path / "output"))
    tracker.log_model(str(write_export(tiny_model, tmp_path / "export", "generation")), package)
    client = MlflowClient(tracking_uri(TrackingConfig(), str(tmp_path / "output")))
    made = client.get_run(tracker.run_id()).outputs.model_outputs[0].model_id
    opened = mlflow.pyfunc.load_model(client.get_logged_model(made).artifact_location)
    assert opened.predict(opened.input_example, params={"num_steps": 1})["image"][0].startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="trained for generation alone"):
        opened.predict({"image": red_circle()}, params={"task": "classify", "classes": CLASSES})


def test_a_model_that_cannot_be_packed_is_a_warning(exported, tmp_path, caplog):
    tracker = SafeTracker(TrackingConfig(registered_model="small"), str(tmp_path))
    tracker.log_model(str(exported), dataclasses.replace(model_package("joint"), requirements=("no-such-package-at-all",)))
    assert "model failed" in caplog.text
    client = MlflowClient(tracking_uri(TrackingConfig(), str(tmp_path)))
    assert not client.search_registered_models()
    tracker.log_metrics({"train/loss": 1.0}, 1)
    assert client.get_run(tracker.run_id()).data.metrics == {"train/loss": 1.0}
