"""Configuration of the training objective (`ObjectiveConfig`). Marks: [P] from the paper, [D] our decision where it is silent."""

import math
from dataclasses import dataclass, field
from typing import Literal

TaskName = Literal["joint", "generation", "alignment", "clip"]
_AUXILIARY = ("noised_alignment_weight", "caption_contrast_weight", "dispersive_weight", "repa_weight")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Training objective of Algorithm 1: noise, loss weights and learning rates. [D where not marked]"""

    task: TaskName = "joint"
    """What the model learns. `generation` and `alignment` are the two halves of `joint`. `clip` is a baseline: the same image
    encoder, pooled and projected, with the same loss and no diffusion."""
    lambda_alignment: float = 1.0  # [P]
    """Weight of the alignment loss: L = L_generation + lambda * L_alignment."""
    lambda_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of lambda_alignment over the run: `constant` [P], or falling from its value to 0 at train.num_steps."""
    alignment_loss: str = "infonce"  # [P]
    """Loss of the alignment: infonce (the paper's), siglip (with temperature 0.1) or another entry of
    diffdis.losses.ALIGNMENT_LOSSES."""
    caption_dropout: float = 0.1
    """Fraction of captions that are replaced by the empty one, for classifier-free guidance."""
    generation_weighting: str = "none"
    """Weight of the generation loss by timestep: `none`, `min_snr`, `inverse_noise` (for prediction_type sample), or another
    entry of diffdis.schedule.LOSS_WEIGHTINGS."""
    min_snr_gamma: float = 5.0
    """Largest signal-to-noise ratio that `min_snr` weights by."""
    channel_weights: tuple[float, ...] = ()
    """Relative weight of each latent channel in the generation loss. Empty: equal weights."""
    noise_offset: float = 0.0
    """Standard deviation of additional noise that is equal over each channel of an image, such as 0.05, so that the model learns
    the mean brightness."""
    timestep_sampling: str = "uniform"
    """Distribution of the image's timesteps: `uniform` (the paper's), `logit_normal`, or another entry of
    diffdis.schedule.TIMESTEP_SAMPLINGS."""
    logit_normal_mean: float = 0.0
    """Mean of the logit of t / T with `logit_normal`; above 0 means more noise."""
    logit_normal_std: float = 1.0
    """Standard deviation of the logit of t / T with `logit_normal`."""
    query_timestep_min: int = 0
    """Lowest timestep of the text query, which is uniform over [min, T). A floor keeps the query too noisy to be copied."""
    num_draws: int = 1
    """Noise samples of the text query per image. More than one needs model.query_visibility = one_way."""
    temperature: float = 0.07
    """Initial value of the learnable temperature of the alignment loss."""
    negatives: Literal["micro_batch", "step"] = "micro_batch"
    """Negatives of an image: the texts of one micro-batch of all ranks, or those of the whole step. With gradient accumulation,
    `step` costs a second forward pass of the alignment (gradient caching)."""
    noised_alignment_weight: float = 0.0
    """Weight, relative to the alignment loss, of the same loss on noisy images whose caption was dropped. Needs task joint and
    model.query_visibility one_way. 0: none."""
    noised_alignment_limit: int = 700
    """Timestep of the image from which on noised_alignment_weight does not count it: too noisy to be recognized."""
    caption_contrast_weight: float = 0.0
    """Weight of a loss that makes the denoising error with the own caption smaller than with a wrong one of the batch. It costs
    another pass of the U-Net. 0: none."""
    caption_contrast_temperature: float = 0.1
    """Difference of the two errors at which caption_contrast_weight's loss has a margin of one nat."""
    dispersive_weight: float = 0.0
    """Weight of the dispersive loss, which spreads the middle block's features of a batch (Wang & He 2025), such as 0.5. Not part
    of DiffDis. 0: none."""
    dispersive_temperature: float = 0.5
    """Mean squared distance of two features at which the dispersive loss counts them as apart."""
    repa_weight: float = 0.0
    """Weight of the alignment of the middle block's features with those of a frozen image network (REPA, Yu et al. 2025), such as
    0.5. Not part of DiffDis. Needs images, which precomputed data lacks. 0: none."""
    repa_network: str = "efficientnet_lite0"
    """Network of repa_weight: efficientnet_lite0, the folder of a CLIP, SigLIP or DINOv2, or your own as module:function."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained, such as unet.down_blocks.*"""
    lora_rank: int = 0
    """Rank of low-rank adapters (LoRA) in the U-Net's attention, which are trained instead of the U-Net's weights, usually with
    lr_unet 1e-4. 0: no adapters."""
    lr_unet: float = 1e-5
    """Learning rate of the U-Net."""
    lr_new: float = 1e-4
    """Learning rate of the new parameters: all but the U-Net's."""
    lr_overrides: dict[str, float] = field(default_factory=dict, hash=False)
    """Learning rates of parameters by patterns of their names, such as '{"unet.mid_block.*": 1e-6}'. The last match applies."""
    weight_decay: float = 0.01
    """Weight decay of AdamW for matrices and convolutions. Biases, gains and the temperature have none."""
    weight_decay_overrides: dict[str, float] = field(default_factory=dict, hash=False)
    """Weight decays of parameters by patterns of their names. The last match applies."""

    def __post_init__(self) -> None:
        zero = ("lambda_alignment", "lr_unet", "lr_new", "weight_decay", "query_timestep_min", "noise_offset", "lora_rank")
        checks = [(name, 0 <= getattr(self, name) < math.inf, "a number from 0") for name in (*zero, *_AUXILIARY)]
        checks += [
            ("caption_dropout", 0 <= self.caption_dropout <= 1, "a fraction from 0 to 1"),
            ("num_draws", self.num_draws >= 1, "1 or more"),
            ("temperature", 0 < self.temperature < math.inf, "a number above 0, such as 0.07"),
            ("min_snr_gamma", 0 < self.min_snr_gamma < math.inf, "a number above 0, such as 5"),
            ("noised_alignment_limit", self.noised_alignment_limit >= 1, "a timestep from 1"),
            ("caption_contrast_temperature", 0 < self.caption_contrast_temperature < math.inf, "a number above 0, such as 0.1"),
            ("dispersive_temperature", 0 < self.dispersive_temperature < math.inf, "a number above 0, such as 0.5"),
            ("logit_normal_mean", math.isfinite(self.logit_normal_mean), "a number, such as 0"),
            ("logit_normal_std", 0 < self.logit_normal_std < math.inf, "a number above 0, such as 1"),
        ]
        for name in ("lr_overrides", "weight_decay_overrides"):
            for pattern, value in getattr(self, name).items():
                if not 0 <= value < math.inf:
                    raise ValueError(f"objective.{name}: {value:g} for {pattern} is out of range; give a number from 0")
        for name, is_valid, remedy in checks:
            if not is_valid:
                raise ValueError(f"objective.{name}: {getattr(self, name):g} is out of range; give {remedy}")
        for name in (name for name in _AUXILIARY if getattr(self, name)):
            tasks = ("joint",) if name == "noised_alignment_weight" else ("joint", "generation")
            if self.task not in tasks:
                raise ValueError(f"objective.{name}: task {self.task} does not have this loss; use {' or '.join(tasks)}, or 0")
        if self.channel_weights and not (min(self.channel_weights) >= 0 and 0 < sum(self.channel_weights) < math.inf):
            raise ValueError(
                f"objective.channel_weights: {self.channel_weights} has a negative weight or none above 0; give one per channel, "
                "from 0 up"
            )

    @property
    def has_auxiliary_loss(self) -> bool:
        """Return whether there are losses in addition to those of Algorithm 1."""
        return any(getattr(self, name) for name in _AUXILIARY)
