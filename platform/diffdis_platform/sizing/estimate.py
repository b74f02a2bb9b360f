"""Prediction for a run on a number of GPUs: throughput and its bottleneck, memory, failures, storage and cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.sizing.config import SizingConfig
from diffdis_platform.sizing.constants import DAY, Constants, DatasetSize
from diffdis_platform.sizing.counts import Counts, count
from diffdis_platform.sizing.model import Faults, Memory, Traffic, faults, memory, traffic
from ray_platform.contracts import ConfigError
from ray_platform.terminal import render_table
from ray_platform.train.config import BatchPlan
from ray_platform.train.throughput import PEAK_FLOPS

_KEY_AND_CAPTION_BYTES = 100.0  # of a precomputed row, in addition to its tensors; approximate
_SECONDS_PER_MONTH = 30.44 * DAY
_LOADER_PX, _LOADER_TARGET_PX = 448, 256  # of the files and the outputs in tests/benchmarks/loader.py


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
    faults: Faults
    shards_tb: float
    precomputed_tb: float
    checkpoints_tb: float


def estimate(config: SizingConfig) -> tuple[Counts, list[Estimate]]:
    """Return the counts of the model, and a prediction for each number of GPUs. Raises ConfigError."""
    if config.gpu not in PEAK_FLOPS:
        raise ConfigError(f"gpu: {config.gpu} is unknown; choose one of {', '.join(PEAK_FLOPS)}")
    run = config.run()
    size = run.train.micro_batch_size
    plans = [BatchPlan.of(run.train.global_batch_size or n * size, n, size) for n in config.num_gpus]
    counts = count(run, max(plan.num_micro_batches for plan in plans))
    return counts, [_estimate(config, run, counts, plan) for plan in plans]


def _estimate(config: SizingConfig, run: PretrainConfig, counts: Counts, plan: BatchPlan) -> Estimate:
    n, live, c = plan.world_size, config.inputs == "live", Constants().with_values(config.constants)
    train = replace(run.train, num_workers=n, micro_batch_size=plan.micro_batch_size, global_batch_size=0)
    data, peak = config.data(run.model.image_size), PEAK_FLOPS[config.gpu]

    # A step: the GPU computes while its host issues the kernels; the network partly hides behind the backward pass.
    compute = plan.samples * counts.executed_flops / (peak * c.mfu)
    passes = plan.num_micro_batches * (2 if run.objective.task == "joint" else 1) * counts.executed_flops / counts.flops
    issue = passes * counts.num_tensors * 1e-6 * c.issue_us
    encode = plan.samples * counts.encoders.flops / (peak * c.encoder_mfu) if live else 0.0
    sent = traffic(counts, train, plan, run.objective.task != "generation", run.objective.num_draws, c)
    hidden = min(c.overlap * sent.backward, max(compute, issue) * 2 / 3)  # two thirds of the operations are backward
    network = sent.backward - hidden + sent.exposed
    busy = max(compute, issue) + encode
    wanted = plan.global_batch_size / (busy + network)

    # Inputs: decoding uses the spare cores of the GPU nodes, and CPU nodes for the rest.
    sample_bytes = data.pair_bytes if live else counts.row_bytes + _KEY_AND_CAPTION_BYTES
    core_seconds = live_core_seconds(data, run.data.image_size, c) if live else precomputed_core_seconds(sample_bytes, c)
    nodes = c.num_nodes(n)
    spare = max(0.0, nodes * c.cpus_per_gpu_node - n * train.cpus_per_worker)
    cpu_nodes = -int(-max(0.0, wanted * core_seconds - spare) // c.cpus_per_cpu_node)
    s3_rate = (nodes + cpu_nodes) * 1e9 * c.s3_gb_per_second / sample_bytes
    rate = min(wanted, s3_rate)
    input_rates = {"decoding" if live else "reading": spare / core_seconds, "S3": s3_rate}

    lost = faults(counts, train, n, plan.global_batch_size / rate, c)
    seconds = config.epochs * data.num_pairs / (rate * lost.useful_fraction) if lost.useful_fraction else float("inf")
    held = memory(counts, train, plan, live)
    kept = train.keep_checkpoints + bool(train.keep_best) + 1  # and the one that is being written
    shards, checkpoints = data.num_pairs * data.pair_bytes / 1e12, kept * lost.checkpoint_bytes / 1e12
    precomputed = 0.0 if live else data.num_pairs * sample_bytes / 1e12
    storage = (checkpoints + (shards if live else precomputed)) * c.storage_tb_month * seconds / _SECONDS_PER_MONTH
    return Estimate(
        num_gpus=n,
        global_batch_size=plan.global_batch_size,
        samples_per_second=rate,
        scaling=rate * busy / plan.global_batch_size,
        bound=_bottleneck(input_rates, wanted, network > busy, issue > compute + encode),
        days=seconds / DAY,
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
        fits=held.total <= 1e9 * c.gpu_memory_gb * (1 - c.memory_reserve),
        faults=lost,
        shards_tb=shards,
        precomputed_tb=precomputed,
        checkpoints_tb=checkpoints,
    )


def _bottleneck(input_rates: dict[str, float], wanted: float, network_is_slower: bool, host_is_slower: bool) -> str:
    slowest = min(input_rates, key=lambda name: input_rates[name])
    if input_rates[slowest] < wanted:
        return slowest
    return "network" if network_is_slower else "host" if host_is_slower else "compute"


def live_core_seconds(data: DatasetSize, target_px: int, c: Constants) -> float:
    """Return the core seconds to read a pair from S3 and decode it. The decoder's part of the measured rate scales with the
    pixels of the file, and the rest (tar, copies) with those of the output."""

    def decoder_ms(px: float) -> float:
        return c.decode_ms + c.decode_ms_per_megapixel * (px / 1000) ** 2

    decoder = decoder_ms(data.shard_px) / decoder_ms(_LOADER_PX) / c.decoder_images_per_core
    rest = (1 / c.stream_images_per_core - 1 / c.decoder_images_per_core) * (target_px / _LOADER_TARGET_PX) ** 2
    return decoder + rest + 1e-9 * data.pair_bytes * c.s3_read_seconds_per_gb


def precomputed_core_seconds(row_bytes: float, c: Constants) -> float:
    """Return the core seconds to read a precomputed sample from S3."""
    return row_bytes * (1e-6 / c.precomputed_mb_per_core + 1e-9 * c.s3_read_seconds_per_gb)


def as_json(config: SizingConfig, counts: Counts, estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Return all figures, and the configuration and the constants that they follow from."""
    constants = asdict(Constants().with_values(config.constants))
    return {
        "config": asdict(config), "constants": constants, "counts": asdict(counts), "estimates": [asdict(e) for e in estimates],
    }  # fmt: skip


