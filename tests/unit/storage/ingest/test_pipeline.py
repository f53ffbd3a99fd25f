"""Ingest: exact or bounded voxels, true facts, resumable, published whole or not at all."""

import errno
import json
import os
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from storage.errors import ConfigError, NotFound, RefusedInput, StoreError
from storage.format.manifest import Manifest
from storage.ingest import pipeline as ingest
from storage.ingest.mapping import map_serial, map_threads
from storage.ingest.pipeline import run
from storage.intensity_stats import foreground_stats
from storage.objects import fsync as sync
from storage.objects import open_store
from storage.reading.volume_store import VolumeStore
from tests.kit.ingests import HALVES, dst, on_disk, src
from tests.kit.scans import disc, folder, phantom

__all__ = ["dst", "src"]  # fixtures


def test_volumes_and_labels_come_back_as_they_were(src, dst):
    report = run(str(src), dst, HALVES)
    assert (report.published, report.written, report.skipped, report.quarantined) == (4, 4, 0, ())
    store = VolumeStore(dst)
    for i in range(4):
        record = store.manifest.record(i)
        assert record.volume_id == f"case_{i:02d}"
        np.testing.assert_array_equal(store.read_volume(record.volume_id)[0], phantom(seed=i))
        np.testing.assert_array_equal(store.read_volume(record.volume_id, "label")[0], disc())
        assert (record.scale, record.offset, record.dtype) == (1.0, 0.0, "int16")
        assert record.shape_DHW == (10, 12, 14)
        assert record.orientation == "RAS"
        assert record.source == f"images/case_{i:02d}.nii.gz"
        assert record.stats == (foreground_stats(phantom(seed=i)),)
        label = record.label("label")
        assert label.values == (1, 2)
        assert label.voxels == tuple(int((disc() == v).sum()) for v in (1, 2))
        for value, points in zip(label.values, label.points, strict=True):
            assert all(disc()[p] == value for p in points)
    store.close()


def test_a_second_run_does_nothing(src, dst):
    first = run(str(src), dst, HALVES)
    before = {p: os.stat(Path(urlsplit(dst).path, p)).st_mtime_ns for p in on_disk(dst)}
    again = run(str(src), dst, HALVES)
    assert (again.written, again.skipped, again.published) == (0, 4, 4)
    assert again.manifest.fingerprint == first.manifest.fingerprint
    assert {p: os.stat(Path(urlsplit(dst).path, p)).st_mtime_ns for p in on_disk(dst)} == before


def test_threads_and_one_thread_write_the_same_store(src, tmp_path):
    stores = []
    for name, mapper in (("a", map_serial), ("b", map_threads)):
        dst = (tmp_path / name / "store").as_uri()
        run(str(src), dst, HALVES, mapper=mapper)
        stores.append(on_disk(dst))
    assert stores[0] == stores[1]


def test_a_killed_run_continues_and_ends_as_if_it_had_not_been_killed(src, dst, tmp_path):
    class Killed(BaseException):
        pass

    def killed(function, items):
        for n, item in enumerate(items):
            if n == 2:
                raise Killed
            yield function(item)

    with pytest.raises(Killed):
        run(str(src), dst, HALVES, mapper=killed)
    with pytest.raises(NotFound):
        Manifest.open(dst)
    report = run(str(src), dst, HALVES)
    assert (report.written, report.skipped) == (2, 2)
    whole = (tmp_path / "whole" / "store").as_uri()
    run(str(src), whole, HALVES)
    assert on_disk(dst) == on_disk(whole)


@pytest.mark.parametrize(("call", "room"), [("write", 6), ("fsync", 0)])
@pytest.mark.parametrize("mapper", [map_threads, lambda function, items: map(function, items)], ids=["here", "away"])
def test_a_full_disk_is_one_clear_error_and_publishes_nothing(src, dst, monkeypatch, call, room, mapper):
    real = getattr(os, call)
    left = iter(range(room))

    def full(*arguments):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreError, match="No space left on device"):
        run(str(src), dst, HALVES, mapper=mapper)
    monkeypatch.undo()
    with pytest.raises(NotFound):
        Manifest.open(dst)
    assert "latest" not in on_disk(dst)


def test_everything_is_on_the_disk_before_it_is_published(src, dst, monkeypatch):
    """Objects one by one where another machine writes them, all at once where this one does."""
    events = []
    fsync, syncfs = os.fsync, sync._syncfs
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(sync, "_syncfs", lambda fd: (events.append(set(on_disk(dst))), syncfs(fd)))
    monkeypatch.setattr(sync, "_kind", lambda device: "ext4")
    run(str(src), dst, HALVES)
    at_once, *later = events
    assert at_once == {key for key in on_disk(dst) if key.startswith("volumes/")} | {
        f"ingest/case_{i:02d}.json" for i in range(4)
    }
    assert len(later) == 2, "the manifest and its pointer"
    events.clear()
    other = f"{dst}-2"
    run(str(src), other, HALVES, mapper=lambda function, items: map(function, items))
    assert sum(f"{Path(urlsplit(other).path)}/volumes/" in str(event) for event in events) == 4 * 7
    assert [event for event in events if isinstance(event, set)] == [set(on_disk(dst))], "of earlier runs"
    events.clear()
    monkeypatch.setattr(sync, "_kind", lambda device: "fuse.sshfs")
    run(str(src), f"{dst}-3", HALVES)
    assert len(events) == 4 * 9 + 2, "each object, its claim, its record"


