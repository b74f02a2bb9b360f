"""Start a training from existing weights: Stable Diffusion's U-Net, or a model that DiffDis exported."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from diffdis.autoencoder import component_of
from diffdis.config import DiffDisConfig
from diffdis.model import DiffDis
from diffdis.model_folder import NO_PICKLES, check_diffusers_model

ALIGNMENT_WEIGHTS = "alignment/model.safetensors"  # in an export, not in a Stable Diffusion folder


@dataclass(frozen=True)
class WarmStartReport:
    """Which tensors a warm start loaded."""

    path: str
    # Each by name, with the number of elements.
    loaded: dict[str, int]  # tensors of the model
    new: dict[str, int]  # tensors of the model that the folder does not have: newly initialized
    ignored: dict[str, int]  # tensors of the folder that the model does not have

    def summary(self) -> dict[str, Any]:
        """Return the counts of tensors and elements by part of the model, and the names of the ignored tensors."""
        return {"path": self.path, "loaded": _by_part(self.loaded), "new": _by_part(self.new), "ignored": list(self.ignored)}


def resolve_encoder_paths(config: DiffDisConfig) -> DiffDisConfig:
    """Use `warm_start` as the path of the autoencoder and the text encoder if they have none and it contains them.

    A repository of the hub is assumed to contain both.
    """
    if not config.warm_start:
        return config
    autoencoder, text_encoder = config.autoencoder, config.text_encoder
    if autoencoder.kind == "kl" and not autoencoder.path and _may_hold(config.warm_start, "vae"):
        autoencoder = dataclasses.replace(autoencoder, path=config.warm_start)
    if not text_encoder.path and _may_hold(config.warm_start, "text_encoder"):
        text_encoder = dataclasses.replace(text_encoder, path=config.warm_start)
    return dataclasses.replace(config, autoencoder=autoencoder, text_encoder=text_encoder)


def _may_hold(path: str, component: str) -> bool:
    return (Path(path) / component).is_dir() or not Path(path).exists()


def load_warm_start(model: DiffDis, path: str) -> WarmStartReport:
    """Copy the U-Net of `path/unet` (or of `path`, or of a repository of the hub) into the model; from a folder that DiffDis
    exported, also the other parts that the model has.

    Raises ValueError with the first tensor of the U-Net that differs: a partly loaded U-Net would be a different model.
    """
    location = component_of(path, "unet")
    check_diffusers_model(UNet2DConditionModel, location["pretrained_model_name_or_path"])
    unet = UNet2DConditionModel.from_pretrained(**location, torch_dtype=torch.float32, **NO_PICKLES).state_dict()
    source = {f"unet.{name}": tensor for name, tensor in unet.items()}
    if (others := Path(path) / ALIGNMENT_WEIGHTS).exists():
        source |= load_file(others)
    target = model.state_dict()
    differing = {name for name in source.keys() ^ target.keys() if name.startswith("unet.")}
    for name in sorted(differing):
        where = "the configured U-Net" if name in source else path
        raise ValueError(
            f"model.warm_start: {where} has no tensor {name.removeprefix('unet.')}; model.unet must describe the U-Net of {path}"
        )
    shared = sorted(source.keys() & target.keys())
    for name in shared:
        if source[name].shape != target[name].shape:
            raise ValueError(
                f"model.warm_start: {name.removeprefix('unet.')} is {tuple(source[name].shape)} in {path}, "
                f"{tuple(target[name].shape)} in the configured model"
            )
    model.load_state_dict({name: source[name] for name in shared}, strict=False)
    new, ignored = sorted(target.keys() - source), sorted(source.keys() - target)
    return WarmStartReport(path, _sizes(target, shared), _sizes(target, new), _sizes(source, ignored))


def _sizes(tensors: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, int]:
    return {name: tensors[name].numel() for name in names}


def _by_part(sizes: dict[str, int]) -> dict[str, dict[str, int]]:
    parts: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        count = parts.setdefault(name.partition(".")[0], {"tensors": 0, "parameters": 0})
        count["tensors"] += 1
        count["parameters"] += size
    return parts
