"""`verify` finds each kind of damage and names volume and key; a sound data set has no problem."""

import uuid
from collections.abc import Callable

import numpy as np
import pytest

from storage.errors import NotFound
from storage.format.layout import Layout
from storage.format.manifest import Manifest
from storage.format.volume import Volume
from storage.format.volume_writer import write_volume
from storage.objects import ByteStore, open_store
from storage.reading.verify import verify
from storage.testing.phantoms import phantom, publish_phantoms

LAYOUT = Layout((16, 16, 16), (32, 32, 32))


@pytest.fixture
def store() -> ByteStore:
    url = f"memory://{uuid.uuid4().hex}"
    publish_phantoms(url, [(40, 40, 40), (20, 30, 25), (40, 20, 20)], layout=LAYOUT)
    return open_store(url)


def test_a_sound_store_has_no_problem(store: ByteStore) -> None:
    steps: list[tuple[int, int, int]] = []
    report = verify(store.url, lambda done, of, nbytes: steps.append((done, of, nbytes)))
    assert report.ok
    assert report.problems == report.strangers == ()
    assert report.volumes == 3
    assert [step[:2] for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert report.nbytes == steps[-1][2] == 3 * (40 * 40 * 40 + 20 * 30 * 25 + 40 * 20 * 20)


def _flip(at: int) -> Callable[[ByteStore, str], None]:
    def damage(store: ByteStore, key: str) -> None:
        data = bytearray(store.get(key))
        data[at] ^= 1
        store.put(key, bytes(data))

    return damage


@pytest.mark.parametrize("array", ["0", "labels/tissue/0"])
@pytest.mark.parametrize(
    "damage",
    [
        _flip(60),
        _flip(-10),
        lambda s, k: s.delete(k),
        lambda s, k: s.put(k, b""),
        lambda s, k: s.put(k, s.get(k)[:-30]),
    ],
    ids=["flipped chunk", "flipped index", "deleted", "empty", "truncated"],
)
def test_each_damaged_object_is_named(store: ByteStore, array: str, damage: Callable[[ByteStore, str], None]) -> None:
    shards = [k for k in store.list(f"volumes/phantom-000/{array}/c/")]
    damage(store, shards[1])
    report = verify(store.url)
    assert not report.ok
    (problem,) = report.problems
    assert problem.volume_id == "phantom-000"
    assert shards[1] in str(problem)


def test_valid_shards_of_another_content_are_found_by_the_digest(store: ByteStore) -> None:
    other = open_store(f"memory://{uuid.uuid4().hex}")
    write_volume(
        other,
        "x",
        Volume(phantom((40, 40, 40), seed=77), spacing_mm=(1, 1, 1), affine=np.eye(4)),
        layout=LAYOUT,
    )
    store.put("volumes/phantom-000/0/c/0/0/0/0", other.get("volumes/x/0/c/0/0/0/0"))
    (problem,) = verify(store.url).problems
    assert problem.volume_id == "phantom-000"
    assert "content" in str(problem)
    assert "phantom-000" in str(problem)


@pytest.mark.parametrize("key", ["zarr.json", "0/zarr.json", "labels/zarr.json", "labels/tissue/0/zarr.json"])
def test_missing_metadata_are_found(store: ByteStore, key: str) -> None:
    store.delete(f"volumes/phantom-001/{key}")
    (problem,) = verify(store.url).problems
    assert f"volumes/phantom-001/{key}" in str(problem)


@pytest.mark.parametrize("text", [b"", b"{", b"{}", b"[]", b'{"attributes": {}}'])
@pytest.mark.parametrize("key", ["zarr.json", "0/zarr.json"])
def test_damaged_metadata_are_found(store: ByteStore, key: str, text: bytes) -> None:
    store.put(f"volumes/phantom-001/{key}", text)
    (problem,) = verify(store.url).problems
    assert f"volumes/phantom-001/{key}" in str(problem)


@pytest.mark.parametrize(
    ("key", "old", "new", "what"),
    [
        ("zarr.json", b'"scale": 1.0', b'"scale": 1.5', "the scale 1.5"),
        ("zarr.json", b'"offset": 0.0', b'"offset": 8.0', "the offset 8.0"),
        ("zarr.json", b"2.0", b"3.0", "spacing_mm"),
        ("labels/tissue/zarr.json", b"2.0", b"6.0", "the scale [6.0, 0.8, 0.8]"),
        ("labels/tissue/zarr.json", b" 0.0", b" 4.0", "the translation [4.0, 4.0, 4.0]"),
    ],
)
def test_metadata_that_say_otherwise_than_the_manifest_are_found(
    store: ByteStore, key: str, old: bytes, new: bytes, what: str
) -> None:
    """Other readers believe them."""
    document = store.get(f"volumes/phantom-001/{key}")
    assert old in document
    store.put(f"volumes/phantom-001/{key}", document.replace(old, new))
    problems = verify(store.url).problems
    assert problems
    assert all(f"volumes/phantom-001/{key}" in str(problem) for problem in problems)
    assert what in "".join(map(str, problems))


def test_metadata_of_another_array_are_found(store: ByteStore) -> None:
    store.put("volumes/phantom-001/0/zarr.json", store.get("volumes/phantom-000/0/zarr.json"))
    (problem,) = verify(store.url).problems
    assert "volumes/phantom-001/0/zarr.json" in str(problem)


def test_volumes_outside_the_manifest_are_listed_and_no_problem(store: ByteStore) -> None:
    write_volume(
        store,
        "stray",
        Volume(phantom((9, 9, 9)), spacing_mm=(1, 1, 1), affine=np.eye(4)),
    )
    report = verify(store.url)
    assert report.ok
    assert report.strangers == ("stray",)


def test_an_older_manifest_can_be_verified(store: ByteStore) -> None:
    first = Manifest.open(store.url)
    Manifest.from_records([first.record(0)]).write(store)
    assert verify(store.url).volumes == 1
    assert verify(store.url, fingerprint=first.fingerprint).volumes == 3


def test_nothing_published_is_not_found() -> None:
    with pytest.raises(NotFound):
        verify(f"memory://{uuid.uuid4().hex}")
