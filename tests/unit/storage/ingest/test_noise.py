"""Label maps whose whole numbers went through sums of floats, and headers that ITK passes over."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import RefusedInput
from storage.ingest.discover import discover
from storage.ingest.label_like import looks_like_label_map
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import prepare
from storage.ingest.readers.read import read_any
from tests.kit.scans import disc, phantom, save_nifti

SHAPE = (16, 18, 20)


def noisy(amplitude: float) -> np.ndarray:
    draw = np.random.default_rng(3)
    return (disc(SHAPE) + draw.uniform(-amplitude, amplitude, SHAPE)).astype(np.float32)


@pytest.mark.parametrize("amplitude", [1e-7, 1e-5, 9e-4])
def test_labels_with_the_noise_of_floats_are_whole_again_and_no_scan(tmp_path, amplitude):
    save_nifti(tmp_path / "images" / "a.nii.gz", phantom(SHAPE))
    save_nifti(tmp_path / "labels" / "a.nii.gz", noisy(amplitude))
    (item,) = discover(tmp_path).items
    prepared = prepare(item, IngestPolicy())
    np.testing.assert_array_equal(prepared.label_DHW, disc(SHAPE))
    assert any("labels rounded to whole numbers" in note for note in prepared.notes)
    save_nifti(tmp_path / "alone" / "a.nii.gz", noisy(amplitude))
    (alone,) = discover(tmp_path / "alone").items
    with pytest.raises(RefusedInput, match="looks like a label map: 3 different values"):
        prepare(alone, IngestPolicy())


def test_labels_off_by_more_than_noise_are_refused(tmp_path):
    save_nifti(tmp_path / "images" / "a.nii.gz", phantom(SHAPE))
    save_nifti(tmp_path / "labels" / "a.nii.gz", noisy(5e-3))
    (item,) = discover(tmp_path).items
    with pytest.raises(RefusedInput, match="whole numbers as labels"):
        prepare(item, IngestPolicy())


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-6, 1e4), st.floats(-1e3, 1e3))
def test_a_scan_of_any_scale_is_no_label_map(scale, offset):
    draw = np.random.default_rng(5)
    values = phantom(SHAPE).astype(np.float32) + draw.normal(0, 0.3, SHAPE).astype(np.float32)
    assert not looks_like_label_map(values.astype(np.float64) * scale + offset)


@pytest.mark.parametrize(
    ("name", "header", "what"),
    [
        ("a.nrrd", "NRRD0004\ntype: short\ndimension: 3\nsizes: {}\nencoding: raw\nendian: little\n", "along an axis"),
        ("a.mha", "ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = {}\n", "not applied"),
    ],
)
def test_what_itk_passes_over_in_silence_is_said(tmp_path, name, header, what):
    text = header.format("20 18 16")
    text += (
        "spacings: 1.2 1.3 nan\n\n"
        if name == "a.nrrd"
        else "ElementSpacing = 1.2 1.3 2\nElementToIntensityFunctionSlope = 2\nElementType = MET_SHORT\n"
        "ElementDataFile = LOCAL\n"
    )
    (tmp_path / name).write_bytes(text.encode() + phantom(SHAPE).astype("<i2").tobytes())
    raw = read_any(str(tmp_path / name))
    np.testing.assert_array_equal(raw.array_CDHW[0], phantom(SHAPE))
    assert any(what in note for note in raw.notes)
