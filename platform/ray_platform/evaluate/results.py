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

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.json_values import first_difference, to_json, to_plain
from ray_platform.metric_registry import check_declared

_FIRST_COLUMNS = ("dataset", "model", "pretrained", "model_fullname", "task", "language", "n")
_IMAGE_FIELDS = ("jpeg", "png")
_MAX_MODEL_NAME = 100  # characters in a metric's name, of which a tracking server takes 250 in all


def write_results(details: Mapping[str, Any], output_dir: str) -> None:
    """Write `results/<model>/<set>.json`, `results.csv` and `details.json`.

    Raises:
        ConfigError: Two models would write to the same folder.
        DataError: Storage does not accept a file.
    """
    folders = model_folders(details)
    contents = [(result, _clip_benchmark_json(result, task, details)) for result, task in _results(details)]
    for result, content in contents:
        file = f"{result['set'].replace('/', '-')}.json"
        storage.write_bytes(storage.join(output_dir, "results", folders[result["model"]], file), to_json(content))
    storage.write_bytes(storage.join(output_dir, "results.csv"), _csv([content for _, content in contents]))
    storage.write_bytes(storage.join(output_dir, "details.json"), to_json(_without_images(details)))


def model_folders(details: Mapping[str, Any]) -> dict[str, str]:
    """Return the folder below `results/` of each model, by its name. Raise ConfigError when two models share one."""
    folders: dict[str, str] = {}
    for model in details["models"]:
        folder = re.sub(r"[^\w.-]+", "-", model["name"]).strip(".-") or "model"
        for other, taken in folders.items():
            if taken == folder:
                raise ConfigError(
                    f"models: {other!r} and {model['name']!r} would both write to results/{folder}; give them distinct names"
                )
        folders[model["name"]] = folder
    return folders


def metrics_for_tracking(details: Mapping[str, Any]) -> dict[str, float]:
    """Return all metrics by names that MLflow accepts.

    Examples: `eval/vtab/cifar10/acc1`, `eval/flickr30k/image_retrieval_recall_at_1`, `eval/zero_shot_mean` and
    `eval/fid/guidance_3`; those of baselines are below `eval_baseline/<model>/`. Undefined values, such as acc5 over fewer than
    five classes, are left out. Raises ConfigError for a metric that the registry lacks.
    """
    names = [model["name"] for model in details["models"]]
    prefix = {name: f"eval_baseline/{name.replace('/', '-')[:_MAX_MODEL_NAME]}" for name in names}
    prefix[names[0]] = "eval"
    metrics = {f"{prefix[name]}/zero_shot_mean": mean for name, mean in details.get("means", {}).items()}
    for result, _ in _results(details):
        for metric, value in result["metrics"].items():
            metrics[f"{prefix[result['model']]}/{result['set']}/{metric}"] = value
    for point in details.get("curve", ()):
        name = f"{prefix[point['model']]}/curve/{point['set']}/num_steps_{point['num_steps']}_num_draws_{point['num_draws']}"
        metrics[name] = point["acc1"]
    for point in details.get("quality", ()):
        for metric, value in point["metrics"].items():
            metrics[f"eval/{metric}/guidance_{point['guidance_scale']:g}"] = value
    check_declared(metrics)
    return {_mlflow_name(name): float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}


def check_same_protocol(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise ConfigError when two results were not measured in the same way; it names the first field that differs."""
    difference = first_difference(json.loads(to_json(a)), json.loads(to_json(b)))
    if difference:
        field, one, other = difference
        raise ConfigError(
            f"protocol {field}: {one} and {other}; figures of different protocols cannot be compared: measure both in one way"
        )


def _results(details: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield each result of a model on a set with CLIP_benchmark's name of the task."""
    for result in details.get("zero_shot", ()):
        yield result, "zeroshot_classification"
    for result in details.get("retrieval", ()):
        yield result, "zeroshot_retrieval"


def _clip_benchmark_json(result: Mapping[str, Any], task: str, details: Mapping[str, Any]) -> dict[str, Any]:
    model = next(model for model in details["models"] if model["name"] == result["model"])
    return {
        "dataset": result["set"],
        "model": model["name"],
        "pretrained": model["pretrained"],
        "task": task,
        "metrics": result["metrics"],
        "language": "en",
        "n": result["num_images"] if task == "zeroshot_retrieval" else result["n"],
        "seconds": result["seconds"],
        "settings": model["settings"],
        "code_version": details["code_version"],
        "num_unreadable": result["num_unreadable"],
    }


def _csv(contents: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the rows and columns that `clip_benchmark build` makes of these JSON files, in a fixed order of columns."""
    rows = [
        {field: value for field, value in content.items() if field != "metrics"}
        | to_plain(content["metrics"])
        | {"model_fullname": f"{content['model']} {content['pretrained']}"}
        for content in contents
    ]
    columns = dict.fromkeys([*_FIRST_COLUMNS, *(metric for content in contents for metric in content["metrics"])])
    columns |= dict.fromkeys(field for row in rows for field in row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(columns))
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def _without_images(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _without_images(inner)
            for key, inner in value.items()
            if not (key in _IMAGE_FIELDS and isinstance(inner, str))
        }  # fmt: skip
    return [_without_images(inner) for inner in value] if isinstance(value, list | tuple) else value


def _mlflow_name(name: str) -> str:
    """Return a name of ASCII letters, digits and `_ - . /`, without an empty part, `.` or `..` in its path."""
    parts = (re.sub(r"[^A-Za-z0-9_.-]+", "_", part) for part in name.replace("@", "_at_").split("/"))
    return "/".join(part for part in parts if part.strip("."))
