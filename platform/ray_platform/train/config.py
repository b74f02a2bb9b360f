"""Settings of a training run, each with its default."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ray_platform.contracts import ConfigError
from ray_platform.json_values import flat_fields
from ray_platform.placement import ResourceRequest, check_labels
from ray_platform.units import plural

ZeroStage = Literal[0, 1, 2, 3]

SLOW_PHASE_FACTOR = 10  # how much longer than hang_seconds a rank may take to build, restore, score or export
_COLLECTIVE_MARGIN_S = 1800  # Ray Train's default timeout of the process group
_MAX_COLLECTIVE_S = 30 * 24 * 3600


_DETERMINED_BY = {  # setting of DeepSpeed -> field
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_clipping": "gradient_clipping",
    "fp16": "precision",
    "bf16": "precision",
    "bfloat16": "precision",
    "amp": "precision",
    "optimizer": "optimizer",
    "scheduler": "lr_schedule",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer.device": "offload_optimizer",
}


def width_state(width: float) -> str:
    """Return the name, in checkpoints, of the average of a width."""
    return f"ema_width_{width:g}"


@dataclass(frozen=True)
class TrainConfig:
    """How a Task is trained. Raises ConfigError for invalid values."""

    num_workers: int | tuple[int, int] = 1
    """Workers that train, one GPU (or a part of the CPUs) each. (min, max), such as '[2, 8]', trains with as many as the cluster
    has room for at any time."""
    num_steps: int = 100_000
    """Optimizer steps of the run."""
    stop_at_step: int = 0
    """End this launch at this step, with a checkpoint and an export; --resume auto continues. The schedule still spans num_steps.
    0: at num_steps."""
    micro_batch_size: int = 32
    """Samples per worker and forward pass."""
    global_batch_size: int = 0
    """Samples per optimizer step over all workers. More than num_workers * micro_batch_size is reached by gradient accumulation.
    0: num_workers * micro_batch_size, or the value of the checkpoint from which the run resumes."""
    zero_stage: ZeroStage = 1
    """ZeRO stage: what is sharded over the workers. 0: nothing, 1: optimizer states, 2: gradients too, 3: weights too."""
    offload_optimizer: bool = False
    """Keep the optimizer's states and its step on the CPU."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision that the model computes in. The optimizer and checkpoints keep the weights in float32."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and costs time."""
    channels_last: bool = False
    """Store images and convolution weights in the channels-last memory format, which is faster on GPUs. Only with ZeRO 0."""
    compile: bool = False
    """Compile the model's blocks with torch.compile, from the second step on. Not with ZeRO 3."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Settings that are merged into the generated DeepSpeed configuration, as JSON. Those that other fields determine, such as
    batch sizes, precision and ZeRO stage, are rejected."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps AdamW's moments in 8 bits, which takes a quarter of their memory. It needs the package bitsandbytes."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decays of the moments. Contrastive training with large batches is more stable with a second one of 0.95 to 0.98."""
    eps: float = 1e-8
    """AdamW's term that is added to the denominator."""
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Learning rate after the warm-up. `wsd` (warm-up, stable, decay) is constant until the last cooldown_steps."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    cooldown_steps: int = 0
    """With lr_schedule = wsd: last steps of num_steps, over which the rate falls with 1 - sqrt(x)."""
    min_lr_factor: float = 0.0
    """Learning rate at the end of `linear`, `cosine` and `wsd`, as a fraction of the peak."""
    rewarm_steps: int = 0
    """When a run resumes with another schedule (such as more steps) or another learning rate: steps over which the rate moves
    from the one at which it stopped to the new one. 0: it jumps."""
    gradient_clipping: float = 1.0
    """Maximum global norm of the gradients. 0: no clipping."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average (EMA) of the weights. 0: no EMA."""
    ema_decays: tuple[float, ...] = ()
    """Decays of more EMAs, such as '[0.999, 0.99]', which checkpoints store as ema_0.999 and ema_0.99."""
    ema_widths: tuple[float, ...] = ()
    """Widths of averages that are relative to the length of the run (Karras et al. 2024), stored as ema_width_<width>. With two,
    such as '[0.05, 0.1]', and keep_every, the export can reconstruct any other width."""
    eval_weights: str = "best"
    """Weights for validation scores, and so for keep_best, previews and the export: weights, ema, ema_<decay> or
    ema_width_<width>; `best` is `ema` if there is one, and else `weights`."""
    max_loss_factor: float = 10.0
    """A step is skipped if its loss is not finite or above this factor times the usual magnitude of the loss."""
    max_bad_steps: int = 10
    """Number of skipped steps in a row that end the run."""
    seed: int = 0
    """Seed of the weights, the data order and the noise."""
    cpus_per_worker: float = 1.0
    """CPUs that a worker requests from Ray."""
    gpus_per_worker: int = 0
    """GPUs per worker: 1, or 0 to train on CPUs."""
    placement: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes to train on, such as '{"pool": "gpu"}'. Empty: any node."""
    log_every: int = 10
    """Steps between two logged values of the metrics."""
    control_every: int = 0
    """Steps between the metrics that cost additional operations, such as the control with shuffled images. 0: log_every."""
    statistics_every: int = 0
    """Steps between two statistics by block: norms of the gradients and, without train.compile, RMS of the activations. 0:
    none."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints. The last step is always saved."""
    checkpoint_minutes: float = 0.0
    """Also save after this many minutes without a checkpoint. 0: by steps only."""
    max_minutes: float = 0.0
    """Stop this launch with a checkpoint so many minutes after it started its workers, before a time limit of the cluster (Slurm,
    spot instances) ends it. Leave time for the checkpoint. 0: no limit."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Steps between two checkpoints that are never removed, a multiple of checkpoint_every. 0: none."""
    keep_best: str = ""
    """Also keep the checkpoint with the best value of this metric, which must be logged at the same step."""
    keep_best_mode: Literal["max", "min"] = "max"
    """Whether a higher or a lower value of keep_best is better."""
    preview_every: int = 1000
    """Steps between two grids of generated images. 0: none."""
    heldout_sources: tuple[str, ...] = ()
    """Shards of validation data; their first samples are scored during training."""
    heldout_samples: int = 512
    """Number of validation samples."""
    heldout_every: int = 1000
    """Steps between two scores of the validation samples."""
    profile: bool = False
    """Save profiles of a few steps to output_dir/profile. They are a torch profiler trace, a table of operators, and on
    accelerators a snapshot of the memory."""
    profile_steps: tuple[int, int] | None = None
    """First and last step to profile. None: the fifth to the seventh of the launch, as the first ones are not typical."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that save a profile."""
    max_failures: int = 3
    """Restarts of the workers without a new checkpoint before the run fails."""
    hang_seconds: float = 600.0
    """Seconds without a step on any rank after which the hung rank is reported and all workers restart. Ten times as long while
    building, scoring, generating previews or exporting. 0: no hang detection."""
    resume: str = "none"
    """`auto`: resume from output_dir's newest checkpoint, if any. `none`: start anew, and reject an output_dir with
    checkpoints. Anything else: path of a checkpoint to start from; with that of another folder, the same command continues the
    newest checkpoint in output_dir."""
    resume_weights_only: bool = False
    """With the path of a checkpoint in `resume`: load its weights only. Steps, schedule, optimizer and data start anew."""

    def __post_init__(self) -> None:
        positive = ("num_steps", "micro_batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps")
        for name in (*positive, "heldout_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}: {getattr(self, name)} is below 1")
        counts = ("warmup_steps", "rewarm_steps", "gradient_clipping", "global_batch_size", "max_failures", "cpus_per_worker")
        intervals = ("control_every", "statistics_every", "preview_every", "checkpoint_minutes", "max_minutes", "hang_seconds")
        for name in (*counts, *intervals):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"train.{name}: {getattr(self, name)} is negative")
        has_workers = 1 <= self.min_workers <= self.max_workers
        enough_samples = not self.global_batch_size or self.global_batch_size >= self.max_workers
        max_cooldown = self.num_steps - self.warmup_steps
        has_cooldown = 1 <= self.cooldown_steps <= max_cooldown if self.lr_schedule == "wsd" else not self.cooldown_steps
        first, last = self.profile_steps or (1, self.last_step)
        has_ranks = bool(self.profile_ranks) and all(0 <= rank < self.max_workers for rank in self.profile_ranks)
        checks = (
            ("betas", all(0 <= beta < 1 for beta in self.betas), "are not two numbers in [0, 1)"),
            ("eps", self.eps > 0, "is not above 0"),
            ("min_lr_factor", 0 <= self.min_lr_factor <= 1, "is not a fraction from 0 to 1"),
            (
                "cooldown_steps",
                has_cooldown,
                f"does not fit train.lr_schedule {self.lr_schedule}; wsd needs 1 to {max_cooldown} steps, the others 0",
            ),
            (
                "keep_every",
                self.keep_every >= 0 and self.keep_every % self.checkpoint_every == 0,
                f"is not a multiple of train.checkpoint_every, {self.checkpoint_every}",
            ),
            ("stop_at_step", 0 <= self.stop_at_step <= self.num_steps, f"is not from 0 to train.num_steps, {self.num_steps}"),
            ("num_workers", has_workers, "is not 1 or more; of (min, max), min is 1 or more, and at most max"),
            ("global_batch_size", enough_samples, f"gives {plural(self.max_workers, 'worker')} less than one sample each"),
            ("gpus_per_worker", self.gpus_per_worker in (0, 1), "is neither 0 nor 1; use one worker per GPU"),
            ("precision", self.precision != "fp16" or self.gpus_per_worker, "needs an accelerator; use fp32 or bf16"),
            ("deepspeed", not self.deepspeed or self.zero_stage, "needs train.zero_stage 1, 2 or 3, which are DeepSpeed's"),
            ("compile", not self.compile or self.zero_stage < 3, "needs train.zero_stage 0, 1 or 2"),
            # DeepSpeed's flat weights are contiguous, so that convolutions would convert them at each use.
            ("channels_last", not self.channels_last or not self.zero_stage, "needs train.zero_stage 0"),
            ("offload_optimizer", not self.offload_optimizer or self.zero_stage, "needs train.zero_stage 1, 2 or 3"),
            ("ema_decay", 0 <= self.ema_decay < 1, "is not in [0, 1)"),
            ("ema_decays", all(0 < decay < 1 for decay in self.ema_decays), "are not in (0, 1)"),
            ("ema_widths", all(0 < width < 0.28 for width in self.ema_widths), "are not in (0, 0.28)"),
            (
                "eval_weights",
                self.eval_weights in ("best", "weights", *self.ema_states),
                f"is none of {', '.join(('best', 'weights', *self.ema_states))}, which train.ema_decay and others add",
            ),
            ("resume_weights_only", not self.resume_weights_only or self.resume != "none", "needs train.resume = PATH"),
            ("max_loss_factor", self.max_loss_factor > 1, "is not above 1"),
            ("profile_steps", 1 <= first <= last <= self.last_step, f"is not a first and a last step from 1 to {self.last_step}"),
            ("profile_steps", not self.profile_steps or self.profile, "needs train.profile true"),
            ("profile_ranks", not self.profile or has_ranks, f"are not ranks from 0 to {self.max_workers - 1}"),
            ("heldout_every", not self.heldout_sources or self.heldout_every >= 1, "is below 1; or use no heldout_sources"),
        )
        for name, is_valid, problem in checks:
            if not is_valid:
                raise ConfigError(f"train.{name}: {getattr(self, name)} {problem}")
        check_labels("train.placement", self.placement)
        _check_deepspeed(name for name, _ in flat_fields(self.deepspeed))

    def is_control_due(self, step: int) -> bool:
        """Return whether step `step` (from 1) also computes the metrics that cost additional operations."""
        return step % (self.control_every or self.log_every) == 0

    @property
    def ema_states(self) -> dict[str, float]:
        """Decay or width of each EMA by its name in checkpoints."""
        states = {"ema": self.ema_decay} if self.ema_decay else {}
        states |= {f"ema_{decay:g}": decay for decay in self.ema_decays}
        return states | {width_state(width): width for width in self.ema_widths}

    @property
    def eval_state(self) -> str:
        """Name, in checkpoints, of what is scored, previewed and exported: `weights` or an EMA."""
        if self.eval_weights != "best":
            return self.eval_weights
        return "ema" if self.ema_decay else "weights"

    @property
    def max_checkpoints(self) -> int:
        """Number of checkpoints that are kept at the end of the run."""
        permanent = self.num_steps // self.keep_every if self.keep_every else 0
        return permanent + self.keep_checkpoints + bool(self.keep_best)

    def are_statistics_due(self, step: int) -> bool:
        """Return whether step `step` (from 1) also records statistics by block."""
        return self.statistics_every > 0 and step % self.statistics_every == 0

    @property
    def last_step(self) -> int:
        """Last step of this launch."""
        return self.stop_at_step or self.num_steps

    @property
    def collective_timeout_s(self) -> int:
        """Seconds after which gloo and NCCL abort a collective: later than the hang detector, which names the rank to blame."""
        return int(min(SLOW_PHASE_FACTOR * (self.hang_seconds or math.inf) + _COLLECTIVE_MARGIN_S, _MAX_COLLECTIVE_S))

    @property
    def worker_request(self) -> ResourceRequest:
        """What one worker needs, without its reads."""
        return ResourceRequest(self.placement, {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker})

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def elastic(self) -> bool:
        return not isinstance(self.num_workers, int)


