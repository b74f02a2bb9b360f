"""What can be said about a training run, each with its one default."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ray_platform.contracts import ConfigError
from ray_platform.placement import check_labels


@dataclass(frozen=True)
class TrainConfig:
    """How a Task is trained. Raises ConfigError for a value that cannot work."""

    num_workers: int | tuple[int, int] = 1  # (min, max): as many as the cluster has room for, changing while it trains
    num_steps: int = 100_000
    # End this launch there, with a checkpoint and an export: the schedule still spans num_steps, and --resume auto goes on.
    # 0: at num_steps.
    stop_at_step: int = 0
    micro_batch_size: int = 32  # samples that a worker takes at a time
    # Samples an optimiser step, over all workers. More than num_workers * micro_batch_size: gradients are accumulated.
    # 0: num_workers * micro_batch_size, or what the checkpoint that a run goes on from had.
    global_batch_size: int = 0
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False  # the optimizer's states and step on the CPU
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the computation; weights and optimizer are float32
    activation_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False  # torch.compile, from the second step on
    deepspeed: dict[str, Any] = field(default_factory=dict)  # merged into the configuration that DeepSpeed is given
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up; linear and cosine end at 0
    warmup_steps: int = 100
    gradient_clipping: float = 1.0  # of the global norm; 0: none
    ema_decay: float = 0.0  # of the weights that are exported; 0: no EMA
    # A step whose loss is not finite, or above this factor times the recent mean, changes nothing; so many in a row end the run.
    max_loss_factor: float = 10.0
    max_bad_steps: int = 10
    seed: int = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: int = 0
    placement: dict[str, str] = field(default_factory=dict)  # labels of the nodes that train, as {pool: gpu}; empty: any
    log_every: int = 10  # steps
    checkpoint_every: int = 1000  # steps; there is always one at the end
    keep_checkpoints: int = 2  # the newest
    keep_best: str = ""  # and the one with the best value of this metric, which must be logged at its very step
    keep_best_mode: Literal["max", "min"] = "max"
    preview_every: int = 1000  # steps; 0 for none
    heldout_sources: tuple[str, ...] = ()  # shards whose first samples are scored while training
    heldout_samples: int = 512
    heldout_every: int = 1000  # steps
    profile: bool = False  # save a torch profiler trace of a few steps of rank 0 to output_dir/profile
    max_failures: int = 3  # restarts without a new checkpoint in between before the run gives up
    # Without a step on any rank (ten times as long while building, scoring, drawing or exporting): the rank that the others wait
    # for is named, and all restart.
    hang_seconds: float = 600.0
    # auto: go on with the newest checkpoint in output_dir, or begin. none: begin, and refuse an output_dir that holds one.
    # Anything else is the path of a checkpoint to go on from.
    resume: str = "none"

    def __post_init__(self) -> None:
        for name in ("num_steps", "micro_batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}: {getattr(self, name)} is below 1")
        if not 0 <= self.stop_at_step <= self.num_steps:
            raise ConfigError(f"train.stop_at_step: {self.stop_at_step} is not from 0 to train.num_steps, {self.num_steps}")
        if not 1 <= self.min_workers <= self.max_workers:
            raise ConfigError(f"train.num_workers: {self.num_workers} is neither a number from 1 nor (min, max)")
        if self.global_batch_size and self.global_batch_size < self.max_workers:
            raise ConfigError(
                f"train.global_batch_size: {self.global_batch_size} gives {self.max_workers} workers less than a sample each"
            )
        if self.precision == "fp16" and not self.gpus_per_worker:
            raise ConfigError("train.precision: fp16 needs an accelerator; take fp32 or bf16")
        if self.offload_optimizer and not self.zero_stage:
            raise ConfigError("train.offload_optimizer: needs train.zero_stage 1, 2 or 3")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay: {self.ema_decay} is not in [0, 1)")
        if self.max_loss_factor <= 1:
            raise ConfigError(f"train.max_loss_factor: {self.max_loss_factor} is not above 1")
        if self.heldout_sources and self.heldout_every < 1:
            raise ConfigError("train.heldout_every: at least 1, or give no heldout_sources")
        check_labels("train.placement", self.placement)

    @property
    def last_step(self) -> int:
        """Of this launch."""
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
    """How one optimiser step's samples are shared out: so many micro-batches of so many samples on each rank."""

    world_size: int
    micro_batch_size: int
    num_micro_batches: int

    @classmethod
    def of(cls, global_batch_size: int, world_size: int, largest: int) -> "BatchPlan":
        """A rank's share goes into micro-batches of equal size, of which up to twice as many are taken as it needs if they come
        out even. A global batch that cannot be divided evenly is made smaller, by less than a sample a rank and micro-batch."""
        samples = max(1, global_batch_size // world_size)
        fewest = -(-samples // largest)
        num_micro_batches = next((n for n in range(fewest, 2 * fewest + 1) if samples % n == 0), fewest)
        return cls(world_size, samples // num_micro_batches, num_micro_batches)

    @property
    def samples(self) -> int:
        """A rank and step."""
        return self.micro_batch_size * self.num_micro_batches

    @property
    def global_batch_size(self) -> int:
        return self.samples * self.world_size
