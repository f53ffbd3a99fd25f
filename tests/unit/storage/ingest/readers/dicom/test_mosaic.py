"""Siemens mosaics: split into slices, each where it belongs; nibabel's reader of them is the judge."""

import warnings
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from storage import geometry
from storage.ingest.readers.raw import ReadPolicy
from tests.kit.dicom_files import csa_header, framed, mosaic, read, refusal
from tests.kit.scans import phantom

ARRAY = phantom((7, 12, 16)) + np.int16(100)
TRUTH = np.stack([phantom((7, 12, 16), seed) + np.int16(100 + 10 * seed) for seed in range(4)])
TURN = np.radians(20)
PLANES: dict[str, tuple[list[float], int]] = {
    "axial": ([1, 0, 0, 0, 1, 0], 1),
    "axial, downwards": ([1, 0, 0, 0, 1, 0], -1),
    "sagittal": ([0, 1, 0, 0, 0, -1], -1),
    "coronal": ([1, 0, 0, 0, 0, -1], 1),
    "oblique": ([1, 0, 0, 0, float(np.cos(TURN)), float(np.sin(TURN))], -1),
}


def of_nibabel(ds: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (D, H, W) and RAS affine of their indices (i, j, k), by nibabel alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nibabel.nicom.dicomwrappers import MosaicWrapper

        wrapped: Any = MosaicWrapper(ds)
        array = np.asarray(wrapped.get_data())  # rows, columns, slices
        affine = np.diag([-1.0, -1, 1, 1]) @ wrapped.affine
    return array.transpose(2, 0, 1), affine[:, [1, 0, 2, 3]]


@pytest.mark.parametrize("depth", [9, 13])
@pytest.mark.parametrize("plane", PLANES)
def test_the_slices_of_a_mosaic_lie_where_nibabel_puts_them(tmp_path, plane, depth):
    orientation, sign = PLANES[plane]
    array = phantom((depth, 12, 16), depth)
    normal = sign * np.cross(orientation[:3], orientation[3:])
    ds = mosaic(array, orientation=orientation, normal=normal)
    voxels, affine = geometry.canonicalise(*(lambda a, t: (a[None], t))(*of_nibabel(ds)))
    raw = read(tmp_path, [ds])
    own, own_affine = geometry.canonicalise(raw.array_CDHW, raw.affine)
    np.testing.assert_array_equal(own, voxels)
    np.testing.assert_allclose(own_affine, affine, atol=1e-4)
    assert sorted(map(int, raw.array_CDHW.sum(axis=(0, 2, 3)))) == sorted(map(int, array.sum(axis=(1, 2))))
    assert raw.notes == [f"each Siemens mosaic was split into its {depth} slices"]
    assert raw.modality == "MR"


def test_the_place_of_a_mosaic_by_hand(tmp_path):
    """3 x 3 tiles of 12 x 16 pixels, 1.5 mm between rows: the image's middle is the first slice's."""
    raw = read(tmp_path, [mosaic(ARRAY, normal=(0, 0, 1))])
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY)
    expected = np.diag([-0.75, -1.5, 2.5, 1.0])
    expected[:3, 3] = (20 - 0.75 * 16, 30 - 1.5 * 12, -7.5)
    np.testing.assert_allclose(raw.affine, expected, atol=1e-9)


@pytest.mark.parametrize(("count", "element"), [(True, False), (False, True), (True, True)])
def test_either_private_element_says_how_many_slices_there_are(tmp_path, count, element):
    raw = read(tmp_path, [mosaic(ARRAY, normal=(0, 0, 1), count=count, element=element)])
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY)


def time_points(number: int, **options: Any) -> list[Dataset]:
    series, out = generate_uid(), []
    for t in range(number):
        ds = mosaic(TRUTH[t], normal=(0, 0, -1), SeriesInstanceUID=series, **options)
        ds.AcquisitionNumber, ds.InstanceNumber, ds.AcquisitionTime = t + 1, (3 * t) % 4 + 1, f"10{t:02d}00"
        out.append(ds)
    return out[::-1]


