"""Files that CLIP_benchmark's readers read, names that MLflow takes, and the refusal to compare what cannot be compared."""

import copy
import csv
import io
import json
import math

import pandas
import pytest
from mlflow import MlflowClient

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.evaluate.results import check_same_protocol, metrics_for_tracking, write_results
from ray_platform.tracking import TrackingConfig, tracking_uri
from ray_platform.tracking.runs import SafeTracker
from tests.support.evaluation_details import OWN, SETS, evaluation

FOLDER, BASELINE_FOLDER = "DiffDis-step-40000", "CLIP-ViT-B-32-own-run"


@pytest.fixture(scope="module")
def details():
    """With an acc5 that is not defined."""
    found = evaluation()
    found["zero_shot"][0]["metrics"]["acc5"] = math.nan
    return found


@pytest.fixture(scope="module")
def output(details, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    write_results(details, str(folder))
    return folder


def rows_of_clip_benchmark(files) -> list[dict]:
    """What `clip_benchmark build` writes, a row a file: a metric a column, all other fields as they are, and one name of both."""
    rows = []
    for file in files:
        content = json.loads(file.read_text())
        row = {**content["metrics"], **content}
        del row["metrics"]
        row["model_fullname"] = row["model"] + " " + row["pretrained"]
        rows.append(row)
    return rows


def test_a_result_has_the_fields_of_clip_benchmark(output, details):
    assert len(list((output / "results").glob("*/*.json"))) == 2 * (len(SETS) + 1)
    cifar = json.loads((output / "results" / FOLDER / "vtab-cifar10.json").read_text())
    result = details["zero_shot"][0]
    assert cifar == {
        "dataset": "vtab/cifar10",
        "model": OWN,
        "pretrained": details["models"][0]["pretrained"],
        "task": "zeroshot_classification",
        "metrics": result["metrics"] | {"acc5": None},
        "language": "en",
        "n": 10000,
        "seconds": result["seconds"],
        "settings": {"num_steps": 10, "num_draws": 4, "guidance": 0.0},
        "code_version": details["code_version"],
        "num_unreadable": 0,
    }
    flickr = json.loads((output / "results" / BASELINE_FOLDER / "flickr30k.json").read_text())
    assert (flickr["task"], flickr["n"]) == ("zeroshot_retrieval", 1000)
    ways = ("image_retrieval_recall@", "text_retrieval_recall@")
    assert flickr["metrics"].keys() == {f"{way}{k}" for way in ways for k in (1, 5, 10)}


def test_the_csv_is_what_clip_benchmark_builds_of_the_files(output):
    built = pandas.DataFrame(rows_of_clip_benchmark((output / "results").glob("*/*.json")))
    built["settings"] = built["settings"].astype(str)
    own = pandas.read_csv(output / "results.csv")
    assert set(own.columns) == set(built.columns)
    order = ["model", "dataset"]
    own = own.sort_values(order, ignore_index=True)
    built = built.sort_values(order, ignore_index=True)[list(own.columns)]
    pandas.testing.assert_frame_equal(own, built, check_dtype=False)
    assert own["acc5"].isna().sum() == 1 + 2  # the undefined one, and retrieval
    head = (output / "results.csv").read_text().splitlines()[0]
    assert head.startswith("dataset,model,pretrained,model_fullname,task,language,n,acc1,acc5,mean_per_class_recall,")


def test_details_keep_all_but_the_pictures(output, details):
    written = (output / "details.json").read_text()

    def not_json(constant):
        raise AssertionError(constant)

    kept = json.loads(written, parse_constant=not_json)
    assert kept.keys() == details.keys()
    assert kept["zero_shot"][0]["metrics"]["acc5"] is None
    assert kept["zero_shot"][1] == without_pictures(details["zero_shot"][1])
    assert kept["quality"] == without_pictures(details["quality"])
    assert "jpeg" in json.dumps(details)
    assert '"jpeg"' not in written
    assert '"png"' not in written
    assert len(written) < 1_000_000


def without_pictures(value):
    if isinstance(value, dict):
        return {key: without_pictures(inner) for key, inner in value.items() if key not in ("jpeg", "png")}
    return [without_pictures(inner) for inner in value] if isinstance(value, list) else value


def test_models_whose_folder_is_the_same_are_refused(details, tmp_path):
    clash = copy.copy(details) | {"models": [*details["models"], details["models"][0] | {"name": "DiffDis / step 40000"}]}
    with pytest.raises(ConfigError, match="results/DiffDis-step-40000; give them distinct names"):
        write_results(clash, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_without_a_result_the_table_is_empty(tmp_path):
    nothing = {"models": [{"name": "a"}], "failures": ["cars: gone"]}
    write_results(nothing, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"details.json", "results.csv"}
    assert pandas.read_csv(tmp_path / "results.csv").empty


@pytest.mark.s3
def test_results_go_to_s3(details, s3_url):
    write_results(details, f"{s3_url}/evaluation")
    table = storage.read_bytes(f"{s3_url}/evaluation/results.csv").decode()
    assert len(list(csv.DictReader(io.StringIO(table)))) == 12
    assert json.loads(storage.read_bytes(f"{s3_url}/evaluation/results/{FOLDER}/imagenet1k.json"))["n"] == 50000


def test_mlflow_takes_every_metric_and_gives_it_back(details, tmp_path, caplog):
    metrics = metrics_for_tracking(details)
    tracker = SafeTracker(TrackingConfig(), str(tmp_path))
    tracker.log_metrics(metrics, step=40000)
    tracker.end("FINISHED")
    assert not caplog.records
    client = MlflowClient(tracking_uri(TrackingConfig(), str(tmp_path)))
    assert client.get_run(tracker.run_id()).data.metrics == metrics
    assert metrics["eval/vtab/cifar10/acc1"] == details["zero_shot"][0]["metrics"]["acc1"]
    assert "eval/vtab/cifar10/acc5" not in metrics  # not defined
    assert metrics["eval_baseline/CLIP_ViT-B-32_own_run/vtab/cifar10/acc5"] == details["zero_shot"][1]["metrics"]["acc5"]
    assert metrics["eval/zero_shot_mean"] == details["means"][OWN]
    assert metrics["eval/flickr30k/image_retrieval_recall_at_1"] == 0.5
    assert metrics["eval/fid/guidance_7.5"] == details["quality"][-1]["metrics"]["fid"]
    assert metrics["eval/curve/imagenet1k/num_steps_50_num_draws_2"] == details["curve"][-1]["acc1"]
    assert len(metrics) == 2 + 2 * 15 - 1 + 2 * 6 + 12 + 4 * 5


@pytest.mark.parametrize("name", ["/models/clip", "../..", "模型 ✓", "a//b", "x" * 400])
def test_no_name_of_a_model_keeps_metrics_from_mlflow(details, name, tmp_path_factory):
    output = str(tmp_path_factory.getbasetemp() / "names")  # one store for all: making its tables takes two seconds
    odd = {
        "models": [details["models"][0], {"name": name}],
        "zero_shot": [details["zero_shot"][1] | {"model": name}],
        "means": {OWN: None, name: 0.5},
    }
    metrics = metrics_for_tracking(odd)
    assert len(metrics) == 4
    tracker = SafeTracker(TrackingConfig(), output)
    tracker.log_metrics(metrics, step=1)
    client = MlflowClient(tracking_uri(TrackingConfig(), output))
    assert client.get_run(tracker.run_id()).data.metrics == metrics


def test_one_protocol_is_compared_with_itself(details):
    protocol = details["quality"][0]["protocol"]
    check_same_protocol(protocol, json.loads(json.dumps(protocol)))
    check_same_protocol({"sizes": (1, 2)}, {"sizes": [1, 2]})  # as it comes back from a file


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"resize": "bilinear", "dim": 1}, 'protocol resize: "tf1_bilinear" and "bilinear"; figures of different protocols'),
        (
            {"prompts": {"file": "s3://eval/coco_30k.txt", "digest": "0"}},
            'protocol prompts.digest: "sha256:91c2" and "0"; figures',
        ),
        ({"image_size": None}, "protocol image_size: 512 and null; figures"),
        ({"more": [1]}, "protocol more: absent and [1]; figures"),
        ({"digest": "a\n" * 100}, 'b9129b2" and "a\\na\\na'),
    ],
)
def test_another_protocol_is_refused_by_its_first_field_that_differs(details, change, line):
    protocol = details["quality"][0]["protocol"]
    with pytest.raises(ConfigError) as raised:
        check_same_protocol(protocol, protocol | change)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300
    with pytest.raises(ConfigError):
        check_same_protocol(protocol | change, protocol)


def test_a_field_that_is_missing_is_another_protocol():
    with pytest.raises(ConfigError, match="protocol resize: 299 and absent; "):
        check_same_protocol({"dim": 1, "resize": 299}, {"dim": 1})
