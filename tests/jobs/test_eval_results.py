"""Results of an evaluation without a cluster: what fails is one line, and every set's results exist when it is finished."""

import csv
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffdis.config import ObjectiveConfig
from diffdis.task import DiffDisTask
from diffdis_platform.config.evaluate import EvalConfig, QualityConfig
from diffdis_platform.evaluation.measurements import RetrievalMeasurement, ZeroShotMeasurement
from diffdis_platform.evaluation.models import open_baseline, open_model
from diffdis_platform.evaluation.quality import QualityMeasurement, read_prompts
from diffdis_platform.evaluation.results import EvaluationPlan, EvaluationResults, render_results, step_scores
from diffdis_platform.evaluation.run import write_outputs
from ray_platform.contracts import ConfigError
from ray_platform.evaluate.discovery import find_evaluation_set, open_evaluation_set
from ray_platform.evaluate.results import check_not_taken, metrics_for_tracking
from ray_platform.evaluate.sets import KNOWN_SETS
from ray_platform.evaluate.unit_work import WorkerModels
from ray_platform.replicas import UnitResult, WorkQueue
from ray_platform.report.evaluation import evaluation_page
from tests.support.evaluation_sets import class_names, encoded, picture, write_own, write_retrieval, write_wds
from tests.support.html_page import Page
from tests.support.tiny_checkpoints import draw_query_weights, save_clip, save_siglip

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A CLIP, one with other weights, and one whose training diverged."""
    root = tmp_path_factory.mktemp("models")
    folders = [save_clip(root / name) for name in ("good", "other", "diverged")]
    for folder, scale in zip(folders[1:], (1.3, float("nan")), strict=True):
        weights = load_file(folder / "model.safetensors")
        changed = {name: value * scale if name == "visual_projection.weight" else value for name, value in weights.items()}
        changed["text_projection.weight"] = weights["text_projection.weight"].roll(int(10 * scale) if scale == scale else 0, 0)
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return [open_baseline(str(folder), set()) for folder in folders]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Three sets: the first and the last for classification, and one for retrieval."""
    root = tmp_path_factory.mktemp("sets")
    folders = {"first": write_own(root / "a", 12), "pairs": write_retrieval(root, "pairs", 9), "last": write_own(root / "b", 15)}
    return {name: open_evaluation_set(name, str(folder)) for name, folder in folders.items()}


@pytest.fixture
def plan(models, sets):
    plan = EvaluationPlan(models[0], models[1:], sets)
    for data in sets.values():
        for model in models:
            if data.task == "zeroshot_classification":
                plan.zero_shot.append(ZeroShotMeasurement(model, data))
            else:
                plan.retrieval.append(RetrievalMeasurement(model, data))
    return plan


def run_units(plan, results, finished=lambda: None):
    """Run all units in the order of the queue in this process, and call `finished` when a set is finished."""
    replica = WorkerModels(plan.builders, 1, "cpu")
    for unit in WorkQueue(results.units).waiting:
        rows = unit.work.run(replica) | {"seconds": np.array([0.1])}
        if results.add(UnitResult(unit, rows)):
            finished()


def test_a_diverged_model_is_one_line_for_each_set_and_the_others_have_results(plan):
    results = EvaluationResults(plan)
    run_units(plan, results)
    details = results.finish()
    assert len(details["failures"]) == 3
    assert all(line.split(": ")[1].startswith("diverged has NaN embeddings, such as") for line in details["failures"])
    assert {result["model"] for result in details["zero_shot"]} == {"good", "other"}
    assert [result["model"] for result in details["retrieval"]] == ["good", "other"]
    assert len(details["zero_shot"]) == 4


def test_a_metric_that_fails_does_not_end_the_evaluation(plan, monkeypatch):
    def fail(self):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(RetrievalMeasurement, "result", fail)
    results = EvaluationResults(plan)
    run_units(plan, results)
    details = results.finish()
    assert len(details["zero_shot"]) == 4
    assert "good/pairs: LinAlgError: did not converge" in details["failures"]


