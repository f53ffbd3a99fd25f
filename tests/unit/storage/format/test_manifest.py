"""The manifest: its content alone makes its fingerprint, publishing is one step, opening reads the footer only."""

import io
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.driver import check_channels
from storage.errors import ConfigError, CorruptChunk, NotFound
from storage.format.manifest import POINTER, Manifest, manifest_key
from storage.format.records import LabelRecord
from storage.objects import ByteStore, open_store
from storage.objects.memory import MemoryStore
from storage.objects.tally import Tally, counted
from storage.stream.plan import Plan, StreamSpec, select
from tests.kit.records import record


@pytest.fixture
def store() -> ByteStore:
    return open_store(f"memory://{uuid.uuid4().hex}")


def test_a_start_reads_no_row_of_a_large_manifest(store: ByteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = record(2, volume_id="v00900", dtype="float32", channels=2, stats=record(2).stats * 2)
    Manifest.from_records([*(record(i) for i in range(900)), odd], {}).write(store)
    monkeypatch.setattr("storage.format.manifest.WHOLE_BYTES", 0)
    tally = Tally()
    manifest = Manifest.open(counted(store, tally))
    before = tally.now()
    indices = select(manifest, StreamSpec(seed=0, global_batch=4, crop_DHW=(8, 8, 8), split=""))
    Plan(manifest, StreamSpec(seed=0, global_batch=4, crop_DHW=(8, 8, 8), split=""), indices)
    check_channels(manifest, indices[:-1].tolist(), "network", {})
    assert tally.now() == before
    with pytest.raises(ConfigError, match="v00900"):
        check_channels(manifest, indices.tolist(), "network", {})


def test_kinds_of_a_manifest_that_does_not_say_them_are_read_from_its_rows() -> None:
    records = [record(i, dtype=("int16", "uint8")[i % 2]) for i in range(5)]
    manifest = Manifest.from_records(records, {})
    codes, kinds = manifest.kinds()
    assert [kinds[code] for code in codes] == [(r.dtype, r.channels) for r in records]
    manifest._kinds = None
    again, same = manifest.kinds()
    assert (again.tolist(), same) == (codes.tolist(), kinds)


def test_every_field_comes_back(store: ByteStore) -> None:
    records = [record(i) for i in range(23)]
    fingerprint = Manifest.from_records(records, {"name": "set", "spacing": "native"}).write(store)
    manifest = Manifest.open(store.url)
    assert manifest.fingerprint == fingerprint
    assert manifest.dataset == {"name": "set", "spacing": "native"}
    assert list(manifest.records()) == records
    assert manifest.record(-1) == records[-1]
    assert manifest.subjects() == tuple(r.subject for r in records)
    with pytest.raises(IndexError):
        manifest.record(23)


@settings(max_examples=30, deadline=None)
@given(
    order=st.permutations(range(12)), field=st.sampled_from(["split", "scale", "notes", "affine", "stats", "labels"])
)
def test_the_fingerprint_is_of_the_content_only(order: list[int], field: str) -> None:
    records = [record(i) for i in range(12)]
    one = Manifest.from_records(records, {"name": "x"})
    assert Manifest.from_records([records[i] for i in order], {"name": "x"}).fingerprint == one.fingerprint
    other: dict[str, object] = {
        "split": "other",
        "scale": 0.1000001,
        "notes": ("new",),
        "affine": (9.0,) * 16,
        "stats": ({"min": 0.0},),
        "labels": (LabelRecord("x"),),
    }
    changed = [replace(records[0], **{field: other[field]}), *records[1:]]  # type: ignore[arg-type]
    assert Manifest.from_records(changed, {"name": "x"}).fingerprint != one.fingerprint
    assert Manifest.from_records(records, {"name": "y"}).fingerprint != one.fingerprint
    assert Manifest.from_records(records[1:], {"name": "x"}).fingerprint != one.fingerprint


def test_select_and_index(store: ByteStore) -> None:
    records = [record(i) for i in range(3000)]
    manifest = Manifest.from_records(records)
    for split in (None, "train", "val", "nothing"):
        for label in (None, "organ", "nothing"):
            expected = [
                i
                for i, r in enumerate(records)
                if split in (None, r.split) and (label is None or label in [x.name for x in r.labels])
            ]
            found = manifest.select(split, label)
            assert found.dtype == np.int64
            assert found.tolist() == expected
    for i in (0, 1, 1023, 1024, 2048, 2999):
        assert manifest.index_of(f"v{i:05d}") == i
    for name in ("", "v", "v01023x", "zzz"):
        with pytest.raises(NotFound, match="volume"):
            manifest.index_of(name)


def test_two_records_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="v00001"):
        Manifest.from_records([record(1), record(2), record(1)])


