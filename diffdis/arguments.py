"""Arguments of `DiffDisPipeline`: their types, and the checks that name the argument."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, TypeVar

import torch

from diffdis.config import DiffDisConfig

TextInput = str | Sequence[str]
OutputType = Literal["pil", "np", "pt", "latent"]
# (pipeline, index of the step, timestep, {"latents": ...}) -> {"latents": ...}, as in diffusers.
StepCallback = Callable[[Any, int, int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
Sized = TypeVar("Sized", bound=Sequence[Any])


class GenerateSettings(TypedDict, total=False):
    """Arguments of `pipeline(prompt, ...)` after the prompt."""

    negative_prompt: TextInput | None
    num_images_per_prompt: int
    num_inference_steps: int
    guidance_scale: float
    height: int | None
    width: int | None
    seed: int
    generator: torch.Generator | None
    latents: torch.Tensor | None
    indices: Sequence[int | str] | None
    output_type: OutputType
    batch_size: int
    callback_on_step_end: StepCallback | None
    num_steps: int  # deprecated, use num_inference_steps
    places: Sequence[int]  # deprecated, use indices


class EmbedSettings(TypedDict, total=False):
    """Arguments of `DiffDisPipeline.embed_image` after the images."""

    keys: Sequence[str] | None
    num_steps: int
    num_draws: int
    guidance: float
    batch_size: int


def as_texts(texts: TextInput, name: str) -> list[str]:
    """Return one or many texts as a list. Raises ValueError, with the argument's name, if there is none or one is not a text."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError(f"{name}: empty; give at least one text")
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{name}: {wrong[0]!r} is not a text")
    return texts


def check_length(name: str, values: Sized, expected: int) -> Sized:
    """Return `values`. Raises ValueError if there is not one for each of `expected` inputs."""
    if len(values) != expected:
        raise ValueError(f"{name}: {len(values)} for {expected} inputs; give one for each")
    return values


def latent_shape(config: DiffDisConfig, height: int | None, width: int | None) -> tuple[int, int, int]:
    """Return [C, h, w] of an image in pixels, by default of the model's size. Raises ValueError for a size that does not fit."""
    unet, size = config.unet, config.image_size
    factor = size // unet.sample_size  # pixels per latent
    multiple = factor * 2 ** (len(unet.block_out_channels) - 1)
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < multiple or value % multiple):
            raise ValueError(f"{name}: {value} is not a multiple of {multiple}, as this model needs")
    return unet.in_channels, (height or size) // factor, (width or size) // factor


def given_latents(latents: torch.Tensor | None, generator: torch.Generator | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return the user's initial noise, given as such or by a generator; None for noise by seed and index."""
    if latents is None and generator is not None:
        return torch.randn(shape, generator=generator, device=generator.device)
    if latents is not None and latents.shape != shape:
        raise ValueError(f"latents: {tuple(latents.shape)} is not {shape}; give one per image")
    return latents
