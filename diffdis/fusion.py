"""The text query's half of the dual-stream deep fusion block [P]: all parameters that a Stable Diffusion U-Net lacks.

The query is [B, n, D]: n noise samples per image (n = 1 under the joint mask). At each spatial transformer of the U-Net:
  q = FC_in(h_prev + e_t + TimeEmbed(t_e));  K layers of shared self-attention and a separate feed-forward;  h = FC_out(q).
"""

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from diffdis.attention import KeysValues, contiguous, image_attention, joint_attention, query_attention


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
    """Self-attention of `down_path` that keeps the keys and values of the last images, by spatial transformer and layer."""

    def __init__(self, stream: QueryStream, num_images: int):
        self.num_images = num_images
        self.cache: list[list[KeysValues]] = [[] for _ in stream.blocks]

    def __call__(self, index: int, layer: int, attention: Attention, x: torch.Tensor) -> torch.Tensor:
        out, (keys, values) = image_attention(attention, x)
        self.cache[index].append(contiguous((keys[-self.num_images :], values[-self.num_images :])))
        return out
