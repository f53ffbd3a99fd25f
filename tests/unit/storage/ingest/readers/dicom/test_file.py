"""DICOM files as archives and exports write them: compressed, without headers, with rounded positions."""

import gzip
import logging

import numpy as np
import pydicom
import pydicom.data
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

from storage.errors import RefusedInput
from storage.ingest.discover import discover
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import prepare
from storage.ingest.readers.dicom.file import read_header
from storage.ingest.readers.raw import ReadPolicy
from storage.ingest.readers.read import read_any, read_item
from tests.kit.dicom_files import compressed, read, refusal
from tests.kit.scans import disc, phantom, save_dicom, segmentation, slices

ARRAY = phantom((8, 12, 10)) + np.int16(1000)


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_losslessly_compressed_slices_are_read_whole(tmp_path, compressor):
    values = ARRAY - np.int16(1500)
    assert values.min() < 0
    paths = compressed(tmp_path / "a", values, compressor)
    assert pydicom.dcmread(paths[0]).file_meta.TransferSyntaxUID.is_compressed
    np.testing.assert_array_equal(read_any(str(tmp_path / "a")).array_CDHW[0], values)
    for path in paths:  # GDCM would apply a slope by rules of its own
        ds = pydicom.dcmread(path)
        ds.RescaleSlope, ds.RescaleIntercept = "2", "-100"
        ds.save_as(path)
    np.testing.assert_array_equal(read_any(str(tmp_path / "a")).array_CDHW[0], values.astype(np.int32) * 2 - 100)
    paths[3].write_bytes(paths[3].read_bytes()[:-60])
    with pytest.raises(RefusedInput, match="file 4 of the series"):
        read_any(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("name", "syntax"),
    [
        ("MR_small_jpeg_ls_lossless.dcm", JPEGLSLossless),
        ("MR_small_jp2klossless.dcm", JPEG2000Lossless),
        ("MR_small_RLE.dcm", RLELossless),
    ],
)
def test_slices_that_other_programs_compressed_have_the_voxels_of_the_plain_file(tmp_path, name, syntax):
    """One image of pydicom's package, which holds it plain and as others compressed it."""
    plain, path = (str(pydicom.data.get_testdata_file(n, download=False)) for n in ("MR_small.dcm", name))
    datasets = [pydicom.dcmread(path) for _ in range(3)]
    for k, ds in enumerate(datasets):
        assert ds.file_meta.TransferSyntaxUID == syntax
        ds.ImagePositionPatient = [0, 0, 2 * k]
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    raw = read(tmp_path, datasets)
    values = np.frombuffer(pydicom.dcmread(plain).PixelData, "<i2").reshape(datasets[0].Rows, datasets[0].Columns)
    assert len(np.unique(values)) > 100
    np.testing.assert_array_equal(raw.array_CDHW[0], np.stack([values] * 3))


def test_run_length_coded_slices_are_read_whole(tmp_path):
    datasets = slices(ARRAY, intercept=0)
    for ds in datasets:
        ds.compress(RLELossless, generate_instance_uid=False)
    np.testing.assert_array_equal(read(tmp_path, datasets).array_CDHW[0], ARRAY)


