"""An exported DiffDis in MLflow has complete metadata, and loads and predicts where the project is not installed."""

import base64
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
from diffdis_platform.config.pretrain import model_package, red_circle
from diffdis_platform.serving.pyfunc_model import DiffDisModel
from ray_platform.tracking import TrackingConfig, start_run, tracking_uri
from tests.ray_platform.conftest import png
from tests.support.tiny_checkpoints import draw_query_weights

CLASSES = ["red heart", "blue star", "green tree"]
USE = """
import json, sys
import mlflow.pyfunc
model = mlflow.pyfunc.load_model(sys.argv[1])
found = model.predict(model.input_example, params={"classes": ["red", "blue"], "num_steps": 2})
drawn = model.predict({"caption": "red heart"}, params={"task": "generate", "num_steps": 2})
import diffdis
print(json.dumps([diffdis.__file__, found["class"][0], found["score"][0], drawn["image"][0][:4].hex()]))
"""


def write_export(tiny_model, folder, trained_for="joint"):
    torch.manual_seed(0)
    task = DiffDisTask(tiny_model, ObjectiveConfig(task=trained_for), ("red heart",))
    if trained_for == "joint":
        draw_query_weights(task.module.model)
    task.save_pretrained(task.module.state_dict(), folder)
    return folder


def opened(content):
    return Image.open(io.BytesIO(content))


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    return write_export(tiny_model, tmp_path_factory.mktemp("run") / "export")


@pytest.fixture(scope="module")
def logged(exported, tmp_path_factory):
    """(client of the store, run id, logged model, folder of the model)."""
    output = tmp_path_factory.mktemp("output")
    with start_run(TrackingConfig(registered_model="small"), str(output)) as tracker:
        tracker.describe("", {"recipe": "tiny"})
        tracker.log_metrics({"train/loss": 0.5}, step=7)
        tracker.log_model(str(exported), model_package("joint"))
    client = MlflowClient(tracking_uri(TrackingConfig(), str(output)))
    model = client.get_logged_model(client.get_model_version("small", "1").source.removeprefix("models:/"))
    return client, tracker.run_id(), model, Path(model.artifact_location.removeprefix("file://"))


@pytest.fixture(scope="module")
def model(logged):
    return mlflow.pyfunc.load_model(str(logged[3]))


def test_the_model_is_the_runs_in_the_registry_with_its_metrics(logged):
    client, run_id, model, _ = logged
    version = client.get_model_version("small", "1")
    assert (version.run_id, version.status, version.tags) == (run_id, "READY", {"recipe": "tiny"})
    assert (model.name, model.source_run_id, str(model.status)) == ("model", run_id, "READY")
    assert [(metric.key, metric.value, metric.step) for metric in model.metrics] == [("train/loss", 0.5, 7)]
    assert [output.model_id for output in client.get_run(run_id).outputs.model_outputs] == [model.model_id]


