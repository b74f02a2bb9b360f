"""DiffDis: both passes of Algorithm 1 over one U-Net, and the modules that a Stable Diffusion U-Net lacks.

B images, C x H x W latents, L tokens of width D_c, text queries [B, n, D]: n noise samples per image (1 under the joint mask).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffdis import schedule
from diffdis.attention import KeysValues, contiguous, image_attention, joint_attention, query_attention
from diffdis.config import DiffDisConfig, HeadConfig
from diffdis.image_branch import SelfAttention, build_unet, down_path, keep_layouts, spatial_transformers, up_path

# --- The text query's half of the dual-stream deep fusion block [P]. At each spatial transformer of the U-Net:
#     q = FC_in(h_prev + e_t + TimeEmbed(t_e));  K layers of shared self-attention and a separate feed-forward;  h = FC_out(q).


class QueryTime(nn.Module):
    """TimeEmbed(t_e): [B, n] -> [B, n, D], sinusoids and a small MLP, as in the U-Net."""

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.sinusoid = Timesteps(embedding_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedding = TimestepEmbedding(embedding_dim, embedding_dim)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.embedding(self.sinusoid(timestep.flatten()).to(dtype)).unflatten(0, timestep.shape)


class QueryLayer(nn.Module):
    """Norms and feed-forward of the query in one transformer layer; self-attention is shared with the image."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, activation_fn="geglu")

    def add(self, q: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        q = q + attended
        return q + self.feed_forward(self.norm_feed_forward(q))


class DualStreamBlock(nn.Module):
    """Modules that the query needs in addition to one Transformer2DModel of the U-Net."""

    def __init__(self, embedding_dim: int, width: int, num_layers: int):
        super().__init__()
        self.fc_in = nn.Linear(embedding_dim, width)
        nn.init.zeros_(self.fc_in.weight)  # the query starts as one learned token, without e_t's noise [D; LOG.md]
        self.layers: list[QueryLayer] = nn.ModuleList(QueryLayer(width) for _ in range(num_layers))  # type: ignore[assignment]
        self.fc_out = nn.Linear(width, embedding_dim)


class QueryStream(nn.Module):
    """The dual-stream blocks of all spatial transformers, and the embedding of t_e that each of them adds again."""

    def __init__(self, transformers: list[Transformer2DModel], embedding_dim: int):
        super().__init__()
        self.time = QueryTime(embedding_dim)
        blocks = (DualStreamBlock(embedding_dim, t.inner_dim, len(t.transformer_blocks)) for t in transformers)
        self.blocks: list[DualStreamBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]

    def one_way(self, noised: torch.Tensor, attentions: list[list[Attention]], image: list[list[KeysValues]]) -> torch.Tensor:
        """Run the query over the cached keys and values of an image. noised = e_t + TimeEmbed(t_e) [B, n, D] -> h [B, n, D]."""
        h = torch.zeros_like(noised)
        for block, block_attentions, block_image in zip(self.blocks, attentions, image, strict=True):
            q = block.fc_in(h + noised)
            for layer, attention, keys_values in zip(block.layers, block_attentions, block_image, strict=True):
                q = layer.add(q, query_attention(attention, layer.norm_attention(q), keys_values))
            h = block.fc_out(q)
        return h


class JointSelfAttention:
    """Self-attention of `down_path` in which image tokens and query attend to each other; carries the query along.

    There may be more images than queries; the last images have them.
    """

    def __init__(self, stream: QueryStream, noised: torch.Tensor):
        self.blocks, self.noised = stream.blocks, noised  # [B, 1, D]
        self.h = torch.zeros_like(noised)
        self.q = noised

    def __call__(self, index: int, layer: int, attention: Attention, x: torch.Tensor) -> torch.Tensor:
        block = self.blocks[index]
        if layer == 0:
            self.q = block.fc_in(self.h + self.noised)
        x, attended = joint_attention(attention, x, block.layers[layer].norm_attention(self.q))
        self.q = block.layers[layer].add(self.q, attended)
        if layer == len(block.layers) - 1:
            self.h = block.fc_out(self.q)
        return x


class CachingSelfAttention:
    """Self-attention of `down_path` that keeps the keys and values of the last images, by spatial transformer and layer.

    `noised_cache` has those of the images `rows` [M], if they are given.
    """

    def __init__(self, stream: QueryStream, num_images: int, rows: torch.Tensor | None = None):
        self.num_images, self.rows = num_images, rows
        self.cache: list[list[KeysValues]] = [[] for _ in stream.blocks]
        self.noised_cache: list[list[KeysValues]] = [[] for _ in stream.blocks]

    def __call__(self, index: int, layer: int, attention: Attention, x: torch.Tensor) -> torch.Tensor:
        out, (keys, values) = image_attention(attention, x)
        self.cache[index].append(contiguous((keys[-self.num_images :], values[-self.num_images :])))
        if self.rows is not None:
            self.noised_cache[index].append(contiguous((keys[self.rows], values[self.rows])))
        return out


# --- The alignment head [P]: M transformer blocks over [projected image tokens; q], then a linear layer on q --------------------


class HeadBlock(nn.Module):
    """Pre-norm transformer block with the same parameters for image tokens and query."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, heads=config.num_heads, dim_head=config.width // config.num_heads)
        self.norm_feed_forward = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config.width, activation_fn="geglu")

    def add(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + attended
        return x + self.feed_forward(self.norm_feed_forward(x))


class PooledHead(nn.Module):
    """Head of the `clip` task: the mean of the normed image tokens, projected. [B, N, C] -> [B, D]"""

    def __init__(self, image_channels: int, embedding_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(image_channels)
        self.projection = nn.Linear(image_channels, embedding_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.projection(self.norm(tokens).mean(dim=1))


class AlignmentHead(nn.Module):
    """Predicts the clean text query from the query stream and the features of the U-Net's middle block."""

    def __init__(self, config: HeadConfig, image_channels: int, embedding_dim: int):
        super().__init__()
        self.norm_image = nn.LayerNorm(image_channels)
        self.image_in = nn.Linear(image_channels, config.width)
        self.query_in = nn.Linear(embedding_dim, config.width)
        nn.init.zeros_(self.query_in.weight)  # as FC_in: at first, the query only knows what it attends to
        blocks = (HeadBlock(config) for _ in range(config.num_layers))
        self.blocks: list[HeadBlock] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm_out = nn.LayerNorm(config.width)
        self.query_out = nn.Linear(config.width, embedding_dim)
        self.gradient_checkpointing = False  # recompute the feed-forward of each block in the backward pass

    def _add(self, block: HeadBlock, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block.add, x, attended, use_reentrant=False)
        return block.add(x, attended)

    def encode_image(self, tokens: torch.Tensor) -> list[KeysValues]:
        """One-way mask: return the keys and values of the image tokens [B, N, C] in each block; no query changes them."""
        x = self.image_in(self.norm_image(tokens))  # [B, N, W]
        cache = []
        for block in self.blocks:
            attended, keys_values = image_attention(block.attention, block.norm_attention(x))
            cache.append(contiguous(keys_values))
            if len(cache) < len(self.blocks):  # nothing reads the image tokens of the last block
                x = self._add(block, x, attended)
        return cache

    def one_way(self, h: torch.Tensor, cache: list[KeysValues]) -> torch.Tensor:
        """One-way mask: h [B, n, D] -> the prediction [B, n, D]."""
        q = self.query_in(h)  # [B, n, W]
        for block, keys_values in zip(self.blocks, cache, strict=True):
            q = self._add(block, q, query_attention(block.attention, block.norm_attention(q), keys_values))
        return self.query_out(self.norm_out(q))

    def joint(self, h: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Joint mask: h [B, 1, D], tokens [B, N, C] -> the prediction [B, 1, D]."""
        x, q = self.image_in(self.norm_image(tokens)), self.query_in(h)
        for block in self.blocks:
            x_attended, q_attended = joint_attention(block.attention, block.norm_attention(x), block.norm_attention(q))
            x, q = self._add(block, x, x_attended), self._add(block, q, q_attended)
        return self.query_out(self.norm_out(q))


# --- The network ---------------------------------------------------------------------------------------------------------------


class ImageKVCache(NamedTuple):
    """One-way mask: keys and values of an image's tokens, by spatial transformer and layer of the U-Net, and by head block."""

    unet: list[list[KeysValues]]
    head: list[KeysValues]


# One-way mask: the cache. Joint mask: (latent [B, C, H, W], null_states [1, L, D_c]), which every prediction runs again.
ImageCondition = ImageKVCache | tuple[torch.Tensor, torch.Tensor]


class JointPrediction(NamedTuple):
    """Results of both passes on B images."""

    image: torch.Tensor  # [B, C, H, W]: the predicted noise, v or z
    queries: torch.Tensor  # [B, n, D]: the predicted clean queries, of unit norm
    condition: ImageCondition  # the clean images
    features: torch.Tensor  # [B, C', H', W']: of the noisy images, behind the middle block
    noised: ImageKVCache | None = None  # the noisy images that were asked for


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
        self.train()

    def train(self, mode: bool = True) -> "DiffDis":
        """Set the mode, except that of modules that would change the memory layout in training."""
        super().train(mode)
        keep_layouts(self.unet)
        return self

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
        return self.predict_image_and_features(latent, timestep, token_states)[0]

    def predict_image_and_features(
        self, latent: torch.Tensor, timestep: torch.Tensor, token_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the result of `predict_image`, and the features behind the middle block [B, C', H', W']."""
        dtype = self.unet.conv_in.weight.dtype
        states = token_states.to(dtype)
        down = down_path(self.unet, latent.to(dtype), timestep, states)
        return up_path(self.unet, down, states).float(), down.features

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
        noised_rows: torch.Tensor | None = None,
    ) -> JointPrediction:
        """Run both passes on B images each, with one call of the down path and middle block for all 2 B.

        The arguments are those of `predict_image`, `encode_condition` and `predict_query`; with the one-way mask, `noised_rows`
        [M] are the noisy images that are also returned as conditions.
        """
        size, dtype = len(latent), self.unet.conv_in.weight.dtype
        states = torch.cat([token_states, null_states.expand(size, -1, -1)]).to(dtype)
        timesteps = torch.cat([timestep, torch.zeros_like(timestep)])
        noised, is_one_way = self._noised(e_t, t_e), self.config.query_visibility == "one_way"
        attend: CachingSelfAttention | JointSelfAttention = JointSelfAttention(self.stream, noised)
        if is_one_way:
            attend = CachingSelfAttention(self.stream, size, noised_rows)
        down = down_path(self.unet, torch.cat([noisy_latent, latent]).to(dtype), timesteps, states, attend)
        image = up_path(self.unet, down.first(size), states[:size]).float()
        tokens = _tokens(down.features[size:])
        condition: ImageCondition = latent, null_states
        noised_images = None
        if isinstance(attend, CachingSelfAttention):
            condition = ImageKVCache(attend.cache, self.head.encode_image(tokens))
            out = self._predict_one_way(condition, noised)
            if noised_rows is not None:
                noised_tokens = self.head.encode_image(_tokens(down.features[noised_rows]))
                noised_images = ImageKVCache(attend.noised_cache, noised_tokens)
        else:
            out = self.head.joint(attend.h + noised, tokens)
        return JointPrediction(image, self._clean_query(out, e_t, t_e), condition, down.features[:size], noised_images)

    def clip_image_embedding(self, latent: torch.Tensor, null_states: torch.Tensor) -> torch.Tensor:
        """Return the unit-norm image embedding of the `clip` task. latent [B, C, H, W], null_states [1, L, D_c] -> [B, D]."""
        return F.normalize(self.pooled(self._clean_image_tokens(latent, null_states)).float(), dim=-1)

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

    def _clean_image_tokens(
        self, latent: torch.Tensor, null_states: torch.Tensor, self_attention: SelfAttention | None = None
    ) -> torch.Tensor:
        """Return the middle block's features of the clean image with an empty text, as tokens [B, N, C']."""
        timestep = torch.zeros(len(latent), dtype=torch.long, device=latent.device)  # t_z = 0 [D]
        dtype = self.unet.conv_in.weight.dtype
        token_states = null_states.to(dtype).expand(len(latent), -1, -1)
        return _tokens(down_path(self.unet, latent.to(dtype), timestep, token_states, self_attention).features)


def _tokens(features: torch.Tensor) -> torch.Tensor:
    return rearrange(features, "b c h w -> b (h w) c")
