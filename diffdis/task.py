"""What a trainer needs of DiffDis: a module that computes L of a batch, parameter groups, previews and an export."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from diffdis import schedule
from diffdis.autoencoder import build_autoencoder, to_latents
from diffdis.config import DiffDisConfig, ObjectiveConfig
from diffdis.encoder import PRECOMPUTED
from diffdis.losses import alignment_loss, gather, generation_loss
from diffdis.model import DiffDis, ImageMemory
from diffdis.pictures import grid
from diffdis.pipeline import DiffDisPipeline
from diffdis.text_encoder import build_text_encoder
from diffdis.warm_start import load_unet

NUM_TIMESTEP_BINS = 4  # of t_e, for the logged loss and accuracy: the shortcut shows as a slope over them
Inputs = dict[str, torch.Tensor]
Metrics = dict[str, torch.Tensor]


class Draws(NamedTuple):
    """All randomness of one step on one rank."""

    t_z: torch.Tensor  # [B]
    noise_z: torch.Tensor  # [B, C, H, W]
    drop_caption: torch.Tensor  # [B] bool
    t_e: torch.Tensor  # [B, n]
    noise_e: torch.Tensor  # [B, n, D]
    drop_image: torch.Tensor  # [B] bool


class JointLoss(nn.Module):
    """L = L_IG + lambda L_ITA of a batch [P, Algorithm 1]; in alignment the negatives are the texts of all ranks."""

    def __init__(self, model: DiffDis, objective: ObjectiveConfig):
        super().__init__()
        if objective.num_draws > 1 and model.config.query_visibility == "joint":
            raise ValueError("objective.num_draws: more than one draw an image needs model.query_visibility = one_way")
        self.model, self.objective = model, objective

    def forward(self, inputs: Inputs, generator: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        """inputs as `DiffDisTask.inputs` makes them -> the loss to minimise (scalar) and metrics, each [sum, weight]."""
        draws = self.draw(inputs, generator)
        generation = self.generation(inputs, draws)  # [B]
        alignment, metrics = self.alignment(inputs, draws)  # scalar
        loss = generation.mean() + self.objective.lambda_alignment * alignment
        weight = loss.new_tensor(float(len(generation)))
        metrics["loss_generation"] = torch.stack([generation.detach().sum(), weight])
        metrics["loss"] = torch.stack([loss.detach() * weight, weight])
        return loss, metrics

    def draw(self, inputs: Inputs, generator: torch.Generator) -> Draws:
        """Drawn on the CPU, so that a seed gives the same numbers on every device."""
        z, e, choice = inputs["latent"], inputs["query"], self.objective
        size, n, num_timesteps = len(z), choice.num_draws, self.model.config.schedule.num_timesteps

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator)

        draws = Draws(
            t_z=torch.randint(num_timesteps, (size,), generator=generator),
            noise_z=torch.randn(z.shape, generator=generator),
            drop_caption=uniform(size) < choice.caption_dropout,
            t_e=torch.randint(choice.query_timestep_min, num_timesteps, (size, n), generator=generator),
            noise_e=torch.randn((size, n, e.shape[-1]), generator=generator),
            drop_image=uniform(size) < self.model.config.image_dropout,
        )
        return Draws(*(d.to(z.device, z.dtype if d.is_floating_point() else None) for d in draws))

    def generation(self, inputs: Inputs, draws: Draws) -> torch.Tensor:
        """L_IG a sample, [B]: the query is left out; some captions are replaced by the empty one."""
        z, null = inputs["latent"], inputs["null_states"]
        abar = self.model.abar[draws.t_z]
        states = torch.where(draws.drop_caption[:, None, None], null, inputs["token_states"])
        target = draws.noise_z
        if self.model.config.schedule.prediction_type == "v_prediction":
            target = schedule.v_target(z, draws.noise_z, abar)
        z_t = schedule.add_noise(z, draws.noise_z, abar)
        return generation_loss(self.model.predict_image(z_t, draws.t_z, states), target)

    def alignment(self, inputs: Inputs, draws: Draws) -> tuple[torch.Tensor, Metrics]:
        """L_ITA over the global batch, and the metrics of this rank's images."""
        model, e = self.model, inputs["query"]
        z = inputs["latent"].masked_fill(draws.drop_image[:, None, None, None], 0.0)
        e_t = model.noise_query(e, draws.noise_e, draws.t_e)
        image = model.see(z, inputs["null_states"])
        predicted = model.predict_query(image, e_t, draws.t_e)  # [B, n, D]
        queries, ids, scale = gather(e), gather(inputs["caption_ids"]), model.temperature()
        result = alignment_loss(gather(predicted), queries, ids, scale)
        mine = slice(self._rank_offset(len(e), len(queries)), None)
        local = [x[:, mine][:, : len(e)].detach() for x in result]  # [n, B]
        metrics = _binned(local[0], local[1], draws.t_e.T, model.config.schedule.num_timesteps)
        with torch.no_grad():
            wrong = self._retrieval_of_wrong_images(image, e_t, draws, queries, ids, mine.start)
        metrics["alignment/retrieval_shuffled_images"] = wrong
        metrics["temperature"] = torch.stack([1 / scale.detach(), torch.ones_like(scale)])
        return result.loss.mean(), metrics

    def _rank_offset(self, local: int, total: int) -> int:
        return 0 if local == total else torch.distributed.get_rank() * local

    def _retrieval_of_wrong_images(self, image, e_t, draws: Draws, queries, ids, offset: int) -> torch.Tensor:
        """The control: a quarter of the queries with another one's image. Above chance means that e_t itself is copied."""
        count = max(2, len(e_t) // 4)
        part = slice(0, min(count, len(e_t)))

        def shuffled(x: torch.Tensor) -> torch.Tensor:
            return x[part].roll(1, dims=0)

        if isinstance(image, ImageMemory):
            sites = [[(shuffled(k), shuffled(v)) for k, v in site] for site in image.sites]
            image = ImageMemory(sites, [(shuffled(k), shuffled(v)) for k, v in image.head])
        else:
            image = shuffled(image[0]), image[1]
        predicted = self.model.predict_query(image, e_t[part], draws.t_e[part])[:, 0]  # [B / 4, D]
        logits = predicted @ queries.T
        own = torch.arange(offset, offset + len(predicted), device=logits.device)
        same = ids[own][:, None] == ids[None, :]
        same[torch.arange(len(own)), own] = False
        correct = (logits.masked_fill(same, float("-inf")).argmax(dim=1) == own).float()
        return torch.stack([correct.sum(), correct.new_tensor(float(len(correct)))])


def _binned(loss: torch.Tensor, correct: torch.Tensor, t_e: torch.Tensor, num_timesteps: int) -> Metrics:
    """Loss and retrieval accuracy in all and by bins of t_e; all arguments [n, B]."""
    ones = torch.ones_like(loss)
    metrics = {
        "loss_alignment": torch.stack([loss.sum(), ones.sum()]),
        "alignment/retrieval": torch.stack([correct.sum(), ones.sum()]),
    }
    width = -(-num_timesteps // NUM_TIMESTEP_BINS)
    for low in range(0, num_timesteps, width):
        inside = ((t_e >= low) & (t_e < low + width)).float()
        name = f"t{low:03d}-{min(low + width, num_timesteps):03d}"
        metrics[f"alignment/loss_{name}"] = torch.stack([(loss * inside).sum(), inside.sum()])
        metrics[f"alignment/retrieval_{name}"] = torch.stack([(correct * inside).sum(), inside.sum()])
    return metrics


class DiffDisTask:
    """Satisfies the platform's Task by shape."""

    def __init__(self, config: DiffDisConfig, objective: ObjectiveConfig, preview_captions: tuple[str, ...] = ()):
        self.config, self.objective, self.preview_captions = config, objective, preview_captions
        self.autoencoder = build_autoencoder(config.autoencoder)
        self.text_encoder = build_text_encoder(config.text_encoder)
        model = DiffDis(config, objective.temperature)
        if config.warm_start:
            load_unet(model.unet, config.warm_start)
        self.module = JointLoss(model, objective)
        self._null_states: torch.Tensor | None = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The U-Net's rate and the new parameters' rate; no decay on norms, biases and the temperature."""
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.module.named_parameters():
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

    def pipeline(self, state_dict: Mapping[str, torch.Tensor]) -> DiffDisPipeline:
        """The model with a trainer's weights, apart from the module in training (which may be sharded)."""
        model = DiffDis(self.config)
        model.load_state_dict({name.removeprefix("model."): value for name, value in state_dict.items()})
        return DiffDisPipeline(self.config, model.eval(), self.autoencoder, self.text_encoder)

    def preview(self, state_dict: Mapping[str, torch.Tensor]) -> bytes:
        """A PNG grid of `preview_captions`, always from the same noise."""
        pipeline = self.pipeline(state_dict)
        if self._null_states is not None:
            pipeline.to(self._null_states.device)
        images = pipeline.generate(self.preview_captions, num_steps=20, guidance_scale=3.0)
        buffer = io.BytesIO()
        grid(images, self.preview_captions).save(buffer, format="PNG")
        return buffer.getvalue()

    def save_pretrained(self, state_dict: Mapping[str, torch.Tensor], folder: Path) -> None:
        self.pipeline(state_dict).save_pretrained(folder)


def _caption_id(caption: str) -> int:
    """Equal on every rank for equal captions: a 63-bit digest."""
    digest = hashlib.blake2b(caption.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
