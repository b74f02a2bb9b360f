"""The commands of `diffdis`: each module has `parse_arguments(argv)` and `main(argv)`, which returns the exit status.

Heavy libraries (torch, Ray, diffusers) are imported in `main`, so that `--help` and errors in the arguments need none of them.
"""

import shlex
import sys

from ray_platform.redaction import redacted


def connect_cluster() -> None:
    """Connect to the cluster of RAY_ADDRESS; without one, run this command again with a temporary head on this machine."""
    from ray_platform.connect import connect
    from ray_platform.local_head import ensure_cluster

    ensure_cluster()
    connect()


def typed_command() -> str:
    """Return the command line of this process without secrets, as it is recorded with a run."""
    script = sys.argv[0].endswith(".py")
    return redacted(shlex.join(["python", *sys.argv] if script else ["diffdis", *sys.argv[1:]]))
