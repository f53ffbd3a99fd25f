"""Maps computed beside published images: once, in one step, and the images stay as they are."""

import functools
import http.server
import multiprocessing
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from storage.errors import ConfigError, NotFound, RefusedInput, StoreError
from storage.format.layout import Layout
from storage.format.manifest import Manifest, fingerprint_of
from storage.format.records import DerivedRecord, LabelRecord, VolumeRecord
from storage.format.volume import Volume
from storage.format.volume_writer import write_volume
from storage.ingest import derived_maps as derive
from storage.ingest.mapping import map_serial
from storage.ingest.pipeline import run as ingest
from storage.ingest.policy import IngestPolicy
from storage.objects import open_store
from storage.reading.verify import verify
from storage.reading.volume_store import Crop, VolumeStore
from storage.stream.crop_stream import CropStream
from storage.stream.plan import StreamSpec
from tests.kit.phantoms import write_phantoms
from tests.kit.scans import folder, phantom, save_nifti


def shifted(stored_CDHW: npt.NDArray[Any], _record: VolumeRecord) -> npt.NDArray[np.int32]:
    """Every voxel its own value plus a million, by which a misplaced voxel is known."""
    return stored_CDHW[0].astype(np.int32) + np.int32(1_000_000)


def make(url: str, name: str = "shifted-1", **more: Any) -> derive.DeriveReport:
    return derive.run(url, name, more.pop("compute", shifted), recipe="value + 1000000", **more)


@pytest.fixture
def url() -> str:
    found = f"memory://{uuid.uuid4().hex}"
    write_phantoms(found, 5)
    return found


