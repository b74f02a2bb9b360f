"""From a checkpoint to a pipeline folder: the command line of jobs/export.py, and what it does."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffusers import DiffusionPipeline, UNet2DConditionModel

from diffdis.config import DiffDisConfig, ObjectiveConfig
from diffdis.pipeline import DiffDisPipeline
from diffdis.task import DiffDisTask
from diffdis.warm_start import resolve_encoder_paths
from diffdis_platform.config.arguments import Parser, resolve
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, describe_error
from ray_platform.train import checkpointing
from ray_platform.train.checkpointing import Manifest


@dataclass(frozen=True)
class ExportConfig:
    """Which checkpoint, and where the model goes."""

    checkpoint: str = ""  # a step_* folder, or a run's output_dir: then its newest one; local or s3://
    output_dir: str = ""  # absolute folder or s3:// URL
    weights: Literal["best", "ema", "weights"] = "best"  # best: the EMA where there is one

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ConfigError("checkpoint: give a step_* folder of a run's checkpoints, or the run's output_dir")
        if "://" not in self.output_dir and not os.path.isabs(self.output_dir):
            raise ConfigError(f"output_dir: {self.output_dir or 'empty'}; give an absolute folder or an s3:// URL")

    def find(self) -> tuple[str, Manifest]:
        """Raises ConfigError where there is no complete checkpoint."""
        url = self.checkpoint.rstrip("/")
        if not storage.exists(storage.join(url, checkpointing.COMPLETE)):
            found = checkpointing.list_checkpoints(url)
            if not found:
                raise ConfigError(f"checkpoint: {url} is no complete checkpoint, and no run that has one")
            url = found[0]
        return url, checkpointing.read_manifest(url)


def export(config: ExportConfig) -> str:
    """Write the folder, check that it opens, and say in a line what was done. Raises ConfigError and DataError."""
    url, manifest = config.find()
    try:
        ema = config.weights == "ema" or (config.weights == "best" and manifest.config["train"]["ema_decay"] > 0)
        task = build_task(manifest.config)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OSError) as error:
        raise DataError(
            f"{url}: no model can be built from the configuration in it ({describe_error(error)}); take another"
        ) from None
    weights = dict(checkpointing.weights_of(url, "ema" if ema else "weights"))
    with tempfile.TemporaryDirectory(prefix="export_") as folder:
        try:
            task.save_pretrained(weights, Path(folder))
        except (KeyError, ValueError, RuntimeError) as error:
            raise DataError(f"{url}: its tensors are not those of its model ({describe_error(error)}); take another") from None
        opened = ", ".join(check_opens(Path(folder)))
        storage.put_folder(Path(folder), config.output_dir)
    which = "the EMA" if ema else "the weights"
    return f"done: {which} of step {manifest.step} ({url}) in {config.output_dir}; opens as {opened}"


def check_opens(folder: Path) -> list[str]:
    """What reads the folder, each of which was tried. Raises what it raises where it cannot."""
    DiffDisPipeline.from_pretrained(folder)
    UNet2DConditionModel.from_pretrained(folder / "unet")
    opened = ["DiffDisPipeline", "diffusers' UNet2DConditionModel"]
    if (folder / "model_index.json").exists():
        DiffusionPipeline.from_pretrained(folder)
        opened.append("diffusers' StableDiffusionPipeline")
    return opened


def build_task(config: dict[str, Any]) -> DiffDisTask:
    """The Task that a run's configuration describes; its weights are still to come, so it starts from none."""
    model = resolve_encoder_paths(DiffDisConfig.from_dict(config["model"]))
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in config["objective"].items()}
    objective = ObjectiveConfig(**values)
    return storage.with_cached_folders(DiffDisTask, replace(model, warm_start=""), objective)


def parse(arguments: Sequence[str]) -> ExportConfig:
    """Raises ConfigError, in one line, for a field or value that does not exist."""
    parser = Parser(prog="jobs/export.py", description="Write the model of a checkpoint as a pipeline folder.")
    parser.add_class_arguments(ExportConfig)
    values, _ = resolve(parser, arguments)
    return ExportConfig(**{name: getattr(values, name) for name in ExportConfig.__dataclass_fields__})
