"""Memory, network traffic and the cost of failures of a run, as functions of the counts of its model. Pure arithmetic.

A collective over n ranks on S bytes takes, when bandwidth bounds it, 2 (n - 1) / n S / B for an all-reduce, and half of that for
an all-gather or reduce-scatter (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009; B is nccl-tests' bus bandwidth),
plus 2, or 1, times log2(n) latencies, as in a tree. ZeRO 1 and 2 move twice the bytes of the gradients per step, ZeRO 3 three
times (Rajbhandari et al., arXiv 1910.02054, sections 5 and 7). Weights, gradients and optimizer are float32 at every precision.
"""

import math
from dataclasses import dataclass
from typing import Any

from diffdis_platform.sizing.constants import DAY, FULL, Constants
from diffdis_platform.sizing.counts import Counts
from ray_platform.train.config import BatchPlan, TrainConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    states: float  # weights, gradients, optimizer, EMA, and the weights that ZeRO 3 gathers
    buffers: float  # of collectives
    activations: float  # or the peak of the encoders, if that is larger
    encoders: float  # weights; also for precomputed inputs, because previews and scores need them

    @property
    def total(self) -> float:
        return self.states + self.buffers + self.activations + self.encoders


def memory(counts: Counts, train: TrainConfig, plan: BatchPlan, live: bool) -> Memory:
    n = plan.world_size
    return Memory(
        state_bytes(counts, train, n, plan.num_micro_batches > 1) + gathered_bytes(counts, train, n),
        buffer_bytes(counts, train, n),
        max(counts.activation_bytes, counts.encoders.peak_bytes if live else 0),
        FULL * counts.encoders.parameters,
    )


def state_bytes(counts: Counts, train: TrainConfig, num_gpus: int, accumulating: bool = False) -> float:
    """Return the bytes of weights, gradients and optimizer on one rank.

    With W = 4 bytes per trained parameter, n ranks, and k = 2 moments (3 with an EMA): stage 0 takes W weights + W gradients
    + k W; 1 and 2: W + (W gradients + W master weights + k W) / n, and 1 takes W more when gradients are accumulated over
    micro-batches; 3: (W + W gradients + W master weights + k W) / n. Offloading moves master weights and moments to the host.
    """
    trained, frozen = FULL * counts.trained, FULL * counts.frozen
    optimizer = (2 + bool(train.ema_decay)) * trained
    if train.zero_stage == 0:
        return 2 * trained + optimizer + frozen
    sharded = 0 if train.offload_optimizer else (trained + optimizer) / num_gpus
    if train.zero_stage < 3:
        accumulated = trained if train.zero_stage == 1 and accumulating else 0
        return trained + accumulated + trained / num_gpus + sharded + frozen
    return 2 * trained / num_gpus + sharded + frozen / num_gpus


def gathered_bytes(counts: Counts, train: TrainConfig, num_gpus: int) -> float:
    """Return the bytes of other ranks' weights that stage 3 holds while it computes: up to `stage3_max_live_parameters`."""
    if train.zero_stage < 3 or num_gpus == 1:
        return 0.0
    live = _deepspeed(train, "stage3_max_live_parameters", 1e9)
    return FULL * min(counts.trained + counts.frozen, live) * (num_gpus - 1) / num_gpus


def buffer_bytes(counts: Counts, train: TrainConfig, num_gpus: int) -> float:
    """Return the bytes of DeepSpeed's buckets: two if stages 1 and 2 overlap; stage 0 copies gradients by buckets."""
    if num_gpus == 1 and train.zero_stage == 0:
        return 0.0
    bucket = FULL * _bucket(train)
    if train.zero_stage == 0:
        return min(bucket, FULL * counts.trained)
    return (2 if train.zero_stage < 3 and _deepspeed(train, "overlap_comm", True) else 1) * bucket


def _bucket(train: TrainConfig) -> float:
    return float(_deepspeed(train, "reduce_bucket_size", 5e8))


def _deepspeed(train: TrainConfig, name: str, default: Any) -> Any:
    """Return a setting of ZeRO, or DeepSpeed's default."""
    return train.deepspeed.get("zero_optimization", {}).get(name, default)


def gather_seconds(size: float, calls: float, num_gpus: int, constants: Constants) -> float:
    """Return the seconds of an all-gather, or a reduce-scatter, of `size` bytes in total; an all-reduce takes twice as long."""
    if num_gpus == 1:
        return 0.0
    moved = (num_gpus - 1) / num_gpus * size / constants.bandwidth(num_gpus)
    return moved + calls * math.log2(num_gpus) * constants.latency_us * 1e-6


@dataclass(frozen=True)
class Traffic:
    """Communication of one rank in one step."""

    backward: float  # seconds that the backward pass may hide
    exposed: float  # seconds that nothing hides
    contrastive: float  # seconds of the gathers of InfoNCE, which are exposed
    bytes_sent: float  # of gradients and weights


