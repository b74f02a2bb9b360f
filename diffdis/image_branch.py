"""The U-Net, which remains diffusers' class. Its forward is written out here, as alignment needs only its first half."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffdis.attention import AttentionProcessor
from diffdis.config import UNetConfig

# Shapes of blocks of one class that are compiled: Stable Diffusion has about 30, for each of `data.aspect_ratios`. One above the
# limit, which torch sets to 8, would end the run, as the blocks are compiled with `fullgraph`.
MAX_SHAPES = 1024

# (index of the spatial transformer, layer, its self-attention, normed input [B, N, C]) -> residual [B, N, C]
SelfAttention = Callable[[int, int, Attention, torch.Tensor], torch.Tensor]
ModuleCall = Callable[..., torch.Tensor]  # (module, *tensors) -> module(*tensors)
# Arguments of UNet2DConditionModel that its forward uses without further inputs, and the one below does not.
_UNSUPPORTED = ("center_input_sample", "time_embedding_act_fn", "encoder_hid_dim")


def build_unet(config: UNetConfig, token_dim: int) -> UNet2DConditionModel:
    """Return a U-Net with new weights whose cross-attention takes token states of width `token_dim`.

    Raises ValueError for options that `down_path` does not support.
    """
    arguments = dataclasses.asdict(config)
    options = arguments.pop("options")
    for name in _UNSUPPORTED:
        if options.get(name):
            raise ValueError(f"model.unet.options: {name} is not supported; use a U-Net like that of Stable Diffusion")
    unet = UNet2DConditionModel(**arguments, **options, out_channels=config.in_channels, cross_attention_dim=token_dim)
    unet.set_attn_processor(AttentionProcessor())
    return unet


def keep_layouts(unet: UNet2DConditionModel) -> None:
    """Let residual blocks leave their inputs in channels-last layout: call it after each change of the mode.

    In training, diffusers' block copies the input of its shortcut's convolution, and the convolution converts it back. The block
    reads its mode for this alone; its dropout has one of its own.
    """
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            block.training = False


def spatial_transformers(unet: UNet2DConditionModel) -> list[Transformer2DModel]:
    """Return the attention blocks of the down path and of the middle block, in the order in which `down_path` runs them."""
    blocks = [b for b in unet.down_blocks if getattr(b, "has_cross_attention", False)] + [unet.mid_block]
    return [transformer for block in blocks for transformer in block.attentions]


class DownPath(NamedTuple):
    """What `down_path` computed of B images."""

    features: torch.Tensor  # of the middle block, [B, C', H', W']
    skips: list[torch.Tensor]  # for the up path, each [B, ...]
    time: torch.Tensor  # embedded timesteps, [B, 4C]

    def first(self, size: int) -> "DownPath":
        """Return what was computed of the first `size` images."""
        return DownPath(self.features[:size], [skip[:size] for skip in self.skips], self.time[:size])


def down_path(
    unet: UNet2DConditionModel,
    latent: torch.Tensor,
    timestep: torch.Tensor,
    token_states: torch.Tensor,
    self_attention: SelfAttention | None = None,
) -> DownPath:
    """Run the down path and the middle block, with `self_attention` instead of every self-attention.

    With the self-attention of diffusers, the features equal the output of the stock middle block bit for bit, if the latent and
    the weights are contiguous. If they are channels-last, so are all feature maps.

    Args:
        unet: diffusers' U-Net.
        latent: [B, C, H, W].
        timestep: [B].
        token_states: [B, L, D_c], for cross-attention.
        self_attention: called for every transformer layer. None: that of diffusers.
    """
    run = _module_call(unet)
    time = unet.time_embedding(unet.get_time_embed(sample=latent, timestep=timestep))  # [B, 4C]
    h = unet.conv_in(latent)  # [B, C, H, W]
    skips, index = [h], 0
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, transformer in zip(block.resnets, attentions, strict=True):
            h = run(resnet, h, time)
            if transformer is not None:
                h = _transformer(run, transformer, h, token_states, self_attention and functools.partial(self_attention, index))
                index += 1
            skips.append(h)
        for downsampler in block.downsamplers or []:
            h = downsampler(h)
            skips.append(h)
    h = run(unet.mid_block.resnets[0], h, time)
    for transformer, resnet in zip(unet.mid_block.attentions, unet.mid_block.resnets[1:], strict=True):
        h = _transformer(run, transformer, h, token_states, self_attention and functools.partial(self_attention, index))
        index += 1
        h = run(resnet, h, time)
    return DownPath(h, skips, time)


def up_path(unet: UNet2DConditionModel, down: DownPath, token_states: torch.Tensor) -> torch.Tensor:
    """Run the rest of diffusers' forward, [B, C, H, W] of noise or v, from the result of `down_path` on the same images.

    token_states [B, L, D_c].
    """
    run = _module_call(unet)
    h, skips = down.features, list(down.skips)
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, transformer in zip(block.resnets, attentions, strict=True):
            h = run(resnet, torch.cat([h, skips.pop()], dim=1), down.time)
            if transformer is not None:
                h = _transformer(run, transformer, h, token_states)
        for upsampler in block.upsamplers or []:
            h = upsampler(h, skips[-1].shape[2:])  # halving an odd size and doubling it gives another one
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))


def _module_call(unet: UNet2DConditionModel) -> ModuleCall:
    # Read from one block: `unet.is_gradient_checkpointing` searches all modules, 2 ms of the host at Stable Diffusion's size.
    return _run_checkpointed if unet.mid_block.gradient_checkpointing and torch.is_grad_enabled() else _run


def _run(part: ModuleCall, *arguments: torch.Tensor | None) -> torch.Tensor:
    return part(*arguments)


def _run_checkpointed(part: ModuleCall, *arguments: torch.Tensor | None) -> torch.Tensor:
    """Run `part` and recompute its activations in the backward pass.

    Not for a `SelfAttention`: under the joint mask it updates the query, so it must run once.
    """
    return checkpoint(part, *arguments, use_reentrant=False)


def _after_self_attention(block: BasicTransformerBlock, x: torch.Tensor, token_states: torch.Tensor) -> torch.Tensor:
    x = block.attn2(block.norm2(x), encoder_hidden_states=token_states) + x
    return block.ff(block.norm3(x)) + x


def _transformer(
    run: ModuleCall,
    transformer: Transformer2DModel,
    h: torch.Tensor,
    token_states: torch.Tensor,
    self_attention: Callable[[int, Attention, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run Transformer2DModel's forward on a feature map, [B, C, H, W] -> [B, C, H, W]."""
    height = h.shape[2]
    # The layout of diffusers, as another one changes the last bits of the result; or channels-last, as which tokens lie already.
    layout = torch.contiguous_format if h.is_contiguous() else torch.channels_last

    def to_tokens(x: torch.Tensor) -> torch.Tensor:
        return rearrange(x, "b c h w -> b (h w) c").contiguous()

    def to_map(x: torch.Tensor) -> torch.Tensor:
        return rearrange(x, "b (h w) c -> b c h w", h=height).contiguous(memory_format=layout)

    linear = transformer.use_linear_projection
    x = transformer.norm(h)
    x = transformer.proj_in(to_tokens(x)) if linear else to_tokens(transformer.proj_in(x))
    for layer, block in enumerate(transformer.transformer_blocks):
        if self_attention is None:
            x = run(block, x, None, token_states)
        else:
            x = self_attention(layer, block.attn1, block.norm1(x)) + x
            x = run(functools.partial(_after_self_attention, block), x, token_states)
    x = to_map(transformer.proj_out(x)) if linear else transformer.proj_out(to_map(x))
    return x + h


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Compile the residual blocks, the feed-forward layers and the up path's transformer blocks at their next call.

    Blocks of equal shapes share the compiled code, so that compilation takes seconds; the whole network takes minutes. What lies
    between them stays as it is: random numbers, the loss, and self-attention, which carries the query along under the joint mask.
    `options`: of torch.compile.
    """
    torch.compiler.config.recompile_limit = torch.compiler.config.accumulated_recompile_limit = MAX_SHAPES
    transformers = {name: module for name, module in network.named_modules() if isinstance(module, BasicTransformerBlock)}
    up = {module for name, module in transformers.items() if "up_blocks." in name}
    within = {module for block in up for module in block.modules() if module is not block}
    for block in network.modules():
        if block in up or (isinstance(block, ResnetBlock2D | FeedForward) and block not in within):
            block.compile(fullgraph=True, dynamic=False, **options)
