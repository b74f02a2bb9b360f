"""Write the results of an evaluation as files, and name them as metrics of a tracked run.

`results/<model>/<set>.json` and `results.csv` have the fields and columns of CLIP_benchmark, so that tools that read its results
read these too. `details.json` has everything that was measured, without the images.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_platform import storage
from ray_platform.contracts import ConfigError, Rows
from ray_platform.formats import FileFormat
from ray_platform.json_values import first_difference, to_json
from ray_platform.metric_registry import check_declared
from ray_platform.report.records import DatasetResult, EvaluatedModel, EvaluationDetails

DETAILS_FORMAT = FileFormat("evaluation result")
_FIRST_COLUMNS = ("dataset", "model", "pretrained", "model_fullname", "task", "language", "n")
# Fields of a result that are part of its row, in addition to those that every release wrote.
_RESULT_FIELDS = (
    *("num_expected", "num_missing", "limit", "is_complete", "data_digest", "content_digest", "layout"),
    *("num_templates", "templates", "class_names", "seed", "seeds", "differences", "units"),
)
MAX_CONFUSION_CLASSES = 5000  # of a set whose confusion matrix is written: 200 MB
_MAX_MODEL_NAME = 100  # characters in a metric's name, of which a tracking server takes 250 in all


def write_predictions(output_dir: str, model: str, set_name: str, classes: Sequence[str], rows: Rows) -> None:
    """Write `predictions/<model>/<set>.parquet`, a row per sample: its key, class and predicted classes, the best first.

    `cause` is why an image could not be read; such an image has no predicted classes.
    """
    names = pa.array([*classes, None])  # the last one for -1: no label, or no prediction
    predictions = [[int(each) for each in row if each >= 0] for row in rows["predictions"]]
    best = [row[0] if row else -1 for row in predictions]
    table = pa.table(
        {
            "key": pa.array([str(key) for key in rows["keys"]]),
            "label": pa.array(rows["labels"], pa.int32()),
            "class": names.take(pa.array(np.asarray(rows["labels"]) % len(names))),
            "predicted_class": names.take(pa.array(np.asarray(best, dtype=np.int64) % len(names))),
            "predictions": pa.array(predictions, pa.list_(pa.int32())),
            "cause": pa.array([str(cause) for cause in rows["causes"]]),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(_predictions_url(output_dir, model, set_name, ".parquet"), buffer.getvalue())


def write_confusion(output_dir: str, model: str, set_name: str, classes: Sequence[str], confusion: np.ndarray) -> None:
    """Write `predictions/<model>/<set>-confusion.npz`: `confusion` [C, C + 1] int64 and the names of the `classes` [C].

    `confusion[i, j]` is the number of images of class i for which class j scored highest; the last column counts those that could
    not be read.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, confusion=confusion, classes=np.array(classes))
    storage.write_bytes(_predictions_url(output_dir, model, set_name, "-confusion.npz"), buffer.getvalue())


def has_confusion_matrix(num_classes: int) -> bool:
    """Return whether the confusion matrix of a set is written; of ImageNet-21k's 21,841 classes it would have 4 GB."""
    return num_classes <= MAX_CONFUSION_CLASSES


def _predictions_url(output_dir: str, model: str, set_name: str, ending: str) -> str:
    return storage.join(results_folder(output_dir, "predictions", model), f"{set_name.replace('/', '-')}{ending}")


def result_files(result: DatasetResult) -> dict[str, str]:
    """Return the files of one result: what each one has -> its URL, relative to the output folder."""
    model, set_name = result["model"], result["set"]
    files = {"scores": _scores_url("", model, set_name)}
    classes: Any = result.get("per_class")
    if classes:
        endings = {"predictions": ".parquet"}
        if has_confusion_matrix(len(classes)):
            endings["confusion matrix"] = "-confusion.npz"
        files |= {label: _predictions_url("", model, set_name, ending) for label, ending in endings.items()}
    return {label: quote(file.lstrip("/")) for label, file in files.items()}


def _scores_url(output_dir: str, model: str, set_name: str) -> str:
    return storage.join(results_folder(output_dir, "results", model), f"{set_name.replace('/', '-')}.json")


def results_folder(output_dir: str, kind: str, model: str) -> str:
    """Return the folder of one kind of a model's results: "results", "reports", "predictions" or "images"."""
    return storage.join(output_dir, kind, _folder_name(model))


