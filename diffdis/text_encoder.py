"""Frozen text encoders: captions to the text condition c = T(y) and the text query e."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer, CLIPConfig, CLIPTextModel

from diffdis.config import TextEncoderConfig
from diffdis.model_folder import NO_CODE, check_model_folder
from diffdis.pretrained import (
    WeightsDescription,
    component_folder,
    describe_weights,
    load_component,
    local_folder,
    read_config,
    read_tensor,
    without_progress_bars,
)
from diffdis.transfer import copy_to

TEXT_PROJECTION = "alignment/text_projection.safetensors"  # in an export, whose text_encoder/ is the one that diffusers calls
# Tensors of a whole CLIP that its text model does without.
_OTHER_HALF = (r"^vision_model\.", r"^visual_projection\.", r"^text_projection\.", r"^logit_scale$")
LENGTH_STEP = 4  # cached captions are padded to multiples of so many tokens
_ENCODER_DECODERS = ("t5", "mt5", "umt5", "bart")


class TextEncoder(nn.Module):
    """A text model of transformers, its tokenizer, and CLIP's projection of the pooled state, if it has one."""

    projection: torch.Tensor | None
    model: Any

    def __init__(self, config: TextEncoderConfig, model: Any, tokenizer: Any, projection: torch.Tensor | None = None):
        """`projection` [embedding_dim, token_dim]."""
        super().__init__()
        self.config, self.model, self.tokenizer = config, model.eval().requires_grad_(False), tokenizer
        self.register_buffer("projection", projection)
        self._cache: OrderedDict[str, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    @torch.no_grad()
    def encode(self, captions: Sequence[str], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token states c [B, L, token_dim] and the unit-norm text queries e [B, embedding_dim] of B captions.

        Equal captions are encoded once, and in the model's own precision even under autocast: a score or a preview must not
        leave other numbers in the cache than training does. With a cache, the length to which a caption is padded depends on
        that caption alone, because the batch in which it first occurs, which a resume changes, must not matter either. On CPUs
        the encoding of a caption is then the same to the last bit in every batch (measured: MiniLM, batches of 1 to 64, 1 and 2
        threads). On accelerators, kernels and thus the last bits depend on the batch size.
        """
        missing = [c for c in dict.fromkeys(captions) if c not in self._cache]
        fresh: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        with torch.autocast(torch.device(device).type, enabled=False):
            for length, group in self._group_by_length(missing).items():
                states, pooled = self._encode(group, length, device)
                fresh |= {c: (states[i], pooled[i]) for i, c in enumerate(group)}
        encoded = [fresh[c] if c in fresh else self._cache[c] for c in captions]
        self._update_cache(fresh)
        states, queries = (torch.stack(parts).to(device, non_blocking=True) for parts in zip(*encoded, strict=True))
        return states, queries

    def truncated(self, captions: Sequence[str]) -> list[str]:
        """Return the captions with more tokens than the encoder takes, which `encode` cuts."""
        tokens = self.tokenizer(list(captions), verbose=False)["input_ids"]
        return [caption for caption, ids in zip(captions, tokens, strict=True) if len(ids) > self.config.max_length]

    def _update_cache(self, fresh: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for caption, (states, pooled) in fresh.items() if self.config.cache_size else ():
            self._cache[caption] = (states.clone(), pooled.clone())
            if len(self._cache) > self.config.cache_size:
                self._cache.popitem(last=False)

    def _group_by_length(self, captions: Sequence[str]) -> dict[int, list[str]]:
        """Return the captions of each batch of `_encode` by the length to which they are padded; 0: that of the longest one."""
        lengths = [0] * len(captions)
        if self.config.kind == "clip":  # it was trained with every caption padded to its full length; the others mask the padding
            lengths = [self.config.max_length] * len(captions)
        elif self.config.cache_size and captions:
            tokens = self.tokenizer(list(captions), verbose=False)["input_ids"]
            # In steps, because one length for each number of tokens would give many small batches.
            lengths = [min(-(-len(ids) // LENGTH_STEP) * LENGTH_STEP, self.config.max_length) for ids in tokens]
        groups: dict[int, list[str]] = {}
        for caption, length in zip(captions, lengths, strict=True):
            groups.setdefault(length, []).append(caption)
        return groups

    def _encode(self, captions: Sequence[str], length: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        arrays = self.tokenizer(
            list(captions),
            padding="max_length" if length else "longest",
            truncation=True,
            max_length=length or self.config.max_length,
            return_tensors="np",
        )
        tokens = dict(zip(arrays, copy_to(device, list(arrays.values())), strict=True))
        mask = tokens["attention_mask"]
        if self.config.kind == "clip":
            states = self.model(input_ids=tokens["input_ids"]).last_hidden_state  # [B, L, token_dim]
            # At the first end token; a config.json with the old eos_token_id 2 would have transformers take the largest id.
            end = (tokens["input_ids"] == self.tokenizer.eos_token_id).int().argmax(dim=1)
            pooled = states[torch.arange(len(states), device=states.device), end]
            if self.projection is not None:
                pooled = F.linear(pooled, self.projection)
            return states.float(), F.normalize(pooled.float(), dim=-1)
        # Padding states become 0: without biases in the U-Net's to_k and to_v they add a constant key and no value.
        states = self.model(**tokens).last_hidden_state.float() * mask.unsqueeze(-1)  # [B, padded length, D]
        pooled = states.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        states = F.pad(states, (0, 0, 0, self.config.max_length - states.shape[1]))  # [B, L, D]
        return states, F.normalize(pooled, dim=-1)

    def save_pretrained(self, folder: Path) -> None:
        """Write `folder/text_encoder` and `folder/tokenizer` in diffusers' layout, and the projection."""
        with without_progress_bars():
            self.model.save_pretrained(folder / "text_encoder")
        if self.config.kind == "clip":
            _add_prefix(folder / "text_encoder" / "model.safetensors")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        (folder / TEXT_PROJECTION).unlink(missing_ok=True)  # of another model that was saved there
        if self.projection is not None:
            (folder / TEXT_PROJECTION).parent.mkdir(parents=True, exist_ok=True)
            save_file({"text_projection.weight": self.projection.contiguous()}, folder / TEXT_PROJECTION)


def _add_prefix(file: Path) -> None:
    """Name CLIP's tensors as all published files do. transformers 5 drops the prefix, and older versions need it."""
    tensors = load_file(file)
    if not any(name.startswith("text_model.") for name in tensors):
        save_file({f"text_model.{name}": value for name, value in tensors.items()}, file, {"format": "pt"})


def build_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """Load a frozen encoder.

    Raises:
        FileNotFoundError: the path has no text encoder.
        ValueError: the path is empty, or contains another kind of model or other widths than configured.
    """
    if not config.path:
        raise ValueError("model.text_encoder.path: empty; give the folder (or hub name) of a text encoder with its tokenizer")
    folder = component_folder(config.path, "text_encoder")
    model_type = _check_model_type(config, folder)
    if config.kind == "clip":
        # The text half of a whole CLIP: `text_config_dict` and other old habits are resolved by CLIPConfig.
        settings = {"config": CLIPConfig.from_pretrained(folder, **NO_CODE).text_config} if model_type == "clip" else {}
        model = load_component(CLIPTextModel, folder, optional=_OTHER_HALF, **settings)
        projection = text_projection(config.path)
    else:
        model, projection = load_component(AutoModel, folder, optional=("pooler",), **NO_CODE), None
    width = model.config.hidden_size
    embedding = width if projection is None else projection.shape[0]
    if (width, embedding) != (config.token_dim, config.embedding_dim):
        raise ValueError(
            f"model.text_encoder: {config.path} has token_dim, embedding_dim = {width}, {embedding}; "
            f"set these instead of {config.token_dim}, {config.embedding_dim}"
        )
    return TextEncoder(config, model, _load_tokenizer(config, folder), projection)


def _load_tokenizer(config: TextEncoderConfig, folder: Path) -> Any:
    """Return the tokenizer next to the text encoder's `folder` or in it. Raises ValueError if it cannot be loaded."""
    tokenizer_folder = local_folder(config.path) / "tokenizer"
    tokenizer_folder = tokenizer_folder if tokenizer_folder.is_dir() else folder
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.model_max_length = config.max_length  # diffusers reads it from an exported folder
    return tokenizer


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a folder. Raises ValueError if it cannot be loaded."""
    check_model_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), **NO_CODE)
    except (ImportError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: no tokenizer can be loaded from it ({' '.join(str(error).split())[:200]}); download it, too"
        ) from None


def describe_text_encoder(config: TextEncoderConfig) -> WeightsDescription:
    """Open the text encoder's files and its tokenizer without loading the weights. Raises like `build_text_encoder`."""
    folder = component_folder(config.path, "text_encoder")
    _check_model_type(config, folder)
    _load_tokenizer(config, folder)
    return describe_weights(folder)


def text_encoder_widths(config: TextEncoderConfig) -> tuple[int, int]:
    """Return (token_dim, embedding_dim) of a CLIP's text encoder without loading it. Raises like `build_text_encoder`."""
    folder = component_folder(config.path, "text_encoder")
    _check_model_type(config, folder)
    values = read_config(folder)
    width = int((values.get("text_config_dict") or values.get("text_config") or values).get("hidden_size", 512))
    projection = text_projection(config.path)
    return width, width if projection is None else projection.shape[0]


def text_projection(path: str) -> torch.Tensor | None:
    """Return the projection of CLIP's pooled state [D, token_dim], or None if the path has none.

    Its width is that of the weights: `projection_dim` of a text_config is wrong in some published models.
    """
    own = local_folder(path) / TEXT_PROJECTION
    if own.is_file():
        return load_file(own)["text_projection.weight"].float()
    return read_tensor(component_folder(path, "text_encoder"), "text_projection.weight")


def _check_model_type(config: TextEncoderConfig, folder: Path) -> str:
    """Return the model type of a folder. Raises ValueError for one that `config.kind` cannot use."""
    check_model_folder(folder)
    values = read_config(folder)
    model_type = str(values.get("model_type", "clip_text_model"))
    if config.kind == "clip" and model_type not in ("clip", "clip_text_model"):
        remedy = "is not supported" if model_type in _ENCODER_DECODERS else "needs model.text_encoder.kind mean_pool"
        raise ValueError(f"model.text_encoder.kind: clip, but {folder} has a {model_type}, which {remedy}; give a CLIP's folder")
    if config.kind == "mean_pool" and (model_type in _ENCODER_DECODERS or values.get("is_encoder_decoder")):
        raise ValueError(f"model.text_encoder.path: {folder} has a {model_type}; give an encoder such as a BERT or MiniLM")
    return model_type
