"""`diffdis generate`: generate images from captions with an exported model."""

import itertools
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdis.config import Dtype
from diffdis_platform.commands import check_exists
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, check_output_dir, parse
from ray_platform.contracts import ConfigError, one_line
from ray_platform.storage_config import StorageConfig
from ray_platform.units import plural

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffdis.pipeline import DiffDisPipeline

INTERRUPTED = "stopped; the images so far are in output_dir"
_MAX_GRID_IMAGES = 64

HELP = CommandHelp(
    "generate",
    "Generate images from captions with an exported model.",
    examples=(
        "--model /runs/demo --captions 'red heart' 'green apple' --output_dir /images",
        "--model s3://bucket/models/1 --captions_file captions.txt --num_images_per_prompt 4 --output_dir s3://bucket/images",
    ),
    fields=(
        *("model", "output_dir", "captions", "captions_file", "negative_prompt", "num_images_per_prompt", "best_of", "num_steps"),
        *("scheduler", "guidance_scale", "height", "width", "seed", "batch_size", "device", "dtype"),
    ),
)


@dataclass(frozen=True)
class GenerateConfig:
    """The model, the captions, and the folder of the images."""

    model: str = ""
    """Folder of an exported model, or of a run that has finished; local or s3://."""
    output_dir: str = ""
    """Absolute folder or s3:// URL of the images."""
    captions: tuple[str, ...] = ()
    """Captions of the images."""
    captions_file: str = ""
    """File with one caption per line, instead of captions; local or s3://."""
    negative_prompt: str = ""
    """Text that guidance leads away from."""
    num_images_per_prompt: int = 1
    """Images per caption."""
    best_of: int = 1
    """Images per caption, of which the model keeps the num_images_per_prompt closest to the caption. 1: all are kept."""
    num_steps: int = 50
    """Steps of the sampler."""
    scheduler: str = ""
    """Sampler of diffusers, such as UniPCMultistepScheduler. Empty: DDIM."""
    guidance_scale: float = 7.5
    """Classifier-free guidance. 1: no guidance."""
    height: int = 0
    """Height in pixels. 0: the model's size."""
    width: int = 0
    """Width in pixels. 0: the model's size."""
    seed: int = 0
    """Seed. An image depends on it and on its own index alone."""
    batch_size: int = 16
    """Images per forward pass."""
    device: str = ""
    """Device, such as cuda. Empty: an accelerator if there is one."""
    dtype: Dtype = "float32"
    """dtype of the model."""
    storage: StorageConfig = field(default_factory=StorageConfig)

    def check(self) -> None:
        """Raise ConfigError for a field that is missing or invalid."""
        if not self.model:
            raise ConfigError("model: give the folder of an exported model")
        check_output_dir(self.output_dir)
        if bool(self.captions) == bool(self.captions_file):
            raise ConfigError("captions: give captions or captions_file, and not both")
        if min(self.num_steps, self.batch_size, self.num_images_per_prompt) < 1:
            raise ConfigError("num_steps, batch_size and num_images_per_prompt: must be at least 1")
        if self.best_of != 1 and self.best_of < self.num_images_per_prompt:
            raise ConfigError(
                f"best_of: {self.best_of} images per caption, but num_images_per_prompt keeps {self.num_images_per_prompt} of "
                "them; use 1, or at least as many"
            )

    def all_captions(self) -> list[str]:
        """Return the captions. Raises ConfigError for a file without one."""
        if self.captions:
            return list(self.captions)
        from ray_platform import storage

        check_exists("captions_file", self.captions_file)
        lines = storage.read_small(self.captions_file).decode(errors="replace").splitlines()
        if not (captions := [line.strip() for line in lines if line.strip()]):
            raise ConfigError(f"captions_file: {self.captions_file} holds no caption; write one per line")
        return captions


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[GenerateConfig]:
    return parse(GenerateConfig, argv, HELP)


