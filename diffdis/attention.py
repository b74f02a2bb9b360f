"""Self-attention over image tokens and text queries, with the weights of a diffusers Attention module.

`image_attention` + `query_attention` are the one-way mask, `joint_attention` is the paper's.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from einops import rearrange

KeysValues = tuple[torch.Tensor, torch.Tensor]  # each [B, heads, N, C / heads]


def _heads(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    return rearrange(x, "b n (heads c) -> b heads n c", heads=attention.heads)


def _attend(attention: Attention, query: torch.Tensor, keys_values: KeysValues, mask: torch.Tensor | None = None) -> torch.Tensor:
    out = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask)
    out = attention.to_out[0](rearrange(out, "b heads n c -> b n (heads c)"))
    return attention.to_out[1](out) / attention.rescale_output_factor


def image_attention(attention: Attention, x: torch.Tensor) -> tuple[torch.Tensor, KeysValues]:
    """Stock self-attention of image tokens [B, N, C], and the keys and values for the queries to read."""
    keys_values = _heads(attention, attention.to_k(x)), _heads(attention, attention.to_v(x))
    return _attend(attention, _heads(attention, attention.to_q(x)), keys_values), keys_values


def query_attention(attention: Attention, q: torch.Tensor, image: KeysValues) -> torch.Tensor:
    """n queries an image [B, n, C], each attending to the image's tokens and to itself, not to each other."""
    num_queries, num_tokens = q.shape[1], image[0].shape[2]
    keys = torch.cat([image[0], _heads(attention, attention.to_k(q))], dim=2)  # [B, heads, N + n, c]
    values = torch.cat([image[1], _heads(attention, attention.to_v(q))], dim=2)
    mask = None
    if num_queries > 1:
        seen = torch.ones(num_queries, num_tokens, dtype=torch.bool, device=q.device)
        mask = torch.cat([seen, torch.eye(num_queries, dtype=torch.bool, device=q.device)], dim=1)  # [n, N + n]
    return _attend(attention, _heads(attention, attention.to_q(q)), (keys, values), mask)


def joint_attention(attention: Attention, x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[image tokens; query] attend to each other: x [B, N, C], q [B, 1, C] -> what each of the two gains."""
    out, _ = image_attention(attention, torch.cat([x, q], dim=1))
    return out[:, :-1], out[:, -1:]