def test_mosaics_of_one_series_are_time_points(tmp_path):
    datasets = time_points(4)
    error = refusal(tmp_path, datasets)
    assert "4 different images at each position" in error.found
    assert "read.four_d" in error.remedy
    raw = read(tmp_path, datasets, ReadPolicy(four_d="channels"))
    np.testing.assert_array_equal(raw.array_CDHW, TRUTH[:, ::-1])
    np.testing.assert_array_equal(read(tmp_path, datasets, ReadPolicy(four_d="first")).array_CDHW, TRUTH[:1, ::-1])


def test_mosaics_of_several_sizes_are_not_joined(tmp_path):
    datasets = time_points(2)
    datasets[0] = mosaic(TRUTH[0][:5], normal=(0, 0, -1), SeriesInstanceUID=datasets[1].SeriesInstanceUID)
    datasets[0].StudyInstanceUID = datasets[1].StudyInstanceUID
    assert "1 to 2 different images" in refusal(tmp_path, datasets, ReadPolicy(four_d="channels")).found


@pytest.mark.parametrize("intercept", [0, -50])
def test_empty_tiles_tell_the_count_where_no_private_element_does(tmp_path, intercept):
    """And only they: a matrix that was interpolated fits twice as many tiles along rows and columns."""
    ds = mosaic(ARRAY[:, :, :12], count=False, RescaleIntercept=intercept)
    raw = read(tmp_path / "a", [ds])
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY[:, :, :12] + np.int16(intercept))
    assert any("7, by the empty tiles" in note for note in raw.notes)
    assert any("taken as usual" in note for note in raw.notes)
    ds.AcquisitionMatrix = [6, 0, 0, 6]
    assert "NumberOfImagesInMosaic" in refusal(tmp_path / "b", [ds]).expected
    full = mosaic(phantom((9, 12, 12)) + np.int16(100), count=False)
    assert "no empty tiles" in refusal(tmp_path / "c", [full]).found
    del full.AcquisitionMatrix
    assert "no empty tiles" in refusal(tmp_path / "d", [full]).found


def test_mosaics_that_contradict_themselves_are_refused(tmp_path):
    two = mosaic(ARRAY, normal=(0, 0, 1))
    two.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 5)
    assert "contradictory" in refusal(tmp_path / "a", [two]).found
    assert "another direction" in refusal(tmp_path / "b", [mosaic(ARRAY, normal=(0, 1, 0))]).found
    assert "cannot be divided" in refusal(tmp_path / "c", [csa(mosaic(ARRAY), count=17)]).found
    gapless = mosaic(ARRAY, normal=(0, 0, 1))
    del gapless.SpacingBetweenSlices
    assert "SpacingBetweenSlices" in refusal(tmp_path / "d", [gapless]).expected
    assert "several mosaics" in refusal(tmp_path / "e", [framed([mosaic(ARRAY), mosaic(ARRAY)])]).found


def csa(ds: Dataset, count: int) -> Dataset:
    header = csa_header({"NumberOfImagesInMosaic": ("US", [count]), "SliceNormalVector": ("FD", [0, 0, 1])})
    ds.private_block(0x0029, "SIEMENS CSA HEADER")[0x10].value = header
    return ds


@pytest.mark.parametrize("at", [4, 9, 40, 100, 200])
def test_a_damaged_csa_header_is_refused_and_not_quoted(tmp_path, at):
    ds = mosaic(ARRAY, normal=(0, 0, 1))
    element = ds.private_block(0x0029, "SIEMENS CSA HEADER")[0x10]
    element.value = element.value[:at] + b"Doe^Jane"
    error = refusal(tmp_path, [ds])
    assert "file 1 of the series" in error.found
    assert "Doe" not in str(error)


def test_an_emptied_csa_header_is_none(tmp_path):
    ds = mosaic(ARRAY, normal=(0, 0, 1), element=True)
    ds.private_block(0x0029, "SIEMENS CSA HEADER")[0x10].value = bytes(64)
    raw = read(tmp_path, [ds])
    np.testing.assert_array_equal(raw.array_CDHW[0], ARRAY)
    assert any("taken as usual" in note for note in raw.notes)
