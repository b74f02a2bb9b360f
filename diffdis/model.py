"""DiffDis: both passes of Algorithm 1 over one U-Net. The method on one screen.

B images, C x H x W latents, L tokens of width D_c, text queries of width D, n draws an image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from diffdis import schedule
from diffdis.alignment_head import AlignmentHead, PooledHead
from diffdis.attention import KeysValues, image_attention, remembered
from diffdis.config import DiffDisConfig
from diffdis.fusion import JointWalk, QueryStream
from diffdis.image_branch import attention_sites, build_unet, walk


class ImageKVCache(NamedTuple):
    """What the one-way mask keeps of an image: keys and values at each layer of each site, and of each head block."""

    sites: list[list[KeysValues]]
    head: list[KeysValues]


class Temperature(nn.Module):
    """InfoNCE's learnable scale 1 / temperature, at most 100, as in CLIP. A module, so that ZeRO 3's hooks see its use."""

    def __init__(self, temperature: float):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([1 / temperature]).log())  # [1]: DeepSpeed cannot save a scalar

    def forward(self) -> torch.Tensor:
        return self.log_scale.exp().clamp(max=100.0).squeeze()


class DiffDis(nn.Module):
    """The trainable network: the U-Net and, as far as `config.trained_for` needs them, the query's stream, the alignment head (or
    the pooled one) and InfoNCE's temperature."""

    abar: torch.Tensor  # [T]

    def __init__(self, config: DiffDisConfig, temperature: float = 0.07):
        super().__init__()
        self.config = config
        self.unet = build_unet(config.unet, config.text_encoder.token_dim)
        channels, width = config.unet.block_out_channels[-1], config.text_encoder.embedding_dim
        if config.trained_for in ("joint", "alignment"):
            self.stream = QueryStream(attention_sites(self.unet), width)
            self.head = AlignmentHead(config.head, channels, width)
        if config.trained_for == "clip":
            self.pooled = PooledHead(channels, width)
        if config.trained_for != "generation":
            self.temperature = Temperature(temperature)
        self.register_buffer("abar", schedule.alphas_cumprod(config.schedule), persistent=False)

    # --- pass A: generation. The query is left out, so this is exactly Stable Diffusion. -------------------------------

    def predict_image(self, z_t: torch.Tensor, t_z: torch.Tensor, token_states: torch.Tensor) -> torch.Tensor:
        """Phi(z_t, t_z, c): the noise, or v, in float32. [B, C, H, W] -> [B, C, H, W]"""
        return self.unet(z_t, t_z, encoder_hidden_states=token_states, return_dict=False)[0].float()

    # --- pass B: alignment. The image is clean, its text masked by `null_states`, and the noised query rides along. ------

    def noise_query(self, e: torch.Tensor, noise: torch.Tensor, t_e: torch.Tensor) -> torch.Tensor:
        """e_t = gamma sqrt(abar) sqrt(D) e + sqrt(1 - abar) eps: e [B, D], noise [B, n, D], t_e [B, n] -> [B, n, D].

        e has unit norm, so sqrt(D) gives its entries the size of the noise's [D].
        """
        scaled = (e * e.shape[-1] ** 0.5).unsqueeze(1).expand_as(noise)
        return schedule.add_noise(scaled, noise, self.abar[t_e], self.config.schedule.gamma)

    def encode_image(self, latent: torch.Tensor, null_states: torch.Tensor) -> ImageKVCache:
        """One-way mask: walk the image once. latent [B, C, H, W], null_states [1, L, D_c]."""
        sites: list[list[KeysValues]] = [[] for _ in self.stream.blocks]

        def remember(site: int, layer: int, attention, x: torch.Tensor) -> torch.Tensor:
            out, keys_values = image_attention(attention, x)
            sites[site].append(remembered(keys_values))
            return out

        features = self._walk(latent, null_states, remember)  # [B, N, C']
        return ImageKVCache(sites, self.head.encode_image(features))

    def predict_query(
        self, image: ImageKVCache | tuple[torch.Tensor, torch.Tensor], e_t: torch.Tensor, t_e: torch.Tensor
    ) -> torch.Tensor:
        """Phi(e_t, t_e, z): the clean query e0_hat, with unit norm. e_t [B, n, D], t_e [B, n] -> [B, n, D].

        `image` is what `encode_image` kept (one-way), or (latent, null_states), walked here together with the query (joint).
        """
        noised = e_t + self.stream.time(t_e, e_t.dtype)
        if isinstance(image, ImageKVCache):
            attentions = [[b.attn1 for b in site.transformer_blocks] for site in attention_sites(self.unet)]
            h = self.stream.one_way(noised, attentions, image.sites)
            out = self.head.one_way(h + noised, image.head)
        else:
            joint = JointWalk(self.stream, noised)
            features = self._walk(*image, joint)
            out = self.head.joint(joint.h + noised, features)
        if self.config.schedule.query_prediction == "epsilon":
            out = schedule.x0_from_noise(e_t, out, self.abar[t_e], self.config.schedule.gamma)
        return F.normalize(out.float(), dim=-1)

    def clip_image_embedding(self, latent: torch.Tensor, null_states: torch.Tensor) -> torch.Tensor:
        """The `clip` task's query of an image, with unit norm. latent [B, C, H, W] -> [B, D]."""

        def attend(site: int, layer: int, attention, x: torch.Tensor) -> torch.Tensor:
            return image_attention(attention, x)[0]

        return F.normalize(self.pooled(self._walk(latent, null_states, attend)).float(), dim=-1)

    def encode_condition(self, latent: torch.Tensor, null_states: torch.Tensor):
        """What `predict_query` takes as its image, by the configured mask."""
        if self.config.query_visibility == "one_way":
            return self.encode_image(latent, null_states)
        return latent, null_states

    def _walk(self, latent: torch.Tensor, null_states: torch.Tensor, self_attention) -> torch.Tensor:
        clean = torch.zeros(len(latent), dtype=torch.long, device=latent.device)  # t_z = 0 [D]
        features = walk(self.unet, latent, clean, null_states.expand(len(latent), -1, -1), self_attention)
        return rearrange(features, "b c h w -> b (h w) c")
