"""The bundle's own NIfTI reader and writer against nibabel."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ssl_core.portable.nifti import read_nifti, write_nifti
from storage.errors import RefusedInput

DTYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


def _same(path: Path) -> None:
    wanted = nib.load(path)
    found = read_nifti(path)
    assert np.array_equal(found.affine, wanted.affine) or np.allclose(found.affine, wanted.affine, rtol=0, atol=1e-5)
    values = np.asanyarray(wanted.dataobj)
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    assert found.array.shape == values.shape
    # scaled values of 8 and 16 bit files are float32 here and in ingest, float64 in nibabel
    assert np.allclose(found.array, values, rtol=1e-6, atol=1e-6 * float(np.abs(values).max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_reads_every_dtype_and_byte_order(tmp_path: Path, dtype: str, order: str, kind: type) -> None:
    rng = np.random.default_rng(0)
    array = (rng.normal(0, 40, (5, 4, 3)) + 50).clip(0, 120).astype(dtype)
    affine = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    image = kind(array, affine, header=header)
    path = tmp_path / "x.nii"
    nib.save(image, path)
    _same(path)
    assert np.array_equal(read_nifti(path).array, array)
    assert read_nifti(path).array.dtype == np.dtype(dtype)


def _rotation(rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(3, 3)))[0]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("which", ["sform", "qform", "neither", "both"])
def test_reads_the_geometry_that_nibabel_reads(tmp_path: Path, seed: int, which: str) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = _rotation(rng) * rng.uniform(0.5, 4, 3)
    affine[:3, 3] = rng.normal(0, 50, 3)
    image = nib.Nifti1Image(rng.integers(0, 9, (4, 5, 6)).astype(np.int16), None)
    if which in ("sform", "both"):
        image.set_sform(affine, 1)
    if which in ("qform", "both"):
        image.set_qform(affine if which == "qform" else np.diag([2.0, 2, 2, 1]), 2)
    if which == "neither":
        image.header["pixdim"][1:4] = rng.uniform(0.5, 4, 3)
        image.set_qform(None, 0)
        image.set_sform(None, 0)
    path = tmp_path / "x.nii.gz"
    image.to_filename(path)
    _same(path)


@pytest.mark.parametrize(("slope", "inter"), [(2.5, -100.0), (1.0, 7.0), (0.0, 3.0), (float("nan"), 0.0), (1.0, 0.0)])
def test_applies_slope_and_intercept(tmp_path: Path, slope: float, inter: float) -> None:
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = nib.Nifti1Image(array, np.eye(4))
    path = tmp_path / "x.nii"
    image.to_filename(path)
    data = bytearray(path.read_bytes())
    data[112:120] = np.array([slope, inter], "<f4").tobytes()
    path.write_bytes(data)
    _same(path)


def test_drops_trailing_axes_of_one_voxel_and_keeps_channels(tmp_path: Path) -> None:
    for shape, wanted in [((3, 4, 5, 1), (3, 4, 5)), ((3, 4, 5, 2), (3, 4, 5, 2))]:
        nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)).to_filename(tmp_path / "x.nii")
        assert read_nifti(tmp_path / "x.nii").array.shape == wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nibabel_reads_what_is_written(tmp_path: Path, dtype: str, suffix: str) -> None:
    rng = np.random.default_rng(3)
    array = rng.integers(0, 100, (4, 6, 5)).astype(dtype)
    affine = np.eye(4)
    affine[:3, :3] = _rotation(rng) * (1, 2, 3)
    write_nifti(tmp_path / f"x{suffix}", array, affine)
    image = nib.load(tmp_path / f"x{suffix}")
    assert np.array_equal(np.asanyarray(image.dataobj), array)
    assert image.get_data_dtype() == np.dtype(dtype)
    assert np.allclose(image.affine, affine, atol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == [f"x{suffix}"]


def test_geometry_of_the_input_is_kept_to_the_bit_and_its_texts_are_not(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), None)
    rng = np.random.default_rng(5)
    affine = np.eye(4)
    affine[:3, :3] = _rotation(rng) * (0.7, 0.7, 3)
    image.set_qform(affine, 1)
    image.set_sform(affine @ np.diag([1, 1, 1.001, 1]), 3)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"SMITH^JANE"
    for order, name in (("<", "little.nii"), (">", "big.nii")):
        given = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), None, image.header.as_byteswapped(order))
        given.to_filename(tmp_path / name)
        source = read_nifti(tmp_path / name)
        write_nifti(tmp_path / "mask.nii.gz", np.ones((4, 5, 6), np.uint8), source.affine, like=source)
        mask, original = nib.load(tmp_path / "mask.nii.gz"), nib.load(tmp_path / name)
        for get in ("get_sform", "get_qform"):
            (a, code_a), (b, code_b) = getattr(mask, get)(coded=True), getattr(original, get)(coded=True)
            assert np.array_equal(a, b)
            assert code_a == code_b
        assert mask.header.get_xyzt_units()[0] == "mm"
        assert np.array_equal(mask.header.get_zooms(), original.header.get_zooms())
        assert b"SMITH" not in gzip.decompress((tmp_path / "mask.nii.gz").read_bytes())


def _damage(path: Path, how: str) -> None:
    nib.Nifti1Image(np.zeros((8, 8, 8), np.float32), np.eye(4)).to_filename(path)
    data = path.read_bytes()
    raw = gzip.decompress(data)
    broken = {
        "empty": b"",
        "text": b"not an image at all\n" * 40,
        "half a gzip": data[: len(data) // 2],
        "short voxels": gzip.compress(raw[:-100]),
        "short header": gzip.compress(raw[:200]),
        "complex": gzip.compress(raw[:70] + b"\x20\x00" + raw[72:]),
        "a pair's header": gzip.compress(raw[:344] + b"ni1\0" + raw[348:]),
        "no axes": gzip.compress(raw[:40] + b"\x00\x00" + raw[42:]),
        "singular": gzip.compress(raw[:280] + bytes(16) + raw[296:]),
    }
    path.write_bytes(broken[how])


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "text",
        "half a gzip",
        "short voxels",
        "short header",
        "complex",
        "a pair's header",
        "no axes",
        "singular",
    ],
)
def test_refuses_by_name(tmp_path: Path, how: str) -> None:
    path = tmp_path / "scan.nii.gz"
    _damage(path, how)
    with pytest.raises(RefusedInput, match=r"scan\.nii\.gz"):
        read_nifti(path)
    with pytest.raises(RefusedInput, match=r"missing\.nii"):
        read_nifti(tmp_path / "missing.nii")


def test_real_files_read_as_nibabel_reads_them() -> None:
    root = os.environ.get("TOMOSCALE_DATASETS", "")
    folder = Path(root) / "formats"
    if not root or not folder.is_dir():
        pytest.skip("TOMOSCALE_DATASETS does not name the folder of real volumes")
    files = sorted(folder.glob("nifti_*/*.nii.gz")) + sorted(Path(root).glob("chaos_t2/*/*.nii.gz"))[:6]
    files += sorted(Path(root).glob("msd_hippocampus/*/*.nii.gz"))[::40]
    assert len(files) > 50
    for path in files:
        _same(path)
