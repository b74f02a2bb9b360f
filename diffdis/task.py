"""What a trainer needs of DiffDis: a module that computes the loss of a batch, parameter groups, scores, previews, an export."""

import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffdis.autoencoder import build_autoencoder, to_latents
from diffdis.config import DiffDisConfig, ObjectiveConfig
from diffdis.encoder import PRECOMPUTED
from diffdis.metrics.retrieval import recall_at_k
from diffdis.metrics.zero_shot import ZeroShotScores
from diffdis.model import DiffDis
from diffdis.objective import Inputs, Objective
from diffdis.pictures import grid
from diffdis.pipeline import DiffDisPipeline
from diffdis.text_encoder import build_text_encoder
from diffdis.warm_start import load, resolved


class DiffDisTask:
    """Satisfies the platform's Task by shape."""

    def __init__(self, config: DiffDisConfig, objective: ObjectiveConfig, preview_captions: tuple[str, ...] = ()):
        self.config = dataclasses.replace(resolved(config), trained_for=objective.task)
        self.objective, self.preview_captions = objective, preview_captions
        self.autoencoder = build_autoencoder(self.config.autoencoder)
        self.text_encoder = build_text_encoder(self.config.text_encoder)
        model = DiffDis(self.config, objective.temperature)
        self.warm_start = load(model, config.warm_start) if config.warm_start else None
        self.module = Objective(model, objective)
        self.module.freeze()
        self._null_states: torch.Tensor | None = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The U-Net's rate and the new parameters' rate; no decay on norms, biases and the temperature."""
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                part = "unet" if name.startswith("model.unet.") else "new"
                groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
        rates = {"unet": self.objective.lr_unet, "new": self.objective.lr_new}
        return [
            {
                "name": part if decayed else f"{part}_no_decay",
                "params": parameters,
                "lr": rates[part],
                "weight_decay": self.objective.weight_decay if decayed else 0.0,
            }
            for (part, decayed), parameters in groups.items()
        ]

    def enable_activation_checkpointing(self) -> None:
        """Of the U-Net, in both passes, and of the alignment head."""
        self.module.enable_activation_checkpointing()

    @torch.no_grad()
    def inputs(self, batch: Any, device: torch.device) -> Inputs:
        """A batch, of images [B, H, W, 3] uint8 or precomputed -> latent, token_states, query, caption_ids [B] and
        null_states [1, L, D_c]."""
        if self._null_states is None:
            self.autoencoder.to(device)
            self.text_encoder.to(device)
            self._null_states = self.text_encoder.encode([""], device)[0]
        if "latent" in batch.tensors:
            encoded = {name: torch.from_numpy(batch.tensors[name]).to(device).float() for name in PRECOMPUTED}
        else:
            states, query = self.text_encoder.encode(batch.captions, device)
            latent = to_latents(self.autoencoder, batch.tensors["image"], device)
            encoded = dict(zip(PRECOMPUTED, (latent, states, query), strict=True))
        return encoded | {
            "caption_ids": torch.tensor([_caption_id(c) for c in batch.captions], device=device),
            "null_states": self._null_states,
        }

    def precompute_step_loss(self, inputs: Sequence[Inputs], seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """With `objective.negatives` = step, the alignment's gradient over all micro-batches of the step (gradient caching)."""
        if self.objective.negatives == "micro_batch" or self.objective.task == "generation" or len(inputs) == 1:
            return [{} for _ in inputs]
        with torch.no_grad():
            found = [self.module(part, seed, only_queries=True) for part, seed in zip(inputs, seeds, strict=True)]
        cached = self.module.cache(inputs, [predicted for predicted, _ in found], found[0][1])
        return [{"cached": part} for part in cached]

    # --- scores and previews: every rank calls them with its share, for under ZeRO 3 the weights are shared out ---------------

    def embed_heldout(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Each image's text query from pure noise in one step, its true one [B, D] and its caption's number [B]."""
        if self.objective.task == "generation":
            return {}
        latent = inputs["latent"]
        keys = [hashlib.sha256(part.float().cpu().numpy().tobytes()).hexdigest() for part in latent]
        predicted = self._live().embed_latent(latent, keys, num_steps=1)
        return {"predicted": predicted, "query": inputs["query"], "caption_ids": inputs["caption_ids"]}

    def score(self, rows: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Zero-shot accuracy over the distinct captions, and retrieval both ways among all pairs; rows of `embed_heldout`."""
        if not rows:
            return {}
        predicted, query, ids = rows["predicted"], rows["query"], rows["caption_ids"]
        _, labels = ids.unique(return_inverse=True)
        classes = torch.stack([query[labels == label][0] for label in range(int(labels.max()) + 1)])  # [num_classes, D]
        similarity, right = predicted @ query.T, ids[:, None] == ids[None, :]
        # Not finite after a divergence, which must not stop the training here.
        images, texts = (rows.float().nan_to_num().cpu().numpy() for rows in (predicted, classes))
        zero_shot = ZeroShotScores.from_embeddings(images, texts, labels.cpu().numpy())
        return {
            "heldout/acc1": zero_shot.accuracy(),
            "heldout/acc5": zero_shot.accuracy(5),
            "heldout/image_to_text_r1": recall_at_k(similarity, right),
            "heldout/text_to_image_r1": recall_at_k(similarity.T, right),
        }

    def preview(self, rank: int, world_size: int) -> dict[int, np.ndarray]:
        """This rank's share of images of `preview_captions`, by their place: [H, W, 3] uint8, always from the same noise.

        Empty on every rank for a task that cannot generate.
        """
        if self.objective.task in ("alignment", "clip") or not self.preview_captions:
            return {}
        places = range(rank, len(self.preview_captions), world_size)
        # A rank without a caption draws the first one as well, so that all ranks run the U-Net equally often.
        drawn = list(places) or [0]
        captions = [self.preview_captions[place] for place in drawn]
        images = self._live().generate(captions, num_steps=20, guidance_scale=3.0, places=drawn)
        return {place: np.asarray(image) for place, image in zip(places, images, strict=False)}

    def preview_page(self, images: Mapping[int, np.ndarray]) -> bytes:
        """All images of `preview`, at least one, as a PNG grid with their captions."""
        places = sorted(images)
        page = grid([Image.fromarray(images[place]) for place in places], [self.preview_captions[place] for place in places])
        buffer = io.BytesIO()
        page.save(buffer, format="PNG")
        return buffer.getvalue()

    def _live(self) -> DiffDisPipeline:
        """On the weights in training, and their device; it leaves the model in eval mode."""
        device = self.module.model.abar.device
        self.autoencoder.to(device)
        self.text_encoder.to(device)
        return DiffDisPipeline(self.config, self.module.model, self.autoencoder, self.text_encoder)

    # --- what comes out --------------------------------------------------------------------------------------------------

    def pipeline(self, state_dict: Mapping[str, torch.Tensor]) -> DiffDisPipeline:
        """The model with a trainer's weights, apart from the module in training (which may be sharded)."""
        model = DiffDis(self.config)
        model.load_state_dict({name.removeprefix("model."): value for name, value in state_dict.items()})
        return DiffDisPipeline(self.config, model.eval(), self.autoencoder, self.text_encoder)

    def save_pretrained(self, state_dict: Mapping[str, torch.Tensor], folder: Path) -> None:
        """A folder for `DiffDisPipeline.from_pretrained`; its components open in diffusers and transformers."""
        self.pipeline(state_dict).save_pretrained(folder)

    def describe(self) -> dict[str, Any]:
        """Parameters by part, those that are trained, and what the warm start loaded, left new and ignored."""
        parts: dict[str, dict[str, int]] = {}
        for name, parameter in self.module.model.named_parameters():
            count = parts.setdefault(name.partition(".")[0], {"trained": 0, "frozen": 0})
            # Under ZeRO 3 a rank's parameter is empty, and says how large it is.
            count["trained" if parameter.requires_grad else "frozen"] += getattr(parameter, "ds_numel", parameter.numel())
        described: dict[str, Any] = {"task": self.objective.task, "parameters": parts}
        return described | ({"warm_start": self.warm_start.summary()} if self.warm_start else {})


def _caption_id(caption: str) -> int:
    """Equal on every rank for equal captions: a 63-bit digest."""
    digest = hashlib.blake2b(caption.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
