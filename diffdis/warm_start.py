"""Start the U-Net from a folder in Stable Diffusion's layout."""

import torch
from diffusers import UNet2DConditionModel

from diffdis.autoencoder import component_folder


def load_unet(unet: UNet2DConditionModel, path: str) -> None:
    """Copy the weights of `path/unet` (or of `path`) into `unet`; every tensor must be there and fit.

    Raises ValueError with the first tensor that differs: a warm start that is only half one trains a different model.
    """
    source = UNet2DConditionModel.from_pretrained(component_folder(path, "unet"), torch_dtype=torch.float32).state_dict()
    target = unet.state_dict()
    for name in sorted(source.keys() ^ target.keys()):
        where = "the configured U-Net" if name in source else path
        raise ValueError(f"model.warm_start: {where} has no tensor {name}; model.unet must describe the U-Net of {path}")
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            raise ValueError(
                f"model.warm_start: {name} is {tuple(source[name].shape)} in {path}, {tuple(tensor.shape)} in model.unet"
            )
    unet.load_state_dict(source)