def test_a_disk_that_fails_at_the_end_publishes_nothing(src, dst, monkeypatch):
    def failing(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sync, "_syncfs", failing)
    monkeypatch.setattr(sync, "_kind", lambda device: "ext4")
    with pytest.raises(StoreError, match="Input/output error"):
        run(str(src), dst, HALVES)
    with pytest.raises(NotFound):
        Manifest.open(dst)


def test_what_a_power_failure_took_of_an_unpublished_run_is_written_again(src, dst, tmp_path, monkeypatch):
    def cut(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(sync, "_syncfs", cut)
    monkeypatch.setattr(sync, "_kind", lambda device: "ext4")
    with pytest.raises(KeyboardInterrupt):
        run(str(src), dst, HALVES)
    monkeypatch.undo()
    root = Path(urlsplit(dst).path)
    # Names without bytes, as a journal that keeps names alone may leave them: voxels, metadata, a claim.
    for key in ("volumes/case_00/0/c/0/0/0/0", "volumes/case_01/zarr.json", "ingest/case_02.json"):
        (root / key).write_bytes(b"")
    (root / "volumes/case_01/labels/label/zarr.json").unlink()
    report = run(str(src), dst, HALVES)
    assert (report.written, report.skipped) == (3, 1)
    whole = (tmp_path / "whole" / "store").as_uri()
    run(str(src), whole, HALVES)
    (root / ".put-lock").unlink()
    assert on_disk(dst) == on_disk(whole)


def test_one_subject_and_empty_folders_are_refused_before_anything_is_written(tmp_path, dst):
    one = folder(tmp_path / "one", 1)
    with pytest.raises(RefusedInput, match="at least 2 subjects"):
        run(str(one), dst)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedInput, match="an empty folder"):
        run(str(tmp_path / "empty"), dst)
    with pytest.raises(ConfigError):
        run(str(tmp_path / "none"), dst)
    assert on_disk(dst) == {}


def test_facts_of_the_data_set(src, dst):
    facts = {
        "name": "x",
        "labels": {"0": "background", "1": "liver", "2": "spleen"},
        "modality": {"0": "CT"},
        "licence": "CC0",
    }
    (src / "dataset.json").write_text(json.dumps(facts))
    manifest = run(str(src), dst, HALVES, name="organs").manifest
    assert manifest.dataset == {"name": "organs", "labels": {"1": "liver", "2": "spleen"}, "licence": "CC0"}
    assert {r.modality for r in manifest.records()} == {"CT"}
    (src / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "MRI"}})
    )
    manifest = run(str(src), (Path(urlsplit(dst).path) / "b").as_uri(), HALVES).manifest
    assert manifest.dataset["labels"] == {"1": "liver"}
    assert manifest.record(0).modality == "MR"


def test_progress_is_reported_for_each_volume(src, dst):
    seen = []
    run(str(src), dst, HALVES, progress=seen.append)
    assert [p.done for p in seen] == [1, 2, 3, 4]
    assert seen[-1].total == 4
    assert seen[-1].bytes_in == sum(p.stat().st_size for p in src.rglob("*.nii.gz"))
    assert seen[-1].seconds_left == 0


def test_an_unreachable_store_is_noticed_before_the_work(src, monkeypatch):
    monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", "1")
    monkeypatch.setattr(ingest, "ingest_work", lambda work: pytest.fail("worked without a store"))
    with pytest.raises(StoreError):
        run(str(src), "http://127.0.0.1:9/store", HALVES)


def test_memory_stores_work_too(src):
    url = f"memory://ingest-{time.time_ns()}"
    assert run(str(src), url, HALVES).published == 4
    assert list(open_store(url).list("ingest/")) == []


@pytest.mark.skipif(
    not os.environ.get("TOMOSCALE_DATASETS"), reason="set TOMOSCALE_DATASETS to the folder of real data"
)
def test_the_formats_folder(dst):
    root = Path(os.environ["TOMOSCALE_DATASETS"]) / "formats"
    if not root.is_dir():
        pytest.skip("TOMOSCALE_DATASETS holds no formats")
    from storage.ingest.deidentify import Pseudonyms

    report = run(str(root), dst, pseudonyms=Pseudonyms(b"0123456789abcdef"))
    assert len(report.quarantined) == 4
    assert report.published == 59
    records = list(report.manifest.records())
    brains = [r for r in records if r.source.startswith("nifti_48")]
    assert len({r.content_sha256 for r in brains}) == 1
    assert len({r.split for r in brains}) == 1
    assert len({r.orientation for r in brains}) == 48
    data = b"".join(on_disk(dst).values())
    for name in (b"Thanos", b"Avasarala", b"Dumbledore", b"PGBM"):
        assert name not in data
    assert Counter(bool(r.labels) for r in records)[True] == 4
