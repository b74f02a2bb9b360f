"""The environment of the ranks: network interface and GPUs. tests/end_to_end/test_several_hosts.py tests it on separate hosts."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest
import ray

from ray_platform.train import launch
from ray_platform.train.launch import GLOO_INTERFACE, ProcessGroupConfig, choose_gloo_interface


@pytest.fixture
def node_at(monkeypatch):
    """Function that sets this node's address in its cluster."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != GLOO_INTERFACE})
    return lambda address: monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)


@pytest.mark.parametrize(
    ("name", "address"),
    [(name, known.address) for name, all_ in psutil.net_if_addrs().items() for known in all_ if known.family == socket.AF_INET],
)
def test_gloo_takes_the_interface_that_has_the_nodes_address(node_at, name, address):
    node_at(address)
    choose_gloo_interface()
    assert os.environ[GLOO_INTERFACE] == name


def test_what_a_user_has_set_stands_and_an_unknown_address_sets_nothing(node_at):
    node_at("192.0.2.1")  # reserved for documentation, so no machine has this address
    choose_gloo_interface()
    assert GLOO_INTERFACE not in os.environ
    os.environ[GLOO_INTERFACE] = "ib0"
    node_at("127.0.0.1")
    choose_gloo_interface()
    assert os.environ[GLOO_INTERFACE] == "ib0"


@pytest.mark.parametrize(("backend", "visible"), [("gloo", ""), ("nccl", "0,1")])
def test_workers_that_train_on_cpus_see_no_gpu(node_at, monkeypatch, backend, visible):
    """Ray leaves the GPUs of the node visible to workers that request none."""
    node_at("192.0.2.1")
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    seen = []
    monkeypatch.setattr(launch._TorchBackend, "on_start", lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    config = ProcessGroupConfig(backend)
    config.backend_cls().on_start(SimpleNamespace(execute=lambda function: function()), config)
    assert seen == [visible]
