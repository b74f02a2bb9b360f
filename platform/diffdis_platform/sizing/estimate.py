"""Prediction for a run on a number of GPUs: throughput and its bottleneck, memory, failures, storage and cost.

A collective over n ranks on S bytes takes, when bandwidth bounds it, 2 (n - 1) / n S / B for an all-reduce, and half of that for
an all-gather or reduce-scatter (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009; B is nccl-tests' bus bandwidth),
plus 2, or 1, times log2(n) latencies, as in a tree. ZeRO 1 and 2 move twice the bytes of the gradients per step, ZeRO 3 three
times (Rajbhandari et al., arXiv 1910.02054, sections 5 and 7). Weights and gradients have the precision of the run, the optimizer
float32.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.sizing.config import Constants, DatasetSize, SizingConfig
from diffdis_platform.sizing.counts import HALF, Counts
from ray_platform.placement import PEAK_FLOPS
from ray_platform.terminal import render_table
from ray_platform.train.config import BatchPlan, TrainConfig, ZeroStage

FULL = 4  # bytes of a number
_DAY = 86_400.0  # seconds
_DEEPSPEED_LAUNCHES = {0: 0, 1: 1, 2: 2, 3: 2}  # by stage, per parameter tensor and micro-batch: tests/benchmarks/host_step.py
_KEY_AND_CAPTION_BYTES = 100.0  # of a precomputed row, in addition to its tensors; approximate
_LOADER_PX, _LOADER_TARGET_PX = 448, 256  # of the files and the outputs in tests/benchmarks/loader.py


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


@dataclass(frozen=True)
class SmallerRun:
    """Settings that need less memory."""

    zero_stage: ZeroStage
    micro_batch_size: int


@dataclass(frozen=True)
class Traffic:
    """Communication of one rank in one step."""

    backward: float  # seconds that the backward pass may hide
    exposed: float  # seconds that nothing hides
    contrastive: float  # seconds of the gathers of InfoNCE, which are exposed
    bytes_sent: float  # of gradients and weights


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


@dataclass(frozen=True)
class Estimate:
    """Prediction for one number of GPUs. Times of a step are seconds, prices are in the currency of the constants."""

    num_gpus: int
    global_batch_size: int
    samples_per_second: float
    scaling: float  # throughput per GPU, as a fraction of that without communication
    bound: str  # bottleneck: compute, host, network, decoding, reading or S3
    days: float  # of all epochs, with checkpoints and failures
    cost: float
    gpu_hours: float
    precompute_gpu_hours: float  # once for all epochs and runs
    step_seconds: float
    compute_seconds: float
    issue_seconds: float  # of the host, in parallel with the GPU
    encode_seconds: float  # of live inputs
    network_seconds: float  # not hidden
    traffic: Traffic
    input_cores: float  # that decode or read
    spare_cores: float  # on the GPU nodes
    cpu_nodes: int  # to add
    node_gb_per_second: float  # read by each node
    memory: Memory
    fits: bool
    would_fit: SmallerRun | None  # if it does not
    faults: Faults
    shards_tb: float
    precomputed_tb: float
    checkpoints_tb: float


def estimate(config: SizingConfig, run: PretrainConfig, counts: Counts, plan: BatchPlan) -> Estimate:
    """Return the prediction for the number of GPUs and the micro-batches of `plan`."""
    n, live, c = plan.world_size, config.inputs == "live", config.all_constants()
    train = replace(run.train, num_workers=n, micro_batch_size=plan.micro_batch_size, global_batch_size=0)
    data, peak, task = config.data(run.model.image_size), PEAK_FLOPS[config.gpu], run.objective.task

    # A step: the GPU computes while its host issues the kernels; the network partly hides behind the backward pass.
    compute = plan.samples * counts.executed_flops / (peak * c.mfu)
    issue = 1e-6 * c.launch_us * launches(counts, train, plan)
    encode = plan.samples * counts.encoders.flops / (peak * c.encoder_mfu) if live else 0.0
    sent = _traffic(counts, train, plan, 0 if task == "generation" else run.objective.num_draws, c)
    hidden = min(c.overlap * sent.backward, max(compute, issue) * 2 / 3)  # two thirds of the operations are backward
    network = sent.backward - hidden + sent.exposed
    busy = max(compute, issue) + encode
    wanted = plan.global_batch_size / (busy + network)

    # Inputs: decoding uses the spare cores of the GPU nodes, and CPU nodes for the rest.
    sample_bytes, core_seconds = _sample_cost(counts, data, live, run.data.image_size, c)
    nodes = c.num_nodes(n)
    spare = max(0.0, nodes * c.cpus_per_gpu_node - n * train.cpus_per_worker)
    cpu_nodes = -int(-max(0.0, wanted * core_seconds - spare) // c.cpus_per_cpu_node)
    s3_rate = (nodes + cpu_nodes) * 1e9 * c.s3_gb_per_second / sample_bytes
    rate = min(wanted, s3_rate)
    input_rate, slowest_input = min((spare / core_seconds, "decoding" if live else "reading"), (s3_rate, "S3"))
    slowest_part = "network" if network > busy else "host" if issue > compute + encode else "compute"

    lost = _faults(counts, train, n, plan.global_batch_size / rate, c)
    seconds = config.epochs * data.num_pairs / (rate * lost.useful_fraction) if lost.useful_fraction else math.inf
    held, available = memory(counts, train, plan, live), 1e9 * c.gpu_memory_gb * (1 - c.memory_reserve)
    kept = train.max_checkpoints + 1  # and the one that is being written
    checkpoints, shards = kept * lost.checkpoint_bytes / 1e12, data.num_pairs * data.pair_bytes / 1e12
    precomputed = 0.0 if live else data.num_pairs * sample_bytes / 1e12
    storage = (checkpoints + (shards if live else precomputed)) * c.storage_tb_month * seconds / (30.44 * _DAY)
    return Estimate(
        num_gpus=n,
        global_batch_size=plan.global_batch_size,
        samples_per_second=rate,
        scaling=rate * busy / plan.global_batch_size,
        bound=slowest_input if input_rate < wanted else slowest_part,
        days=seconds / _DAY,
        cost=(n * c.gpu_hour + cpu_nodes * c.cpu_node_hour) * seconds / 3600 + storage,
        gpu_hours=n * seconds / 3600,
        precompute_gpu_hours=0.0 if live else data.num_pairs * counts.encoders.flops / (peak * c.encoder_mfu) / 3600,
        step_seconds=busy + network,
        compute_seconds=compute,
        issue_seconds=issue,
        encode_seconds=encode,
        network_seconds=network,
        traffic=sent,
        input_cores=wanted * core_seconds,
        spare_cores=spare,
        cpu_nodes=cpu_nodes,
        node_gb_per_second=wanted * sample_bytes / (nodes + cpu_nodes) / 1e9,
        memory=held,
        fits=held.total <= available,
        would_fit=smaller_run(counts, train, plan, live, available) if held.total > available else None,
        faults=lost,
        shards_tb=shards,
        precomputed_tb=precomputed,
        checkpoints_tb=checkpoints,
    )


def launches(counts: Counts, train: TrainConfig, plan: BatchPlan) -> int:
    """Return the kernels that the host launches in a step, without the few dozen of an update on flat tensors."""
    of_deepspeed = _DEEPSPEED_LAUNCHES[train.zero_stage] * counts.num_tensors
    return plan.num_micro_batches * (counts.launches + of_deepspeed)


def memory(counts: Counts, train: TrainConfig, plan: BatchPlan, live: bool) -> Memory:
    """Return the bytes on one GPU.

    With w = 2 or 4 bytes per trained parameter in `train.precision`, W = 4, n ranks, and k = 2 moments (3 with an EMA; 1.5 less
    if they have 8 bits), the states are: stage 0: w weights + the gradients, at most 2 w or w + W, + W master weights in half
    precision + k W; 1 and 2: w + (w gradients + W gradients + W master weights + k W) / n; 3: (w + w gradients + W master
    weights + k W) / n, and up to `stage3_max_live_parameters` of other ranks' weights. 0 and 1 take W more when gradients are
    accumulated over micro-batches. Offloading moves master weights and moments to the host. The buffers are DeepSpeed's
    buckets: two if stage 2 overlaps.
    """
    n, stage, width = plan.world_size, train.zero_stage, number_bytes(train)
    trained, weights, frozen = FULL * counts.trained, width * counts.trained, width * counts.frozen
    is_half = width < FULL
    optimizer = ((0.5 if train.optimizer == "adamw_8bit" else 2) + len(train.ema_states)) * trained
    sharded = 0 if train.offload_optimizer else (trained + optimizer) / n
    accumulated = trained if stage < 2 and plan.num_micro_batches > 1 else 0
    gathered, buffers = 0.0, width * _reduce_bucket_size(train)
    if stage == 0:
        gradients = weights + (trained if is_half else weights)
        states: float = weights + gradients + accumulated + is_half * trained + optimizer + frozen
        buffers = 0.0
    elif stage < 3:
        states = weights + accumulated + (weights + is_half * trained) / n + sharded + frozen
        buffers *= 2 if _zero_setting(train, "overlap_comm", stage == 2) else 1
    else:
        states = 2 * weights / n + sharded + frozen / n
        live_parameters = _zero_setting(train, "stage3_max_live_parameters", 1e9)
        gathered = width * min(counts.trained + counts.frozen, live_parameters) * (n - 1) / n
    activations = max(counts.activation_bytes, counts.encoders.peak_bytes if live else 0)
    return Memory(states + gathered, buffers, activations, counts.encoders.weight_bytes)


def smaller_run(counts: Counts, train: TrainConfig, plan: BatchPlan, live: bool, available: float) -> SmallerRun | None:
    """Return the largest micro-batch that fits into `available` bytes with the same global batch, and the lowest ZeRO stage with
    which it does, because each stage has more launches than the one below it. None: nothing fits.

    ZeRO 3 is tried only for a run that has it: it communicates half as much again. Activations are taken as proportional to the
    micro-batch.
    """
    stages: list[ZeroStage] = [stage for stage in (0, 1, 2) if stage >= train.zero_stage] or [train.zero_stage]
    if train.channels_last:
        stages = [0]
    for size in (size for size in range(plan.micro_batch_size, 0, -1) if plan.samples % size == 0):
        smaller, ratio = BatchPlan(plan.world_size, size, plan.samples // size), size / plan.micro_batch_size
        encoders = replace(counts.encoders, peak_bytes=int(counts.encoders.peak_bytes * ratio))
        scaled = replace(counts, activation_bytes=int(counts.activation_bytes * ratio), encoders=encoders)
        for stage in stages:
            if memory(scaled, replace(train, zero_stage=stage), smaller, live).total <= available:
                return SmallerRun(stage, size)
    return None


def number_bytes(train: TrainConfig) -> int:
    """Return the bytes of a weight or a gradient in the module and on the network."""
    return FULL if train.precision == "fp32" else HALF


def _zero_setting(train: TrainConfig, name: str, default: Any) -> Any:
    """Return a setting of ZeRO, or DeepSpeed's default."""
    return train.deepspeed.get("zero_optimization", {}).get(name, default)


