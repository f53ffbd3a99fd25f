"""A TCP proxy that delays every request and counts requests and bytes, in a process of its own.

`python -m jobs.bench.storage.proxy HOST PORT DELAY_MS` prints its two ports: the proxy and the counter, which answers a
connection with "REQUESTS BYTES". It ends with its standard input. Only requests without a body pass rightly.
"""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from storage.errors import ConfigError, StackError

READ = 1 << 20


class Proxy:
    """A running proxy, as its user sees it."""

    def __init__(self, port: int, control: int) -> None:
        self.endpoint, self._control = f"http://127.0.0.1:{port}", control

    def counts(self) -> tuple[int, int]:
        """Requests forwarded and bytes answered so far."""
        with socket.create_connection(("127.0.0.1", self._control), timeout=10) as connection:
            requests, answered = connection.makefile("rb").read().split()
        return int(requests), int(answered)


@contextmanager
def delayed(endpoint: str, delay_ms: float) -> Iterator[Proxy]:
    """Run a proxy in front of a plain HTTP endpoint.

    Raises:
        ConfigError: the endpoint is not plain HTTP, which cannot be looked into.
        StackError: the proxy did not start.
    """
    parts = urlsplit(endpoint)
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(endpoint, expected="a plain http:// endpoint to delay", found=parts.scheme or "no scheme")
    command = [sys.executable, "-m", "jobs.bench.storage.proxy", parts.hostname, str(parts.port or 80), str(delay_ms)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ports = process.stdout.readline().split()
        if len(ports) != 2:
            raise StackError("delay proxy", expected="two ports", found="it ended at once")
        yield Proxy(int(ports[0]), int(ports[1]))
    finally:
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()


class _Counts:
    def __init__(self) -> None:
        self.requests = self.answered = 0


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float, counts: _Counts, *, requests: bool
) -> None:
    tail = b""
    try:
        while data := await reader.read(READ):
            if requests:
                # A request without a body is a header block, and that ends with an empty line.
                counts.requests += (tail + data).count(b"\r\n\r\n")
                tail = data[-3:]
                await asyncio.sleep(delay_s)
            else:
                counts.answered += len(data)
            writer.write(data)
            await writer.drain()
    except (ConnectionError, TimeoutError):
        pass  # one side left; closing the other tells it
    finally:
        writer.close()


async def _serve(host: str, port: int, delay_s: float) -> None:
    counts = _Counts()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, out = await asyncio.open_connection(host, port, limit=READ)
        except OSError:
            writer.close()
            return
        with suppress(asyncio.CancelledError):  # the proxy is ending; clients keep idle connections open
            await asyncio.gather(
                _forward(reader, out, delay_s, counts, requests=True),
                _forward(back, writer, delay_s, counts, requests=False),
            )

    async def control(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{counts.requests} {counts.answered}".encode())
        await writer.drain()
        writer.close()

    servers = [
        await asyncio.start_server(connection, "127.0.0.1", 0, limit=READ, backlog=256),
        await asyncio.start_server(control, "127.0.0.1", 0),
    ]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1000))