def objects(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {key: store.get(key) for key in store.list()}


def test_a_map_is_written_once_beside_images_that_stay(url: str) -> None:
    before = objects(url)
    old = Manifest.open(url)
    done: list[tuple[int, int]] = []
    report = make(url, progress=lambda *at: done.append(at))
    assert (report.written, report.resumed, report.skipped, report.absent) == (5, 0, 0, ())
    assert done == [(i, 5) for i in range(1, 6)]
    after = objects(url)
    changed = {key for key, data in before.items() if after[key] != data}
    assert changed == {"latest", *(f"volumes/phantom-{i:03d}/labels/zarr.json" for i in range(5))}
    assert not [key for key in after if key.startswith("derive/")]
    manifest = Manifest.open(url)
    assert manifest.fingerprint == report.manifest.fingerprint != old.fingerprint
    with VolumeStore(url) as store:
        for record in manifest.records():
            image = store.read_volume(record.volume_id)
            assert np.array_equal(store.read_volume(record.volume_id, "shifted-1")[0], shifted(image, record))
            assert record.derived[0].regions == len(np.unique(image))
            assert record.labels == old.record(old.index_of(record.volume_id)).labels
    again = make(url)
    assert (again.written, again.skipped) == (0, 5)
    assert objects(url) == after


def test_the_earlier_manifest_still_reads_and_verifies(url: str) -> None:
    old = Manifest.open(url).fingerprint
    make(url)
    assert verify(url, fingerprint=old).ok
    assert verify(url).ok
    with VolumeStore(url, Manifest.open(url, old)) as store, pytest.raises(NotFound, match="found labels$"):
        store.read(Crop("phantom-000", (0, 0, 0), (4, 4, 4)), "shifted-1")


def test_a_data_set_without_maps_has_the_fingerprint_it_had_before_there_were_any() -> None:
    names = ("v", "subject", "study", "train", "MR")
    geometry = ((4, 5, 6), 1, (1.0, 2.0, 3.0), tuple(map(float, range(16))), "RAS")
    values = ("int16", 2.0, 0.5, (0, 1, 2), (3, 4, 5), ({"min": 0.25},), (LabelRecord("organ", (1,), (2,)),))
    origin = ("file", "aa", "bb", "nifti", "1", ("note",), (4, 5, 6), (4, 5, 6))
    record = VolumeRecord(*names, *geometry, *values, *origin)
    assert fingerprint_of([record], {"name": "d"}) == "26f5e47abbe1c451d7289529a0bff720"
    derived = replace(record, derived=(DerivedRecord("m", "made", 3, "cc"),))
    assert fingerprint_of([derived], {"name": "d"}) != "26f5e47abbe1c451d7289529a0bff720"


def test_two_maps_live_side_by_side(url: str) -> None:
    make(url)
    make(url, "shifted-2")
    manifest = Manifest.open(url)
    assert all([d.name for d in r.derived] == ["shifted-1", "shifted-2"] for r in manifest.records())
    assert len(manifest.select(labelled="shifted-1")) == len(manifest.select(labelled="shifted-2")) == 5
    assert verify(url).ok


def test_stock_zarr_reads_a_map_and_finds_it_listed(tmp_path: Path) -> None:
    url = tmp_path.as_uri()
    write_phantoms(url, 2)
    make(url)
    root = tmp_path / "volumes/phantom-001"
    image = zarr.open_array(root / "0", mode="r")[:]
    array = zarr.open_array(root / "labels/shifted-1/0", mode="r")
    assert array.dtype == np.int32
    assert np.array_equal(array[:], image[0].astype(np.int32) + 1_000_000)
    group = zarr.open_group(root / "labels", mode="r")
    assert group.attrs["ome"]["labels"] == ["labels", "shifted-1"]


def test_volumes_with_none_and_with_several_labels_and_several_shards() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    store, random = open_store(url), np.random.default_rng(0)
    shape, ones = (20, 34, 18), np.ones((20, 34, 18), np.uint8)
    records = []
    for i, labels in enumerate(({}, {"organ": ones, "lesion": ones * 3})):
        image = random.integers(0, 500, (2, *shape)).astype(np.int16)
        layout = Layout((8, 8, 8), (16, 16, 16))
        records.append(
            write_volume(
                store,
                f"v{i}",
                Volume(image, spacing_mm=(5, 1, 1), affine=np.eye(4), labels=labels),
                layout=layout,
            )
        )
    Manifest.from_records(records).write(store)
    make(url)
    assert verify(url).ok
    with VolumeStore(url) as volumes:
        for name in ("v0", "v1"):
            crop = Crop(name, (-3, 5, 9), (24, 20, 12))
            inside = (slice(3, 23), slice(None), slice(0, 9))
            image, found = volumes.read(crop), volumes.read(crop, "shifted-1")[0]
            assert np.array_equal(found[inside], shifted(image, volumes.record(name))[inside])
            assert not found[:3].any()
    with pytest.raises(ConfigError, match="organ"):
        make(url, "organ")


def test_a_map_has_the_grid_that_the_spacing_policy_left(tmp_path: Path) -> None:
    source = folder(tmp_path / "scans", 3)
    url = (tmp_path / "store").as_uri()
    policy = IngestPolicy(spacing_mm=0.5, min_subjects=1)
    ingest(str(source), url, policy)
    make(url)
    with VolumeStore(url) as store:
        record = store.manifest.record(0)
        assert record.shape_DHW == (20, 24, 28)
        assert store.read_volume(record.volume_id, "shifted-1").shape == (1, 20, 24, 28)
    # What is ingested again keeps its map, what is new has none until the next run.
    save_nifti(source / "images" / "case_09.nii.gz", phantom(seed=9))
    ingest(str(source), url, policy)
    assert [r.map_names() for r in Manifest.open(url).records()] == [("label", "shifted-1")] * 3 + [()]
    report = make(url)
    assert (report.written, report.skipped) == (1, 3)
    assert verify(url).ok


def until(left: "multiprocessing.sharedctypes.Synchronized[int]", *given: Any) -> npt.NDArray[np.int32]:
    """Dies, as a killed process does, at the volume after the first few."""
    if left.value == 0:
        os._exit(9)
    left.value -= 1
    return shifted(*given)


def test_a_killed_run_leaves_the_store_as_it_was_and_the_next_goes_on(tmp_path: Path) -> None:
    url = tmp_path.as_uri()
    old = write_phantoms(url, 5).fingerprint
    context = multiprocessing.get_context("spawn")
    left = context.Value("i", 3)
    process = context.Process(
        target=derive.run,
        args=(url, "shifted-1", partial(until, left)),
        kwargs={"recipe": "value + 1000000", "mapper": map_serial},
    )
    process.start()
    process.join(120)
    assert process.exitcode == 9
    assert Manifest.open(url).fingerprint == old
    assert verify(url).ok
    report = make(url)
    assert (report.written, report.resumed) == (2, 3)
    assert verify(url).ok
    undisturbed = tmp_path / "other"
    write_phantoms(undisturbed.as_uri(), 5)
    assert make(undisturbed.as_uri()).manifest.fingerprint == report.manifest.fingerprint


def test_notes_of_another_content_are_not_trusted(url: str) -> None:
    first = Manifest.open(url).record(0)
    work = derive.DeriveWork(url, first, "shifted-1", "", shifted)
    assert not derive.derive_work(work).reused
    assert derive.derive_work(work).reused
    write_phantoms(url, 5, seed=1)
    report = make(url)
    assert (report.written, report.resumed) == (5, 0)
    assert verify(url).ok


def test_what_is_published_meanwhile_stays_and_is_named(url: str) -> None:
    def slow(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        yield from map(function, items)
        write_phantoms(url, 7)  # five are as they were

    report = make(url, mapper=slow)
    assert report.absent == ("phantom-005", "phantom-006")
    assert len(Manifest.open(url)) == 7
    assert make(url).written == 2
    assert verify(url).ok


def refuse(stored_CDHW: npt.NDArray[Any], record: VolumeRecord) -> npt.NDArray[np.int32]:
    if record.volume_id == "phantom-003":
        raise RefusedInput("image", expected="something else", found="this")
    return shifted(stored_CDHW, record)


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (refuse, "phantom-003.*something else"),
        (lambda stored, _record: stored[0], "phantom-00.*int32"),
        (lambda stored, _record: stored.astype(np.int32), "phantom-00.*shape"),
    ],
)
def test_a_volume_that_is_refused_is_named_and_nothing_is_published(
    url: str, compute: derive.Compute, words: str
) -> None:
    old = Manifest.open(url).fingerprint
    with pytest.raises(RefusedInput, match=words):
        make(url, compute=compute)
    assert Manifest.open(url).fingerprint == old


