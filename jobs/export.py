"""Write a pipeline folder from any checkpoint: `python jobs/export.py --checkpoint <run or step_* folder> --output_dir …`."""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.config.export import export, parse
from ray_platform.contracts import ConfigError, DataError

if __name__ == "__main__":
    try:
        print(export(parse(sys.argv[1:])))
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
