"""Reads and writes against a real S3 server behind a misbehaving proxy: the same bytes, or an error with a name."""

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from storage.errors import CorruptChunk, NotFound, StoreError
from storage.format.layout import Layout
from storage.format.manifest import Manifest
from storage.format.volume import Volume
from storage.format.volume_writer import write_volume
from storage.objects import open_store
from storage.reading.node_cache import NodeCache
from storage.reading.volume_store import Crop, VolumeStore
from storage.testing.fault_proxy import Fault, FaultProxy, Flip, Reset, Slow, Stall, Status, Truncate
from storage.testing.phantoms import phantom, publish_phantoms
from tests.kit.s3server import READER, S3Server

pytestmark = [pytest.mark.service, pytest.mark.chaos]

LAYOUT = Layout((32, 32, 32), (96, 96, 96))
CROPS = [Crop("phantom-000", (d, 5, 40 - d), (64, 64, 64)) for d in (-3, 11, 30)]
PATIENT_S, STALLED_S, DEADLINE_S = 90.0, 15.0, 4.0  # the last where a test waits for its end


@dataclass(frozen=True)
class Place:
    url: str
    proxy: FaultProxy
    server: S3Server
    arrays: dict[str, np.ndarray]


@pytest.fixture
def place(s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A published data set, and an environment in which it is reached through the proxy."""
    url = f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}"
    _, arrays = publish_phantoms(url, [(100, 80, 90), (35, 50, 36)], layout=LAYOUT)
    with FaultProxy(s3_environment.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", str(PATIENT_S))
        yield Place(url, proxy, s3_environment, arrays)


def expected(place: Place) -> list[np.ndarray]:
    with VolumeStore(place.url) as store:
        return store.read_many(CROPS)


PASSING: dict[str, tuple[Fault, int]] = {
    "a burst of 503": (Status(503), 6),
    "500": (Status(500, "InternalError"), 3),
    "429": (Status(429, "TooManyRequests"), 3),
    "a reset before the answer": (Reset(), 3),
    "a reset within the body": (Reset(after=5000), 3),
    "a truncated body": (Truncate(after=5000), 3),
    "an answer without a body": (Truncate(after=0), 3),
    "one request that never ends": (Stall(), 1),
    "a bit flipped at the end": (Flip(at=-9), 1),
    "a bit flipped in a chunk": (Flip(at=200), 1),
}


@pytest.mark.parametrize("name", sorted(PASSING))
@pytest.mark.parametrize("match", ["/c/", "manifest-"])
def test_a_passing_fault_changes_no_byte(place: Place, name: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, times = PASSING[name]
    wanted = expected(place)
    place.proxy.clear()
    place.proxy.inject(fault, times=times, match=match)
    if isinstance(fault, Stall):  # a third of it is spent on the request that never ends
        monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", str(STALLED_S))
    with VolumeStore(place.url) as store:
        found = store.read_many(CROPS)
    assert [crop.tobytes() for crop in found] == [crop.tobytes() for crop in wanted]


LASTING: dict[str, Fault] = {
    "503": Status(503),
    "resets": Reset(),
    "truncated bodies": Truncate(after=1000),
    "no answers": Stall(),
    "slow bodies": Slow(bytes_per_s=2000),
    "flipped bits": Flip(at=200),
}


@pytest.mark.parametrize("name", sorted(LASTING))
def test_a_lasting_fault_is_a_named_error_within_the_deadline(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", str(DEADLINE_S))
    with VolumeStore(place.url) as store:
        place.proxy.inject(LASTING[name], match="/c/")
        began = time.monotonic()
        with pytest.raises(StoreError) as caught:
            store.read_many(CROPS)
        assert time.monotonic() - began < DEADLINE_S + 30  # a busy machine's; libraries' own retries hang for minutes
        assert "phantom-000/0/c/" in str(caught.value)
        if name == "flipped bits":
            assert isinstance(caught.value, CorruptChunk)
            assert "volume phantom-000" in str(caught.value)
    place.proxy.clear()
    monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", str(PATIENT_S))
    with VolumeStore(place.url) as store:
        np.testing.assert_array_equal(store.read_volume("phantom-000"), place.arrays["phantom-000"])


def test_a_bit_flipped_again_and_again_in_the_manifest_is_an_error(place: Place) -> None:
    place.proxy.inject(Flip(at=500), match="manifest-")
    with pytest.raises(CorruptChunk, match="manifest-"):
        list(Manifest.open(place.url).records())


@pytest.mark.parametrize("fault", [Status(503), Reset(), Stall()], ids=str)
def test_writes_pass_through_faults(place: Place, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    times = 1 if isinstance(fault, Stall) else 3
    monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", str(STALLED_S if isinstance(fault, Stall) else PATIENT_S))
    place.proxy.inject(fault, times=times, method="PUT")
    url = f"{place.url}/new"
    array = phantom((20, 20, 20))
    record = write_volume(open_store(url), "v", Volume(array, spacing_mm=(1, 1, 1), affine=np.eye(4)))
    Manifest.from_records([record]).write(open_store(url))
    with VolumeStore(url) as store:
        np.testing.assert_array_equal(store.read_volume("v"), array)


def test_a_conditional_write_whose_answer_was_lost_still_says_it_was_first(place: Place) -> None:
    """The object is in place when the connection breaks; the repeated request finds it and knows it for its own."""
    store = open_store(place.url)

    place.proxy.inject(Reset(after=0), times=1, method="PUT")
    assert store.put("lock", b"mine", if_absent=True) is True
    assert store.put("lock", b"theirs", if_absent=True) is False
    assert store.get("lock") == b"mine"


def test_a_swap_whose_answer_was_lost_still_says_that_it_was_done(place: Place) -> None:
    store = open_store(place.url)
    store.put("pointer", b"1")
    assert store.swap("pointer", b"2", b"1") is True
    place.proxy.inject(Reset(after=0), match="pointer", times=1, method="PUT")
    assert store.swap("pointer", b"3", b"2") is True
    assert store.swap("pointer", b"4", b"2") is False
    assert store.get("pointer") == b"3"


def test_a_refusal_is_not_repeated(place: Place) -> None:
    place.proxy.inject(Status(403, "AccessDenied"), match="/c/")
    with VolumeStore(place.url) as store:
        place.proxy.requests.clear()
        with pytest.raises(StoreError, match="refused"):
            store.read(CROPS[0])
        assert place.proxy.count()["GET"] <= 8, "one request for each shard, and no second"


def test_revoked_credentials_are_an_error_at_the_next_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    with VolumeStore(place.url) as store:
        wanted = store.read_many(CROPS)
        place.server.kill()
        try:
            place.server.write_identities(reader=False)
            place.server.start()
            with pytest.raises(StoreError, match="refused"):
                store.read_many(CROPS)
        finally:
            place.server.kill()
            place.server.write_identities()
            place.server.start()
        assert [c.tobytes() for c in store.read_many(CROPS)] == [c.tobytes() for c in wanted]


def test_a_server_killed_and_restarted_while_reading_changes_no_byte(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", "240")
    wanted = expected(place)
    rounds, errors = [0], []
    stop = threading.Event()

    def read() -> None:
        try:
            with VolumeStore(place.url) as store:
                while not stop.is_set():
                    store._executor._indexes = type(store._executor._indexes)(1)  # every round reads the indexes again
                    assert [c.tobytes() for c in store.read_many(CROPS)] == [c.tobytes() for c in wanted]
                    rounds[0] += 1
        except Exception as error:  # noqa: BLE001  handed to the test
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        time.sleep(0.5)
        place.server.kill()
        before = rounds[0]
        time.sleep(1)
        place.server.start()
        end = time.monotonic() + 300
        while rounds[0] < before + 3 and not errors and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        stop.set()
        reader.join()
    assert not errors
    assert rounds[0] >= before + 3, "reading went on after the restart"


@pytest.mark.parametrize("damage", ["deleted", "empty", "flipped", "truncated"])
def test_damage_in_the_store_raises_and_names_volume_and_key(place: Place, damage: str) -> None:
    store = open_store(place.url)
    key = next(k for k in store.list("volumes/phantom-000/0/c/"))
    data = store.get(key)
    if damage == "deleted":
        store.delete(key)
    else:
        changed = {
            "empty": b"",
            "flipped": data[:300] + bytes([data[300] ^ 1]) + data[301:],
            "truncated": data[: len(data) // 2],
        }
        store.put(key, changed[damage])
    with VolumeStore(place.url) as volumes:
        began = time.monotonic()
        with pytest.raises((NotFound, CorruptChunk)) as caught:
            volumes.read_volume("phantom-000")
        assert time.monotonic() - began < PATIENT_S / 2, "it was repeated"
        assert "volume phantom-000" in str(caught.value)
        assert key in str(caught.value)


def test_an_outage_is_bridged_by_the_node_cache(place: Place, tmp_path: Path) -> None:
    with VolumeStore(place.url, cache=NodeCache(tmp_path, 1 << 28)) as store:
        wanted = store.read_many(CROPS)
        place.proxy.inject(Status(503))
        assert [c.tobytes() for c in store.read_many(CROPS)] == [c.tobytes() for c in wanted]


def test_an_unreachable_endpoint_is_an_error_within_the_deadline(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", "2")
    for endpoint in ("http://127.0.0.1:9", "http://no-such-host.invalid:80"):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        began = time.monotonic()
        with pytest.raises(StoreError, match="latest"):
            Manifest.open(place.url)
        assert time.monotonic() - began < 60  # a resolver of names may have patience of its own


def test_many_readers_through_a_storm_lose_nothing(place: Place) -> None:
    """Forty faults of five kinds, several threads, one store."""
    wanted = {crop: array.tobytes() for crop, array in zip(CROPS, expected(place), strict=True)}
    storm = [Status(503), Reset(), Truncate(after=700), Reset(after=900), Status(500)]
    with VolumeStore(place.url, threads=8) as store, ThreadPoolExecutor(4) as pool:
        for fault in storm:
            place.proxy.inject(fault, times=8, match="/c/")
        found = list(pool.map(lambda i: (CROPS[i % 3], store.read(CROPS[i % 3]).tobytes()), range(24)))
    assert all(wanted[crop] == data for crop, data in found)
