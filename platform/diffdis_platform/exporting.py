"""Export of a checkpoint as a pipeline folder."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffdis.config import DiffDisConfig, ObjectiveConfig
from diffdis.task import DiffDisTask
from diffdis.warm_start import resolve_pretrained
from diffdis_platform.config.export import ExportConfig
from diffdis_platform.config.fields import field_types
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.saved import read_saved
from ray_platform import storage
from ray_platform.cached_folders import with_cached_folders
from ray_platform.contracts import ConfigError, DataError, describe_error
from ray_platform.train import checkpoint_format
from ray_platform.train.checkpoint_format import Manifest
from ray_platform.train.config import width_state
from ray_platform.train.posthoc_ema import reconstruct
from ray_platform.train.zero import name_accelerator


def find_checkpoint(checkpoint_url: str) -> tuple[str, Manifest]:
    """Return the folder and the manifest of a checkpoint; the newest one if `checkpoint_url` is a run's output_dir.

    Raises:
        ConfigError: there is no complete checkpoint.
    """
    url = checkpoint_url.rstrip("/")
    if not storage.exists(storage.join(url, checkpoint_format.COMPLETE)):
        checkpoints = checkpoint_format.list_checkpoints(url)
        if not checkpoints:
            raise ConfigError(
                f"checkpoint: {url} is not a complete checkpoint or a run that has one; "
                "give a run's output_dir or one of its step_* folders"
            )
        url = checkpoints[0]
    return url, checkpoint_format.read_manifest(url)


def export(config: ExportConfig) -> str:
    """Write the pipeline folder, check that it opens, and return one line for the user.

    Raises:
        ConfigError: there is no complete checkpoint.
        DataError: the checkpoint does not describe a model, or does not hold its tensors.
    """
    url, manifest = find_checkpoint(config.checkpoint)
    try:
        settings = read_saved(manifest.config, field_types(PretrainConfig), f"{url}/{checkpoint_format.COMPLETE}", ("recipe",))
        task, facts = build_task(settings), manifest.training_facts()
        train = settings["train"]
        scored = train.get("eval_weights", "best")
        if scored == "best":
            scored = "ema" if train["ema_decay"] > 0 else "weights"
        state = scored if config.weights == "best" else config.weights
        stored_widths = [float(width) for width in train.get("ema_widths", ())]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OSError) as error:
        raise DataError(
            f"{url}: no model can be built from the configuration in it ({describe_error(error)}); take another"
        ) from None
    if state != scored:
        facts["scores"] = {name: value for name, value in facts["scores"].items() if not name.startswith("heldout/")}
    weights = _read_weights(url, state, stored_widths)
    name_accelerator()
    with tempfile.TemporaryDirectory(prefix="export_") as folder:
        try:
            opened = task.save_pretrained(weights, Path(folder), facts)
        except (KeyError, ValueError, RuntimeError) as error:
            raise DataError(f"{url}: no model can be exported from its tensors ({describe_error(error)}); take another") from None
        storage.put_folder(Path(folder), config.output_dir)
    which = {"weights": "the weights", "ema": "the EMA"}.get(state, state)
    return f"done: {which} of step {manifest.step} ({url}) in {config.output_dir}; opens as {', '.join(opened)}"


def _read_weights(url: str, state: str, stored_widths: list[float]) -> dict[str, torch.Tensor]:
    """Return weights or an EMA of a checkpoint. An EMA of a width that it does not have is reconstructed."""
    width = state.removeprefix("ema_width_")
    if width != state and float(width) not in stored_widths:
        return reconstruct(url, stored_widths, float(width))
    return dict(checkpoint_format.read_weights(url, state if width == state else width_state(float(width))))


def build_task(config: dict[str, Any]) -> DiffDisTask:
    """Return the task that the configuration of a run describes, without the weights of a warm start."""
    model = DiffDisConfig.from_dict(config["model"])
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in config["objective"].items()}
    objective = ObjectiveConfig(**values)

    def build(model: DiffDisConfig) -> DiffDisTask:
        return DiffDisTask(replace(resolve_pretrained(model), warm_start=""), objective)

    return with_cached_folders(build, model)
