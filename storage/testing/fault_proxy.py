"""An HTTP proxy on loopback that misbehaves on command, to test what a client makes of a bad network or server.

It stands between a client and a real server: `proxy.inject(Status(503), times=3)` answers the next three requests
itself; everything else passes byte for byte. With `latency_s` alone it is a long way to the server: `delayed` runs it
so for benchmarks, in a process of its own, whose work is not counted as the client's.
"""

import asyncio
import contextlib
import re
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from storage.errors import ConfigError, StackError

_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with this status and an S3 error document instead of asking the server."""

    code: int = 503
    error: str = "SlowDown"


@dataclass(frozen=True, slots=True)
class Reset:
    """Cut the connection with a TCP reset after so many bytes of the body; None: before any answer."""

    after: int | None = None


@dataclass(frozen=True, slots=True)
class Truncate:
    """Close after so many bytes of the body, in an orderly way, though more were promised."""

    after: int = 0


@dataclass(frozen=True, slots=True)
class Slow:
    """Pass the body on at so many bytes a second."""

    bytes_per_s: float = 1000.0


@dataclass(frozen=True, slots=True)
class Stall:
    """Take the request and never answer."""


@dataclass(frozen=True, slots=True)
class Flip:
    """Invert one bit of the body at this place (from the end if negative); lengths stay right."""

    at: int = 0


Fault = Status | Reset | Truncate | Slow | Stall | Flip


@dataclass(frozen=True, slots=True)
class Request:
    """What the client asked for."""

    method: str
    path: str
    range: str


@dataclass(slots=True)
class _Rule:
    fault: Fault
    match: Callable[[Request], bool]
    left: int | None


@dataclass(slots=True)
class _Head:
    first: str
    raw: bytes
    fields: dict[str, str] = field(default_factory=dict)


class FaultProxy:
    """See the module. A context manager; `endpoint` is what the client is given.

    Args:
        target: `http://127.0.0.1:PORT` of the real server.
        latency_s: Added to every request before it is passed on.
        upload_bytes_per_s: What all bodies of requests together get; 0: as fast as they come.
    """

    def __init__(self, target: str, latency_s: float = 0.0, upload_bytes_per_s: float = 0.0) -> None:
        host, _, port = target.removeprefix("http://").rstrip("/").partition(":")
        self._target = (host, int(port))
        self.latency_s = latency_s
        self._upload_bytes_per_s, self._free_at = upload_bytes_per_s, 0.0
        self.requests: list[Request] = []
        self.sent_bytes = 0
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._ready = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread.start()
        self._ready.wait(10)

    def inject(self, fault: Fault, *, times: int | None = None, match: str = "", method: str = "GET") -> None:
        """Do this to the next `times` requests (None: to all) of that method whose path contains `match`."""

        def fits(request: Request) -> bool:
            return request.method == method and match in request.path

        with self._lock:
            self._rules.append(_Rule(fault, fits, times))

    def clear(self) -> None:
        """Behave again, and forget the requests counted so far."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()
            self.sent_bytes = 0

    def count(self) -> Counter[str]:
        """Requests seen, by method."""
        with self._lock:
            return Counter(request.method for request in self.requests)

    def close(self) -> None:
        """Cut every connection and end."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, sock=self._socket, limit=_LIMIT))
        self._loop.call_soon(self._ready.set)
        self._loop.run_forever()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.close()

    def _fault(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for rule in self._rules:
                if rule.left != 0 and rule.match(request):
                    if rule.left is not None:
                        rule.left -= 1
                    return rule.fault
            return None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        # asyncio does this by itself only for sockets that were made with the protocol spelled out.
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        upstream: asyncio.StreamWriter | None = None
        try:
            answers: asyncio.StreamReader | None = None
            while (head := await _head(reader)) is not None:
                method, path, _ = head.first.split(" ", 2)
                fault = self._fault(Request(method, path, head.fields.get("range", "")))
                if head.fields.get("expect", "").lower() == "100-continue":
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # the server is not asked, or it would answer twice
                    head.raw = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head.raw, count=1)
                body = await _body(reader, head)
                if self._upload_bytes_per_s:
                    await self._carry(len(body))
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                if isinstance(fault, Stall):
                    await asyncio.sleep(3600)
                if isinstance(fault, Reset) and fault.after is None:
                    _reset(writer)
                    return
                if isinstance(fault, Status):
                    text = f"<Error><Code>{fault.error}</Code><Message>injected</Message></Error>".encode()
                    line = f"HTTP/1.1 {fault.code} Injected\r\nContent-Length: {len(text)}\r\n\r\n"
                    writer.write(line.encode() + (b"" if method == "HEAD" else text))
                    await writer.drain()
                    continue
                if upstream is None or answers is None:
                    answers, upstream = await asyncio.open_connection(*self._target, limit=_LIMIT)
                upstream.write(head.raw + body)
                await upstream.drain()
                if not await self._answer(answers, writer, method, fault):
                    return
        except asyncio.CancelledError:
            return  # only `close` cancels
        except (OSError, asyncio.IncompleteReadError, ValueError):
            # One side went away; the other sees a reset, which is what a network would show it.
            _reset(writer)
        finally:
            self._tasks.discard(task)
            for side in (writer, upstream):
                if side is not None:
                    with contextlib.suppress(OSError, RuntimeError):
                        side.close()

    async def _carry(self, size: int) -> None:
        """Take as long as `size` bytes do, behind those that came before them."""
        now = self._loop.time()
        self._free_at = max(now, self._free_at) + size / self._upload_bytes_per_s
        await asyncio.sleep(self._free_at - now)

    async def _answer(
        self, answers: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, fault: Fault | None
    ) -> bool:
        """Pass one answer on; False when the connection was cut."""
        head = await _head(answers)
        if head is None:
            raise ConnectionResetError
        self._send(writer, head.raw)
        status = head.first.split(" ", 2)[1]
        if method == "HEAD" or status in ("204", "304") or status.startswith("1"):
            await writer.drain()
            return True
        if head.fields.get("transfer-encoding", "").lower() == "chunked":
            while True:
                line = await answers.readuntil(b"\r\n")
                block = line + await answers.readexactly(int(line.split(b";")[0], 16) + 2)
                self._send(writer, block)
                await writer.drain()
                if line.strip() == b"0":
                    return True
        size = int(head.fields.get("content-length", "0"))
        done = 0
        while done < size:
            data = await answers.read(min(size - done, _LIMIT))
            if not data:
                raise ConnectionResetError
            if isinstance(fault, Flip):
                place = (fault.at if fault.at >= 0 else size + fault.at) - done
                if 0 <= place < len(data):
                    data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            if isinstance(fault, (Reset, Truncate)):
                room = (fault.after or 0) - done
                if len(data) >= room:
                    self._send(writer, data[:room])
                    await writer.drain()
                    if isinstance(fault, Reset):
                        _reset(writer)
                    return False
            if isinstance(fault, Slow):
                step = max(1, int(fault.bytes_per_s / 10))
                for at in range(0, len(data), step):
                    self._send(writer, data[at : at + step])
                    await writer.drain()
                    await asyncio.sleep(0.1)
            else:
                self._send(writer, data)
            done += len(data)
            await writer.drain()
        return True

    def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        self.sent_bytes += len(data)  # first, since a client that has them may ask for the count at once
        writer.write(data)


class ProxyProcess:
    """A proxy in a process of its own; `endpoint` is what the client is given."""

    def __init__(self, process: subprocess.Popen[bytes], endpoint: str) -> None:
        self.endpoint, self._process = endpoint, process

    def counts(self) -> tuple[int, int]:
        """Requests seen and bytes answered so far, heads included."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        requests, answered = self._process.stdout.readline().split()
        return int(requests), int(answered)


