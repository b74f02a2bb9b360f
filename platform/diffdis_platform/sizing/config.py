"""Configuration of `diffdis sizing`, and the constants of its model with their source."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import parse, with_fields
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes import recipes_of
from ray_platform.contracts import ConfigError

# GB, of the type with the most memory, from the vendor's data sheets.
GPU_MEMORY = {
    "B200": 180, "H100 PCIe": 80, "H100 NVL": 94, "H100": 80, "H200 NVL": 141, "H200": 141,
    "L40S": 48, "L40": 48, "A100": 80, "V100": 32, "L4": 24,
}  # fmt: skip
_RENAMED = {"issue_us": "launch_us, the host's microseconds per kernel instead of those per parameter tensor and pass"}
_FRACTIONS = ("mfu", "encoder_mfu", "overlap", "memory_reserve")
_MAY_BE_ZERO = (
    "launch_us", "latency_us", "failures_per_node_day", "minutes_to_replace_node", "overlap", "memory_reserve",
    "gpu_hour", "cpu_node_hour", "storage_tb_month",
)  # fmt: skip


@dataclass(frozen=True)
class Constants:
    """Properties of machines, network, storage and prices that the model uses; `--constants` replaces any of them."""

    # Measured on one H100 with 16 cores, with the step of commit ba8fcc6: tests/benchmarks/accelerator.py.
    mfu: float = 0.155  # fraction of the 16-bit peak that training reaches when the GPU is the bottleneck
    launch_us: float = 42.0  # microseconds that the host takes to launch a kernel: 390 ms for 9,225 of them
    encoder_mfu: float = 0.095  # fraction of the peak that the frozen encoders reach, in float32 and TF32
    host_copy_gb_per_second: float = 2.1  # from a GPU to the memory of its host
    memory_reserve: float = 0.15  # fraction of the memory that CUDA, NCCL, cuDNN and fragmentation take
    # Measured on two shared CPU cores. tests/benchmarks/loader.py: JPEGs of 39 kB, 384 to 512 px, to 256 px, decoder `exact`.
    stream_images_per_core: float = 827.0  # per second, with tar and copies
    decoder_images_per_core: float = 1114.0  # per second, of the decoder alone
    precomputed_mb_per_core: float = 672.0  # per second
    # tests/benchmarks/sizing.py: milliseconds of the decoder = decode_ms + decode_ms_per_megapixel * megapixels of the file.
    decode_ms: float = 0.27
    decode_ms_per_megapixel: float = 3.63
    upload_mb_per_second: float = 408.2  # of one checkpoint writer, whose core is busy for 2.45 s per GB
    s3_read_seconds_per_gb: float = 1.2  # of a core: tests/benchmarks/s3_reads.py
    recovery_seconds: float = 51.0  # from the end of a worker until training continues: tests/benchmarks/faults.py
    # Published: 419 unplanned interruptions of 2,048 nodes in 54 days of training Llama 3 (arXiv 2407.21783).
    failures_per_node_day: float = 0.0038
    # Assumed. Bus bandwidth of an all-reduce as nccl-tests prints it: NVLink within a node, 400 Gbit/s per node between nodes.
    node_gb_per_second: float = 230.0
    network_gb_per_second: float = 40.0
    latency_us: float = 15.0  # of one message between two nodes
    overlap: float = 0.8  # fraction of the communication during the backward pass that the backward pass hides
    gpu_memory_gb: float = 80.0  # by default that of the type given with --gpu
    gpus_per_node: float = 8
    cpus_per_gpu_node: float = 96
    cpus_per_cpu_node: float = 64
    s3_gb_per_second: float = 2.5  # per node
    minutes_to_replace_node: float = 5.0
    gpu_hour: float = 3.0  # prices in one currency
    cpu_node_hour: float = 2.5
    storage_tb_month: float = 23.0

    def with_values(self, values: dict[str, float]) -> "Constants":
        """Return the constants with other values. Raises ConfigError for an unknown name or an impossible value."""
        names = [field.name for field in fields(self)]
        for name, value in values.items():
            if name in _RENAMED:
                raise ConfigError(f"constants: {name} was replaced; give {_RENAMED[name]}")
            if name not in names:
                raise ConfigError(f"constants: {name} is unknown; choose from {', '.join(names)}")
            if not 0 <= value < math.inf or (value == 0 and name not in _MAY_BE_ZERO):
                raise ConfigError(f"constants: {name} is {value}; give a number above 0")
            if name in _FRACTIONS and value > 1:
                raise ConfigError(f"constants: {name} is {value}; give a fraction up to 1")
        return replace(self, **values)

    def num_nodes(self, num_gpus: int) -> int:
        return -int(-num_gpus // self.gpus_per_node)

    def bandwidth(self, num_gpus: int) -> float:
        """Return the bus bandwidth of a collective over `num_gpus` GPUs, in bytes per second."""
        within = self.node_gb_per_second
        return 1e9 * (within if num_gpus <= self.gpus_per_node else min(within, self.network_gb_per_second))


@dataclass(frozen=True)
class DatasetSize:
    """Image-text pairs of a dataset, and their size in shards of images of `shard_px` pixels."""

    num_pairs: float
    pair_bytes: float  # including the caption, the .json and the tar headers
    shard_px: int


# img2dataset, dataset_examples/laion400m.md and laion5B.md: 400 million pairs at 256 px are 10 TB, 5.86 billion at 384 px 220 TB.
DATASETS = {
    "laion_400m": DatasetSize(400e6, 10e12 / 400e6, 256),
    "laion_5b": DatasetSize(5.86e9, 220e12 / 5.86e9, 384),
}


@dataclass(frozen=True)
class SizingConfig:
    """The run whose size is predicted, the numbers of GPUs, and the constants of the model. Raises ConfigError."""

    recipe: str = "sd_v1_laion"
    """Recipe of the run."""
    run_config: str = ""
    """config.yaml of the run, instead of a recipe; `diffdis pretrain --dry-run` prints one."""
    num_gpus: tuple[int, ...] = (1, 8, 64, 256, 1024)
    """Numbers of GPUs to predict for."""
    image_size: int = 0
    """Side of the images in pixels. 0: that of the run."""
    micro_batch_size: int = 0
    """Samples per GPU and forward pass. 0: those of the run."""
    dataset: str = "laion_400m"
    """Size of the dataset: laion_400m or laion_5b."""
    num_pairs: float = 0.0
    """Number of image-text pairs. 0: those of the dataset."""
    epochs: float = 1.0
    """Passes over the dataset."""
    inputs: Literal["live", "precomputed"] = "live"
    """Whether training encodes images and captions (live) or reads precomputed ones."""
    gpu: str = "H100"
    """Type of the GPUs, which determines their peak and memory; for their price, see `constants`."""
    constants: dict[str, float] = field(default_factory=dict)
    """Other values of the model's constants, such as '{"mfu": 0.2}'."""
    json: str = ""
    """File to write all figures to; local or s3://. Infinite ones are null. Empty: none."""

    def __post_init__(self) -> None:
        if not self.num_gpus or min(self.num_gpus) < 1:
            raise ConfigError(f"num_gpus: {list(self.num_gpus)}; give numbers from 1, such as 1 8 64")
        if self.gpu not in GPU_MEMORY:
            raise ConfigError(f"gpu: {self.gpu} is unknown; choose one of {', '.join(GPU_MEMORY)}")
        if self.dataset not in DATASETS:
            raise ConfigError(f"dataset: {self.dataset} is unknown; choose one of {', '.join(DATASETS)}")
        if not 0 <= self.num_pairs < math.inf or not 0 < self.epochs < math.inf:
            raise ConfigError(f"num_pairs and epochs: {self.num_pairs:g} and {self.epochs:g}; give positive numbers")
        if self.image_size < 0 or self.image_size % 8 or self.micro_batch_size < 0:
            raise ConfigError("image_size and micro_batch_size: give positive numbers, and a multiple of 8 for image_size")
        self.all_constants()

    def all_constants(self) -> Constants:
        return Constants(gpu_memory_gb=GPU_MEMORY[self.gpu]).with_values(self.constants)

    def run(self) -> PretrainConfig:
        """Return the configuration of the run. Raises ConfigError for a recipe or a file that cannot be read."""
        source = ["--config", self.run_config] if self.run_config else ["--recipe", self.recipe]
        recipes, switches = recipes_of(PretrainConfig), {"dry-run": ""}  # which a saved config.yaml contains
        run = parse(PretrainConfig, source, CommandHelp("pretrain", ""), recipes=recipes, switches=switches).config
        changes = {"train.micro_batch_size": self.micro_batch_size or run.train.micro_batch_size}
        if px := self.image_size:
            factor = run.model.image_size // run.model.unet.sample_size
            changes |= {"model.image_size": px, "data.image_size": px, "model.unet.sample_size": px // factor}
        return with_fields(run, changes)

    def data(self, image_size: int) -> DatasetSize:
        """Return the size of the dataset; shards smaller than `image_size` are assumed to be written again at that size."""
        data = DATASETS[self.dataset]
        px = max(image_size, data.shard_px)
        return DatasetSize(self.num_pairs or data.num_pairs, data.pair_bytes * (px / data.shard_px) ** 2, px)
