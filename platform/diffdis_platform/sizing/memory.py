"""Bytes of an accelerator's memory that training takes, by ZeRO stage (Rajbhandari et al., arXiv 1910.02054, section 5), as
DeepSpeed lays them out under this project's engine: weights, gradients and optimizer in float32 at every precision."""

from dataclasses import dataclass
from typing import Any

from diffdis_platform.sizing.counts import FULL, Counts
from ray_platform.train.config import BatchPlan, TrainConfig

# DeepSpeed's own defaults; `train.deepspeed` changes them.
_BUCKET, _MAX_LIVE = 5e8, 1e9  # numbers


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    states: float  # weights, gradients, moments, EMA
    buffers: float  # of collectives
    activations: float  # or what the encoders take, if that is more
    encoders: float  # weights; for precomputed inputs too, since previews and scores need them

    @property
    def total(self) -> float:
        return self.states + self.buffers + self.activations + self.encoders


def memory(counts: Counts, config: TrainConfig, plan: BatchPlan, live: bool) -> Memory:
    num_gpus = plan.world_size
    activations = max(counts.activation_bytes, counts.encoders.peak_bytes if live else 0)
    return Memory(
        state_bytes(counts, config, num_gpus, plan.num_micro_batches > 1) + gathered_bytes(counts, config, num_gpus),
        buffer_bytes(counts, config, num_gpus),
        activations,
        FULL * counts.encoders.parameters,
    )


def state_bytes(counts: Counts, config: TrainConfig, num_gpus: int, accumulating: bool = False) -> float:
    """With W = 4 bytes a trained parameter, n ranks, and k = 2 moments (3 with an EMA):

    0: W weights + W gradients + k W.  1 and 2: W + (W gradients + W master weights + k W) / n; where gradients are accumulated
    over micro-batches, 1 has W of them more.  3: (W + W gradients + W master weights + k W) / n.  Offloaded: master weights and
    moments are the host's.
    """
    whole, frozen = FULL * counts.trained, FULL * counts.frozen
    states = (2 + bool(config.ema_decay)) * whole
    if config.zero_stage == 0:
        return 2 * whole + states + frozen
    sharded = 0 if config.offload_optimizer else (whole + states) / num_gpus
    if config.zero_stage < 3:
        accumulated = whole if config.zero_stage == 1 and accumulating else 0
        return whole + accumulated + whole / num_gpus + sharded + frozen
    return 2 * whole / num_gpus + sharded + frozen / num_gpus


def gathered_bytes(counts: Counts, config: TrainConfig, num_gpus: int) -> float:
    """What stage 3 holds of other ranks' weights while it computes: all of a model below stage3_max_live_parameters."""
    if config.zero_stage < 3 or num_gpus == 1:
        return 0.0
    live = _setting(config, "stage3_max_live_parameters", _MAX_LIVE)
    return FULL * min(counts.trained + counts.frozen, live) * (num_gpus - 1) / num_gpus


def buffer_bytes(counts: Counts, config: TrainConfig, num_gpus: int) -> float:
    """DeepSpeed allocates whole buckets, two where it overlaps (stages 1 and 2); stage 0 copies gradients by buckets."""
    if num_gpus == 1 and config.zero_stage == 0:
        return 0.0
    bucket = FULL * _setting(config, "reduce_bucket_size", _BUCKET)
    if config.zero_stage == 0:
        return min(bucket, FULL * counts.trained)
    return (2 if config.zero_stage < 3 and _setting(config, "overlap_comm", True) else 1) * bucket


def bucket_numbers(config: TrainConfig) -> float:
    return float(_setting(config, "reduce_bucket_size", _BUCKET))


def _setting(config: TrainConfig, name: str, default: Any) -> Any:
    return config.deepspeed.get("zero_optimization", {}).get(name, default)
