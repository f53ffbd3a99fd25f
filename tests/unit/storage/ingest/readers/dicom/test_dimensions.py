"""Images at one position are told apart by their headers; slices of several acquisitions are no volume."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian, generate_uid

from storage.errors import RefusedInput
from storage.ingest.readers.dicom import file, reader
from storage.ingest.readers.raw import ReadPolicy
from storage.ingest.readers.read import read_any
from tests.kit.dicom_files import framed, read, refusal
from tests.kit.scans import phantom, save_dicom, slices

COUNT = 4
CHANNELS = ReadPolicy(four_d="channels")
FIRST = ReadPolicy(four_d="first")
TRUTH = np.stack([phantom((COUNT, 8, 10), seed) + np.int16(100 * seed) for seed in range(4)])


def images(number: int, tags: Callable[[int, int], dict[str, Any]], seed: int = 0) -> list[Dataset]:
    """`number` images at each of four positions in random order, with instance numbers that say nothing."""
    series, draw, out = generate_uid(), np.random.default_rng(seed), []
    for x in range(number):
        for k, ds in enumerate(slices(TRUTH[x], modality="MR", intercept=0, series=series)):
            ds.StudyInstanceUID = "1.2.3"
            ds.InstanceNumber = int(draw.integers(1, 10_000))
            for keyword, value in tags(x, k).items():
                setattr(ds, keyword, value)
            out.append(ds)
    return [out[at] for at in draw.permutation(len(out))]


def clock(x: int, k: int) -> str:
    """Times that differ in every image, those of one pass before those of the next."""
    return f"{100000 + 1000 * x + (7 * k) % COUNT:06d}.{250 * k:03d}"


TOLD_APART: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "EchoTime": lambda x, k: {"EchoTime": [4.6, 9.2, 13.8, 18.4][x]},
    "EchoNumbers": lambda x, k: {"EchoNumbers": x + 1},
    "ImageType": lambda x, k: {"ImageType": ["ORIGINAL", "PRIMARY", "IMPR"[x], "NORM"]},
    "ComplexImageComponent": lambda x, k: {
        "ComplexImageComponent": ["IMAGINARY", "MAGNITUDE", "PHASE", "REAL"][x],
    },
    "DiffusionBValue": lambda x, k: {"DiffusionBValue": [0.0, 50.0, 400.0, 1000.0][x]},
    "DiffusionGradientOrientation": lambda x, k: {
        "DiffusionBValue": 1000.0 * (x > 0),
        **({"DiffusionGradientOrientation": np.eye(3)[3 - x].tolist()} if x else {}),
    },
    "InversionTime": lambda x, k: {"InversionTime": 100 + 400 * x},
    "RepetitionTime": lambda x, k: {"RepetitionTime": 500 * (x + 1)},
    "FlipAngle": lambda x, k: {"FlipAngle": 5 + 10 * x},
    "KVP": lambda x, k: {"KVP": 80 + 20 * x},
    "ConvolutionKernel": lambda x, k: {"ConvolutionKernel": f"B{x}0f"},
    "TemporalPositionIdentifier": lambda x, k: {"TemporalPositionIdentifier": x + 1, "ContentTime": clock(3 - x, k)},
    "AcquisitionNumber": lambda x, k: {"AcquisitionNumber": x + 3},
    "AcquisitionTime": lambda x, k: {"AcquisitionTime": clock(x, k), "AcquisitionDate": "20200101"},
    "AcquisitionDateTime": lambda x, k: {"AcquisitionDateTime": f"20200101{clock(x, k)}"},
    "ContentTime": lambda x, k: {"ContentTime": clock(x, k)},
    "TriggerTime": lambda x, k: {"TriggerTime": 5.0 + 40 * x + 13 * k},
    "SeriesDescription": lambda x, k: {"SeriesDescription": f"Doe {x}"},
    "SpectrallySelectedSuppression": lambda x, k: {"SpectrallySelectedSuppression": f"{x}FAT"},
}


@pytest.mark.parametrize("name", TOLD_APART)
def test_a_channel_holds_one_image_kind_whatever_instance_numbers_say(tmp_path, name):
    """Else channel 0 is a mixture of echoes, of magnitude and phase, of b-values or of times."""
    datasets = images(4, TOLD_APART[name])
    found = refusal(tmp_path, datasets)
    assert name in found.found
    assert "read.four_d" in found.remedy
    assert "Doe" not in str(found)
    assert "2020" not in str(found)
    np.testing.assert_array_equal(read_any(str(tmp_path), CHANNELS).array_CDHW, TRUTH)
    raw = read_any(str(tmp_path), FIRST)
    np.testing.assert_array_equal(raw.array_CDHW, TRUTH[:1])
    assert name in raw.notes[0]


def test_values_of_the_dimension_are_named(tmp_path):
    datasets = images(3, TOLD_APART["EchoTime"])
    assert "EchoTime (4.6, 9.2, 13.8)" in refusal(tmp_path, datasets).found


def test_echoes_in_magnitude_and_phase_are_told_apart_by_both(tmp_path):
    datasets = images(4, lambda x, k: {"EchoTime": [5, 20][x // 2], "ImageType": ["ORIGINAL", "PRIMARY", "MP"[x % 2]]})
    raw = read(tmp_path, datasets, CHANNELS)
    np.testing.assert_array_equal(raw.array_CDHW, TRUTH)
    assert "EchoTime (5, 20); ImageType" in raw.notes[0]


def test_repeats_of_one_b_value_are_told_apart_by_time(tmp_path):
    datasets = images(
        4, lambda x, k: {"DiffusionBValue": [0.0, 0.0, 800.0, 800.0][x], "AcquisitionTime": clock([0, 3, 1, 2][x], k)}
    )
    np.testing.assert_array_equal(read(tmp_path, datasets, CHANNELS).array_CDHW, TRUTH)


def test_an_attribute_that_contradicts_the_others_is_passed_over(tmp_path):
    """Acquisition numbers that were given at random say nothing beside echo times."""
    datasets = images(2, lambda x, k: {"EchoTime": [5, 20][x], "AcquisitionNumber": 1 + (x + (k % 3 == 0)) % 2})
    np.testing.assert_array_equal(read(tmp_path, datasets, CHANNELS).array_CDHW, TRUTH[:2])


@pytest.mark.parametrize("policy", [FIRST, CHANNELS])
@pytest.mark.parametrize(
    ("tags", "what"),
    [
        (lambda x, k: {}, "nothing tells apart"),
        (lambda x, k: {"ContentTime": str(100000 + 5 * k + 10 * x)}, "ContentTime"),
        (lambda x, k: {"EchoTime": 5 + 15 * x + 2 * k}, "EchoTime"),
        (lambda x, k: {"EchoTime": [5, 20][x], "ImageType": ["A", "B", "MP"[(x + k) % 2]]}, "ImageType"),
        (lambda x, k: {"EchoTime": [5, 20][x], "FrameOfReferenceUID": f"1.2.{(x + k) % 2}"}, "FrameOfReferenceUID"),
        (lambda x, k: {"FrameOfReferenceUID": f"1.2.{x}"}, "FrameOfReferenceUID"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_whatever_the_policy(tmp_path, tags, what, policy):
    assert what in refusal(tmp_path, images(2, tags), policy).found


@pytest.mark.parametrize("policy", [ReadPolicy(), FIRST, CHANNELS])
def test_an_incomplete_dimension_is_refused_whatever_the_policy(tmp_path, policy):
    datasets = images(3, TOLD_APART["EchoTime"])
    found = refusal(tmp_path, datasets[1:], policy)
    assert "2 to 3 different images at a position, which differ in EchoTime" in found.found
    assert "four_d" not in found.remedy


def test_a_copy_of_a_series_is_no_second_time_point(tmp_path):
    datasets = images(2, TOLD_APART["EchoTime"])
    save_dicom(tmp_path / "a", datasets)
    for ds in datasets:
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.InstanceNumber = 1
    save_dicom(tmp_path / "b", datasets)
    raw = read_any(str(tmp_path), CHANNELS)
    np.testing.assert_array_equal(raw.array_CDHW, TRUTH[:2])
    assert raw.notes[0] == "8 slices were there twice; one of each kept"


@pytest.mark.parametrize(
    ("pointer", "label"),
    [
        ("TemporalPositionIndex", "dimension index of TemporalPositionIndex (1, 2, 3, 4)"),
        ("", "dimension index of a private attribute (2) (1, 2, 3, 4)"),
    ],
)
def test_frames_are_told_apart_by_their_dimension_index(tmp_path, pointer, label):
    def content(one: Dataset) -> Dataset:
        frame, inner = Dataset(), Dataset()
        inner.DimensionIndexValues = [1 + int(one.ImagePositionPatient[2]) // 2, int(one.AcquisitionNumber)]
        frame.FrameContentSequence = [inner]
        return frame

    ds = framed(images(4, lambda x, k: {"AcquisitionNumber": x + 1}), content, ["ImagePositionPatient", pointer])
    raw = read(tmp_path, [ds], CHANNELS)
    np.testing.assert_array_equal(raw.array_CDHW, TRUTH)
    assert label in raw.notes[0]


def test_frames_are_told_apart_by_their_functional_groups(tmp_path):
    def content(one: Dataset) -> Dataset:
        frame, diffusion, direction = Dataset(), Dataset(), Dataset()
        diffusion.DiffusionBValue = 0.0 if one.AcquisitionNumber == 1 else 1000.0
        if one.AcquisitionNumber > 1:
            direction.DiffusionGradientOrientation = np.eye(3)[4 - one.AcquisitionNumber].tolist()
            diffusion.DiffusionGradientDirectionSequence = [direction]
        frame.MRDiffusionSequence = [diffusion]
        return frame

    ds = framed(images(4, lambda x, k: {"AcquisitionNumber": x + 1}), content)
    raw = read(tmp_path, [ds], CHANNELS)
    np.testing.assert_array_equal(raw.array_CDHW, TRUTH)
    assert "DiffusionGradientOrientation (4 values)" in raw.notes[0]


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "EchoTime": (5, 20),
    "KVP": (80, 140),
    "ConvolutionKernel": ("B30f", "B70f"),
    "FrameOfReferenceUID": ("1.2.3", "1.2.4"),
    "ImageType": (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]),
    "InversionTime": (100, 2500),
    "FlipAngle": (5, 90),
    "RepetitionTime": (500, 4000),
    "DiffusionBValue": (0.0, 1000.0),
    "SequenceName": ("*ep_b0", "*ep_b1000t"),
    "ContrastBolusAgent": (None, "Doe's agent"),
    "PatientPosition": ("HFS", "FFS"),
    "MagneticFieldStrength": (1.5, 3.0),
    "TemporalPositionIdentifier": (1, 2),
}


@pytest.mark.parametrize("how", ["interleaved", "adjoining"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_two_acquisitions_in_one_series_are_not_joined(tmp_path, name, how):
    """They lie on one even grid, and a volume of both would show nothing of it."""
    datasets = slices(TRUTH[0], modality="MR", intercept=0)
    for k, ds in enumerate(datasets):
        value = DIFFERENT[name][k % 2 if how == "interleaved" else k // 2]
        if value is not None:
            setattr(ds, name, value)
    found = refusal(tmp_path, datasets, CHANNELS)
    assert name in found.found
    assert "Doe" not in str(found)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("AcquisitionNumber", (1, 2)),
        ("SeriesNumber", (3, 4)),
        ("SliceThickness", (5, 1)),
        ("SeriesDescription", ("Doe in", "Doe out")),
        ("RescaleType", ("HU", "US")),
        ("CorrectedImage", (["ATTN"], ["DECY"])),
        ("ReconstructionDiameter", (300, 350)),
    ],
)
def test_scans_that_take_turns_are_not_joined(tmp_path, name, values):
    datasets = slices(np.concatenate([TRUTH[0], TRUTH[1]]), intercept=0)
    for k, ds in enumerate(datasets):
        setattr(ds, name, values[k % 2])
    refused = refusal(tmp_path / "in turn", datasets, CHANNELS)
    assert name in refused.found
    assert "Doe" not in str(refused)
    for k, ds in enumerate(datasets):  # thin slices and then thick ones, or a rotation after another
        setattr(ds, name, values[k // COUNT])
    read(tmp_path / "one after the other", datasets)


@pytest.mark.parametrize(
    ("group", "element", "creator", "b_values"),
    [
        (0x0019, 0x0C, "SIEMENS MR HEADER", (0, 1000)),
        (0x0043, 0x39, "GEMS_PARM_01", ([0, 8, 0, 0], [1000001000, 8, 0, 0])),
        (0x2001, 0x03, "Philips Imaging DD 001", (0.0, 1000.0)),
    ],
)
@pytest.mark.parametrize("implicit", [False, True])
def test_b_values_that_vendors_write_privately_tell_images_apart(tmp_path, group, element, creator, b_values, implicit):
    def with_b(ds, b):
        kind = "FL" if isinstance(b, float) else "IS"
        ds.private_block(group, creator, create=True).add_new(element, kind, b)

    datasets = images(2, lambda x, k: {})
    for ds in datasets:
        with_b(ds, b_values[int(ds.PixelData == TRUTH[1][_slice_number(ds)].tobytes())])
    if implicit:
        for ds in datasets:
            ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    raw = read(tmp_path / "at one position", datasets, CHANNELS)
    np.testing.assert_array_equal(raw.array_CDHW, TRUTH[:2])
    assert "DiffusionBValue (0, 1000)" in raw.notes[0]
    datasets = slices(TRUTH[0], modality="MR", intercept=0)
    for k, ds in enumerate(datasets):
        with_b(ds, b_values[k % 2])
    assert "DiffusionBValue 0 in 2 and 1000 in 2" in refusal(tmp_path / "in turn", datasets).found


def _slice_number(ds: Dataset) -> int:
    return round(float(ds.ImagePositionPatient[2]) / 2)


def test_a_gap_that_is_a_multiple_of_the_stated_one_is_said(tmp_path):
    notes = {
        stated: read(tmp_path / str(stated), slices(TRUTH[0], SpacingBetweenSlices=stated)).notes
        for stated in (1.0, -1.0, 2.0, 1.5, 3.0)
    }
    assert all("2 mm apart and the header says 1 mm" in notes[stated][0] for stated in (1.0, -1.0))
    assert notes[2.0] == notes[1.5] == notes[3.0] == []


def test_what_differs_from_slice_to_slice_of_one_acquisition_is_taken(tmp_path):
    datasets = slices(TRUTH[0], intercept=0, modality="MR")
    for k, ds in enumerate(datasets):
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", *["ADD"] * (k > 1)]
        ds.EchoTime = 4.6 + 0.002 * k
        ds.RepetitionTime = 800 + 37 * k  # gated by the heart
        ds.AcquisitionNumber, ds.AcquisitionTime, ds.XRayTubeCurrent = k, clock(0, k), 100 + k
        ds.FrameOfReferenceUID = f"1.2.{k}"  # an anonymiser's
        ds.SliceThickness = [2, 4][k > 1]
    np.testing.assert_array_equal(read(tmp_path, datasets).array_CDHW[0], TRUTH[0])


@pytest.mark.parametrize("told", [True, False])
def test_a_series_in_time_is_read_in_linear_time(tmp_path, monkeypatch, told):
    """Headers decide, and each file is opened once for its header and at most once for its pixels."""
    headers, pixels, decoded = [], [], []
    monkeypatch.setattr(reader, "read_header", lambda path, f=reader.read_header: headers.append(path) or f(path))
    monkeypatch.setattr(
        file, "read_planes", lambda thing, s, f=file.read_planes: pixels.append(s[0].path) or f(thing, s)
    )
    monkeypatch.setattr(file, "_decode", lambda *a, f=file._decode: decoded.append(1) or f(*a))
    datasets = images(4, TOLD_APART["AcquisitionTime"] if told else lambda x, k: {})
    save_dicom(tmp_path, datasets)
    with pytest.raises(RefusedInput):
        read_any(str(tmp_path))
    assert len(headers) == len(set(headers)) == 16
    assert len(pixels) == len(set(pixels)) == len(decoded) == (0 if told else 16)
    if told:
        read_any(str(tmp_path), FIRST)
        assert len(pixels) == len(set(pixels)) == 4


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_complete_set_of_dimensions_gives_pure_channels(tmp_path_factory, data):
    names = data.draw(st.lists(st.sampled_from(["EchoTime", "FlipAngle", "ImageType", "KVP"]), min_size=1, max_size=2))
    values: dict[str, Any] = {"EchoTime": (3, 7), "FlipAngle": (10, 20), "KVP": (80, 120)}
    values["ImageType"] = (["A", "B", "M"], ["A", "B", "P"])
    number = 2 ** len(set(names))
    order = sorted(set(names), key=["EchoTime", "FlipAngle", "KVP", "ImageType"].index)  # as channels are ordered

    def tags(x: int, k: int) -> dict[str, Any]:
        return {name: values[name][x >> (len(order) - 1 - at) & 1] for at, name in enumerate(order)}

    datasets = images(number, tags, seed=data.draw(st.integers(0, 1000)))
    raw = read(tmp_path_factory.mktemp("any"), datasets, CHANNELS)
    np.testing.assert_array_equal(raw.array_CDHW, TRUTH[:number])
