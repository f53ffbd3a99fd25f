"""DICOM series: ordered by position, in Hounsfield units, corrected or refused, never stacked blindly."""

import os
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.discover import discover
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import prepare
from storage.ingest.readers.dicom import reader
from storage.ingest.readers.raw import ReadPolicy
from storage.ingest.readers.read import read_any, read_item
from tests.kit.dicom_files import framed, read, refusal
from tests.kit.scans import disc, phantom, save_dicom, segmentation, slices

ARRAY = phantom((8, 12, 10)) + np.int16(1000)


def test_slices_are_ordered_by_position_and_rescaled(tmp_path):
    datasets = slices(ARRAY, slope=1, intercept=-1024)
    for k, ds in enumerate(datasets):
        ds.InstanceNumber = (k * 5) % 8  # says nothing about place
    shuffled = [datasets[k] for k in (3, 0, 7, 1, 6, 2, 5, 4)]
    raw = read(tmp_path, shuffled)
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY - 1024)
    assert raw.array_CDHW.dtype == np.int16
    assert raw.modality == "CT"
    assert raw.notes == []
    expected = np.diag([-0.75, -1.5, 2, 1.0])
    expected[:3, 3] = (20, 30, 0)
    np.testing.assert_allclose(raw.affine, expected)
    canonical, affine = geometry.canonicalise(raw.array_CDHW, raw.affine)
    np.testing.assert_array_equal(canonical[0], (ARRAY - 1024)[:, ::-1, ::-1])
    assert geometry.spacing_dhw(affine) == (2.0, 1.5, 0.75)


def test_fractional_slopes_are_float(tmp_path):
    raw = read(tmp_path, slices(ARRAY, slope=0.5, intercept=0.25, modality="MR"))
    np.testing.assert_allclose(raw.array_CDHW[0], ARRAY * 0.5 + 0.25)
    assert raw.array_CDHW.dtype == np.float32


def test_fractions_stored_as_such_are_not_cut_off(tmp_path):
    """Float pixel data have no slope, and 0.7 is not 0."""
    datasets = slices(ARRAY, slope=1, intercept=0, modality="MR")
    for ds, plane in zip(datasets, ARRAY, strict=True):
        del ds.PixelData
        ds.FloatPixelData = (plane / np.float32(7)).astype("<f4").tobytes()
        ds.BitsAllocated = 32
        for keyword in ("BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"):
            if keyword in ds:
                delattr(ds, keyword)
    raw = read(tmp_path, datasets)
    np.testing.assert_allclose(raw.array_CDHW[0], ARRAY / 7, rtol=1e-6)


def test_large_rescaled_values_do_not_wrap(tmp_path):
    raw = read(tmp_path, slices(ARRAY, slope=32000, intercept=2e9, modality="MR"))
    np.testing.assert_allclose(raw.array_CDHW[0], ARRAY * 32000.0 + 2e9, rtol=1e-6)


def test_slices_that_run_downwards_are_turned(tmp_path):
    datasets = slices(ARRAY, positions_mm=[-2.0 * k for k in range(8)])
    raw = read(tmp_path, datasets)
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY[::-1] - 1024)
    assert raw.affine[2, 3] == -14


def test_a_missing_slice_is_refused_or_interpolated_with_a_note(tmp_path):
    datasets = slices(ARRAY)
    del datasets[4]
    assert "1 slices missing" in refusal(tmp_path / "a", datasets).found
    raw = read(tmp_path / "b", datasets, ReadPolicy(gaps="resample"))
    assert raw.array_CDHW.shape == (1, 8, 12, 10)
    np.testing.assert_allclose(raw.array_CDHW[0, 4], (ARRAY[3] / 2 + ARRAY[5] / 2) - 1024, atol=1e-3)
    np.testing.assert_allclose(raw.array_CDHW[0, 6], ARRAY[6] - 1024, atol=1e-3)
    assert "1 slices missing: interpolated" in raw.notes[0]


