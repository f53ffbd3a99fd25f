"""Ingest and prediction see one volume in a NIfTI file, that which nibabel sees, or both refuse it."""

import logging
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import strategies as st

from ssl_core.portable.nifti import Nifti, write_nifti
from ssl_core.portable.nifti import read_nifti as read_for_prediction
from storage.errors import RefusedInput
from storage.ingest.readers.nifti import read_nifti as read_for_ingest
from storage.ingest.readers.raw import RawVolume, ReadPolicy
from storage.nifti_header import NIFTI1, NIFTI2
from tests.kit.fuzz import DAMAGE, damaged, fuzz
from tests.kit.scans import phantom, save_nifti

AFFINE = np.array([[1.2, 0, 0, -10], [0, 1.3, 0, -12], [0, 0, 2.0, 5], [0, 0, 0, 1.0]])
SHAPE = (4, 5, 6)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)


def _file(path: Path, fields: dict[str, Any], layout: Any = NIFTI1, order: str = "<") -> Path:
    """A file with both forms whose header has these fields instead."""
    kind = nib.Nifti1Image if layout is NIFTI1 else nib.Nifti2Image
    image = kind(phantom(SHAPE).T, AFFINE, None)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    header = np.frombuffer(image.header.binaryblock, layout)[0].copy()
    header["magic"] = b"n+1" if layout is NIFTI1 else b"n+2\0\r\n\x1a\n"
    header["vox_offset"] = 352 if layout is NIFTI1 else 544
    with np.errstate(all="ignore"):
        for name, value in fields.items():
            header[name] = value
    voxels = phantom(SHAPE).astype(order + "i2").tobytes()
    path.write_bytes(header.astype(layout.newbyteorder(order)).tobytes() + bytes(4) + voxels)
    return path


def _outcomes(path: Path) -> tuple[RawVolume | RefusedInput, Nifti | RefusedInput]:
    out: list[Any] = []
    policy = ReadPolicy(four_d="channels", max_voxels=100_000)
    for read in (lambda: read_for_ingest(str(path), policy), lambda: read_for_prediction(path)):
        try:
            out.append(read())
        except RefusedInput as error:  # any other error fails the test
            out.append(error)
    return out[0], out[1]


def _same_or_refused(path: Path) -> bool:
    """Whether it was read; then by both, and as nibabel reads it."""
    ingested, predicted = _outcomes(path)
    if isinstance(ingested, RefusedInput) or isinstance(predicted, RefusedInput):
        assert type(ingested) is type(predicted), f"{ingested} / {predicted}"
        return False
    np.testing.assert_array_equal(ingested.affine, predicted.affine)
    values = ingested.array_CDHW.T
    np.testing.assert_array_equal(values[..., 0] if values.shape[3] == 1 else values, _flat(predicted.array))
    assert ingested.notes[: len(predicted.notes)] == list(predicted.notes)
    try:
        image: Any = nib.load(path)
        affine, data = image.affine, image.get_fdata()
    except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, ValueError, OSError):
        return True
    unit_mm = {1: 1e3, 3: 1e-3}.get(int(image.header["xyzt_units"]) & 7, 1.0)
    np.testing.assert_allclose(ingested.affine[:3], affine[:3] * unit_mm, rtol=1e-6, atol=1e-9 * unit_mm)
    size = max(np.abs(data).max(), abs(ingested.offset), 1e-30)
    if np.isfinite(size) and size < 1e30:
        np.testing.assert_allclose(_flat(predicted.array), _flat(data), rtol=0, atol=1e-6 * size)
    return True


def _flat(array: np.ndarray) -> np.ndarray:
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array if array.ndim < 4 else array.reshape((*array.shape[:3], -1), order="F")


