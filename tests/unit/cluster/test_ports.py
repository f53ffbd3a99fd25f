"""Ports of the local stack."""

import os
import socket

from cluster import ports


def test_a_port_is_free_or_says_who_listens_on_it() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not ports.is_free(port)
        assert f"pid {os.getpid()}" in ports.owner_of(port)
    assert ports.is_free(port)
    assert ports.owner_of(port) == ""
    numbers = ports.find_free(30)
    assert len(set(numbers)) == 30
    assert not set(ports.find_free(30, avoid=numbers)) & set(numbers)
