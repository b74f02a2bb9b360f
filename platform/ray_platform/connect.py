"""Connection of a driver to a Ray cluster: the only `ray.init` of the project."""

import json
import os
import socket

import ray

from ray_platform.checkout import checkout_root
from ray_platform.contracts import ConfigError
from ray_platform.storage_config import storage_variables

_TIMEOUT_S = 10.0


class ClusterError(ConfigError):
    """No cluster can be used. The message names the address that was tried and says what to do."""


def connect(address: str = "") -> None:
    """Connect this process, the driver, to a Ray cluster, whose workers can import the project's packages.

    RAY_ADDRESS, which `ray job submit` sets, comes before `address`, a `host:port`. A process that is connected stays as it is.
    Raises ClusterError if no cluster is named, or it does not answer.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "") or address
    if not address:
        raise ClusterError("RAY_ADDRESS: no Ray cluster is named; start this with `ray job submit`, or set it to host:port")
    _check_answers(address)
    # Without RAY_ADDRESS, Ray Train's placement group cleaner asks the newest cluster on its machine whether the trainer lives,
    # and ends our workers when that is another cluster.
    variables = _worker_path() | storage_variables() | {"RAY_ADDRESS": address}
    # A job's runtime environment may have these variables, too: ours include its PYTHONPATH and replace the others.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    try:
        ray.init(address=address, runtime_env={"env_vars": variables}, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        reason = str(error).strip().split("\n")[0]
        if "InvalidAuthToken" in str(error.__cause__):
            reason = "the tokens differ; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        raise ClusterError(f"RAY_ADDRESS: the Ray cluster at {address} rejected this driver: {reason}") from error


def describe_cluster() -> str:
    """Return the resources of the connected cluster: `2 CPUs`, `16 CPUs, 1 GPUs (H100)`."""
    resources = ray.cluster_resources()
    kinds = sorted(name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:"))
    gpus = f", {resources['GPU']:g} GPUs ({', '.join(kinds)})" if resources.get("GPU") else ""
    return f"{resources.get('CPU', 0):g} CPUs{gpus}"


def _worker_path() -> dict[str, str]:
    """Return the PYTHONPATH of the workers as an environment variable; nothing for an installed wheel, which they import too."""
    root = checkout_root()
    if root is None:
        return {}
    runtime_env = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    # The workers of a submitted job run in their node's copy of the working directory, whose root is on their path already.
    # Any other driver shares its files with the workers, by one machine, image or mount.
    ours = ["platform"] if runtime_env.get("working_dir") else [str(root), str(root / "platform")]
    theirs = (runtime_env.get("env_vars") or {}).get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (*ours, theirs)))}


def _check_answers(address: str) -> None:
    """Fail early, as Ray itself waits many minutes for a cluster that does not exist."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ClusterError(
            f"RAY_ADDRESS: {address} is not the host:port of a Ray cluster; to use a dashboard's address, run `ray job submit`"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}); start one, or correct the address"
        ) from None
