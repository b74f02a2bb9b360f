"""The manifests satisfy Kubernetes' schemas, KubeRay's rules, Ray's autoscaler and the parsers of this repository."""

import functools
import re
import shutil
import subprocess

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import start

from diffdis_platform.commands import eval as evaluate
from diffdis_platform.commands import precompute, pretrain, sweep
from tests.cluster.manifests import (
    IMAGE_ROOT,
    KUBERAY,
    ROOT,
    arguments_of,
    documents,
    kubernetes_files,
    manifest,
    pinned,
    pods,
    ray_cluster,
    ray_jobs,
    start_arguments,
)
from tests.cluster.ray_crds import SCHEMAS

VERSION = kubernetes_validate.latest_version()
IMAGES = {"head": "diffdis-cpu", "cpu": "diffdis-cpu", "gpu": "diffdis-cuda", "mlflow": "diffdis-cpu"}
PARSERS = {
    "pretrain.py": pretrain.parse_arguments,
    "precompute.py": precompute.parse_arguments,
    "eval.py": evaluate.parse_arguments,
    "sweep.py": sweep.parse_arguments,
}


def groups():
    spec = ray_cluster()["spec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


@functools.cache
def configurations():
    """Return [(job, script, configuration)], where the script's own parser parses the job's entrypoint."""
    found = []
    for job in ray_jobs():
        *restart, python, script = (words := arguments_of(job["spec"]["entrypoint"]))[:5]
        assert (restart, python) == (["sh", f"{IMAGE_ROOT}/jobs/restart.sh", "5"], "python")
        assert "backoffLimit" not in job["spec"], "KubeRay rejects it with clusterSelector, because it replaces the cluster"
        found.append((job["metadata"]["name"], script, PARSERS[script.rpartition("/")[2]](words[5:]).config))
    return found


@pytest.mark.parametrize("path", kubernetes_files(), ids=lambda path: path.name)
def test_manifests_are_what_kubernetes_and_kuberay_take(path):
    for document in documents(path):
        if document["apiVersion"] == "ray.io/v1":
            jsonschema.validate(document, SCHEMAS[document["kind"]])
        else:
            kubernetes_validate.validate(document, VERSION, strict=True)


def test_a_field_that_does_not_exist_would_be_seen():
    job, cluster = ray_jobs()[0], ray_cluster()
    job["spec"]["entryPoint"] = "python"
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["port"] = []
    cluster["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    for document in (job, cluster):
        with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
            jsonschema.validate(document, SCHEMAS[document["kind"]])
    with pytest.raises(jsonschema.ValidationError, match="port"):
        validate_template(cluster["spec"]["headGroupSpec"]["template"])


def validate_template(template):
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template}, VERSION, strict=True
    )


@pytest.mark.parametrize(("name", "template"), pods())
def test_pods_are_valid_and_have_no_more_rights_than_they_need(name, template):
    validate_template(template)
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    accounts = {document["metadata"]["name"] for document in documents(KUBERAY / "service_accounts.yaml")}
    assert spec["serviceAccountName"] in accounts
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["image"] == IMAGES.get(name, "postgres:17-alpine")
        assert {"requests", "limits"} <= container["resources"].keys()


