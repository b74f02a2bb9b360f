"""jobs/eval.py on small sets in common layouts: scores, their independence of workers and batches, and rejected inputs."""

import base64
import contextlib
import csv
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from diffdis.config import ObjectiveConfig
from diffdis.pipeline import DiffDisPipeline
from diffdis.task import DiffDisTask
from diffdis_platform.commands.eval import parse_arguments as parse
from diffdis_platform.evaluation.results import benchmark_mean, render_results
from diffdis_platform.evaluation.run import evaluate, plan_evaluation
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate.unit_work import GenerateImages
from tests.support.evaluation_sets import encoded, picture, write_all_twelve, write_wds
from tests.support.tiny_checkpoints import draw_query_weights, save_clip

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "blue", "gold", "pink", "grey", "teal", "lime")
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    """An untrained model in a run folder with an MLflow run."""
    torch.manual_seed(1)
    task = DiffDisTask(tiny_model, ObjectiveConfig())
    draw_query_weights(task.module.model)
    run = tmp_path_factory.mktemp("run")
    task.save_pretrained(task.module.state_dict(), run / "export")
    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.create_experiment("diffdis", artifact_location=str(run / "mlartifacts"))
    run_id = client.create_run(experiment).info.run_id
    tracked = {"tracking_uri": f"sqlite:///{run}/mlflow.db", "experiment": "diffdis", "run_id": run_id}
    (run / "mlflow.json").write_text(json.dumps(tracked))
    (run / "train_summary.json").write_text(json.dumps({"num_steps": 12}))
    return run / "export"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two small user-defined sets, one of which has a truncated image, and pairs for retrieval."""
    root = tmp_path_factory.mktemp("data")
    images = [picture(i) for i in range(150)]
    images[7] = encoded(images[7])[:60]
    labels = [i % 7 for i in range(150)]
    write_wds(root, "mine", images, labels=labels, classes=COLOURS, templates=["a {c}.", "the {c}"], samples_per_shard=40)
    captions = [[f"picture {i}, caption {j}" for j in range(3)] for i in range(60)]
    write_wds(root, "pairs", [picture(1000 + i) for i in range(60)], captions=captions, samples_per_shard=25)
    (root / "both.yaml").write_text("sets: [mine, pairs]\n")
    (root / "prompts.txt").write_text("".join(f"a {colour} {i}\n" for i in range(10) for colour in COLOURS[:4]))
    return root


def run(exported, data, output_dir, *more):
    arguments = ["--checkpoint", str(exported), "--suite", str(data / "both.yaml"), "--data_roots", str(data)]
    arguments += ["--output_dir", str(output_dir), "--name", "diffdis", "--cpus_per_worker", "0.5", *map(str, more)]
    config = parse(arguments).config
    return evaluate(config, plan_evaluation(config))


QUALITY = ("--quality.num_steps", 2, "--quality.guidance_scales", "[1.0,2.0]")


def with_quality(data):
    return ("--quality.prompts", data / "prompts.txt", "--quality.reference", data / "wds_pairs", *QUALITY)


def scores(details):
    """Return all scores by (set, model) or guidance scale."""
    found = {(e["set"], e["model"]): e["metrics"] for e in (*details["zero_shot"], *details["retrieval"])}
    return found | {entry["guidance_scale"]: entry["metrics"] for entry in details["quality"]}


@pytest.fixture(scope="module")
def whole(exported, data, tmp_path_factory):
    """(output folder, details) of an evaluation by two workers with the default batch size."""
    output = tmp_path_factory.mktemp("whole")
    return output, run(exported, data, output, "--num_workers", 2, *with_quality(data))


def test_scores_are_those_of_a_plain_loop_over_the_images(exported, whole):
    """The plain loop passes one image at a time through the pipeline, without shards, workers, units or batches."""
    pipeline = DiffDisPipeline.from_pretrained(exported)
    classes = pipeline.embed_classes(COLOURS, ["a {c}.", "the {c}"])
    right = 0
    for i in range(150):
        if i != 7:
            query = pipeline.embed_image(picture(i), keys=[f"mine/{_key(i)}"])
            right += int((query @ classes.T).argmax()) == i % 7
    (entry,) = whole[1]["zero_shot"]
    assert entry["metrics"]["acc1"] == right / 150, "the image that cannot be read counts as wrong"


def _key(number):
    return f"{number // 40}.tar/s{number:07d}"


@pytest.mark.slow
def test_no_digit_depends_on_the_workers_or_on_one_that_is_killed(exported, data, whole, tmp_path):
    """The test of the reference file covers one worker."""
    thread = threading.Thread(target=_kill_a_replica, daemon=True)
    thread.start()
    many = run(exported, data, tmp_path / "many", "--num_workers", 3, *with_quality(data))
    thread.join(timeout=60)
    assert scores(many) == scores(whole[1])
    assert not thread.is_alive(), "a replica was killed"


def _kill_a_replica():
    """Kill a replica one second after it was first seen running a unit."""
    while True:
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ReplicaActor.run_unit" in " ".join(process.cmdline()):
                    found.append(process)
        if found:
            time.sleep(1.0)
            random.choice(found).send_signal(signal.SIGKILL)
            return
        time.sleep(0.02)


def test_the_results_are_complete(whole, exported):
    output, details = whole
    (entry,) = details["zero_shot"]
    assert (entry["n"], entry["num_unreadable"]) == (150, 1)
    assert entry["unreadable"] == [{"key": _key(7), "cause": "image_undecodable"}]
    assert sum(row["count"] for row in entry["per_class"]) == 150
    examples = [example for confusion in entry["confusions"] for example in confusion["examples"]]
    assert examples
    assert all(base64.b64decode(example["jpeg"]).startswith(b"\xff\xd8") for example in examples if example["key"] != _key(7))
    assert entry["examples"]
    assert all(base64.b64decode(example["jpeg"]).startswith(b"\xff\xd8") for example in entry["examples"])
    (pairs,) = details["retrieval"]
    assert (pairs["num_images"], pairs["num_texts"]) == (60, 180)
    assert {e["guidance_scale"]: e["n"] for e in details["quality"]} == {1.0: 40, 2.0: 40}
    assert {"networks", "image_size", "prompts_digest", "guidance_scale", "seed"} <= set(details["quality"][0]["protocol"])
    assert len(details["quality"][0]["samples"]) == 40
    assert "teal" in (output / "report.html").read_text()
    saved = json.loads((output / "results" / "diffdis" / "mine.json").read_text())
    assert saved["metrics"] == entry["metrics"]
    assert {row["dataset"] for row in csv.DictReader((output / "results.csv").open())} == {"mine", "pairs"}
    assert "mine" in render_results(details)


def test_the_run_that_made_the_model_has_the_figures_and_the_report(whole, exported):
    tracked = json.loads((exported.parent / "mlflow.json").read_text())
    client = MlflowClient(tracked["tracking_uri"])
    history = client.get_metric_history(tracked["run_id"], "eval/mine/acc1")
    (entry,) = whole[1]["zero_shot"]
    assert {(metric.step, metric.value) for metric in history} == {(12, entry["metrics"]["acc1"])}
    tags, (model, *_) = client.get_run(tracked["run_id"]).data.tags, whole[1]["models"]
    assert (tags["eval/step_12/checkpoint"], tags["eval/step_12/weights_digest"]) == (str(exported), model["weights_digest"])
    assert tags["eval/step_12/seed"] == "0"
    assert f"mine {entry['data_digest']}, pairs " in tags["eval/step_12/data_digests"]
    assert {f.path for f in client.list_artifacts(tracked["run_id"], "evaluation")} >= {"evaluation/report.html"}


def test_what_was_done_is_not_done_again_and_a_reference_file_serves_later(exported, data, whole, tmp_path, capsys):
    output, details = whole
    again = run(exported, data, output, "--num_workers", 1, *with_quality(data))
    assert scores(again) == scores(details)
    assert "units" not in capsys.readouterr().out, "every unit was kept"
    assert again["units"]["num_reused"] == again["units"]["num_units"] == details["units"]["num_units"]
    assert details["units"]["num_reused"] == 0
    saved = json.loads((output / "results" / "diffdis" / "mine.json").read_text())["units"]
    assert saved["num_reused"] == saved["reused"][0]["num_units"] == saved["num_units"] > 1
    assert saved["reused"][0]["code_version"] == details["code_version"]
    reference = output / "reference_efficientnet_lite0.npz"
    arguments = ("--quality.prompts", data / "prompts.txt", "--quality.reference", reference, *QUALITY)
    assert scores(run(exported, data, tmp_path, "--num_workers", 1, *arguments)) == scores(details)


def test_new_weights_at_the_path_of_the_judge_or_a_baseline_are_new_units(exported, data, tmp_path):
    """Nothing that was computed with the old weights is reused."""
    clip, keys = save_clip(tmp_path / "clip"), []
    arguments = ["--checkpoint", exported, "--suite", data / "both.yaml", "--data_roots", data, "--output_dir", tmp_path / "out"]
    arguments += ["--name", "diffdis", "--baselines", f'["{clip}"]', "--quality.clip", clip, *with_quality(data)]
    for _ in range(2):
        plan = plan_evaluation(parse([str(argument) for argument in arguments]).config)
        keys.append({one.group.partition(" num_steps")[0]: {unit.key for unit in one.units} for one in plan.of_sets})
        keys[-1]["quality"] = {unit.key for unit in plan.quality.units}
        weights = load_file(clip / "model.safetensors")
        save_file({name: value * 1.01 for name, value in weights.items()}, clip / "model.safetensors", {"format": "pt"})
    old, new = keys
    assert old["diffdis/mine"] == new["diffdis/mine"]
    assert old["clip/mine"].isdisjoint(new["clip/mine"])
    generated = [unit for unit in plan.quality.units if isinstance(unit.work, GenerateImages)]
    assert len(generated) == len(new["quality"] - old["quality"]) > 1


@pytest.mark.slow
def test_an_evaluation_killed_after_two_of_three_sets_leaves_their_results_and_completes(exported, tmp_path, ray_cluster):
    for name, count in (("one", 60), ("two", 60), ("three", 1500)):
        texts = {"classes": COLOURS, "templates": ["a {c}."]}
        write_wds(tmp_path, name, [picture(i) for i in range(count)], labels=[i % 7 for i in range(count)], **texts)
    (tmp_path / "three.yaml").write_text("sets: [one, two, three]\n")
    output = tmp_path / "out"
    arguments = ["--checkpoint", str(exported), "--suite", str(tmp_path / "three.yaml"), "--data_roots", str(tmp_path)]
    arguments += ["--output_dir", str(output), "--name", "diffdis", "--num_workers", "1", "--cpus_per_worker", "0.5"]
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    process = subprocess.Popen([sys.executable, str(ROOT / "jobs" / "eval.py"), *arguments], env=environment)
    try:
        deadline = time.monotonic() + 300
        while len(list(output.glob("results/diffdis/*.json"))) < 2:  # two are in flight at a time, and end in any order
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert {path.stem for path in output.glob("results/diffdis/*.json")} == {"one", "two"}
    predictions = {"one.parquet", "one-confusion.npz", "two.parquet", "two-confusion.npz"}
    assert {path.name for path in output.glob("predictions/diffdis/*")} == predictions
    config = parse(arguments).config
    details = evaluate(config, plan_evaluation(config))
    assert {path.stem for path in output.glob("results/diffdis/*.json")} == {"one", "two", "three"}
    assert {row["dataset"] for row in csv.DictReader((output / "results.csv").open())} == {"one", "two", "three"}
    assert 2 <= details["units"]["num_reused"] < details["units"]["num_units"]


@pytest.mark.slow
def test_a_clip_and_the_curve_of_steps_and_draws_come_from_the_same_code(exported, data, tmp_path):
    clip = save_clip(tmp_path / "small-clip")
    curve = ("--curve_set", "mine", "--curve_steps", "[1,3]", "--curve_draws", "[1,2]")
    details = run(exported, data, tmp_path / "out", "--num_workers", 1, "--baselines", clip, *curve)
    assert {entry["model"] for entry in details["zero_shot"]} == {"diffdis", "small-clip"}
    assert {entry["model"] for entry in details["retrieval"]} == {"diffdis", "small-clip"}
    assert [(e["num_draws"], e["num_steps"]) for e in details["curve"]] == [(1, 1), (1, 3), (2, 1), (2, 3)]


@pytest.mark.slow
def test_all_twelve_sets_in_their_own_layouts_give_their_mean(exported, tmp_path):
    """One image per class. The sets have fewer images than the published ones, which must be allowed explicitly."""
    root = tmp_path / "data"
    write_all_twelve(root)
    arguments = ["--checkpoint", str(exported), "--data_roots", str(root), "--output_dir", str(tmp_path / "out")]
    arguments += [
        "--cpus_per_worker",
        "0.5",
        "--num_workers",
        "2",
        "--name",
        "diffdis",
        "--allow_missing",
        "true",
        "--scoring.num_steps",
        "1",
    ]
    config = parse(arguments).config
    assert "vtab/cifar10: 10 images were read, but the set has 10,000" in refusal(arguments)
    config = dataclasses.replace(config, allow_short=True)
    details = evaluate(config, plan_evaluation(config))
    assert len(details["zero_shot"]) == 12
    main = [entry["metrics"][entry["main_metric"]] for entry in details["zero_shot"]]
    assert details["means"]["diffdis"] is None, "short sets are in no mean"
    complete = [entry | {"is_complete": True} for entry in details["zero_shot"]]
    assert benchmark_mean("diffdis", complete) == pytest.approx(np.mean(main), rel=1e-12)


def refusal(arguments):
    """Return the error that is reported before anything is measured."""
    with pytest.raises((ConfigError, DataError)) as error:
        plan_evaluation(parse([str(argument) for argument in arguments]).config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output_dir", ""], ["output_dir: empty; give an absolute folder"]),
        (["--checkpoint", ""], ["checkpoint: give an exported model"]),
        (["--suite", "none.yaml"], ["none.yaml"]),
        (["--suite", "huge"], ["suite: huge is none of paper, quick, demo, not the name of a known set", "and not a .yaml file"]),
        (["--checkpoint", "{data}"], ["is not a complete checkpoint"]),
        (["--suite", "cifar10,vtab/pets"], ["suite: cifar10 is none of", "did you mean vtab/cifar10?"]),
        (["--suite", "vtab/cifar1O"], ["did you mean vtab/cifar10?"]),
        (["--suite", "quick"], ["vtab/cifar10: not found below", "--allow_missing true"]),
        (["--baselines", "{data}"], ["has no config.json"]),
        (["--curve_set", "pairs"], ["curve_set: pairs is not a zero-shot set"]),
        (["--quality.prompts", "{data}/prompts.txt"], ["quality.reference: give the real images"]),
        (
            ["--quality.reference", "{data}/wds_mine", "--quality.prompts", "{data}/one.txt"],
            ["quality.prompts: ", "one.txt has 1 prompt; give at least 2"],
        ),
        (
            [
                "--quality.reference", "{data}/wds_mine", "--quality.prompts", "{data}/prompts.txt",
                "--quality.networks", '["inception"]', "--quality.inception", "{data}/one.txt",
            ],
            ["one.txt", "6726825d"],
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_each(exported, data, tmp_path, arguments, words):
    (data / "one.txt").write_text("a cat\n")
    base = ["--checkpoint", exported, "--output_dir", tmp_path, "--data_roots", data, "--suite", data / "both.yaml"]
    message = refusal([*base, *(argument.replace("{data}", str(data)) for argument in arguments)])
    assert all(word in message for word in words)


def test_statistics_of_another_protocol_are_refused(exported, data, whole, tmp_path):
    output, _ = whole
    with np.load(output / "reference_efficientnet_lite0.npz") as found:
        other = dict(found)
    protocol = json.loads(str(other["protocol"])) | {"image_size": 256}
    np.savez(tmp_path / "reference.npz", features=other["features"], protocol=np.array(json.dumps(protocol)))
    arguments = ["--checkpoint", exported, "--suite", data / "both.yaml", "--data_roots", data, "--output_dir", tmp_path / "out"]
    arguments += ["--quality.prompts", data / "prompts.txt", "--quality.reference", tmp_path / "reference.npz"]
    line = refusal(arguments)
    assert "image_size" in line
    assert "256" in line
    assert "16" in line