def test_uneven_gaps_are_refused_or_interpolated_but_not_too_far(tmp_path):
    datasets = slices(ARRAY, positions_mm=[0, 2, 4, 6, 8, 11.5, 15, 30])
    error = refusal(tmp_path / "a", datasets)
    assert error.found == "gaps from 2 to 15 mm"
    assert "resample" in error.remedy
    far = refusal(tmp_path / "b", datasets, ReadPolicy(gaps="resample"))
    assert "max_gap_mm" in far.remedy
    raw = read(tmp_path / "c", datasets[:-1], ReadPolicy(gaps="resample"))
    steps = np.linalg.norm(raw.affine[:3, 2])
    assert steps * (raw.array_CDHW.shape[1] - 1) == pytest.approx(15)


def test_a_tilted_gantry_is_straightened_or_refused(tmp_path):
    # a rod along the patient's axis: tilted slices see it drift, the corrected volume has it upright again
    array = np.zeros((9, 40, 12), np.int16)
    for k in range(9):
        array[k, 25 - k, 4:8] = 1000
    datasets = slices(array, spacing=(1.0, 1.0), intercept=0, shift_mm=1.0)
    assert "gantry tilt of 26.6 degrees" in refusal(tmp_path / "a", datasets, ReadPolicy(tilt="refuse")).found
    raw = read(tmp_path / "b", datasets)
    assert "gantry tilt of 26.6 degrees corrected" in raw.notes[0]
    assert geometry.shear(raw.affine) < 1e-6
    canonical, affine = geometry.canonicalise(raw.array_CDHW, raw.affine)
    rows = [int(np.argmax(plane.sum(axis=1))) for plane in canonical[0]]
    assert len(set(rows)) == 1
    y = (affine @ [0, rows[0], 0, 1])[1]
    assert y == pytest.approx(30 - 25, abs=0.51)


def test_duplicated_slices_are_dropped_with_a_note(tmp_path):
    datasets = slices(ARRAY)
    again = slices(ARRAY, series=datasets[0].SeriesInstanceUID)[2:4]
    raw = read(tmp_path, [*datasets, *again])
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY - 1024)
    assert raw.notes == ["2 slices were there twice; one of each kept"]


def test_two_images_at_each_place_are_a_series_in_time(tmp_path):
    first = slices(ARRAY, AcquisitionNumber=1)
    second = slices(ARRAY + 7, series=first[0].SeriesInstanceUID, AcquisitionNumber=2)
    both = [*second, *first]
    assert "several acquisitions" in refusal(tmp_path / "a", both).found
    raw = read(tmp_path / "b", both, ReadPolicy(four_d="first"))
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY - 1024)
    raw = read(tmp_path / "c", both, ReadPolicy(four_d="channels"))
    np.testing.assert_array_equal(raw.array_CDHW, np.stack([ARRAY, ARRAY + 7]) - 1024)
    assert "different" in refusal(tmp_path / "d", both[:-1], ReadPolicy(four_d="channels")).found


def test_a_localiser_among_the_slices_is_refused(tmp_path):
    datasets = slices(ARRAY)
    datasets[0].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    assert "1 of 8 slices unlike most" in refusal(tmp_path / "a", datasets).found
    datasets = slices(ARRAY)
    datasets[2].PixelSpacing = [3, 3]
    assert "2 kinds" in refusal(tmp_path / "b", datasets).found


def test_moved_slices_single_slices_and_missing_positions_are_refused(tmp_path):
    datasets = slices(ARRAY)
    datasets[5].ImagePositionPatient = [-15, -30, 10]
    assert "beside" in refusal(tmp_path / "a", datasets).found
    assert "one" in refusal(tmp_path / "b", slices(ARRAY)[:1]).found
    datasets = slices(ARRAY)
    del datasets[1].ImagePositionPatient
    assert "file 2 of the series" in refusal(tmp_path / "c", datasets).found


def test_truncated_pixels_are_refused(tmp_path):
    datasets = slices(ARRAY)
    save_dicom(tmp_path, datasets)
    path = tmp_path / "IM0003"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RefusedInput):
        read_any(str(tmp_path))


def test_burned_in_text_is_noted(tmp_path):
    raw = read(tmp_path, slices(ARRAY, BurnedInAnnotation="YES"))
    assert "identifying text" in raw.notes[0]


