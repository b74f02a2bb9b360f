"""The training loss of a batch: L = L_IG + lambda L_ITA [P, Algorithm 1], either half alone, or the CLIP-style control."""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from diffdis import schedule
from diffdis.config import ObjectiveConfig
from diffdis.lora import add_adapters
from diffdis.losses import AlignmentResult, LossParameter, build_alignment_loss, gather_texts, generation_loss, rank_offset
from diffdis.model import DiffDis, ImageKVCache
from diffdis.schedule import LOSS_WEIGHTINGS, TIMESTEP_SAMPLINGS, uniform_timesteps
from diffdis.transfer import copy_to

NUM_TIMESTEP_BINS = 4  # of t_z and t_e, for the logged losses and accuracy: the shortcut shows as a slope over those of t_e
# Only generation uses these parts of the U-Net: the alignment pass ends behind the middle block.
_UP_PATH = ("unet.up_blocks.*", "unet.conv_norm_out.*", "unet.conv_out.*")
Inputs = dict[str, torch.Tensor]
Metrics = dict[str, torch.Tensor]  # name -> [2]: weighted sum and weight


class StepNoise(NamedTuple):
    """All random numbers of one micro-batch on one rank. B images, n query noise samples per image."""

    timesteps: torch.Tensor  # [B]: t_z
    noise: torch.Tensor  # [B, C, H, W]
    drop_caption: torch.Tensor  # [B] bool
    query_timesteps: torch.Tensor  # [B, n]: t_e
    query_noise: torch.Tensor  # [B, n, D]
    drop_image: torch.Tensor  # [B] bool


class ImagePrediction(NamedTuple):
    """What the U-Net predicted from the noisy latents of a batch: their noise, v or the clean latents."""

    predicted: torch.Tensor  # [B, C, H, W]
    target: torch.Tensor  # [B, C, H, W]
    abar: torch.Tensor  # [B]


class QueryPrediction(NamedTuple):
    """Text queries predicted from the images of a batch, and the inputs of the prediction."""

    queries: torch.Tensor  # [B, n, D], unit norm
    condition: Any  # the ImageCondition; None for the clip task
    noisy_queries: torch.Tensor  # [B, n, D]


class GradCache(NamedTuple):
    """Alignment loss of one micro-batch's rows, and its gradients, computed over all micro-batches of a step."""

    queries_grad: torch.Tensor  # [b, n, D]: gradient of the step's mean loss, times the number of micro-batches
    scale_grad: torch.Tensor  # scalar: gradient of the step's mean loss
    parameter_grads: tuple[torch.Tensor, ...]  # for the parameters of the alignment loss; InfoNCE has none
    loss: torch.Tensor  # [n, b]
    correct: torch.Tensor  # [n, b]
    texts: tuple[torch.Tensor, torch.Tensor] | None  # of the micro-batch on all ranks: queries [B, D] and caption ids [B]


class _Constants(NamedTuple):
    """Tensors that no step changes. They are not buffers, which `to(dtype)` would convert."""

    timestep_bins: torch.Tensor  # [bins, T]: 1 where a timestep is in a bin
    channel_weights: torch.Tensor  # [C, 1, 1], their mean is 1

    @classmethod
    def of(cls, num_timesteps: int, channel_weights: Sequence[float]) -> "_Constants":
        bins = torch.tensor([[float(t in part) for t in range(num_timesteps)] for part in _timestep_bins(num_timesteps)])
        weights = torch.tensor(channel_weights or [1.0])
        return cls(bins, (weights / weights.mean())[:, None, None])


