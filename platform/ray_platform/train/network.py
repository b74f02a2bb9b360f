"""How the ranks of a training find each other: torch's process group over the network that Ray's nodes know each other by."""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


class ProcessGroup(TorchConfig):
    """What Ray Train takes, with gloo on the right interface."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


def choose_interface() -> None:
    """Where a user has not: the interface that has this node's address in the cluster.

    Gloo itself takes the address that the host's name stands for. That is 127.0.1.1 on many a machine (Debian's installer
    writes it so), where no other host finds it: the ranks' first words would be `connection refused`.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ.setdefault(INTERFACE, name)