def test_the_results_of_a_set_exist_when_it_is_finished(plan, tmp_path):
    """Whatever ends the evaluation later leaves the files of the finished sets."""
    results, states = EvaluationResults(plan), []

    def finished():
        write_outputs(str(tmp_path), results.details(), time.monotonic())
        files = {path.stem for path in tmp_path.glob("results/good/*.json")}
        table = (tmp_path / "results.csv").read_text()
        report = (tmp_path / "report.html").read_text()
        assert all(f"\n{name},good" in table and name in report for name in files)
        states.append((files, "not measured yet" in report))

    run_units(plan, results, finished)
    assert states == [({"first"}, True), ({"first", "pairs"}, True), ({"first", "pairs", "last"}, False)]


def test_nan_features_of_one_guidance_scale_leave_the_other_results(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(12)))
    write_retrieval(tmp_path, "real", 12)
    config = QualityConfig(
        prompts=str(tmp_path / "prompts.txt"), reference=str(tmp_path / "wds_real"), guidance_scales=(1.0, 2.0, 3.0)
    )
    measurement = QualityMeasurement(models[0], models[0], 16, config, read_prompts(config), str(tmp_path / "out"))
    rng = np.random.default_rng(0)
    for unit in measurement.units:
        features = rng.standard_normal((12, 1280)).astype(np.float32)
        rows = {
            "keys": np.arange(12).astype(str),
            "contents": np.arange(12).astype(str),
            "features/efficientnet_lite0": features,
            "alignment": rng.random(12),
            "seconds": np.ones(1),
        }
        if unit.group == "images at guidance 1":
            rows["features/efficientnet_lite0"][4] = np.nan
        if unit.group == "images at guidance 2":
            rows["alignment"][0] = np.nan
        measurement.add(unit, rows)
    failures = {measurement.group_of(3.0): "3 workers died"}
    first, second = measurement.results(failures)
    assert set(first["metrics"]) == {"alignment"}
    assert "alignment" not in second["metrics"]
    assert second["metrics"]["fd_efficientnet_lite0"] > 0
    assert list(failures.values())[1].startswith("images at guidance 1: efficientnet_lite0: 1 of 12 generated images have NaN")
    assert list(failures.values())[2].startswith("images at guidance 2: alignment by the evaluated model itself: CLIPScore of 12")


def test_an_incomplete_set_has_its_shortfall_next_to_every_figure(models, tmp_path):
    """A known set that lacks images, and one with an image that cannot be read."""
    names, known = class_names("vtab/cifar10"), KNOWN_SETS["vtab/cifar10"]
    write_wds(
        tmp_path, "vtab/cifar10", [picture(i) for i in range(20)], labels=[i % 10 for i in range(20)], classes=names,
        templates=known.templates,
    )  # fmt: skip
    images = [picture(i) for i in range(9)]
    write_wds(tmp_path, "mine", [encoded(images[0])[:60], *images[1:]], labels=[0] * 9, classes=["a", "b"], templates=["a {c}"])
    sets = {name: find_evaluation_set([str(tmp_path)], name) for name in ("vtab/cifar10", "mine")}
    plan = EvaluationPlan(models[0], [], sets)
    plan.zero_shot = [ZeroShotMeasurement(models[0], data, allow_short=True) for data in sets.values()]
    results = EvaluationResults(plan)
    run_units(plan, results)
    details = results.finish()
    write_outputs(str(tmp_path / "out"), details, time.monotonic())
    table = {row["dataset"]: row for row in csv.DictReader((tmp_path / "out" / "results.csv").open())}
    short, unreadable = table["vtab/cifar10"], table["mine"]
    assert "vtab/cifar10 (incomplete)" in render_results(details)
    sizes = ("n", "num_expected", "num_missing", "num_unreadable", "is_complete")
    assert [short[field] for field in sizes] == ["20", "10000", "9980", "0", "False"]
    assert [unreadable[field] for field in sizes] == ["9", "", "0", "1", "False"]
    saved = json.loads((tmp_path / "out" / "results" / "good" / "vtab-cifar10.json").read_text())
    assert (saved["n"], saved["num_expected"], saved["num_missing"], saved["is_complete"]) == (20, 10000, 9980, False)
    metrics = metrics_for_tracking(details)
    assert (metrics["eval/vtab/cifar10/num_images"], metrics["eval/vtab/cifar10/num_missing"]) == (20, 9980)
    assert metrics["eval/mine/num_unreadable"] == 1
    assert details["means"] == {"good": None}


