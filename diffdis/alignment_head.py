"""The alignment head [P]: M transformer blocks over [projected image tokens; q], then a linear layer on q."""

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffdis.attention import KeysValues, contiguous, image_attention, joint_attention, query_attention
from diffdis.config import HeadConfig


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