ODD = [0.0, -0.0, 1.0, -1.0, 1.5, -2.0, 0.001, 1e-8, 1e30, np.nan, np.inf, -np.inf]
NUMBER = st.one_of(st.sampled_from(ODD), st.floats(-5, 5, width=32))
FIELDS = {
    "pixdim": st.tuples(*[NUMBER] * 4).map(lambda t: (*t, 0, 0, 0, 0)),
    "sform_code": st.integers(-2, 7),
    "qform_code": st.integers(-2, 7),
    "quatern": st.tuples(*[st.one_of(NUMBER, st.floats(-0.5625, 0.5625, width=32))] * 3),
    "qoffset": st.tuples(*[NUMBER] * 3),
    "srow": st.lists(st.tuples(*[NUMBER] * 4), min_size=3, max_size=3),
    "xyzt_units": st.integers(0, 255),
    "vox_offset": st.one_of(st.sampled_from([0, 348, 351, 352, 353, 400, 544, 545]), st.integers(-(2**31), 2**31)),
    "scl_slope": NUMBER,
    "scl_inter": NUMBER,
    "datatype": st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 7]),
    "dim": st.tuples(st.integers(-1, 8), *[st.sampled_from([0, 1, 2, 3, 4, 5, 6, -1, 30000])] * 7),
}


@st.composite
def _headers(draw: Any) -> tuple[dict[str, Any], Any, str]:
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=5, unique=True))
    if draw(st.booleans()):  # the forms that count for less are seen only where sform says nothing
        names = sorted({*names, "sform_code"})
    fields = {name: draw(FIELDS[name]) for name in names}
    return fields, draw(st.sampled_from([NIFTI1, NIFTI2])), draw(st.sampled_from("<>"))


def test_ingest_and_prediction_read_one_volume_of_any_header_or_both_refuse(tmp_path: Path) -> None:
    def target(header: tuple[dict[str, Any], Any, str]) -> None:
        _same_or_refused(_file(tmp_path / "a.nii", *header))

    fuzz(target, _headers(), 150, 0.1)


def test_ingest_and_prediction_agree_on_headers_of_which_bytes_are_wrong(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.nii", {})
    whole = path.read_bytes()

    def target(changes: list[tuple[str, int, int]]) -> None:
        path.write_bytes(damaged(whole, changes))
        _same_or_refused(path)

    fuzz(target, DAMAGE, 80, 0.1)


@pytest.mark.parametrize("layout", [NIFTI1, NIFTI2])
@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("qform", [0, 1])
def test_negative_voxel_sizes_do_not_mirror_a_volume(tmp_path: Path, layout: Any, axis: int, qform: int) -> None:
    """Ingest used to turn the axis round, which neither nibabel nor prediction does."""
    pixdim = [1, 1.2, 1.3, 2, 0, 0, 0, 0]
    pixdim[axis] *= -1
    path = _file(tmp_path / "a.nii", {"pixdim": pixdim, "sform_code": 0, "qform_code": qform}, layout)
    assert _same_or_refused(path)
    notes = _outcomes(path)[0].notes
    assert any("negative voxel sizes" in note for note in notes)


def test_a_qfac_of_0_counts_as_1_and_others_are_refused(tmp_path: Path) -> None:
    for qfac, fine in ((0, True), (1, True), (-1, True), (-0.5, False), (np.nan, False)):
        path = _file(tmp_path / "a.nii", {"pixdim": [qfac, 1.2, 1.3, 2, 0, 0, 0, 0], "sform_code": 0})
        assert _same_or_refused(path) == fine
        if fine:
            assert _outcomes(path)[0].affine[2, 2] == pytest.approx(-2 if qfac < 0 else 2)


def test_codes_of_forms_that_programs_take_differently_are_refused_or_noted(tmp_path: Path) -> None:
    assert not _same_or_refused(_file(tmp_path / "a.nii", {"sform_code": 6}))
    for field, fields in (("sform_code", {}), ("qform_code", {"sform_code": 0})):
        path = _file(tmp_path / "a.nii", {**fields, field: -1})
        assert _same_or_refused(path)
        assert any(f"negative {field}" in note for note in _outcomes(path)[0].notes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 348.0, 352.5, -16.0, 1e30])
def test_voxels_that_begin_nowhere_are_refused(tmp_path: Path, value: float) -> None:
    path = _file(tmp_path / "a.nii", {"vox_offset": value})
    assert not _same_or_refused(path)
    assert "vox_offset" in str(_outcomes(path)[1])