@contextmanager
def delayed(endpoint: str, latency_s: float, upload_bytes_per_s: float = 0.0) -> Iterator[ProxyProcess]:
    """Run a proxy in front of a plain HTTP endpoint, in a process of its own.

    Args:
        latency_s: Added to every request before it is passed on.
        upload_bytes_per_s: See `FaultProxy`.

    Raises:
        ConfigError: the endpoint is not plain HTTP, which cannot be looked into.
        StackError: the proxy did not start.
    """
    parts = urlsplit(endpoint)
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(endpoint, expected="a plain http:// endpoint to delay", found=parts.scheme or "no scheme")
    target = f"http://{parts.hostname}:{parts.port or 80}"
    command = [sys.executable, "-m", "storage.testing.fault_proxy", target, str(latency_s)]
    command.append(str(upload_bytes_per_s))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        own_endpoint = process.stdout.readline().decode().strip()
        if not own_endpoint:
            raise StackError("delay proxy", expected="its endpoint", found="it ended at once")
        yield ProxyProcess(process, own_endpoint)
    finally:
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()


def _serve(target: str, latency_s: float, upload_bytes_per_s: float) -> None:
    """Print the endpoint, then a line of counts for each line read; end with the standard input."""
    with FaultProxy(target, latency_s, upload_bytes_per_s) as proxy:
        print(proxy.endpoint, flush=True)
        for _ in sys.stdin:
            print(proxy.count().total(), proxy.sent_bytes, flush=True)


async def _head(reader: asyncio.StreamReader) -> _Head | None:
    """A request's or an answer's head; None at the end of the connection."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    first, *lines = raw.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return _Head(first, raw, {name.lower().strip(): value.strip() for name, _, value in pairs})


async def _body(reader: asyncio.StreamReader, head: _Head) -> bytes:
    """A request's body as it came; one in chunks with their sizes and the trailers."""
    if head.fields.get("transfer-encoding", "").lower() != "chunked":
        size = int(head.fields.get("content-length", "0"))
        return await reader.readexactly(size) if size else b""
    body = bytearray()
    size = 1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        body += line + (await reader.readexactly(size + 2) if size else b"")
    while line != b"\r\n":
        line = await reader.readuntil(b"\r\n")
        body += line
    return bytes(body)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    with contextlib.suppress(OSError, AttributeError):
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
