"""What depends on the machines, each a field, to be given one's own value. A GPU's defaults were measured on one H100
(tests/benchmarks/accelerator.py); networks, S3, failures and prices are assumed, for no cloud was at hand."""

from dataclasses import dataclass

from ray_platform.contracts import ConfigError
from ray_platform.train.throughput import PEAK_FLOPS


@dataclass(frozen=True)
class Cluster:
    """Assumptions about machines, network, storage, failures and prices. Raises ConfigError for a value that cannot be."""

    gpu: str = "H100"  # of the table of 16 bit peaks in train/throughput.py
    # Share of the peak that the executed operations reach while the GPU is what is waited for.
    mfu: float = 0.155
    # Microseconds of the host, a parameter tensor and pass, to issue what is computed with it, forward and backward, at whatever
    # batch: a GPU that is faster waits for it.
    issue_us: float = 260.0
    encoder_mfu: float = 0.095  # share of the peak that the frozen encoders reach, which compute in float32 and TF32
    gpu_memory_gb: float = 80.0
    memory_reserve: float = 0.15  # share of it that CUDA, NCCL, cuDNN and fragmentation take
    gpus_per_node: int = 8
    cpus_per_gpu_node: int = 96
    cpus_per_cpu_node: int = 64
    # Bus bandwidth of an all-reduce, as nccl-tests prints it: within a node, and between nodes for all of a node's network cards.
    node_gb_per_second: float = 230.0
    network_gb_per_second: float = 40.0
    latency_us: float = 15.0  # of one message between two nodes
    overlap: float = 0.8  # share of what can be sent during the backward pass that is hidden behind it
    host_copy_gb_per_second: float = 2.1  # from an accelerator to its host's memory
    s3_gb_per_second: float = 2.5  # of one node
    failures_per_node_day: float = 0.0038
    minutes_to_replace_node: float = 5.0
    gpu_hour: float = 3.0  # all prices in one currency
    cpu_node_hour: float = 2.5
    storage_tb_month: float = 23.0

    def __post_init__(self) -> None:
        if self.gpu not in PEAK_FLOPS:
            raise ConfigError(f"cluster.gpu: {self.gpu} is not known; there are {', '.join(PEAK_FLOPS)}")
        for name in ("mfu", "encoder_mfu"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"cluster.{name}: {getattr(self, name)} is not a share above 0 and up to 1")
        for name in ("memory_reserve", "overlap"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name}: {getattr(self, name)} is not a share from 0 to below 1")
        above_0 = ("gpu_memory_gb", "node_gb_per_second", "network_gb_per_second", "host_copy_gb_per_second", "s3_gb_per_second")
        for name in above_0:
            if not getattr(self, name) > 0:
                raise ConfigError(f"cluster.{name}: {getattr(self, name)} is not above 0")
        for name in ("gpus_per_node", "cpus_per_gpu_node", "cpus_per_cpu_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name}: {getattr(self, name)} is below 1")
        not_below_0 = ("issue_us", "latency_us", "failures_per_node_day", "minutes_to_replace_node", "gpu_hour", "cpu_node_hour")
        for name in (*not_below_0, "storage_tb_month"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"cluster.{name}: {getattr(self, name)} is below 0")

    @property
    def peak_flops(self) -> float:
        """Of one accelerator, in 16 bit."""
        return PEAK_FLOPS[self.gpu]

    @property
    def flops(self) -> float:
        """FLOP/s that training reaches on one accelerator."""
        return self.peak_flops * self.mfu

    @property
    def encoder_flops(self) -> float:
        return self.peak_flops * self.encoder_mfu

    def num_nodes(self, num_gpus: int) -> int:
        return -(-num_gpus // self.gpus_per_node)

    def bandwidth(self, num_gpus: int) -> float:
        """Bytes a second that an all-reduce gets."""
        within = self.node_gb_per_second
        return 1e9 * (within if num_gpus <= self.gpus_per_node else min(within, self.network_gb_per_second))