def test_an_unknown_unit_of_time_is_no_matter_and_one_of_length_is_noted(tmp_path: Path) -> None:
    assert _same_or_refused(path := _file(tmp_path / "a.nii", {"xyzt_units": 2 + 64}))
    assert _outcomes(path)[0].notes == []
    assert _same_or_refused(path := _file(tmp_path / "a.nii", {"xyzt_units": 5}))
    assert any("mm assumed" in note for note in _outcomes(path)[0].notes)


def test_millimetres_that_are_called_metres_are_refused(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.nii", {"xyzt_units": 1})
    assert not _same_or_refused(path)
    assert "xyzt_units" in str(_outcomes(path)[0])
    metres = np.diag([*[0.002] * 3, 1.0])
    path = _file(tmp_path / "a.nii", {"xyzt_units": 1, "srow": metres[:3], "qform_code": 0})
    assert _same_or_refused(path)
    np.testing.assert_allclose(_outcomes(path)[0].affine, np.diag([2, 2, 2, 1.0]), rtol=1e-6)


def test_a_header_of_two_minds_says_by_how_much(tmp_path: Path) -> None:
    turned = (0.17, 0, 0)  # 20 degrees about the first axis
    for fields, word in (
        ({}, ""),
        ({"quatern": turned}, "sform and qform place the grid up to"),
        ({"qoffset": (-10, -12, 9)}, "sform and qform place the grid up to 3.33 voxels apart"),
        ({"pixdim": [1, 0.6, 0.6, 2, 0, 0, 0, 0]}, "sform and qform place the grid up to"),
        ({"pixdim": [1, 5, 5, 5, 0, 0, 0, 0], "qform_code": 0}, "pixdim says voxels of 5 x 5 x 5, sform 1.2 x 1.3 x 2"),
        ({"quatern": (1, 1, 1)}, "qform is damaged"),
    ):
        path = _file(tmp_path / "a.nii", fields)
        assert _same_or_refused(path)
        notes = _outcomes(path)[0].notes
        assert len(notes) == bool(word)
        assert word in "".join(notes)


def test_single_files_and_pairs_are_not_taken_for_each_other(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.nii", {"magic": b"ni1"})
    assert not _same_or_refused(path)
    path = _file(tmp_path / "a.hdr", {})
    (tmp_path / "a.img").write_bytes(bytes(10_000))
    with pytest.raises(RefusedInput, match="voxels are in this file"):
        read_for_ingest(str(path), ReadPolicy())


@pytest.mark.parametrize("shape", [(14,), (14, 12), (14, 12, 1), (1, 14, 12), (14, 1, 12), (14, 12, 1, 3)])
def test_a_slice_or_a_line_is_refused_by_ingest(tmp_path: Path, shape: tuple[int, ...]) -> None:
    from storage.ingest.readers.read import read_any

    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    path = save_nifti(tmp_path / "a.nii", array.T)
    with pytest.raises(RefusedInput, match="a slice is no volume"):
        read_any(str(path), ReadPolicy(four_d="channels"))


def test_a_mask_of_an_odd_header_lies_on_its_image(tmp_path: Path) -> None:
    for fields in ({"pixdim": [0, -1.2, 1.3, 2, 0, 0, 0, 0], "sform_code": -1}, {"sform_code": 0, "qform_code": 0}):
        image = read_for_prediction(_file(tmp_path / "a.nii", fields))
        write_nifti(tmp_path / "mask.nii", np.ones(image.array.shape, np.uint8), image.affine, like=image)
        np.testing.assert_array_equal(read_for_prediction(tmp_path / "mask.nii").affine, image.affine)
        np.testing.assert_allclose(nib.load(tmp_path / "mask.nii").affine, image.affine, rtol=1e-6)


def test_the_header_that_the_fuzz_starts_from_is_a_good_one(tmp_path: Path) -> None:
    for layout in (NIFTI1, NIFTI2):
        for order in "<>":
            path = _file(tmp_path / "a.nii", {}, layout, order)
            assert struct.unpack(order + "i", path.read_bytes()[:4])[0] == layout.itemsize
            assert _same_or_refused(path)
            assert nib.load(path).shape == SHAPE[::-1]
