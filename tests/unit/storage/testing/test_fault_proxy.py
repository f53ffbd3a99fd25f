"""The proxy in a process of its own: it delays and counts, and is gone with its user."""

import http.server
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from storage.errors import ConfigError
from storage.testing.fault_proxy import delayed


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()
    thread.join()


def _get(url: str) -> float:
    began = time.perf_counter()
    with urllib.request.urlopen(url, timeout=120) as answer:
        assert answer.read() == b"x" * 1000
    return time.perf_counter() - began


def test_the_proxy_delays_and_counts_each_request(server: str) -> None:
    with delayed(server, 0.05) as proxy:
        assert proxy.counts() == (0, 0)
        assert min(_get(proxy.endpoint) for _ in range(3)) >= 0.05
        requests, answered = proxy.counts()
        assert requests == 3
        assert 3000 < answered < 4500
        endpoint = proxy.endpoint
    with pytest.raises(OSError, match="refused"):
        _get(endpoint)


def test_uploads_share_a_slow_way(server: str) -> None:
    def put(endpoint: str) -> None:
        request = urllib.request.Request(endpoint, b"x" * 1000, method="PUT")
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert answer.status == 200

    with delayed(server, 0.0, 10_000) as proxy:
        began = time.perf_counter()
        threads = [threading.Thread(target=put, args=(proxy.endpoint,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.perf_counter() - began >= 0.2


def test_the_proxy_refuses_what_it_cannot_look_into() -> None:
    with pytest.raises(ConfigError, match="plain http"), delayed("https://example.org", 0.005):
        pass
