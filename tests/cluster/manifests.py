"""Functions that read the files in cluster/ and reproduce the commands that KubeRay derives from them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
IMAGE_ROOT = "/opt/diffdis"  # root of the repository in the image


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def kubernetes_files():
    return sorted(path for path in KUBERAY.rglob("*.yaml") if path.name != "kustomization.yaml")


def manifest(path, kind):
    """Return the only document of a kind in a file."""
    (found,) = [document for document in documents(path) if document["kind"] == kind]
    return found


def ray_cluster():
    return manifest(KUBERAY / "raycluster.yaml", "RayCluster")


def ray_jobs():
    return [manifest(path, "RayJob") for path in sorted((KUBERAY / "jobs").glob("*.yaml"))]


def pods():
    """Return (name, pod template) of every resource that starts pods."""
    for path in kubernetes_files():
        for document in documents(path):
            spec = document.get("spec", {})
            if document["kind"] in ("Deployment", "StatefulSet"):
                yield document["metadata"]["name"], spec["template"]
            if document["kind"] == "RayCluster":
                yield "head", spec["headGroupSpec"]["template"]
                yield from ((group["groupName"], group["template"]) for group in spec["workerGroupSpecs"])


def start_arguments(group, head=False):
    """Return the arguments that KubeRay's operator passes to `ray start` for a group."""
    parameters = dict(group["rayStartParams"])
    if not head:
        parameters["address"] = "diffdis-head-svc.diffdis.svc.cluster.local:6379"
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    parameters.setdefault("num-cpus", limits["cpu"])
    if "nvidia.com/gpu" in limits:
        parameters.setdefault("num-gpus", limits["nvidia.com/gpu"])
    parameters["labels"] = ",".join(f"{key}={value}" for key, value in group["labels"].items())
    return [*(["--head"] if head else []), *(f"--{key}={value}" for key, value in parameters.items()), "--block"]


def arguments_of(entrypoint):
    """Return the arguments that a script receives after the entrypoint has passed through KubeRay's shell and then Ray's."""
    show = [sys.executable, "-c", "import sys; print('\\0'.join(sys.argv[1:]), end='')"]

    def through(shell, command):
        done = subprocess.run([shell, "-c", f"{shlex.join(show)} {command}"], capture_output=True, text=True, check=True)
        return done.stdout.split("\0")

    return through("sh", shlex.join(through("bash", entrypoint)))


def pinned(name):
    """Return a package's version in constraints.txt."""
    (version,) = re.findall(rf"^{re.escape(name)}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version
