"""The network interface by which workers of several nodes talk to each other.

gloo and NCCL connect to the address of the host's name. Debian and Ubuntu write `127.0.1.1 NAME` into /etc/hosts, so
that workers on other nodes connect to themselves and wait for ever. Ray knows the address by which its nodes reach each
other: the interface that has it is named to both libraries in each process before it joins a group.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import psutil
from ray.util import get_node_ip_address

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
SET_UP = "jobs.on_ray.interface.name_interface"
"""What a `worker_process_setup_hook` calls."""


def name_interface() -> None:
    """Name this node's interface in the environment of this process; what the node's own environment says stays."""
    address: Any = get_node_ip_address  # untyped
    name = interface_of(address(), _addresses())
    if name is not None:
        for variable in VARIABLES:
            os.environ.setdefault(variable, name)


def interface_of(address: str, interfaces: Mapping[str, Iterable[str]]) -> str | None:
    """The interface that has an address, if one has.

    Args:
        interfaces: Addresses of each.
    """
    # An address of IPv6 that is valid on a link only has the link behind it.
    return next((name for name, own in interfaces.items() if address in {a.partition("%")[0] for a in own}), None)


def _addresses() -> dict[str, list[str]]:
    return {name: [item.address for item in items] for name, items in psutil.net_if_addrs().items()}
