"""What a store counts of its own work, for whoever watches a job."""

from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np

from storage.objects import open_store
from storage.objects.retry import RetryPolicy
from storage.objects.s3_http import open_http
from storage.objects.traffic import Tally, tally_of
from storage.reading.node_cache import NodeCache
from storage.reading.volume_store import Crop, VolumeStore
from tests.kit.httpserver import served
from tests.kit.phantoms import write_phantoms


def test_requests_retries_and_bytes_of_a_store_on_the_network(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    answers = [503, 200, 200]

    class Once503(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if answers.pop(0) == 503:
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None: ...

    with served(tmp_path, Once503) as url:
        store = open_http(url, RetryPolicy(deadline_s=60, attempt_s=10, first_s=0.001))
        assert tally_of(store) == Tally()
        assert len(store.get("a")) == 1000
        assert tally_of(store) == Tally(requests=2, retries=1, read_bytes=1000)
        store.get("a")
        assert tally_of(store) == Tally(requests=3, retries=1, read_bytes=2000)


def test_a_folder_sends_no_requests(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    store.put("a", b"x")
    store.get("a")
    assert tally_of(store) == Tally()


def test_hits_and_misses_of_the_cache_are_chunks(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    write_phantoms(url, 1)
    with VolumeStore(url, cache=NodeCache(tmp_path / "cache", 1 << 30)) as store:
        crop = Crop("phantom-000", (0, 0, 0), (8, 8, 8))

        def counts() -> tuple[int, int]:
            tallies: dict[str, Any] = store.tallies()
            assert tallies["requests"] == 0
            return tallies["cache_hits"], tallies["cache_misses"]

        first = store.read(crop)
        hits, misses = counts()
        assert hits == 0
        assert misses > 0
        np.testing.assert_array_equal(store.read(crop), first)
        assert counts() == (misses, misses)
    with VolumeStore(url) as store:
        store.read(crop)
        assert counts() == (0, 0), "there is no cache"
