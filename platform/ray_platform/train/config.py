"""Settings of a training run, each with its default."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ray_platform.contracts import ConfigError
from ray_platform.placement import check_labels


@dataclass(frozen=True)
class TrainConfig:
    """How a Task is trained. Raises ConfigError for invalid values."""

    num_workers: int | tuple[int, int] = 1  # (min, max): elastic, as many workers as the cluster has room for at any time
    num_steps: int = 100_000
    # End this launch at that step, with a checkpoint and an export; the schedule still spans num_steps. --resume auto continues.
    # 0: at num_steps.
    stop_at_step: int = 0
    micro_batch_size: int = 32  # samples per worker and forward pass
    # Samples per optimizer step over all workers; more than num_workers * micro_batch_size is reached by gradient accumulation.
    # 0: num_workers * micro_batch_size, or the value of the checkpoint from which the run resumes.
    global_batch_size: int = 0
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False  # keep the optimizer's states and its step on the CPU
    # Of the weights that the model computes with. The optimizer and checkpoints have them in float32.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False  # torch.compile of the model's blocks, from the second step on; not under ZeRO 3
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged into the generated DeepSpeed configuration
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up; linear and cosine end at 0
    warmup_steps: int = 100
    # When a run resumes with another schedule, such as more steps: steps over which the rate rises from the one at which it
    # stopped to that of the schedule. 0: it jumps.
    rewarm_steps: int = 0
    gradient_clipping: float = 1.0  # maximum global norm of the gradients; 0: no clipping
    ema_decay: float = 0.0  # of the weights that are exported; 0: no EMA
    # A step changes nothing when its loss is not finite or above this factor times the usual loss; max_bad_steps in a row end
    # the run.
    max_loss_factor: float = 10.0
    max_bad_steps: int = 10
    seed: int = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: int = 0
    placement: dict[str, str] = field(default_factory=dict)  # labels of the nodes to train on, as {pool: gpu}; empty: any node
    log_every: int = 10  # steps
    # Steps between the metrics that cost additional operations, as DiffDis's control with shuffled images; 0: log_every.
    control_every: int = 0
    checkpoint_every: int = 1000  # steps; the last step is always saved
    checkpoint_minutes: float = 0.0  # also save after so many minutes without a checkpoint; 0: by steps only
    keep_checkpoints: int = 2  # number of newest checkpoints to keep
    keep_best: str = ""  # also keep the checkpoint with the best value of this metric, which must be logged at the same step
    keep_best_mode: Literal["max", "min"] = "max"
    preview_every: int = 1000  # steps; 0: no previews
    heldout_sources: tuple[str, ...] = ()  # shards whose first samples are scored during training
    heldout_samples: int = 512
    heldout_every: int = 1000  # steps
    profile: bool = False  # save a torch profiler trace of a few steps of rank 0 to output_dir/profile
    max_failures: int = 3  # restarts of the workers without a new checkpoint before the run fails
    # Seconds without a step on any rank after which the hung rank is reported and all workers restart; ten times as long while
    # building, scoring, generating previews or exporting.
    hang_seconds: float = 600.0
    # auto: resume from the newest checkpoint in output_dir, if any. none: start anew, and reject an output_dir with checkpoints.
    # Anything else: the path of a checkpoint to resume from.
    resume: str = "none"
    # With the path of a checkpoint in `resume`: take only its weights. Steps, schedule, optimizer and data start anew.
    resume_weights_only: bool = False

    def __post_init__(self) -> None:
        positive = ("num_steps", "micro_batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps")
        for name in (*positive, "heldout_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}: {getattr(self, name)} is below 1")
        counts = ("warmup_steps", "gradient_clipping", "preview_every", "max_failures", "cpus_per_worker", "gpus_per_worker")
        for name in (*counts, "global_batch_size", "hang_seconds", "control_every"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"train.{name}: {getattr(self, name)} is negative")
        has_workers = 1 <= self.min_workers <= self.max_workers
        enough_samples = not self.global_batch_size or self.global_batch_size >= self.max_workers
        checks = (
            ("checkpoint_minutes", self.checkpoint_minutes >= 0, "is negative; use 0 to save by steps only"),
            ("stop_at_step", 0 <= self.stop_at_step <= self.num_steps, f"is not from 0 to train.num_steps, {self.num_steps}"),
            ("num_workers", has_workers, "is neither a number from 1 nor (min, max)"),
            ("global_batch_size", enough_samples, f"gives {self.max_workers} workers less than one sample each"),
            ("precision", self.precision != "fp16" or self.gpus_per_worker, "needs an accelerator; use fp32 or bf16"),
            ("deepspeed", not self.deepspeed or self.zero_stage, "needs train.zero_stage 1, 2 or 3, which are DeepSpeed's"),
            ("compile", not self.compile or self.zero_stage < 3, "needs train.zero_stage 0, 1 or 2"),
            ("offload_optimizer", not self.offload_optimizer or self.zero_stage, "needs train.zero_stage 1, 2 or 3"),
            ("ema_decay", 0 <= self.ema_decay < 1, "is not in [0, 1)"),
            ("resume_weights_only", not self.resume_weights_only or self.resume != "none", "needs train.resume = PATH"),
            ("rewarm_steps", self.rewarm_steps >= 0, "is negative; use 0 for none"),
            ("max_loss_factor", self.max_loss_factor > 1, "is not above 1"),
            ("heldout_every", not self.heldout_sources or self.heldout_every >= 1, "is below 1; or use no heldout_sources"),
        )
        for name, is_valid, problem in checks:
            if not is_valid:
                raise ConfigError(f"train.{name}: {getattr(self, name)} {problem}")
        check_labels("train.placement", self.placement)

    def is_control_due(self, step: int) -> bool:
        """Return whether step `step` (from 1) also computes the metrics that cost additional operations."""
        return step % (self.control_every or self.log_every) == 0

    @property
    def last_step(self) -> int:
        """Last step of this launch."""
        return self.stop_at_step or self.num_steps

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def elastic(self) -> bool:
        return not isinstance(self.num_workers, int)


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
