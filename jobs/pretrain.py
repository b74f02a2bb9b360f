"""Pretrain DiffDis: `ray job submit --working-dir . -- python jobs/pretrain.py --recipe demo --output_dir … --data.sources …`.

Where no cluster is named (RAY_ADDRESS), this machine's CPUs do it.
"""

import json
import shlex
import sys

import _bootstrap  # noqa: F401

from diffdis_platform.config.command_line import parse
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, TrainingError
from ray_platform.local_head import HeadError, ensure_cluster


def main() -> None:
    command = parse(sys.argv[1:])
    run = command.config.run(command.recipe, shlex.join(["python", *sys.argv]))
    if command.dry_run:
        print(command.yaml)
        print(json.dumps(run.dry_run(), indent=2))
        return
    run.check()
    ensure_cluster()
    storage.write_bytes(storage.join(command.config.output_dir, "config.yaml"), command.yaml.encode())
    run.fit()
    print(f"done: the model is in {storage.join(command.config.output_dir, 'export')}")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, HeadError, TrainingError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume auto goes on from the last checkpoint")
