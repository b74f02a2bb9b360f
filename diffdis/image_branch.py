"""The U-Net, kept diffusers' own: generation calls its forward; alignment walks its down and middle blocks by hand."""

import dataclasses
import functools
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from diffdis.config import UNetConfig

# (site, layer, the layer's self-attention, its normed input [B, N, C]) -> what self-attention adds [B, N, C]
SelfAttention = Callable[[int, int, Attention, torch.Tensor], torch.Tensor]
Run = Callable[..., torch.Tensor]  # (part, *its tensors) -> part(*its tensors)


def build_unet(config: UNetConfig, token_dim: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(**dataclasses.asdict(config), out_channels=config.in_channels, cross_attention_dim=token_dim)


def attention_sites(unet: UNet2DConditionModel) -> list[Transformer2DModel]:
    """The attention blocks of the down path and the middle, in the order of the walk."""
    blocks = [b for b in unet.down_blocks if getattr(b, "has_cross_attention", False)] + [unet.mid_block]
    return [transformer for block in blocks for transformer in block.attentions]


def walk(
    unet: UNet2DConditionModel,
    latent: torch.Tensor,
    timestep: torch.Tensor,
    token_states: torch.Tensor,
    self_attention: SelfAttention,
) -> torch.Tensor:
    """The down path and middle block with every self-attention replaced by `self_attention`.

    latent [B, C, H, W], timestep [B], token_states [B, L, D] -> middle features [B, C', H', W']. With a self-attention that
    computes what diffusers' does, this equals the stock middle block's output bit for bit.
    """
    # Looked up once a walk: diffusers searches all modules for it, 2 ms at Stable Diffusion's size.
    run = _run_again_backward if unet.is_gradient_checkpointing and torch.is_grad_enabled() else _run
    time = unet.time_embedding(unet.get_time_embed(sample=latent, timestep=timestep))  # [B, 4C]
    h = unet.conv_in(latent)  # [B, C, H, W]
    site = 0
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for resnet, transformer in zip(block.resnets, attentions, strict=True):
            h = run(resnet, h, time)
            if transformer is not None:
                h = _transformer(run, transformer, site, h, token_states, self_attention)
                site += 1
        for downsampler in block.downsamplers or []:
            h = downsampler(h)
    h = run(unet.mid_block.resnets[0], h, time)
    for transformer, resnet in zip(unet.mid_block.attentions, unet.mid_block.resnets[1:], strict=True):
        h = _transformer(run, transformer, site, h, token_states, self_attention)
        site += 1
        h = run(resnet, h, time)
    return h


def _run(part: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> torch.Tensor:
    return part(*arguments)


def _run_again_backward(part: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> torch.Tensor:
    """`part(*arguments)`, whose activations are computed again in the backward pass.

    Not for self-attention: in the joint walk, a second run of it would find the query further on.
    """
    return checkpoint(part, *arguments, use_reentrant=False)


def _after_self_attention(block: BasicTransformerBlock, x: torch.Tensor, token_states: torch.Tensor) -> torch.Tensor:
    x = block.attn2(block.norm2(x), encoder_hidden_states=token_states) + x
    return block.ff(block.norm3(x)) + x


def _transformer(
    run: Run,
    transformer: Transformer2DModel,
    site: int,
    h: torch.Tensor,
    token_states: torch.Tensor,
    self_attention: SelfAttention,
) -> torch.Tensor:
    """Transformer2DModel's forward over a feature map, [B, C, H, W] -> [B, C, H, W]."""
    height = h.shape[2]

    # The memory layouts are diffusers' own: another one changes the last bits of what follows.
    def to_tokens(x: torch.Tensor) -> torch.Tensor:
        return rearrange(x, "b c h w -> b (h w) c").contiguous()

    def to_map(x: torch.Tensor) -> torch.Tensor:
        return rearrange(x, "b (h w) c -> b c h w", h=height).contiguous()

    linear = transformer.use_linear_projection
    x = transformer.norm(h)
    x = transformer.proj_in(to_tokens(x)) if linear else to_tokens(transformer.proj_in(x))
    for layer, block in enumerate(transformer.transformer_blocks):
        x = self_attention(site, layer, block.attn1, block.norm1(x)) + x
        x = run(functools.partial(_after_self_attention, block), x, token_states)
    x = to_map(transformer.proj_out(x)) if linear else transformer.proj_out(to_map(x))
    return x + h
