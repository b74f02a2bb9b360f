"""What an evaluation found, as files and as a run's metrics.

`results/<model>/<set>.json` and `results.csv` have the fields and columns of CLIP_benchmark, so that whatever reads its results
reads these too. `details` is what `jobs/eval.py` found, in plain JSON types; `report.report_page` shows it.
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

_FIRST_COLUMNS = ("dataset", "model", "pretrained", "model_fullname", "task", "language", "n")
_PICTURES = ("jpeg", "png")
_LONGEST_NAME = 100  # of a part of a metric's name: a server takes 250 characters in all


def write_results(details: Mapping[str, Any], output_dir: str) -> None:
    """Write `results/<model>/<set>.json`, `results.csv` and `details.json`, the last one without pictures.

    Raises ConfigError where two models would write to one folder, DataError where storage does not take a file.
    """
    folders = model_folders(details)
    found = [(result, _clip_benchmark_json(result, task, details)) for result, task in _results(details)]
    for result, content in found:
        file = f"{result['set'].replace('/', '-')}.json"
        storage.write_bytes(storage.join(output_dir, "results", folders[result["model"]], file), as_json(content))
    storage.write_bytes(storage.join(output_dir, "results.csv"), _csv([content for _, content in found]))
    storage.write_bytes(storage.join(output_dir, "details.json"), as_json(_without_pictures(details)))


def model_folders(details: Mapping[str, Any]) -> dict[str, str]:
    """The folder below `results/` of each model, by its name. Raises ConfigError where two of them are one."""
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
    """All figures by names that MLflow takes: `eval/vtab/cifar10/acc1`, `eval/flickr30k/image_retrieval_recall_at_1`,
    `eval/zero_shot_mean`, `eval/fid/guidance_3`; those of other models than the first below `eval_baseline/<model>/`.

    What is not defined (acc5 over fewer than five classes, say) is left out.
    """
    names = [model["name"] for model in details["models"]]
    above = {name: f"eval_baseline/{name.replace('/', '-')[:_LONGEST_NAME]}" for name in names}
    above[names[0]] = "eval"
    found = {f"{above[name]}/zero_shot_mean": mean for name, mean in details.get("means", {}).items()}
    for result, _ in _results(details):
        for metric, value in result["metrics"].items():
            found[f"{above[result['model']]}/{result['set']}/{metric}"] = value
    for point in details.get("curve", ()):
        name = f"{above[point['model']]}/curve/{point['set']}/num_steps_{point['num_steps']}_num_draws_{point['num_draws']}"
        found[name] = point["acc1"]
    for point in details.get("quality", ()):
        for metric, value in point["metrics"].items():
            found[f"eval/{metric}/guidance_{point['guidance_scale']:g}"] = value
    return {_metric_name(name): float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def check_same_protocol(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Refuse to compare figures that were not measured in the same way, or features with statistics of other features.

    Raises ConfigError that names the first field in which the protocols differ (`reference.digest`, say), and both values.
    """
    difference = first_difference(json.loads(as_json(a)), json.loads(as_json(b)))
    if difference:
        field, one, other = difference
        raise ConfigError(
            f"protocol {field}: {one} and {other}; figures of different protocols cannot be compared: measure both in one way"
        )


def _results(details: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Each (model, set), with CLIP_benchmark's name of the task."""
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
    """The rows and columns that `clip_benchmark build` makes of these JSONs. Its order of columns changes with every call."""
    rows = [
        {field: value for field, value in content.items() if field != "metrics"}
        | _plain(content["metrics"])
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


def as_json(value: Any) -> bytes:
    """Strict JSON: NaN and infinities, at which other readers than Python's stop, become null."""
    return (json.dumps(_plain(value), indent=1, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_pictures(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _without_pictures(inner)
            for key, inner in value.items()
            if not (key in _PICTURES and isinstance(inner, str))
        }  # fmt: skip
    return [_without_pictures(inner) for inner in value] if isinstance(value, list | tuple) else value


def _metric_name(name: str) -> str:
    """MLflow takes ASCII letters, digits and `_ - . /` everywhere, and no empty part of a path, nor `.` or `..`."""
    parts = (re.sub(r"[^A-Za-z0-9_.-]+", "_", part) for part in name.replace("@", "_at_").split("/"))
    return "/".join(part for part in parts if part.strip("."))


def first_difference(a: Any, b: Any, field: str = "") -> tuple[str, str, str] | None:
    """Where two JSON values differ first, in the order of `a`, and both values in short."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            inner = f"{field}.{key}" if field else key
            if key not in a or key not in b:
                return inner, _short(a[key]) if key in a else "absent", _short(b[key]) if key in b else "absent"
            if difference := first_difference(a[key], b[key], inner):
                return difference
        return None
    return None if a == b else (field, _short(a), _short(b))


def with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that was saved earlier, with the default of every field that the code got later."""
    filled = dict(given)
    for name, default in defaults.items():
        if name not in given:
            filled[name] = default
        elif isinstance(given[name], dict) and isinstance(default, dict):
            filled[name] = with_defaults(given[name], default)
    return filled


def _short(value: Any) -> str:
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= 80 else f"{line[:79]}…"
