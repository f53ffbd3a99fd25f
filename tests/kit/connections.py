"""`python -m tests.kit.connections DEVICE ADDRESS/BITS`: who connects to whom on a bridge, as lines of JSON.

It sees the first packet of each TCP connection inside the network, and every packet to anywhere else. It is the
network's name server too, at its own address there: it knows no name, says so, and writes down what was asked.
"""

import ctypes
import ipaddress
import json
import select
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

_ETHERNET, _IP = 14, 20
_SO_ATTACH_FILTER = 26


def _filter(network: ipaddress.IPv4Network) -> bytes:
    """A program of the kernel's filter (classic BPF), so that the rest of the traffic costs nothing here."""
    mask, address = int(network.netmask), int(network.network_address)
    program = [  # code, lines to skip if so, lines to skip if not, value
        (0x28, 0, 0, 12),  # load the kind of frame
        (0x15, 0, 8, 0x0800),  # IPv4, or drop
        (0x20, 0, 0, _ETHERNET + 16),  # load the destination
        (0x54, 0, 0, mask),
        (0x15, 0, 6, address),  # elsewhere: take
        (0x30, 0, 0, _ETHERNET + 9),  # load the protocol
        (0x15, 0, 3, socket.IPPROTO_TCP),
        (0x30, 0, 0, _ETHERNET + _IP + 13),  # load TCP's flags
        (0x54, 0, 0, 0x12),
        (0x15, 1, 0, 0x02),  # SYN without ACK: take
        (0x06, 0, 0, 0),
        (0x06, 0, 0, 1500),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in program)


def _name_asked(data: bytes) -> str:
    """The first name of a DNS query; empty where it is none."""
    labels, at = [], 12
    while at < len(data) and data[at]:
        labels.append(data[at + 1 : at + 1 + data[at]].decode("ascii", "replace"))
        at += data[at] + 1
    return ".".join(labels)


def _pair(frame: bytes, network: ipaddress.IPv4Network) -> dict[str, Any]:
    source, to = (str(ipaddress.IPv4Address(frame[at : at + 4])) for at in (_ETHERNET + 12, _ETHERNET + 16))
    body = frame[_ETHERNET + 4 * (frame[_ETHERNET] & 15) :]
    has_ports = frame[_ETHERNET + 9] in (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
    port = int.from_bytes(body[2:4], "big") if has_ports else 0
    return {"source": source, "to": to, "port": port, "outside": ipaddress.IPv4Address(to) not in network, "asks": ""}


def _no_such_name(query: bytes) -> bytes:
    """The answer to a DNS query: its number and question, "recursion available", code 3."""
    end = query.index(0, 12) + 5
    return query[:2] + b"\x81\x83" + query[4:6] + bytes(6) + query[12:end]


def listen(device: str, address: ipaddress.IPv4Interface) -> Iterator[dict[str, Any]]:
    """Each new pair of source and destination: `source`, `to`, `port`, `outside`, and `asks`, a name looked up.

    Args:
        device: The bridge.
        address: Its own address and network.
    """
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as packets,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as names,
    ):
        code = ctypes.create_string_buffer(_filter(address.network))
        program = struct.pack("HP", len(code) // 8, ctypes.addressof(code))
        packets.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        packets.bind((device, 0))
        names.bind((str(address.ip), 53))
        pairs = set()
        while True:
            for ready in select.select([packets, names], [], [])[0]:
                data, sender = ready.recvfrom(1500)
                if ready is names:
                    if len(data) < 17 or 0 not in data[12:-4]:  # no query; whoever sends one has no answer to wait for
                        continue
                    names.sendto(_no_such_name(data), sender)
                    pair = {"source": sender[0], "to": str(address.ip), "port": 53, "outside": False}
                    pair |= {"asks": _name_asked(data)}
                else:
                    pair = _pair(data, address.network)
                if (key := tuple(pair.values())) not in pairs:
                    pairs.add(key)
                    yield pair


if __name__ == "__main__":
    print("listening", flush=True)
    for line in listen(sys.argv[1], ipaddress.IPv4Interface(sys.argv[2])):
        print(json.dumps(line), flush=True)
