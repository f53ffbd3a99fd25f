"""`python -m tests.chaos.ports ADDRESS...`: every TCP port of these machines that answers, as JSON.

With `--own`: what listens on this machine.
"""

import asyncio
import json
import sys

import psutil

_AT_A_TIME, _PATIENCE_S = 400, 3.0


async def _open_ports(address: str) -> list[int]:
    gate = asyncio.Semaphore(_AT_A_TIME)

    async def answers(port: int) -> bool:
        async with gate:
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), _PATIENCE_S)
            except (OSError, TimeoutError):
                return False
            writer.close()
            return True

    answered = await asyncio.gather(*(answers(port) for port in range(1, 65536)))
    return [port for port, yes in enumerate(answered, 1) if yes]


def _own_ports() -> dict[int, str]:
    """What listens here beyond loopback: the program behind each port."""
    programs: dict[int, str] = {}
    for process in psutil.process_iter():
        try:
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.startswith("127."):
                    programs[connection.laddr.port] = " ".join(process.cmdline())[:300]
        except psutil.Error:
            continue
    return programs


if __name__ == "__main__":
    if sys.argv[1:] == ["--own"]:
        print(json.dumps(_own_ports()))
    else:
        print(json.dumps({address: asyncio.run(_open_ports(address)) for address in sys.argv[1:]}))
