"""`diffdis sweep`: search hyperparameters. Without RAY_ADDRESS, this machine's CPUs train the trials."""

from collections.abc import Sequence

from diffdis_platform.commands import DRY_RUN, connect_cluster, list_sources, print_plan, typed_command
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, parse
from diffdis_platform.config.sweep import SweepConfig
from diffdis_platform.recipes import recipes_of
from ray_platform.contracts import DataError
from ray_platform.units import plural

INTERRUPTED = "stopped; the same command resumes the sweep"

HELP = CommandHelp(
    "sweep",
    "Search the hyperparameters of a recipe with Ray Tune.",
    examples=(
        "--output_dir /runs/sweep --num_trials 8",
        """--output_dir /runs/sweep --space '{"objective.temperature": {"low": 0.03, "high": 0.3}}'""",
    ),
    fields=(
        *("output_dir", "space", "objectives", "search", "scheduler", "num_trials", "samples", "num_milestones"),
        *("max_concurrent", "seed", "pretrain.data.sources", "evaluation.data_roots"),
        *("tracking.uri", "tracking.experiment"),
    ),
)


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[SweepConfig]:
    return parse(SweepConfig, argv, HELP, recipes=recipes_of(SweepConfig), switches=DRY_RUN)


def main(argv: Sequence[str]) -> int:
    command = parse_arguments(argv)
    list_sources("pretrain.data.sources", command.config.pretrain.data)
    from diffdis_platform.sweeping import REPORT, format_trials, plan_sweep, rebuild_report, run_sweep
    from ray_platform import storage
    from ray_platform.sweep.search import trial_points

    if "dry_run" in command.switches:
        config, plan = command.config, plan_sweep(command.config, command.recipe)
        trials = config.num_trials or len(trial_points(config, plan.space, plan.baseline))  # 0: all points of a grid
        print_plan(command, {"trials": trials, "samples_per_trial": config.samples, "first_trial": plan.baseline})
        return 0
    details = rebuild_report(command.config.output_dir)
    if details is None:
        plan = plan_sweep(command.config, command.recipe)
        connect_cluster(command.config.output_dir)
        details = run_sweep(plan, command.yaml, typed_command())
    report = storage.join(command.config.output_dir, REPORT)
    print(f"\n{format_trials(details)}\n\ndone: {report}, next to details.json", flush=True)
    if failed := [f"{trial['name']}: {trial['error']}" for trial in details["trials"] if trial["state"] == "failed"]:
        raise DataError(f"{plural(len(failed), 'trial')} failed; the same command tries again: " + "; ".join(failed))
    return 0