def test_images_that_are_lost_with_their_shard_leave_the_rest_of_a_retrieval_set(models, tmp_path):
    folder = write_retrieval(tmp_path, "pairs", 9, samples_per_shard=3)
    data = open_evaluation_set("pairs", str(folder))
    (folder / "test" / "1.tar").unlink()
    plan = EvaluationPlan(models[0], [], {"pairs": data}, retrieval=[RetrievalMeasurement(models[0], data)])
    details, rows = evaluated(plan, tmp_path / "out")
    assert not details["failures"]
    assert (rows["pairs", "good"]["n"], rows["pairs", "good"]["num_unreadable"]) == ("6", "1")


def evaluated(plan, output):
    """Run a plan in this process and write its results. Returns the details and the rows of the table by (set, model)."""
    results = EvaluationResults(plan)
    run_units(plan, results)
    details = results.finish()
    write_outputs(str(output), details, time.monotonic())
    rows = csv.DictReader((output / "results.csv").open())
    return details, {(row["dataset"], row["model"]): row for row in rows}


def test_every_row_says_what_it_is(models, sets, tmp_path):
    good, other, _ = models
    plan = EvaluationPlan(replace(good, step=700, source="s3://runs/a/step_700"), [other], sets)
    for data in sets.values():
        for model in (plan.model, other):
            kind = RetrievalMeasurement if data.task == "zeroshot_retrieval" else ZeroShotMeasurement
            plan.add(kind(model, data))
    details, rows = evaluated(plan, tmp_path)
    row = rows["first", "good"]
    identity = {
        "pretrained": "s3://runs/a/step_700", "step": "700", "weights_digest": good.digest, "data_digest": sets["first"].digest,
        "layout": "wds", "num_templates": "1", "seed": "", "n": "12",
        "templates": f"{sets['first'].url}/zeroshot_classification_templates.txt",
        "class_names": f"{sets['first'].url}/classnames.txt",
        "code_version": details["code_version"], "created": details["created"],
    }  # fmt: skip
    assert {field: row[field] for field in identity} == identity
    assert "32" in row["preprocessing"]
    p = float(row["acc1"])
    assert float(row["standard_error_acc1"]) == pytest.approx((p * (1 - p) / 12) ** 0.5)
    assert metrics_for_tracking(details)["eval/first/standard_error_acc1"] == float(row["standard_error_acc1"])
    difference = details["zero_shot"][0]["differences"]["other"]["acc1"]
    assert difference["mean"] == pytest.approx(p - float(rows["first", "other"]["acc1"]))
    assert difference["low"] <= difference["mean"] <= difference["high"]
    ends = [float(row[f"difference_acc1_to_other{end}"]) for end in ("", "_low", "_high")]
    assert ends == [difference["mean"], difference["low"], difference["high"]]
    assert json.loads(row["units"]) == details["zero_shot"][0]["units"], "nested values are JSON"
    assert not [name for name, value in row.items() if value.startswith(("{'", "['"))]
    recall = details["retrieval"][0]["differences"]["other"]["image_retrieval_recall@1"]
    assert (recall["n"], recall["low"] <= recall["high"]) == (9, True)
    page = Page((tmp_path / "report.html").read_text())
    texts = f"1 template, {row['templates']} · class names: {row['class_names']}"
    assert all(text in page.text for text in (good.digest, sets["first"].digest, texts))
    assert (rows["pairs", "good"]["templates"], rows["pairs", "good"]["class_names"]) == ("", "")
    assert page.rows_of("first")[-1][1:3] == ["other", "acc1"]


