"""Noise schedule of images and text queries, one equation per function, and the samplers of images.

Timesteps count from 0 to T - 1, as in diffusers.
"""

import difflib
import hashlib
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler

from diffdis.config import ScheduleConfig
from diffdis.objective_config import ObjectiveConfig


def alphas_cumprod(config: ScheduleConfig) -> torch.Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s), betas linear, or linear in their square root (Stable Diffusion). [T] float32."""
    power = 0.5 if config.beta_schedule == "scaled_linear" else 1
    start, end = config.beta_start**power, config.beta_end**power
    betas = torch.linspace(start, end, config.num_timesteps, dtype=torch.float32) ** (1 / power)
    abar = torch.cumprod(1.0 - betas, dim=0)
    return rescale_zero_terminal_snr(abar) if config.zero_terminal_snr else abar


def rescale_zero_terminal_snr(abar: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(abar) so that abar_{T-1} = 0 and abar_0 stays (Lin et al. 2024, algorithm 1)."""
    root = abar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def expand_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Append axes of size 1 until `values` broadcasts over the trailing axes of `like`.

    They stay float32: in half precision, 1 - abar_t is 0 at small t. So the results below are float32, too.
    """
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim)).to(like.device, non_blocking=True)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, abar: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """x_t = gamma sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (METHOD: gamma scales the text query; 1 for images)."""
    abar = expand_like(abar, x0)
    return gamma * abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def v_target(x0: torch.Tensor, noise: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022, eq. 11)."""
    abar = expand_like(abar, x0)
    return abar.sqrt() * noise - (1 - abar).sqrt() * x0


def x0_from_v(x_t: torch.Tensor, v: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v."""
    abar = expand_like(abar, x_t)
    return abar.sqrt() * x_t - (1 - abar).sqrt() * v


def x0_from_noise(x_t: torch.Tensor, noise: torch.Tensor, abar: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """x_0 = (x_t - sqrt(1 - abar_t) eps) / (gamma sqrt(abar_t))."""
    abar = expand_like(abar, x_t)
    return (x_t - (1 - abar).sqrt() * noise) / (gamma * abar.sqrt())


def prediction_target(prediction_type: str, x0: torch.Tensor, noise: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """Return what the network learns to predict from x_t: the noise, v or x_0."""
    if prediction_type == "v_prediction":
        return v_target(x0, noise, abar)
    return x0 if prediction_type == "sample" else noise


def predicted_x0(prediction_type: str, x_t: torch.Tensor, prediction: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
    """Return x_0 from the network's prediction of the noise, v or x_0."""
    if prediction_type == "v_prediction":
        return x0_from_v(x_t, prediction, abar)
    return prediction if prediction_type == "sample" else x0_from_noise(x_t, prediction, abar)


def ddim_step(
    x_t: torch.Tensor, x0: torch.Tensor, abar: torch.Tensor, abar_prev: torch.Tensor, gamma: float = 1.0
) -> torch.Tensor:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with sigma = 0) from abar_t to abar_prev, given the predicted x_0.

    eps_hat = (x_t - gamma sqrt(abar_t) x_0) / sqrt(1 - abar_t); the step adds this noise to x_0 again.
    """
    abar_t = expand_like(abar, x_t)
    noise = (x_t - gamma * abar_t.sqrt() * x0) / (1 - abar_t).sqrt()
    return add_noise(x0, noise, abar_prev, gamma)


def inference_timesteps(num_steps: int, num_timesteps: int, spacing: str) -> list[int]:
    """Return `num_steps` falling timesteps. `leading` is Stable Diffusion's (with its offset of 1), `trailing` starts at T - 1.

    Raises ValueError if `num_steps` is not in 1..num_timesteps.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps: {num_steps} is not in 1..{num_timesteps}; choose fewer sampling steps")
    if spacing == "leading":
        stride = num_timesteps // num_steps
        return [min(i * stride + 1, num_timesteps - 1) for i in reversed(range(num_steps))]
    stride_exact = num_timesteps / num_steps
    return [round(num_timesteps - i * stride_exact) - 1 for i in range(num_steps)]