def _reduce_bucket_size(train: TrainConfig) -> float:
    return float(_zero_setting(train, "reduce_bucket_size", 5e8))


def _sample_cost(counts: Counts, data: DatasetSize, live: bool, target_px: int, c: Constants) -> tuple[float, float]:
    """Return the bytes of a sample on S3, and the core seconds to read and decode it.

    The decoder's part of the measured rate scales with the pixels of the file, and the rest (tar, copies) with those of the
    output.
    """

    def decoder_ms(px: float) -> float:
        return c.decode_ms + c.decode_ms_per_megapixel * (px / 1000) ** 2

    if live:
        size = data.pair_bytes
        decoder = decoder_ms(data.shard_px) / decoder_ms(_LOADER_PX) / c.decoder_images_per_core
        rest = (1 / c.stream_images_per_core - 1 / c.decoder_images_per_core) * (target_px / _LOADER_TARGET_PX) ** 2
        seconds = decoder + rest
    else:
        size = counts.row_bytes + _KEY_AND_CAPTION_BYTES
        seconds = 1e-6 * size / c.precomputed_mb_per_core
    return size, seconds + 1e-9 * size * c.s3_read_seconds_per_gb


def _gather_seconds(size: float, calls: float, num_gpus: int, c: Constants) -> float:
    """Return the seconds of an all-gather, or a reduce-scatter, of `size` bytes in total; an all-reduce takes twice as long."""
    if num_gpus == 1:
        return 0.0
    return (num_gpus - 1) / num_gpus * size / c.bandwidth(num_gpus) + calls * math.log2(num_gpus) * c.latency_us * 1e-6


