"""What jobs/sizing.py prints, as Markdown: so docs/sizing.md can show it as it is."""

from collections.abc import Callable, Sequence

from diffdis_platform.config.sizing import SizingConfig
from diffdis_platform.sizing.counts import Counts
from diffdis_platform.sizing.estimate import Estimate

Row = tuple[str, Callable[[Estimate], str]]


def report(config: SizingConfig, counts: Counts, estimates: Sequence[Estimate]) -> str:
    """The tables: what is asked, and a column for each number of GPUs."""
    return "\n".join([*_header(config, counts), "", *_table(_rows(config), estimates)])


def _header(config: SizingConfig, counts: Counts) -> list[str]:
    train, cluster, encoders = config.pretrain.train, config.cluster, counts.encoders
    sizes = f"{_millions(counts.trained)} parameters trained, {_millions(counts.frozen)} frozen"
    work = f"{counts.flops / 1e12:.3g} TFLOP, {counts.executed_flops / 1e12:.3g} executed"
    rate = f"{cluster.gpu} at {cluster.mfu:.1%} of {cluster.peak_flops / 1e12:,.0f} TFLOP/s"
    rows = [
        ("model", f"{sizes}; encoders {_millions(encoders.parameters)}"),
        ("operations a sample", f"{work}; encoders {encoders.flops / 1e12:.3g}"),
        ("inputs", f"{config.inputs}, {config.data.pairs:,.0f} pairs, {config.epochs:g} epochs"),
        ("training", f"ZeRO {train.zero_stage}, {train.micro_batch_size} samples a GPU at a time, {train.precision}"),
        ("assumed", f"{rate}, {cluster.network_gb_per_second:g} GB/s a node"),
    ]
    return ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]


def _table(rows: Sequence[Row], estimates: Sequence[Estimate]) -> list[str]:
    head = ["GPUs", *(f"{e.num_gpus:,}" for e in estimates)]
    lines = [[name, *(text(e) for e in estimates)] for name, text in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(line)} |" for line in lines)]


def _rows(config: SizingConfig) -> list[Row]:
    second = "decoding" if config.inputs == "live" else "reading"
    gb = 1e9
    return [
        ("**samples/s**", lambda e: _number(e.samples_per_second)),
        ("share of what computing alone gives", lambda e: f"{e.scaling:.2f}"),
        ("bound by", lambda e: e.bound),
        ("**days**", lambda e: _number(e.days)),
        ("**cost**", lambda e: f"{_number(e.cost.total)}"),
        ("batch", lambda e: f"{e.global_batch_size:,}"),
        ("step, s: computing", lambda e: _number(e.step.computing)),
        ("… its host's issuing, at the same time", lambda e: _number(e.step.issuing)),
        ("… encoding inputs", lambda e: _number(e.step.encoding)),
        ("… network, not hidden", lambda e: _number(e.step.network)),
        ("… of it InfoNCE", lambda e: _number(e.step.traffic.contrastive)),
        ("gradients and weights sent a GPU and step, GB", lambda e: _number(e.step.traffic.bytes_sent / gb)),
        (f"cores for {second}", lambda e: _number(e.inputs.cores)),
        ("… spare ones on the GPU nodes", lambda e: _number(e.inputs.spare_cores)),
        ("… CPU nodes to add", lambda e: f"{e.inputs.cpu_nodes:,}"),
        ("read from S3 by a node, MB/s", lambda e: _number(e.inputs.node_gb_per_second * 1e3)),
        ("memory of a GPU, GB", lambda e: f"{e.memory.total / gb:.1f}, {'fits' if e.fits else '**too much**'}"),
        ("… states and gathered weights", lambda e: _number(e.memory.states / gb)),
        ("… buckets", lambda e: _number(e.memory.buffers / gb)),
        ("… activations", lambda e: _number(e.memory.activations / gb)),
        ("… frozen encoders", lambda e: _number(e.memory.encoders / gb)),
        ("checkpoint, GB", lambda e: _number(e.faults.checkpoint_bytes / gb)),
        ("… stands still for, s", lambda e: _number(e.faults.stall_seconds)),
        ("… upload beside training, s", lambda e: _number(e.faults.upload_seconds)),
        ("… every, min", lambda e: _number(e.faults.interval_seconds / 60)),
        ("… best every, min", lambda e: _number(e.faults.best_interval_seconds / 60)),
        ("hours between failures", lambda e: _number(e.faults.hours_between_failures)),
        ("… recovery, s", lambda e: _number(e.faults.recovery_seconds)),
        ("time lost to checkpoints and failures", lambda e: f"{1 - e.faults.useful_share:.2%}"),
        ("… at the best interval", lambda e: f"{1 - e.faults.best_useful_share:.2%}"),
        ("shards, TB", lambda e: _number(e.storage.shards)),
        ("precomputed inputs, TB", lambda e: _number(e.storage.precomputed)),
        ("checkpoints kept, TB", lambda e: _number(e.storage.checkpoints)),
        ("GPU hours", lambda e: _number(e.cost.gpu_hours)),
        ("… and once to precompute", lambda e: _number(e.cost.precompute_gpu_hours)),
    ]  # fmt: skip


def _millions(number: float) -> str:
    return f"{number / 1e6:,.1f} M"


def _number(value: float) -> str:
    """Three digits, and no more than anybody reads."""
    if value == 0 or value == float("inf"):
        return "0" if not value else "∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