def test_kuberays_own_rules():
    """Rules that KubeRay's operator validates, taken from its source: see `ray_crds`."""
    spec = ray_cluster()["spec"]
    assert spec["rayVersion"] == pinned("ray"), "the operator wants a version for a token, and nodes of one version"
    for group in groups().values():
        assert "labels" not in group["rayStartParams"], "labels have a field of their own"
        assert "resources" not in group, "and num-cpus may not be said twice"
        assert "restartPolicy" not in group["template"]["spec"], "autoscaler v2 starts nodes anew itself"
        environment = group["template"]["spec"]["containers"][0].get("env", [])
        assert not {"RAY_enable_autoscaler_v2", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & {entry["name"] for entry in environment}
    for document in (ray_cluster(), *ray_jobs()):
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", document["metadata"]["name"])


def test_rays_autoscaler_reads_the_pools(recwarn):
    """Ray's autoscaler converts the Kubernetes resource with this function, which also validates the result."""
    cluster = ray_cluster()
    cluster["metadata"]["namespace"] = "diffdis"
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    types = config["available_node_types"]
    assert {name: (t["labels"], t["min_workers"], t["max_workers"]) for name, t in types.items()} == {
        "headgroup": ({"pool": "head"}, 0, 0), "cpu": ({"pool": "cpu"}, 1, 16), "gpu": ({"pool": "gpu"}, 0, 8),
    }  # fmt: skip
    amounts = {name: (t["resources"]["CPU"], t["resources"].get("GPU", 0)) for name, t in types.items()}
    assert amounts == {"headgroup": (0, 0), "cpu": (16, 0), "gpu": (40, 8)}
    assert config["idle_timeout_minutes"] == 5


@pytest.mark.parametrize("name", ["head", "cpu", "gpu"])
def test_ray_start_takes_what_the_operator_will_give_it(name):
    context = start.make_context("ray start", start_arguments(groups()[name], head=name == "head"))
    assert context.params["labels"] == f"pool={name}"
    assert context.params["num_cpus"] == {"head": 0, "cpu": 16, "gpu": 40}[name]


def test_a_token_is_asked_for_and_nothing_has_an_address_outside_of_the_cluster():
    spec = ray_cluster()["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert (spec["headGroupSpec"]["serviceType"], spec["headGroupSpec"]["enableIngress"]) == ("ClusterIP", False)
    kinds = [document["kind"] for path in kubernetes_files() for document in documents(path)]
    assert not {"Ingress", "Route", "Gateway", "HTTPRoute"} & set(kinds)
    for path in kubernetes_files():
        for document in documents(path):
            if document["kind"] == "Service":
                assert document["spec"].get("type", "ClusterIP") == "ClusterIP"
            assert "hostPort" not in str(document)
            assert "hostNetwork" not in str(document)
    everyone, operator = documents(KUBERAY / "network_policies.yaml")
    assert everyone["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": {}}]}]}
    assert operator["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 8265}]


def test_secrets_are_named_and_never_written_down():
    wanted = set()
    for path in kubernetes_files():
        for document in documents(path):
            assert document["kind"] != "Secret"
        wanted |= set(re.findall(r"secret(?:Key)?Ref: \{name: ([\w-]+)", path.read_text()))
        assert not re.search(r"(?i)(password|token|secret_access_key)\w*, value:", path.read_text())
    made = set(re.findall(r"create secret generic ([\w-]+)", (ROOT / "docs" / "clusters.md").read_text()))
    assert wanted == made == {"diffdis-s3", "diffdis-mlflow"}


@pytest.mark.ranks
def test_jobs_exist_in_the_image_and_place_their_parts_on_pools_that_the_cluster_has():
    assert {name: script for name, script, _ in configurations()} == {
        name: f"{IMAGE_ROOT}/jobs/{name}.py" for name in ("pretrain", "precompute", "sweep", "eval")
    }
    for job in ray_jobs():
        assert job["metadata"]["namespace"] == yaml.safe_load((KUBERAY / "kustomization.yaml").read_text())["namespace"]
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": ray_cluster()["metadata"]["name"]}
    config = {name: config for name, _, config in configurations()}
    cpu, gpu = ({"pool": pool} for pool in ("cpu", "gpu"))
    assert (config["pretrain"].data.placement, config["pretrain"].train.placement) == (cpu, gpu)
    assert (config["precompute"].data.placement, config["precompute"].placement) == (cpu, gpu)
    assert config["eval"].placement == config["sweep"].evaluation.placement == gpu
    assert (config["sweep"].pretrain.data.placement, config["sweep"].pretrain.train.placement) == (cpu, gpu)
    assert [pool for pool in (cpu, gpu) if pool not in [group["labels"] for group in groups().values()]] == []


@pytest.mark.ranks
def test_jobs_fit_the_pools_that_they_ask_for():
    """Each job fits its pool at its maximum size; the reads of pretraining fit the pool's minimum number of CPU nodes."""
    config = {name: config for name, _, config in configurations()}
    pools = {name: group for name, group in groups().items() if name != "head"}
    limits = {name: group["template"]["spec"]["containers"][0]["resources"]["limits"] for name, group in pools.items()}
    node = {name: {"CPU": int(limit["cpu"]), "GPU": int(limit.get("nvidia.com/gpu", 0))} for name, limit in limits.items()}
    sizes = {name: {kind: n * pools[name]["maxReplicas"] for kind, n in node[name].items()} for name in pools}
    train, data = config["pretrain"].train, config["pretrain"].data
    assert train.max_workers * data.reads_per_rank * data.cpus_per_read <= node["cpu"]["CPU"] * pools["cpu"]["minReplicas"]
    assert train.max_workers * train.cpus_per_worker <= sizes["gpu"]["CPU"]
    for num_gpus in (
        train.max_workers * train.gpus_per_worker,
        config["precompute"].num_encoders * config["precompute"].gpus_per_encoder,
        config["eval"].num_workers * config["eval"].gpus_per_worker,
    ):
        assert num_gpus <= sizes["gpu"]["GPU"]
    from diffdis_platform.sweeping import trial_resources

    for need in trial_resources(config["sweep"]):
        for kind, amount in need.amounts.items():
            assert amount * config["sweep"].max_concurrent <= sizes[need.labels["pool"]][kind]


@pytest.mark.ranks
def test_mlflow_is_the_tracker_that_jobs_name_and_takes_its_options():
    from mlflow.cli import server as mlflow_server  # takes seconds, which every tier would spend at the top of this file

    service = manifest(KUBERAY / "mlflow.yaml", "Service")
    address = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    config = {name: found for name, _, found in configurations()}
    for tracking in (config["pretrain"].tracking, config["eval"].tracking, config["sweep"].tracking):
        assert tracking.uri == address
    container = manifest(KUBERAY / "mlflow.yaml", "Deployment")["spec"]["template"]["spec"]["containers"][0]
    options = mlflow_server.make_context("mlflow server", list(container["args"])).params
    assert options["port"] == container["ports"][0]["containerPort"] == 5000
    assert address.removeprefix("http://") in options["allowed_hosts"].split(",")
    (backend,) = [option for option in mlflow_server.params if option.name == "backend_store_uri"]
    assert backend.envvar in {entry["name"] for entry in container["env"]}
    database = manifest(KUBERAY / "postgres.yaml", "Service")
    (uri,) = [entry["value"] for entry in container["env"] if entry["name"] == backend.envvar]
    assert f"@{database['metadata']['name']}:{database['spec']['ports'][0]['port']}/mlflow" in uri


@pytest.mark.ranks
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which has kustomize in it, is not installed")
def test_kustomize_builds_it_in_one_namespace_with_ones_own_images():
    built = subprocess.run(["kubectl", "kustomize", str(KUBERAY)], capture_output=True, text=True, check=True).stdout
    found = [document for document in yaml.safe_load_all(built) if document]
    assert {d["metadata"].get("namespace", "diffdis") for d in found} == {"diffdis"}
    assert len(found) == sum(len(documents(path)) for path in KUBERAY.glob("*.yaml") if path.name != "kustomization.yaml")
    assert set(re.findall(r"image: (\S+)", built)) == {
        "registry.example.com/diffdis-cpu:0.2.0", "registry.example.com/diffdis-cuda:0.2.0", "postgres:17-alpine"
    }  # fmt: skip