def test_a_baseline_that_is_also_a_feature_network(models, sets, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    config = QualityConfig(str(tmp_path / "prompts.txt"), sets["first"].url, networks=(models[0].url,))
    plan = EvaluationPlan(models[0], [], {"first": sets["first"]}, [ZeroShotMeasurement(models[0], sets["first"])])
    plan.quality = QualityMeasurement(models[0], None, 16, config, read_prompts(config), str(tmp_path))
    replica, kinds = WorkerModels(plan.builders, 1, "cpu"), set()
    for unit in plan.measurements[0].units + plan.quality.units[:1]:
        kinds |= unit.work.run(replica).keys()
    assert kinds >= {"embeddings", f"features/{models[0].name}"}
    with pytest.raises(ConfigError, match=r"quality\.networks: two networks have the same name \(good, good\)"):
        replace(config, networks=(models[0].url, "/elsewhere/good"))


def test_the_content_of_a_set_identifies_it_wherever_it_is(models, tmp_path):
    """A copy has other times, so another data_digest. A label that changes at the same size changes the content."""
    digests = []
    for place, labels in (("a", [0, 1, 2] * 2), ("copy", [0, 1, 2] * 2), ("changed", [0, 1, 1] * 2)):
        data = open_evaluation_set("mine", str(write_own(tmp_path / place, labels=labels)))
        plan = EvaluationPlan(models[0], [], {"mine": data}, [ZeroShotMeasurement(models[0], data)])
        _, rows = evaluated(plan, tmp_path / place / "out")
        digests.append((rows["mine", "good"]["data_digest"], rows["mine", "good"]["content_digest"]))
    (first, content), (copy, same), (_, other) = digests
    assert first != copy
    assert content == same != other


def test_two_models_in_one_folder_neither_overwrite_each_other_nor_mix(models, sets, tmp_path):
    good, other, _ = models
    for model in (good, other):
        plan = EvaluationPlan(model, [], {"first": sets["first"]}, [ZeroShotMeasurement(model, sets["first"])])
        _, rows = evaluated(plan, tmp_path)
    assert {key: row["weights_digest"] for key, row in rows.items()} == {
        ("first", "good"): good.digest, ("first", "other"): other.digest,
    }  # fmt: skip
    for model in (good, other):
        saved = json.loads((tmp_path / "reports" / model.name / "details.json").read_text())
        assert [each["name"] for each in saved["models"]] == [model.name]
        assert model.url in (tmp_path / "reports" / model.name / "report.html").read_text()
    with pytest.raises(ConfigError, match=r"name: .*results/good has results with another weights_digest .* give another --name"):
        check_not_taken([replace(other, name="good").describe()], str(tmp_path))
    with pytest.raises(ConfigError, match=r"name: .*results/good has results with another dtype .*float32, not bfloat16"):
        check_not_taken([replace(good, dtype="bfloat16").describe()], str(tmp_path))
    check_not_taken([good.describe()], str(tmp_path))


def test_the_spread_over_the_noise(exported_model, sets, tmp_path):
    """Every seed has other noise; seed 0 has the noise of a single measurement."""
    data = sets["first"]
    plan = EvaluationPlan(exported_model, [], {"first": data}, [ZeroShotMeasurement(exported_model, data)])
    plan.repeats = [ZeroShotMeasurement(exported_model, data, seed=seed) for seed in (1, 2)]
    replica = WorkerModels(plan.builders, 1, "cpu")
    embeddings = [each.units[-1].work.run(replica)["embeddings"] for each in [*plan.zero_shot, *plan.repeats]]
    assert len({each.tobytes() for each in embeddings}) == 3
    details, rows = evaluated(plan, tmp_path)
    values = details["zero_shot"][0]["seeds"]["acc1"]
    assert len(values) == 3
    assert values[0] == details["zero_shot"][0]["metrics"]["acc1"] == float(rows["first", exported_model.name]["acc1"])
    assert rows["first", exported_model.name]["seed"] == "0"
    (row,) = [row for row in Page((tmp_path / "report.html").read_text()).rows_of("first") if row[1] == "acc1"]
    assert row[2:] == [f"{100 * np.mean(values):.1f}", f"{100 * np.std(values, ddof=1):.2f}", "3"]


@pytest.fixture(scope="module")
def exported_model(tiny_model, tmp_path_factory):
    torch.manual_seed(1)
    task = DiffDisTask(tiny_model, ObjectiveConfig())
    draw_query_weights(task.module.model)
    folder = tmp_path_factory.mktemp("run") / "export"
    task.save_pretrained(task.module.state_dict(), folder)
    (folder.parent / "train_summary.json").write_text(json.dumps({"num_steps": 12}))
    return open_model(EvalConfig(checkpoint=str(folder)))


def test_the_name_of_a_model(exported_model):
    run = exported_model.url.split("/")[-2]
    assert exported_model.name == f"{run}-step-12"
    assert open_model(EvalConfig(checkpoint=exported_model.url, name="mine final")).name == "mine final"
    with pytest.raises(ConfigError, match=r"name: '\.\./x'"):
        EvalConfig(name="../x")


def test_a_clip_or_siglip_is_evaluated_alone(sets, tmp_path):
    for save in (save_clip, save_siglip):
        folder = save(tmp_path / save.__name__)
        model = open_model(EvalConfig(checkpoint=str(folder)))
        assert (model.name, model.can_generate, model.can_score) == (save.__name__, False, True)
        plan = EvaluationPlan(model, [], {"first": sets["first"]}, [ZeroShotMeasurement(model, sets["first"])])
        details, rows = evaluated(plan, tmp_path / "out")
        assert not details["failures"]
        assert rows["first", model.name]["n"] == "12"
    assert len(rows) == 2


def test_half_precision_is_another_measurement_with_nearly_the_same_scores(exported_model, models, sets, tmp_path):
    data, images = sets["first"], np.stack([picture(i, 32) for i in range(4)])
    for model in (exported_model, models[0]):
        half = open_model(EvalConfig(checkpoint=model.url, name="half", dtype="bfloat16"))
        measurement = ZeroShotMeasurement(half, data)
        assert not {unit.key for unit in measurement.units} & {unit.key for unit in ZeroShotMeasurement(model, data).units}
        scorers, embeddings = [each.build("cpu") for each in (model, half)], []
        for scorer in scorers:
            pixels = np.stack([scorer.preprocess(image) for image in images])
            embeddings.append(np.concatenate([scorer.embed_images(pixels, "abcd"), scorer.embed_texts(data.classes)]))
        assert embeddings[1].dtype == np.float32
        assert not np.array_equal(*embeddings)
        assert (embeddings[0] * embeddings[1]).sum(axis=1).min() > 0.99
        _, rows = evaluated(EvaluationPlan(half, [], {"first": data}, [measurement]), tmp_path / model.name)
        assert rows["first", "half"]["dtype"] == "bfloat16"


def test_the_curve_over_the_training(models, sets, tmp_path):
    scores = []
    for step, model in ((10, models[0]), (20, models[1])):
        model = replace(model, step=step)
        plan = EvaluationPlan(model, [], {"first": sets["first"]}, [ZeroShotMeasurement(model, sets["first"])])
        details, rows = evaluated(plan, tmp_path)
        scores += step_scores(details)
    assert [(score["step"], score["value"]) for score in scores] == [
        (step, float(rows["first", name]["acc1"])) for step, name in ((10, "good"), (20, "other"))
    ]
    text = Page(evaluation_page(details | {"over_training": scores})).text
    assert f"first, step 20: acc1 {100 * scores[1]['value']:.1f} ±" in text
    assert "Over the training" not in Page(evaluation_page(details | {"over_training": scores[:1]})).text


def test_a_limit_measures_a_random_sample_and_says_so(models, tmp_path):
    """The sample has images of all parts of the set, and is the same one for every model."""
    names = class_names("vtab/cifar10")
    images, labels = [picture(i) for i in range(300)], [i // 30 for i in range(300)]
    write_wds(tmp_path, "vtab/cifar10", images, labels=labels, classes=names, samples_per_shard=50)
    data = find_evaluation_set([str(tmp_path)], "vtab/cifar10")
    plan = EvaluationPlan(models[0], [models[1]], {data.name: data})
    plan.zero_shot = [ZeroShotMeasurement(model, data, limit=60) for model in models[:2]]
    details, rows = evaluated(plan, tmp_path / "out")
    first, second = details["zero_shot"]
    assert 45 <= first["n"] == second["n"] <= 66, "numbers of images in tars are estimates"
    assert len([each for each in first["per_class"] if each["count"]]) == 10
    assert first["differences"]["other"]["acc1"]["n"] == first["n"]
    assert rows["vtab/cifar10", "good"]["limit"] == "60"
    assert not first["is_complete"]
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    assert "vtab/cifar10 is incomplete: a random sample of 60. It is in no mean, and not compared" in text


def test_warnings_about_a_set_are_in_the_details_and_the_report(models, tmp_path):
    data = open_evaluation_set("mine", str(write_own(tmp_path, classes=["van", "bus", "van"])))
    plan = EvaluationPlan(models[0], [], {"mine": data}, [ZeroShotMeasurement(models[0], data)])
    details, _ = evaluated(plan, tmp_path / "out")
    (warning,) = json.loads((tmp_path / "out" / "details.json").read_text())["warnings"]
    assert "names the class 'van' more than once" in warning
    assert details["warnings"] == [warning]
    assert warning in Page((tmp_path / "out" / "report.html").read_text()).text
