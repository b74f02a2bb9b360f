"""The only `ray.init` of the project."""

import json
import os
import socket

import ray

from ray_platform.checkout import checkout_root
from ray_platform.contracts import ConfigError

_TIMEOUT_S = 10.0


class ClusterError(ConfigError):
    """No cluster can be used. The message is one line that says which was tried and what to do."""


def connect(address: str = "") -> None:
    """Attach this process, the driver, to a Ray cluster whose workers will find the packages of the root, of
    `platform` and of `jobs`.

    Args:
        address: `host:port` of the cluster, used only where the environment names none in RAY_ADDRESS, as
            `ray job submit` does. A process that is attached already stays as it is.

    Raises:
        ClusterError: no cluster is named, or the one named does not answer.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "") or address
    if not address:
        raise ClusterError("no Ray cluster is named: start this with `ray job submit`, or set RAY_ADDRESS to host:port")
    _check_answers(address)
    # Ray Train's cleaner of placement groups asks the newest cluster of its machine whether its trainer lives, unless this says
    # which: beside another cluster it ended our workers.
    variables = _worker_path() | {"RAY_ADDRESS": address}
    try:
        ray.init(address=address, runtime_env={"env_vars": variables}, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(f"the Ray cluster at {address} refused this driver: {_reason(error)}") from error


def describe_cluster() -> str:
    """What the cluster has of which this process is a driver: `2 CPUs`, `16 CPUs, 1 GPUs (H100)`."""
    there = ray.cluster_resources()
    kinds = sorted(name.removeprefix("accelerator_type:") for name in there if name.startswith("accelerator_type:"))
    gpus = f", {there['GPU']:g} GPUs ({', '.join(kinds)})" if there.get("GPU") else ""
    return f"{there.get('CPU', 0):g} CPUs{gpus}"


def _worker_path() -> dict[str, str]:
    """Return the PYTHONPATH of the workers as an environment variable; nothing for an installed wheel, which they import too.

    A submitted job's workers run in their node's copy of the working dir, whose root is on their path already, so the
    path is relative to it. Any other driver shares its files with the workers: one machine, one image or one mount.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    root = checkout_root()
    if root is None:
        return {}
    if job.get("runtime_env", {}).get("working_dir"):
        return {"PYTHONPATH": "platform"}
    return {"PYTHONPATH": os.pathsep.join((str(root), str(root / "platform")))}


def _reason(error: Exception) -> str:
    if "InvalidAuthToken" in str(error.__cause__):
        return "its token and this one differ: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    return str(error).strip().split("\n")[0]


def _check_answers(address: str) -> None:
    """Ray itself waits for many minutes for a cluster that is not there."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ClusterError(
            f"RAY_ADDRESS={address} is not the host:port of a Ray cluster: to go through a dashboard, use `ray job submit`"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {address} ({error}): start one, or correct RAY_ADDRESS") from None
