"""Sampling of images: the noise schedule as a scheduler of diffusers, DDIM, and any other scheduler."""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler

from diffdis import schedule
from diffdis.config import DiffDisConfig, ScheduleConfig

Predict = Callable[[torch.Tensor, int | torch.Tensor], torch.Tensor]  # (latents [B, C, H, W], timestep) -> noise, v or x_0
OnStep = Callable[[int, int, torch.Tensor], torch.Tensor]  # (index of the step, timestep, latents) -> latents

_NOISE_SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr"),
)


def ddim_scheduler(config: ScheduleConfig) -> DDIMScheduler:
    """Return diffusers' DDIM with the model's noise schedule, which describes the sampler of an export."""
    is_leading = config.timestep_spacing == "leading"
    return DDIMScheduler(
        num_train_timesteps=config.num_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        clip_sample=False,
        set_alpha_to_one=not is_leading,
        steps_offset=1 if is_leading else 0,
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
    )


def build_scheduler(scheduler: Any, config: ScheduleConfig) -> Any:
    """Return a scheduler of diffusers with the model's noise schedule, from a name or from a scheduler.

    Raises ValueError if diffusers has no such scheduler.
    """
    own = ddim_scheduler(config).config
    kind: Any = getattr(diffusers, scheduler, None) if isinstance(scheduler, str) else type(scheduler)
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ValueError(f"scheduler: diffusers has no scheduler {scheduler!r}; use one such as DPMSolverMultistepScheduler")
    if isinstance(scheduler, str):
        return kind.from_config(own)
    return kind.from_config(scheduler.config, **{name: own[name] for name in _NOISE_SCHEDULE})


def sample_ddim(
    predict: Predict, latents: torch.Tensor, num_steps: int, config: ScheduleConfig, abar: torch.Tensor, on_step: OnStep
) -> torch.Tensor:
    """Denoise latents [B, C, H, W] by DDIM. abar [T]."""
    timesteps = schedule.inference_timesteps(num_steps, len(abar), config.timestep_spacing)
    previous = schedule.previous_alphas_cumprod(abar, timesteps, config.timestep_spacing)
    for index, (t, abar_prev) in enumerate(zip(timesteps, previous, strict=True)):
        x0 = schedule.predicted_x0(config.prediction_type, latents, predict(latents, t), abar[t])
        latents = on_step(index, t, schedule.ddim_step(latents, x0, abar[t], abar_prev))
    return latents


def sample(
    predict: Predict,
    latents: torch.Tensor,
    num_steps: int,
    scheduler: Any,
    generators: torch.Generator | list[torch.Generator],
    on_step: OnStep,
) -> torch.Tensor:
    """Denoise latents [B, C, H, W] by a scheduler of diffusers. `generators`: of the noise of a stochastic one, one per image."""
    scheduler.set_timesteps(num_steps, device=latents.device)
    settings = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = latents * scheduler.init_noise_sigma
    for index, t in enumerate(scheduler.timesteps):
        out = predict(scheduler.scale_model_input(latents, t), t)
        latents = on_step(index, int(t), scheduler.step(out, t, latents, **settings).prev_sample)
    return latents


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


def named_generator(name: str) -> torch.Generator:
    """Return a random generator whose seed depends on `name` alone."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
    return torch.Generator().manual_seed(seed)


def named_noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return standard normal noise that depends on `name` alone."""
    return torch.randn(shape, generator=named_generator(name))