def test_multi_frame_objects(tmp_path):
    flat = slices(ARRAY)
    ds = flat[0]
    frames = []
    for one in flat:
        frame, position, transform = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = one.ImagePositionPatient
        transform.RescaleSlope, transform.RescaleIntercept = 2, -1000
        frame.PlanePositionSequence = DicomSequence([position])
        frame.PixelValueTransformationSequence = DicomSequence([transform])
        frames.append(frame)
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = ds.ImageOrientationPatient
    measures.PixelSpacing = ds.PixelSpacing
    shared.PlaneOrientationSequence = DicomSequence([orientation])
    shared.PixelMeasuresSequence = DicomSequence([measures])
    ds.SharedFunctionalGroupsSequence = DicomSequence([shared])
    ds.PerFrameFunctionalGroupsSequence = DicomSequence(frames[::-1])
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(ds, keyword)
    ds.NumberOfFrames = 8
    ds.PixelData = ARRAY[::-1].astype("<u2").tobytes()
    raw = read(tmp_path, [ds])
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY.astype(np.int32) * 2 - 1000)


def test_objects_of_one_frame_each_are_a_series_too(tmp_path):
    flat = slices(ARRAY, intercept=0)
    raw = read(tmp_path, [framed([ds]) for ds in flat])
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY)


def test_frames_at_one_place_are_told_apart_whatever_the_last_digits_of_the_place(tmp_path):
    """Else two times would be mixed within a channel."""
    later = ARRAY + np.int16(500)
    jitter = np.random.default_rng(1).normal(0, 1e-4, 16).round(6)
    flat = slices(ARRAY, [round(2 * k + jitter[k], 6) for k in range(8)], intercept=0)
    flat += slices(later, [round(2 * k + jitter[8 + k], 6) for k in range(8)], intercept=0)
    assert 0 < sum(jitter[:8] > jitter[8:]) < 8
    ds = framed(flat)
    assert "nothing tells apart" in refusal(tmp_path / "a", [ds], ReadPolicy(four_d="channels")).found
    for k, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
        content = Dataset()
        content.TemporalPositionIndex = 1 + k // 8
        frame.FrameContentSequence = DicomSequence([content])
    raw = read(tmp_path / "b", [ds], ReadPolicy(four_d="channels"))
    np.testing.assert_array_equal(raw.array_CDHW, np.stack([ARRAY, later]))


def test_every_frame_has_a_position(tmp_path):
    """Else those without one would be left out."""
    ds = framed(slices(ARRAY))
    ds.PerFrameFunctionalGroupsSequence = ds.PerFrameFunctionalGroupsSequence[:6]
    assert "6 for 8 frames" in refusal(tmp_path, [ds]).found


