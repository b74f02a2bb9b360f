"""Draw images from captions: `python jobs/generate.py --model … --captions '["a red apple"]' --output_dir …`."""

import json
import sys
import tempfile
from pathlib import Path

import _bootstrap  # noqa: F401
import torch

from diffdis.image_grid import image_grid
from diffdis.pipeline import DiffDisPipeline
from diffdis_platform.config.generate import GenerateConfig, parse
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, one_line

GRID_IMAGES = 64  # at most, on the one page


def main() -> None:
    config: GenerateConfig = parse(sys.argv[1:])
    captions = config.all_captions()
    pipeline = open_model(config)
    images = []
    for start in range(0, len(captions), config.batch_size):
        places = range(start, min(start + config.batch_size, len(captions)))
        images += pipeline.generate(
            [captions[place] for place in places],
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            seed=config.seed,
            indices=places,
        )
        print(f"{len(images)} of {len(captions)} images", flush=True)
    with tempfile.TemporaryDirectory(prefix="generate_") as folder:
        names = {f"{place:06d}.png": caption for place, caption in enumerate(captions)}
        for name, image in zip(names, images, strict=True):
            image.save(Path(folder) / name)
        (Path(folder) / "captions.json").write_text(json.dumps(names, indent=1))
        image_grid(images[:GRID_IMAGES], captions[:GRID_IMAGES]).save(Path(folder) / "grid.png")
        storage.put_folder(Path(folder), config.output_dir)
    print(f"done: {len(images)} images, captions.json and grid.png in {config.output_dir}")


def open_model(config: GenerateConfig) -> DiffDisPipeline:
    try:
        pipeline = DiffDisPipeline.from_pretrained(storage.cached_folder(config.model))
        return pipeline.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model: {one_line(error)}") from error


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, ValueError) as error:
        sys.exit(f"error: {error}")
