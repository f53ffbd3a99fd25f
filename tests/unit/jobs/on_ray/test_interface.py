"""Workers talk by the interface that has the address which Ray knows."""

import pytest

from jobs.on_ray import interface

INTERFACES = {"lo": ["127.0.0.1", "::1"], "docker0": ["172.17.0.1"], "eth1": ["10.0.0.7", "fe80::1%eth1"]}


@pytest.mark.parametrize(
    ("address", "name"), [("10.0.0.7", "eth1"), ("127.0.0.1", "lo"), ("fe80::1", "eth1"), ("10.0.0.8", None)]
)
def test_the_interface_of_an_address_is_named(address: str, name: str | None) -> None:
    assert interface.interface_of(address, INTERFACES) == name


def test_the_nodes_own_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr(interface, "_addresses", lambda: INTERFACES)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    interface.name_interface()
    assert interface.os.environ["GLOO_SOCKET_IFNAME"] == "eth1"
    assert interface.os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