def test_a_store_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    write_phantoms(tmp_path.as_uri(), 2)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(StoreError, match="can be written.*on a copy") as caught:
            make(f"http://127.0.0.1:{server.server_port}", compute=lambda *_: pytest.fail("it computed"))
        server.shutdown()
    assert "shifted-1" in str(caught.value)


def test_verify_finds_a_map_that_is_not_what_the_manifest_says(url: str) -> None:
    make(url)
    store = open_store(url)
    key = "volumes/phantom-00{}/labels/shifted-1/0/c/0/0/0"
    store.put(key.format(1), store.get(key.format(2)))
    (problem,) = verify(url).problems
    assert problem.volume_id == "phantom-001"
    assert "shifted-1" in problem.what
    store.delete(key.format(1))
    assert "shifted-1" in str(verify(url).problems[0])


def test_a_stream_carries_maps_that_fit_their_crops(url: str) -> None:
    make(url)
    # A crop larger than some axes, so that padding is in it.
    spec = StreamSpec(3, 4, (12, 26, 12), lanes=8, split="train", maps=("shifted-1", "labels"))
    with VolumeStore(url) as store, CropStream(store, spec) as stream:
        for _ in range(3):
            batch = next(stream)
            assert set(batch.maps_BDHW) == {"shifted-1", "labels"}
            inside = batch.maps_BDHW["shifted-1"] > 0
            assert 0.5 < inside.mean() < 1
            shown = batch.image_BCDHW[:, 0].astype(np.int32) + 1_000_000
            assert np.array_equal(batch.maps_BDHW["shifted-1"][inside], shown[inside])
            bright = batch.image_BCDHW[:, 0] > 150
            assert batch.maps_BDHW["labels"][inside & bright].mean() > 0.8


def test_a_stream_leaves_out_volumes_without_the_map_and_says_when_none_is_left(url: str) -> None:
    with VolumeStore(url) as store, pytest.raises(ConfigError, match="with 'nothing'"):
        CropStream(store, StreamSpec(0, 4, (8, 8, 8), lanes=4, maps=("nothing",)))
    make(url)
    with_map = list(Manifest.open(url).records())
    without = list(write_phantoms(url, 9).records())[5:]
    Manifest.from_records([*with_map, *without]).write(open_store(url))
    with VolumeStore(url) as store:
        spec = StreamSpec(0, 4, (8, 8, 8), lanes=4, maps=("shifted-1",))
        with CropStream(store, spec) as stream:
            assert stream.indices.tolist() == [0, 1, 2, 4]  # 3 is in the test split
            assert set(next(stream).volume_B.tolist()) <= {0, 1, 2, 4}
