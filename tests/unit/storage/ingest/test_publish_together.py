"""Jobs that publish to one store at the same time: no volume of either is lost, none is written by both."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import CorruptChunk, RefusedInput, StoreError
from storage.format.manifest import POINTER, Manifest, manifest_key, update
from storage.format.volume import Provenance, Volume
from storage.format.volume_writer import write_volume
from storage.ingest import derived_maps as derive
from storage.ingest.pipeline import run
from storage.ingest.policy import IngestPolicy
from storage.ingest.publishing.claims import Sidecar, claim, side_key
from storage.ingest.publishing.publish import publish
from storage.objects import ByteStore, open_store
from storage.objects.memory import MemoryStore
from storage.reading.verify import verify
from storage.reading.volume_store import VolumeStore
from tests.kit.publishers import appended, together
from tests.kit.records import record
from tests.kit.scans import phantom, save_nifti

HALVES = IngestPolicy(split=(0.5, 0.0, 0.5))
ALONE = HALVES.model_copy(update={"min_subjects": 1})


def scans(root: Path, *names: str, seed: int = 0) -> str:
    for i, name in enumerate(names):
        save_nifti(root / "images" / f"{name}.nii.gz", phantom(seed=seed + i))
    return str(root)


def after_the_first(other: Callable[[], object]) -> Callable[..., Iterator[Any]]:
    """A mapper in which another job runs from beginning to end while this one is between two volumes."""

    def mapper(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for n, item in enumerate(items):
            if n == 1:
                other()
            yield function(item)

    return mapper


def test_processes_that_publish_together_lose_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    publish(store, [record(0)], ALONE, {"name": "x"})
    together(store.url, processes=2, each=8)
    found = {r.volume_id for r in Manifest.open(store).records()}
    assert found == {"v00000", *(appended(p, i).volume_id for p in range(2) for i in range(8))}


@pytest.mark.parametrize("late", [True, False])
def test_an_append_keeps_what_another_published_meanwhile(tmp_path: Path, late: bool) -> None:
    """Also into an empty store, and whether or not the other job's folder is new."""
    dst = (tmp_path / "store").as_uri()
    if late:
        run(scans(tmp_path / "old", "old1", "old2", seed=90), dst, HALVES)
    other = scans(tmp_path / "b", "b1", "b2", seed=10)
    mapper = after_the_first(lambda: run(other, dst, HALVES, append=True))
    report = run(scans(tmp_path / "a", "a1", "a2"), dst, HALVES, append=True, mapper=mapper)
    names = [r.volume_id for r in Manifest.open(dst).records()]
    assert names == ["a1", "a2", "b1", "b2", *(["old1", "old2"] if late else [])]
    assert report.published == len(names)
    assert verify(dst).ok
    assert verify(dst).strangers == ()


def test_an_ingest_keeps_what_another_published_meanwhile_and_says_so(tmp_path: Path) -> None:
    dst = (tmp_path / "store").as_uri()
    src = scans(tmp_path / "a", "a1", "a2")
    run(scans(tmp_path / "old", "old1", "old2", seed=90), dst, HALVES)
    mapper = after_the_first(lambda: run(scans(tmp_path / "b", "b1", "b2", seed=10), dst, HALVES, append=True))
    report = run(src, dst, HALVES, mapper=mapper)
    assert [r.volume_id for r in report.manifest.records()] == ["a1", "a2", "b1", "b2"]
    assert any("2 volumes that another job published" in w and "b1" in w for w in report.warnings)
    assert [r.volume_id for r in run(src, dst, HALVES).manifest.records()] == ["a1", "a2"]


def test_the_same_folder_ingested_twice_at_once_is_published_once(tmp_path: Path) -> None:
    dst, src = (tmp_path / "store").as_uri(), scans(tmp_path / "a", "a1", "a2", "a3")
    report = run(src, dst, HALVES, mapper=after_the_first(lambda: run(src, dst, HALVES)))
    assert [r.volume_id for r in report.manifest.records()] == ["a1", "a2", "a3"]
    assert report.warnings == run(src, dst, HALVES).warnings
    assert (verify(dst).ok, verify(dst).strangers) == (True, ())


