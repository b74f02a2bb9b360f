"""Which models are evaluated, and what builds them in a worker."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffdis.clip_scorer import ClipScorer
from diffdis.encoder import digest_of_folder
from diffdis.pipeline import CONFIG_NAME
from diffdis.scorer import DiffDisScorer
from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.export import ExportConfig
from diffdis_platform.exporting import export, find_checkpoint
from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.tracking import RUN_RECORD
from ray_platform.train.launch import SUMMARY

EXPORTED = "exported.json"  # beside a model that an evaluation exported: of which checkpoint


@dataclass(frozen=True)
class Model:
    """One that tells which text belongs to an image."""

    name: str  # of its results
    url: str  # its folder
    digest: str  # of its files
    build: Callable[[str], Any]  # a Scorer, in a worker
    task: str = "clip"
    settings: Mapping[str, Any] = field(default_factory=dict)  # of embed_images
    step: int | None = None
    tracked: Mapping[str, str] | None = None  # the MLflow run that made it

    def with_settings(self, **settings: Any) -> "Model":
        return Model(self.name, self.url, self.digest, self.build, self.task, settings, self.step, self.tracked)

    @property
    def can_draw(self) -> bool:
        return self.task in ("joint", "generation")

    @property
    def can_score(self) -> bool:
        return self.task != "generation"

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name, "pretrained": self.url, "task": self.task, "step": self.step, "settings": dict(self.settings),
        }  # fmt: skip


def open_model(config: EvalConfig) -> Model:
    """The evaluated model; a checkpoint is exported first. Raises ConfigError where there is neither."""
    given = config.checkpoint.rstrip("/")
    if storage.exists(storage.join(given, CONFIG_NAME)):
        url, step, places = given, None, [given, _parent(given)]
    else:
        url, step, run = _exported(config)
        places = [run]
    saved = storage.read_json(storage.join(url, CONFIG_NAME))
    tracked, summary = (_first(places, name) for name in (RUN_RECORD, SUMMARY))
    task = saved.get("trained_for", "joint")
    settings = {"num_steps": config.scoring.num_steps, "num_draws": config.scoring.num_draws, "guidance": config.scoring.guidance}
    return Model(
        "diffdis",
        url,
        storage.with_cached_folders(_digest, url),
        functools.partial(storage.with_cached_folders, DiffDisScorer, url),
        task,
        {} if task == "clip" else settings,
        step if step is not None else (summary or {}).get("num_steps"),
        tracked,
    )


def open_baseline(url: str, taken: set[str]) -> Model:
    """A CLIP in transformers' layout, named by its folder."""
    if not storage.exists(storage.join(url, "config.json")):
        raise ConfigError(f"baselines: {url} has no config.json; give a CLIP's folder in transformers' layout")
    name = url.rstrip("/").rsplit("/", 1)[-1]
    if name in taken:
        raise ConfigError(f"baselines: two models are called {name}; rename a folder")
    build = functools.partial(storage.with_cached_folders, ClipScorer, url)
    return Model(name, url, storage.with_cached_folders(_digest, url), build)


def _digest(url: str) -> str:
    return digest_of_folder(Path(url))


def _exported(config: EvalConfig) -> tuple[str, int, str]:
    """(the folder of the checkpoint's model, its step, the run's folder). What an earlier evaluation exported serves again."""
    wanted = ExportConfig(config.checkpoint, storage.join(config.output_dir, "model"), config.weights)
    url, manifest = find_checkpoint(config.checkpoint)
    mark = {"checkpoint": url, "token": manifest.token, "weights": config.weights}
    mark_url = storage.join(wanted.output_dir, EXPORTED)
    if not storage.exists(mark_url) or storage.read_json(mark_url) != mark:
        print(f"exporting {url} …", flush=True)
        export(wanted)
        storage.write_bytes(mark_url, json.dumps(mark).encode())
    return wanted.output_dir, manifest.step, _parent(_parent(_parent(url)))


def _first(folders: list[str], name: str) -> Any:
    urls = [url for folder in folders if storage.exists(url := storage.join(folder, name))]
    return storage.read_json(urls[0]) if urls else None


def _parent(url: str) -> str:
    return url.rpartition("/")[0]
