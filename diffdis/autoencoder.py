"""Frozen autoencoders: Stable Diffusion's AutoencoderKL, and a fixed invertible transform without weights.

Both have `encode_image` and `decode_latent`: images [B, 3, H, W] in [-1, 1], latents of about unit variance.
"""

from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import nn

from diffdis.config import AutoencoderConfig
from diffdis.model_folder import NO_PICKLES, check_diffusers_model


class HaarAutoencoder(ModelMixin, ConfigMixin):
    """Orthonormal color transform and `levels` orthonormal 2 x 2 Haar transforms, each channel scaled to mean 0 and variance 1.

    [B, 3, H, W] <-> [B, 3 * 4**levels, H / 2**levels, W / 2**levels]. Unlike those of a pixel unshuffle, the
    channels are nearly decorrelated, so errors of the denoiser do not appear as grain in neighboring pixels.
    """

    @register_to_config
    def __init__(self, levels: int = 1, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()):
        super().__init__()
        channels = 3 * 4**levels
        for name, values in (("haar_mean", mean), ("haar_std", std)):
            if values and len(values) != channels:
                raise ValueError(f"model.autoencoder.{name}: {len(values)} values for {channels} channels ({levels} levels)")
        # Rows: brightness, red - blue, green - magenta; orthonormal, so the inverse is the transpose.
        color = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
        self.register_buffer("color", color / color.norm(dim=1, keepdim=True), persistent=False)
        haar = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
        self.register_buffer("haar", haar / 2, persistent=False)  # symmetric: its own inverse
        shift, scale = torch.FloatTensor(mean or (0.0,) * channels), torch.FloatTensor(std or (1.0,) * channels)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_parameter("anchor", nn.Parameter(torch.zeros(()), requires_grad=False))  # needed by safetensors

    def transform(self, image: torch.Tensor) -> torch.Tensor:
        """Return the orthonormal part of `encode_image`, unscaled."""
        x = torch.einsum("dc,bchw->bdhw", self.color, image)
        for _ in range(self.config.levels):
            x = rearrange(x, "b c (h p) (w q) -> b c (p q) h w", p=2, q=2)
            x = rearrange(torch.einsum("kp,bcphw->bckhw", self.haar, x), "b c k h w -> b (k c) h w")
        return x

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Return the latent of an image in [-1, 1]."""
        return (self.transform(image) - self.shift) / self.scale

    def decode_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """Return the image of a latent."""
        x = latent * self.scale + self.shift
        for _ in range(self.config.levels):
            x = rearrange(x, "b (k c) h w -> b c k h w", k=4)
            x = torch.einsum("kp,bckhw->bcphw", self.haar, x)
            x = rearrange(x, "b c (p q) h w -> b c (h p) (w q)", p=2, q=2)
        return torch.einsum("dc,bdhw->bchw", self.color, x)


class KLAutoencoder(nn.Module):
    """Stable Diffusion's AutoencoderKL. The latent is the mode of the posterior, so it is deterministic [D]."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Return the scaled latent of an image in [-1, 1]."""
        return self.vae.encode(image).latent_dist.mode() * self.vae.config.scaling_factor

    def decode_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """Return the image of a scaled latent."""
        return self.vae.decode(latent / self.vae.config.scaling_factor).sample

    def save_pretrained(self, folder: Path) -> None:
        """Write the AutoencoderKL in diffusers' layout."""
        self.vae.save_pretrained(folder)


Autoencoder = HaarAutoencoder | KLAutoencoder


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """Return the frozen autoencoder in eval mode. Raises ValueError if `kl` has no path, FileNotFoundError if it is missing."""
    if config.kind == "haar":
        model: Autoencoder = HaarAutoencoder(config.haar_levels, config.haar_mean, config.haar_std)
    else:
        if not config.path:
            raise ValueError("model.autoencoder.path: empty; kind kl needs a Stable Diffusion folder")
        source = component_of(config.path, "vae")
        check_diffusers_model(AutoencoderKL, source["pretrained_model_name_or_path"])
        model = KLAutoencoder(AutoencoderKL.from_pretrained(**source, **NO_PICKLES))
    return model.eval().requires_grad_(False)


def component_of(path: str, component: str) -> dict[str, str]:
    """Return the arguments of `from_pretrained` to open a component in a pipeline's folder, its own folder, or on the hub."""
    if Path(path).exists() or Path(path).is_absolute():
        return {"pretrained_model_name_or_path": component_folder(path, component)}
    inside = _is_on_the_hub(path, f"{component}/config.json")
    return {"pretrained_model_name_or_path": path} | ({"subfolder": component} if inside else {})


def _is_on_the_hub(repository: str, file: str) -> bool:
    if isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str):
        return True
    try:
        return huggingface_hub.file_exists(repository, file)
    except (OSError, ValueError):  # offline, or no such repository: loading it gives a clearer error
        return False


def component_folder(path: str, component: str) -> str:
    """Return `path/component` if it exists (a pipeline's folder), else `path` (the component's folder, or a hub name).

    Raises FileNotFoundError for an absolute path that contains neither.
    """
    inside = Path(path) / component
    if (inside / "config.json").exists():
        return str(inside)
    if Path(path).is_absolute() and not (Path(path) / "config.json").exists():
        raise FileNotFoundError(f"{path}: no config.json in it or in {component}/; give a model in diffusers' layout")
    return path


def to_latents(autoencoder: Autoencoder, images: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Encode [B, H, W, 3] uint8 RGB to latents [B, C, h, w], in float32 even under autocast."""
    pixels = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2)  # a copy: Arrow's buffers are read-only
    with torch.autocast(pixels.device.type, enabled=False):
        return autoencoder.encode_image(pixels.float() / 127.5 - 1.0)


def to_pixels(autoencoder: Autoencoder, latent: torch.Tensor) -> np.ndarray:
    """Decode latents [B, C, h, w] to [B, H, W, 3] uint8 RGB."""
    image = autoencoder.decode_latent(latent).clamp(-1, 1)
    return ((image + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
