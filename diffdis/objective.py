"""The loss of a batch, for each task: L = L_IG + lambda L_ITA [P, Algorithm 1], either half alone, or the CLIP-style control."""

import fnmatch
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from diffdis import schedule
from diffdis.config import ObjectiveConfig
from diffdis.losses import Alignment, alignment_loss, first_of_rank, gather, generation_loss
from diffdis.model import DiffDis, ImageKVCache

NUM_TIMESTEP_BINS = 4  # of t_e, for the logged loss and accuracy: the shortcut shows as a slope over them
# Of the U-Net, these are used by generation alone: the alignment's walk ends behind the middle block.
_UP_PATH = ("unet.up_blocks.*", "unet.conv_norm_out.*", "unet.conv_out.*")
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


class Predicted(NamedTuple):
    """The text queries that a batch's images give, and what gave them."""

    queries: torch.Tensor  # [B, n, D], unit norm
    image: Any  # what DiffDis.encode_condition returns; None for the clip task
    e_t: torch.Tensor  # [B, n, D]


class Cached(NamedTuple):
    """One micro-batch's part of an alignment loss over a whole step: its rows, and the gradients to hand on."""

    to_queries: torch.Tensor  # [b, n, D], of the step's mean loss, times the number of micro-batches
    to_scale: torch.Tensor  # scalar, of the step's mean loss
    loss: torch.Tensor  # [n, b]
    correct: torch.Tensor  # [n, b]


