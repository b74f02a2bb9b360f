"""Ray's cluster launcher for VMs, containers on one machine, and the setups of docs/clusters.md that need no cloud."""

import shlex

import boto3
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from diffdis_platform.commands import pretrain
from tests.cluster.manifests import CLUSTER, documents, ray_cluster
from tests.support.documentation import blocks

COMMANDS = [(block, command) for block in blocks("docs/clusters.md") if block.is_shell for command in block.commands()]
POOLS = {"head", "cpu", "gpu"}


def aws():
    (config,) = documents(CLUSTER / "aws.yaml")
    return config


def labels(arguments):
    return start.make_context("ray start", list(arguments)).params["labels"]


def test_rays_launcher_takes_the_file():
    config = prepare_config(aws())
    validate_config(config)
    types = config["available_node_types"]
    pools = {name: (t["labels"]["pool"], t["resources"].get("CPU"), t["resources"].get("GPU", 0)) for name, t in types.items()}
    assert pools == {"head": ("head", 0, 0), "cpu": ("cpu", 16, 0), "gpu": ("gpu", 192, 8)}
    assert sum(t["max_workers"] for t in types.values() if t["labels"]["pool"] != "head") == config["max_workers"]
    broken = prepare_config(aws() | {"idle_timeout_minuets": 3})
    with pytest.raises(Exception, match="idle_timeout_minuets"):
        validate_config(broken)


def test_amazon_has_the_fields_of_a_machine():
    """Validates the parameters as boto3 does before a request; the launcher adds the number of machines and the network."""
    client = boto3.client("ec2", region_name=aws()["provider"]["region"], aws_access_key_id="a", aws_secret_access_key="b")
    shape = client.meta.service_model.operation_model("RunInstances").input_shape
    for node_type in aws()["available_node_types"].values():
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node_type["node_config"]}, shape)
        assert not report.has_errors(), report.generate_report()
    wrong = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, "InstanceTyp": "m7i.large"}, shape)
    assert "InstanceTyp" in wrong.generate_report()


def test_machines_are_private_and_drivers_are_on_demand():
    config = aws()
    assert config["provider"]["use_internal_ips"]
    for rule in config["provider"]["security_group"]["IpPermissions"]:
        assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
        assert [entry["CidrIp"] for entry in rule["IpRanges"]] == ["10.0.0.0/8"]
    assert list(config["file_mounts"]) == ["/home/ray/.ray/auth_token"], "the token is on all of them"
    assert "useradd --create-home" in (CLUSTER / "Dockerfile").read_text()
    for key, address in (("head_start_ray_commands", None), ("worker_start_ray_commands", "$RAY_HEAD_IP:6379")):
        stop, command = config[key]
        assert stop == "ray stop", "the commands run again on an existing cluster, where a second `ray start` fails"
        options = start.make_context("ray start", shlex.split(command)[2:]).params
        assert options["address"] == address
        assert options["dashboard_host"] in ("localhost", "127.0.0.1")
    nodes = {name: node_type["node_config"] for name, node_type in config["available_node_types"].items()}
    assert "InstanceMarketOptions" not in nodes["head"]
    assert nodes["gpu"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert {node["MetadataOptions"]["HttpTokens"] for node in nodes.values()} == {"required"}


def test_containers_on_one_machine():
    (compose,) = documents(CLUSTER / "local" / "compose.yaml")
    assert compose["services"].keys() == POOLS
    for name, service in compose["services"].items():
        ray, verb, *arguments = shlex.split(service["command"])
        assert (ray, verb) == ("ray", "start")
        assert labels(arguments) == f"pool={name}"
        assert service["secrets"] == ["ray_token"]
        assert service["environment"] == {"RAY_AUTH_TOKEN_PATH": "/run/secrets/ray_token"}
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
    head = start.make_context("ray start", shlex.split(compose["services"]["head"]["command"])[2:]).params
    assert (head["num_cpus"], head["head"]) == (0, True)


def test_the_pools_are_the_same_everywhere():
    spec = ray_cluster()["spec"]
    kubernetes = {group["labels"]["pool"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])}
    launcher = {node_type["labels"]["pool"] for node_type in aws()["available_node_types"].values()}
    machines = {labels(words[2:]).removeprefix("pool=") for _, words in COMMANDS if words[:2] == ["ray", "start"]}
    assert kubernetes == launcher == machines == POOLS


def test_what_needs_no_cloud_is_run(training_shards, tmp_path, capsys, monkeypatch):
    (line,) = [words for block, words in COMMANDS if not block.mark]
    own = {"/data/my-shards": str(training_shards), "/data/my-run": str(tmp_path / "run")}
    command = pretrain.parse_arguments([own.get(argument, argument) for argument in line[2:]])
    assert "dry_run" in command.switches
    shown = command.config.run(command.recipe).dry_run()
    assert (shown["shards"], shown["workers"]) == (4, 2)
    assert yaml.safe_load(command.yaml)["train"]["placement"] == {"pool": "gpu"}