def _traffic(counts: Counts, train: TrainConfig, plan: BatchPlan, num_draws: int, c: Constants) -> Traffic:
    """Return the communication of a step; without `num_draws`, no InfoNCE is computed.

    InfoNCE gathers queries and caption ids once per micro-batch, and all-reduces a [draws, B] of 8 bytes.
    """
    n, size, k = plan.world_size, number_bytes(train) * counts.trained, plan.num_micro_batches
    batch = plan.micro_batch_size * n
    rows = _gather_seconds(batch * (FULL * counts.embedding_dim + 8), 1, n, c)
    info = k * (rows + 2 * _gather_seconds(8 * num_draws * batch, 1, n, c)) if num_draws else 0.0
    sent = (n - 1) / n * size
    half = _gather_seconds(size, math.ceil(counts.trained / _reduce_bucket_size(train)), n, c)
    if train.zero_stage == 0:  # one all-reduce after the backward pass, in float32 if gradients were accumulated
        wider = FULL / number_bytes(train) if k > 1 else 1.0
        return Traffic(0.0, 2 * wider * _gather_seconds(size, 1, n, c) + info, info, 2 * wider * sent)
    if train.zero_stage == 1:  # gradients once per step, after the backward pass; then the weights
        return Traffic(0.0, 2 * half + info, info, 2 * sent)
    if train.zero_stage == 2:  # gradients at every micro-batch
        return Traffic(k * half, half + info, info, (k + 1) * sent)
    # Weights for both passes, fetched ahead; a call for nearly every tensor.
    weights = _gather_seconds(size, counts.num_tensors / 2, n, c)
    return Traffic(k * (2 * weights + half), info, info, 3 * k * sent)