def previous_alphas_cumprod(abar: torch.Tensor, timesteps: list[int], spacing: str) -> list[torch.Tensor]:
    """Return abar after each step of image sampling, as in diffusers: T // K timesteps later, or the final one below 0.

    The final one is abar_0 for `leading` and 1 for `trailing`. Under `trailing`, diffusers' step does not end at the timestep at
    which the next one starts unless K divides T; images equal those of diffusers all the same.
    """
    stride = abar.numel() // len(timesteps)
    final = abar[0] if spacing == "leading" else torch.ones_like(abar[0])
    return [abar[t - stride] if t >= stride else final for t in timesteps]


def query_steps(abar: torch.Tensor, num_steps: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Return (t, abar_t, abar after the step) of each denoising step of a text query [P, Algorithm 3].

    From T - 1; each step ends at the timestep at which the next one starts, the last one at abar = 1, for any number of steps.
    """
    timesteps = inference_timesteps(num_steps, len(abar), "trailing")
    following = [*(abar[t] for t in timesteps[1:]), torch.ones_like(abar[0])]
    return [(t, abar[t], after) for t, after in zip(timesteps, following, strict=True)]


# --- samplers of images: DDIM, or any scheduler of diffusers --------------------------------------------------------------------

Predict = Callable[[torch.Tensor, int | torch.Tensor], torch.Tensor]  # (latents [B, C, H, W], timestep) -> noise, v or x_0
OnStep = Callable[[int, int, torch.Tensor], torch.Tensor]  # (index of the step, timestep, latents) -> latents

_NOISE_SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    "rescale_betas_zero_snr",
)
_TOLERANCE = 1e-4  # of abar: some schedulers of diffusers end at 2^-24 instead of 0
_SAMPLERS = "DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler"  # of every model


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

    Raises ValueError if diffusers has no such scheduler, or if it cannot sample with the model's noise schedule and its type of
    prediction.
    """
    own = ddim_scheduler(config).config
    kind: Any = getattr(diffusers, scheduler, None) if isinstance(scheduler, str) else type(scheduler)
    if not _is_scheduler(kind):
        word, names = str(scheduler), [name for name in dir(diffusers) if re.search(r"^(?!Flow).*(?<!Inverse)Scheduler$", name)]
        names = [name for name in names if _is_scheduler(getattr(diffusers, name))]  # with the packages that it needs
        names = [name for name in names if name.lower().startswith(word.lower())] or difflib.get_close_matches(word, names)
        raise ValueError(
            f"scheduler: diffusers has no scheduler {scheduler!r}; use {' or '.join(names[:4]) or 'UniPCMultistepScheduler'}"
        )
    settings = own
    if not isinstance(scheduler, str):  # without `_use_default_values`, for whose fields diffusers would ignore the values below
        settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        settings |= {name: own[name] for name in _NOISE_SCHEDULE}
    try:
        _check_scheduler(kind.from_config(settings), config)
    except Exception as error:  # whatever a scheduler for other models raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"scheduler: {kind.__name__} cannot be used with this model ({reason}); use {_SAMPLERS}") from None
    return kind.from_config(settings)


def _is_scheduler(kind: Any) -> bool:
    return diffusers.SchedulerMixin in getattr(kind, "__mro__", ())


def _check_scheduler(scheduler: Any, config: ScheduleConfig) -> None:
    """Raise an exception if the scheduler has another noise schedule than the model, or cannot take a step from noise to image.

    Many ignore fields that they do not know, such as `rescale_betas_zero_snr`. One without `alphas_cumprod` is for models whose
    noise is scaled in another way: its timesteps or sigmas are not those of the model.
    """
    abar, own = alphas_cumprod(config), getattr(scheduler, "alphas_cumprod", None)
    is_same = own is not None and own.shape == abar.shape and torch.allclose(own.float(), abar, rtol=0, atol=_TOLERANCE)
    if not is_same or getattr(scheduler.config, "use_flow_sigmas", False):
        zero_snr = "it ignores zero_terminal_snr, or " if config.zero_terminal_snr else ""
        raise ValueError(f"{zero_snr}it has a noise schedule of its own")
    zeros = torch.zeros(1, 1, 8, 8)
    scheduler.set_timesteps(20)
    if scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError("its timesteps rise: it turns an image into noise")
    with torch.random.fork_rng(devices=[]):  # a stochastic one draws noise, which must not change the caller's
        # Many do not know every type of prediction, and say so only in a step.
        scheduler.step(scheduler.scale_model_input(zeros, scheduler.timesteps[0]), scheduler.timesteps[0], zeros)


def sample_ddim(
    predict: Predict, latents: torch.Tensor, num_steps: int, config: ScheduleConfig, abar: torch.Tensor, on_step: OnStep
) -> torch.Tensor:
    """Denoise latents [B, C, H, W] by DDIM. abar [T]."""
    timesteps = inference_timesteps(num_steps, len(abar), config.timestep_spacing)
    previous = previous_alphas_cumprod(abar, timesteps, config.timestep_spacing)
    for index, (t, abar_prev) in enumerate(zip(timesteps, previous, strict=True)):
        x0 = predicted_x0(config.prediction_type, latents, predict(latents, t), abar[t])
        latents = on_step(index, t, ddim_step(latents, x0, abar[t], abar_prev))
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


def text_digest(text: str) -> int:
    """Return a 63-bit digest, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def named_generator(name: str) -> torch.Generator:
    """Return a random generator whose seed depends on `name` alone."""
    return torch.Generator().manual_seed(text_digest(name))


def named_noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return standard normal noise that depends on `name` alone."""
    return torch.randn(shape, generator=named_generator(name))


# --- training: weights of the loss, and sampling of timesteps. Add an entry to a table to add one. ------------------------------


def min_snr_weight(abar: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """min(SNR, gamma) with SNR = abar_t / (1 - abar_t) (Hang et al. 2023, section 3.4)."""
    return (abar / (1 - abar)).clamp(max=config.min_snr_gamma)


def inverse_noise_weight(abar: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """1 / max(1 - abar_t, 0.1): the weight that x_0 has in the loss of v, limited at small t."""
    return 1 / (1 - abar).clamp(min=0.1)


# Names for objective.generation_weighting: weight of |x0_hat - x_0|^2 by abar_t, [B] -> [B].
LOSS_WEIGHTINGS: dict[str, Callable[[torch.Tensor, ObjectiveConfig], torch.Tensor]] = {
    "min_snr": min_snr_weight,
    "inverse_noise": inverse_noise_weight,
}


def loss_weight(prediction_type: str, abar: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Return the weight [B] of the squared error of the network's own prediction at abar_t [B].

    The error of the noise is SNR |x0_hat - x_0|^2, and that of v (SNR + 1) |x0_hat - x_0|^2.
    """
    weight = LOSS_WEIGHTINGS[config.generation_weighting](abar, config)
    if prediction_type == "sample":
        return weight
    return weight * (1 - abar) if prediction_type == "v_prediction" else weight * (1 - abar) / abar


def check_terminal_weight(schedule: ScheduleConfig, config: ObjectiveConfig) -> None:
    """Raise ValueError if sampling starts at a timestep that `objective.generation_weighting` excludes from the loss."""
    if not schedule.zero_terminal_snr or config.generation_weighting == "none" or config.task in ("alignment", "clip"):
        return
    weight = loss_weight(schedule.prediction_type, torch.zeros(1, device="cpu"), config).item()
    if not 0 < weight < math.inf:
        raise ValueError(
            f"objective.generation_weighting: {config.generation_weighting} has weight {weight:g} at the last timestep, where "
            "sampling starts with model.schedule.zero_terminal_snr; use none or inverse_noise"
        )


def lambda_factor(name: str, progress: float) -> float:
    """Return the factor of objective.lambda_alignment after a fraction `progress` of the run's steps."""
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[name]


def uniform_timesteps(size: int, num_timesteps: int, generator: torch.Generator, config: ObjectiveConfig) -> torch.Tensor:
    """Sample t uniformly from 0 to T - 1 [P]."""
    return torch.randint(num_timesteps, (size,), generator=generator)


def logit_normal_timesteps(size: int, num_timesteps: int, generator: torch.Generator, config: ObjectiveConfig) -> torch.Tensor:
    """Sample t / T as the sigmoid of a normal variable (Esser et al. 2024, section 3.1)."""
    normal = config.logit_normal_mean + config.logit_normal_std * torch.randn((size,), generator=generator)
    return (num_timesteps * normal.sigmoid()).long().clamp(max=num_timesteps - 1)


# Names for objective.timestep_sampling: (number of samples B, T, generator, config) -> [B] int64.
TIMESTEP_SAMPLINGS: dict[str, Callable[[int, int, torch.Generator, ObjectiveConfig], torch.Tensor]] = {
    "uniform": uniform_timesteps,
    "logit_normal": logit_normal_timesteps,
}
