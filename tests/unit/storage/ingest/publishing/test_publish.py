"""What a manifest says after several runs: new ids for new content, one split for one person and for copies."""

import numpy as np
import pytest

from storage.format.manifest import Manifest
from storage.ingest.pipeline import run
from storage.reading.volume_store import VolumeStore
from tests.kit.ingests import HALVES, dst, src
from tests.kit.scans import folder, phantom, save_nifti

__all__ = ["dst", "src"]  # fixtures


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