@pytest.mark.parametrize(
    ("tag", "value"), [("ImagePositionPatient", ["-20", "-30", "nan"]), ("PixelSpacing", ["-1.5", "0.75"])]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_places_that_are_none_are_refused(tmp_path, tag, value):
    datasets = slices(ARRAY)
    for ds in datasets if tag == "PixelSpacing" else datasets[3:4]:
        setattr(ds, tag, value)
    assert "without one of them" in refusal(tmp_path, datasets).found


def test_stacks_that_lie_side_by_side_are_no_channels(tmp_path):
    left = slices(ARRAY)
    right = slices(ARRAY + 7, series=left[0].SeriesInstanceUID)
    for ds in right:
        ds.ImagePositionPatient = [10, *ds.ImagePositionPatient[1:]]
    assert "30.00 mm beside" in refusal(tmp_path, [*left, *right], ReadPolicy(four_d="channels")).found


def test_series_of_several_patients_are_refused(tmp_path):
    """A careless anonymiser gives one series id to all, and their slices would be sorted into one another."""
    datasets = slices(ARRAY[:4])
    datasets += slices(ARRAY[4:], [8, 10, 12, 14], patient="P2", series=datasets[0].SeriesInstanceUID)
    assert "2 patient ids" in refusal(tmp_path, datasets).found


def test_values_in_other_bits_are_not_misread(tmp_path):
    """The library takes the lowest bits wherever the header says that the values are."""
    datasets = slices(ARRAY % 4096, BitsStored=12, HighBit=15)
    for ds, plane in zip(datasets, ARRAY % 4096, strict=True):
        ds.PixelData = (plane.astype("<u2") << 4).tobytes()
    assert "number 15" in refusal(tmp_path / "a", datasets).found
    overlaid = slices(ARRAY % 4096, BitsStored=12, HighBit=11, intercept=0)
    for ds, plane in zip(overlaid, ARRAY % 4096, strict=True):
        ds.PixelData = (plane.astype("<u2") | (plane % 3 << 12).astype("<u2")).tobytes()
    np.testing.assert_array_equal(read(tmp_path / "b", overlaid).array_CDHW[0], ARRAY % 4096)


def test_numbers_of_colours_are_no_intensities(tmp_path):
    assert "colour" in refusal(tmp_path, slices(ARRAY, PhotometricInterpretation="PALETTE COLOR")).found


def test_directions_that_differ_by_rounding_are_one_direction(tmp_path):
    datasets = slices(ARRAY)
    for k, ds in enumerate(datasets):  # on both sides of where three decimals would be rounded
        ds.ImageOrientationPatient = ["1", ("0.000502", "0.000498")[k % 2], "0", "-0.0005", "1", "0"]
        ds.PixelSpacing = ["1.5", ("0.7500501", "0.7500499")[k % 2]]
    assert read(tmp_path, datasets).array_CDHW.shape == (1, *ARRAY.shape)


def test_a_look_up_table_is_not_passed_over(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.LUTData, table.ModalityLUTType = [4, 0, 16], bytes(8), "US"
    assert "look-up table" in str(refusal(tmp_path, slices(ARRAY, ModalityLUTSequence=DicomSequence([table]))))


def test_a_series_larger_than_a_task_may_take_is_refused_before_all_of_it_is_read(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(reader, "_slices", lambda *a, f=reader._slices: opened.append(a) or f(*a))
    error = refusal(tmp_path, slices(ARRAY), ReadPolicy(max_voxels=3 * 12 * 10))
    assert "at most 360 voxels" in str(error)
    assert len(opened) == 4


def test_a_segmentation_lies_on_its_series(tmp_path):
    datasets = slices(ARRAY)
    save_dicom(tmp_path / "ct", datasets)
    label = disc(ARRAY.shape)
    save_dicom(tmp_path / "seg", [segmentation(datasets, label)])
    item = discover(tmp_path).items[0]
    ready = prepare(item, IngestPolicy())
    assert ready.label_DHW is not None
    np.testing.assert_array_equal(ready.label_DHW, label[:, ::-1, ::-1])
    moved = slices(ARRAY, positions_mm=[2.0 * k + 0.7 for k in range(8)])
    wrong = segmentation(moved, label)
    wrong.ReferencedSeriesSequence[0].SeriesInstanceUID = datasets[0].SeriesInstanceUID
    save_dicom(tmp_path / "seg", [wrong])
    with pytest.raises(RefusedInput, match="pixel for pixel"):
        prepare(discover(tmp_path).items[0], IngestPolicy())
    coarser, measures = segmentation(datasets, label), Dataset()
    measures.PixelSpacing = [3, 1.5]
    coarser.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = DicomSequence([measures])
    save_dicom(tmp_path / "seg", [coarser])
    with pytest.raises(RefusedInput, match="pixel for pixel"):
        prepare(discover(tmp_path).items[0], IngestPolicy())


def test_the_dicom_of_the_formats_folder():
    data = os.environ.get("TOMOSCALE_DATASETS")
    root = Path(data or "") / "formats"
    if not data or not root.is_dir():
        pytest.skip("set TOMOSCALE_DATASETS to the folder that holds formats")
    with pytest.raises(RefusedInput, match=r"gaps from 1\.08 to 7 mm"):
        read_any(str(root / "dicom_ct_gantry_tilt"))
    raw = read_any(str(root / "dicom_ct_gantry_tilt"), ReadPolicy(gaps="resample"))
    assert any("gantry tilt of 18.5 degrees corrected" in note for note in raw.notes)
    with pytest.raises(RefusedInput, match="208 slices missing"):
        read_any(str(root / "dicom_ct_chest"))
    for item in discover(root / "dicom_mr_crops").items:
        assert read_item(item, ReadPolicy()).modality == "MR"
