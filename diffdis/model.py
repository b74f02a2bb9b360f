"""DiffDis: both passes of Algorithm 1 over one U-Net.

B images, C x H x W latents, L tokens of width D_c, text queries of width D, n query noise samples per image.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from diffdis import schedule
from diffdis.alignment_head import AlignmentHead, PooledHead
from diffdis.attention import KeysValues, contiguous, image_attention
from diffdis.config import DiffDisConfig
from diffdis.fusion import JointSelfAttention, QueryStream
from diffdis.image_branch import SelfAttention, build_unet, image_features, spatial_transformers


class ImageKVCache(NamedTuple):
    """One-way mask: keys and values of an image's tokens, by spatial transformer and layer of the U-Net, and by head block."""

    unet: list[list[KeysValues]]
    head: list[KeysValues]


# One-way mask: the cache. Joint mask: (latent [B, C, H, W], null_states [1, L, D_c]), which every prediction runs again.
ImageCondition = ImageKVCache | tuple[torch.Tensor, torch.Tensor]


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
        """Return Phi(z_t, t_z, c), the predicted noise or v, in float32.

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
        cache: list[list[KeysValues]] = [[] for _ in self.stream.blocks]

        def attend(index: int, layer: int, attention, x: torch.Tensor) -> torch.Tensor:
            out, keys_values = image_attention(attention, x)
            cache[index].append(contiguous(keys_values))
            return out

        features = self._image_features(latent, null_states, attend)  # [B, N, C']
        return ImageKVCache(cache, self.head.encode_image(features))

    def predict_query(self, image: ImageCondition, e_t: torch.Tensor, t_e: torch.Tensor) -> torch.Tensor:
        """Return Phi(e_t, t_e, z), the clean query e0_hat, with unit norm.

        `image` is the result of `encode_condition`; e_t [B, n, D], t_e [B, n] -> [B, n, D].
        """
        dtype = self.unet.conv_in.weight.dtype
        noised = e_t.to(dtype) + self.stream.time(t_e, dtype)
        if isinstance(image, ImageKVCache):
            attentions = [[b.attn1 for b in t.transformer_blocks] for t in spatial_transformers(self.unet)]
            h = self.stream.one_way(noised, attentions, image.unet)
            out = self.head.one_way(h + noised, image.head)
        else:
            joint = JointSelfAttention(self.stream, noised)
            features = self._image_features(*image, joint)
            out = self.head.joint(joint.h + noised, features)
        if self.config.schedule.query_prediction == "epsilon":
            out = schedule.x0_from_noise(e_t, out, self.alphas_cumprod[t_e], self.config.gamma)
        return F.normalize(out.float(), dim=-1)

    def clip_image_embedding(self, latent: torch.Tensor, null_states: torch.Tensor) -> torch.Tensor:
        """Return the unit-norm image embedding of the `clip` task. latent [B, C, H, W], null_states [1, L, D_c] -> [B, D]."""

        def attend(index: int, layer: int, attention, x: torch.Tensor) -> torch.Tensor:
            return image_attention(attention, x)[0]

        return F.normalize(self.pooled(self._image_features(latent, null_states, attend)).float(), dim=-1)

    def _image_features(self, latent: torch.Tensor, null_states: torch.Tensor, self_attention: SelfAttention) -> torch.Tensor:
        """Return the features of the clean image, [B, N, C']."""
        timestep = torch.zeros(len(latent), dtype=torch.long, device=latent.device)  # t_z = 0 [D]
        dtype = self.unet.conv_in.weight.dtype
        token_states = null_states.to(dtype).expand(len(latent), -1, -1)
        features = image_features(self.unet, latent.to(dtype), timestep, token_states, self_attention)
        return rearrange(features, "b c h w -> b (h w) c")
