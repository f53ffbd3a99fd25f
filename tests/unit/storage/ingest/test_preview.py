"""A look at a folder agrees with the ingest of it, and reads no voxels."""

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from storage.errors import ConfigError, RefusedInput
from storage.ingest.deidentify import Pseudonyms
from storage.ingest.pipeline import run
from storage.ingest.policy import IngestPolicy
from storage.ingest.preview import preview
from storage.ingest.readers.dicom import reader
from storage.ingest.readers.raw import ReadPolicy
from tests.kit.formats import (
    save_big_endian,
    save_itk,
    save_mgz,
    save_nifti2,
    save_ome_zarr,
    save_pair,
    save_series,
    save_zarr,
)
from tests.kit.scans import disc, folder, phantom, save_dicom, save_nifti, slices

AFFINE = np.array([[-1.5, 0, 0, 7], [0, 2, 0, -3], [0, 0, 1.25, 4], [0, 0, 0, 1.0]])
ALONE = IngestPolicy(min_subjects=1)
FORMATS = {
    "a.nii": save_nifti,
    "b.nii.gz": save_nifti2,
    "c.nii": save_big_endian,
    "d.hdr": save_pair,
    "e.nrrd": save_itk,
    "f.nhdr": save_itk,
    "g.mha": save_itk,
    "h.mhd": save_itk,
    "i.mgz": save_mgz,
    "j.zarr": save_zarr,
    "k.zarr": save_ome_zarr,
    "l": save_series,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("policy", [ALONE, ALONE.model_copy(update={"spacing_mm": 1.0})], ids=["native", "1 mm"])
def test_every_format_is_foreseen_as_it_is_stored(name: str, policy: IngestPolicy, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    FORMATS[name](tmp_path / "src" / name, phantom(), AFFINE)
    look = preview(str(tmp_path / "src"), policy)
    report = run(str(tmp_path / "src"), (tmp_path / "store").as_uri(), policy, pseudonyms=Pseudonyms(b"s" * 16))
    (record,), (found,) = report.manifest.records(), look.volumes
    assert found.shape_CDHW == (record.channels, *record.shape_DHW)
    assert found.spacing_mm == pytest.approx(record.spacing_mm)
    assert found.modality == record.modality
    assert (look.refused, look.problem) == ((), "")


def test_no_voxel_is_read(tmp_path: Path) -> None:
    """Files that hold nothing behind their headers look whole; the ingest refuses them."""
    src = folder(tmp_path / "src", labelled=False)
    for path in sorted(src.rglob("*.nii.gz")):
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:352]))
    look = preview(str(src))
    assert (len(look.volumes), look.refused) == (4, ())
    with pytest.raises(RefusedInput):
        run(str(src), (tmp_path / "store").as_uri())


@pytest.mark.parametrize("shift_mm", [0.0, 0.9], ids=["straight", "tilted"])
def test_no_pixel_of_a_series_is_read(shift_mm: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dicom(tmp_path / "src" / "s", slices(phantom(), shift_mm=shift_mm))
    report = run(str(tmp_path / "src"), (tmp_path / "store").as_uri(), ALONE, pseudonyms=Pseudonyms(b"s" * 16))

    def read(*_: object) -> None:
        raise AssertionError("pixels")

    monkeypatch.setattr(reader, "read_values", read)
    (volume,), (record,) = preview(str(tmp_path / "src"), ALONE).volumes, report.manifest.records()
    assert volume.shape_CDHW[1:] == record.shape_DHW


def test_refusals_and_their_reasons_are_those_of_the_ingest(tmp_path: Path) -> None:
    src = tmp_path / "src"
    folder(src, 8)
    images, labels = src / "images", src / "labels"
    save_nifti(images / "series.nii.gz", np.stack([phantom(), phantom(seed=1)]))
    save_nifti(images / "flat.nii.gz", phantom((1, 12, 14)))
    sheared = np.eye(4)
    sheared[0, 1] = 0.4
    save_nifti(images / "sheared.nii.gz", phantom(), sheared)
    save_nifti(labels / "case_00.nii.gz", disc((9, 12, 14)))
    save_nifti(labels / "case_01.nii.gz", disc(), np.diag([1.0, 1, 1.5, 1]))
    (images / "torn.nii.gz").write_bytes(b"\x1f\x8b")
    (images / "text.nii").write_text("no volume")
    policy = IngestPolicy(max_failed=1)
    look = preview(str(src), policy)
    report = run(str(src), (tmp_path / "store").as_uri(), policy)
    assert [(q.source, q.reason) for q in look.refused] == [(q.source, q.reason) for q in report.quarantined]
    assert len(look.refused) == 7
    assert {v.item.source for v in look.volumes} == {record.source for record in report.manifest.records()}


def test_the_splits_are_those_of_the_ingest(tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 12)
    report = run(str(src), (tmp_path / "store").as_uri())
    subjects = {record.subject: record.split for record in report.manifest.records()}
    assert preview(str(src)).splits == dict(Counter(subjects.values()))


def test_pseudonyms_split_patients_and_are_asked_for(tmp_path: Path) -> None:
    for number in range(6):
        series = slices(phantom(seed=number), patient=f"P{number}")
        save_dicom(tmp_path / "src" / f"s{number}", series)
    salt = Pseudonyms(b"salt of the user")
    report = run(str(tmp_path / "src"), (tmp_path / "store").as_uri(), pseudonyms=salt)
    assert preview(str(tmp_path / "src")).splits is None
    look = preview(str(tmp_path / "src"), pseudonyms=salt)
    assert look.splits == dict(Counter(record.split for record in report.manifest.records()))


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        (IngestPolicy(), "at least 2 subjects"),
        (IngestPolicy(read=ReadPolicy(max_voxels=10)), "more than max_failed"),
    ],
)
def test_what_nothing_would_be_published_for_is_said(policy: IngestPolicy, problem: str, tmp_path: Path) -> None:
    src = folder(tmp_path / "src", 1)
    assert problem in preview(str(src), policy).problem
    with pytest.raises(RefusedInput):
        run(str(src), (tmp_path / "store").as_uri(), policy)


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    save_dicom(tmp_path / "src" / "s", slices(phantom()))
    before = sorted(tmp_path.rglob("*"))
    preview(str(tmp_path / "src"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        preview(str(tmp_path / "none"))
