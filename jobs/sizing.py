"""How fast, how large and how dear: `python jobs/sizing.py --recipe sd_v1_laion --num_gpus '[64]' --cluster.mfu 0.35`.

Prints tables, and the same and more as one JSON line. Needs neither data nor weights nor a cluster. See docs/sizing.md.
"""

import json
import sys

import _bootstrap  # noqa: F401

from diffdis_platform.config.sizing import parse
from diffdis_platform.sizing.estimate import as_json, estimate
from diffdis_platform.sizing.tables import report
from ray_platform.contracts import ConfigError

if __name__ == "__main__":
    try:
        config = parse(sys.argv[1:])
        counts, estimates = estimate(config)
        print(report(config, counts, estimates))
        print(json.dumps(as_json(config, counts, estimates)))
    except ConfigError as error:
        sys.exit(f"error: {error}")