def _check_deepspeed(settings: Iterable[str]) -> None:
    """Raise ConfigError for a setting that a field determines: DeepSpeed's error would not name the field, if there is one."""
    for name in settings:
        for determined, field_name in _DETERMINED_BY.items():
            if f"{name}.".startswith(f"{determined}."):
                raise ConfigError(f"train.deepspeed.{name}: remove this setting; set train.{field_name}, which determines it")


@dataclass(frozen=True)
class BatchPlan:
    """Division of one optimizer step's samples into micro-batches of every rank."""

    world_size: int
    micro_batch_size: int
    num_micro_batches: int  # per rank

    @classmethod
    def of(cls, global_batch_size: int, world_size: int, max_micro_batch_size: int) -> "BatchPlan":
        """Divide each rank's samples into the fewest equal micro-batches, or up to twice as many if that divides evenly.

        A global batch that cannot be divided evenly becomes smaller, by less than one sample per rank and micro-batch.
        """
        samples = max(1, global_batch_size // world_size)
        fewest = -(-samples // max_micro_batch_size)
        num_micro_batches = next((n for n in range(fewest, 2 * fewest + 1) if samples % n == 0), fewest)
        return cls(world_size, samples // num_micro_batches, num_micro_batches)

    @property
    def samples(self) -> int:
        """Samples per rank and step."""
        return self.micro_batch_size * self.num_micro_batches

    @property
    def global_batch_size(self) -> int:
        return self.samples * self.world_size
