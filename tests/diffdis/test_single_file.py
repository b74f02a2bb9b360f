"""A checkpoint in a single file, in the layout of the original Stable Diffusion: rejected with the command that converts it."""

import re

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from diffdis.config import DiffDisConfig, HeadConfig, ObjectiveConfig
from diffdis.task import DiffDisTask
from tests.support.tiny_checkpoints import save_stable_diffusion

RESNET = [(".norm1.", ".in_layers.0."), (".conv1.", ".in_layers.2."), (".time_emb_proj.", ".emb_layers.1.")]
RESNET += [(".norm2.", ".out_layers.0."), (".conv2.", ".out_layers.3."), (".conv_shortcut.", ".skip_connection.")]
UNET = [("conv_in.", "input_blocks.0.0."), ("time_embedding.linear_1.", "time_embed.0."), ("conv_norm_out.", "out.0.")]
UNET += [("conv_out.", "out.2."), ("time_embedding.linear_2.", "time_embed.2.")]
VAE = [
    (r"down_blocks\.(\d)\.resnets\.", r"down.\1.block."), (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.0\.", "up_blocks.9."), (r"up_blocks\.1\.", "up_blocks.0."), (r"up_blocks\.9\.", "up_blocks.1."),
    (r"up_blocks\.(\d)\.resnets\.", r"up.\1.block."), (r"up_blocks\.(\d)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"), ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"), (r"attn_1\.group_norm", "attn_1.norm"),
    (r"to_out\.0", "proj_out"), (r"to_([qkv])", r"\1"),
]  # fmt: skip


def unet_name(name: str) -> str:
    """The original name of a tensor of a U-Net with two levels of one layer, of which one has attention."""
    for ours, theirs in UNET:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    part, *rest = re.match(r"(down|up|mid)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.*)", name).groups()
    level, kind, index, tail = int(rest[0] or 0), rest[1], int(rest[2]), rest[3]
    if part == "mid":
        place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * index}"
    elif part == "down":
        place = f"input_blocks.{1 + 2 * level + (kind == 'downsamplers')}.{int(kind == 'attentions')}"
    else:
        place = f"output_blocks.{2 * level + (1 if kind == 'upsamplers' else index)}.{int(kind != 'resnets')}"
    if kind == "resnets":
        tail = "." + tail
        for ours, theirs in RESNET:
            tail = tail.replace(ours, theirs)
        return place + tail
    return f"{place}.{tail.replace('conv.', 'op.') if kind == 'downsamplers' else tail}"


def vae_name(name: str) -> str:
    for ours, theirs in VAE:
        name = re.sub(ours, theirs, name)
    return name


def save_single_file(folder, file):
    tensors = {}
    for name, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        tensors[f"model.diffusion_model.{unet_name(name)}"] = value
    for name, value in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        original = f"first_stage_model.{vae_name(name)}"  # whose attention are convolutions of one pixel
        tensors[original] = value[:, :, None, None] if ".mid.attn_1." in original and value.ndim == 2 else value
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        tensors[f"cond_stage_model.transformer.{name}"] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)


def test_the_command_in_the_message_converts_the_file(tmp_path):
    folder, file = save_stable_diffusion(tmp_path / "sd"), tmp_path / "model.safetensors"
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
    parts = {name: kind.from_pretrained(folder / name) for name, kind in (kinds | {"scheduler": DDIMScheduler}).items()}
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **absent).save_pretrained(tmp_path / "configs")
    save_single_file(folder, file)
    config = DiffDisConfig(image_size=16, head=HeadConfig(1, 32, 2), warm_start=str(file))
    with pytest.raises(ValueError, match="a checkpoint in a single file; convert it") as raised:
        DiffDisTask(config, ObjectiveConfig())
    assert "\n" not in str(raised.value)
    # The file lacks the configurations, which diffusers would ask the hub for.
    code = re.search('python -c "(.*)"', str(raised.value))[1]
    exec(code.replace(f"'{file}'", f"'{file}', config='{tmp_path / 'configs'}', local_files_only=True"))
    converted = DiffDisConfig(image_size=16, head=HeadConfig(1, 32, 2), warm_start=str(tmp_path / "model"))
    unet = DiffDisTask(converted, ObjectiveConfig()).module.model.unet.state_dict()
    assert all(torch.equal(unet[name], value) for name, value in parts["unet"].state_dict().items())