def checkpoint_bytes(counts: Counts, train: TrainConfig) -> float:
    """Return the bytes of trained weights, two moments and the EMA, and of frozen weights; float32."""
    return FULL * ((3 + len(train.ema_states)) * counts.trained + counts.frozen)


def _faults(counts: Counts, train: TrainConfig, num_gpus: int, step_seconds: float, c: Constants) -> Faults:
    size, nodes = checkpoint_bytes(counts, train), c.num_nodes(num_gpus)
    stall = size / num_gpus / (1e9 * c.host_copy_gb_per_second)  # every rank copies what it updates
    upload = max(size / nodes / (1e9 * c.s3_gb_per_second), size / num_gpus / (1e6 * c.upload_mb_per_second))
    between = _DAY / (nodes * c.failures_per_node_day) if c.failures_per_node_day else math.inf
    # The ranks that read a tensor send it to all others.
    sending = _gather_seconds(size, (3 + len(train.ema_states)) * counts.num_tensors, num_gpus, c)
    recovery = c.recovery_seconds + 60 * c.minutes_to_replace_node + upload + sending
    interval = train.checkpoint_every * step_seconds
    best = max(best_interval(stall, between), upload)  # the next checkpoint waits for the upload of the previous one
    useful, best_useful = (useful_fraction(every, stall, upload, recovery, between) for every in (interval, best))
    return Faults(size, stall, upload, interval, best, between / 3600, recovery, useful, best_useful)


def best_interval(stall: float, between_failures: float) -> float:
    """Return the seconds of training between checkpoints that lose the least: Daly's (Future Generation Computer Systems 22,
    2006), whose first term is Young's (Communications of the ACM 17, 1974), sqrt(2 C M)."""
    if stall >= 2 * between_failures or math.isinf(between_failures):
        return between_failures
    x = stall / (2 * between_failures)
    return math.sqrt(2 * stall * between_failures) * (1 + math.sqrt(x) / 3 + x / 9) - stall


def useful_fraction(interval: float, stall: float, upload: float, recovery: float, between_failures: float) -> float:
    """Return the fraction of the time that advances the run, to first order: each interval has a stall (and a wait if the upload
    takes longer), and a failure costs half an interval, the training during the last upload, and the recovery."""
    if math.isinf(interval):
        return 1.0
    training = interval / (max(interval, upload) + stall)
    return max(0.0, training * (1 - (interval / 2 + upload + stall + recovery) / between_failures))


