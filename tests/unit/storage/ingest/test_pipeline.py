"""Ingest: exact or bounded voxels, true facts, resumable, published whole or not at all."""

import errno
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.errors import ConfigError, NotFound, RefusedInput, StoreError
from storage.format.manifest import Manifest
from storage.ingest import pipeline as ingest
from storage.ingest import work
from storage.ingest.mapping import map_serial, map_threads
from storage.ingest.pipeline import run
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import ROBUST_RANGES, quantise
from storage.ingest.publishing.quarantine import Quarantined
from storage.ingest.readers.raw import ReadPolicy
from storage.intensity_stats import foreground_stats
from storage.objects import fsync as sync
from storage.objects import open_store
from storage.objects.local import FileStore
from storage.reading.volume_store import VolumeStore
from tests.kit.scans import disc, folder, phantom, save_nifti

HALVES = IngestPolicy(split=(0.5, 0.0, 0.5))


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return folder(tmp_path / "src")


@pytest.fixture
def dst(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


def on_disk(dst: str) -> dict[str, bytes]:
    root = Path(urlsplit(dst).path)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


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


def test_a_run_killed_within_a_volume_writes_it_again_under_the_same_id(src, dst, tmp_path, monkeypatch):
    put = FileStore.put
    left = [5]

    def failing(self, key, data, if_absent=False):
        left[0] -= 1
        if left[0] < 0:
            raise StoreError(key, found="power cut")
        return put(self, key, data, if_absent)

    for allowed in range(1, 9, 2):  # cut after the claim, within the arrays, before the record
        left[0] = allowed
        monkeypatch.setattr(FileStore, "put", failing)
        with pytest.raises(StoreError, match="power cut"):
            run(str(src), dst, HALVES, mapper=map_serial)
        monkeypatch.undo()
    assert run(str(src), dst, HALVES).published == 4
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


def test_refused_volumes_are_listed_and_the_rest_goes_on(src, dst):
    (src / "images" / "case_01.nii.gz").write_text("no volume at all")
    save_nifti(src / "labels" / "case_02.nii.gz", disc((10, 12, 13)))
    report = run(str(src), dst, HALVES)
    assert report.published == 2
    lines = [json.loads(line) for line in on_disk(dst)["quarantine.jsonl"].decode().splitlines()]
    assert [line["source"] for line in lines] == ["images/case_01.nii.gz", "images/case_02.nii.gz"]
    assert "a text file" in lines[0]["reason"]
    assert "shape" in lines[1]["reason"]
    assert str(src) not in json.dumps(lines)
    assert not any("case_02" in p for p in on_disk(dst) if p.startswith("volumes"))
    save_nifti(src / "images" / "case_01.nii.gz", phantom(seed=1))
    save_nifti(src / "labels" / "case_02.nii.gz", disc())
    again = run(str(src), dst, HALVES)
    assert (again.written, again.skipped) == (2, 2)
    assert "quarantine.jsonl" not in on_disk(dst)


def test_too_many_refused_fail_the_job_and_publish_nothing(src, dst):
    for i in range(3):
        (src / "images" / f"case_{i:02d}.nii.gz").write_bytes(b"")
    with pytest.raises(RefusedInput, match=r"found 3 of 4.*max_failed"):
        run(str(src), dst, HALVES)
    with pytest.raises(NotFound):
        Manifest.open(dst)
    assert run(str(src), dst, HALVES.model_copy(update={"max_failed": 0.75, "min_subjects": 1})).published == 1


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


def test_a_changed_source_gets_a_new_id_and_the_old_manifest_stays_true(src, dst):
    first = run(str(src), dst, HALVES)
    save_nifti(src / "images" / "case_01.nii.gz", phantom(seed=99))
    second = run(str(src), dst, HALVES)
    assert (second.written, second.skipped) == (1, 3)
    assert second.manifest.fingerprint != first.manifest.fingerprint
    old = VolumeStore(dst, Manifest.open(dst, first.manifest.fingerprint))
    np.testing.assert_array_equal(old.read_volume("case_01")[0], phantom(seed=1))
    new = VolumeStore(dst)
    renamed = next(r.volume_id for r in new.manifest.records() if r.volume_id.startswith("case_01"))
    assert renamed != "case_01"
    np.testing.assert_array_equal(new.read_volume(renamed)[0], phantom(seed=99))
    splits = [{r.subject: r.split for r in m.manifest.records()} for m in (first, second)]
    assert splits[0] == splits[1]


def test_another_policy_ingests_again_but_another_split_does_not(src, dst):
    first = run(str(src), dst, HALVES)
    shares = run(str(src), dst, HALVES.model_copy(update={"max_failed": 0.1}))
    assert (shares.written, shares.manifest.fingerprint) == (0, first.manifest.fingerprint)
    coarse = run(str(src), dst, HALVES.model_copy(update={"spacing_mm": 2.0}))
    assert coarse.written == 4
    record = coarse.manifest.record(0)
    assert record.spacing_mm == pytest.approx((2, 2, 2))
    assert record.shape_DHW == (5, 6, 7)
    assert any("resampled from 1x1x1 to 2x2x2" in note for note in record.notes)
    assert set(record.label("label").values) <= {1, 2}


def test_append_keeps_what_is_there_and_moves_nobody(tmp_path, dst):
    first = run(str(folder(tmp_path / "a", 6)), dst, HALVES)
    more = tmp_path / "b"
    for i in range(10, 14):
        save_nifti(more / "images" / f"case_{i}.nii.gz", phantom(seed=i))
    second = run(str(more), dst, HALVES, append=True)
    assert (second.published, second.written) == (10, 4)
    before = {r.volume_id: r.split for r in first.manifest.records()}
    after = {r.volume_id: r.split for r in second.manifest.records()}
    assert {k: after[k] for k in before} == before
    assert run(str(more), dst, HALVES).published == 4


def test_duplicates_are_noted_and_never_split(src, dst):
    for i in range(20, 40):
        save_nifti(src / "images" / f"case_{i}.nii.gz", phantom(seed=i % 2))
    report = run(str(src), dst, HALVES)
    records = {r.volume_id: r for r in report.manifest.records()}
    assert "same content as case_00" in records["case_20"].notes
    by_content = {
        i % 2: {records[f"case_{i}"].split for i in range(20, 40) if i % 2 == j} for j in (0, 1) for i in (j,)
    }
    assert all(len(splits) == 1 for splits in by_content.values())
    assert records["case_20"].split == records["case_00"].split
    assert report.warnings == (
        "same content as case_00, and in one split with it: case_20, case_22, case_24 and 7 more",
        "same content as case_01, and in one split with it: case_21, case_23, case_25 and 7 more",
    )
    assert run(str(src), dst, HALVES).manifest.fingerprint == report.manifest.fingerprint


def test_a_copy_is_never_split_from_its_original_whatever_the_policy(tmp_path, dst):
    first = run(str(folder(tmp_path / "a", 8, labelled=False)), dst, HALVES)
    splits = {r.source_sha256: r.split for r in first.manifest.records()}
    (tmp_path / "a" / "images").rename(tmp_path / "a" / "copies")
    again = run(str(tmp_path / "a"), dst, HALVES.model_copy(update={"spacing_mm": 2.0}), append=True)
    assert again.published == 16
    assert "16 volumes are of scans that other policies were used for too" in again.warnings[0]
    assert {r.split == splits[r.source_sha256] for r in again.manifest.records()} == {True}


def test_folders_that_may_be_people_are_pointed_out(tmp_path, dst):
    src = tmp_path / "src"
    for i, name in enumerate(("anna", "bob", "carla", "dora", "emil", "fred")):
        save_nifti(src / ("red", "green", "blue")[i % 3] / f"{name}.nii.gz", phantom(seed=i))
    warnings = run(str(src), dst, HALVES).warnings
    assert len(warnings) == 1
    assert "3 folders hold several volumes" in warnings[0]
    assert "subject_pattern" in warnings[0]
    assert run(str(src), dst, HALVES.model_copy(update={"subject_pattern": "^[a-z]+"})).warnings == ()


def test_frames_of_one_patient_are_in_one_split(tmp_path, dst):
    """As of ACDC, where 27 of 100 patients were in training and test."""
    for i in range(24):
        save_nifti(tmp_path / "src" / f"patient{i // 2:03d}_frame{1 + 11 * (i % 2):02d}.nii.gz", phantom(seed=i))
    shown: list[str] = []
    report = run(
        str(tmp_path / "src"), dst, HALVES, discovered=lambda found: shown.extend(i.subject for i in found.items)
    )
    splits = {(record.source[:10], record.split) for record in report.manifest.records()}
    assert len(splits) == len(set(shown)) == 12


def test_a_label_map_is_published_as_an_image_only_when_told(tmp_path, dst):
    """Its name says nothing; were it stored as a scan, encoders would learn to draw masks."""
    src = folder(tmp_path / "src", 3, labelled=False)
    many = np.kron(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.ones((4, 4, 4), np.int16))
    noise = np.random.default_rng(0).integers(0, 60, (12, 16, 20)).astype(np.int16)
    for name, voxels in {
        "binary": disc(),
        "floats": disc().astype(np.float32) * 0.5,
        "atlas": many * 37,
        "coarse": noise,
    }.items():
        save_nifti(src / "images" / f"{name}.nii.gz", voxels)
    policy = HALVES.model_copy(update={"spacing_mm": 0.7})
    report = run(str(src), dst, policy)
    assert [q.source for q in report.quarantined] == [f"images/{name}.nii.gz" for name in ("atlas", "binary", "floats")]
    assert all("looks like a label map" in q.reason and "label_maps=keep" in q.reason for q in report.quarantined)
    told = run(str(src), dst, policy.model_copy(update={"label_maps": "keep"}))
    assert told.published == 7
    record = next(r for r in told.manifest.records() if r.source == "images/binary.nii.gz")
    assert "looks like a label map: 3 different values" in record.notes
    assert len(run(str(src), dst, policy).quarantined) == 3


def test_refusals_are_listed_by_reason_however_the_run_ends(src, dst):
    for i in range(3):
        (src / "images" / f"case_{i:02d}.nii.gz").write_text("no volume at all")
    shutil.copy(src / "images" / "case_03.nii.gz", src / "images" / "case_03.nii")
    heard: list[Quarantined] = []
    with pytest.raises(RefusedInput) as refused:
        run(str(src), dst, HALVES, refusals=heard.extend)
    assert "a text file" in str(refused.value)
    save_nifti(src / "images" / "case_04.nii.gz", phantom())
    loose = HALVES.model_copy(update={"max_failed": 1.0})
    for policy in (loose, HALVES):
        heard.clear()
        with pytest.raises(RefusedInput) as refused:
            run(str(src), dst, policy, refusals=heard.extend)
        message = str(refused.value)
        assert "3 (images/case_00.nii.gz, images/case_01.nii.gz, images/case_02.nii.gz)" in message
        assert "a text file" in message
        assert "2 (images/case_03.nii, images/case_03.nii.gz)" in message
        assert "add subjects" not in message
        assert len(heard) == 5
    alone = run(str(src), dst, loose.model_copy(update={"min_subjects": 1}))
    assert (alone.published, len(alone.quarantined)) == (1, 5)
    lines = on_disk(dst)["quarantine.jsonl"].decode().splitlines()
    assert [json.loads(line)["source"] for line in lines] == [q.source for q in alone.quarantined]
    (src / "images" / "case_04.nii.gz").unlink()
    with pytest.raises(RefusedInput, match=r"found 0; refused: 3 .*a text file"):
        run(
            str(src), (Path(urlsplit(dst).path).parent / "other").as_uri(), loose.model_copy(update={"min_subjects": 1})
        )


def test_volumes_keep_their_split_when_files_beside_them_change_their_subjects_names(tmp_path, dst):
    src = tmp_path / "src"
    for i in range(8):
        save_nifti(src / "imagesTr" / f"case_{i}.nii.gz", phantom(seed=i))
    before = {r.source: (r.subject, r.split) for r in run(str(src), dst, HALVES).manifest.records()}
    for i in range(8):
        save_nifti(src / "imagesTs" / f"case_{i}.nii.gz", phantom(seed=100 + i))
    after = {r.source: (r.subject, r.split) for r in run(str(src), dst, HALVES).manifest.records()}
    assert all(after[source][0] != subject for source, (subject, _) in before.items())
    assert all(after[source][1] == split for source, (_, split) in before.items())


def test_a_source_that_changes_while_it_is_read_is_refused(src, dst, monkeypatch):
    """Its digest would be of other bytes than its voxels, and the next run would take it for unchanged."""
    real = work.prepare

    def copied_meanwhile(item, policy, modality):
        ready = real(item, policy, modality)
        if "case_02" in item.source:
            save_nifti(Path(item.images[0]), phantom(seed=77))
        return ready

    monkeypatch.setattr(work, "prepare", copied_meanwhile)
    report = run(str(src), dst, HALVES)
    assert [(q.source, "changed meanwhile" in q.reason) for q in report.quarantined] == [
        ("images/case_02.nii.gz", True)
    ]
    monkeypatch.undo()
    run(str(src), dst, HALVES)
    np.testing.assert_array_equal(VolumeStore(dst).read_volume("case_02")[0], phantom(seed=77))


@pytest.mark.parametrize("form", ["same.raw", "other.raw", "LIST", "pattern"])
def test_the_digest_covers_the_file_that_a_header_names(tmp_path, dst, form):
    src, arrays = tmp_path / "src", [phantom(seed=0), phantom(seed=1)]
    save_nifti(src / "second.nii.gz", phantom(seed=5))
    parts = {"LIST": [f"p{k}.bin" for k in range(10)], "pattern": [f"p{k}.bin" for k in range(10)]}.get(form, [form])

    def voxels(array):
        for part, piece in zip(parts, np.split(array, len(parts)), strict=True):
            (src / part).write_bytes(piece.tobytes())

    named = {"LIST": "\n".join(["LIST", *parts]), "pattern": "p%d.bin 0 9 1"}.get(form, form)
    header = "ObjectType = Image\nNDims = 3\nDimSize = 14 12 10\nElementType = MET_SHORT\nElementSpacing = 1 1 1\n"
    (src / "same.mhd").write_text(f"{header}ElementDataFile = {named}\n")
    for array in arrays:
        voxels(array)
        report = run(str(src), dst, HALVES)
        assert report.quarantined == ()
        found = next(r.volume_id for r in report.manifest.records() if r.volume_id.startswith("same"))
        np.testing.assert_array_equal(VolumeStore(dst).read_volume(found)[0][:, ::-1, ::-1], array)


def test_what_would_not_fit_a_task_after_resampling_is_refused_before_it_is_made(src, dst):
    policy = HALVES.model_copy(update={"spacing_mm": 0.05, "max_failed": 1.0})
    with pytest.raises(RefusedInput, match="at least 2 subjects"):
        run(str(src), dst, policy.model_copy(update={"read": ReadPolicy(max_voxels=10_000_000)}))
    assert "at most 10,000,000 voxels at 0.05x0.05x0.05 mm" in on_disk(dst)["quarantine.jsonl"].decode()


def test_names_become_safe_ids_and_stay_apart(tmp_path, dst):
    for name in ("a b", "a+b", "ü/x.y", "x" * 150):
        save_nifti(tmp_path / "src" / f"{name}.nii.gz", phantom(seed=len(name) + ord(name[1])))
    ids = [r.volume_id for r in run(str(tmp_path / "src"), dst, HALVES).manifest.records()]
    assert len(set(ids)) == 4
    assert all(i.isascii() and len(i) < 120 and "/" not in i for i in ids)


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


@pytest.mark.parametrize(
    ("values", "offset"),
    [
        (np.array([-1024.0, 0, 3071, 32767]), 0.0),
        (np.array([0, 65535], np.uint16), 32768.0),
        (np.array([40000, 100000 - 1], np.int32), 72768.0),
        (np.array([-32768, 32767], np.int32), 0.0),
    ],
)
def test_whole_numbers_are_exact(values, offset):
    stored, scale, found = quantise(values.reshape(1, 1, 1, -1), (foreground_stats(values),), "", False, [])
    assert (scale, found) == (1.0, offset)
    np.testing.assert_array_equal(stored.ravel().astype(np.int64) + int(found), values.astype(np.int64))


@settings(max_examples=60, deadline=None)
@given(
    level=st.floats(1e-3, 1e7),
    outlier=st.sampled_from([1.0, 3.0, 50.0, 1e4]),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
def test_quantisation_error_is_below_a_ten_thousandth_of_the_robust_range(level, outlier, shift, seed):
    draw = np.random.default_rng(seed)
    values = ((draw.gamma(2.0, 0.2, (1, 4, 16, 16)) + shift) * level).astype(np.float32)
    values[0, 0, 0, 0] *= outlier
    notes: list[str] = []
    stats = foreground_stats(values[0])
    stored, scale, offset = quantise(values, (stats,), "MR", False, notes)
    robust = stats["p99_5"] - stats["p0_5"]
    fits = float(values.max()) - float(values.min()) <= ROBUST_RANGES * robust
    assert stored.dtype == (np.int16 if fits else np.float32)
    assert bool(notes) != fits
    back = stored.astype(np.float64) * scale + offset
    assert np.abs(back - values).max() <= (1e-4 * robust if fits else 0)


@pytest.mark.parametrize("modality", ["", "CT", "PT"])
def test_hot_voxels_keep_their_values(modality):
    """They used to be clipped at twelve robust ranges: a lesion of 60 became 15."""
    values = np.abs(np.random.default_rng(0).normal(0.7, 0.3, (1, 20, 20, 20))).astype(np.float32)
    for hot in (60.0, -3e5, 3e38):
        values[0, 10:12, 10:12, 10:12] = hot
        notes: list[str] = []
        stored, scale, offset = quantise(values, (foreground_stats(values[0]),), modality, False, notes)
        np.testing.assert_array_equal(stored * scale + offset, values)
        assert "kept as float32" in notes[-1]


def test_hounsfield_units_beyond_int16_keep_their_values():
    values = np.random.default_rng(0).uniform(-1000, 1500, (1, 20, 20, 20))
    values[0, 3, 3, 3] = 40000.25
    notes: list[str] = []
    stored, scale, offset = quantise(values, (foreground_stats(values[0]),), "CT", False, notes)
    assert stored.astype(np.float64)[0, 3, 3, 3] * scale + offset == 40000.25
    assert "kept as float32" in notes[-1]


@pytest.mark.parametrize("rare", [0.0, 1e-9])
def test_a_volume_without_a_robust_range_is_kept_as_float32(rare):
    values = np.full((1, 20, 20, 20), 0.1, np.float32)
    values[0, 0, 0, :2] = (rare, 5.5)
    stored, scale, offset = quantise(values, (foreground_stats(values[0]),), "", False, [])
    np.testing.assert_array_equal(stored * scale + offset, values)


def test_resampled_ct_is_rounded_to_one_hounsfield_unit():
    values = np.array([-1000.4, 0.6, 300.5, 2999.9], np.float32).reshape(1, 1, 1, 4)
    stored, scale, offset = quantise(values, (foreground_stats(values),), "CT", False, [])
    assert (scale, offset) == (1.0, 0.0)
    np.testing.assert_array_equal(stored.ravel(), [-1000, 1, 300, 3000])


def test_ct_that_is_not_in_hounsfield_units_is_not_rounded_to_them():
    values = np.random.default_rng(0).random((1, 4, 16, 16)).astype(np.float32)
    notes: list[str] = []
    stored, scale, offset = quantise(values, (foreground_stats(values),), "CT", False, notes)
    np.testing.assert_allclose(stored * scale + offset, values, atol=1e-4)
    assert "no Hounsfield units" in notes[0]


@pytest.mark.parametrize("modality", ["", "CT", "MR"])
@pytest.mark.parametrize("order", [1, -1])
def test_no_channel_is_clipped_or_rounded_by_the_scale_of_another(modality, order):
    """CT and PET, say: by the first's robust range the other would be flat."""
    draw = np.random.default_rng(0)
    ct, pet = draw.uniform(-1000, 1500, (4, 16, 16)), draw.gamma(2.0, 1.5, (4, 16, 16))
    values = np.stack([ct, pet][::order]).astype(np.float32)
    notes: list[str] = []
    stored, scale, offset = quantise(values, tuple(map(foreground_stats, values)), modality, False, notes)
    np.testing.assert_array_equal(stored * scale + offset, values)
    assert stored.dtype == np.float32
    assert "float32" in notes[0]
    values[1] = values[0] * np.float32(0.9) + 1
    stored, scale, offset = quantise(values, tuple(map(foreground_stats, values)), modality, False, [])
    assert stored.dtype == np.int16
    for channel, back in zip(values, stored.astype(np.float64) * scale + offset, strict=True):
        stats = foreground_stats(channel)
        assert np.abs(back - channel).max() <= 1e-4 * (stats["p99_5"] - stats["p0_5"])


def test_float32_by_policy(src, dst):
    save_nifti(src / "images" / "case_00.nii.gz", phantom().astype(np.float32) / 7)
    run(str(src), dst, HALVES.model_copy(update={"dtype": "float32"}))
    np.testing.assert_array_equal(VolumeStore(dst).read_volume("case_00")[0], phantom().astype(np.float32) / 7)


@pytest.mark.parametrize(
    "wrong",
    [{"spacing_mm": -1}, {"split": (0.5, 0.2, 0.2)}, {"crop_DHW": (0, 1, 1)}, {"spacing": 1}, {"read": {"gap": 1}}],
)
def test_wrong_settings_are_refused(wrong):
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        IngestPolicy.model_validate(wrong)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), "nan", "inf", "-inf", "NaN"])
def test_numbers_of_a_policy_are_finite_whether_given_as_numbers_or_as_text(number):
    for field in ({"spacing_mm": number}, {"spacing_mm": (1, number, 1)}, {"split": (number, 0, 1)}):
        with pytest.raises(ValidationError):
            IngestPolicy.model_validate(field)
    for field in ({"max_failed": number}, {"read": {"max_gap_mm": number}}, {"read": {"max_voxels": number}}):
        with pytest.raises(ValidationError):
            IngestPolicy.model_validate(field)


def test_policies_name_what_changes_voxels():
    assert IngestPolicy().version == IngestPolicy(seed=3, max_failed=0).version
    assert IngestPolicy().version != IngestPolicy(read=ReadPolicy(gaps="resample")).version
    assert IngestPolicy(spacing_mm=(3, 1, 2)).target_spacing((9, 9, 9)) == (3, 1, 2)
    assert IngestPolicy(spacing_mm=1.5).target_spacing((9, 9, 9)) == (1.5, 1.5, 1.5)


def test_works_and_outcomes_travel_between_processes(src, dst):
    import pickle

    works = []

    def grab(function, items):
        works.extend(items)
        return map(pickle.loads(pickle.dumps(function)), pickle.loads(pickle.dumps(works)))  # noqa: S301

    assert run(str(src), dst, HALVES, mapper=grab).published == 4
    assert pickle.loads(pickle.dumps(works[0])) == works[0]  # noqa: S301


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
