"""Low-rank adapters (LoRA, Hu et al. 2021) in the attention of the U-Net, to fine-tune a released model with few trained weights.

A projection with the weights W computes W x + B A x, with A [r, in], and B [out, r], which starts as 0. Only A and B are trained.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers

LORA_FOLDER = "lora"  # in an exported folder
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of self-attention and cross-attention, as in diffusers' training script
_ADAPTER = "default"  # peft's name for it, a part of the names of its parameters


def add_adapters(unet: UNet2DConditionModel, rank: int) -> None:
    """Freeze the U-Net and add adapters of this rank to its attention. Raises ValueError if peft is not installed."""
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ValueError(
            f"objective.lora_rank: {rank} needs the package {error.name}; install it with pip install 'diffdis-platform[lora]'"
        ) from None
    # lora_alpha / r is the scale of B A: 1, which diffusers assumes for a file that has no other.
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=_TARGETS), _ADAPTER)


def merge_adapters(unet: UNet2DConditionModel) -> None:
    """Replace every W by W + B A, so that the U-Net is one of diffusers without adapters."""
    unet.fuse_lora()
    unet.unload_lora()


def save_adapters(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapters among the weights of a U-Net to a folder for `StableDiffusionPipeline.load_lora_weights`."""
    from diffusers import StableDiffusionPipeline  # its import takes seconds

    adapters = {name.replace(f".{_ADAPTER}.", "."): weight for name, weight in weights.items() if f".{_ADAPTER}." in name}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=convert_state_dict_to_diffusers(adapters))
