"""The download: resumed, checked, whole or not at all; against a real server on loopback."""

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from storage.datasets.hippocampus import fetch_hippocampus
from storage.errors import ConfigError, StoreError


def archive(names: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


FILES = {
    "Task04/dataset.json": json.dumps({"name": "Hippocampus", "labels": {"0": "background", "1": "Anterior"}}).encode(),
    "Task04/imagesTr/hippocampus_001.nii.gz": b"image" * 40_000,
    "Task04/imagesTr/._hippocampus_001.nii.gz": b"finder",
    "Task04/labelsTr/hippocampus_001.nii.gz": b"label" * 10_000,
    "Task04/imagesTs/hippocampus_002.nii.gz": b"test" * 1000,
    "../../escape.nii.gz": b"no",
}
TAR = archive(FILES)
MD5 = hashlib.md5(TAR, usedforsecurity=False).hexdigest()


class Server:
    """Serves one body; `cut` ends the connection after so many bytes, as often as listed."""

    def __init__(self) -> None:
        self.body, self.status, self.ranges, self.cuts = TAR, 200, True, list[int]()
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range", "")
                outer.asked.append(wanted)
                if outer.status != 200:
                    self.send_error(outer.status)
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and outer.ranges else 0
                if start > len(outer.body):
                    self.send_error(416)
                    return
                part = outer.body[start:]
                self.send_response(206 if wanted and outer.ranges else 200)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part[: outer.cuts.pop(0)] if outer.cuts else part)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/Task04_Hippocampus.tar"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def check(path: Path) -> None:
    assert (path / "images" / "hippocampus_001.nii.gz").read_bytes() == FILES["Task04/imagesTr/hippocampus_001.nii.gz"]
    assert (path / "labels" / "hippocampus_001.nii.gz").read_bytes() == FILES["Task04/labelsTr/hippocampus_001.nii.gz"]
    assert sorted(p.name for p in path.rglob("*.nii.gz")) == ["hippocampus_001.nii.gz"] * 2
    facts = json.loads((path / "dataset.json").read_text())
    assert facts["labels"]["1"] == "Anterior"
    assert facts["origin"]["sha256"] == hashlib.sha256(TAR).hexdigest()
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_it_downloads_checks_and_unpacks(server, tmp_path):
    seen: list[tuple[int, int]] = []
    path = fetch_hippocampus(tmp_path / "h", lambda n, total: seen.append((n, total)), url=server.url, md5=MD5)
    check(path)
    assert seen[-1] == (len(TAR), len(TAR))
    fetch_hippocampus(path, url=server.url, md5=MD5)
    assert len(server.asked) == 1


def test_a_cut_connection_is_continued_where_it_ended(server, tmp_path):
    server.cuts = [70_000, 90_000]
    check(fetch_hippocampus(tmp_path / "h", url=server.url, md5=MD5))
    assert server.asked == ["", "bytes=70000-", "bytes=160000-"]


def test_a_later_call_continues_an_earlier_one(server, tmp_path):
    server.cuts = [70_000]
    with pytest.raises(StoreError, match="ended early"):
        fetch_hippocampus(tmp_path / "h", url=server.url, md5=MD5, tries=1)
    assert not (tmp_path / "h").exists()
    check(fetch_hippocampus(tmp_path / "h", url=server.url, md5=MD5))
    assert server.asked[-1] == "bytes=70000-"


def test_a_server_without_ranges_sends_it_again(server, tmp_path):
    server.cuts, server.ranges = [70_000], False
    check(fetch_hippocampus(tmp_path / "h", url=server.url, md5=MD5))


def test_left_over_bytes_of_something_longer_are_dropped(server, tmp_path):
    (tmp_path / "h.download").write_bytes(b"x" * (len(TAR) + 10))
    check(fetch_hippocampus(tmp_path / "h", url=server.url, md5=MD5))


def test_another_file_is_refused_and_not_kept(server, tmp_path):
    server.body = TAR[:-1] + b"x"
    with pytest.raises(StoreError, match=f"MD5 {MD5}"):
        fetch_hippocampus(tmp_path / "h", url=server.url, md5=MD5)
    assert list(tmp_path.iterdir()) == []
    server.body = b"<html>please log in</html>"
    login = hashlib.md5(server.body, usedforsecurity=False).hexdigest()
    with pytest.raises(StoreError, match="tar archive"):
        fetch_hippocampus(tmp_path / "h", url=server.url, md5=login)
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize(("status", "asked"), [(403, 1), (404, 1), (503, 2)])
def test_what_the_server_says_is_passed_on(server, tmp_path, status, asked):
    server.status = status
    with pytest.raises(StoreError, match=f"HTTP {status}") as error:
        fetch_hippocampus(tmp_path / "h", url=server.url, md5=MD5, tries=2)
    assert len(server.asked) == asked
    assert "--data" in error.value.remedy


def test_no_network_says_what_to_do(tmp_path):
    with pytest.raises(StoreError, match="refused") as error:
        fetch_hippocampus(tmp_path / "h", url="http://127.0.0.1:9/x.tar", tries=1)
    assert "download the file elsewhere" in error.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="other files"):
        fetch_hippocampus(tmp_path, url="http://127.0.0.1:9/x.tar")
