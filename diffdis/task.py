"""The Task of DiffDis for a trainer: loss, parameter groups, scores, previews and export."""

import dataclasses
import fnmatch
import hashlib
import io
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from diffdis import schedule
from diffdis.autoencoder import KLAutoencoder, build_autoencoder, to_latents
from diffdis.config import DiffDisConfig, ObjectiveConfig
from diffdis.encoder import PRECOMPUTED, move_encoders
from diffdis.export_folder import Training, opens_in_diffusers
from diffdis.feature_networks import PooledFeatures, build_feature_network
from diffdis.image_branch import compile_blocks
from diffdis.image_grid import image_grid
from diffdis.lora import LORA_FOLDER, add_adapters, merge_adapters, save_adapters
from diffdis.metrics.retrieval import recall_at_k
from diffdis.metrics.zero_shot import ZeroShotScores
from diffdis.model import MAX_LOG_SCALE, DiffDis
from diffdis.objective import Inputs, Objective
from diffdis.pipeline import DiffDisPipeline
from diffdis.pretrained import named_field
from diffdis.schedule import lambda_factor
from diffdis.text_encoder import TextEncoder, build_text_encoder
from diffdis.transfer import copy_to
from diffdis.warm_start import load_warm_start, resolve_pretrained

logger = logging.getLogger(__name__)

LEAK_SAMPLES = 4096  # of (t_e, noise), over all texts
MAX_TEXTS = 1024
PREVIEW_STEPS = 20
TOLERATED_LEAK = 0.10  # above chance: more is warned about
MAX_DIFFERENCE = 0.02  # of pixels in [0, 1] between two libraries; 0.002 is usual in float32


