"""`diffdis pretrain`: pretrain DiffDis. Without RAY_ADDRESS, this machine's CPUs train."""

import json
from collections.abc import Sequence

from diffdis_platform.commands import typed_command
from diffdis_platform.config.parse import ParsedCommand, parse
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes import recipes_of

INTERRUPTED = "stopped; the same command with --resume auto resumes from the last checkpoint"


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[PretrainConfig]:
    return parse(
        PretrainConfig,
        argv,
        command="pretrain",
        description="Pretrain DiffDis on image-text shards.",
        recipes=recipes_of(PretrainConfig),
        switches={"dry-run": "check the configuration, the data and the workers, and print what would run"},
        aliases={"--resume": "--train.resume", "--profile": "--train.profile"},
    )


def main(argv: Sequence[str]) -> int:
    command = parse_arguments(argv)
    from ray_platform import storage
    from ray_platform.local_head import ensure_cluster

    config = command.config
    run = config.run(command.recipe, typed_command())
    if "dry_run" in command.switches:
        print(command.yaml)
        print(json.dumps(run.dry_run(), indent=2))
        return 0
    run.check()
    ensure_cluster()
    storage.write_bytes(storage.join(config.output_dir, "config.yaml"), command.yaml.encode())
    run.fit()
    print(f"done: the model is in {storage.join(config.output_dir, 'export')}")
    return 0