def main(argv: Sequence[str]) -> int:
    config = parse_arguments(argv).config
    check_exists("model", config.model)
    captions = config.all_captions()
    _check_is_model(config.model)
    from diffdis.image_grid import image_grid
    from ray_platform import storage

    pipeline = _open_model(config)
    if config.best_of > 1 and pipeline.config.trained_for != "joint":
        raise ConfigError(f"best_of: {config.best_of}, but {config.model} was not trained to score images; use 1")
    repeated = [caption for caption in captions for _ in range(config.num_images_per_prompt)]
    names = {f"{index:06d}.png": caption for index, caption in enumerate(repeated)}
    shown: list[Image] = []
    done = 0
    for images in _generate(pipeline, config, captions):
        with tempfile.TemporaryDirectory(prefix="generate_") as folder:
            for name, image in zip(list(names)[done:], images, strict=False):
                image.save(Path(folder) / name)
            if len(shown) < _MAX_GRID_IMAGES:  # from the first images on, in case that the command is interrupted
                shown = [*shown, *images][:_MAX_GRID_IMAGES]
                image_grid(shown, repeated[: len(shown)]).save(Path(folder) / "grid.png")
                (Path(folder) / "captions.json").write_text(json.dumps(names, indent=1))
            storage.put_folder(Path(folder), config.output_dir)
        done += len(images)
    print(f"done: {plural(done, 'image')}, captions.json and grid.png in {config.output_dir}")
    return 0


def _generate(pipeline: "DiffDisPipeline", config: GenerateConfig, captions: Sequence[str]) -> Iterator["list[Image]"]:
    """Yield the images of `batch_size` captions at a time: the images and the batches of a single call.

    Raises:
        ConfigError: the model cannot generate such images.
    """
    from ray_platform.terminal import ProgressBar

    num_images = len(captions) * max(config.best_of, config.num_images_per_prompt)
    total, bar = -(-num_images // config.batch_size) * config.num_steps, ProgressBar()
    steps = itertools.count(1)

    def show_step(_pipeline: object, _index: int, _timestep: int, values: Any) -> Any:
        bar.update("steps", next(steps), total)
        return values

    pipeline.set_progress_bar_config(disable=True)
    per_caption = 1 if config.best_of > 1 else config.num_images_per_prompt  # indices: one per caption if images are ranked
    pipeline.warn_about_long_captions(list(dict.fromkeys([*captions, config.negative_prompt])))
    for start in range(0, len(captions), config.batch_size):
        part = captions[start : start + config.batch_size]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* are cut")  # the long captions of this part, again
                images = pipeline.generate(
                    part,
                    negative_prompt=config.negative_prompt,
                    num_images_per_prompt=config.num_images_per_prompt,
                    best_of=config.best_of,
                    num_inference_steps=config.num_steps,
                    guidance_scale=config.guidance_scale,
                    height=config.height or None,
                    width=config.width or None,
                    seed=config.seed,
                    indices=range(start * per_caption, (start + len(part)) * per_caption),
                    batch_size=config.batch_size,
                    callback_on_step_end=show_step,
                )
        except ValueError as error:
            raise ConfigError(f"{config.model}: {one_line(error)}") from error
        yield images


def _check_is_model(url: str) -> None:
    """Raise ConfigError for a folder that is not an exported model or a run, before libraries are imported."""
    from ray_platform import storage

    if not any(storage.exists(storage.join(folder, "diffdis.json")) for folder in (url, storage.join(url, "export"))):
        raise ConfigError(f"model: {url}: no diffdis.json in this folder; give a folder that DiffDis exported")


def _open_model(config: GenerateConfig) -> "DiffDisPipeline":
    import torch

    from diffdis.export_folder import CONFIG_NAME, read_config
    from diffdis.pipeline import DiffDisPipeline
    from diffdis.schedule import build_scheduler
    from ray_platform import storage
    from ray_platform.cached_folders import cached_folder

    try:
        export = storage.join(config.model, "export")
        is_run = storage.exists(storage.join(export, CONFIG_NAME))
        folder = cached_folder(export if is_run else config.model)
        schedule = read_config(Path(folder)).schedule
        if config.scheduler:
            try:
                build_scheduler(config.scheduler, schedule)  # fails before the weights are loaded
            except ValueError as error:  # it begins with the field
                raise ConfigError(one_line(error)) from error
        pipeline = DiffDisPipeline.from_pretrained(folder)
        pipeline.scheduler = config.scheduler
        return pipeline.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, config.dtype))
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model: {one_line(error)}") from error
