"""A private Ray instance for a benchmark, whose workers can import the project. Import it before any module that imports ray."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Ray reads these variables when it is first imported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# By default, Ray lowers the priority of its workers: other load on the machine would slow them more than the other contenders.
os.environ.setdefault("RAY_worker_niceness", "0")

PATHS = os.pathsep.join(str(path) for path in (ROOT, ROOT / "platform"))
OPTIONS = {"log_to_driver": False, "runtime_env": {"env_vars": {"PYTHONPATH": PATHS}}}


def start(num_cpus: int) -> None:
    import ray

    ray.init(address="local", num_cpus=num_cpus, object_store_memory=2**30, include_dashboard=False, **OPTIONS)


def stop() -> None:
    import ray

    ray.shutdown()