def test_it_is_described_and_holds_no_pickle(logged):
    folder = logged[3]
    signature = Model.load(str(folder)).signature
    columns = {column.name: str(column.type) for column in signature.inputs}
    assert columns == {"image": "DataType.binary", "caption": "DataType.string"}
    assert {spec.name: spec.default for spec in signature.params}["templates"] == ["{c}"]
    assert {"class", "score", "image", "embedding"} <= set(signature.outputs.input_names())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"pyfunc_model.py", "artifacts/export/diffdis.json", "code/diffdis/pipeline.py", "input_example.json"} <= files
    assert not {file for file in files if file.endswith((".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".pyc"))}
    assert f"torch=={torch.__version__.split('+')[0]}" in (folder / "requirements.txt").read_text()


@pytest.mark.ranks
def test_it_loads_and_answers_in_a_process_without_the_project(logged, tmp_path):
    folder = logged[3]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", USE, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    file, chosen, score, start = json.loads(done.stdout.strip().splitlines()[-1])
    assert file == str(folder / "code" / "diffdis" / "__init__.py")
    assert (chosen in ("red", "blue"), 0.5 <= score <= 1, start) == (True, True, "89504e47")


def test_it_classifies_draws_and_embeds_as_the_pipeline_does(model, exported):
    pipeline = DiffDisPipeline.from_pretrained(exported)
    contents = [png(seed) for seed in range(34)]  # more than one batch
    images = [opened(content) for content in contents]
    params = {"classes": CLASSES, "templates": ["a {c}"], "num_steps": 2}
    answers = model.predict(pd.DataFrame({"image": contents}), params=params)
    expected = pipeline.classify(images, CLASSES, ["a {c}"], num_steps=2)
    torch.testing.assert_close(torch.tensor(answers["scores"].tolist()), expected)
    assert list(answers["class"]) == [CLASSES[place] for place in expected.argmax(dim=1)]
    torch.testing.assert_close(torch.tensor(answers["score"].tolist()), expected.amax(dim=1))

    captions = [f"caption {number}" for number in range(34)]
    drawn = model.predict(pd.DataFrame({"caption": captions}), params={"task": "generate", "num_steps": 2, "seed": 3})["image"]
    for content, image in zip(drawn, pipeline.generate(captions, num_inference_steps=2, seed=3), strict=True):
        np.testing.assert_allclose(np.asarray(opened(content), dtype=int), np.asarray(image, dtype=int), atol=1)

    mixed = pd.DataFrame({"image": [contents[0], None], "caption": [None, "red heart"]})
    embedded = torch.tensor(model.predict(mixed, params={"task": "embed", "num_steps": 2})["embedding"].tolist())
    torch.testing.assert_close(embedded[:1], pipeline.embed_image(images[:1], num_steps=2))
    torch.testing.assert_close(embedded[1:], pipeline.embed_text(["red heart"]))


def test_an_error_names_the_row_of_the_input_whatever_the_other_rows_have(model):
    rows = pd.DataFrame({"image": [None] * 40 + [b"no image"], "caption": ["red heart"] * 41}, index=range(100, 141))
    with pytest.raises(ValueError, match="image: row 40 is not a JPEG"):
        model.predict(rows, params={"task": "embed"})
    rows = pd.DataFrame({"image": [None] * 33 + [png(0)] + [None] * 7, "caption": ["red heart"] * 38 + [None] * 3})
    with pytest.raises(ValueError, match="caption: missing in row 38"):
        model.predict(rows, params={"task": "embed", "num_steps": 1})


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ValueError, "classes: empty"),
        ({"classes": CLASSES}, ValueError, "image: row 1 is not a JPEG"),
        ({"task": "generate"}, ValueError, "caption: missing in row 0"),
        ({"task": "draw"}, ValueError, "task: 'draw' is unknown"),
        ({"num_steps": "many"}, MlflowException, "num_steps"),
    ],
)
def test_what_cannot_be_answered_says_why(model, params, error, message):
    with pytest.raises(error, match=message):
        model.predict(pd.DataFrame({"image": [png(0), b"GIF89a no image"]}), params=params)


def test_a_server_takes_the_example_as_json(logged):
    """Uses MLflow's scoring server, where images are base64."""
    request = convert_input_example_to_serving_input((pd.DataFrame({"image": [red_circle()]}), {"classes": CLASSES}))
    [[sent]] = json.loads(request)["dataframe_split"]["data"]
    assert base64.b64decode(sent) == red_circle()
    assert validate_serving_input(str(logged[3]), request)["class"][0] in CLASSES
    rows = pd.DataFrame({"caption": ["red heart"]})
    request = convert_input_example_to_serving_input((rows, {"task": "generate", "num_steps": 1}))
    assert opened(validate_serving_input(str(logged[3]), request)["image"][0]).size == (16, 16)


def test_a_model_of_one_task_says_what_it_cannot(tiny_model, tmp_path):
    package = model_package("generation")
    model = DiffDisModel()
    model.load_context(SimpleNamespace(artifacts={"model": str(write_export(tiny_model, tmp_path / "export", "generation"))}))
    drawn = model.predict(None, pd.DataFrame(package.example), package.params | package.example_params | {"num_steps": 1})
    assert drawn["image"][0].startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="trained for generation alone"):
        model.predict(None, pd.DataFrame({"image": [red_circle()]}), {"task": "classify", "classes": CLASSES})


def test_a_model_that_cannot_be_packed_is_a_warning(exported, tmp_path, caplog):
    package = dataclasses.replace(model_package("joint"), requirements=("no-such-package-at-all",))
    with start_run(TrackingConfig(registered_model="small"), str(tmp_path)) as tracker:
        tracker.log_model(str(exported), package)
        tracker.log_metrics({"train/loss": 1.0}, 1)
    assert "no-such-package-at-all" in caplog.text
    client = MlflowClient(tracking_uri(TrackingConfig(), str(tmp_path)))
    assert not client.search_registered_models()
    assert client.get_run(tracker.run_id()).data.metrics == {"train/loss": 1.0}
