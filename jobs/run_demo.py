"""`make demo`: build the shards, pretrain through `ray job submit` on a head of our own, score, draw, and say what came out."""

import json
import os
import sys
from pathlib import Path

import _bootstrap  # noqa: F401

from diffdis_platform.demo.builder import PINS, build
from diffdis_platform.demo.errors import DemoDataError
from diffdis_platform.demo.report import SUMMARY, table, write_report
from diffdis_platform.recipes.demo import PREVIEW_CAPTIONS
from ray_platform.contracts import ConfigError
from ray_platform.local_head import LocalHead, submit
from ray_platform.tracking.mlflow_tracker import ui_command

ROOT = Path(__file__).resolve().parents[1]
DATA, OUTPUT = ROOT / "data" / "demo", ROOT / "outputs" / "demo"


def pretrain() -> None:
    command = ["python", "jobs/pretrain.py", "--recipe", "demo", "--train.resume", "auto"]
    command += ["--output_dir", str(OUTPUT), "--data.sources", str(DATA / "train")]
    command += ["--tracking.registered_model", "diffdis-demo", *sys.argv[1:]]
    with LocalHead() as head:
        code = submit(head, command, ROOT, {"HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    if code:
        sys.exit(code)


def main() -> None:
    print(build(DATA, None, os.cpu_count() or 1, PINS), flush=True)
    if (OUTPUT / SUMMARY).exists():
        print(f"{OUTPUT} holds a finished run; delete the folder to train again")
        summary = json.loads((OUTPUT / SUMMARY).read_text())
    else:
        if not (OUTPUT / "train_summary.json").exists():
            pretrain()
        summary = write_report(OUTPUT, DATA, PREVIEW_CAPTIONS)
    print(f"\n{table(summary)}\n\nopen the MLflow UI with:\n  {ui_command(summary['mlflow']['tracking_uri'])}")


if __name__ == "__main__":
    try:
        main()
    except (DemoDataError, ConfigError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; `make demo` goes on from the last checkpoint")
