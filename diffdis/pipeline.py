"""DiffDisPipeline: a trained model with its encoders. Images from captions, and which text belongs to an image.

The entry points of inference take images and a *list* of candidate texts, never a label: a score cannot leak the answer.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from diffdis.model import DiffDis
from diffdis.model_folder import NO_PICKLES, check_declared, check_diffusers_model, check_values, read_json
from diffdis.text_encoder import TextEncoder, build_text_encoder
from diffdis.warm_start import ALIGNMENT_WEIGHTS

CONFIG_NAME = "diffdis.json"


class DiffDisPipeline:
    def __init__(self, config: DiffDisConfig, model: DiffDis, autoencoder: Autoencoder, text_encoder: TextEncoder):
        self.config, self.model = config, model.eval()
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.device = model.abar.device

    def to(self, device: torch.device | str) -> "DiffDisPipeline":
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
        places: Sequence[int] | None = None,
    ) -> list[Image.Image]:
        """One image a caption by DDIM with classifier-free guidance: eps = uncond + guidance_scale (cond - uncond).

        guidance_scale is the usual one, the paper's w plus 1. The noise of an image depends on (seed, its place) alone, not on
        the batch; `places` are 0, 1, … unless given. Raises ValueError for a model that was not trained to generate.
        """
        if self.config.trained_for in ("alignment", "clip"):
            raise ValueError(f"this model was trained for {self.config.trained_for} alone: it cannot generate images")
        unet = self.config.unet
        shape = (unet.in_channels, unet.sample_size, unet.sample_size)
        noise = [_noise(f"generate/{seed}/{place}", shape) for place in places or range(len(captions))]
        latent = torch.stack(noise).to(self.device)  # [B, C, H, W]
        states, _ = self.text_encoder.encode(captions, self.device)
        null, _ = self.text_encoder.encode([""], self.device)
        for t, abar, abar_prev in self._steps(num_steps):
            time = torch.full((len(latent),), t, device=self.device)
            out = self.model.predict_image(latent, time, states)
            if guidance_scale != 1.0:
                without = self.model.predict_image(latent, time, null.expand_as(states))
                out = without + guidance_scale * (out - without)
            if self.config.schedule.prediction_type == "v_prediction":
                x0 = schedule.x0_from_v(latent, out, abar)
            else:
                x0 = schedule.x0_from_noise(latent, out, abar)
            latent = schedule.ddim_step(latent, x0, abar, abar_prev)
        return [Image.fromarray(image) for image in to_pixels(self.autoencoder, latent)]

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
        """The text query that each image denoises to, from pure noise (Algorithm 3): [B, D], unit norm, mean of the draws.

        images: PIL images of any size, or uint8 [B, H, W, 3] of the model's size. The noise of an image depends on its key (by
        default a digest of its pixels) and the draw, never on its place in the batch. `guidance` is the paper's w, over the
        image condition; it needs a model trained with image_dropout. A model of the `clip` task knows neither steps nor draws.
        """
        if guidance and not self.config.image_dropout:
            raise ValueError("guidance: the model was trained with image_dropout = 0 and does not know a masked image")
        pixels = self.pixels(images)
        keys = keys or [hashlib.sha256(p.tobytes()).hexdigest() for p in pixels]
        latent = to_latents(self.autoencoder, pixels, self.device)
        return self.embed_latent(latent, keys, num_steps, num_draws, guidance)

    @torch.no_grad()
    def embed_latent(
        self, latent: torch.Tensor, keys: Sequence[str], num_steps: int = 10, num_draws: int = 1, guidance: float = 0.0
    ) -> torch.Tensor:
        """`embed_image` of latents [B, C, H, W]. Raises ValueError for a model that was trained to generate alone."""
        if self.config.trained_for == "generation":
            raise ValueError("this model was trained for generation alone: it cannot tell which text belongs to an image")
        null, _ = self.text_encoder.encode([""], self.device)
        if self.config.trained_for == "clip":
            return self.model.clip_image_embedding(latent, null)
        image = self.model.encode_condition(latent, null)
        masked = self.model.encode_condition(torch.zeros_like(latent), null) if guidance else None
        width = self.config.text_encoder.embedding_dim
        chains = []
        # One draw a chain under the joint mask, where a query changes the image's tokens; all at once under one-way.
        together = num_draws if self.config.query_visibility == "one_way" else 1
        for first in range(0, num_draws, together):
            draws = range(first, first + together)
            noise = [torch.stack([_noise(f"embed/{key}/{draw}", (width,)) for draw in draws]) for key in keys]
            chains.append(self._denoise_query(image, masked, torch.stack(noise).to(self.device), num_steps, guidance))
        return F.normalize(torch.cat(chains, dim=1).mean(dim=1), dim=-1)

    def _denoise_query(self, image: Any, masked: Any, e_t: torch.Tensor, num_steps: int, guidance: float) -> torch.Tensor:
        """K steps from noise e_T [B, n, D] to unit-norm queries [B, n, D]."""
        gamma, length = self.config.schedule.gamma, e_t.shape[-1] ** 0.5
        e0 = e_t
        for t, abar, abar_prev in self._steps(num_steps, spacing="trailing"):  # trailing: the chain starts at t = T
            time = torch.full((1, 1), t, device=self.device)  # the same for all
            e0 = self.model.predict_query(image, e_t, time)
            if guidance:
                without = self.model.predict_query(masked, e_t, time)
                e0 = F.normalize((1 + guidance) * e0 - guidance * without, dim=-1)
            e_t = schedule.ddim_step(e_t, length * e0, abar, abar_prev, gamma)
        return e0

    @torch.no_grad()
    def embed_text(self, captions: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        """[N, D], unit norm."""
        parts = [captions[i : i + batch_size] for i in range(0, len(captions), batch_size)]
        return torch.cat([self.text_encoder.encode(part, self.device)[1] for part in parts])

    def embed_classes(self, class_names: Sequence[str], templates: Sequence[str] = ("{c}",)) -> torch.Tensor:
        """A class's embedding is the normalised mean over its templates. [num_classes, D]"""
        return class_embeddings(self.embed_text, class_names, templates)

    def classify(
        self,
        images: Sequence[Image.Image] | np.ndarray,
        class_names: Sequence[str],
        templates: Sequence[str] = ("{c}",),
        **settings: Any,
    ) -> torch.Tensor:
        """Probabilities over `class_names`, [B, num_classes]; settings as of `embed_image`."""
        similarity = self.embed_image(images, **settings) @ self.embed_classes(class_names, templates).T
        return (similarity * self.model.temperature()).softmax(dim=-1).detach()

    def rank(self, images: Sequence[Image.Image] | np.ndarray, captions: Sequence[str], **settings: Any) -> torch.Tensor:
        """For each image the indices of `captions`, the best first: [B, N]; settings as of `embed_image`."""
        similarity = self.embed_image(images, **settings) @ self.embed_text(captions).T
        return similarity.argsort(dim=-1, descending=True)

    def pixels(self, images: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
        """PIL images of any size, cut and resized to the model's; or what has its size already -> [B, H, W, 3] uint8."""
        size = self.config.image_size
        if isinstance(images, np.ndarray):
            if images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
                raise ValueError(f"images: {images.dtype} {images.shape} is not uint8 [B, {size}, {size}, 3]")
            return images
        fitted = [ImageOps.fit(i.convert("RGB"), (size, size), Image.Resampling.BICUBIC) for i in images]
        return np.stack([np.asarray(i) for i in fitted])

    def _steps(self, num_steps: int, spacing: str = "") -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """(t, abar_t, abar at the next t) of a K-step chain."""
        spacing, abar = spacing or self.config.schedule.timestep_spacing, self.model.abar
        steps = schedule.inference_timesteps(num_steps, len(abar), spacing)
        previous = schedule.previous_alphas_cumprod(abar, steps, spacing)
        return [(t, abar[t], prev) for t, prev in zip(steps, previous, strict=True)]

    # --- folders ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """unet/ vae/ text_encoder/ tokenizer/ scheduler/ as diffusers and transformers read them, alignment/ and diffdis.json."""
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
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=not leading,
            steps_offset=1 if leading else 0,
            prediction_type=values.prediction_type,
            timestep_spacing=values.timestep_spacing,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DiffDisPipeline":
        """The inverse of `save_pretrained`. Raises FileNotFoundError when the folder is not an exported one, ValueError for one
        that is damaged, or holds more than tensors."""
        folder = Path(folder)
        if not (folder / CONFIG_NAME).exists():
            raise FileNotFoundError(f"{folder}: no {CONFIG_NAME} here; give a folder that DiffDis exported")
        values = read_json(folder / CONFIG_NAME)
        check_values(folder / CONFIG_NAME, values)
        try:
            saved = DiffDisConfig.from_dict(values)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{folder / CONFIG_NAME}: describes no model ({error})") from None
        config = dataclasses.replace(
            saved,
            warm_start="",
            autoencoder=dataclasses.replace(saved.autoencoder, path=str(folder)),
            text_encoder=dataclasses.replace(saved.text_encoder, path=str(folder)),
        )
        check_declared(folder, lambda: DiffDis(config))
        check_diffusers_model(UNet2DConditionModel, str(folder / "unet"))
        model = DiffDis(config)
        try:
            weights = load_file(folder / ALIGNMENT_WEIGHTS)
            unet = UNet2DConditionModel.from_pretrained(folder / "unet", **NO_PICKLES).state_dict()
            model.load_state_dict(weights | {f"unet.{name}": value for name, value in unet.items()})
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ValueError(
                f"{folder}: its weights cannot be read ({' '.join(str(error).split())[:300]}); export it again"
            ) from None
        return cls(config, model, build_autoencoder(config.autoencoder), build_text_encoder(config.text_encoder))


def _stable_diffusion_index(text_encoder: TextEncoder) -> dict[str, Any]:
    """With it diffusers' StableDiffusionPipeline opens the folder too."""
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


def _noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise that depends on its name alone."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
