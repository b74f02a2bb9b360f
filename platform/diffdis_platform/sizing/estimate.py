"""A run on a number of GPUs: its rate and what bounds it, memory, faults, storage and cost. Pure arithmetic."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from diffdis_platform.config.sizing import SizingConfig
from diffdis_platform.sizing import measured
from diffdis_platform.sizing.checkpoints import DAY, Faults, faults
from diffdis_platform.sizing.counts import Counts, count
from diffdis_platform.sizing.memory import Memory, memory
from diffdis_platform.sizing.network import Traffic, traffic
from ray_platform.train.config import BatchPlan, TrainConfig

_KEY_AND_CAPTION = 100.0  # bytes of a precomputed row besides its tensors, about
_SECONDS_A_MONTH = 30.44 * DAY


@dataclass(frozen=True)
class Step:
    """Seconds of one optimiser step."""

    computing: float  # on the GPU
    issuing: float  # on its host, at the same time
    encoding: float  # of live inputs
    traffic: Traffic
    network: float  # what is not hidden

    @property
    def busy(self) -> float:
        return max(self.computing, self.issuing)

    @property
    def seconds(self) -> float:
        return self.busy + self.encoding + self.network


@dataclass(frozen=True)
class Inputs:
    """What the data asks for."""

    sample_bytes: float  # read
    core_seconds: float  # a sample
    cores: float  # at the run's rate
    spare_cores: float  # of the GPU nodes
    cpu_nodes: int
    node_gb_per_second: float  # read by each node


@dataclass(frozen=True)
class Storage:
    """Terabytes."""

    shards: float
    precomputed: float
    checkpoints: float


@dataclass(frozen=True)
class Cost:
    gpu_hours: float
    gpus: float
    cpu_nodes: float
    storage: float  # for as long as the run takes
    precompute_gpu_hours: float  # once for all epochs and runs

    @property
    def total(self) -> float:
        return self.gpus + self.cpu_nodes + self.storage


@dataclass(frozen=True)
class Estimate:
    """All of it, for one number of GPUs."""

    num_gpus: int
    global_batch_size: int
    step: Step
    rates: dict[str, float]  # samples/s that each part could do by itself
    samples_per_second: float
    bound: str  # what to relieve first
    scaling: float  # rate a GPU, in share of what compute alone would give
    inputs: Inputs
    memory: Memory
    fits: bool
    faults: Faults
    days: float  # of all epochs, with what faults take
    storage: Storage
    cost: Cost


def estimate(config: SizingConfig) -> tuple[Counts, list[Estimate]]:
    """Raises ConfigError for a recipe that cannot be built."""
    train = config.pretrain.train
    plans = [_plan(train, n) for n in config.num_gpus]
    counts = count(config.pretrain, max(plan.num_micro_batches for plan in plans))
    return counts, [_estimate(config, counts, plan) for plan in plans]


def _plan(train: TrainConfig, num_gpus: int) -> BatchPlan:
    return BatchPlan.of(train.global_batch_size or num_gpus * train.micro_batch_size, num_gpus, train.micro_batch_size)


def _estimate(config: SizingConfig, counts: Counts, plan: BatchPlan) -> Estimate:
    n, cluster, live = plan.world_size, config.cluster, config.inputs == "live"
    train = replace(config.pretrain.train, num_workers=n, micro_batch_size=plan.micro_batch_size, global_batch_size=0)
    step = step_of(config, counts, plan, train)
    samples = plan.global_batch_size
    wanted = samples / step.seconds
    inputs = _inputs(config, counts, n, wanted)
    rates = {
        "compute": samples / (step.busy + step.encoding),
        "network": samples / step.seconds,
        "decoding" if live else "reading": inputs.spare_cores / inputs.core_seconds,
        "S3": (cluster.num_nodes(n) + inputs.cpu_nodes) * 1e9 * cluster.s3_gb_per_second / inputs.sample_bytes,
    }
    rate = min(wanted, rates["S3"])  # CPU nodes are added as decoding asks for them
    lost = faults(counts, train, n, samples / rate, cluster)
    seconds = config.epochs * config.data.pairs / (rate * lost.useful_share) if lost.useful_share else float("inf")
    held = memory(counts, train, plan, live)
    storage = _storage(config, counts, lost)
    return Estimate(
        num_gpus=n,
        global_batch_size=samples,
        step=step,
        rates=rates,
        samples_per_second=rate,
        bound=_bound(rates, step),
        scaling=rate / rates["compute"],
        inputs=inputs,
        memory=held,
        fits=held.total <= 1e9 * cluster.gpu_memory_gb * (1 - cluster.memory_reserve),
        faults=lost,
        days=seconds / DAY,
        storage=storage,
        cost=_cost(config, counts, n, inputs.cpu_nodes, storage, seconds),
    )


def step_of(config: SizingConfig, counts: Counts, plan: BatchPlan, train: TrainConfig) -> Step:
    cluster, objective = config.cluster, config.pretrain.objective
    computing = plan.samples * counts.executed_flops / cluster.flops
    passes = plan.num_micro_batches * (2 if objective.task == "joint" else 1) * counts.executed_flops / counts.flops
    issuing = passes * counts.num_tensors * 1e-6 * cluster.issue_us
    encoding = plan.samples * counts.encoders.flops / cluster.encoder_flops if config.inputs == "live" else 0.0
    sent = traffic(counts, train, plan, objective.task != "generation", objective.num_draws, cluster)
    # Two thirds of the operations are the backward pass's.
    hidden = min(cluster.overlap * sent.backward, max(computing, issuing) * 2 / 3)
    return Step(computing, issuing, encoding, sent, sent.backward - hidden + sent.exposed)


def _bound(rates: dict[str, float], step: Step) -> str:
    """What is slowest; the network where it takes longer than computing does; the host where its GPU waits for it."""
    slowest = min(("decoding", "reading", "S3"), key=lambda name: rates.get(name, float("inf")))
    if rates[slowest] < rates["network"]:
        return slowest
    if step.network > step.busy + step.encoding:
        return "network"
    return "host" if step.issuing > step.computing + step.encoding else "compute"


def _inputs(config: SizingConfig, counts: Counts, num_gpus: int, rate: float) -> Inputs:
    cluster, data = config.cluster, config.data
    if config.inputs == "live":
        size = data.pair_bytes
        core_seconds = measured.live_core_seconds(data.shard_px, config.pretrain.data.image_size, size)
    else:
        size = counts.row_bytes + _KEY_AND_CAPTION
        core_seconds = measured.precomputed_core_seconds(size)
    cores, nodes = rate * core_seconds, cluster.num_nodes(num_gpus)
    spare = max(0.0, nodes * cluster.cpus_per_gpu_node - num_gpus * config.pretrain.train.cpus_per_worker)
    cpu_nodes = -int(-max(0.0, cores - spare) // cluster.cpus_per_cpu_node)
    return Inputs(size, core_seconds, cores, spare, cpu_nodes, rate * size / (nodes + cpu_nodes) / 1e9)


def _storage(config: SizingConfig, counts: Counts, lost: Faults) -> Storage:
    train, pairs = config.pretrain.train, config.data.pairs
    kept = train.keep_checkpoints + bool(train.keep_best) + 1  # and the one that is being written
    precomputed = pairs * (counts.row_bytes + _KEY_AND_CAPTION) if config.inputs == "precomputed" else 0.0
    return Storage(pairs * config.data.pair_bytes / 1e12, precomputed / 1e12, kept * lost.checkpoint_bytes / 1e12)


def _cost(config: SizingConfig, counts: Counts, num_gpus: int, cpu_nodes: int, storage: Storage, seconds: float) -> Cost:
    cluster, hours = config.cluster, seconds / 3600
    kept = storage.checkpoints + (storage.shards if config.inputs == "live" else storage.precomputed)
    once = config.data.pairs * counts.encoders.flops / cluster.encoder_flops / 3600
    return Cost(
        gpu_hours=num_gpus * hours,
        gpus=num_gpus * hours * cluster.gpu_hour,
        cpu_nodes=cpu_nodes * hours * cluster.cpu_node_hour,
        storage=kept * cluster.storage_tb_month * seconds / _SECONDS_A_MONTH,
        precompute_gpu_hours=once if config.inputs == "precomputed" else 0.0,
    )


def as_json(config: SizingConfig, counts: Counts, estimates: list[Estimate]) -> dict[str, Any]:
    return {
        "dataset": config.dataset,
        "inputs": config.inputs,
        "epochs": config.epochs,
        "counts": asdict(counts),
        "cluster": asdict(config.cluster),
        "data": asdict(config.data),
        "estimates": [asdict(e) | {"total_cost": e.cost.total, "seconds_a_step": e.step.seconds} for e in estimates],
    }
