"""DiffDis: both passes of Algorithm 1 over one U-Net.

B images, C x H x W latents, L tokens of width D_c, text queries of width D, n query noise samples per image.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from torch import nn

from diffdis import schedule
from diffdis.alignment_head import AlignmentHead, PooledHead
from diffdis.attention import KeysValues, image_attention
from diffdis.config import DiffDisConfig
from diffdis.fusion import CachingSelfAttention, JointSelfAttention, QueryStream
from diffdis.image_branch import SelfAttention, build_unet, down_path, spatial_transformers, up_path


class ImageKVCache(NamedTuple):
    """One-way mask: keys and values of an image's tokens, by spatial transformer and layer of the U-Net, and by head block."""

    unet: list[list[KeysValues]]
    head: list[KeysValues]


# One-way mask: the cache. Joint mask: (latent [B, C, H, W], null_states [1, L, D_c]), which every prediction runs again.
ImageCondition = ImageKVCache | tuple[torch.Tensor, torch.Tensor]


# Shapes of blocks that are compiled: Stable Diffusion has about 30. Above torch's limit of 8, the others would stay as they are.
MAX_SHAPES = 64
MAX_LOG_SCALE = math.log(100.0)  # of the temperature's scale, as in CLIP


class Temperature(nn.Module):
    """InfoNCE's learnable scale 1 / temperature. A module, so that ZeRO 3's hooks see its use.

    Not limited here: clamping in `forward` would have no gradient above the limit, and the scale would never return. The
    optimizer limits the parameter to `MAX_LOG_SCALE` after each update, as CLIP does.
    """

    def __init__(self, temperature: float):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([1 / temperature]).log())  # [1]: DeepSpeed cannot save a scalar

    def forward(self) -> torch.Tensor:
        return self.log_scale.exp().squeeze()


