"""What can be said about a training run, each with its one default."""

from dataclasses import dataclass
from typing import Literal

from ray_platform.contracts import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """How a Task is trained. Raises ConfigError for a value that cannot work."""

    num_workers: int = 1
    num_steps: int = 100_000
    micro_batch_size: int = 32  # samples a worker and step
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    lr_schedule: Literal["constant", "cosine"] = "cosine"  # after the warm-up; cosine ends at 0
    warmup_steps: int = 100
    gradient_clipping: float = 1.0
    seed: int = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: int = 0
    log_every: int = 10  # steps
    checkpoint_every: int = 1000  # steps; there is always one at the end
    keep_checkpoints: int = 2
    preview_every: int = 1000  # steps; 0 for none
    max_failures: int = 2  # restarts from the last checkpoint before the run gives up
    # auto: go on with the newest checkpoint in output_dir, or begin. none: begin, and refuse an output_dir that holds one.
    # Anything else is the path of a checkpoint to go on from.
    resume: str = "none"

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_steps", "micro_batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}: {getattr(self, name)} is below 1")
        if self.precision == "fp16" and not self.gpus_per_worker:
            raise ConfigError("train.precision: fp16 needs an accelerator; take fp32 or bf16")
