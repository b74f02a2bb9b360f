"""The commands of `diffdis`: each module has `parse_arguments(argv)` and `main(argv)`, which returns the exit status.

Heavy libraries (torch, Ray, diffusers) are imported in `main`, so that `--help` and errors in the arguments need none of them.
"""

import json
import shlex
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from diffdis_platform.config.parse import ParsedCommand
from ray_platform.contracts import ConfigError, named_field, one_line
from ray_platform.data.config import DataConfig
from ray_platform.json_values import JsonObject
from ray_platform.redaction import redacted
from ray_platform.tracking import RunRecord

if TYPE_CHECKING:
    from ray_platform.data.catalog import Catalog

DRY_RUN = {"dry-run": "Check the configuration and the data, and print what would run."}


def print_plan(command: ParsedCommand[Any], described: JsonObject) -> None:
    """Print the result of `--dry-run`: the resolved configuration, and what would run as comments: `--config` reads it."""
    print(command.yaml)
    print(textwrap.indent(json.dumps(described, indent=2), "# "))


def connect_cluster(output_dir: str) -> None:
    """Connect to the cluster of RAY_ADDRESS; without one, run this command again with a temporary head on this machine.

    Then its whole output is in job.log in `output_dir`.
    """
    from ray_platform.connect import connect
    from ray_platform.local_head import ensure_cluster

    ensure_cluster(output_dir)
    connect()


def check_exists(field: str, url: str) -> None:
    """Raise ConfigError if there is no such file or folder, before libraries are imported that take seconds."""
    from ray_platform import storage

    if not storage.exists(url):
        raise ConfigError(f"{field}: {url}: no such file or folder; correct the path")


def check_writable(output_dir: str) -> None:
    """Raise ConfigError if `output_dir` cannot be written to, likewise."""
    from ray_platform.train import preflight

    preflight.check_writable(output_dir)


def list_sources(field: str, data: DataConfig) -> "Catalog":
    """Return the shards of the sources of `data`, likewise. Raises DataError."""
    from ray_platform.data.catalog import build_catalog

    with named_field(field):
        return build_catalog(data)


def run_page_text(record: RunRecord) -> str:
    """Return how to see a run in MLflow, in two lines; empty if MLflow does not track it."""
    if not record["tracking_uri"]:
        return ""
    from ray_platform.tracking.mlflow_tracker import run_page, ui_command

    try:
        page = run_page(record)
    except Exception as error:  # the run itself has finished
        page = f"(its address is not known: {one_line(error, 200)})"
    return f"see its curves in MLflow:\n  {ui_command(record['tracking_uri'])}\n  {page}"


def typed_command() -> str:
    """Return the command line of this process without secrets, as it is recorded with a run."""
    script = sys.argv[0].endswith(".py")
    return redacted(shlex.join(["python", *sys.argv] if script else ["diffdis", *sys.argv[1:]]))