def check_not_taken(models: Sequence[EvaluatedModel], output_dir: str) -> None:
    """Raise ConfigError if two models would write to one folder, or a folder has results of other weights or another dtype."""
    taken: dict[str, str] = {}  # folder below results/ -> name of the model
    for model in models:
        name, folder = model["name"], results_folder(output_dir, "results", model["name"])
        if (other := taken.setdefault(folder, name)) != name:
            raise ConfigError(f"models: {other!r} and {name!r} would both write to {folder}; give them distinct names")
        files = storage.list_folder(folder, "*.json") if storage.exists(folder) else ()
        earlier = storage.read_json(files[0].url) if files else {}
        for field in ("weights_digest", "dtype"):
            if field in earlier and earlier[field] != model.get(field):
                raise ConfigError(
                    f"name: {folder} has results with another {field} than {model['pretrained']} ({earlier[field]}, not "
                    f"{model.get(field)}); give another --name, or rename a baseline's folder"
                )


def write_results(details: EvaluationDetails, output_dir: str) -> None:
    """Write `results/<model>/<set>.json`, and `results.csv` of all such files that the folder has, also of earlier evaluations.

    `details.json` exists twice: in the folder itself for the latest evaluation, and below `reports/<model>`. Raises ConfigError
    if two models would write to the same folder, and DataError if storage does not accept a file.
    """
    models = {model["name"]: model for model in details["models"]}
    check_not_taken(details["models"], output_dir)
    for result, task, num_images in _results(details):
        content = _row(details, models[result["model"]], result, task, num_images)
        storage.write_bytes(_scores_url(output_dir, result["model"], result["set"]), to_json(content))
    storage.write_bytes(storage.join(output_dir, "results.csv"), _table(output_dir).encode())
    content_of_details = to_json(DETAILS_FORMAT.stamp(_without_images(details)))
    for folder in (output_dir, results_folder(output_dir, "reports", details["models"][0]["name"])):
        storage.write_bytes(storage.join(folder, "details.json"), content_of_details)


def _row(
    details: EvaluationDetails, model: EvaluatedModel, result: DatasetResult, task: str, num_images: int
) -> Mapping[str, object]:
    """Return everything that identifies a result, with CLIP_benchmark's fields first. It becomes a row of the table."""
    settings = {f"scoring_{name}": value for name, value in model["settings"].items()}
    errors = {f"standard_error_{metric}": error for metric, error in result.get("standard_errors", {}).items()}
    of_result = {field: value for field, value in result.items() if field in _RESULT_FIELDS}
    return {
        "dataset": result["set"],
        "model": model["name"],
        "pretrained": model["pretrained"],
        "task": task,
        "metrics": result["metrics"],
        "language": "en",
        "n": num_images,
        **errors,
        "seconds": result["seconds"],
        "settings": model["settings"],
        **settings,
        "step": model["step"],
        **{field: value for field, value in model.items() if field in ("weights_digest", "preprocessing", "dtype")},
        "code_version": details["code_version"],
        "created": details["created"],
        "num_unreadable": result["num_unreadable"],
        **of_result,
    }


