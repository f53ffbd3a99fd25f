"""`python -m tests.kit.eavesdrop DEVICE`: whether any of some texts passes over a bridge in the clear.

The texts come as a JSON list of strings on standard input. After "listening" it counts the packets in which each
occurs, until its standard input ends. Then it prints `packets`, `missed` (what came faster than it reads) and `counts`
as JSON.
A text that lies across two packets is not noticed there.
"""

import json
import select
import socket
import struct
import sys

_BUFFER_B = 256 << 20
_SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_STATISTICS = 33, 263, 6


def main(device: str) -> None:
    texts = [text.encode() for text in json.loads(sys.stdin.readline())]
    counts = [0] * len(texts)
    packets = 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as wire:
        wire.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_B)
        wire.bind((device, 0))
        print("listening", flush=True)
        while True:
            ready = select.select([wire, sys.stdin], [], [])[0]
            if wire in ready:
                frame = wire.recv(1 << 16)
                packets += 1
                for number, text in enumerate(texts):
                    counts[number] += text in frame
            elif sys.stdin in ready:
                break
        missed = struct.unpack("II", wire.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
    print(json.dumps({"packets": packets, "missed": missed, "counts": counts}))


if __name__ == "__main__":
    main(sys.argv[1])