def as_json(config: SizingConfig, counts: Counts, estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Return all figures, and the configuration and the constants that they follow from."""
    return {
        "config": asdict(config), "constants": asdict(config.all_constants()), "counts": asdict(counts),
        "estimates": [asdict(e) for e in estimates],
    }  # fmt: skip


def report(config: SizingConfig, counts: Counts, estimates: Sequence[Estimate]) -> str:
    """Return the summary for the terminal, with a column for each number of GPUs."""
    train, c, gb = config.run().train, config.all_constants(), 1e9
    head = [
        f"model: {counts.trained / 1e6:,.1f} M parameters trained, {counts.frozen / 1e6:,.1f} M frozen, encoders "
        f"{counts.encoders.parameters / 1e6:,.1f} M; {counts.flops / 1e12:.3g} TFLOP/sample "
        f"({counts.executed_flops / 1e12:.3g} executed), encoders {counts.encoders.flops / 1e12:.3g}",
        f"run: {config.epochs:g} epochs of {config.data(0).num_pairs:,.0f} pairs, {config.inputs} inputs; "
        f"ZeRO {train.zero_stage}, {train.micro_batch_size} samples per GPU, {train.precision}",
        f"assumed: {config.gpu} with {c.gpu_memory_gb:g} GB at {c.mfu:.1%} of {PEAK_FLOPS[config.gpu] / 1e12:,.0f} TFLOP/s "
        f"and {c.gpu_hour:g} per hour, {c.network_gb_per_second:g} GB/s per node",
    ]
    rows = [
        ["GPUs", *(f"{e.num_gpus:,}" for e in estimates)],
        ["samples/s", *(_number(e.samples_per_second) for e in estimates)],
        ["fraction of linear scaling", *(f"{e.scaling:.2f}" for e in estimates)],
        ["bottleneck", *(e.bound for e in estimates)],
        ["days", *(_number(e.days) for e in estimates)],
        ["cost", *(_number(e.cost) for e in estimates)],
        ["GPU hours", *(_number(e.gpu_hours) for e in estimates)],
        ["GPU hours to precompute, once", *(_number(e.precompute_gpu_hours) for e in estimates)],
        ["global batch size", *(f"{e.global_batch_size:,}" for e in estimates)],
        ["step, s: compute", *(_number(e.compute_seconds) for e in estimates)],
        ["  host, in parallel", *(_number(e.issue_seconds) for e in estimates)],
        ["  encoding inputs", *(_number(e.encode_seconds) for e in estimates)],
        ["  network, not hidden", *(_number(e.network_seconds) for e in estimates)],
        ["cores for inputs", *(_number(e.input_cores) for e in estimates)],
        ["CPU nodes to add", *(f"{e.cpu_nodes:,}" for e in estimates)],
        ["read from S3 per node, MB/s", *(_number(e.node_gb_per_second * 1e3) for e in estimates)],
        ["memory per GPU, GB", *(f"{e.memory.total / gb:.1f}{'' if e.fits else ' (too much)'}" for e in estimates)],
        ["  fits with ZeRO stage, samples", *("" if e.fits else _settings(e.would_fit) for e in estimates)],
        ["checkpoint, GB", *(_number(e.faults.checkpoint_bytes / gb) for e in estimates)],
        ["  training pauses for, s", *(_number(e.faults.stall_seconds) for e in estimates)],
        ["  every, min", *(_number(e.faults.interval_seconds / 60) for e in estimates)],
        ["  best every, min", *(_number(e.faults.best_interval_seconds / 60) for e in estimates)],
        ["time lost to checkpoints and failures", *(f"{1 - e.faults.useful_fraction:.2%}" for e in estimates)],
        ["storage, TB: shards", *(_number(e.shards_tb) for e in estimates)],
        ["  precomputed inputs", *(_number(e.precomputed_tb) for e in estimates)],
        ["  checkpoints", *(_number(e.checkpoints_tb) for e in estimates)],
    ]
    rows = [row for row in rows if any(row[1:])]  # without the smaller runs, if all fit
    return "\n".join([*head, "", render_table(rows)])


def _settings(run: SmallerRun | None) -> str:
    return f"{run.zero_stage}, {run.micro_batch_size}" if run else "none"


def _number(value: float) -> str:
    """Return three significant digits."""
    if value == 0 or value == math.inf:
        return "0" if not value else "∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
