"""Stores on local and network disks: several threads share one request, and read into memory that is used again."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import CorruptChunk, NotFound, StoreError
from storage.format.layout import Layout
from storage.objects.local import FileStore
from storage.reading import executor, workers
from storage.reading.volume_store import Crop, VolumeStore
from storage.testing.phantoms import publish_phantoms

SHAPE, LAYOUT = (70, 60, 50), Layout((8, 8, 8), (40, 64, 56))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """A store of large shards and its one volume."""
    monkeypatch.setattr(executor, "SMALL_SHARD", 0)
    monkeypatch.setattr(executor, "MOST_OF_FILE", 4096)  # many ranges a crop
    monkeypatch.setattr(workers, "SHARE", 1)
    publish_phantoms(tmp_path.as_uri(), [SHAPE], layout=LAYOUT)
    with VolumeStore(tmp_path.as_uri()) as store:
        return tmp_path, store.read_volume("phantom-000")


@pytest.mark.parametrize("hands", [1, 2, 5])
def test_crops_are_equal_however_many_threads_share_them(
    published: tuple[Path, Any], hands: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "HANDS", hands)
    whole = published[1]
    starts = np.random.default_rng(hands).integers(0, (40, 30, 20), (12, 3)).tolist()
    with VolumeStore(published[0].as_uri(), threads=3) as store:
        for _ in range(2):  # the second time with the indexes at hand
            crops = store.read_many([Crop("phantom-000", (d, h, w), (30, 30, 30)) for d, h, w in starts])
            for (d, h, w), crop in zip(starts, crops, strict=True):
                assert np.array_equal(crop, whole[:, d : d + 30, h : h + 30, w : w + 30])


def test_a_disk_that_gives_a_range_in_pieces_is_read_to_its_end(
    published: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:100]], at))
    with VolumeStore(published[0].as_uri()) as store:
        assert np.array_equal(store.read_volume("phantom-000"), published[1])


def test_ranges_of_files_stay_short_so_that_the_memory_of_threads_does(
    published: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    read_into = FileStore.read_into

    def counted(store: FileStore, key: str, start: int, into: memoryview) -> None:
        sizes.append(len(into))
        read_into(store, key, start, into)

    monkeypatch.setattr(FileStore, "read_into", counted)
    with VolumeStore(published[0].as_uri()) as store:
        store.read_volume("phantom-000")
    assert len(sizes) > 10
    assert max(sizes) <= 4096


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("indexed", [False, True], ids=["unread", "index at hand"])
@pytest.mark.parametrize("damage", [_flip, _shorten, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damage_of_a_file_raises_and_names_volume_and_key(
    damage: Callable[[Path], Any], indexed: bool, published: tuple[Path, Any]
) -> None:
    folder = published[0]
    path = max((folder / "volumes").rglob("c/0/*/*/*"))
    with VolumeStore(folder.as_uri()) as store:
        if indexed:
            store.read_volume("phantom-000")
        damage(path)
        with pytest.raises((CorruptChunk, NotFound)) as caught:
            store.read_volume("phantom-000")
    assert "volume phantom-000" in str(caught.value)
    assert path.relative_to(folder).as_posix() in str(caught.value)


def test_an_error_of_the_disk_names_the_file(published: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with (
        VolumeStore(published[0].as_uri()) as store,
        pytest.raises(StoreError, match=r"phantom-000.*Input/output error"),
    ):
        store.read_volume("phantom-000")


@pytest.mark.parametrize("hands", [1, 4])
def test_no_error_of_a_thread_is_lost(published: tuple[Path, Any], hands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An IndexError neither, which is also how a queue says that it is empty."""
    monkeypatch.setattr(workers, "HANDS", hands)
    monkeypatch.setattr(workers, "SLOW_S", 60.0)
    calls: list[int] = []
    decode = executor.Executor._finish

    def fail(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise IndexError("a fault of ours")
        decode(*arguments)

    monkeypatch.setattr(executor.Executor, "_finish", fail)
    with VolumeStore(published[0].as_uri()) as store, pytest.raises(IndexError, match="a fault of ours"):
        store.read_volume("phantom-000")
    assert len(calls) < 7 + hands + 1
