"""One optimisation step under DeepSpeed ZeRO. Nothing else imports deepspeed."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, at deepspeed's import

import deepspeed

from ray_platform.contracts import Task
from ray_platform.train.config import TrainConfig

_TAG = "engine"


class Engine:
    """A Task's module, its optimizer and its schedule, sharded over the ranks of the current process group."""

    def __init__(self, task: Task, config: TrainConfig):
        self.config = config
        self.engine, self.optimizer, _, self.schedule = deepspeed.initialize(
            model=task.module,
            model_parameters=task.parameter_groups(),
            config=deepspeed_config(config),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(config)),
            dist_init_required=False,
        )
        self.device = torch.device(self.engine.device)

    def step(self, inputs: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Forward, backward and update; the metrics of this rank's batch, each [weighted sum, weight]."""
        loss, metrics = self.engine(inputs, generator)
        self.engine.backward(loss)
        self.engine.step()
        return metrics

    @property
    def grad_norm(self) -> float:
        """The global norm before clipping, of the last step."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def learning_rates(self) -> dict[str, float]:
        """By the name of the Task's parameter group."""
        return {group.get("name", str(i)): group["lr"] for i, group in enumerate(self.optimizer.param_groups)}

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """The module's full weights in float32 on rank 0's CPU, None elsewhere. Every rank must call it."""
        keep = torch.distributed.get_rank() == 0
        weights = {}
        for name, parameter in self.engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.config.zero_stage == 3):
                if keep:
                    weights[name] = parameter.detach().float().cpu().clone()
        for name, value in self.engine.module.state_dict().items():
            if keep and name not in weights:  # buffers
                weights[name] = value.detach().cpu().clone()
        return weights if keep else None

    def save(self, folder: Path) -> None:
        """This rank's part of module, optimizer and schedule. Every rank must call it."""
        self.engine.save_checkpoint(str(folder), tag=_TAG)

    def load(self, folder: Path) -> None:
        """The inverse of `save`, at the same number of ranks and ZeRO stage. Every rank must call it."""
        self.engine.load_checkpoint(str(folder), tag=_TAG)


def rate_factor(config: TrainConfig) -> Callable[[int], float]:
    """What each group's rate is multiplied by at a step: a linear warm-up, then constant or a cosine down to 0."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.lr_schedule == "constant":
            return 1.0
        progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration, generated from ours."""
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clipping,
        # The rates stand in the parameter groups. DeepSpeed's fused Adams want a compiler on every node.
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "betas": [0.9, 0.999]}},
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm": torch.cuda.is_available()},
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # our own progress line says it
    }
