"""The frozen half of DiffDis: images to latents, captions to token states and text queries.

Its results can be computed once and stored in half precision, instead of at every step.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffdis.autoencoder import HaarAutoencoder, build_autoencoder, to_latents
from diffdis.config import DiffDisConfig
from diffdis.model_folder import digest_of_folder
from diffdis.pretrained import component_folder
from diffdis.text_encoder import TEXT_PROJECTION, build_text_encoder
from diffdis.warm_start import resolve_pretrained

PRECOMPUTED = ("latent", "token_states", "query")


class FrozenEncoder:
    """The autoencoder and the text encoder of a configuration, on one device."""

    def __init__(self, config: DiffDisConfig, device: torch.device | str = "cpu"):
        self.device, config = torch.device(device), resolve_pretrained(config)
        self.autoencoder, self.text_encoder = build_autoencoder(config.autoencoder), build_text_encoder(config.text_encoder)
        move_encoders(config, self.device, self.autoencoder, self.text_encoder)

    @torch.no_grad()
    def encode(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Encode images [B, H, W, 3] uint8 to latent [B, C, h, w], token_states [B, L, D_c] and query [B, D], float16."""
        states, query = self.text_encoder.encode(captions, self.device)
        encoded = (to_latents(self.autoencoder, images, self.device), states, query)
        return {name: value.half().cpu().numpy() for name, value in zip(PRECOMPUTED, encoded, strict=True)}


def move_encoders(config: DiffDisConfig, device: torch.device, *encoders: torch.nn.Module) -> None:
    """Move the frozen encoders to a device, and on an accelerator to `config.encoder_dtype` and to channels-last weights.

    The images of a batch are channels-last, too, and tensor cores need that layout: other weights would be converted at each use.
    """
    for encoder in encoders:
        encoder.to(device)
        if device.type != "cpu" and not isinstance(encoder, HaarAutoencoder):  # it has no weights
            encoder.to(dtype=getattr(torch, config.encoder_dtype), memory_format=torch.channels_last)  # type: ignore[call-overload]


def describe_encoders(config: DiffDisConfig) -> dict[str, Any]:
    """Return settings and digests of everything that `FrozenEncoder`'s results depend on.

    Equal descriptions mean equal results, up to the rounding of `encoder_dtype`: results are stored in half precision anyway. A
    hub name has no digest and is compared by name. Raises FileNotFoundError.
    """
    config = resolve_pretrained(config)
    described: dict[str, Any] = {"image_size": config.image_size}
    for name, component, settings in (
        ("autoencoder", "vae", asdict(config.autoencoder)),
        ("text_encoder", "text_encoder", asdict(config.text_encoder)),
    ):
        settings.pop("cache_size", None)
        path = settings.pop("path")
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        described[name] = settings | ({"digest": _digest(path, component)} if path else {})
    return described


def _digest(path: str, component: str) -> str:
    """Return the digest of a component's folder, or its hub name."""
    if not (Path(path).exists() or Path(path).is_absolute()):
        return path
    digest, projection = digest_of_folder(component_folder(path, component)), Path(path) / TEXT_PROJECTION
    if component == "text_encoder" and projection.is_file():
        digest += "-" + hashlib.sha256(projection.read_bytes()).hexdigest()[:16]
    return digest
