"""The folder of an exported model, which DiffDis, diffusers and transformers open, with its model card."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffdis.autoencoder import Autoencoder, build_autoencoder
from diffdis.config import DiffDisConfig
from diffdis.model import MAX_LOG_SCALE, DiffDis
from diffdis.model_folder import check_declared, check_values, read_json
from diffdis.pretrained import load_component, local_folder
from diffdis.text_encoder import TextEncoder, build_text_encoder
from diffdis.warm_start import ALIGNMENT_WEIGHTS

CONFIG_NAME = "diffdis.json"
CARD_NAME = "README.md"
# Of diffdis.json and the folder's layout. It grows only when older code can no longer read a folder.
VERSION_KEY, FORMAT_VERSION = "format_version", 1


@dataclasses.dataclass(frozen=True)
class Training:
    """What a model card reports about the training."""

    recipe: str = ""
    data: str = ""  # the sources of the training data
    data_digest: str = ""
    step: int = 0
    samples_seen: int = 0
    scores: dict[str, float] = dataclasses.field(default_factory=dict)


def save(
    folder: Path,
    config: DiffDisConfig,
    model: DiffDis,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder,
    scheduler: DDIMScheduler,
    training: Training | None,
) -> None:
    """Write a model and its frozen encoders; see `DiffDisPipeline.save_pretrained`."""
    model.unet.save_pretrained(folder / "unet")
    autoencoder.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder)
    scheduler.save_pretrained(folder / "scheduler")
    alignment = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("unet.")}
    (folder / ALIGNMENT_WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    save_file(alignment, folder / ALIGNMENT_WEIGHTS)
    if opens_in_diffusers(config):
        (folder / "model_index.json").write_text(json.dumps(_stable_diffusion_index(text_encoder), indent=2))
    (folder / CONFIG_NAME).write_text(json.dumps({VERSION_KEY: FORMAT_VERSION, **config.to_dict()}, indent=2))
    (folder / CARD_NAME).write_text(model_card(config, training or Training()))


def load(path: str, variant: str | None) -> tuple[DiffDisConfig, DiffDis, Autoencoder, TextEncoder]:
    """Return the parts of an exported model; see `DiffDisPipeline.from_pretrained`."""
    folder = local_folder(path)
    saved = read_config(folder)
    config = dataclasses.replace(
        saved,
        warm_start="",
        autoencoder=dataclasses.replace(saved.autoencoder, path=str(folder)),
        text_encoder=dataclasses.replace(saved.text_encoder, path=str(folder)),
    )
    check_declared(folder, lambda: DiffDis(config))
    model = DiffDis(config)
    unet = load_component(UNet2DConditionModel, folder / "unet", variant=variant).state_dict()
    try:
        weights = load_file(folder / ALIGNMENT_WEIGHTS)
        if "temperature.log_scale" in weights:  # larger ones were saved while `forward` limited it
            weights["temperature.log_scale"].clamp_(max=MAX_LOG_SCALE)
        model.load_state_dict(weights | {f"unet.{name}": value for name, value in unet.items()})
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{folder}: its weights cannot be read ({' '.join(str(error).split())[:300]}); export it again"
        ) from None
    return config, model, build_autoencoder(config.autoencoder), build_text_encoder(config.text_encoder)


def read_config(folder: Path) -> DiffDisConfig:
    """Return the configuration of an exported model. Raises FileNotFoundError and ValueError."""
    if not (folder / CONFIG_NAME).exists():
        raise FileNotFoundError(f"{folder}: no {CONFIG_NAME} in this folder; give a folder that DiffDis exported")
    values = read_json(folder / CONFIG_NAME)
    check_values(folder / CONFIG_NAME, values)
    try:
        if (version := values.pop(VERSION_KEY, 1)) > FORMAT_VERSION:
            raise ValueError(
                f"{folder}: was exported by a newer version of this code (format {version}, this code reads up to "
                f"{FORMAT_VERSION}); use that version"
            )
        return DiffDisConfig.from_dict(values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: does not describe a model ({error}); export it again") from None


def opens_in_diffusers(config: DiffDisConfig) -> bool:
    """Return whether diffusers' StableDiffusionPipeline opens the folder: with its kind of autoencoder and text encoder."""
    return (
        config.autoencoder.kind == "kl" and config.text_encoder.kind == "clip" and config.trained_for in ("joint", "generation")
    )


def _stable_diffusion_index(text_encoder: TextEncoder) -> dict[str, Any]:
    """Return the index file with which diffusers' StableDiffusionPipeline opens the folder."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", type(text_encoder.model).__name__],
        "tokenizer": ["transformers", type(text_encoder.tokenizer).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def model_card(config: DiffDisConfig, training: Training) -> str:
    """Return the model card in the hub's format: Markdown with a YAML header, whose license the user fills in."""
    generates, aligns = config.trained_for in ("joint", "generation"), config.trained_for != "generation"
    rows = {
        "Task": config.trained_for,
        "Image size": f"{config.image_size} px",
        "Recipe": training.recipe,
        "Training data": training.data and f"`{training.data}` (digest `{training.data_digest}`)",
        "Steps": training.step and f"{training.step:,}",
        "Samples seen": training.samples_seen and f"{training.samples_seen:,}",
    }
    lines = [
        *("---", "license: unknown", "library_name: diffusers", f"pipeline_tag: {'text-to-image' if generates else 'other'}"),
        *("tags:", "- diffdis", "---", "", "# DiffDis model", ""),
        "A diffusion model that generates images from text and decides which text belongs to an image (arXiv 2308.09306).",
        "Set `license` above: that of the weights that the training started from, and of the data, may restrict yours.",
        *("", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value)),
    ]
    if training.scores:
        lines += ["", "## Scores", "", "Metrics of the last checkpoint.", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in sorted(training.scores.items())]
    lines += ["", "## Usage", "", "```python", "from diffdis.pipeline import DiffDisPipeline", ""]
    lines += ['pipeline = DiffDisPipeline.from_pretrained("FOLDER")']
    lines += ['pipeline("a red heart").images[0].save("heart.png")'] if generates else []
    lines += ['pipeline.classify("photo.jpg", ["a cat", "a dog"])  # probabilities [1, 2]'] if aligns else []
    lines += ["```"]
    if opens_in_diffusers(config):
        lines += ["", "```python", "from diffusers import StableDiffusionPipeline", ""]
        lines += ['pipeline = StableDiffusionPipeline.from_pretrained("FOLDER")']
        lines += ['pipeline("a red heart").images[0].save("heart.png")', "```"]
    return "\n".join(lines) + "\n"
