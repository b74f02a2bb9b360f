"""The models of an evaluation, and the functions that build them on a replica."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffdis.config import Dtype
from diffdis.export_folder import CONFIG_NAME
from diffdis.model_folder import digest_of_folder
from diffdis.scorers import SCORER_TYPES, ClipScorer, DiffDisScorer, Resize
from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.export import ExportConfig
from diffdis_platform.exporting import export, find_checkpoint
from ray_platform import storage
from ray_platform.cached_folders import with_cached_folders
from ray_platform.contracts import ConfigError, DataError, one_line
from ray_platform.evaluate.result_cache import cache_key
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
    preprocessing: str = ""  # of images, for the results
    source: str = ""  # the checkpoint that the folder was exported from; empty: the folder itself
    dtype: Dtype = "float32"

    @property
    def identity(self) -> str:
        """What rows depend on, besides settings and preprocessing."""
        return f"{self.digest} {self.dtype}"

    @property
    def can_generate(self) -> bool:
        return self.task in ("joint", "generation")

    @property
    def can_score(self) -> bool:
        return self.task != "generation"

    def describe(self) -> EvaluatedModel:
        return {
            "name": self.name,
            "pretrained": self.source or self.url,
            "task": self.task,
            "step": self.step,
            "settings": dict(self.settings),
            "weights_digest": self.digest,
            "preprocessing": self.preprocessing,
            "dtype": self.dtype,
        }


def open_model(config: EvalConfig) -> EvaluationModel:
    """Return the evaluated model: a CLIP or SigLIP, an exported model, or a checkpoint, which is exported first.

    Raises ConfigError if there is neither.
    """
    checkpoint = config.checkpoint.rstrip("/")
    if _is_scorer(checkpoint):
        return _open_clip(
            checkpoint, config.name or _default_name(checkpoint, "", None), "checkpoint", config.resize, config.dtype
        )
    if storage.exists(storage.join(checkpoint, CONFIG_NAME)):
        url, step, source, folders = checkpoint, None, "", [checkpoint, _parent(checkpoint)]
    else:
        url, step, source = _export_checkpoint(config)
        folders = [_parent(_parent(_parent(source)))]
    run_record, summary = (
        next((storage.read_json(file) for folder in folders if storage.exists(file := storage.join(folder, name))), None)
        for name in (RUN_RECORD, SUMMARY)
    )
    description = storage.read_json(storage.join(url, CONFIG_NAME))
    task, size = description.get("trained_for", "joint"), description.get("image_size")
    step = step if step is not None else (summary or {}).get("num_steps")
    scoring = config.scoring
    settings = {"num_steps": scoring.num_steps, "num_draws": scoring.num_draws, "guidance": scoring.guidance}
    return EvaluationModel(
        config.name or _default_name(checkpoint, folders[-1], step),
        url,
        with_cached_folders(_digest, url),
        functools.partial(with_cached_folders, functools.partial(DiffDisScorer, dtype=config.dtype), url),
        task,
        {} if task == "clip" else settings,
        step,
        run_record,
        f"square from the center, bicubic to {size} px",
        source,
        config.dtype,
    )


def _is_scorer(url: str) -> bool:
    """Return whether a folder has a CLIP or SigLIP in transformers' layout."""
    file = storage.join(url, "config.json")
    if storage.exists(storage.join(url, CONFIG_NAME)) or not storage.exists(file):
        return False
    try:
        return storage.read_json(file).get("model_type") in SCORER_TYPES
    except (ValueError, AttributeError, DataError):
        return False


def _default_name(checkpoint: str, run_folder: str, step: int | None) -> str:
    """Return `<run>-step-<n>`, or the name of the model's folder if its step is unknown."""
    source = checkpoint if step is None else run_folder
    name = re.sub(r"[^\w.-]+", "-", source.rstrip("/").rpartition("/")[2]).strip(".-")[:80] or "model"
    return name if step is None else f"{name}-step-{step}"


def open_baseline(url: str, taken_names: set[str], resize: Resize = "torch", dtype: Dtype = "float32") -> EvaluationModel:
    """Return a CLIP in transformers' layout; its name is that of its folder."""
    name = url.rstrip("/").rsplit("/", 1)[-1]
    if name in taken_names:
        raise ConfigError(f"baselines: two models are named {name}; rename a folder")
    return _open_clip(url, name, "baselines", resize, dtype)


def open_judge(url: str, resize: Resize = "torch") -> EvaluationModel:
    """Return the CLIP that measures how well generated images fit their prompts."""
    return _open_clip(url, f"CLIP {url.rstrip('/').rsplit('/', 1)[-1]}", "quality.clip", resize)


def _open_clip(url: str, name: str, field_name: str, resize: Resize, dtype: Dtype = "float32") -> EvaluationModel:
    """Return a CLIP, after building it once: a folder that cannot be opened is reported before hours of work."""
    if not storage.exists(storage.join(url, "config.json")):
        raise ConfigError(f"{field_name}: {url} has no config.json; give the folder of a CLIP or SigLIP in transformers' layout")
    build = functools.partial(with_cached_folders, functools.partial(ClipScorer, resize=resize, dtype=dtype), url)
    try:
        preprocessing = build("cpu").preprocessing
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"{field_name}: {url} cannot be opened ({one_line(error, 300)}); give another folder") from None
    return EvaluationModel(name, url, with_cached_folders(_digest, url), build, preprocessing=preprocessing, dtype=dtype)


def _digest(url: str) -> str:
    """Return a digest of the model's files; SigLIP's vocabulary is a .model file, which `digest_of_folder` leaves out."""
    vocabularies = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(url).rglob("*.model"))]
    digest = digest_of_folder(Path(url))
    return cache_key(digest=digest, vocabularies=vocabularies)[:16] if vocabularies else digest


def _export_checkpoint(config: EvalConfig) -> tuple[str, int, str]:
    """Return the folder of the checkpoint's exported model, its step, and the checkpoint. An earlier export is reused."""
    url, manifest = find_checkpoint(config.checkpoint)
    folder = storage.join(config.output_dir, "models", f"{cache_key(checkpoint=url, token=manifest.token)[:12]}-{config.weights}")
    export_config = ExportConfig(url, folder, config.weights)
    record = {"checkpoint": url, "token": manifest.token, "weights": config.weights}
    record_url = storage.join(export_config.output_dir, EXPORT_RECORD)
    if not storage.exists(record_url) or storage.read_json(record_url) != record:
        print(f"exporting {url} …", flush=True)
        export(export_config)
        storage.write_bytes(record_url, json.dumps(record).encode())
    return export_config.output_dir, manifest.step, url


def _parent(url: str) -> str:
    return url.rpartition("/")[0]
