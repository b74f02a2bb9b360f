"""Predictions of an evaluation: in its files, in the report, and behind the report's links."""

import time
from collections import Counter
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffdis_platform.evaluation.measurements import RetrievalMeasurement, ZeroShotMeasurement
from diffdis_platform.evaluation.models import open_baseline
from diffdis_platform.evaluation.results import EvaluationPlan, EvaluationResults
from diffdis_platform.evaluation.run import write_outputs
from ray_platform.evaluate.discovery import find_evaluation_set, open_evaluation_set
from tests.jobs.test_eval_results import run_units
from tests.support.evaluation_sets import encoded, picture, write_own, write_retrieval, write_wds
from tests.support.html_page import Page
from tests.support.tiny_checkpoints import save_clip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_baseline(str(save_clip(tmp_path_factory.mktemp("models") / "good")), set())


@pytest.mark.parametrize("max_classes", [5000, 2])
def test_the_files_that_the_report_links_to_exist(model, tmp_path, monkeypatch, max_classes):
    monkeypatch.setattr("ray_platform.evaluate.results.MAX_CONFUSION_CLASSES", max_classes)
    own = open_evaluation_set("my/own #1", str(write_own(tmp_path, 12)))
    pairs = open_evaluation_set("pairs", str(write_retrieval(tmp_path, "pairs", 9)))
    plan = EvaluationPlan(model, [], {data.name: data for data in (own, pairs)})
    plan.zero_shot, plan.retrieval = [ZeroShotMeasurement(model, own)], [RetrievalMeasurement(model, pairs)]
    results, output = EvaluationResults(plan), tmp_path / "out"
    run_units(plan, results)
    results.write_predictions(str(output))
    write_outputs(str(output), results.finish(), time.monotonic())
    for report in (output / "report.html", output / "reports" / "good" / "report.html"):
        links = [link for link in Page(report.read_text()).attributes("href") if not link.startswith("#")]
        files = [(report.parent / unquote(link)).resolve().relative_to(output) for link in links]
        assert [str(file) for file in files] == [
            "results.csv",
            "details.json",
            "results/good/my-own #1.json",
            "predictions/good/my-own #1.parquet",
            *(["predictions/good/my-own #1-confusion.npz"] if max_classes == 5000 else []),
            "results/good/pairs.json",
        ]
        assert all((output / file).stat().st_size for file in files)
    assert len(list(output.glob("predictions/*/*.npz"))) == (max_classes == 5000)


def test_the_predictions_of_every_sample_and_the_confusion_matrix(model, tmp_path):
    images = [encoded(picture(0))[:60], *(picture(i) for i in range(1, 9))]
    write_wds(tmp_path, "mine", images, labels=[i % 3 for i in range(9)], classes=["a", "b", "c"], templates=["a {c}"])
    data = find_evaluation_set([str(tmp_path)], "mine")
    plan = EvaluationPlan(model, [], {"mine": data}, [ZeroShotMeasurement(model, data)])
    results = EvaluationResults(plan)
    run_units(plan, results)
    results.write_predictions(str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out" / "predictions" / "good" / "mine.parquet").to_pylist()
    rows = {row["key"]: row for row in table}
    examples = results.finish()["zero_shot"][0]["examples"]
    outcomes = Counter(row["predicted_class"] == row["class"] for row in table if row["predicted_class"])
    assert len(examples) == min(5, outcomes[True]) + min(5, outcomes[False])
    for example in examples:
        row = rows[example["key"]]
        assert example["true"] == row["class"]
        assert [each["name"] for each in example["predicted"]] == ["abc"[each] for each in row["predictions"]]
        assert [each["right"] for each in example["predicted"]] == [each == row["label"] for each in row["predictions"]]
    assert [row["class"] for row in table] == ["a", "b", "c"] * 3
    assert (table[0]["predicted_class"], table[0]["predictions"], table[0]["cause"]) == (None, [], "image_undecodable")
    assert all(sorted(row["predictions"]) == [0, 1, 2] for row in table[1:])
    written = tmp_path / "out" / "predictions" / "good" / "mine.parquet"
    written.write_bytes(b"")
    results.write_predictions(str(tmp_path / "out"))
    assert not written.read_bytes(), "each set is written once"
    right = sum(row["predicted_class"] == row["class"] for row in table)
    assert right / 9 == results.finish()["zero_shot"][0]["metrics"]["acc1"]
    with np.load(tmp_path / "out" / "predictions" / "good" / "mine-confusion.npz") as arrays:
        confusion, classes = arrays["confusion"], [str(name) for name in arrays["classes"]]
    counts = Counter((row["class"], row["predicted_class"]) for row in table)
    assert confusion.tolist() == [[counts[true, other] for other in (*classes, None)] for true in classes]
    assert (classes, confusion[0, 3], confusion.sum()) == (["a", "b", "c"], 1, 9)
