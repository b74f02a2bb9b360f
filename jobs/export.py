"""Write a pipeline folder from any checkpoint: `python jobs/export.py --checkpoint <run or step_* folder> --output_dir …`."""

import sys
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline, UNet2DConditionModel

import _bootstrap  # noqa: F401
from diffdis.pipeline import DiffDisPipeline
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.train import checkpoint
from recipes.export import ExportConfig, build_task, parse


def main() -> None:
    config: ExportConfig = parse(sys.argv[1:])
    url, manifest = config.find()
    ema = config.weights == "ema" or (config.weights == "best" and manifest.config["train"]["ema_decay"] > 0)
    weights = dict(checkpoint.weights_of(url, "ema" if ema else "weights"))
    task = build_task(manifest.config)
    with tempfile.TemporaryDirectory(prefix="export_") as folder:
        task.save_pretrained(weights, Path(folder))
        opened = ", ".join(check_opens(Path(folder)))
        storage.put_folder(Path(folder), config.output_dir)
    print(
        f"done: {'the EMA' if ema else 'the weights'} of step {manifest.step} ({url}) in {config.output_dir}; opens as {opened}"
    )


def check_opens(folder: Path) -> list[str]:
    """What reads the folder, each of which was tried. Raises what it raises where it cannot."""
    DiffDisPipeline.from_pretrained(folder)
    UNet2DConditionModel.from_pretrained(folder / "unet")
    opened = ["DiffDisPipeline", "diffusers' UNet2DConditionModel"]
    if (folder / "model_index.json").exists():
        DiffusionPipeline.from_pretrained(folder)
        opened.append("diffusers' StableDiffusionPipeline")
    return opened


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
