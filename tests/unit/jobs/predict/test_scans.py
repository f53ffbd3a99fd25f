"""Every kind of input gives the mask that its voxels give, on its own grid."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from jobs.cli.main import main
from ssl_core.portable import Predictor
from storage.ingest.readers.read import read_any
from tests.kit import ROOT
from tests.kit.phantoms import write_phantoms
from tests.kit.scans import save_dicom, slices
from tests.kit.small_models import encoder_bundle, segmenter_bundle

SHAPE = (14, 18, 20)  # (k, j, i)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmenter_bundle(tmp_path_factory.mktemp("b") / "bundle")


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> Predictor:
    return Predictor(bundle, "cpu", lambda _note: None)


def _values(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 100.0, SHAPE).astype(np.int16)


def _expected(predictor: Predictor, path: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = read_any(str(path))
    return predictor.predict(np.ascontiguousarray(raw.array_CDHW[0].T), raw.affine), raw.affine


def _image(seed: int = 0) -> Any:
    image = SimpleITK.GetImageFromArray(_values(seed))
    image.SetSpacing((0.9, 1.1, 2.0))
    image.SetOrigin((3.0, -4.0, 5.0))
    image.SetDirection((0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    return image


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nrrd", "scan.mha"])
def test_a_file_of_each_format_gives_its_mask(
    name: str, bundle: Path, predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SimpleITK.WriteImage(_image(), str(tmp_path / name))
    target = tmp_path / "mask.nii.gz"
    assert main(["predict", str(bundle), str(tmp_path / name), str(target), "--probabilities", "--overlay"]) == 0
    assert f"predict: {SHAPE[0]}/{SHAPE[0]} slices" in capsys.readouterr().err
    expected, affine = _expected(predictor, tmp_path / name)
    assert len(np.unique(expected)) == 3
    image = nib.load(target)
    assert np.array_equal(np.asanyarray(image.dataobj), expected)
    assert np.allclose(image.affine, affine)
    maps = nib.load(tmp_path / "mask-probabilities.nii.gz")
    probabilities = np.asanyarray(maps.dataobj)
    assert np.array_equal(np.array([0, 1, 7])[probabilities.argmax(-1)], expected)
    assert np.allclose(probabilities.sum(-1), 1, atol=1e-5)
    assert np.allclose(maps.affine, affine)
    assert (tmp_path / "mask-overlay.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def _folder(path: Path, count: int) -> Path:
    path.mkdir()
    for number in range(count):
        SimpleITK.WriteImage(_image(number), str(path / f"s{number:02d}{'.nrrd' if number % 2 else '.nii.gz'}"))
    return path


def test_a_folder_gives_a_mask_a_scan_and_goes_on(
    bundle: Path, predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, masks = _folder(tmp_path / "scans", 3), tmp_path / "masks"
    (scans / "s09.nii.gz").write_bytes(b"no volume")
    assert main(["predict", str(bundle), str(scans), str(masks)]) == 3
    assert "3 of 4 scans" in capsys.readouterr().err
    assert sorted(p.name for p in masks.iterdir()) == ["model.json", *(f"s{n:02d}.nii.gz" for n in range(3))]
    for path in (scans / "s00.nii.gz", scans / "s01.nrrd"):
        mask = np.asanyarray(nib.load(masks / f"{path.name[:3]}.nii.gz").dataobj)
        assert np.array_equal(mask, _expected(predictor, path)[0])
    (masks / "s00.nii.gz").write_bytes(b"drawn over")
    (masks / "s01.nii.gz").unlink()
    (scans / "s09.nii.gz").unlink()
    assert main(["predict", str(bundle), str(scans), str(masks)]) == 0
    assert (masks / "s00.nii.gz").read_bytes() == b"drawn over"
    assert (masks / "s01.nii.gz").exists()
    other = segmenter_bundle(tmp_path / "other", 5)
    assert main(["predict", str(other), str(scans), str(masks)]) == 2
    assert "replace them with `--overwrite`" in capsys.readouterr().err
    assert main(["predict", str(bundle), str(scans), str(scans)]) == 2
    assert main(["predict", str(bundle), str(scans), str(tmp_path / "one.nii.gz")]) == 2
    assert "a folder for the 3 scans" in capsys.readouterr().err


def test_a_store_gives_a_mask_a_volume(bundle: Path, predictor: Predictor, tmp_path: Path) -> None:
    store = write_phantoms(tmp_path.joinpath("store").as_uri(), 2, shape=(16, 18, 20))
    masks = tmp_path / "masks"
    assert main(["predict", str(bundle), tmp_path.joinpath("store").as_uri(), str(masks)]) == 0
    record = store.record(0)
    mask = nib.load(masks / f"{record.volume_id.replace('/', '__')}.nii.gz")
    from storage.reading.volume_store import VolumeStore

    with VolumeStore(tmp_path.joinpath("store").as_uri()) as volumes:
        values = volumes.read_volume(record.volume_id) * record.scale + record.offset
    affine = np.array(record.affine).reshape(4, 4)
    expected = predictor.segment(values, affine, record.stats)
    assert np.array_equal(np.asanyarray(mask.dataobj).transpose(2, 1, 0), expected)
    assert np.allclose(mask.affine, affine)


def test_an_encoder_gives_features_and_no_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, scans = encoder_bundle(tmp_path / "encoder"), _folder(tmp_path / "scans", 2)
    assert main(["predict", str(encoder), str(scans), str(tmp_path / "out")]) == 2
    assert "take its features" in capsys.readouterr().err
    assert main(["predict", str(encoder), str(scans), str(tmp_path / "out"), "--features"]) == 0
    raw = read_any(str(scans / "s01.nrrd"))
    expected = Predictor(encoder, "cpu", lambda _note: None).features(
        np.ascontiguousarray(raw.array_CDHW[0].T), raw.affine
    )
    with np.load(tmp_path / "out/s01.npz") as written:
        assert np.array_equal(written["features_EDHW"], expected)
        assert written["stride_DHW"].tolist() == [4, 4, 4]


def _series(modality: str = "MR") -> list[Any]:
    datasets = slices(_values(), modality=modality, intercept=0, SeriesNumber=4)
    for dataset in datasets:
        dataset.PatientName, dataset.PatientBirthDate, dataset.PatientSex = "A^B", "19700101", "O"
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID, dataset.AccessionNumber = "20200101", "120000", "1", "2"
        dataset.ReferringPhysicianName, dataset.FrameOfReferenceUID = "", "1.2.3.4"
        dataset.SliceThickness = 2.0
    return datasets


def test_a_dicom_series_gives_a_segmentation_that_refers_to_it(
    bundle: Path, predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("highdicom", reason="highdicom is not installed: pip install 'tomoscale[dicom]'")
    import pydicom

    from storage.ingest.readers.dicom.seg import read_segmentation, segment_labels

    datasets = _series()
    series = save_dicom(tmp_path / "series", datasets[::-1])
    target = tmp_path / "mask.dcm"
    assert main(["predict", str(bundle), str(series), str(target)]) == 0
    expected, _ = _expected(predictor, series)
    raw = read_any(str(series))
    numbers = read_segmentation(str(target), raw).array_CDHW[0]
    assert np.array_equal(np.array([0, 1, 7])[numbers].transpose(2, 1, 0), expected)
    assert segment_labels(str(target), str(series / "IM0000"))[0] == {1: "front", 2: "back"}
    dataset = pydicom.dcmread(target)
    first = datasets[0]
    assert dataset.Modality == "SEG"
    assert dataset.StudyInstanceUID == first.StudyInstanceUID
    assert dataset.FrameOfReferenceUID == first.FrameOfReferenceUID
    assert (dataset.PatientID, dataset.SeriesNumber) == (first.PatientID, 9004)
    assert dataset.SeriesInstanceUID != first.SeriesInstanceUID
    (referenced,) = dataset.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == first.SeriesInstanceUID
    images = {image.ReferencedSOPInstanceUID for image in referenced.ReferencedInstanceSequence}
    assert images == {one.SOPInstanceUID for one in datasets}
    assert dataset.SegmentSequence[0].SegmentAlgorithmType == "AUTOMATIC"
    # In a folder a series becomes a segmentation, or NIfTI where that is asked for.
    folder = tmp_path / "scans"
    folder.mkdir()
    series.rename(folder / "series")
    assert main(["predict", str(bundle), str(folder), str(tmp_path / "out")]) == 0
    (again,) = (tmp_path / "out").glob("*.dcm")
    assert np.array_equal(read_segmentation(str(again), raw).array_CDHW[0], numbers)
    assert main(["predict", str(bundle), str(folder), str(tmp_path / "nifti"), "--nifti"]) == 0
    (mask,) = (tmp_path / "nifti").glob("*.nii.gz")
    assert np.array_equal(np.asanyarray(nib.load(mask).dataobj), expected)


def test_a_mask_of_one_label_and_an_empty_one_are_segmentations_too(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="highdicom is not installed: pip install 'tomoscale[dicom]'")
    from jobs.predict.dicom_seg import write_segmentation
    from storage.ingest.readers.dicom.seg import read_segmentation

    series = save_dicom(tmp_path / "series", _series())
    raw = read_any(str(series))
    files = [str(path) for path in series.iterdir()]
    empty = np.zeros(SHAPE, np.uint8)
    ball = empty.copy()
    ball[3:9, 4:11, 5:8] = 1
    for mask in (empty, ball):
        write_segmentation(tmp_path / "mask.dcm", mask, raw.affine, files, [(1, "front")], model="tiny")
        assert np.array_equal(read_segmentation(str(tmp_path / "mask.dcm"), raw).array_CDHW[0], mask)


def test_a_segmentation_says_which_package_it_needs(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    series = save_dicom(tmp_path / "series", _series())
    monkeypatch.setitem(sys.modules, "highdicom", None)
    for output in ("mask.dcm", "masks"):
        assert main(["predict", str(bundle), str(series), str(tmp_path / output)]) == 2
        assert "pip install 'tomoscale[dicom]'" in capsys.readouterr().err
    assert main(["predict", str(bundle), str(series), str(tmp_path / "mask.nii.gz")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mask.nii.gz", "series"]


def test_a_command_that_was_killed_leaves_no_half_mask_and_goes_on(
    bundle: Path, predictor: Predictor, tmp_path: Path
) -> None:
    scans, masks = _folder(tmp_path / "scans", 12), tmp_path / "masks"
    command = [sys.executable, "-m", "jobs.cli.main", "predict", str(bundle), str(scans), str(masks), "--probabilities"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(list(masks.glob("s*[0-9].nii.gz"))) < 2 and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    written = {path.name: path.stat().st_mtime_ns for path in masks.glob("s*[0-9].nii.gz")}
    assert 2 <= len(written) < 12
    for name in written:
        stem = name.removesuffix(".nii.gz")
        (source,) = scans.glob(f"{stem}.*")
        assert np.array_equal(np.asanyarray(nib.load(masks / name).dataobj), _expected(predictor, source)[0])
        assert nib.load(masks / f"{stem}-probabilities.nii.gz").shape == (*SHAPE[::-1], 3)
    assert main(["predict", str(bundle), str(scans), str(masks), "--probabilities"]) == 0
    assert len(list(masks.glob("s*[0-9].nii.gz"))) == 12
    assert list(masks.glob(".*")) == []
    assert {name: (masks / name).stat().st_mtime_ns for name in written} == written, "done once"
    assert json.loads((masks / "model.json").read_text())["model"] == str(bundle)
