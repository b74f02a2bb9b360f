"""`diffdis sizing`: predict throughput, memory, storage and cost of a run, without data, weights or a cluster."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, parse
from diffdis_platform.sizing.config import SizingConfig
from ray_platform.json_values import to_json

if TYPE_CHECKING:
    from diffdis_platform.sizing.counts import Counts
    from diffdis_platform.sizing.estimate import Estimate

HELP = CommandHelp(
    "sizing",
    "Predict throughput, memory, storage and cost of a run, without data, weights or a cluster.",
    examples=("--num_gpus 8 64 --micro_batch_size 64", "--recipe sd_v1_laion --dataset laion_5b --gpu A100 --json sizes.json"),
)


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[SizingConfig]:
    return parse(SizingConfig, argv, HELP)


def predict(config: SizingConfig) -> "tuple[Counts, list[Estimate]]":
    """Return the counts of the model, and a prediction for each number of GPUs. Raises ConfigError."""
    run = config.run()
    from diffdis_platform.sizing.counts import count
    from diffdis_platform.sizing.estimate import estimate
    from ray_platform.train.config import BatchPlan

    size = run.train.micro_batch_size
    plans = [BatchPlan.of(run.train.global_batch_size or n * size, n, size) for n in config.num_gpus]
    counts = count(run, max(plan.num_micro_batches for plan in plans))
    return counts, [estimate(config, run, counts, plan) for plan in plans]


def main(argv: Sequence[str]) -> int:
    config = parse_arguments(argv).config
    counts, estimates = predict(config)
    from diffdis_platform.sizing.estimate import as_json, report

    print(report(config, counts, estimates))
    if config.json:
        from ray_platform import storage

        storage.write_bytes(config.json, to_json(as_json(config, counts, estimates)))
    return 0
