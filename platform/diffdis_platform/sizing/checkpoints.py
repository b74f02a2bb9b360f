"""Checkpoints and failures: how large, how long, how often, and what is lost."""

import math
from dataclasses import dataclass

from diffdis_platform.sizing.cluster import Cluster
from diffdis_platform.sizing.counts import FULL, Counts
from diffdis_platform.sizing.measured import RECOVERY_SECONDS, UPLOAD_BYTES_PER_SECOND
from diffdis_platform.sizing.network import all_reduce_seconds
from ray_platform.train.config import TrainConfig

DAY = 86_400.0


@dataclass(frozen=True)
class Faults:
    """What checkpoints and failures take of a run."""

    checkpoint_bytes: float
    stall_seconds: float  # of a checkpoint: training stands still while its state is gathered and copied
    upload_seconds: float  # beside training
    interval_seconds: float  # between checkpoints
    best_interval_seconds: float
    hours_between_failures: float  # of the whole job
    recovery_seconds: float
    useful_share: float  # of the time, that brings the run on
    best_useful_share: float  # with best_interval_seconds


def checkpoint_bytes(counts: Counts, config: TrainConfig) -> float:
    """Weights, two moments and, where there is one, the EMA of what is trained; weights of the rest; float32."""
    return FULL * ((3 + bool(config.ema_decay)) * counts.trained + counts.frozen)


def faults(counts: Counts, config: TrainConfig, num_gpus: int, step_seconds: float, cluster: Cluster) -> Faults:
    size, nodes = checkpoint_bytes(counts, config), cluster.num_nodes(num_gpus)
    calls = (3 + bool(config.ema_decay)) * counts.num_tensors
    gathering = all_reduce_seconds(size, calls, num_gpus, cluster) if config.zero_stage else 0.0
    stall = gathering + size / num_gpus / (1e9 * cluster.host_copy_gb_per_second)
    transfer = max(size / nodes / (1e9 * cluster.s3_gb_per_second), size / num_gpus / UPLOAD_BYTES_PER_SECOND)
    between = DAY / (nodes * cluster.failures_per_node_day) if cluster.failures_per_node_day else math.inf
    spread = 0.5 * all_reduce_seconds(size, calls, num_gpus, cluster)  # every tensor is sent to all by the rank that read it
    recovery = RECOVERY_SECONDS + 60 * cluster.minutes_to_replace_node + transfer + spread
    interval = config.checkpoint_every * step_seconds
    best = max(best_interval(stall, between), transfer)  # the next one waits for the upload of the one before
    return Faults(
        size, stall, transfer, interval, best, between / 3600, recovery,
        useful_share(interval, stall, transfer, recovery, between),
        useful_share(best, stall, transfer, recovery, between),
    )  # fmt: skip


def best_interval(stall: float, between_failures: float) -> float:
    """Seconds of training from one checkpoint to the next, to lose least: Daly's (Future Generation Computer Systems 22, 2006),
    whose first term is Young's (Communications of the ACM 17, 1974), sqrt(2 C M)."""
    if stall >= 2 * between_failures:
        return between_failures
    if math.isinf(between_failures):
        return math.inf
    x = stall / (2 * between_failures)
    return math.sqrt(2 * stall * between_failures) * (1 + math.sqrt(x) / 3 + x / 9) - stall


def useful_share(interval: float, stall: float, upload: float, recovery: float, between_failures: float) -> float:
    """Of the time, first order: a checkpoint's stall in every interval (and the wait where the upload takes longer than that),
    and after a failure half an interval, what was trained while the last checkpoint was on its way, and the recovery."""
    if math.isinf(interval):
        return 1.0
    training = interval / (max(interval, upload) + stall)
    lost = (interval / 2 + upload + stall + recovery) / between_failures
    return max(0.0, training * (1 - lost))