def test_an_empty_manifest_is_a_manifest(store: ByteStore) -> None:
    Manifest.from_records([], {"name": "none"}).write(store)
    manifest = Manifest.open(store.url)
    assert len(manifest) == 0
    assert manifest.select("train").tolist() == []
    assert manifest.subjects() == ()
    with pytest.raises(NotFound):
        manifest.index_of("v")


def test_versions_stay_and_are_opened_by_fingerprint(store: ByteStore) -> None:
    first = Manifest.from_records([record(0)]).write(store)
    second = Manifest.from_records([record(0), record(1)]).write(store)
    assert len(Manifest.open(store.url)) == 2
    assert len(Manifest.open(store.url, first)) == 1
    assert Manifest.open(store.url, second).fingerprint == second
    with pytest.raises(NotFound, match="manifest-feed"):
        Manifest.open(store.url, "feed")


def test_nothing_published_says_so(store: ByteStore) -> None:
    with pytest.raises(NotFound, match=r"published.*ingest"):
        Manifest.open(store.url)


class _Pausing(MemoryStore):
    """Stops before each write until it is let on."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.written: list[str] = []
        self.stop_before: str | None = None

    def put(self, key: str, data: bytes, if_absent: bool = False) -> bool:
        if self.stop_before is not None and key.startswith(self.stop_before):
            raise KeyboardInterrupt
        self.written.append(key)
        return super().put(key, data, if_absent)


@pytest.mark.parametrize("killed_before", ["manifest-", POINTER])
def test_a_publish_that_dies_leaves_the_old_manifest(killed_before: str) -> None:
    store = _Pausing(f"memory://{uuid.uuid4().hex}")
    old = Manifest.from_records([record(0)]).write(store)
    assert store.written == [manifest_key(old), POINTER]
    store.stop_before = killed_before
    with pytest.raises(KeyboardInterrupt):
        Manifest.from_records([record(0), record(1)]).write(store)
    assert Manifest.open(store.url).fingerprint == old


def test_readers_see_the_old_or_the_new(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    versions = [Manifest.from_records([record(i) for i in range(n)]) for n in (3, 7)]
    versions[0].write(store)
    stop = threading.Event()

    def publish() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            versions[n % 2].write(store)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        seen = {(m.fingerprint, len(m)) for m in (Manifest.open(store.url) for _ in range(60))}
    finally:
        stop.set()
        thread.join()
    assert seen <= {(m.fingerprint, len(m)) for m in versions}


@pytest.mark.parametrize("damage", ["truncated", "swapped", "garbage", "empty", "flipped"])
def test_a_damaged_manifest_raises_and_names_itself(store: ByteStore, damage: str) -> None:
    records = [record(i) for i in range(200)]
    fingerprint = Manifest.from_records(records).write(store)
    key = manifest_key(fingerprint)
    data = store.get(key)
    changed = {
        "truncated": data[: len(data) // 2],
        "garbage": b"\x00" * len(data),
        "empty": b"",
        "flipped": data[:300] + bytes([data[300] ^ 1]) + data[301:],
        "swapped": b"",
    }[damage]
    if damage == "swapped":
        other = Manifest.from_records(records[1:]).write(store)
        changed = store.get(manifest_key(other))
        store.put(POINTER, fingerprint.encode())
    store.put(key, changed)
    with pytest.raises(CorruptChunk, match=key):
        list(Manifest.open(store.url).records())


def test_a_flipped_bit_anywhere_raises_or_changes_nothing() -> None:
    records = [record(i) for i in range(5)]
    manifest = Manifest.from_records(records, {"name": "x"})
    assert manifest._bytes is not None
    data, raised = manifest._bytes, 0
    for at in np.random.default_rng(0).permutation(len(data))[:400].tolist():
        try:
            found = Manifest.from_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            assert list(found.records()) == records
            assert found.select("train", "organ").tolist() == manifest.select("train", "organ").tolist()
            assert (found.fingerprint, found.dataset) == (manifest.fingerprint, manifest.dataset)
        except CorruptChunk:
            raised += 1
    assert raised > 390


def test_other_readers_of_parquet_open_it(store: ByteStore) -> None:
    fingerprint = Manifest.from_records([record(i) for i in range(5)]).write(store)
    table = pq.read_table(io.BytesIO(store.get(manifest_key(fingerprint))))
    assert table.column("volume_id").to_pylist() == [f"v{i:05d}" for i in range(5)]


def test_a_damaged_pointer_raises(store: ByteStore) -> None:
    for pointer in (b"", b"../../etc", b"\xff\xfe"):
        store.put(POINTER, pointer)
        with pytest.raises(CorruptChunk, match="latest"):
            Manifest.open(store.url)


def test_a_large_manifest_is_read_by_parts(monkeypatch: pytest.MonkeyPatch, store: ByteStore) -> None:
    monkeypatch.setattr("storage.format.manifest.WHOLE_BYTES", 0)
    monkeypatch.setattr("storage.format.sealed_parquet.TAIL_BYTES", 1000)
    records = [record(i) for i in range(2500)]
    Manifest.from_records(records).write(store)
    ranges: list[int] = []

    class Counting(MemoryStore):
        def get_range(self, key: str, start: int, stop: int) -> bytes:
            ranges.append(stop - start)
            return super().get_range(key, start, stop)

    manifest = Manifest.open(Counting(store.url))
    opened = sum(ranges)
    assert manifest.select("train").size == 834
    assert sum(ranges) == opened, "select needs the footer only"
    assert manifest.record(1500) == records[1500]
    assert sum(ranges) < store.head(manifest_key(manifest.fingerprint)) + opened
    assert manifest.index_of("v02400") == 2400


@pytest.mark.parametrize("size", [1, 7, 1024])
def test_a_manifest_in_groups_of_another_size_is_read_the_same(
    monkeypatch: pytest.MonkeyPatch, store: ByteStore, size: int
) -> None:
    records = [record(i) for i in range(30)]
    monkeypatch.setattr("storage.format.manifest.ROWS_PER_GROUP", size)
    fingerprint = Manifest.from_records(records).write(store)
    monkeypatch.undo()
    manifest = Manifest.open(store, fingerprint)
    assert list(manifest.records()) == sorted(records, key=lambda r: r.volume_id)
    assert all(manifest.index_of(manifest.record(i).volume_id) == i for i in range(30))


def test_a_record_is_read_from_a_small_part_of_a_large_manifest(store: ByteStore) -> None:
    """The first batch of a million volumes reads as many groups as it has volumes."""
    manifest = Manifest.from_records(replace(record(0), volume_id=f"v{i:06d}") for i in range(3000))
    asked: list[int] = []
    read = manifest._file._read
    manifest._file._read = lambda a, b: (asked.append(b - a), read(a, b))[1]
    assert manifest.record(1777).volume_id == "v001777"
    assert len(asked) == 1
    assert manifest._group(1777 // manifest._per_group).num_rows <= 256


def test_threads_read_records_together(store: ByteStore) -> None:

    records = [record(i) for i in range(4000)]
    manifest = Manifest.from_records(records)
    wanted = np.random.default_rng(0).integers(0, 4000, 200).tolist()
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(manifest.record, wanted)) == [records[i] for i in wanted]
    assert time.monotonic() - began < 120
