"""Results of an evaluation without a cluster: what fails is one line, and every set's results exist when it is finished."""

import time

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from diffdis_platform.config.evaluate import QualityConfig
from diffdis_platform.evaluation.measurements import RetrievalMeasurement, ZeroShotMeasurement
from diffdis_platform.evaluation.models import open_baseline
from diffdis_platform.evaluation.quality import QualityMeasurement, feature_metrics
from diffdis_platform.evaluation.results import EvaluationPlan, EvaluationResults
from diffdis_platform.evaluation.run import write_outputs
from ray_platform.evaluate.discovery import open_evaluation_set
from ray_platform.evaluate.unit_work import WorkerModels
from ray_platform.replicas import UnitResult, WorkQueue
from tests.support.evaluation_sets import write_own, write_retrieval
from tests.support.tiny_checkpoints import save_clip


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
    replica = WorkerModels({model.name: model.build for model in [plan.model, *plan.baselines]}, 1, "cpu")
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


def test_features_that_are_not_finite_are_named():
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    broken = x.copy()
    broken[[3, 5], 0] = np.nan
    with pytest.raises(ValueError, match="2 of 40 generated images have NaN features, the first is image 3;"):
        feature_metrics("fid", broken, x)
    with pytest.raises(ValueError, match="2 of 40 reference images"):
        feature_metrics("fid", x, broken)


def test_nan_features_of_one_guidance_scale_leave_the_other_results(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(12)))
    write_retrieval(tmp_path, "real", 12)
    config = QualityConfig(
        prompts=str(tmp_path / "prompts.txt"), reference=str(tmp_path / "wds_real"), guidance_scales=(1.0, 2.0, 3.0)
    )
    measurement = QualityMeasurement(models[0], models[0], 16, config, str(tmp_path / "out"))
    rng = np.random.default_rng(0)
    for unit in measurement.units:
        features = rng.standard_normal((12, 1280)).astype(np.float32)
        rows = {"features/efficientnet_lite0": features, "alignment": rng.random(12), "seconds": np.ones(1)}
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
