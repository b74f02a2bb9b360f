"""`diffdis eval`: evaluate a model. Without RAY_ADDRESS, this machine's CPUs evaluate."""

from collections.abc import Sequence

from diffdis_platform.commands import check_exists, check_writable, connect_cluster
from diffdis_platform.config.evaluate import EvalConfig, suite_sets
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, parse
from ray_platform.contracts import DataError
from ray_platform.names import is_pattern

INTERRUPTED = "stopped; the same command continues"

HELP = CommandHelp(
    "eval",
    "Measure zero-shot accuracy, retrieval and image quality of a model.",
    examples=(
        "--checkpoint /runs/demo --suite demo --data_roots /data/demo --output_dir /results/demo",
        "--checkpoint s3://bucket/runs/1 --data_roots /data/clip_benchmark --gpus_per_worker 1 --output_dir s3://bucket/results/1",
        "--list --data_roots /data/clip_benchmark",
    ),
    fields=(
        *("checkpoint", "steps", "output_dir", "suite", "data_roots", "baselines", "limit", "seeds", "num_workers"),
        *("gpus_per_worker", "scoring.num_steps", "scoring.num_draws", "quality.prompts", "quality.reference"),
        *("quality.num_images", "quality.networks", "quality.guidance_scales", "allow_missing"),
    ),
)


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[EvalConfig]:
    command = parse(EvalConfig, argv, HELP, switches={"list": "List the evaluation sets and where they were found, and exit."})
    if "list" not in command.switches:
        command.config.check_job()
    return command


def _check_files(config: EvalConfig) -> None:
    """Raise ConfigError for the first field whose file or folder does not exist."""
    quality = config.quality
    files = [("checkpoint", config.checkpoint), ("class_names", config.class_names), ("templates", config.templates)]
    files += [("suite", config.suite)] * config.suite.endswith((".yaml", ".yml"))
    files += [("baselines", url) for url in config.baselines]
    if quality.prompts:
        files += [("quality.prompts", quality.prompts), ("quality.inception", quality.inception), ("quality.clip", quality.clip)]
        files += [] if is_pattern(quality.reference) else [("quality.reference", quality.reference)]
    for field, url in files:
        if url:
            check_exists(field, url)


def main(argv: Sequence[str]) -> int:
    command = parse_arguments(argv)
    config = command.config
    if "list" in command.switches:
        from ray_platform.evaluate.discovery import render_listing

        print(render_listing(config.data_roots, suite_sets(config.suite)))
        return 0
    _check_files(config)
    check_writable(config.output_dir)
    from diffdis_platform.evaluation.datasets import open_sets
    from ray_platform.tracking.delivery import check_trackers

    check_trackers(config.tracking, config.output_dir)
    opened = open_sets(config)
    from diffdis_platform.evaluation.results import render_results
    from diffdis_platform.evaluation.run import REPORT, configs_of_steps, evaluate, evaluate_steps, plan_evaluation
    from ray_platform import storage

    if config.steps:
        print(f"checkpoints: {', '.join(each.checkpoint for each in configs_of_steps(config))}", flush=True)
    plan = None if config.steps else plan_evaluation(config, opened)
    connect_cluster(config.output_dir)
    storage.write_bytes(storage.join(config.output_dir, "config.yaml"), command.yaml.encode())
    details = evaluate(config, plan) if plan else evaluate_steps(config, opened)
    print(f"\n{render_results(details)}\n")
    print(f"done: {storage.join(config.output_dir, REPORT)}, next to results.csv and results/", flush=True)
    if failures := details.get("failures"):
        raise DataError("some measurements failed: " + "; ".join(failures))
    return 0
