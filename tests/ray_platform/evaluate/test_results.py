"""Result files are readable by CLIP_benchmark, metric names are valid in MLflow, and incomparable results are rejected."""

import csv
import io
import json
import math

import pandas
import pytest
from mlflow.utils.validation import _validate_metric_name, _validate_tag_name

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.evaluate.results import check_same_protocol, metrics_for_tracking, tags_for_tracking, write_results
from tests.support.evaluation_details import OWN, SETS, evaluation

FOLDER, BASELINE_FOLDER = "DiffDis-step-40000", "CLIP-ViT-B-32-own-run"


@pytest.fixture(scope="module")
def details():
    """Evaluation details with an undefined acc5."""
    details = evaluation()
    details["zero_shot"][0]["metrics"]["acc5"] = math.nan
    return details


@pytest.fixture(scope="module")
def output(details, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    write_results(details, str(folder))
    return folder


def test_a_result_has_the_fields_of_clip_benchmark(output, details):
    assert len(list((output / "results").glob("*/*.json"))) == 2 * (len(SETS) + 1)
    result = details["zero_shot"][0]
    assert json.loads((output / "results" / FOLDER / "vtab-cifar10.json").read_text()) == {
        "dataset": "vtab/cifar10",
        "model": OWN,
        "pretrained": details["models"][0]["pretrained"],
        "task": "zeroshot_classification",
        "metrics": result["metrics"] | {"acc5": None},
        "language": "en",
        "n": 10000,
        "seconds": result["seconds"],
        "settings": {"num_steps": 10, "num_draws": 4, "guidance": 0.0},
        "scoring_num_steps": 10,
        "scoring_num_draws": 4,
        "scoring_guidance": 0.0,
        "step": 40000,
        "code_version": details["code_version"],
        "created": details["created"],
        "num_unreadable": 0,
    }
    flickr = json.loads((output / "results" / BASELINE_FOLDER / "flickr30k.json").read_text())
    assert (flickr["task"], flickr["n"], len(flickr["metrics"])) == ("zeroshot_retrieval", 1000, 6)


def test_the_csv_is_what_clip_benchmark_builds_of_the_files(output):
    contents = [json.loads(file.read_text()) for file in (output / "results").glob("*/*.json")]
    rows = [{**content.pop("metrics"), **content} for content in contents]  # as `clip_benchmark build` does
    built = pandas.DataFrame(rows).assign(settings=lambda table: table["settings"].map(json.dumps))
    built["model_fullname"] = built["model"] + " " + built["pretrained"]
    own, order = pandas.read_csv(output / "results.csv"), ["model", "dataset"]
    assert set(own.columns) == set(built.columns)
    own = own.sort_values(order, ignore_index=True)
    pandas.testing.assert_frame_equal(own, built.sort_values(order, ignore_index=True)[list(own.columns)], check_dtype=False)
    assert own["acc5"].isna().sum() == 1 + 2  # the undefined acc5, and retrieval
    columns = "dataset,model,pretrained,model_fullname,task,language,n,acc1,acc5,mean_per_class_recall"
    assert ",".join(own.columns).startswith(columns)


def test_details_keep_all_but_the_images(output, details):
    written = (output / "details.json").read_text()
    assert "NaN" not in written
    kept = json.loads(written)
    assert kept.keys() == details.keys() | {"format_version"}
    assert kept["zero_shot"][0]["metrics"]["acc5"] is None
    for section in ("zero_shot", "quality"):
        assert kept[section][-1] == json.loads(json.dumps(details[section][-1]), object_hook=without_images)
    assert '"jpeg": "' in json.dumps(details)
    assert '"jpeg"' not in written
    assert '"png"' not in written


def without_images(value: dict) -> dict:
    return {key: inner for key, inner in value.items() if key not in ("jpeg", "png")}


def test_models_whose_folder_is_the_same_are_rejected(details, tmp_path):
    clash = details | {"models": [*details["models"], details["models"][0] | {"name": "DiffDis / step 40000"}]}
    with pytest.raises(ConfigError, match="results/DiffDis-step-40000; give them distinct names"):
        write_results(clash, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_without_a_result_the_table_is_empty(tmp_path):
    write_results({"models": [{"name": "a"}], "failures": ["cars: gone"]}, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"details.json", "results.csv", "reports"}
    assert pandas.read_csv(tmp_path / "results.csv").empty


@pytest.mark.s3
def test_results_go_to_s3(details, s3_url):
    write_results(details, f"{s3_url}/evaluation")
    table = storage.read_bytes(f"{s3_url}/evaluation/results.csv").decode()
    assert len(list(csv.DictReader(io.StringIO(table)))) == 12
    assert json.loads(storage.read_bytes(f"{s3_url}/evaluation/results/{FOLDER}/imagenet1k.json"))["n"] == 50000


def test_mlflow_takes_every_metric(details):
    metrics = metrics_for_tracking(details)
    for name in metrics:
        _validate_metric_name(name)
    assert metrics["eval/vtab/cifar10/acc1"] == details["zero_shot"][0]["metrics"]["acc1"]
    assert "eval/vtab/cifar10/acc5" not in metrics  # undefined, so not logged
    assert metrics["eval_baseline/CLIP_ViT-B-32_own_run/vtab/cifar10/acc5"] == details["zero_shot"][1]["metrics"]["acc5"]
    assert metrics["eval/zero_shot_mean"] == details["means"][OWN]
    assert metrics["eval/flickr30k/image_retrieval_recall_at_1"] == 0.5
    assert metrics["eval/fid/guidance_7.5"] == details["quality"][-1]["metrics"]["fid"]
    assert metrics["eval/curve/imagenet1k/num_steps_50_num_draws_2"] == details["curve"][-1]["acc1"]
    assert len(metrics) == 2 + 2 * 15 - 1 + 2 * 6 + 12 + 4 * 5


@pytest.mark.parametrize("name", ["/models/clip", "../..", "模型 ✓", "a//b", "x" * 240])
def test_no_name_of_a_model_keeps_metrics_from_mlflow(details, name, tmp_path):
    result = details["zero_shot"][1] | {"model": name}
    models = [details["models"][0], details["models"][1] | {"name": name}]
    odd = details | {"models": models, "zero_shot": [result], "means": {OWN: None, name: 0.5}, "retrieval": [], "curve": []}
    metrics = metrics_for_tracking(odd | {"quality": []})
    assert len(metrics) == 4
    for metric in metrics:
        _validate_metric_name(metric)
    write_results(odd, str(tmp_path))
    (file,) = tmp_path.glob("results/*/*.json")
    assert file.parents[2] == tmp_path


def test_a_protocol_is_compared_with_itself(details):
    protocol = details["quality"][0]["protocol"]
    check_same_protocol(protocol, json.loads(json.dumps(protocol)))
    check_same_protocol({"sizes": (1, 2)}, {"sizes": [1, 2]})  # a tuple is read back from a file as a list


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
def test_another_protocol_is_rejected_by_its_first_field_that_differs(details, change, line):
    protocol = details["quality"][0]["protocol"]
    with pytest.raises(ConfigError) as raised:
        check_same_protocol(protocol, protocol | change)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300
    with pytest.raises(ConfigError):
        check_same_protocol(protocol | change, protocol)


def test_tags_identify_the_results(details):
    model, *others = details["models"]
    results = [result | {"data_digest": f"digest of {result['set']}", "seed": 0} for result in details["zero_shot"][:4]]
    known = details | {"models": [model | {"weights_digest": "1234"}, *others], "zero_shot": results, "retrieval": []}
    assert tags_for_tracking(known) == {
        "eval/step_40000/checkpoint": "s3://models/run/export",
        "eval/step_40000/weights_digest": "1234",
        "eval/step_40000/data_digests": "vtab/cifar10 digest of vtab/cifar10, cars digest of cars",
        "eval/step_40000/seed": "0",
        "eval/step_40000/code_version": details["code_version"],
    }
    unknown = known | {"models": [model | {"step": None}, *others], "zero_shot": []}
    assert tags_for_tracking(unknown).keys() == {"eval/checkpoint", "eval/code_version"}
    for name in tags_for_tracking(known):
        _validate_tag_name(name)