def test_one_name_with_two_contents_at_once_becomes_two_volumes(tmp_path: Path) -> None:
    """Written under one id, each would have read the other's voxels, with checksums that are right."""
    dst = (tmp_path / "store").as_uri()
    one, two = scans(tmp_path / "a", "case", "z"), scans(tmp_path / "b", "case", "y", seed=50)
    mapper = after_the_first(lambda: run(two, dst, HALVES, append=True))
    run(one, dst, HALVES, append=True, mapper=mapper)
    assert verify(dst).ok
    with VolumeStore(dst) as store:
        cases = [r.volume_id for r in store.manifest.records() if r.source == "images/case.nii.gz"]
        arrays = [store.read_volume(name)[0] for name in cases]
    assert len(cases) == 2
    assert sorted(int(a.sum()) for a in arrays) == sorted(int(phantom(seed=s).sum()) for s in (0, 50))


def test_files_of_one_name_from_two_folders_outlive_a_third_append(tmp_path: Path) -> None:
    dst = (tmp_path / "store").as_uri()
    for folder, seed in (("a", 0), ("b", 50), ("c", 90)):
        run(scans(tmp_path / folder, "case", f"own-{folder}", seed=seed), dst, HALVES, append=True)
    assert len(Manifest.open(dst)) == 6
    again = run(str(tmp_path / "b"), dst, HALVES, append=True)
    assert (again.published, again.written) == (6, 0)


def test_a_claim_holds_an_id_for_one_version() -> None:
    store = open_store("memory://claims")
    first = claim(store, "x", "digest-1", "1-p")
    other = claim(store, "x", "digest-2", "1-p")
    assert first.volume_id == "x"
    assert other.volume_id.startswith("x-")
    assert claim(store, "x", "digest-1", "1-p") == first, "a killed run goes on under its id"
    assert claim(store, "x", "digest-2", "1-p") == other
    volume = Volume(phantom()[None], spacing_mm=(1, 1, 1), affine=np.eye(4))
    provenance = Provenance(source_sha256="digest-1", policy="1-p")
    replace(first, record=write_volume(store, "x", volume, provenance=provenance)).save(store)
    assert claim(store, "x", "digest-1", "1-p").record is not None
    store.delete(side_key("x"))  # as after publishing
    assert claim(store, "x", "digest-3", "1-p").volume_id != "x"
    assert Sidecar.load(store, "x") is None, "a claim on what is whole would look like a part of it"
    assert claim(store, "x", "digest-1", "1-p").volume_id == "x"


def shifted(stored_CDHW: Any, _: Any) -> Any:
    return stored_CDHW[0].astype(np.int32)


def test_maps_computed_during_an_ingest_stay(tmp_path: Path) -> None:
    dst, src = (tmp_path / "store").as_uri(), scans(tmp_path / "a", "a1", "a2")
    run(src, dst, HALVES)
    scans(tmp_path / "a", "a3", seed=70)
    mapper = after_the_first(lambda: derive.run(dst, "map-1", shifted, recipe="test"))
    report = run(src, dst, HALVES, mapper=mapper)
    assert [r.map_names() for r in report.manifest.records()] == [("map-1",), ("map-1",), ()]
    assert verify(dst).ok


class _Overtaken(MemoryStore):
    """Somebody publishes whenever the pointer is about to be replaced, so many times."""

    def __init__(self, url: str, times: int) -> None:
        super().__init__(url)
        self.left, self.number = times, 100

    def swap(self, key: str, data: bytes, seen: bytes | None) -> bool:
        if key == POINTER and self.left:
            self.left -= 1
            self.number += 1
            there = [] if seen is None else list(Manifest.open(self.url).records())
            Manifest.from_records([*there, record(self.number)]).write(open_store(self.url))
        return super().swap(key, data, seen)


def add(n: int) -> Callable[[Manifest | None], Manifest]:
    return lambda latest: Manifest.from_records([*(latest.records() if latest else ()), record(n)])


