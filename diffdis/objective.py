"""The training loss of a batch: L = L_IG + lambda L_ITA [P, Algorithm 1], either half alone, or the CLIP-style control."""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from diffdis import schedule
from diffdis.lora import add_adapters
from diffdis.losses import (
    AlignmentResult,
    LossParameter,
    build_alignment_loss,
    caption_contrast_loss,
    dispersive_loss,
    gather_texts,
    generation_loss,
    noised_alignment_loss,
    rank_offset,
    repa_loss,
)
from diffdis.model import DiffDis
from diffdis.objective_config import ObjectiveConfig
from diffdis.schedule import LOSS_WEIGHTINGS, TIMESTEP_SAMPLINGS, uniform_timesteps
from diffdis.step_records import (
    GradCache,
    ImagePrediction,
    Inputs,
    Metrics,
    QueryPrediction,
    StepConstants,
    StepNoise,
    chance,
    named_by_timestep,
    roll_condition,
    sums,
    sums_by_timestep,
)
from diffdis.transfer import copy_to

# Only generation uses these parts of the U-Net: the alignment pass ends behind the middle block.
_UP_PATH = ("unet.up_blocks.*", "unet.conv_norm_out.*", "unet.conv_out.*")


class Objective(nn.Module):
    """The trainable module: a model and its loss. In alignment, the negatives are the texts of all ranks."""

    def __init__(self, model: DiffDis, objective: ObjectiveConfig, num_image_features: int = 0):
        """Raises ValueError for a combination of fields that cannot work.

        `num_image_features`: width of the frozen features of `objective.repa_weight`.
        """
        super().__init__()
        for name, off in (("num_draws", 1), ("noised_alignment_weight", 0)):
            if (value := getattr(objective, name)) > off and model.config.query_visibility == "joint":
                raise ValueError(
                    f"objective.{name}: {value:g} needs the one-way mask; set model.query_visibility = one_way, or use {off}"
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
        if num_image_features:
            widths = model.config.unet.block_out_channels[-1], num_image_features
            self.repa = nn.Sequential(nn.Linear(*widths), nn.SiLU(), nn.Linear(widths[1], widths[1]))
        self._constants = StepConstants.of(model.config.schedule.num_timesteps, weights)

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
        lambda_factor: float = 1.0,
        run: Callable[..., Any] | None = None,
    ) -> Any:
        """Return the loss of a micro-batch (scalar) and its metrics, each [sum, weight].

        Args:
            inputs: the result of `DiffDisTask.inputs`.
            seed: determines all random numbers.
            grad_cache: the alignment's gradient, if it was computed for the whole step.
            lambda_factor: of `objective.lambda_alignment` at this step.
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
        weight = self.objective.lambda_alignment * lambda_factor
        if image is not None:
            loss, metrics = self._generation_loss(image, noise, batch_size)
        if queries is not None:
            alignment, alignment_metrics = self._alignment_loss(inputs, noise, queries, grad_cache, control)
            loss = alignment if image is None else loss + weight * alignment
            metrics |= alignment_metrics
            if self.objective.lambda_schedule != "constant":
                metrics["lambda_alignment"] = torch.stack([weight * batch_size, batch_size])
        if image is not None and self.objective.has_auxiliary_loss:
            auxiliary, auxiliary_metrics = self._auxiliary_loss(inputs, noise, image, queries, weight)
            loss, metrics = loss + auxiliary, metrics | auxiliary_metrics
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
            noised_rows=torch.zeros(1, dtype=torch.long),
        )
        # Last, so that these options leave all other numbers as they are.
        if config.noise_offset:
            offset = torch.randn((*latents.shape[:2], 1, 1), generator=generator)
            noise = noise._replace(noise=noise.noise + config.noise_offset * offset)
        if config.timestep_sampling != "uniform":
            timesteps = TIMESTEP_SAMPLINGS[config.timestep_sampling](size, num_timesteps, generator, config)
            noise = noise._replace(timesteps=timesteps)
        # On the host, which knows their number without waiting.
        if config.noised_alignment_weight and len(rows := self.recognizable_rows(noise)):
            noise = noise._replace(noised_rows=rows)
        return StepNoise(*copy_to(latents.device, [x.to(latents.dtype) if x.is_floating_point() else x for x in noise]))

    def recognizable_rows(self, noise: StepNoise) -> torch.Tensor:
        """Return the indices [M] of the noisy images for `objective.noised_alignment_weight`."""
        return self._is_recognizable(noise).nonzero()[:, 0]

    def _is_recognizable(self, noise: StepNoise) -> torch.Tensor:
        """Return which noisy images have no caption and a timestep below the limit, [B] bool."""
        return noise.drop_caption & (noise.timesteps < self.objective.noised_alignment_limit)

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
        config, features, joint = self.objective, None, None
        if task == "joint":
            clean_latents, noisy_queries = self._alignment_inputs(inputs, noise)
            rows = noise.noised_rows if config.noised_alignment_weight else None
            joint = self.model.predict_image_and_query(
                *generation, clean_latents, null_states, noisy_queries, noise.query_timesteps, rows
            )
            image, features = joint.image, joint.features
        elif config.dispersive_weight or config.repa_weight:
            image, features = self.model.predict_image_and_features(*generation)
        else:
            image = self.model.predict_image(*generation)
        wrong = None
        if config.caption_contrast_weight:
            wrong = self.model.predict_image(noisy_latents, noise.timesteps, inputs["token_states"].roll(1, dims=0))
        prediction = ImagePrediction(image, target, abar, features, wrong)
        if joint is None:
            return prediction, None
        noised = None
        if joint.noised is not None:
            rows = noise.noised_rows
            noised = self.model.predict_query(joint.noised, noisy_queries[rows], noise.query_timesteps[rows])
        return prediction, QueryPrediction(joint.queries, joint.condition, noisy_queries, noised)

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
        latents = torch.where(noise.drop_image[:, None, None, None], 0.0, inputs["latent"])  # keeps the memory layout
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
        metrics |= named_by_timestep("generation/loss", by_bin, self.model.config.schedule.num_timesteps)
        if config.generation_weighting == "none" and not config.channel_weights:
            return error.mean(), metrics
        weighted = self._weighted_error(prediction.predicted, prediction)
        metrics["loss_generation_weighted"] = torch.stack([weighted.detach().sum(), batch_size])
        return weighted.mean(), metrics

    def _weighted_error(self, predicted: torch.Tensor, prediction: ImagePrediction) -> torch.Tensor:
        """Return the denoising error [B] of `predicted` [B, C, H, W] with the weights of timestep and channels."""
        error = generation_loss(predicted, prediction.target, self._constants_on(predicted.device).channel_weights)
        if self.objective.generation_weighting == "none":
            return error
        return error * schedule.loss_weight(self.model.config.schedule.prediction_type, prediction.abar, self.objective)

    def _auxiliary_loss(
        self, inputs: Inputs, noise: StepNoise, image: ImagePrediction, queries: QueryPrediction | None, lambda_alignment: float
    ) -> tuple[torch.Tensor, Metrics]:
        """Return the sum of the weighted auxiliary losses, and each one as `loss_<name>`."""
        config, ids = self.objective, inputs["caption_ids"]
        terms: dict[str, tuple[float, torch.Tensor, torch.Tensor]] = {}  # weight, and loss and whether it counts by row
        if image.wrong is not None:
            errors = self._weighted_error(image.predicted, image), self._weighted_error(image.wrong, image)
            loss = caption_contrast_loss(*errors, config.caption_contrast_temperature)  # [B]
            terms["caption_contrast"] = config.caption_contrast_weight, loss, (ids != ids.roll(1)) & ~noise.drop_caption
        if queries is not None and queries.noised is not None:
            rows, (texts, all_ids) = noise.noised_rows, gather_texts(inputs["query"], ids)
            own = rows + rank_offset(len(ids))
            loss = noised_alignment_loss(queries.noised, own, texts, all_ids, self.model.temperature())  # [M]
            weight = lambda_alignment * config.noised_alignment_weight
            terms["noised_alignment"] = weight, loss, self._is_recognizable(noise)[rows]
        if config.dispersive_weight and image.features is not None:
            loss = dispersive_loss(image.features, config.dispersive_temperature)[None]
            terms["dispersive"] = config.dispersive_weight, loss, torch.ones_like(loss)
        if config.repa_weight and image.features is not None:
            loss = repa_loss(self.repa(image.features.mean(dim=(2, 3))), inputs["image_features"])  # [B]
            terms["repa"] = config.repa_weight, loss, torch.ones_like(loss)
        total, metrics = image.predicted.new_zeros(()), Metrics()
        for name, (weight, loss, counts) in terms.items():
            counted = counts.float()
            total = total + weight * (loss * counted).sum() / counted.sum().clamp(min=1)
            metrics[f"loss_{name}"] = torch.stack([(loss.detach() * counted).sum(), counted.sum()])
        return total, metrics

    def _constants_on(self, device: torch.device) -> StepConstants:
        if self._constants.timestep_bins.device != device:
            self._constants = StepConstants(*(constant.to(device) for constant in self._constants))
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
        metrics |= sums(result, has_image)
        if self.objective.task != "clip":
            in_bin = self._constants_on(result.loss.device).timestep_bins[:, noise.query_timesteps.T]  # [bins, n, B]
            metrics |= sums_by_timestep(result, has_image, in_bin, self.model.config.schedule.num_timesteps)
            if control:
                texts, ids = result.texts or gather_texts(inputs["query"], inputs["caption_ids"])
                shuffled = self._retrieval_with_shuffled_images(prediction, noise, texts, ids)
                metrics["alignment/retrieval_shuffled_images"] = shuffled
                metrics["alignment/retrieval_chance"] = chance(inputs["caption_ids"], ids)
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

        predicted = self.model.predict_query(roll_condition(condition, part), noisy_queries[part], noise.query_timesteps[part])[
            :, 0
        ]  # [B / 4, D]
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