class DiffDis(nn.Module):
    """The trainable network: the U-Net and, as far as `config.trained_for` needs them, the query stream, the alignment head (or
    the pooled one) and the temperature."""

    def __init__(self, config: DiffDisConfig, temperature: float = 0.07):
        super().__init__()
        self.config = config
        self.unet = build_unet(config.unet, config.text_encoder.token_dim)
        channels, width = config.unet.block_out_channels[-1], config.text_encoder.embedding_dim
        if config.trained_for in ("joint", "alignment"):
            self.stream = QueryStream(spatial_transformers(self.unet), width)
            self.head = AlignmentHead(config.head, channels, width)
        if config.trained_for == "clip":
            self.pooled = PooledHead(channels, width)
        if config.trained_for != "generation":
            self.temperature = Temperature(temperature)
        self._alphas_cumprod = schedule.alphas_cumprod(config.schedule)

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """abar [T] on the model's device; always float32, so it is not a buffer, which `to(dtype)` would convert."""
        if self._alphas_cumprod.device != (device := self.unet.conv_in.weight.device):
            self._alphas_cumprod = self._alphas_cumprod.to(device)
        return self._alphas_cumprod

    # --- pass A: generation, without the query. This is exactly Stable Diffusion. --------------------------------------

    def predict_image(self, latent: torch.Tensor, timestep: torch.Tensor, token_states: torch.Tensor) -> torch.Tensor:
        """Return Phi(z_t, t_z, c), the predicted noise, v or z, in float32.

        latent [B, C, H, W], timestep [B], token_states [B, L, D_c] -> [B, C, H, W].
        """
        dtype = self.unet.conv_in.weight.dtype
        return self.unet(latent.to(dtype), timestep, token_states.to(dtype), return_dict=False)[0].float()

    # --- pass B: alignment. The image is clean, its text is empty (`null_states`), and the noisy query is denoised. ------

    def noise_query(self, e: torch.Tensor, noise: torch.Tensor, t_e: torch.Tensor) -> torch.Tensor:
        """Return e_t = gamma sqrt(abar) sqrt(D) e + sqrt(1 - abar) eps, in float32.

        e [B, D], noise [B, n, D], t_e [B, n] -> [B, n, D]. e has unit norm: sqrt(D) gives its entries the noise's size [D].
        """
        scaled = (e * e.shape[-1] ** 0.5).unsqueeze(1).expand_as(noise)
        return schedule.add_noise(scaled, noise, self.alphas_cumprod[t_e], self.config.gamma)

    def encode_condition(self, latent: torch.Tensor, null_states: torch.Tensor) -> ImageCondition:
        """Return the image condition of `predict_query` for the configured mask. latent [B, C, H, W], null_states [1, L, D_c]."""
        if self.config.query_visibility == "one_way":
            return self.encode_image(latent, null_states)
        return latent, null_states

    def encode_image(self, latent: torch.Tensor, null_states: torch.Tensor) -> ImageKVCache:
        """Run the image once (one-way mask). latent [B, C, H, W], null_states [1, L, D_c]."""
        attend = CachingSelfAttention(self.stream, len(latent))
        tokens = self._clean_image_tokens(latent, null_states, attend)
        return ImageKVCache(attend.cache, self.head.encode_image(tokens))

    def predict_query(self, image: ImageCondition, e_t: torch.Tensor, t_e: torch.Tensor) -> torch.Tensor:
        """Return Phi(e_t, t_e, z), the clean query e0_hat, with unit norm.

        `image` is the result of `encode_condition`; e_t [B, n, D], t_e [B, n] -> [B, n, D].
        """
        noised = self._noised(e_t, t_e)
        if isinstance(image, ImageKVCache):
            out = self._predict_one_way(image, noised)
        else:
            attend = JointSelfAttention(self.stream, noised)
            tokens = self._clean_image_tokens(*image, attend)
            out = self.head.joint(attend.h + noised, tokens)
        return self._clean_query(out, e_t, t_e)

    def predict_image_and_query(
        self,
        noisy_latent: torch.Tensor,
        timestep: torch.Tensor,
        token_states: torch.Tensor,
        latent: torch.Tensor,
        null_states: torch.Tensor,
        e_t: torch.Tensor,
        t_e: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, ImageCondition]:
        """Run both passes on B images each, with one call of the down path and middle block for all 2 B.

        The arguments are those of `predict_image`, `encode_condition` and `predict_query`; the results are the predicted noise,
        v or z, the predicted clean queries, and the condition.
        """
        size, dtype = len(latent), self.unet.conv_in.weight.dtype
        states = torch.cat([token_states, null_states.expand(size, -1, -1)]).to(dtype)
        timesteps = torch.cat([timestep, torch.zeros_like(timestep)])
        noised, is_one_way = self._noised(e_t, t_e), self.config.query_visibility == "one_way"
        attend = CachingSelfAttention(self.stream, size) if is_one_way else JointSelfAttention(self.stream, noised)
        down = down_path(self.unet, torch.cat([noisy_latent, latent]).to(dtype), timesteps, states, attend)
        image = up_path(self.unet, down.first(size), states[:size]).float()
        tokens = _tokens(down.features[size:])
        condition: ImageCondition = latent, null_states
        if isinstance(attend, CachingSelfAttention):
            condition = ImageKVCache(attend.cache, self.head.encode_image(tokens))
            out = self._predict_one_way(condition, noised)
        else:
            out = self.head.joint(attend.h + noised, tokens)
        return image, self._clean_query(out, e_t, t_e), condition

    def clip_image_embedding(self, latent: torch.Tensor, null_states: torch.Tensor) -> torch.Tensor:
        """Return the unit-norm image embedding of the `clip` task. latent [B, C, H, W], null_states [1, L, D_c] -> [B, D]."""

        def attend(index: int, layer: int, attention, x: torch.Tensor) -> torch.Tensor:
            return image_attention(attention, x)[0]

        return F.normalize(self.pooled(self._clean_image_tokens(latent, null_states, attend)).float(), dim=-1)

    def _noised(self, e_t: torch.Tensor, t_e: torch.Tensor) -> torch.Tensor:
        """Return e_t + TimeEmbed(t_e), [B, n, D], in the precision of the weights."""
        dtype = self.unet.conv_in.weight.dtype
        return e_t.to(dtype) + self.stream.time(t_e, dtype)

    def _predict_one_way(self, image: ImageKVCache, noised: torch.Tensor) -> torch.Tensor:
        attentions = [[b.attn1 for b in t.transformer_blocks] for t in spatial_transformers(self.unet)]
        h = self.stream.one_way(noised, attentions, image.unet)
        return self.head.one_way(h + noised, image.head)

    def _clean_query(self, out: torch.Tensor, e_t: torch.Tensor, t_e: torch.Tensor) -> torch.Tensor:
        """Return e0_hat with unit norm from the head's output [B, n, D]."""
        if self.config.schedule.query_prediction == "epsilon":
            out = schedule.x0_from_noise(e_t, out, self.alphas_cumprod[t_e], self.config.gamma)
        return F.normalize(out.float(), dim=-1)

    def _clean_image_tokens(self, latent: torch.Tensor, null_states: torch.Tensor, self_attention: SelfAttention) -> torch.Tensor:
        """Return the middle block's features of the clean image with an empty text, as tokens [B, N, C']."""
        timestep = torch.zeros(len(latent), dtype=torch.long, device=latent.device)  # t_z = 0 [D]
        dtype = self.unet.conv_in.weight.dtype
        token_states = null_states.to(dtype).expand(len(latent), -1, -1)
        return _tokens(down_path(self.unet, latent.to(dtype), timestep, token_states, self_attention).features)


def _tokens(features: torch.Tensor) -> torch.Tensor:
    return rearrange(features, "b c h w -> b (h w) c")


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Compile the residual blocks, the feed-forward layers and the up path's transformer blocks at their next call.

    Blocks of equal shapes share the compiled code, so that compilation takes seconds; the whole network takes minutes. What lies
    between them stays as it is: random numbers, the loss, and self-attention, which carries the query along under the joint mask.
    `options`: of torch.compile.
    """
    torch.compiler.config.recompile_limit = MAX_SHAPES
    transformers = {name: module for name, module in network.named_modules() if isinstance(module, BasicTransformerBlock)}
    up = {module for name, module in transformers.items() if "up_blocks." in name}
    within = {module for block in up for module in block.modules() if module is not block}
    for block in network.modules():
        if block in up or (isinstance(block, ResnetBlock2D | FeedForward) and block not in within):
            block.compile(fullgraph=True, dynamic=False, **options)