class DiffDisTask:
    """Implements the platform's `Task` protocol, without importing the platform."""

    def __init__(self, config: DiffDisConfig, objective: ObjectiveConfig, preview_captions: tuple[str, ...] = ()):
        self.config = dataclasses.replace(resolve_pretrained(config), trained_for=objective.task)
        self.objective, self.preview_captions = objective, preview_captions
        with named_field("model.autoencoder.path"):
            self.autoencoder = build_autoencoder(self.config.autoencoder)
        with named_field("model.text_encoder.path"):
            self.text_encoder = build_text_encoder(self.config.text_encoder)
        self._image_network: PooledFeatures | None = None
        if objective.repa_weight:
            with named_field("objective.repa_network"):
                self._image_network = build_feature_network(
                    objective.repa_network, device="cuda" if torch.cuda.is_available() else "cpu"
                )
        model = DiffDis(self.config, objective.temperature)
        with named_field("model.warm_start"):
            self.warm_start = load_warm_start(model, config.warm_start) if config.warm_start else None
        self.module = Objective(model, objective, self._image_network.width if self._image_network else 0)
        self.module.freeze()
        self._null_states: torch.Tensor | None = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW groups: one rate for the U-Net, one for new parameters; no decay for norms, biases and the temperature.

        The temperature has a group of its own with `max_value`, to which the optimizer limits its parameters after each update.
        It and the parameters of the alignment loss stay float32. `objective.lr_overrides` and `weight_decay_overrides` apply to
        all of them.
        """
        objective = self.objective
        groups: dict[tuple[str, float, float], dict[str, Any]] = {}
        for name, parameter in self.module.trained_parameters().items():
            part, rate = ("unet", objective.lr_unet) if name.startswith("unet.") else ("new", objective.lr_new)
            decay, options = (objective.weight_decay if parameter.ndim > 1 else 0.0), {}
            group = part if parameter.ndim > 1 else f"{part}_no_decay"
            if name.startswith("temperature."):
                group, options = "temperature", {"max_value": MAX_LOG_SCALE, "float32": True}
            elif name.startswith("alignment."):
                group, options = f"loss_{group}", {"float32": True}
            if pattern := _last_match(objective.lr_overrides, name):
                rate, group = objective.lr_overrides[pattern], f"{group}_{re.sub('[^a-zA-Z0-9_.]', '', pattern).strip('.')}"
            if pattern := _last_match(objective.weight_decay_overrides, name):
                decay = objective.weight_decay_overrides[pattern]
            key = group, rate, decay
            groups.setdefault(key, {"name": group, "params": [], "lr": rate, "weight_decay": decay} | options)
            groups[key]["params"].append(parameter)
        return list(groups.values())

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.module.enable_activation_checkpointing()

    def compile(self) -> None:
        """Compile the blocks of the network and of the encoder of images with torch.compile at their next call."""
        compile_blocks(self.module.model)
        if isinstance(self.autoencoder, KLAutoencoder):
            compile_blocks(self.autoencoder.vae.encoder)

    @torch.no_grad()
    def inputs(self, batch: Any, device: torch.device) -> Inputs:
        """Convert a batch, of images [B, H, W, 3] uint8 or precomputed, to the inputs of `module`.

        Returns latent [B, C, H, W], token_states [B, L, D_c], query [B, D], caption_ids [B] and null_states [1, L, D_c]; with
        `objective.repa_weight` also image_features [B, d].
        """
        if self._null_states is None:
            move_encoders(self.config, device, self.autoencoder, self.text_encoder)
            self._null_states = self.text_encoder.encode([""], device)[0]
        if "latent" in batch.tensors:
            copies = copy_to(device, [batch.tensors[name] for name in PRECOMPUTED])
            encoded = {name: copy.float() for name, copy in zip(PRECOMPUTED, copies, strict=True)}
        else:
            states, query = self.text_encoder.encode(batch.captions, device)
            latent = to_latents(self.autoencoder, batch.tensors["image"], device)
            encoded = dict(zip(PRECOMPUTED, (latent, states, query), strict=True))
        if self._image_network:
            if "image" not in batch.tensors:
                raise ValueError("objective.repa_weight: precomputed data has no images; use 0, or data with images")
            encoded["image_features"] = self._image_network.embed(batch.tensors["image"]).to(device)
        return encoded | {
            "caption_ids": copy_to(device, [np.array([schedule.text_digest(c) for c in batch.captions], dtype=np.int64)])[0],
            "null_states": self._null_states,
        }

    def precompute_step_loss(
        self, inputs: Sequence[Inputs], seeds: Sequence[int], control: bool = False, progress: float = 0.0
    ) -> Sequence[Mapping[str, Any]]:
        """Return lambda's factor at the step and, with `objective.negatives` = step, the alignment's gradient over all
        micro-batches (gradient caching)."""
        arguments = {"control": control, "lambda_factor": lambda_factor(self.objective.lambda_schedule, progress)}
        if self.objective.negatives == "micro_batch" or self.objective.task == "generation" or len(inputs) == 1:
            return [arguments for _ in inputs]
        with torch.no_grad():
            predictions = [self.module.predict_queries(part, seed) for part, seed in zip(inputs, seeds, strict=True)]
        caches = self.module.build_grad_cache(inputs, [queries for queries, _ in predictions], predictions[0][1])
        return [arguments | {"grad_cache": cache} for cache in caches]

    # --- scores and previews: every rank calls them, because under ZeRO 3 the weights are sharded ----------------------------

    def embed_heldout(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Return the text query of each image, denoised in one step, its true one [B, D] and the id of its caption [B]."""
        if self.objective.task == "generation":
            return {}
        latent = inputs["latent"]
        keys = [hashlib.sha256(part.float().cpu().numpy().tobytes()).hexdigest() for part in latent]
        predicted = self._live_pipeline().embed_latent(latent, keys, num_steps=1)
        return {"predicted": predicted, "query": inputs["query"], "caption_ids": inputs["caption_ids"]}

    def score(self, rows: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return zero-shot accuracy over the distinct captions and retrieval both ways, from all rows of `embed_heldout`."""
        if not rows:
            return {}
        predicted, query, ids = rows["predicted"], rows["query"], rows["caption_ids"]
        _, labels = ids.unique(return_inverse=True)
        classes = torch.stack([query[labels == label][0] for label in range(int(labels.max()) + 1)])  # [num_classes, D]
        similarity, is_match = predicted @ query.T, ids[:, None] == ids[None, :]
        # Not finite after a divergence, which must not stop the training here.
        images, texts = (rows.float().nan_to_num().cpu().numpy() for rows in (predicted, classes))
        zero_shot = ZeroShotScores.from_embeddings(images, texts, labels.cpu().numpy())
        return {
            "heldout/acc1": zero_shot.accuracy(),
            "heldout/acc5": zero_shot.accuracy(5),
            "heldout/image_to_text_r1": recall_at_k(similarity, is_match),
            "heldout/text_to_image_r1": recall_at_k(similarity.T, is_match),
        }

    def preview(self, rank: int, world_size: int) -> dict[int, np.ndarray]:
        """Generate this rank's part of the preview images, {index of the caption: [H, W, 3] uint8}, always from the same noise.

        Empty on every rank for a task that cannot generate.
        """
        if self.objective.task in ("alignment", "clip") or not self.preview_captions:
            return {}
        indices = range(rank, len(self.preview_captions), world_size)
        # A rank without a caption generates the first one, too, so that all ranks run the U-Net equally often.
        generated = list(indices) or [0]
        captions = [self.preview_captions[index] for index in generated]
        images = self._live_pipeline().generate(
            captions, num_inference_steps=PREVIEW_STEPS, guidance_scale=3.0, indices=generated
        )
        return {index: np.asarray(image) for index, image in zip(indices, images, strict=False)}

    def preview_page(self, images: Mapping[int, np.ndarray]) -> bytes:
        """Return a PNG grid of at least one preview image with its caption."""
        indices = sorted(images)
        page = image_grid([Image.fromarray(images[i]) for i in indices], [self.preview_captions[i] for i in indices])
        buffer = io.BytesIO()
        page.save(buffer, format="PNG")
        return buffer.getvalue()

    def _live_pipeline(self) -> DiffDisPipeline:
        """Return a pipeline on the weights in training. It sets the model to eval mode."""
        device = self.module.model.alphas_cumprod.device
        move_encoders(self.config, device, self.autoencoder, self.text_encoder)
        return _quiet(DiffDisPipeline(self.config, self.module.model, self.autoencoder, self.text_encoder))

    # --- results ---------------------------------------------------------------------------------------------------------

    def pipeline(self, state_dict: Mapping[str, torch.Tensor]) -> DiffDisPipeline:
        """Return a pipeline on the CPU with the given weights of `module`. Adapters are merged into the U-Net's weights.

        It shares nothing with the training, whose module may be sharded, and whose encoders may be on an accelerator in half
        precision: they are loaded again.
        """
        model = DiffDis(self.config)
        if self.objective.lora_rank:
            add_adapters(model.unet, self.objective.lora_rank)
        # Parameters of the alignment loss itself are not part of the model.
        model.load_state_dict(_below("model.", state_dict))
        if self.objective.lora_rank:
            merge_adapters(model.unet)
        autoencoder, text_encoder = build_autoencoder(self.config.autoencoder), build_text_encoder(self.config.text_encoder)
        return _quiet(DiffDisPipeline(self.config, model.eval(), autoencoder, text_encoder))

    def save_pretrained(
        self, state_dict: Mapping[str, torch.Tensor], folder: Path, training: Mapping[str, Any] | None = None
    ) -> Sequence[str]:
        """Write a folder for `DiffDisPipeline.from_pretrained`, whose components open in diffusers and transformers.

        With `objective.lora_rank`, `lora/` in it has the adapters for the model from which the training started.

        Args:
            state_dict: weights of `module`.
            folder: the folder.
            training: fields of `export_folder.Training`, for the model card.

        Returns:
            What the folder was opened with as a check.

        Raises:
            ValueError: a library cannot use the folder, or generates another image from it than we do.
        """
        pipeline = self.pipeline(state_dict)
        pipeline.save_pretrained(folder, Training(**training) if training else None)
        if self.objective.lora_rank:
            save_adapters(_below("model.unet.", state_dict), folder / LORA_FOLDER)
        try:
            return check_export(pipeline, folder)
        except (RuntimeError, OSError, TypeError) as error:  # of a library that opens the folder
            raise ValueError(f"{folder}: the export cannot be used ({' '.join(str(error).split())[:300]})") from error

    def describe(self, captions: Sequence[str] = ()) -> dict[str, Any]:
        """Return the parameter counts by part, the tensors that the warm start loaded, left new and ignored, and `query_leak`
        over `captions`."""
        parts: dict[str, dict[str, int]] = {}
        for name, parameter in self.module.model.named_parameters():
            count = parts.setdefault(name.partition(".")[0], {"trained": 0, "frozen": 0})
            # Under ZeRO 3 a parameter is empty; `ds_numel` is its full size.
            count["trained" if parameter.requires_grad else "frozen"] += getattr(parameter, "ds_numel", parameter.numel())
        described: dict[str, Any] = {"task": self.objective.task, "parameters": parts}
        if self.warm_start:
            described["warm_start"] = self.warm_start.summary()
        return described | describe_captions(self.config, self.objective, captions, self.text_encoder)


def check_export(pipeline: DiffDisPipeline, folder: Path) -> list[str]:
    """Open an exported folder with every library that reads it, and return their names.

    diffusers' pipeline, which may open and then fail when it is called, generates a small image in one step.

    Raises ValueError if its image differs from that of `pipeline`.
    """
    DiffDisPipeline.from_pretrained(folder)
    if not opens_in_diffusers(pipeline.config):
        UNet2DConditionModel.from_pretrained(folder / "unet")
        return ["DiffDisPipeline", "diffusers' UNet2DConditionModel"]
    from diffusers import StableDiffusionPipeline  # its import takes seconds

    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    unet = pipeline.config.unet
    factor = pipeline.config.image_size // unet.sample_size  # pixels per latent
    pixels = math.lcm(factor * 2 ** (len(unet.block_out_channels) - 1), 8)  # the smallest image that both take
    side = pixels // factor
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, unet.in_channels, side, side), generator=generator)
    settings: dict[str, Any] = {"num_inference_steps": 1, "height": pixels, "width": pixels, "output_type": "np"}
    ours = pipeline.generate("a red heart", latents=latents, **settings)
    theirs = stock("a red heart", latents=latents, **settings).images
    if (difference := float(abs(ours - theirs).max())) > MAX_DIFFERENCE:
        raise ValueError(
            f"{folder}: diffusers' StableDiffusionPipeline generates another image (they differ by {difference:.2g})"
        )
    return ["DiffDisPipeline", "diffusers' StableDiffusionPipeline"]


def _below(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _quiet(pipeline: DiffDisPipeline) -> DiffDisPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _last_match(patterns: Iterable[str], name: str) -> str:
    """Return the last pattern that matches a parameter's name; empty if none does."""
    return next((pattern for pattern in reversed(list(patterns)) if fnmatch.fnmatch(name, pattern)), "")


# --- The shortcut: a noised text query may give its text away, so that it can be retrieved without any image -------------------


class QueryLeak(NamedTuple):
    """Result of `query_leak`."""

    answerable: float  # fraction of samples (t_e, noise) whose text is the nearest of all texts to e_t
    chance: float  # 1 / number of texts
    num_texts: int

    def summary(self) -> dict[str, Any]:
        """Return the fields, rounded for a description of the run."""
        return {"answerable": round(self.answerable, 3), "chance": round(self.chance, 4), "num_texts": self.num_texts}


def query_leak(queries: torch.Tensor, config: DiffDisConfig, objective: ObjectiveConfig) -> QueryLeak:
    """Measure how often argmax_j <e_t, e_j> finds the right text without any image, at the t_e that training samples.

    Logs a warning if that is more than `TOLERATED_LEAK` above chance. A trained model does better than this bound where texts
    leave directions free that noise cannot reach, and worse where it has not learned to copy.

    Args:
        queries: text queries [N, D], unit norm, of distinct texts; of more than `MAX_TEXTS`, the first ones count.
        config: the model's configuration, for its schedule and query_snr.
        objective: the objective's configuration, for query_timestep_min.
    """
    e = queries[:MAX_TEXTS].detach().float().cpu()
    generator = torch.Generator().manual_seed(0)
    abar = schedule.alphas_cumprod(config.schedule)
    num_correct = num_samples = 0
    while num_samples < LEAK_SAMPLES:
        t = torch.randint(objective.query_timestep_min, config.schedule.num_timesteps, (len(e),), generator=generator)
        noise = torch.randn(e.shape, generator=generator)
        e_t = schedule.add_noise(e, noise, abar[t], config.schedule.query_snr)
        num_correct += int(((e_t @ e.T).argmax(dim=1) == torch.arange(len(e))).sum())
        num_samples += len(e)
    leak = QueryLeak(num_correct / num_samples, 1 / len(e), len(e))
    if leak.answerable > leak.chance + TOLERATED_LEAK:
        logger.warning(
            "model.schedule.query_snr: %.0f %% of the noised text queries can be answered without the image (chance %.1f %% of "
            "%d texts); if alignment/retrieval_shuffled_images rises above chance, the model copies them: use a smaller "
            "query_snr or a larger objective.query_timestep_min",
            *(100 * leak.answerable, 100 * leak.chance, leak.num_texts),
        )
    return leak


def describe_captions(
    config: DiffDisConfig, objective: ObjectiveConfig, captions: Sequence[str], text_encoder: TextEncoder | None = None
) -> dict[str, Any]:
    """Return the `query_leak` of the distinct captions, for the description of a run.

    Empty for fewer than two texts, and for a task without noised queries. Builds the text encoder if none is given.
    """
    distinct = list(dict.fromkeys(captions))[:MAX_TEXTS]
    if objective.task in ("generation", "clip") or len(distinct) < 2:
        return {}
    if text_encoder is None:
        config = resolve_pretrained(config)
        text_encoder = build_text_encoder(config.text_encoder)
    device = next(text_encoder.model.parameters()).device
    return {"query_leak": query_leak(text_encoder.encode(distinct, device)[1], config, objective).summary()}
