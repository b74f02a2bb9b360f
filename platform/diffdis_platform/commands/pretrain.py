"""`diffdis pretrain`: pretrain DiffDis. Without RAY_ADDRESS, this machine's CPUs train."""

from collections.abc import Sequence
from typing import Literal

from diffdis_platform.commands import print_plan, run_page_text, typed_command
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, parse
from diffdis_platform.config.pretrain import ALIASES, MAIN_FIELDS, PretrainConfig
from diffdis_platform.recipes import recipes_of
from ray_platform.json_values import JsonObject

INTERRUPTED = "stopped; the same command with --resume auto resumes from the last checkpoint"
SWITCHES = {"dry-run": "Check the configuration, the data and the workers, and print what would run."}
HELP = CommandHelp(
    "pretrain",
    "Pretrain DiffDis on image-text shards.",
    examples=(
        "--data.sources /data/demo/train --output_dir /runs/demo --resume auto",
        "--recipe sd_v1_laion --data.sources 's3://bucket/laion/{00000..01023}.tar' --output_dir s3://bucket/runs/1 --dry-run",
    ),
    fields=MAIN_FIELDS,
)


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[PretrainConfig]:
    return parse(PretrainConfig, argv, HELP, recipes=recipes_of(PretrainConfig), switches=SWITCHES, aliases=ALIASES)


def main(argv: Sequence[str]) -> int:
    command = parse_arguments(argv)
    config = command.config
    plan = config.plan(command.recipe, typed_command())
    if "dry_run" in command.switches:
        described = plan.dry_run()
        predicted = _predict(config, described)
        print_plan(command, {**described, **predicted})
        return 0
    plan.check()
    from ray_platform import storage
    from ray_platform.local_head import ensure_cluster

    ensure_cluster(config.output_dir)
    record = config.run(command.recipe, typed_command()).fit(command.yaml)
    print(f"done: the model is in {storage.join(config.output_dir, 'export')}\n{run_page_text(record)}".rstrip())
    return 0


def _predict(config: PretrainConfig, described: JsonObject) -> JsonObject:
    """Return parameters and the size of a checkpoint, and for GPUs also the memory and the hours that `diffdis sizing` predicts.

    `described` is the result of `RunPlan.dry_run`.
    """
    from diffdis_platform.sizing.config import SizingConfig
    from diffdis_platform.sizing.counts import count
    from diffdis_platform.sizing.estimate import checkpoint_bytes, estimate
    from ray_platform.placement import known_accelerator, total_resources
    from ray_platform.train.config import BatchPlan

    train = config.train
    batch = BatchPlan.of(described["global_batch_size"], train.max_workers, train.micro_batch_size)
    counts = count(config, batch.num_micro_batches)
    predicted: JsonObject = {
        "parameters": {"trained": counts.trained, "frozen": counts.frozen, "encoders": counts.encoders.parameters},
        "checkpoint_gb": round(checkpoint_bytes(counts, train) / 1e9, 3),
    }
    if train.gpus_per_worker:
        resources = " ".join(total_resources(train.placement))  # such as `accelerator_type:A100`
        gpu = known_accelerator(resources) or "H100"
        samples = max(1, described["samples_to_train_on"])
        inputs: Literal["live", "precomputed"] = "precomputed" if described["precomputed"] else "live"
        result = estimate(SizingConfig(gpu=gpu, inputs=inputs, num_pairs=samples), config, counts, batch)
        predicted |= {
            "predicted_for": gpu,
            "predicted_memory_gb_per_gpu": round(result.memory.total / 1e9, 1),
            "predicted_hours": round(24 * result.days, 2),
        }
    return predicted