def test_files_without_preamble_and_meta_header_are_read(tmp_path):
    for name, implicit in (("implicit", True), ("explicit", False)):
        (tmp_path / name).mkdir()
        for k, ds in enumerate(slices(ARRAY, intercept=0)):
            del ds.file_meta
            path = tmp_path / name / f"{k}.dcm"
            pydicom.dcmwrite(path, ds, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        np.testing.assert_array_equal(read_any(str(tmp_path / name)).array_CDHW[0], ARRAY)


@pytest.mark.parametrize("keyword", ["PhotometricInterpretation", "SamplesPerPixel", "BitsStored", "HighBit"])
def test_files_that_leave_out_what_has_one_usual_value_are_read(tmp_path, keyword):
    datasets = slices(ARRAY, intercept=0)
    for ds in datasets:
        delattr(ds, keyword)
    np.testing.assert_array_equal(read(tmp_path, datasets).array_CDHW[0], ARRAY)


def test_files_without_a_series_id_are_a_series_of_their_folder(tmp_path):
    for name, number in (("a", 1), ("a", 2), ("b", 1)):
        datasets = slices(ARRAY + number, intercept=0, SeriesNumber=number)
        for ds in datasets:
            ds.StudyInstanceUID = "1.2.3"
            del ds.SeriesInstanceUID
        save_dicom(tmp_path / name, datasets, [f"{number}_{k}.dcm" for k in range(8)])
    discovery = discover(tmp_path)
    assert discovery.orphans == ()
    assert len({item.name for item in discovery.items}) == len({item.series for item in discovery.items}) == 3
    raws = [read_item(item, ReadPolicy()) for item in discovery.items]
    assert all(raw.array_CDHW.shape == (1, *ARRAY.shape) for raw in raws)
    assert all("without a series id" in raw.notes[0] for raw in raws)


def test_gzipped_files_are_read(tmp_path):
    save_dicom(tmp_path, slices(ARRAY, intercept=0))
    for path in sorted(tmp_path.iterdir()):
        (tmp_path / f"{path.name}.dcm.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(read_any(str(tmp_path)).array_CDHW[0], ARRAY)
    first = min(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:-30])
    with pytest.raises(RefusedInput):
        read_any(str(tmp_path))


@pytest.mark.parametrize(("gap", "places"), [(0.625, 2), (1.25, 1), (0.75, 1), (3.33, 1), (2.5, 0)])
@pytest.mark.parametrize("policy", [ReadPolicy(), ReadPolicy(gaps="resample")])
@pytest.mark.parametrize("start", [0.0, -117.4])
def test_rounded_positions_are_an_even_grid(tmp_path, gap, places, policy, start):
    """Resampling them would make another number of slices."""
    start = round(start, places)
    raw = read(tmp_path, slices(ARRAY, [round(start + gap * k, places) for k in range(8)], intercept=0), policy)
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY)
    assert raw.array_CDHW.dtype == np.int16
    assert raw.affine[2, 2] == pytest.approx(gap, abs=1e-9)
    assert raw.affine[2, 3] == pytest.approx(start, abs=1e-9)
    assert "are written with" in raw.notes[0]


def test_rounded_positions_in_a_tilted_plane_are_an_even_grid(tmp_path):
    turn = np.radians(23)
    row, column = np.array([1.0, 0, 0]), np.array([0, np.cos(turn), np.sin(turn)])
    normal = np.cross(row, column)
    datasets = slices(ARRAY, intercept=0)
    for k, ds in enumerate(datasets):
        ds.ImageOrientationPatient = [f"{x:.6f}" for x in (*row, *column)]
        ds.ImagePositionPatient = [f"{x:.2f}" for x in np.array([-20.1, -30.2, 5.3]) + 0.9 * k * normal]
    raw = read(tmp_path, datasets)
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY)
    assert np.linalg.norm(raw.affine[:3, 2]) == pytest.approx(0.9, abs=2e-3)


def test_rounding_hides_no_missing_slice(tmp_path):
    places = [round(0.75 * k, 1) for k in range(9)]
    del places[4]
    datasets = slices(ARRAY, places, intercept=0)
    assert "1 slices missing" in refusal(tmp_path, datasets).found
    raw = read_any(str(tmp_path), ReadPolicy(gaps="resample"))
    np.testing.assert_array_equal(np.delete(raw.array_CDHW[0], 4, axis=0), ARRAY)
    assert raw.affine[2, 2] == pytest.approx(0.75)
    wrong = [0, 3, 6, 10, 14, 18, 22, 26]  # of whole numbers, but no rounding makes them even
    assert "gaps from 3 to 4" in refusal(tmp_path / "b", slices(ARRAY, wrong)).found


