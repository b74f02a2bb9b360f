"""DiffDisPipeline: inference with a trained model. It generates images, and it scores which text belongs to an image.

The methods take images and a *list* of candidate texts, never a label: a score cannot leak the answer.
"""

import dataclasses
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffdis import schedule
from diffdis.autoencoder import Autoencoder, build_autoencoder, to_latents, to_pixels
from diffdis.config import DiffDisConfig
from diffdis.metrics.zero_shot import class_embeddings
from diffdis.model import MAX_LOG_SCALE, DiffDis, ImageCondition
from diffdis.model_folder import check_declared, check_diffusers_model, check_values, read_json
from diffdis.pretrained import load_component
from diffdis.text_encoder import TextEncoder, build_text_encoder
from diffdis.warm_start import ALIGNMENT_WEIGHTS

CONFIG_NAME = "diffdis.json"
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (latents [B, C, H, W], timesteps [B]) -> noise or v


class DiffDisPipeline:
    """A trained model with its frozen encoders, for inference."""

    def __init__(self, config: DiffDisConfig, model: DiffDis, autoencoder: Autoencoder, text_encoder: TextEncoder):
        """Take the parts as they are, all on the device of `model`, and set the model to eval mode."""
        self.config, self.model = config, model.eval()
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.device = model.alphas_cumprod.device

    def to(self, device: torch.device | str) -> "DiffDisPipeline":
        """Move all parts to `device`, and return self."""
        for module in (self.model, self.autoencoder, self.text_encoder):
            module.to(device)
        self.device = torch.device(device)
        return self

    # --- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        captions: Sequence[str],
        *,
        num_steps: int = 50,
        guidance_scale: float = 7.5,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        scheduler: Any = None,
        places: Sequence[int] | None = None,
    ) -> list[Image.Image]:
        """Generate one image per caption with classifier-free guidance: eps = uncond + guidance_scale (cond - uncond).

        Args:
            captions: B texts.
            num_steps: number of sampling steps.
            guidance_scale: the usual one, the paper's w plus 1.
            seed: the noise of an image depends on the seed and its index alone, not on the batch.
            indices: the index of each caption among all captions; 0, 1, … by default.
            scheduler: a sampler of diffusers: a scheduler, or the name of its class, such as "DPMSolverMultistepScheduler";
                DDIM by default.
            places: deprecated, use `indices`.

        Raises:
            ValueError: the model was not trained to generate, or diffusers has no such scheduler.
        """
        if self.config.trained_for in ("alignment", "clip"):
            raise ValueError(f"this model was trained for {self.config.trained_for} alone: it cannot generate images")
        if places is not None:
            warnings.warn("generate: `places` is deprecated; use `indices`", DeprecationWarning, stacklevel=2)
            indices = places
        indices = indices or range(len(captions))
        unet = self.config.unet
        shape = (unet.in_channels, unet.sample_size, unet.sample_size)
        latents = torch.stack([_noise(f"generate/{seed}/{index}", shape) for index in indices]).to(self.device)  # [B, C, H, W]
        token_states, _ = self.text_encoder.encode(captions, self.device)  # [B, L, D_c]
        null_states, _ = self.text_encoder.encode([""], self.device)  # [1, L, D_c]

        def predict(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            """Return the guided noise, or v, [B, C, H, W]."""
            out = self.model.predict_image(latents, timesteps, token_states)
            if guidance_scale != 1.0:
                uncond = self.model.predict_image(latents, timesteps, null_states.expand_as(token_states))
                out = uncond + guidance_scale * (out - uncond)
            return out

        if scheduler is None:
            latents = self._sample_ddim(predict, latents, num_steps)
        else:
            generators = [_generator(f"sample/{seed}/{index}") for index in indices]
            latents = self._sample(predict, latents, num_steps, self.build_scheduler(scheduler), generators)
        return [Image.fromarray(image) for image in to_pixels(self.autoencoder, latents)]

    def _sample_ddim(self, predict: Predict, latents: torch.Tensor, num_steps: int) -> torch.Tensor:
        """Denoise latents [B, C, H, W] by DDIM."""
        for t, abar, abar_prev in self._steps(num_steps):
            out = predict(latents, torch.full((len(latents),), t, device=self.device))
            if self.config.schedule.prediction_type == "v_prediction":
                x0 = schedule.x0_from_v(latents, out, abar)
            else:
                x0 = schedule.x0_from_noise(latents, out, abar)
            latents = schedule.ddim_step(latents, x0, abar, abar_prev)
        return latents

    def _sample(
        self, predict: Predict, latents: torch.Tensor, num_steps: int, scheduler: Any, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """Denoise latents [B, C, H, W] by a scheduler of diffusers; `generators`: of the noise of each image."""
        scheduler.set_timesteps(num_steps, device=self.device)
        settings = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            out = predict(scheduler.scale_model_input(latents, t), t.expand(len(latents)))
            latents = scheduler.step(out, t, latents, **settings).prev_sample
        return latents

    def build_scheduler(self, scheduler: Any) -> Any:
        """Return a scheduler of diffusers with the model's noise schedule, from a name or from a scheduler. Raises ValueError."""
        kind: Any = getattr(diffusers, scheduler, None) if isinstance(scheduler, str) else type(scheduler)
        if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
            raise ValueError(f"scheduler: diffusers has no scheduler {scheduler!r}; use one such as DPMSolverMultistepScheduler")
        if isinstance(scheduler, str):
            return kind.from_config(self._scheduler().config)
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr")
        return kind.from_config(scheduler.config, **{name: self._scheduler().config[name] for name in names})

    # --- alignment -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed_image(
        self,
        images: Sequence[Image.Image] | np.ndarray,
        *,
        keys: Sequence[str] | None = None,
        num_steps: int = 10,
        num_draws: int = 1,
        guidance: float = 0.0,
    ) -> torch.Tensor:
        """Denoise the text query of each image from pure noise (Algorithm 3). Returns [B, D], unit norm.

        A model of the `clip` task embeds the image directly and ignores `num_steps`, `num_draws` and `guidance`.

        Args:
            images: PIL images of any size, or uint8 [B, H, W, 3] of the model's size.
            keys: the noise of an image depends on its key (by default a digest of its pixels), never on its index in the batch.
            num_steps: number of denoising steps.
            num_draws: number of noise samples per image, whose queries are averaged.
            guidance: the paper's w, over the image condition; the model must be trained with image_dropout.

        Raises:
            ValueError: wrong images, or guidance for a model that was trained with image_dropout = 0.
        """
        if guidance and not self.config.image_dropout:
            raise ValueError(
                f"guidance: {guidance:g}, but the model was trained with image_dropout = 0 and cannot do without an image; use 0"
            )
        pixels = self.pixels(images)
        keys = keys or [hashlib.sha256(p.tobytes()).hexdigest() for p in pixels]
        latent = to_latents(self.autoencoder, pixels, self.device)
        return self.embed_latent(latent, keys, num_steps, num_draws, guidance)

    @torch.no_grad()
    def embed_latent(
        self, latent: torch.Tensor, keys: Sequence[str], num_steps: int = 10, num_draws: int = 1, guidance: float = 0.0
    ) -> torch.Tensor:
        """Embed latents [B, C, H, W] as `embed_image` does. Raises ValueError for a model that was trained to generate alone."""
        if self.config.trained_for == "generation":
            raise ValueError("this model was trained for generation alone: it cannot tell which text belongs to an image")
        null_states, _ = self.text_encoder.encode([""], self.device)  # [1, L, D_c]
        if self.config.trained_for == "clip":
            return self.model.clip_image_embedding(latent, null_states)
        condition = self.model.encode_condition(latent, null_states)
        masked = self.model.encode_condition(torch.zeros_like(latent), null_states) if guidance else None
        width = self.config.text_encoder.embedding_dim
        queries = []
        # One sample at a time under the joint mask, where a query changes the image's tokens; all at once under one-way.
        chunk = num_draws if self.config.query_visibility == "one_way" else 1
        for start in range(0, num_draws, chunk):
            samples = range(start, start + chunk)
            noise = [torch.stack([_noise(f"embed/{key}/{sample}", (width,)) for sample in samples]) for key in keys]
            queries.append(self._denoise_query(condition, masked, torch.stack(noise).to(self.device), num_steps, guidance))
        return F.normalize(torch.cat(queries, dim=1).mean(dim=1), dim=-1)

    def _denoise_query(
        self, condition: ImageCondition, masked: ImageCondition | None, e_t: torch.Tensor, num_steps: int, guidance: float
    ) -> torch.Tensor:
        """Denoise e_T [B, n, D] to unit-norm queries [B, n, D]. `masked`: the condition without an image, for guidance."""
        gamma, length = self.config.gamma, e_t.shape[-1] ** 0.5
        e0 = e_t
        for t, abar, abar_prev in schedule.query_steps(self.model.alphas_cumprod, num_steps):
            timestep = torch.full((1, 1), t, device=self.device)  # the same for all
            e0 = self.model.predict_query(condition, e_t, timestep)
            if masked is not None:
                uncond = self.model.predict_query(masked, e_t, timestep)
                e0 = F.normalize((1 + guidance) * e0 - guidance * uncond, dim=-1)
            e_t = schedule.ddim_step(e_t, length * e0, abar, abar_prev, gamma)
        return e0

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """Return the text queries of N captions, [N, D], unit norm."""
        parts = [captions[i : i + batch_size] for i in range(0, len(captions), batch_size)]
        return torch.cat([self.text_encoder.encode(part, self.device)[1] for part in parts])

    def embed_classes(self, class_names: Sequence[str], templates: Sequence[str] = ("{c}",)) -> torch.Tensor:
        """Return the normalized mean over the templates of each class, [num_classes, D]; "{c}" is the class name."""
        return class_embeddings(self.embed_text, class_names, templates)

    def classify(
        self,
        images: Sequence[Image.Image] | np.ndarray,
        class_names: Sequence[str],
        templates: Sequence[str] = ("{c}",),
        **settings: Any,
    ) -> torch.Tensor:
        """Return probabilities over `class_names`, [B, num_classes]. `settings`: those of `embed_image`."""
        similarity = self.embed_image(images, **settings) @ self.embed_classes(class_names, templates).T
        return (similarity * self.model.temperature()).softmax(dim=-1).detach()

    def rank_captions(self, images: Sequence[Image.Image] | np.ndarray, captions: Sequence[str], **settings: Any) -> torch.Tensor:
        """Return the indices of N `captions` for each image, best first, [B, N]. `settings`: those of `embed_image`."""
        similarity = self.embed_image(images, **settings) @ self.embed_text(captions).T
        return similarity.argsort(dim=-1, descending=True)

    def rank(self, images: Sequence[Image.Image] | np.ndarray, captions: Sequence[str], **settings: Any) -> torch.Tensor:
        """Deprecated: use `rank_captions`."""
        warnings.warn("DiffDisPipeline.rank is deprecated; use rank_captions", DeprecationWarning, stacklevel=2)
        return self.rank_captions(images, captions, **settings)

    def pixels(self, images: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
        """Crop and resize PIL images to the model's size, [B, H, W, 3] uint8; an array must have this size already.

        Raises ValueError for an array of another shape or type.
        """
        size = self.config.image_size
        if isinstance(images, np.ndarray):
            if images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
                raise ValueError(f"images: {images.dtype} {images.shape} is not uint8 [B, {size}, {size}, 3]; use PIL")
            return images
        fitted = [ImageOps.fit(i.convert("RGB"), (size, size), Image.Resampling.BICUBIC) for i in images]
        return np.stack([np.asarray(i) for i in fitted])

    def _steps(self, num_steps: int, spacing: str = "") -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Return (t, abar_t, abar after the step) for every sampling step."""
        spacing, abar = spacing or self.config.schedule.timestep_spacing, self.model.alphas_cumprod
        steps = schedule.inference_timesteps(num_steps, len(abar), spacing)
        previous = schedule.previous_alphas_cumprod(abar, steps, spacing)
        return [(t, abar[t], prev) for t, prev in zip(steps, previous, strict=True)]

    # --- folders ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write unet/ vae/ text_encoder/ tokenizer/ scheduler/ for diffusers and transformers, alignment/ and diffdis.json."""
        folder = Path(folder)
        self.model.unet.save_pretrained(folder / "unet")
        self.autoencoder.save_pretrained(folder / "vae")
        self.text_encoder.save_pretrained(folder)
        self._scheduler().save_pretrained(folder / "scheduler")
        alignment = {k: v.contiguous() for k, v in self.model.state_dict().items() if not k.startswith("unet.")}
        (folder / ALIGNMENT_WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
        save_file(alignment, folder / ALIGNMENT_WEIGHTS)
        if self.config.autoencoder.kind == "kl" and self.config.text_encoder.kind == "clip":
            (folder / "model_index.json").write_text(json.dumps(_stable_diffusion_index(self.text_encoder), indent=2))
        (folder / CONFIG_NAME).write_text(json.dumps(self.config.to_dict(), indent=2))

    def _scheduler(self) -> DDIMScheduler:
        values, leading = self.config.schedule, self.config.schedule.timestep_spacing == "leading"
        return DDIMScheduler(
            num_train_timesteps=values.num_timesteps,
            beta_start=values.beta_start,
            beta_end=values.beta_end,
            beta_schedule=values.beta_schedule,
            rescale_betas_zero_snr=values.zero_terminal_snr,
            clip_sample=False,
            set_alpha_to_one=not leading,
            steps_offset=1 if leading else 0,
            prediction_type=values.prediction_type,
            timestep_spacing=values.timestep_spacing,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DiffDisPipeline":
        """Open a folder that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: the folder is not an exported model.
            ValueError: it is damaged, or contains more than tensors.
        """
        folder = Path(folder)
        if not (folder / CONFIG_NAME).exists():
            raise FileNotFoundError(f"{folder}: no {CONFIG_NAME} in this folder; give a folder that DiffDis exported")
        values = read_json(folder / CONFIG_NAME)
        check_values(folder / CONFIG_NAME, values)
        try:
            saved = DiffDisConfig.from_dict(values)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{folder / CONFIG_NAME}: does not describe a model ({error}); export it again") from None
        config = dataclasses.replace(
            saved,
            warm_start="",
            autoencoder=dataclasses.replace(saved.autoencoder, path=str(folder)),
            text_encoder=dataclasses.replace(saved.text_encoder, path=str(folder)),
        )
        check_declared(folder, lambda: DiffDis(config))
        check_diffusers_model(UNet2DConditionModel, folder / "unet")
        model = DiffDis(config)
        unet = load_component(UNet2DConditionModel, folder / "unet").state_dict()
        try:
            weights = load_file(folder / ALIGNMENT_WEIGHTS)
            if "temperature.log_scale" in weights:  # larger ones were saved while `forward` limited it
                weights["temperature.log_scale"].clamp_(max=MAX_LOG_SCALE)
            model.load_state_dict(weights | {f"unet.{name}": value for name, value in unet.items()})
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ValueError(
                f"{folder}: its weights cannot be read ({' '.join(str(error).split())[:300]}); export it again"
            ) from None
        return cls(config, model, build_autoencoder(config.autoencoder), build_text_encoder(config.text_encoder))


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


def _generator(name: str) -> torch.Generator:
    """Return a random generator whose seed depends on `name` alone."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
    return torch.Generator().manual_seed(seed)


def _noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return standard normal noise that depends on `name` alone."""
    return torch.randn(shape, generator=_generator(name))