class Objective(nn.Module):
    """The trainable module: a model and its loss. In alignment, the negatives are the texts of all ranks."""

    def __init__(self, model: DiffDis, objective: ObjectiveConfig):
        """Raises ValueError for a combination of fields that cannot work."""
        super().__init__()
        if objective.num_draws > 1 and model.config.query_visibility == "joint":
            raise ValueError(
                f"objective.num_draws: {objective.num_draws} query noise samples per image need the one-way mask; "
                "set model.query_visibility = one_way"
            )
        channels, weights = model.config.unet.in_channels, objective.channel_weights
        if weights and len(weights) != channels:
            raise ValueError(
                f"objective.channel_weights: {len(weights)} weights, but latents have {channels} channels; give one for each"
            )
        for name, known in (("generation_weighting", ("none", *LOSS_WEIGHTINGS)), ("timestep_sampling", TIMESTEP_SAMPLINGS)):
            if (value := getattr(objective, name)) not in known:
                raise ValueError(f"objective.{name}: {value!r} is unknown; use {', '.join(known)}")
        if objective.lora_rank:
            add_adapters(model.unet, objective.lora_rank)
        self.model, self.objective = model, objective
        self.alignment = build_alignment_loss(objective.alignment_loss)
        self._constants = _Constants.of(model.config.schedule.num_timesteps, weights)

    def freeze(self) -> None:
        """Freeze the parameters that the task does not use and those that `objective.freeze` names.

        Raises ValueError if nothing is left to train, or if a pattern of a field of the objective matches no parameter.
        """
        names = [name for name, _ in self.model.named_parameters()]
        unused = _UP_PATH if self.objective.task in ("alignment", "clip") else ()
        _check_patterns("objective.freeze: no parameter", self.objective.freeze, names)
        for name, parameter in self.model.named_parameters():
            if any(fnmatch.fnmatch(name, pattern) for pattern in (*unused, *self.objective.freeze)):
                parameter.requires_grad_(False)
        trained = list(self.trained_parameters())
        if not trained:
            raise ValueError(f"objective.freeze: nothing is left to train ({', '.join(self.objective.freeze)}); freeze less")
        _check_patterns("objective.lr_overrides: no trained parameter", self.objective.lr_overrides, trained)
        _check_patterns("objective.weight_decay_overrides: no trained parameter", self.objective.weight_decay_overrides, trained)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in patterns: those in the model, and `alignment.<name>` of the loss."""
        return {name.removeprefix("model."): p for name, p in self.named_parameters() if p.requires_grad}

    def enable_activation_checkpointing(self) -> None:
        """Recompute the activations of the U-Net, in both passes, and of the alignment head in the backward pass."""
        self.model.unet.enable_gradient_checkpointing()
        if hasattr(self.model, "head"):
            self.model.head.gradient_checkpointing = True

    def forward(
        self,
        inputs: Inputs,
        seed: int,
        grad_cache: GradCache | None = None,
        control: bool = False,
        run: Callable[..., Any] | None = None,
    ) -> Any:
        """Return the loss of a micro-batch (scalar) and its metrics, each [sum, weight].

        Args:
            inputs: the result of `DiffDisTask.inputs`.
            seed: determines all random numbers.
            grad_cache: the alignment's gradient, if it was computed for the whole step.
            control: also compute the shuffled-image control, a metric that costs an additional pass over the query.
            run: another method to run on the batch. ZeRO 3 fetches parameters in the order in which it saw them since the last
                call of this module, so every pass over the network starts here.
        """
        noise = self.sample_noise(inputs, seed)
        if run is not None:
            return run(inputs, noise)
        metrics = Metrics()
        batch_size = torch.full((), float(len(inputs["latent"])), device=inputs["latent"].device)  # without a copy from the host
        image, queries = self._predict(inputs, noise)
        if image is not None:
            loss, metrics = self._generation_loss(image, noise, batch_size)
        if queries is not None:
            alignment, alignment_metrics = self._alignment_loss(inputs, noise, queries, grad_cache, control)
            loss = alignment if image is None else loss + self.objective.lambda_alignment * alignment
            metrics |= alignment_metrics
        metrics["loss"] = torch.stack([loss.detach() * batch_size, batch_size])
        return loss, metrics

    def sample_noise(self, inputs: Inputs, seed: int) -> StepNoise:
        """Sample all random numbers of a micro-batch from `seed`.

        On the CPU, so that a seed gives the same numbers on every device; and all of them for every task, so that two tasks agree
        on what they share. They reach the device in one copy, for which the host does not wait.
        """
        latents, queries, config = inputs["latent"], inputs["query"], self.objective
        size, num_timesteps = len(latents), self.model.config.schedule.num_timesteps
        generator = torch.Generator().manual_seed(seed)

        def uniform() -> torch.Tensor:
            return torch.rand((size,), generator=generator)

        noise = StepNoise(
            timesteps=uniform_timesteps(size, num_timesteps, generator, config),
            noise=torch.randn(latents.shape, generator=generator),
            drop_caption=uniform() < config.caption_dropout,
            query_timesteps=torch.randint(
                config.query_timestep_min, num_timesteps, (size, config.num_draws), generator=generator
            ),
            query_noise=torch.randn((size, config.num_draws, queries.shape[-1]), generator=generator),
            drop_image=uniform() < self.model.config.image_dropout,
        )
        # Last, so that these options leave all other numbers as they are.
        if config.noise_offset:
            offset = torch.randn((*latents.shape[:2], 1, 1), generator=generator)
            noise = noise._replace(noise=noise.noise + config.noise_offset * offset)
        if config.timestep_sampling != "uniform":
            timesteps = TIMESTEP_SAMPLINGS[config.timestep_sampling](size, num_timesteps, generator, config)
            noise = noise._replace(timesteps=timesteps)
        return StepNoise(*copy_to(latents.device, [x.to(latents.dtype) if x.is_floating_point() else x for x in noise]))

    def _predict(self, inputs: Inputs, noise: StepNoise) -> tuple[ImagePrediction | None, QueryPrediction | None]:
        """Predict what the task needs: both passes in one walk for the joint one."""
        task = self.objective.task
        if task in ("alignment", "clip"):
            return None, self._predict_queries(inputs, noise)
        latents, null_states = inputs["latent"], inputs["null_states"]  # [B, C, H, W], [1, L, D_c]
        abar = self.model.alphas_cumprod[noise.timesteps]  # [B]
        # The text query is left out; some captions are replaced by the empty one.
        token_states = torch.where(noise.drop_caption[:, None, None], null_states, inputs["token_states"])  # [B, L, D_c]
        noisy_latents = schedule.add_noise(latents, noise.noise, abar)  # [B, C, H, W]
        target = schedule.prediction_target(self.model.config.schedule.prediction_type, latents, noise.noise, abar)
        generation = noisy_latents, noise.timesteps, token_states
        if task == "generation":
            return ImagePrediction(self.model.predict_image(*generation), target, abar), None
        clean_latents, noisy_queries = self._alignment_inputs(inputs, noise)
        image, queries, condition = self.model.predict_image_and_query(
            *generation, clean_latents, null_states, noisy_queries, noise.query_timesteps
        )
        return ImagePrediction(image, target, abar), QueryPrediction(queries, condition, noisy_queries)

    def predict_queries(self, inputs: Inputs, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the text queries [B, n, D] that `forward` predicts with the same seed, and the scale 1 / temperature."""
        return self(inputs, seed, run=lambda *batch: (self._predict_queries(*batch).queries, self.model.temperature()))

    def _predict_queries(self, inputs: Inputs, noise: StepNoise) -> QueryPrediction:
        """Predict the text queries of the images without generation."""
        null_states = inputs["null_states"]
        if self.objective.task == "clip":
            embedding = self.model.clip_image_embedding(inputs["latent"], null_states)[:, None]  # [B, 1, D]
            return QueryPrediction(embedding, None, noise.query_noise)
        latents, noisy_queries = self._alignment_inputs(inputs, noise)
        condition = self.model.encode_condition(latents, null_states)
        queries = self.model.predict_query(condition, noisy_queries, noise.query_timesteps)  # [B, n, D]
        return QueryPrediction(queries, condition, noisy_queries)

    def _alignment_inputs(self, inputs: Inputs, noise: StepNoise) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the clean latents [B, C, H, W], of which some are masked, and the noisy text queries [B, n, D]."""
        latents = inputs["latent"].masked_fill(noise.drop_image[:, None, None, None], 0.0)
        return latents, self.model.noise_query(inputs["query"], noise.query_noise, noise.query_timesteps)

    def _generation_loss(
        self, prediction: ImagePrediction, noise: StepNoise, batch_size: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        """Return L_IG, and the metrics of the batch. `loss_generation` has no weights, so that runs can be compared by it."""
        config, constants = self.objective, self._constants_on(prediction.predicted.device)
        error = generation_loss(prediction.predicted, prediction.target)  # [B]
        detached, in_bin = error.detach(), constants.timestep_bins[:, noise.timesteps]  # [B], [bins, B]
        metrics = {"loss_generation": torch.stack([detached.sum(), batch_size])}
        by_bin = torch.stack([in_bin * detached, in_bin], dim=1).sum(dim=2)  # [bins, 2]
        metrics |= _named_by_timestep("generation/loss", by_bin, self.model.config.schedule.num_timesteps)
        if config.generation_weighting == "none" and not config.channel_weights:
            return error.mean(), metrics
        weighted = generation_loss(prediction.predicted, prediction.target, constants.channel_weights)  # [B]
        if config.generation_weighting != "none":
            weighted = weighted * schedule.loss_weight(
                self.model.config.schedule.prediction_type, prediction.abar, self.objective
            )
        metrics["loss_generation_weighted"] = torch.stack([weighted.detach().sum(), batch_size])
        return weighted.mean(), metrics

    def _constants_on(self, device: torch.device) -> _Constants:
        if self._constants.timestep_bins.device != device:
            self._constants = _Constants(*(constant.to(device) for constant in self._constants))
        return self._constants

    def _alignment_loss(
        self, inputs: Inputs, noise: StepNoise, prediction: QueryPrediction, grad_cache: GradCache | None, control: bool
    ) -> tuple[torch.Tensor, Metrics]:
        """Return L_ITA over the global batch, and the metrics of this rank's images."""
        scale = self.model.temperature()
        if grad_cache is None:
            result = self.alignment(prediction.queries, inputs["query"], inputs["caption_ids"], scale)
        else:
            # Its value is the loss of these rows; its gradient that of the step's mean loss.
            surrogate = (prediction.queries * grad_cache.queries_grad).sum() + scale * grad_cache.scale_grad
            for (_, value), gradient in zip(self._loss_parameters(), grad_cache.parameter_grads, strict=True):
                surrogate = surrogate + (value() * gradient).sum()
            mean = surrogate - surrogate.detach() + grad_cache.loss.mean()
            result = AlignmentResult(mean, grad_cache.loss, grad_cache.correct, grad_cache.texts)
        metrics = {"temperature": torch.stack([1 / scale.detach(), torch.ones_like(scale)])}
        # Without its image, a text can only be copied from e_t, which says nothing about the model.
        has_image = torch.ones_like(noise.drop_image) if self.objective.task == "clip" else ~noise.drop_image
        metrics |= _sums(result, has_image)
        if self.objective.task != "clip":
            in_bin = self._constants_on(result.loss.device).timestep_bins[:, noise.query_timesteps.T]  # [bins, n, B]
            metrics |= _sums_by_timestep(result, has_image, in_bin, self.model.config.schedule.num_timesteps)
            if control:
                texts, ids = result.texts or gather_texts(inputs["query"], inputs["caption_ids"])
                shuffled = self._retrieval_with_shuffled_images(prediction, noise, texts, ids)
                metrics["alignment/retrieval_shuffled_images"] = shuffled
                metrics["alignment/retrieval_chance"] = _chance(inputs["caption_ids"], ids)
        return result.mean, metrics

    def build_grad_cache(self, inputs: Sequence[Inputs], queries: Sequence[torch.Tensor], scale: torch.Tensor) -> list[GradCache]:
        """Compute the alignment loss and its gradients over all micro-batches of a step on all ranks.

        `queries` [b, n, D] for each micro-batch, and `scale`: the results of `predict_queries`.
        """
        predicted = torch.cat(list(queries)).detach().requires_grad_()  # [num_micro_batches * b, n, D]
        scale = scale.detach().clone().requires_grad_()
        texts, ids = (torch.cat([part[name] for part in inputs]) for name in ("query", "caption_ids"))
        with torch.enable_grad():
            result = self.alignment(predicted, texts, ids, scale)
            parameters = [parameter for parameter, _ in self._loss_parameters()]
            queries_grad, scale_grad, *others = torch.autograd.grad(result.mean, (predicted, scale, *parameters))
        num, size, caches = len(inputs), len(queries[0]), []
        for part in range(num):
            rows = slice(part * size, (part + 1) * size)
            # All texts are sorted by rank, then by micro-batch.
            gathered = None
            if result.texts is not None:
                of_all_ranks, their_ids = (x.unflatten(0, (-1, num, size))[:, part].flatten(0, 1) for x in result.texts)
                gathered = of_all_ranks, their_ids
            gradients = num * queries_grad[rows], scale_grad, tuple(others)
            caches.append(GradCache(*gradients, result.loss[:, rows], result.correct[:, rows], gathered))
        return caches

    def _loss_parameters(self) -> list[tuple[nn.Parameter, Callable[[], torch.Tensor]]]:
        """Return the trainable parameters of the alignment loss, each with a function that returns its value.

        Under ZeRO 3, a parameter has a value outside of the loss only if it is a `LossParameter`.
        """
        modules = self.alignment.modules() if isinstance(self.alignment, nn.Module) else ()
        return [
            (parameter, module if isinstance(module, LossParameter) else parameter.clone)
            for module in modules
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad
        ]

    @torch.no_grad()
    def _retrieval_with_shuffled_images(
        self, prediction: QueryPrediction, noise: StepNoise, queries: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Return [sum, weight] of the retrieval accuracy of a quarter of the queries with the image of another query.

        `queries` [B_all, D] and `ids` [B_all] are the texts of all ranks and their captions.

        A value above chance means that e_t itself is copied. An image with the same caption does not count as another one, so a
        micro-batch of one sample has weight 0.
        """
        condition, noisy_queries = prediction.condition, prediction.noisy_queries
        part = slice(0, min(max(2, len(noisy_queries) // 4), len(noisy_queries)))

        def shuffle(x: torch.Tensor) -> torch.Tensor:
            return x[part].roll(1, dims=0)

        if isinstance(condition, ImageKVCache):
            unet = [[(shuffle(k), shuffle(v)) for k, v in layers] for layers in condition.unet]
            condition = ImageKVCache(unet, [(shuffle(k), shuffle(v)) for k, v in condition.head])
        else:
            condition = shuffle(condition[0]), condition[1]
        predicted = self.model.predict_query(condition, noisy_queries[part], noise.query_timesteps[part])[:, 0]  # [B / 4, D]
        with torch.autocast(queries.device.type, enabled=False):  # half precision would tie the scores of many texts
            logits = predicted @ queries.T.float()  # [B / 4, B_all]
        own_text = torch.arange(len(logits), device=logits.device) + rank_offset(len(noisy_queries))
        same_caption = ids[own_text][:, None] == ids[None, :]
        same_caption.scatter_(1, own_text[:, None], False)
        correct = (logits.masked_fill(same_caption, float("-inf")).argmax(dim=1) == own_text).float()
        is_other_image = (ids[own_text] != ids[own_text].roll(1)).float() * ~noise.drop_image[part].roll(1)
        return torch.stack([(correct * is_other_image).sum(), is_other_image.sum()])


def _check_patterns(problem: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{problem} is called {pattern}; there are {names[0]}, …, {names[-1]}")


def _chance(own_ids: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return [sum, weight] of the retrieval accuracy of guessing among a text and those with other captions.

    `own_ids` [b] are the captions of this rank's images, and `ids` [B_all] those of all ranks.
    """
    num_texts = 1 + (own_ids[:, None] != ids[None, :]).sum(dim=1)  # [b]
    return torch.stack([(1 / num_texts).sum(), torch.ones_like(num_texts, dtype=torch.float32).sum()])


def _sums(result: AlignmentResult, has_image: torch.Tensor) -> Metrics:
    ones, counted = torch.ones_like(result.loss), has_image.float().expand_as(result.correct)
    return {
        "loss_alignment": torch.stack([result.loss.sum(), ones.sum()]),
        "alignment/retrieval": torch.stack([(result.correct * counted).sum(), counted.sum()]),
    }


def _sums_by_timestep(result: AlignmentResult, has_image: torch.Tensor, in_bin: torch.Tensor, num_timesteps: int) -> Metrics:
    """Return the loss, and the retrieval accuracy of the samples with an image [B], by bins of t_e: `in_bin` [bins, n, B]."""
    counted = in_bin * has_image.float()
    parts = torch.stack([in_bin * result.loss, in_bin, counted * result.correct, counted], dim=1)  # [bins, 4, n, B]
    losses, retrievals = parts.sum(dim=(2, 3)).unflatten(1, (2, 2)).unbind(dim=1)  # [bins, 2] each
    return _named_by_timestep("alignment/loss", losses, num_timesteps) | _named_by_timestep(
        "alignment/retrieval", retrievals, num_timesteps
    )


def _timestep_bins(num_timesteps: int) -> list[range]:
    width = -(-num_timesteps // NUM_TIMESTEP_BINS)
    return [range(low, min(low + width, num_timesteps)) for low in range(0, num_timesteps, width)]


def _named_by_timestep(name: str, sums: torch.Tensor, num_timesteps: int) -> Metrics:
    """Return the metrics of the bins, whose [sum, weight] are the rows of `sums`."""
    return {
        f"{name}_t{part.start:03d}-{part.stop:03d}": row for part, row in zip(_timestep_bins(num_timesteps), sums, strict=True)
    }
