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


def _leave(attention: Attention, out: torch.Tensor) -> torch.Tensor:
    """[B, heads, n, c] -> [B, n, C], through the output projection."""
    out = attention.to_out[0](rearrange(out, "b heads n c -> b n (heads c)"))
    return attention.to_out[1](out) / attention.rescale_output_factor


def image_attention(attention: Attention, x: torch.Tensor) -> tuple[torch.Tensor, KeysValues]:
    """Stock self-attention of image tokens [B, N, C], and the keys and values for the queries to read."""
    keys_values = _heads(attention, attention.to_k(x)), _heads(attention, attention.to_v(x))
    out = F.scaled_dot_product_attention(_heads(attention, attention.to_q(x)), *keys_values)
    return _leave(attention, out), keys_values


def remembered(keys_values: KeysValues) -> KeysValues:
    """Laid out once as every later `query_attention` reads them, which would else copy them each time."""
    keys, values = keys_values
    return keys.contiguous(), values.contiguous()


def query_attention(attention: Attention, q: torch.Tensor, image: KeysValues) -> torch.Tensor:
    """n queries an image [B, n, C], each attending to the image's tokens and to itself, not to each other.

    softmax([q K^T, q k_q]) [V; v_q], in two parts: joined, keys and values of the whole image would be copied for every query
    token that is moved.
    """
    query, (keys, values) = _heads(attention, attention.to_q(q)), image  # [B, heads, n, c], [B, heads, N, c]
    query = query * query.shape[-1] ** -0.5
    own_keys, own_values = _heads(attention, attention.to_k(q)), _heads(attention, attention.to_v(q))
    scores = torch.cat([query @ keys.transpose(-1, -2), (query * own_keys).sum(dim=-1, keepdim=True)], dim=-1)
    weights = scores.softmax(dim=-1).to(values.dtype)  # [B, heads, n, N + 1]
    out = weights[..., :-1] @ values + weights[..., -1:] * own_values
    return _leave(attention, out)


def joint_attention(attention: Attention, x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[image tokens; query] attend to each other: x [B, N, C], q [B, 1, C] -> what each of the two gains."""
    out, _ = image_attention(attention, torch.cat([x, q], dim=1))
    return out[:, :-1], out[:, -1:]
