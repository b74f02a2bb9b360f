"""Frozen text encoders: captions to the text condition c = T(y) and the text query e."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from diffdis.autoencoder import component_of
from diffdis.config import TextEncoderConfig
from diffdis.model_folder import NO_CODE, NO_PICKLES, check_model_folder


class TextEncoder(nn.Module):
    """A text model of transformers and its tokenizer."""

    def __init__(self, config: TextEncoderConfig, model: Any, tokenizer: Any):
        super().__init__()
        self.config, self.model, self.tokenizer = config, model.eval().requires_grad_(False), tokenizer
        self._cache: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    @torch.no_grad()
    def encode(self, captions: Sequence[str], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token states c [B, L, token_dim] and the unit-norm text queries e [B, embedding_dim] of B captions.

        Equal captions are encoded once, and in the model's own precision even under autocast: a score or a preview must not leave
        other numbers in the cache than training does. With a cache, all captions are padded to one length, because the batch in
        which a caption first occurs, which a resume changes, must not matter either. On CPUs the encoding of a caption is then
        the same to the last bit in every batch (measured: MiniLM, batches of 1 to 64, 1 and 2 threads). On accelerators, kernels
        and thus the last bits depend on the batch size.
        """
        missing = [c for c in dict.fromkeys(captions) if c not in self._cache]
        fresh = {}
        if missing:
            with torch.autocast(torch.device(device).type, enabled=False):
                states, pooled = self._encode(missing, device)
            fresh = {c: (states[i], pooled[i]) for i, c in enumerate(missing)}
        encoded = [fresh[c] if c in fresh else self._cache[c] for c in captions]
        self._update_cache(fresh)
        return torch.stack([s for s, _ in encoded]).to(device), torch.stack([e for _, e in encoded]).to(device)

    def _update_cache(self, fresh: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for caption, (states, pooled) in fresh.items() if self.config.cache_size else ():
            self._cache[caption] = (states.clone(), pooled.clone())
            if len(self._cache) > self.config.cache_size:
                self._cache.popitem(last=False)

    def _encode(self, captions: Sequence[str], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        # CLIP was trained with every caption padded to its full length; the other encoders mask the padding.
        padding = "max_length" if self.config.kind == "clip" or self.config.cache_size else "longest"
        tokens = self.tokenizer(
            list(captions), padding=padding, truncation=True, max_length=self.config.max_length, return_tensors="pt"
        ).to(device)
        mask = tokens["attention_mask"]
        if self.config.kind == "clip":
            out = self.model(input_ids=tokens["input_ids"])
            pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
            return out.last_hidden_state, F.normalize(pooled, dim=-1)
        # Padding states become 0: without biases in the U-Net's to_k and to_v they add a constant key and no value.
        states = self.model(**tokens).last_hidden_state * mask.unsqueeze(-1)  # [B, longest or L, D]
        pooled = states.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        states = F.pad(states, (0, 0, 0, self.config.max_length - states.shape[1]))  # [B, L, D]
        return states, F.normalize(pooled, dim=-1)

    def save_pretrained(self, folder: Path) -> None:
        """Write `folder/text_encoder` and `folder/tokenizer`, in diffusers' layout."""
        self.model.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")


def build_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """Load a frozen encoder. Raises ValueError for an empty path or a width that differs from the configuration."""
    if not config.path:
        raise ValueError("model.text_encoder.path: empty; give the folder (or hub name) of a text encoder with its tokenizer")
    source = component_of(config.path, "text_encoder")
    tokenizer_folder = Path(config.path) / "tokenizer"
    if "subfolder" in source:
        tokenizer = AutoTokenizer.from_pretrained(config.path, subfolder="tokenizer", **NO_CODE)
    else:
        check_model_folder(source["pretrained_model_name_or_path"])
        check_model_folder(tokenizer_folder)
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder) if tokenizer_folder.exists() else config.path, **NO_CODE)
    tokenizer.model_max_length = config.max_length  # diffusers reads it from an exported folder
    if config.kind == "clip":
        # A Stable Diffusion folder contains CLIP's text model without the projection, a CLIP folder with it.
        architectures = AutoConfig.from_pretrained(**source, **NO_CODE).architectures or []
        kind = CLIPTextModel if architectures == ["CLIPTextModel"] else CLIPTextModelWithProjection
        model = kind.from_pretrained(**source, **NO_PICKLES)
        width = model.config.hidden_size
        embedding = width if kind is CLIPTextModel else model.config.projection_dim
    else:
        model = AutoModel.from_pretrained(**source, **NO_PICKLES, **NO_CODE)
        width = embedding = model.config.hidden_size
    if (width, embedding) != (config.token_dim, config.embedding_dim):
        raise ValueError(
            f"model.text_encoder: {config.path} has token_dim, embedding_dim = {width}, {embedding}; "
            f"set these instead of {config.token_dim}, {config.embedding_dim}"
        )
    return TextEncoder(config, model, tokenizer)
