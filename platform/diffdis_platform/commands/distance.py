"""`diffdis distance`: compare two existing sets of images. Without RAY_ADDRESS, this machine's CPUs compare them."""

from collections.abc import Sequence

from diffdis_platform.commands import check_exists, check_writable, connect_cluster
from diffdis_platform.config.distance import DistanceConfig
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, parse
from ray_platform.names import is_pattern

INTERRUPTED = "stopped; the same command continues"

HELP = CommandHelp(
    "distance",
    "Measure FID, KID, precision, recall and Inception Score between two sets of images.",
    examples=("--generated /images/a --reference /images/real --networks efficientnet_lite0 --output_dir /results/a",),
)


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[DistanceConfig]:
    return parse(DistanceConfig, argv, HELP)


def main(argv: Sequence[str]) -> int:
    config = parse_arguments(argv).config
    for name, url in (("generated", config.generated), ("reference", config.reference)):
        if not is_pattern(url):
            check_exists(name, url)
    config.check_weights()
    check_writable(config.output_dir)
    from diffdis_platform.evaluation.distance import DISTANCE, measure_distance, plan_distance, render_distance
    from ray_platform import storage

    plan = plan_distance(config)
    connect_cluster(config.output_dir)
    details = measure_distance(config, plan)
    print(f"\n{render_distance(details)}\n\ndone: {storage.join(config.output_dir, DISTANCE)}", flush=True)
    return 0