def _table(output_dir: str) -> str:
    """Return the rows and columns that `clip_benchmark build` makes of all results, in a fixed order."""
    folder = storage.join(output_dir, "results")
    files = [file.url for file in storage.list_folder(folder, "*/*.json")] if storage.exists(folder) else []
    contents = storage.read_many(files)
    rows, metrics = [], dict[str, None]()
    for url in sorted(contents):
        row = json.loads(contents[url])
        metrics |= dict.fromkeys(row["metrics"])
        row |= {"model_fullname": f"{row['model']} {row['pretrained']}"} | _difference_columns(row.pop("differences", {}))
        rows.append(row.pop("metrics") | {name: _cell(value) for name, value in row.items()})
    columns = dict.fromkeys([*_FIRST_COLUMNS, *metrics, *(field for row in rows for field in row)])
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(columns))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _difference_columns(differences: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return `difference_<metric>_to_<baseline>`, and its interval's ends as `..._low` and `..._high`."""
    columns: dict[str, float] = {}
    for baseline, by_metric in differences.items():
        for metric, difference in by_metric.items():
            name = f"difference_{metric}_to_{baseline}"
            columns |= {name: difference["mean"], f"{name}_low": difference["low"], f"{name}_high": difference["high"]}
    return columns


def _cell(value: object) -> object:
    """Return nested values as JSON, which every tool can read."""
    return json.dumps(value) if isinstance(value, dict | list) else value


def _folder_name(model: str) -> str:
    return re.sub(r"[^\w.-]+", "-", model).strip(".-") or "model"


def metrics_for_tracking(details: EvaluationDetails) -> dict[str, float]:
    """Return all metrics by names that MLflow accepts.

    Examples: `eval/vtab/cifar10/acc1`, `eval/flickr30k/image_retrieval_recall_at_1`, `eval/zero_shot_mean` and
    `eval/fid/guidance_3`; those of baselines are below `eval_baseline/<model>/`. Undefined values, such as acc5 over fewer than
    five classes, are left out. Raises ConfigError for a metric that the registry lacks.
    """
    names = [model["name"] for model in details["models"]]
    prefix = {name: f"eval_baseline/{name.replace('/', '-')[:_MAX_MODEL_NAME]}" for name in names}
    prefix[names[0]] = "eval"
    metrics: dict[str, float | None] = {f"{prefix[name]}/zero_shot_mean": mean for name, mean in details.get("means", {}).items()}
    for result, _, num_images in _results(details):
        name = f"{prefix[result['model']]}/{result['set']}"
        metrics |= {f"{name}/{metric}": value for metric, value in result["metrics"].items()}
        metrics |= {f"{name}/standard_error_{metric}": error for metric, error in result.get("standard_errors", {}).items()}
        if "num_missing" in result:
            sizes = {"images": num_images, "missing": result["num_missing"], "unreadable": result["num_unreadable"]}
            metrics |= {f"{name}/num_{size}": float(count) for size, count in sizes.items()}
    for point in details.get("curve", ()):
        name = f"{prefix[point['model']]}/curve/{point['set']}/num_steps_{point['num_steps']}_num_draws_{point['num_draws']}"
        metrics[name] = point["acc1"]
    for quality in details.get("quality", ()):
        for metric, value in quality["metrics"].items():
            metrics[f"eval/{metric}/guidance_{quality['guidance_scale']:g}"] = value
        if counts := quality.get("num_reference"):
            scale = f"guidance_{quality['guidance_scale']:g}"
            metrics |= {f"eval/num_images/{scale}": quality["n"], f"eval/num_reference/{scale}": max(counts.values())}
    check_declared(metrics)
    return {_mlflow_name(name): float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}


def tags_for_tracking(details: EvaluationDetails) -> dict[str, str]:
    """Return what identifies the results of the evaluated model, as tags of a tracked run.

    Names begin with `eval/step_<n>/`, as the metrics of several checkpoints of a run differ by their step, or with `eval/`.
    """
    model = details["models"][0]
    results = [result for result, _, _ in _results(details) if result["model"] == model["name"]]
    digests = {result["set"]: result.get("data_digest", "") for result in results}
    seeds = {str(seed) for result in results if (seed := result.get("seed")) is not None}
    tags = {
        "checkpoint": model["pretrained"],
        "weights_digest": model.get("weights_digest", ""),
        "data_digests": ", ".join(f"{name} {digest}" for name, digest in digests.items()),
        "seed": ", ".join(sorted(seeds)),
        "code_version": details["code_version"],
    }
    prefix = "eval" if model["step"] is None else f"eval/step_{model['step']}"
    return {f"{prefix}/{name}": value for name, value in tags.items() if value}


def check_same_protocol(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise ConfigError when two results were not measured in the same way; it names the first field that differs."""
    difference = first_difference(json.loads(to_json(a)), json.loads(to_json(b)))
    if difference:
        field, one, other = difference
        raise ConfigError(
            f"protocol {field}: {one} and {other}; figures of different protocols cannot be compared: measure both in one way"
        )


def _results(details: EvaluationDetails) -> Iterator[tuple[DatasetResult, str, int]]:
    """Yield each result of a model on a set with CLIP_benchmark's name of the task and the number of images."""
    for zero_shot in details.get("zero_shot", ()):
        yield zero_shot, "zeroshot_classification", zero_shot["n"]
    for retrieval in details.get("retrieval", ()):
        yield retrieval, "zeroshot_retrieval", retrieval["num_images"]


def _without_images(value: Any) -> Any:
    """Return a JSON value without the images in it, which are base64 texts named `jpeg` or `png`."""
    if isinstance(value, Mapping):
        kept = {key: inner for key, inner in value.items() if not (key in ("jpeg", "png") and isinstance(inner, str))}
        return {key: _without_images(inner) for key, inner in kept.items()}
    return [_without_images(inner) for inner in value] if isinstance(value, list | tuple) else value


def _mlflow_name(name: str) -> str:
    """Return a name of ASCII letters, digits and `_ - . /`, without an empty part, `.` or `..` in its path."""
    parts = (re.sub(r"[^A-Za-z0-9_.-]+", "_", part) for part in name.replace("@", "_at_").split("/"))
    return "/".join(part for part in parts if part.strip("."))
