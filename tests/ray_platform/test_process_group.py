"""Selection of the network interface for the ranks. tests/end_to_end/test_several_hosts.py tests it on separate hosts."""

import os
import socket

import psutil
import pytest
import ray

from ray_platform.train.launch import GLOO_INTERFACE, choose_gloo_interface


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
