"""Evaluate a model: `ray job submit --working-dir . -- python jobs/eval.py --checkpoint … --data_roots … --output_dir …`.

Where no cluster is named (RAY_ADDRESS), this machine's CPUs do it.
"""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.config.evaluate import parse
from diffdis_platform.evaluation.run import REPORT, evaluate, plan_evaluation, render_results
from ray_platform import storage
from ray_platform.connect import connect
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate.discovery import render_listing
from ray_platform.local_head import HeadError, ensure_cluster


def main() -> None:
    command = parse(sys.argv[1:])
    config = command.config
    if command.list_only:
        print(render_listing(config.data_roots))
        return
    plan = plan_evaluation(config)
    ensure_cluster()
    connect()
    storage.write_bytes(storage.join(config.output_dir, "config.yaml"), command.yaml.encode())
    details = evaluate(config, plan)
    print(f"\n{render_results(details)}\n")
    print(f"done: {storage.join(config.output_dir, REPORT)}, with results.csv and results/ next to it", flush=True)
    if details["failures"]:
        raise DataError("not all was measured: " + "; ".join(details["failures"]))


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, HeadError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
