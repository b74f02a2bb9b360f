"""Frozen autoencoders: Stable Diffusion's AutoencoderKL, and a fixed invertible transform without weights.

Both have `encode_image` and `decode_latent`: images [B, 3, H, W] in [-1, 1], latents of about unit variance.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from PIL import Image
from torch import nn

from diffdis.arguments import OutputType
from diffdis.config import AutoencoderConfig
from diffdis.pretrained import component_folder, load_component
from diffdis.transfer import copy_to

DECODED_AT_ONCE = 8  # images: at 512 px, each has activations of 0.27 GB in float32, several at a time


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
        """Raises ValueError for an autoencoder whose latents are normalized per channel."""
        super().__init__()
        if vae.config.latents_mean or vae.config.latents_std:
            raise ValueError("model.autoencoder.path: latents_mean and latents_std are not supported; use Stable Diffusion's")
        self.vae = vae
        self.scale, self.shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Return the shifted and scaled latent of an image in [-1, 1]."""
        return (self.vae.encode(image).latent_dist.mode() - self.shift) * self.scale

    def decode_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """Return the image of a shifted and scaled latent."""
        return self.vae.decode(latent / self.scale + self.shift).sample

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

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
        model = KLAutoencoder(load_component(AutoencoderKL, component_folder(config.path, "vae")))
    return model.eval().requires_grad_(False)


def to_latents(autoencoder: Autoencoder, images: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Encode [B, H, W, 3] uint8 RGB to latents [B, C, h, w] float32, in the autoencoder's dtype even under autocast."""
    pixels = copy_to(device, [images])[0].permute(0, 3, 1, 2)
    with torch.autocast(pixels.device.type, enabled=False):
        return autoencoder.encode_image((pixels.float() / 127.5 - 1.0).to(autoencoder.dtype)).float()


def decode(autoencoder: Autoencoder, latent: torch.Tensor) -> torch.Tensor:
    """Decode latents [B, C, h, w] to images [B, 3, H, W] float32 in [-1, 1], in the autoencoder's dtype."""
    return autoencoder.decode_latent(latent.to(autoencoder.dtype)).float().clamp(-1, 1)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Convert images [B, 3, H, W] in [-1, 1] to [B, H, W, 3] uint8 RGB."""
    return ((images + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def decode_as(autoencoder: Autoencoder, latents: torch.Tensor, output_type: OutputType) -> Any:
    """Return latents [B, C, h, w] as images of a type, on the CPU; "latent": as they are."""
    if output_type == "latent":
        return latents
    images = torch.cat([decode(autoencoder, part).cpu() for part in latents.split(DECODED_AT_ONCE)])
    if output_type == "pil":
        return [Image.fromarray(image) for image in to_uint8(images)]
    images = (images + 1) / 2
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()


def join(parts: Sequence[Any], output_type: OutputType) -> Any:
    """Return batches of images, which `decode_as` returned, as one."""
    if output_type == "pil":
        return [image for part in parts for image in part]
    return np.concatenate(parts) if output_type == "np" else torch.cat(list(parts))
