"""The models of an evaluation, and the functions that build them on a replica."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffdis.clip_scorer import ClipScorer
from diffdis.encoder import digest_of_folder
from diffdis.export_folder import CONFIG_NAME
from diffdis.scorer import DiffDisScorer
from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.export import ExportConfig
from diffdis_platform.exporting import export, find_checkpoint
from ray_platform import storage
from ray_platform.cached_folders import with_cached_folders
from ray_platform.contracts import ConfigError, one_line
from ray_platform.report.records import EvaluatedModel
from ray_platform.tracking import RUN_RECORD
from ray_platform.train.worker_spec import SUMMARY

EXPORT_RECORD = "exported.json"  # next to a model that an evaluation exported: the checkpoint that it comes from


@dataclass(frozen=True)
class EvaluationModel:
    """A model that is evaluated, or a baseline."""

    name: str  # in the results
    url: str  # its folder
    digest: str  # of its files
    build: Callable[[str], Any]  # torch device -> Scorer; called on a replica
    task: str = "clip"
    settings: Mapping[str, float] = field(default_factory=dict)  # of embed_images
    step: int | None = None
    run_record: Mapping[str, str] | None = None  # the tracked run that trained it

    @property
    def can_generate(self) -> bool:
        return self.task in ("joint", "generation")

    @property
    def can_score(self) -> bool:
        return self.task != "generation"

    def describe(self) -> EvaluatedModel:
        return {"name": self.name, "pretrained": self.url, "task": self.task, "step": self.step, "settings": dict(self.settings)}


def open_model(config: EvalConfig) -> EvaluationModel:
    """Return the evaluated model; a checkpoint is exported first. Raises ConfigError if there is neither."""
    checkpoint = config.checkpoint.rstrip("/")
    if storage.exists(storage.join(checkpoint, CONFIG_NAME)):
        url, step, folders = checkpoint, None, [checkpoint, _parent(checkpoint)]
    else:
        url, step, run_folder = _export_checkpoint(config)
        folders = [run_folder]
    run_record, summary = (
        next((storage.read_json(file) for folder in folders if storage.exists(file := storage.join(folder, name))), None)
        for name in (RUN_RECORD, SUMMARY)
    )
    task = storage.read_json(storage.join(url, CONFIG_NAME)).get("trained_for", "joint")
    scoring = config.scoring
    settings = {"num_steps": scoring.num_steps, "num_draws": scoring.num_draws, "guidance": scoring.guidance}
    return EvaluationModel(
        "diffdis",
        url,
        with_cached_folders(_digest, url),
        functools.partial(with_cached_folders, DiffDisScorer, url),
        task,
        {} if task == "clip" else settings,
        step if step is not None else (summary or {}).get("num_steps"),
        run_record,
    )


def open_baseline(url: str, taken_names: set[str]) -> EvaluationModel:
    """Return a CLIP in transformers' layout; its name is that of its folder."""
    name = url.rstrip("/").rsplit("/", 1)[-1]
    if name in taken_names:
        raise ConfigError(f"baselines: two models are named {name}; rename a folder")
    return _open_clip(url, name, "baselines")


def open_judge(url: str) -> EvaluationModel:
    """Return the CLIP that measures how well generated images fit their prompts."""
    return _open_clip(url, f"CLIP {url.rstrip('/').rsplit('/', 1)[-1]}", "quality.clip")


def _open_clip(url: str, name: str, field_name: str) -> EvaluationModel:
    """Return a CLIP, after building it once: a folder that cannot be opened is reported before hours of work."""
    if not storage.exists(storage.join(url, "config.json")):
        raise ConfigError(f"{field_name}: {url} has no config.json; give the folder of a CLIP in transformers' layout")
    build = functools.partial(with_cached_folders, ClipScorer, url)
    try:
        build("cpu")
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"{field_name}: {url} cannot be opened ({one_line(error, 300)}); give another folder") from None
    return EvaluationModel(name, url, with_cached_folders(_digest, url), build)


def _digest(url: str) -> str:
    return digest_of_folder(Path(url))


def _export_checkpoint(config: EvalConfig) -> tuple[str, int, str]:
    """Return the folder of the checkpoint's exported model, its step, and the run's folder. An earlier export is reused."""
    export_config = ExportConfig(config.checkpoint, storage.join(config.output_dir, "model"), config.weights)
    url, manifest = find_checkpoint(config.checkpoint)
    record = {"checkpoint": url, "token": manifest.token, "weights": config.weights}
    record_url = storage.join(export_config.output_dir, EXPORT_RECORD)
    if not storage.exists(record_url) or storage.read_json(record_url) != record:
        print(f"exporting {url} …", flush=True)
        export(export_config)
        storage.write_bytes(record_url, json.dumps(record).encode())
    return export_config.output_dir, manifest.step, _parent(_parent(_parent(url)))


def _parent(url: str) -> str:
    return url.rpartition("/")[0]