def report(config: SizingConfig, counts: Counts, estimates: Sequence[Estimate]) -> str:
    """Return the summary for the terminal, with a column for each number of GPUs."""
    train, c, gb = config.run().train, Constants().with_values(config.constants), 1e9
    pairs = config.num_pairs or config.data(0).num_pairs
    head = [
        f"model: {counts.trained / 1e6:,.1f} M parameters trained, {counts.frozen / 1e6:,.1f} M frozen, encoders "
        f"{counts.encoders.parameters / 1e6:,.1f} M; {counts.flops / 1e12:.3g} TFLOP per sample "
        f"({counts.executed_flops / 1e12:.3g} executed), encoders {counts.encoders.flops / 1e12:.3g}",
        f"run: {config.epochs:g} epochs of {pairs:,.0f} pairs, {config.inputs} inputs; ZeRO {train.zero_stage}, "
        f"{train.micro_batch_size} samples per GPU, {train.precision}",
        f"assumed: {config.gpu} at {c.mfu:.1%} of {PEAK_FLOPS[config.gpu] / 1e12:,.0f} TFLOP/s, "
        f"{c.network_gb_per_second:g} GB/s per node",
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
        ["checkpoint, GB", *(_number(e.faults.checkpoint_bytes / gb) for e in estimates)],
        ["  training pauses for, s", *(_number(e.faults.stall_seconds) for e in estimates)],
        ["  every, min", *(_number(e.faults.interval_seconds / 60) for e in estimates)],
        ["  best every, min", *(_number(e.faults.best_interval_seconds / 60) for e in estimates)],
        ["time lost to checkpoints and failures", *(f"{1 - e.faults.useful_fraction:.2%}" for e in estimates)],
        ["storage, TB: shards", *(_number(e.shards_tb) for e in estimates)],
        ["  precomputed inputs", *(_number(e.precomputed_tb) for e in estimates)],
        ["  checkpoints", *(_number(e.checkpoints_tb) for e in estimates)],
    ]
    return "\n".join([*head, "", render_table(rows)])


def _number(value: float) -> str:
    """Return three significant digits."""
    if value == 0 or value == float("inf"):
        return "0" if not value else "∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
