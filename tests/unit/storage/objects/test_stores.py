"""The store contract for the backends that need no server, and what is theirs alone."""

import fcntl
import os
import pickle
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import obstore
import pytest

from storage.errors import ConfigError, NotFound, NotOffered, StoreError
from storage.format.layout import Layout
from storage.objects import ByteStore, join, open_store
from storage.objects.any_fsspec import FsspecStore
from storage.objects.local import FileStore
from storage.objects.retry import RetryPolicy
from storage.objects.s3_http import ObjectStore
from storage.reading.verify import verify
from storage.reading.volume_store import VolumeStore
from storage.testing.phantoms import publish_phantoms
from storage.testing.stores import ReadOnlyContract, StoreContract
from tests.kit.httpserver import served


class TestFile(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ByteStore:
        return open_store((tmp_path / "a store").as_uri())


class TestMemory(StoreContract):
    @pytest.fixture
    def store(self) -> ByteStore:
        return open_store(f"memory://{uuid.uuid4().hex}")


class TestFsspec(StoreContract):
    """fsspec's own local file system stands for all the others."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> ByteStore:
        return FsspecStore(f"file://{tmp_path}/x", RetryPolicy(2.0, 1.0))

    def test_equal_urls_see_the_same_objects(self, store: ByteStore) -> None:
        store.put("part/x", b"here")
        assert FsspecStore(store.url, RetryPolicy()).get("part/x") == b"here"

    def test_of_many_writers_if_absent_one_wins(self, store: ByteStore) -> None:
        """Not promised here: fsspec has no conditional write."""
        assert store.put("lock", b"0", if_absent=True)

    def test_of_many_writers_that_swap_none_is_lost(self, store: ByteStore) -> None:
        """As above."""
        assert store.swap("lock", b"0", None)

    def test_a_call_that_never_ends_is_an_error_in_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """fsspec knows no deadline, and a library's default may be none."""
        store, end = FsspecStore(f"file://{tmp_path}", RetryPolicy(0.4, 0.1)), threading.Event()
        monkeypatch.setattr(store._fs, "cat_file", lambda *_, **__: end.wait(60))
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"some/key.*no answer within 0.1 s"):
            store.get("some/key")
        assert time.monotonic() - began < 10
        end.set()

    def test_errors_of_any_kind_name_the_key(self, store: ByteStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each file system of fsspec has errors of its own."""

        def failing(*_: object, **__: object) -> bytes:
            raise RuntimeError("550 no")

        monkeypatch.setattr(store._fs, "cat_file", failing)  # type: ignore[attr-defined]
        with pytest.raises(StoreError, match=r"x/some/key.*RuntimeError: 550 no"):
            store.get("some/key")


class TestHttp(ReadOnlyContract):
    @pytest.fixture
    def writer(self, tmp_path: Path) -> ByteStore:
        return FileStore(tmp_path / "a store")

    @pytest.fixture
    def store(self, writer: ByteStore, tmp_path: Path) -> Iterator[ByteStore]:
        (tmp_path / "a store").mkdir()
        with served(tmp_path) as url:
            yield open_store(f"{url}/a%20store")

    def test_a_plain_server_does_not_list_and_says_so(self, store: ByteStore) -> None:
        with pytest.raises(NotOffered, match=r"folder.*lists its objects.*501"):
            list(store.list("folder/"))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("s3://b", "x", "y"), "s3://b/x/y"),
        (("s3://b/", "/x/", ""), "s3://b/x"),
        (("/tmp/a", "b"), "/tmp/a/b"),
        (("memory://", "b"), "memory://b"),
        (("file:///", "b"), "file:///b"),
        (("s3://b/c",), "s3://b/c"),
    ],
)
def test_join(parts: tuple[str, ...], expected: str) -> None:
    assert join(*parts) == expected


def test_a_plain_path_is_a_file_store(tmp_path: Path) -> None:
    open_store(str(tmp_path / "x")).put("k", b"v")
    assert (tmp_path / "x" / "k").read_bytes() == b"v"
    assert open_store(f"file://{tmp_path}/x").get("k") == b"v"


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "nosuch://a/b",
        "file://elsewhere/x",
        "s3://user:secret@bucket/x",
        "s3://KEY:sec/secret/ret@bucket/x",
        "S3://KEY:sec/secret/ret@bucket/x",
        "s3a://KEY:sec/secret/ret@bucket/x",
        "s3:/user:secret@bucket/x",
        "ftp://user:secret@host/x",
        "simplecache::s3://user:secret@bucket/x",
        "http://[secret/x",
        "s3:/bucket/x",
        "s3:bucket/x",
        "file:/tmp/x",
        "s3://bucket/x?versionId=1",
        "s3://bucket/set#1",
        "file:///tmp/set#1",
        "http://host/x?token=1",
    ],
)
def test_a_bad_url_is_refused_without_repeating_its_secret(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert "secret" not in str(caught.value) or url == "http://[secret/x"


@pytest.mark.parametrize(
    "url",
    [
        "",
        " ",
        "s3://volumes/a/../b",
        "s3://volumes/./x",
        "s3://volumes/a//b",
        "s3://volumes/..",
        "s3://volumes/a\x01b",
        "s3://volumes/%2e%2e/x",
        "s3:///x",
        " s3://volumes/x",
        "s3://volumes/x\n",
        "memory://a/../b",
        "https://h/a/../b",
        "gs://b/../c",
        "file:///a\x00b",
        "a\tb",
        "s3://volumes//",
    ],
)
def test_a_url_that_could_mean_another_place_is_refused_before_any_request(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket", None)  # no request, not even of credentials
    with pytest.raises(ConfigError, match="expected"):
        open_store(url)
    assert not list(tmp_path.iterdir())


def test_odd_but_right_urls_mean_what_they_say(tmp_path: Path) -> None:
    for name in ("a#b", "a?b", "a%20b", "ü b", "c:d", "x@y"):
        FileStore(tmp_path / name).put("k", name.encode())
        assert (tmp_path / name / "k").read_bytes() == name.encode()
        assert open_store(FileStore(tmp_path / name).url).get("k") == name.encode()


def test_no_credentials_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ConfigError, match="AWS_SHARED_CREDENTIALS_FILE"):
        open_store("s3://bucket/x")


@pytest.mark.parametrize("url", ["memory://pickled/x", "file"])
def test_stores_survive_pickling(url: str, tmp_path: Path) -> None:
    store = open_store(url if url != "file" else str(tmp_path))
    store.put("k", b"v")
    assert pickle.loads(pickle.dumps(store)).get("k") == b"v"  # noqa: S301


def test_only_a_file_is_an_object(tmp_path: Path) -> None:
    """A folder has a size and a pipe waits for its writer; neither is what was asked for."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for key in ("folder", "pipe"):
        assert not FileStore(tmp_path).exists(key)
        for call in (FileStore(tmp_path).get, FileStore(tmp_path).head):
            with pytest.raises(NotFound, match=key):
                call(key)


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_empty(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StoreError, match="loop"):
        list(FileStore(tmp_path / "loop").list())
    (tmp_path / "file").write_bytes(b"-")
    assert list(FileStore(tmp_path).list("file/")) == []


def test_a_lock_held_by_a_stopped_process_is_an_error_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)
    store.put("latest", b"1")
    monkeypatch.setattr("storage.objects.local._LOCK_WAIT", RetryPolicy(0.5, 0.1))
    with (tmp_path / ".put-lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"latest.*another process is writing it"):
            store.swap("latest", b"2", b"1")
    assert store.swap("latest", b"2", b"1")


def test_a_server_without_conditional_writes_is_named_and_still_compared(tmp_path: Path) -> None:
    """obstore's own local store stands for such a server."""
    local = ObjectStore("s3://bucket", obstore.store.LocalStore(tmp_path), RetryPolicy(2.0, 1.0), where="an old server")
    local.put("latest", b"1")
    with pytest.warns(RuntimeWarning, match=r"an old server ignores If-Match.*one at a time"):
        assert local.swap("latest", b"2", b"1")
    assert not local.swap("latest", b"3", b"1")
    assert local.get("latest") == b"2"
    assert list(local.list()) == ["latest"]


def test_a_failed_write_names_the_key_and_leaves_no_rest(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    (tmp_path / "folder" / "x").mkdir(parents=True)
    for if_absent in (False, True):
        with suppress(StoreError):
            assert store.put("folder/x", b"new", if_absent=if_absent) is False
        assert os.listdir(tmp_path / "folder") == ["x"]
    with pytest.raises(StoreError, match="folder/x"):
        store.put("folder/x", b"new")


def test_a_file_in_the_way_of_a_folder_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("x", b"-")
    with pytest.raises(StoreError, match="x/y"):
        store.put("x/y", b"-")
    with pytest.raises(NotFound, match="x/y"):
        store.get("x/y")


def test_a_data_set_is_read_and_verified_over_http(tmp_path: Path) -> None:
    _, arrays = publish_phantoms(tmp_path.as_uri(), [(40, 50, 60)], layout=Layout((16, 16, 16), (48, 64, 64)))
    with served(tmp_path) as url:
        with VolumeStore(url) as store:
            np.testing.assert_array_equal(store.read_volume("phantom-000"), arrays["phantom-000"])
        report = verify(url)
        assert (report.ok, report.volumes, report.strangers) == (True, 1, None)
        shard = tmp_path / "volumes" / "phantom-000" / "0" / "c" / "0" / "0" / "0" / "0"
        data = bytearray(shard.read_bytes())
        data[99] ^= 4
        shard.write_bytes(data)
        assert "volumes/phantom-000/0/c/0/0/0/0" in str(*verify(url).problems)


class _Pages(SimpleHTTPRequestHandler):
    """Answers every request that it does not know with a page, as many a web application does."""

    def do_PROPFIND(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>welcome</html>")


def test_a_page_is_no_list(tmp_path: Path) -> None:
    with served(tmp_path, _Pages) as url, pytest.raises(NotOffered, match="lists its objects"):
        list(open_store(url).list())


def test_a_server_without_ranges_is_named_and_not_believed(tmp_path: Path) -> None:
    """The standard library's sends the whole object, whatever part of it was asked for."""
    FileStore(tmp_path).put("folder/x", b"0123456789")
    with served(tmp_path, SimpleHTTPRequestHandler) as url:
        store = open_store(url)
        assert store.get("folder/x") == b"0123456789"
        for call in (lambda: store.get_range("folder/x", 0, 4), lambda: store.get_suffix("folder/x", 4)):
            with pytest.raises(NotOffered, match=r"folder/x.*range requests"):
                call()
