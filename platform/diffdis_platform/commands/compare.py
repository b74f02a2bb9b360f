"""`diffdis compare`: the controlled comparison. Without RAY_ADDRESS, this machine's CPUs train its runs."""

from collections.abc import Sequence

from diffdis_platform.commands import DRY_RUN, connect_cluster, list_sources, print_plan, typed_command
from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, parse
from diffdis_platform.recipes import recipes_of
from ray_platform.contracts import DataError

INTERRUPTED = "stopped; the same command resumes the comparison"

HELP = CommandHelp(
    "compare",
    "Train and evaluate the joint model and its baselines on the same samples.",
    examples=(
        "--demo_data /data/demo --output_dir /runs/compare",
        "--demo_data /data/demo --output_dir /runs/masks --arms joint_mask one_way_mask --seeds 0 1 2",
    ),
    fields=(
        *("output_dir", "arms", "own_arms", "seeds", "pretrain.data.sources", "pretrain.train.num_steps"),
        *("pretrain.train.num_workers", "evaluation.suite", "evaluation.data_roots", "tracking.uri", "tracking.experiment"),
    ),
)


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[CompareConfig]:
    return parse(CompareConfig, argv, HELP, recipes=recipes_of(CompareConfig), switches=DRY_RUN)


def main(argv: Sequence[str]) -> int:
    command = parse_arguments(argv)
    list_sources("pretrain.data.sources", command.config.pretrain.data)
    from diffdis_platform.comparison.run import REPORT, SUMMARY, compare, plan_comparison
    from diffdis_platform.comparison.summary import format_summary
    from ray_platform import storage

    config = command.config
    plan = plan_comparison(config)
    if "dry_run" in command.switches:
        num_runs = len(config.runs())
        runs = [f"{arm}, seed {seed}" for arm, seed in plan.pending]
        print_plan(command, {"runs": num_runs, "runs_done": num_runs - len(runs), "runs_left": runs})
        return 0
    connect_cluster(config.output_dir)
    storage.write_bytes(storage.join(config.output_dir, "config.yaml"), command.yaml.encode())
    summary = compare(config, plan, command.recipe, typed_command())
    print(f"\n{format_summary(summary)}\n")
    print(f"done: {storage.join(config.output_dir, REPORT)}, next to {SUMMARY} and samples/", flush=True)
    if summary["failures"]:
        raise DataError("some measurements failed: " + "; ".join(summary["failures"]))
    return 0
