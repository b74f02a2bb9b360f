"""Self-attention over image tokens and text queries, with the weights of a diffusers Attention module.

`image_attention` + `query_attention` are the one-way mask, `joint_attention` is the paper's.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

KeysValues = tuple[torch.Tensor, torch.Tensor]  # each [B, heads, N, C / heads]


def _split_heads(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """[B, n, C] -> [B, heads, n, C / heads]"""
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def _merge_heads(attention: Attention, out: torch.Tensor) -> torch.Tensor:
    """Merge [B, heads, n, c] to [B, n, C] and apply the output projection."""
    out = attention.to_out[1](attention.to_out[0](out.transpose(1, 2).flatten(2)))
    return out if attention.rescale_output_factor == 1 else out / attention.rescale_output_factor


def image_attention(attention: Attention, x: torch.Tensor) -> tuple[torch.Tensor, KeysValues]:
    """Return the stock self-attention of image tokens [B, N, C], and their keys and values for `query_attention`."""
    keys_values = _split_heads(attention, attention.to_k(x)), _split_heads(attention, attention.to_v(x))
    out = F.scaled_dot_product_attention(_split_heads(attention, attention.to_q(x)), *keys_values)
    return _merge_heads(attention, out), keys_values


def contiguous(keys_values: KeysValues) -> KeysValues:
    """Copy keys and values once into the layout of `query_attention`, which would otherwise copy them at every call."""
    keys, values = keys_values
    return keys.contiguous(), values.contiguous()


def query_attention(attention: Attention, q: torch.Tensor, image: KeysValues) -> torch.Tensor:
    """Return the attention of n queries per image [B, n, C] to the image's tokens and each to itself, not to each other.

    softmax([q K^T, q k_q]) [V; v_q] in two parts: concatenating would copy the keys and values of the whole image.
    """
    query, (keys, values) = _split_heads(attention, attention.to_q(q)), image  # [B, heads, n, c], [B, heads, N, c]
    query = query * query.shape[-1] ** -0.5
    own_keys, own_values = _split_heads(attention, attention.to_k(q)), _split_heads(attention, attention.to_v(q))
    scores = torch.cat([query @ keys.transpose(-1, -2), (query * own_keys).sum(dim=-1, keepdim=True)], dim=-1)
    weights = scores.softmax(dim=-1).to(values.dtype)  # [B, heads, n, N + 1]
    # The gradient of a split is one concatenation; that of two slices is two tensors full of zeros, and their sum.
    of_image, own = weights.split([weights.shape[-1] - 1, 1], dim=-1)
    return _merge_heads(attention, of_image @ values + own * own_values)


def joint_attention(attention: Attention, x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Let [image tokens; query] attend to each other, for the last B of A + B images; the first A attend to themselves.

    x [A + B, N, C], q [B, 1, C] -> the residuals of both.
    """
    num_alone = len(x) - len(q)
    query, keys, values = (
        (_split_heads(attention, project(x)), _split_heads(attention, project(q)))
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    together = [torch.cat([of_image[num_alone:], of_query], dim=2) for of_image, of_query in (query, keys, values)]
    out = F.scaled_dot_product_attention(together[0], together[1], together[2])  # [B, heads, N + 1, c]
    of_images, of_queries = out[:, :, :-1], out[:, :, -1:]
    if num_alone:
        alone = F.scaled_dot_product_attention(query[0][:num_alone], keys[0][:num_alone], values[0][:num_alone])
        of_images = torch.cat([alone, of_images])
    return _merge_heads(attention, of_images), _merge_heads(attention, of_queries)


class AttentionProcessor:
    """diffusers' attention of Stable Diffusion, to the last bit, without its division by 1, which costs two kernels each time."""

    def __call__(
        self,
        attention: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        keys, values = attention.to_k(context), attention.to_v(context)
        query, keys, values = (_split_heads(attention, x) for x in (attention.to_q(hidden_states), keys, values))
        return _merge_heads(attention, F.scaled_dot_product_attention(query, keys, values, attn_mask=attention_mask))
