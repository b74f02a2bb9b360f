"""Seconds that ranks spend on telling each other what they have.

A collective over n ranks of S bytes takes, where bandwidth bounds it, 2 (n - 1) / n S / B for an all-reduce, and half of that for
an all-gather or reduce-scatter (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009; B is nccl-tests' bus bandwidth). It
also takes 2, or 1, times log2(n) messages' latency, as in a tree. ZeRO 1 and 2 move twice the gradients' bytes a step, ZeRO 3
three times (Rajbhandari et al., arXiv 1910.02054, section 7), in float32 here.
"""

import math
from dataclasses import dataclass

from diffdis_platform.sizing.cluster import Cluster
from diffdis_platform.sizing.counts import FULL, Counts
from diffdis_platform.sizing.memory import bucket_numbers
from ray_platform.train.config import BatchPlan, TrainConfig


@dataclass(frozen=True)
class Traffic:
    """Of one step."""

    backward: float  # seconds that may hide behind the backward pass
    exposed: float  # seconds that nothing hides
    contrastive: float  # seconds of the InfoNCE's gathers; part of what nothing hides
    bytes_sent: float  # of gradients and weights, by a rank


def all_reduce_seconds(size: float, calls: float, num_gpus: int, cluster: Cluster) -> float:
    return 2 * gather_seconds(size, calls, num_gpus, cluster)


def gather_seconds(size: float, calls: float, num_gpus: int, cluster: Cluster) -> float:
    """Of an all-gather of `size` bytes in all, or a reduce-scatter of as many."""
    if num_gpus == 1:
        return 0.0
    moved = (num_gpus - 1) / num_gpus * size / cluster.bandwidth(num_gpus)
    return moved + calls * math.log2(num_gpus) * cluster.latency_us * 1e-6


def traffic(counts: Counts, config: TrainConfig, plan: BatchPlan, contrastive: bool, num_draws: int, cluster: Cluster) -> Traffic:
    n, size = plan.world_size, FULL * counts.trained
    buckets = math.ceil(counts.trained / bucket_numbers(config))
    info = contrastive_seconds(counts, plan, num_draws, cluster) if contrastive else 0.0
    share = (n - 1) / n * size
    half = gather_seconds(size, buckets, n, cluster)
    if config.zero_stage == 0:  # after the backward pass
        return Traffic(0.0, 2 * half + info, info, 2 * share)
    if config.zero_stage == 1:  # gradients once a step, in the last micro-batch's backward pass; then the weights
        return Traffic(half, half + info, info, 2 * share)
    if config.zero_stage == 2:  # gradients at every micro-batch
        return Traffic(plan.num_micro_batches * half, half + info, info, (plan.num_micro_batches + 1) * share)
    # Weights for both passes, fetched ahead; a call for nearly every tensor.
    weights = gather_seconds(size, counts.num_tensors / 2, n, cluster)
    hidden = plan.num_micro_batches * (2 * weights + half)
    return Traffic(hidden, info, info, 3 * plan.num_micro_batches * share)


def contrastive_seconds(counts: Counts, plan: BatchPlan, num_draws: int, cluster: Cluster) -> float:
    """A micro-batch gathers queries and caption ids twice (loss; shuffled-image control), and all-reduces two [draws, B]."""
    n, batch = plan.world_size, plan.micro_batch_size * plan.world_size
    rows = 2 * batch * (FULL * counts.embedding_dim + 8)
    seconds = gather_seconds(rows, 4, n, cluster) + all_reduce_seconds(2 * FULL * num_draws * batch, 2, n, cluster)
    return plan.num_micro_batches * seconds
