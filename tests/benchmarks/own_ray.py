"""A Ray of a benchmark's own on this machine, whose workers find the project. Import it before anything that imports ray."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Read when Ray is first imported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray gives its workers a lower priority: what else this machine does would slow them more than what they are compared with.
os.environ.setdefault("RAY_worker_niceness", "0")

PATHS = os.pathsep.join(str(path) for path in (ROOT, ROOT / "platform"))
OPTIONS = {"log_to_driver": False, "runtime_env": {"env_vars": {"PYTHONPATH": PATHS}}}


def start(num_cpus: int) -> None:
    import ray

    ray.init(address="local", num_cpus=num_cpus, object_store_memory=2**30, include_dashboard=False, **OPTIONS)


def stop() -> None:
    import ray

    ray.shutdown()