@pytest.mark.parametrize("times", [0, 1, 5])
@pytest.mark.parametrize("empty", [True, False])
def test_who_is_overtaken_merges_again(times: int, empty: bool) -> None:
    url = f"memory://overtaken-{times}-{empty}"
    if not empty:
        update(open_store(url), add(0))
    made = update(_Overtaken(url, times), add(1))
    names = [f"v{n:05d}" for n in ([] if empty else [0])] + ["v00001"] + [f"v{101 + n:05d}" for n in range(times)]
    assert [r.volume_id for r in made.records()] == names
    assert Manifest.open(url).fingerprint == made.fingerprint


def test_who_is_overtaken_for_ever_says_so_and_publishes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.format.manifest.MOST_TRIES", 3)
    with pytest.raises(StoreError, match=r"other jobs published first, 3 times.*run it again"):
        update(_Overtaken("memory://for-ever", 9), add(1))
    assert "v00001" not in [r.volume_id for r in Manifest.open("memory://for-ever").records()]


def test_another_content_under_a_published_id_is_refused() -> None:
    store = open_store("memory://same-id")
    publish(store, [record(0)], ALONE, {})
    with pytest.raises(RefusedInput, match=r"v00000.*another version"):
        publish(store, [record(0, source_sha256="ef" * 32)], ALONE, {}, append=True)
    assert Manifest.open(store).record(0) == replace(record(0), split=Manifest.open(store).record(0).split)


def test_a_manifest_that_is_gone_is_not_an_empty_store(tmp_path: Path) -> None:
    """An append that took it for one would publish its own volumes alone."""
    dst = (tmp_path / "store").as_uri()
    report = run(scans(tmp_path / "a", "a1", "a2"), dst, HALVES)
    store = open_store(dst)
    store.delete(manifest_key(report.manifest.fingerprint))
    more = scans(tmp_path / "b", "b1", "b2", seed=10)
    for call in (
        lambda: Manifest.open(store),
        lambda: run(more, dst, HALVES, append=True),
        lambda: update(store, add(1)),
    ):
        with pytest.raises(CorruptChunk, match=r"manifest-.*that 'latest' names"):
            call()
    assert store.get(POINTER).decode() == report.manifest.fingerprint


def quarantined(store: ByteStore) -> list[str]:
    return [json.loads(line)["source"] for line in store.get("quarantine.jsonl").decode().splitlines()]


def test_refusals_of_another_job_stay_listed(tmp_path: Path) -> None:
    dst = (tmp_path / "store").as_uri()
    for folder in "ab":
        scans(tmp_path / folder, f"{folder}1", f"{folder}2", seed=ord(folder))
        (tmp_path / folder / "images" / f"{folder}-bad.nii.gz").write_text("no volume")
    mapper = after_the_first(lambda: run(str(tmp_path / "b"), dst, HALVES, append=True))
    run(str(tmp_path / "a"), dst, HALVES, mapper=mapper)
    assert quarantined(open_store(dst)) == ["images/a-bad.nii.gz", "images/b-bad.nii.gz"]
    (tmp_path / "b" / "images" / "b-bad.nii.gz").unlink()
    scans(tmp_path / "b", "b-bad", seed=7)
    run(str(tmp_path / "b"), dst, HALVES, append=True)
    assert quarantined(open_store(dst)) == ["images/a-bad.nii.gz"]


def test_an_append_keeps_what_the_store_says_of_itself(tmp_path: Path) -> None:
    dst = (tmp_path / "store").as_uri()
    for folder, facts in (
        ("a", {"labels": {"1": "liver"}, "licence": "CC0"}),
        ("b", {"labels": {"1": "spleen", "2": "tumour"}, "reference": "us"}),
        ("c", {}),
    ):
        scans(tmp_path / folder, f"{folder}1", f"{folder}2", seed=ord(folder))
        (tmp_path / folder / "dataset.json").write_text(json.dumps(facts))
        report = run(str(tmp_path / folder), dst, HALVES, append=True, name="x")
        assert any("labels of the store" in w for w in report.warnings) == (folder == "b")
    dataset = {"name": "x", "labels": {"1": "liver", "2": "tumour"}, "licence": "CC0", "reference": "us"}
    assert Manifest.open(dst).dataset == dataset