def traffic(counts: Counts, train: TrainConfig, plan: BatchPlan, contrastive: bool, num_draws: int, c: Constants) -> Traffic:
    n, size = plan.world_size, FULL * counts.trained
    info = contrastive_seconds(counts, plan, num_draws, c) if contrastive else 0.0
    sent = (n - 1) / n * size
    half = gather_seconds(size, math.ceil(counts.trained / _bucket(train)), n, c)
    if train.zero_stage == 0:  # after the backward pass
        return Traffic(0.0, 2 * half + info, info, 2 * sent)
    if train.zero_stage == 1:  # gradients once per step, in the last micro-batch's backward pass; then the weights
        return Traffic(half, half + info, info, 2 * sent)
    if train.zero_stage == 2:  # gradients at every micro-batch
        return Traffic(plan.num_micro_batches * half, half + info, info, (plan.num_micro_batches + 1) * sent)
    # Weights for both passes, fetched ahead; a call for nearly every tensor.
    weights = gather_seconds(size, counts.num_tensors / 2, n, c)
    return Traffic(plan.num_micro_batches * (2 * weights + half), info, info, 3 * plan.num_micro_batches * sent)


def contrastive_seconds(counts: Counts, plan: BatchPlan, num_draws: int, constants: Constants) -> float:
    """Return the seconds of InfoNCE: it gathers queries and caption ids twice per micro-batch, and all-reduces two [draws, B]."""
    n, batch = plan.world_size, plan.micro_batch_size * plan.world_size
    rows = 2 * batch * (FULL * counts.embedding_dim + 8)
    all_reduce = 2 * gather_seconds(2 * FULL * num_draws * batch, 2, n, constants)
    return plan.num_micro_batches * (gather_seconds(rows, 4, n, constants) + all_reduce)


@dataclass(frozen=True)
class Faults:
    """Time that checkpoints and failures take from a run."""

    checkpoint_bytes: float
    stall_seconds: float  # training pauses while the state is gathered and copied
    upload_seconds: float  # in parallel with training
    interval_seconds: float  # between checkpoints
    best_interval_seconds: float
    hours_between_failures: float  # of the whole job
    recovery_seconds: float
    useful_fraction: float  # of the time, that advances the run
    best_useful_fraction: float  # with best_interval_seconds


def checkpoint_bytes(counts: Counts, train: TrainConfig) -> float:
    """Return the bytes of trained weights, two moments and the EMA, and of frozen weights; float32."""
    return FULL * ((3 + bool(train.ema_decay)) * counts.trained + counts.frozen)


def faults(counts: Counts, train: TrainConfig, num_gpus: int, step_seconds: float, c: Constants) -> Faults:
    size, nodes = checkpoint_bytes(counts, train), c.num_nodes(num_gpus)
    gathering = 2 * gather_seconds(size, (3 + bool(train.ema_decay)) * counts.num_tensors, num_gpus, c)
    stall = (gathering if train.zero_stage else 0.0) + size / num_gpus / (1e9 * c.host_copy_gb_per_second)
    upload = max(size / nodes / (1e9 * c.s3_gb_per_second), size / num_gpus / (1e6 * c.upload_mb_per_second))
    between = DAY / (nodes * c.failures_per_node_day) if c.failures_per_node_day else math.inf
    # The rank that read a tensor sends it to all others.
    recovery = c.recovery_seconds + 60 * c.minutes_to_replace_node + upload + 0.5 * gathering
    interval = train.checkpoint_every * step_seconds
    best = max(best_interval(stall, between), upload)  # the next checkpoint waits for the upload of the previous one
    return Faults(
        size, stall, upload, interval, best, between / 3600, recovery,
        useful_fraction(interval, stall, upload, recovery, between),
        useful_fraction(best, stall, upload, recovery, between),
    )  # fmt: skip


def best_interval(stall: float, between_failures: float) -> float:
    """Return the seconds of training between checkpoints that lose the least: Daly's (Future Generation Computer Systems 22,
    2006), whose first term is Young's (Communications of the ACM 17, 1974), sqrt(2 C M)."""
    if stall >= 2 * between_failures:
        return between_failures
    if math.isinf(between_failures):
        return math.inf
    x = stall / (2 * between_failures)
    return math.sqrt(2 * stall * between_failures) * (1 + math.sqrt(x) / 3 + x / 9) - stall


def useful_fraction(interval: float, stall: float, upload: float, recovery: float, between_failures: float) -> float:
    """Return the fraction of the time that advances the run, to first order: each interval has a stall (and a wait if the upload
    takes longer), and a failure costs half an interval, the training during the last upload, and the recovery."""
    if math.isinf(interval):
        return 1.0
    training = interval / (max(interval, upload) + stall)
    return max(0.0, training * (1 - (interval / 2 + upload + stall + recovery) / between_failures))