class Objective(nn.Module):
    """The trainable module: a model and its loss. In alignment, the negatives are the texts of all ranks."""

    def __init__(self, model: DiffDis, objective: ObjectiveConfig):
        super().__init__()
        if objective.num_draws > 1 and model.config.query_visibility == "joint":
            raise ValueError("objective.num_draws: more than one draw an image needs model.query_visibility = one_way")
        self.model, self.objective = model, objective

    def freeze(self) -> None:
        """What the task does not use, and what `objective.freeze` names, is left as it is."""
        names = [name for name, _ in self.model.named_parameters()]
        unused = _UP_PATH if self.objective.task in ("alignment", "clip") else ()
        for pattern in self.objective.freeze:
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"objective.freeze: no parameter is called {pattern}; there are {names[0]}, …, {names[-1]}")
        for name, parameter in self.model.named_parameters():
            if any(fnmatch.fnmatch(name, pattern) for pattern in (*unused, *self.objective.freeze)):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError("objective.freeze: nothing is left to train")

    def enable_activation_checkpointing(self) -> None:
        """Of the U-Net, in both passes, and of the alignment head."""
        self.model.unet.enable_gradient_checkpointing()
        if hasattr(self.model, "head"):
            self.model.head.gradient_checkpointing = True

    def forward(self, inputs: Inputs, seed: int, cached: Cached | None = None, only_queries: bool = False) -> Any:
        """inputs as `DiffDisTask.inputs` makes them -> the loss to minimise (scalar) and metrics, each [sum, weight].

        All randomness is drawn from `seed`. With `cached`, the alignment's gradient is what was computed for the whole step.
        `only_queries`: (predicted queries, scale) instead, for that computation. In eval mode, what is computed for the log alone
        is left out (the shuffled-image control): then a pass costs what the model's own work costs.
        """
        draws, task = self.draw(inputs, seed), self.objective.task
        if only_queries:
            return self.predict(inputs, draws).queries, self.model.temperature()
        terms, metrics = [], {}
        weight = torch.tensor(float(len(inputs["latent"])), device=inputs["latent"].device)
        if task in ("joint", "generation"):
            generation = self.generation(inputs, draws)  # [B]
            terms.append(generation.mean())
            metrics["loss_generation"] = torch.stack([generation.detach().sum(), weight])
        if task != "generation":
            alignment, more = self.alignment(inputs, draws, cached)
            terms.append((self.objective.lambda_alignment if task == "joint" else 1.0) * alignment)
            metrics |= more
        loss = torch.stack(terms).sum()
        metrics["loss"] = torch.stack([loss.detach() * weight, weight])
        return loss, metrics

    def draw(self, inputs: Inputs, seed: int) -> Draws:
        """Drawn on the CPU, so that a seed gives the same numbers on every device; and all of it for every task, so that what two
        tasks share is equal."""
        z, e, choice = inputs["latent"], inputs["query"], self.objective
        size, n, num_timesteps = len(z), choice.num_draws, self.model.config.schedule.num_timesteps
        generator = torch.Generator().manual_seed(seed)

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

    def predict(self, inputs: Inputs, draws: Draws) -> Predicted:
        """The image is clean, its text masked; the noised query rides along, but in the clip task."""
        model, e = self.model, inputs["query"]
        if self.objective.task == "clip":
            return Predicted(model.clip_image_embedding(inputs["latent"], inputs["null_states"])[:, None], None, draws.noise_e)
        z = inputs["latent"].masked_fill(draws.drop_image[:, None, None, None], 0.0)
        e_t = model.noise_query(e, draws.noise_e, draws.t_e)
        image = model.encode_condition(z, inputs["null_states"])
        return Predicted(model.predict_query(image, e_t, draws.t_e), image, e_t)

    def alignment(self, inputs: Inputs, draws: Draws, cached: Cached | None = None) -> tuple[torch.Tensor, Metrics]:
        """L_ITA over the global batch, and the metrics of this rank's images."""
        predicted, scale, ids = self.predict(inputs, draws), self.model.temperature(), inputs["caption_ids"]
        if cached is None:
            result = alignment_loss(predicted.queries, inputs["query"], ids, scale)
        else:
            # Its value is the loss of these rows; its gradient that of the step's mean loss.
            surrogate = (predicted.queries * cached.to_queries).sum() + scale * cached.to_scale
            result = Alignment(surrogate - surrogate.detach() + cached.loss.mean(), cached.loss, cached.correct)
        metrics = {"temperature": torch.stack([1 / scale.detach(), torch.ones_like(scale)])}
        if self.objective.task == "clip":
            return result.mean, metrics | _summed(result)
        metrics |= _summed(result) | _binned(result, draws.t_e.T, self.model.config.schedule.num_timesteps)
        if self.training:
            metrics["alignment/retrieval_shuffled_images"] = self._retrieval_of_wrong_images(predicted, draws, inputs)
        return result.mean, metrics

    def cache(self, inputs: Sequence[Inputs], predicted: Sequence[torch.Tensor], scale: torch.Tensor) -> list[Cached]:
        """The alignment loss over all micro-batches of a step on all ranks, from queries [b, n, D] that were predicted before."""
        queries = torch.cat(list(predicted)).detach().requires_grad_()
        leaf = scale.detach().clone().requires_grad_()
        texts, ids = (torch.cat([part[name] for part in inputs]) for name in ("query", "caption_ids"))
        with torch.enable_grad():
            result = alignment_loss(queries, texts, ids, leaf)
            to_queries, to_scale = torch.autograd.grad(result.mean, (queries, leaf))
        size = len(predicted[0])
        return [
            Cached(len(inputs) * to_queries[rows], to_scale, result.loss[:, rows], result.correct[:, rows])
            for rows in (slice(part * size, (part + 1) * size) for part in range(len(inputs)))
        ]

    @torch.no_grad()
    def _retrieval_of_wrong_images(self, predicted: Predicted, draws: Draws, inputs: Inputs) -> torch.Tensor:
        """The control: a quarter of the queries with another one's image. Above chance means that e_t itself is copied.

        An image of the same caption is none of another; so a micro-batch of one sample counts nothing.
        """
        image, e_t = predicted.image, predicted.e_t
        part = slice(0, min(max(2, len(e_t) // 4), len(e_t)))

        def shuffled(x: torch.Tensor) -> torch.Tensor:
            return x[part].roll(1, dims=0)

        if isinstance(image, ImageKVCache):
            sites = [[(shuffled(k), shuffled(v)) for k, v in site] for site in image.sites]
            image = ImageKVCache(sites, [(shuffled(k), shuffled(v)) for k, v in image.head])
        else:
            image = shuffled(image[0]), image[1]
        queries, ids = gather(inputs["query"]), gather(inputs["caption_ids"])
        predicted_queries = self.model.predict_query(image, e_t[part], draws.t_e[part])[:, 0]  # [B / 4, D]
        with torch.autocast(queries.device.type, enabled=False):  # as `alignment_loss`: half precision would tie many texts
            logits = predicted_queries @ queries.T.float()  # [B / 4, all]
        own = torch.arange(len(logits), device=logits.device) + first_of_rank(len(e_t))
        same = ids[own][:, None] == ids[None, :]
        same[torch.arange(len(own)), own] = False
        correct = (logits.masked_fill(same, float("-inf")).argmax(dim=1) == own).float()
        wrong = (ids[own] != ids[own].roll(1)).float()
        return torch.stack([(correct * wrong).sum(), wrong.sum()])


def _summed(result: Alignment) -> Metrics:
    ones = torch.ones_like(result.loss)
    return {
        "loss_alignment": torch.stack([result.loss.sum(), ones.sum()]),
        "alignment/retrieval": torch.stack([result.correct.sum(), ones.sum()]),
    }


def _binned(result: Alignment, t_e: torch.Tensor, num_timesteps: int) -> Metrics:
    """Loss and retrieval accuracy by bins of t_e [n, B]."""
    metrics = {}
    width = -(-num_timesteps // NUM_TIMESTEP_BINS)
    for low in range(0, num_timesteps, width):
        inside = ((t_e >= low) & (t_e < low + width)).float()
        name = f"t{low:03d}-{min(low + width, num_timesteps):03d}"
        metrics[f"alignment/loss_{name}"] = torch.stack([(result.loss * inside).sum(), inside.sum()])
        metrics[f"alignment/retrieval_{name}"] = torch.stack([(result.correct * inside).sum(), inside.sum()])
    return metrics