def test_warnings_that_quote_headers_reach_neither_console_nor_log(tmp_path, capfd, caplog, recwarn):
    """The library quotes UIDs and names."""
    datasets = slices(ARRAY)
    for ds in datasets:
        ds.add_new("FrameOfReferenceUID", "UI", "1.2.Doe.99")
        ds.add_new("ReferringPhysicianName", "PN", "Doe" * 40)
        ds.add_new("StudyDate", "DA", "Doe's day")
        ds.add_new("PatientAge", "AS", "Doe")
        ds.add_new("SpecificCharacterSet", "CS", "DOE")
    recwarn.clear()
    save_dicom(tmp_path, datasets)
    save_dicom(tmp_path / "seg", [segmentation(datasets, disc(ARRAY.shape))])
    quoted = [str(w.message) for w in recwarn.list]
    recwarn.clear()
    capfd.readouterr()
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        for item in discover(tmp_path).items:
            prepare(item, IngestPolicy())
        str(read_header(str(tmp_path / "IM0000")))
    assert any("Doe" in text or "DOE" in text for text in quoted)  # the test can fail
    assert [str(w.message) for w in recwarn.list] == []
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_a_malformed_value_of_no_concern_refuses_nothing(tmp_path):
    datasets = slices(ARRAY, intercept=0, EchoTime="4.6000")
    save_dicom(tmp_path, datasets)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"4.6000", b"4.6Doe"))
    np.testing.assert_array_equal(read_any(str(tmp_path)).array_CDHW[0], ARRAY)


def test_a_refusal_says_which_series_it_is_and_names_nobody(tmp_path):
    datasets = slices(ARRAY, SeriesNumber=7, PatientName="Doe^Jane", SeriesDescription="Doe", patient="MRN-1")
    del datasets[3]
    text = str(refusal(tmp_path, datasets))
    assert text.endswith("series: number 7 CT 12x10 pixels of 1.50x0.75 mm in 7 files")
    for secret in ("Doe", "MRN", datasets[0].SeriesInstanceUID):
        assert secret not in text
    for ds in datasets:
        ds.SeriesNumber, ds.Modality = "20240517", "DOE"
    text = str(refusal(tmp_path / "b", datasets))
    assert "20240517" not in text
    assert "DOE" not in text


def test_objects_without_pixels_are_not_called_damaged(tmp_path):
    datasets = slices(ARRAY)
    for name, kind in (("raw", "1.2.840.10008.5.1.4.1.1.66"), ("state", "1.2.840.10008.5.1.4.1.1.11.1")):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = kind
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.SeriesInstanceUID = datasets[0].SeriesInstanceUID
        save_dicom(tmp_path, [ds], [f"{name}.dcm"])
    save_dicom(tmp_path, datasets)
    discovery = discover(tmp_path)
    assert [orphan.what for orphan in discovery.orphans] == [
        "Raw Data: no image, and left out",
        "Grayscale Softcopy Presentation State: no image, and left out",
    ]
    assert read_any(str(tmp_path)).array_CDHW.shape == (1, *ARRAY.shape)


def test_secondary_captures_are_not_called_damaged(tmp_path):
    datasets = slices(ARRAY)
    for ds in datasets:
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
        del ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing
    found = refusal(tmp_path, datasets)
    assert "secondary captures" in found.found
    assert "damaged" not in str(found)


def test_frames_of_a_compressed_object_are_read(tmp_path):
    paths = compressed(tmp_path / "a", ARRAY, "JPEG")
    flat = [pydicom.dcmread(path) for path in paths]
    ds = flat[0]
    ds.PixelData = pydicom.encaps.encapsulate(
        [next(pydicom.encaps.generate_frames(d.PixelData, number_of_frames=1)) for d in flat]
    )
    ds.NumberOfFrames = len(flat)
    frames = []
    for one in flat:
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = one.ImagePositionPatient
        frame.PlanePositionSequence = DicomSequence([position])
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    del ds.ImagePositionPatient
    (tmp_path / "b").mkdir()
    ds.save_as(tmp_path / "b" / "one.dcm")
    np.testing.assert_array_equal(read_any(str(tmp_path / "b")).array_CDHW[0], ARRAY)
