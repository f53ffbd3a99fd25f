"""Every file format gives the same volume; what is none is refused with its name, a reason and a remedy."""

import gzip
import os
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import zarr

from storage import geometry
from storage.errors import ConfigError, RefusedInput
from storage.format.volume import Volume
from storage.format.volume_writer import write_derived, write_volume
from storage.ingest.discover import discover
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import prepare
from storage.ingest.readers.raw import ReadPolicy
from storage.ingest.readers.read import read_any, read_item, read_label
from storage.objects import open_store
from tests.kit.formats import save_big_endian, save_itk, save_mgz, save_nifti2, save_pair
from tests.kit.scans import disc, folder, phantom, save_nifti

AFFINE = np.array([[-1.5, 0, 0, 30], [0, 0, 2.0, -10], [0, 1.25, 0, 5], [0, 0, 0, 1.0]])


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("a.nii", save_nifti),
        ("a.nii.gz", save_nifti),
        ("a.hdr", save_pair),
        ("b.nii.gz", save_nifti2),
        ("c.nii", save_big_endian),
        ("a.nrrd", save_itk),
        ("a.nhdr", save_itk),
        ("a.mha", save_itk),
        ("a.mhd", save_itk),
        ("a.mgz", save_mgz),
    ],
)
def test_every_format_gives_the_same_volume(tmp_path, name, save):
    array = phantom()
    raw = read_any(str(save(tmp_path / name, array, AFFINE)))
    np.testing.assert_array_equal(raw.array_CDHW[0], array)
    np.testing.assert_allclose(raw.affine, AFFINE, atol=1e-4)
    assert raw.reader


def test_zarr_arrays_and_images(tmp_path):
    array = phantom()
    zarr.save_array(str(tmp_path / "bare.zarr"), array)
    raw = read_any(str(tmp_path / "bare.zarr"))
    np.testing.assert_array_equal(raw.array_CDHW[0], array)
    assert "assumed" in raw.notes[0]
    group = zarr.open_group(str(tmp_path / "image.zarr"), mode="w", zarr_format=2)
    group.create_array("s0", data=array[None])
    transforms = [
        {"type": "scale", "scale": [1, 2e3, 1.5e3, 1e3]},
        {"type": "translation", "translation": [0, 5e3, 6e3, 7e3]},
    ]
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "zyx")]
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": axes, "datasets": [{"path": "s0", "coordinateTransformations": transforms}]}
    ]
    raw = read_any(str(tmp_path / "image.zarr"))
    np.testing.assert_array_equal(raw.array_CDHW[0], array)
    np.testing.assert_allclose(raw.affine @ [0, 0, 0, 1], [7, 6, 5, 1])
    assert geometry.spacing_dhw(raw.affine) == pytest.approx((2, 1.5, 1))


def test_what_this_project_stores_is_read_back_with_its_values(tmp_path):
    from storage.format.volume_writer import write_volume
    from storage.objects import open_store

    stored = phantom()[None]
    write_volume(
        open_store(str(tmp_path)),
        "v.zarr",
        Volume(stored, spacing_mm=(1, 1.5, 2), affine=AFFINE, scale=0.5, offset=10),
    )
    raw = read_any(str(tmp_path / "volumes" / "v.zarr"))
    np.testing.assert_allclose(raw.array_CDHW, stored * 0.5 + 10)
    np.testing.assert_allclose(raw.affine, AFFINE)


@pytest.mark.parametrize(("unit", "mm"), [("inch", 25.4), ("centimeter", 10.0), (None, 1.0), ("pixel", 0)])
def test_units_of_ome_zarr_are_known_or_refused(tmp_path, unit, mm):
    group = zarr.open_group(str(tmp_path / "image.zarr"), mode="w")
    group.create_array("0", data=phantom())
    axes = [{"name": n, "type": "space", **({"unit": unit} if unit else {})} for n in "zyx"]
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [2, 1, 1]}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}]}
    if not mm:
        assert "pixel" in str(refusal(tmp_path / "image.zarr"))
        return
    raw = read_any(str(tmp_path / "image.zarr"))
    assert geometry.spacing_dhw(raw.affine) == pytest.approx((2 * mm, mm, mm))
    assert any("millimetres assumed" in note for note in raw.notes) == (unit is None)


def test_an_ome_zarr_that_is_placed_by_other_means_is_refused(tmp_path):
    group = zarr.open_group(str(tmp_path / "image.zarr"), mode="w")
    group.create_array("0", data=phantom())
    axes = [{"name": n, "type": "space", "unit": "millimeter"} for n in "zyx"]
    for kind, fine in (("identity", True), ("affine", False)):
        level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [2, 1, 1]}, {"type": kind}]}
        group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}]}
        if fine:
            assert geometry.spacing_dhw(read_any(str(tmp_path / "image.zarr")).affine) == (2, 1, 1)
        else:
            assert "affine" in refusal(tmp_path / "image.zarr").found


@pytest.mark.parametrize("shards", [None, (4, 4, 4)])
def test_chunks_that_a_zarr_does_not_hold_are_noted(tmp_path, shards):
    path = tmp_path / "a.zarr"
    array = zarr.create_array(store=str(path), shape=(8, 8, 8), chunks=(2, 2, 2), shards=shards, dtype="i2")
    array[...] = phantom((8, 8, 8)) + np.int16(1)
    assert "not stored" not in str(read_any(str(path)).notes)
    lost = sorted((path / "c").rglob("1"))[-1]
    assert lost.is_file()
    lost.unlink()
    assert "of 64 chunks are not stored" in str(read_any(str(path)).notes)


@pytest.mark.parametrize("turned", [False, True])
def test_a_label_inside_an_ome_zarr_image_is_its_label(tmp_path, turned):
    """Also where the image's place needs a rotation, which OME-Zarr has no words for."""
    affine = np.diag([2, 1.5, 1, 1.0])
    if turned:
        affine[:3, :3] = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) @ affine[:3, :3]
    affine[:3, 3] = (5, 6, 7)
    store, image, labels = open_store(str(tmp_path)), phantom()[None], {"organs": disc()}
    record = write_volume(
        store,
        "v.zarr",
        Volume(image, spacing_mm=(1, 1.5, 2), affine=affine, labels=labels),
    )
    write_derived(store, record, "superpixels-1-abc", disc().astype(np.int32) + 5, "test")
    found = discover(tmp_path / "volumes")
    (item,) = found.items
    assert found.orphans == ()
    ready = prepare(item, IngestPolicy())
    np.testing.assert_array_equal(ready.label_DHW, disc())
    write_volume(
        store,
        "v.zarr",
        Volume(image, spacing_mm=(1, 1.5, 2), affine=affine, labels={**labels, "more": disc()}),
    )
    found = discover(tmp_path / "volumes")
    assert found.items[0].label is None
    assert "more, organs: none of them is used" in str(found.orphans[0])


def test_a_label_inside_an_ome_zarr_image_that_lies_elsewhere_is_refused(tmp_path):
    group = zarr.open_group(str(tmp_path / "v.zarr"), mode="w")
    axes = [{"name": n, "type": "space", "unit": "millimeter"} for n in "zyx"]
    for name, array, scale in (("", phantom(), 1.0), ("labels/organs", disc(), 1.3)):
        node = group.require_group(name) if name else group
        node.create_array("0", data=array)
        level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [scale] * 3}]}
        node.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}]}
    group["labels"].attrs["ome"] = {"version": "0.5", "labels": ["organs"]}
    (item,) = discover(tmp_path).items
    with pytest.raises(RefusedInput, match="corners"):
        prepare(item, IngestPolicy())


def test_slope_and_intercept_are_applied(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(phantom().T.astype(np.float64) * 0.25 + 3, np.eye(4), header)
    nib.save(image, tmp_path / "a.nii.gz")
    raw = read_any(str(tmp_path / "a.nii.gz"))
    np.testing.assert_allclose(raw.array_CDHW[0].T, nib.load(tmp_path / "a.nii.gz").get_fdata(), rtol=1e-5)


def test_units_are_converted_to_mm(tmp_path):
    image = nib.Nifti1Image(phantom().T, np.diag([500.0, 500, 500, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii")
    raw = read_any(str(tmp_path / "a.nii"))
    assert geometry.spacing_dhw(raw.affine) == pytest.approx((0.5, 0.5, 0.5))
    assert "micron" in raw.notes[0]


def refusal(path: Path, policy: ReadPolicy | None = None) -> RefusedInput:
    with pytest.raises(RefusedInput) as refused:
        read_any(str(path), policy)
    assert path.name in refused.value.thing
    assert refused.value.expected
    assert refused.value.found
    return refused.value


def test_a_text_file_under_a_volumes_name(tmp_path):
    for name, found in (
        ("a.nii.gz", "a text file"),
        ("a.nii", "a text file"),
        ("a.mha", ""),
        ("a.nrrd", ""),
        ("a.mgz", ""),
    ):
        (tmp_path / name).write_text("hello, I am no volume\n" * 40)
        assert found in refusal(tmp_path / name).found
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    assert "empty file" in refusal(tmp_path / "empty.nii.gz").found


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
def test_truncated_files(tmp_path, keep):
    array = np.random.default_rng(0).integers(0, 3000, (12, 14, 16)).astype(np.int16)
    save_nifti(tmp_path / "a.nii.gz", array)
    save_nifti(tmp_path / "a.nii", array)
    save_itk(tmp_path / "a.mha", array, AFFINE)
    save_itk(tmp_path / "a.nrrd", array, AFFINE)
    save_mgz(tmp_path / "a.mgz", array, AFFINE)
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        assert "trunc" in str(refusal(path)) or "damage" in str(refusal(path)) or keep < 0.1


def test_a_flipped_bit_in_a_gzip_is_noticed(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", phantom())
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # in the CRC
    path.write_bytes(bytes(data))
    assert "gzip" in refusal(path).expected


@pytest.mark.parametrize("name", ["a.mgz", "a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
def test_a_flipped_bit_in_compressed_voxels_is_noticed(tmp_path, name):
    """By the checksum behind them, on which neither nibabel nor SimpleITK insists."""
    array = np.random.default_rng(0).integers(0, 3000, (12, 14, 16)).astype(np.int16)
    path = save_mgz(tmp_path / name, array, AFFINE) if name == "a.mgz" else tmp_path / name
    if name != "a.mgz":
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path), True)
    np.testing.assert_array_equal(read_any(str(path)).array_CDHW[0], array)
    packed = next((p for p in tmp_path.iterdir() if p != path), path)
    whole = packed.read_bytes()
    for at in (len(whole) // 3, len(whole) // 2):
        data = bytearray(whole)
        data[at] ^= 4
        packed.write_bytes(bytes(data))
        assert "damage" in refusal(path).remedy
    packed.write_bytes(whole[: len(whole) // 2])
    assert "trunc" in refusal(path).remedy


@pytest.mark.parametrize("dtype", ["<i2", ">f4", "u1"])
@pytest.mark.parametrize("sized", [True, False])
def test_compressed_metaimages_are_read_with_and_without_the_size_of_their_compression(tmp_path, dtype, sized):
    """MetaImage's own code returns other voxels without it."""
    array = np.clip(phantom(), 0, 250).astype(dtype)
    packed = zlib.compress(array.tobytes())
    kind = {"i2": "MET_SHORT", "f4": "MET_FLOAT", "u1": "MET_UCHAR"}[array.dtype.str[1:]]
    size = f"CompressedDataSize = {len(packed)}\n" if sized else ""
    header = (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = {dtype[0] == '>'}\n"
        f"CompressedData = True\n{size}ElementSpacing = 1 1 1\nDimSize = 14 12 10\nElementType = {kind}\n"
        "ElementDataFile = LOCAL\n"
    )
    (tmp_path / "a.mha").write_bytes(header.encode() + packed)
    np.testing.assert_array_equal(read_any(str(tmp_path / "a.mha")).array_CDHW[0], array)


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("LIST\np0\np1\np2\np3", ""),
        ("p%d 0 3 1", ""),
        ("p%d 0", ""),
        ("LIST\np0\np1\np2", "3 by the header"),  # of which the library makes what lies in memory
        ("LIST 3\np0", "a shorter one"),
        ("p%d 0 2 1", "3 by the header"),
        ("p%d 0 3", "0 by the header"),  # of which the library dies
        ("p%d 0 3 0", "0 by the header"),
        ("p%q 0 3 1", "0 by the header"),
    ],
)
def test_a_metaimage_has_a_file_for_every_slice(tmp_path, named, found):
    array = phantom((4, 5, 6))
    for k, plane in enumerate(array):
        (tmp_path / f"p{k}").write_bytes(plane.tobytes())
    header = "ObjectType = Image\nNDims = 3\nDimSize = 6 5 4\nElementType = MET_SHORT\nElementSpacing = 1 1 1\n"
    path = tmp_path / "a.mhd"
    path.write_text(f"{header}ElementDataFile = {named}\n")
    if found:
        assert found in refusal(path).found
    else:
        np.testing.assert_array_equal(read_any(str(path)).array_CDHW[0], array)


def nrrd(path: Path, fields: str, array: np.ndarray) -> Path:
    sizes = " ".join(map(str, array.shape[::-1]))
    header = (
        f"NRRD0005\ntype: short\ndimension: {array.ndim}\nsizes: {sizes}\nencoding: raw\nendian: little\n{fields}\n"
    )
    path.write_bytes(header.encode() + b"\n" + array.astype("<i2").tobytes())
    return path


LPS = "space: left-posterior-superior\nspace directions: (500,0,0) (0,500,0) (0,0,500)\nspace origin: (5,6,7)"


@pytest.mark.parametrize(("unit", "mm"), [("um", 1e-3), ("microns", 1e-3), ("\xb5m", 1e-3), ("mm", 1), ("parsec", 0)])
def test_units_of_nrrd_are_known_or_refused(tmp_path, unit, mm):
    path = nrrd(tmp_path / "a.nrrd", LPS + f'\nspace units: "{unit}" "{unit}" "{unit}"', phantom())
    if not mm:
        assert "parsec" in refusal(path).found
        return
    raw = read_any(str(path))
    assert geometry.spacing_dhw(raw.affine) == pytest.approx((500 * mm,) * 3)
    np.testing.assert_allclose(raw.affine[:3, 3], np.array([-5, -6, 7]) * mm)
    assert bool(raw.notes) == (mm != 1)


@pytest.mark.parametrize("number", ["-1", "100", "99999999999", "1e2", "0"])
@pytest.mark.parametrize("name", ["a.mha", "a.mhd"])
def test_a_metaimage_of_an_impossible_number_of_dimensions_is_refused_and_ends_no_process(tmp_path, name, number):
    path = save_itk(tmp_path / name, phantom((4, 5, 6)), np.eye(4))
    data = path.read_bytes()
    assert data.count(b"NDims = 3") == 1
    path.write_bytes(data.replace(b"NDims = 3", b"NDims = " + number.encode()))
    with pytest.raises(RefusedInput, match="NDims from 1 to 10"):
        read_any(str(path))


def test_units_of_nrrds_axes_and_of_metaimages(tmp_path):
    series = np.stack([phantom(), phantom(seed=1)])
    path = nrrd(tmp_path / "a.nrrd", 'spacings: 2 2 2 9\nunits: "cm" "cm" "cm" "ms"', series)
    assert geometry.spacing_dhw(read_any(str(path), ReadPolicy(four_d="first")).affine) == pytest.approx((20,) * 3)
    path = save_itk(tmp_path / "a.mha", phantom(), np.diag([500.0, 500, 500, 1]))
    path.write_bytes(path.read_bytes().replace(b"ElementType", b"DistanceUnits = um\nElementType"))
    assert geometry.spacing_dhw(read_any(str(path)).affine) == pytest.approx((0.5, 0.5, 0.5))


def test_the_space_of_a_nrrd_is_followed_or_said_to_be_unknown(tmp_path):
    spatial = "space directions: (1,0,0,0) (0,1,0,0) (0,0,2,0) (0,0,0,1)\nspace origin: (5,6,7,0)"
    series = np.stack([phantom(), phantom(seed=1)])
    path = nrrd(tmp_path / "a.nrrd", f"space: right-anterior-superior-time\n{spatial}", series)
    raw = read_any(str(path), ReadPolicy(four_d="first"))
    np.testing.assert_allclose(raw.affine, [[1, 0, 0, 5], [0, 1, 0, 6], [0, 0, 2, 7], [0, 0, 0, 1]])
    notes = read_any(str(nrrd(tmp_path / "b.nrrd", "spacings: 2 2 2", phantom()))).notes
    assert notes == ["no space in the header: axes taken as to left, back and up"]
    notes = read_any(
        str(nrrd(tmp_path / "c.nrrd", LPS.replace("left-posterior-superior", "scanner-xyz"), phantom()))
    ).notes
    assert "scanner-xyz" in notes[0]
    assert "1 mm assumed" in read_any(str(nrrd(tmp_path / "d.nrrd", "content: none", phantom()))).notes[0]
    assert read_any(str(nrrd(tmp_path / "e.nrrd", LPS, phantom()))).notes == []


@pytest.mark.parametrize("at", [*range(4, 20, 4)])
def test_an_mgh_without_voxels_along_an_axis_is_refused(tmp_path, at):
    path = save_mgz(tmp_path / "a.mgh", phantom((4, 5, 6)), AFFINE)
    data = bytearray(path.read_bytes())
    data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    assert "non-zero" in refusal(path).found


def test_an_mgz_without_geometry_says_so(tmp_path):
    path = save_mgz(tmp_path / "a.mgz", phantom(), AFFINE)
    assert read_any(str(path)).notes == []
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[28:30] = b"\0\0"
    path.write_bytes(gzip.compress(bytes(data)))
    assert "goodRASFlag" in read_any(str(path)).notes[0]


def test_voxels_of_a_pair_begin_where_its_header_says(tmp_path):
    path = save_pair(tmp_path / "a.hdr", phantom(), AFFINE)
    header = bytearray(path.read_bytes())
    header[108:112] = np.float32(16).tobytes()
    path.write_bytes(bytes(header))
    pixels = path.with_suffix(".img")
    pixels.write_bytes(bytes(16) + pixels.read_bytes())
    np.testing.assert_array_equal(read_any(str(path)).array_CDHW[0], phantom())


def test_a_header_of_two_minds_is_noted(tmp_path):
    image = nib.Nifti1Image(phantom().T, np.diag([2.0, 2, 2, 1]))
    for flip, notes in ((1, 0), (-1, 1)):
        image.set_qform(np.diag([2.0 * flip, 2, 2, 1]), 1)
        image.set_sform(np.diag([2.0, 2, 2, 1]), 1)
        nib.save(image, tmp_path / "a.nii")
        raw = read_any(str(tmp_path / "a.nii"))
        assert [note for note in raw.notes if "sform used" in note] == raw.notes
        assert len(raw.notes) == notes
        assert geometry.orientation(raw.affine) == "RAS"


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.full((4, 5, 6), np.nan, np.float32), "only NaN"),
        (np.full((4, 5, 6), 7, np.int16), "every voxel is 7"),
        (np.where(np.arange(120).reshape(4, 5, 6) == 3, 1e300, 1.0), "1 of 120"),
        (np.where(np.arange(120).reshape(4, 5, 6) == 3, np.inf, 1.0 * np.arange(120).reshape(4, 5, 6)), "1 of 120"),
    ],
)
def test_values_that_hold_no_image(tmp_path, array, found):
    assert found in refusal(save_nifti(tmp_path / "a.nii.gz", array)).found


def test_whole_numbers_that_no_float_holds_are_refused(tmp_path):
    zarr.save_array(str(tmp_path / "a.zarr"), phantom().astype(np.int64) + 2**60)
    assert "2^53" in refusal(tmp_path / "a.zarr").expected


def test_nonfinite_background_by_policy(tmp_path):
    array = phantom().astype(np.float32)
    array[:, :3] = np.nan
    raw = read_any(str(save_nifti(tmp_path / "a.nii", array)), ReadPolicy(nonfinite="lowest"))
    assert raw.array_CDHW[:, :, :3].max() == np.nanmin(array)
    assert "NaN" in raw.notes[0]


def test_empty_and_huge_shapes_are_refused_before_they_are_allocated(tmp_path):
    header = nib.Nifti1Header()
    header["vox_offset"] = 352
    for shape, found in (((0, 4, 4), "shape (0, 4, 4)"), ((30000, 30000, 30000), "27,000,000,000,000 voxels")):
        header["dim"][:4] = (3, *shape)
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(200)))
        assert found in refusal(tmp_path / "a.nii.gz").found


def test_four_dimensional_series_by_policy(tmp_path):
    series = np.stack([phantom(seed=s) for s in range(3)])
    for path in (save_nifti(tmp_path / "a.nii.gz", series), save_mgz(tmp_path / "a.mgz", series, AFFINE)):
        error = refusal(path)
        assert "3" in error.found
        assert "four_d" in error.remedy
        first = read_any(str(path), ReadPolicy(four_d="first"))
        np.testing.assert_array_equal(first.array_CDHW, series[:1])
        both = read_any(str(path), ReadPolicy(four_d="channels"))
        np.testing.assert_array_equal(both.array_CDHW, series)
        assert both.notes
    SimpleITK.WriteImage(
        SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(volume) for volume in series]), str(tmp_path / "a.nrrd")
    )
    np.testing.assert_array_equal(read_any(str(tmp_path / "a.nrrd"), ReadPolicy(four_d="channels")).array_CDHW, series)
    save_nifti(tmp_path / "one.nii.gz", series[:1])
    assert read_any(str(tmp_path / "one.nii.gz")).array_CDHW.shape == (1, 10, 12, 14)


def test_slices_analyze_files_and_colours_are_refused(tmp_path):
    assert "shape" in refusal(save_nifti(tmp_path / "flat.nii.gz", phantom()[0])).found
    nib.save(nib.AnalyzeImage(phantom().T, np.eye(4)), tmp_path / "old.hdr")
    assert "Analyze" in refusal(tmp_path / "old.hdr").found
    colour = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colour, np.eye(4)), tmp_path / "colour.nii")
    assert "integer or real" in refusal(tmp_path / "colour.nii").expected
    save_pair(tmp_path / "half.hdr", phantom(), np.eye(4))
    (tmp_path / "half.img").unlink()
    assert ".img" in refusal(tmp_path / "half.hdr").expected


def test_sheared_affines_are_refused_or_straightened(tmp_path):
    sheared = np.diag([1.0, 1, 2, 1])
    sheared[1, 2] = 0.7
    path = save_nifti(tmp_path / "a.nii.gz", phantom(), sheared)
    assert "sheared by 19.3 degrees" in refusal(path).found
    raw = read_any(str(path), ReadPolicy(shear="correct"))
    assert geometry.shear(raw.affine) < 1e-6
    assert "shear of 19.3 degrees corrected" in raw.notes[-1]


def test_labels_are_whole_numbers_on_their_images_grid(tmp_path):
    folder(tmp_path, 1)
    item = discover(tmp_path).items[0]
    image = read_item(item, ReadPolicy())
    assert read_label(item, ReadPolicy(), image).array_CDHW.dtype == np.uint8
    path = tmp_path / "labels" / "case_00.nii.gz"

    def refused(array: np.ndarray, affine: np.ndarray | None = None) -> str:
        save_nifti(path, array, affine)
        with pytest.raises(RefusedInput) as error:
            prepare(item, IngestPolicy())
        return str(error.value)

    assert "0.5 among them" in refused(disc() + np.float32(0.5))
    assert "NaN" in refused(np.where(disc() > 0, np.nan, 0.0))
    assert "-1 to 1" in refused(disc().astype(np.int16) - 1)
    assert "shape (10, 12, 14)" in refused(disc((10, 12, 13)))
    moved = np.eye(4)
    moved[0, 3] = 3
    assert "corners 3 mm apart" in refused(disc(), moved)
    ready = prepare(item, IngestPolicy(label_affine="ignore"))
    assert any("label affine ignored" in note for note in ready.notes)
    np.testing.assert_array_equal(ready.label_DHW, disc())


def test_a_label_in_another_orientation_is_turned_onto_its_image(tmp_path):
    folder(tmp_path, 1)
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = 13
    save_nifti(tmp_path / "labels" / "case_00.nii.gz", disc()[:, :, ::-1], flipped)
    ready = prepare(discover(tmp_path).items[0], IngestPolicy())
    np.testing.assert_array_equal(ready.label_DHW, disc())


def test_a_label_without_a_header_lies_as_its_images_voxels_do(tmp_path):
    """Turned by the header that is to be ignored, it would be the image's mirror image."""
    affine = np.array([[-1.5, 0, 0, 80], [0, -1.25, 0, 70], [0, 0, 2.0, -40], [0, 0, 0, 1]])
    save_nifti(tmp_path / "images" / "a.nii.gz", phantom(), affine)
    save_nifti(tmp_path / "labels" / "a.nii.gz", disc(), np.eye(4))
    item = discover(tmp_path).items[0]
    ready = prepare(item, IngestPolicy(label_affine="ignore"))
    np.testing.assert_array_equal(ready.stored_CDHW[0], phantom()[:, ::-1, ::-1])
    np.testing.assert_array_equal(ready.label_DHW, disc()[:, ::-1, ::-1])
    assert any("label affine ignored" in note for note in ready.notes)
    save_nifti(tmp_path / "images" / "a.nii.gz", phantom(), AFFINE)  # other axes altogether
    ready = prepare(item, IngestPolicy(label_affine="ignore"))
    expected, _ = geometry.canonicalise(disc()[None], AFFINE)
    np.testing.assert_array_equal(ready.label_DHW, expected[0])
    # a header that knows its axes and errs a little in its place is believed in its axes
    near = np.diag([1.5, 1.25, 2, 1])
    near[:3, 3] = (80 - 13 * 1.5 + 0.3, 70 - 11 * 1.25, -40)
    save_nifti(tmp_path / "images" / "a.nii.gz", phantom(), affine)
    save_nifti(tmp_path / "labels" / "a.nii.gz", disc()[:, ::-1, ::-1], near)
    ready = prepare(item, IngestPolicy(label_affine="ignore"))
    np.testing.assert_array_equal(ready.label_DHW, disc()[:, ::-1, ::-1])


def test_what_resampling_takes_away_is_said_or_refused(tmp_path):
    folder(tmp_path, 1)
    small = disc()
    small[0, 0, 0] = 7
    save_nifti(tmp_path / "labels" / "case_00.nii.gz", small)
    item = discover(tmp_path).items[0]
    ready = prepare(item, IngestPolicy(spacing_mm=2.0))
    assert [n for n in ready.notes if "too small" in n] == ["label values too small to be left after resampling: 7"]
    assert not any("too small" in note for note in prepare(item, IngestPolicy(spacing_mm=0.5)).notes)
    with pytest.raises(RefusedInput, match="contrast at 50x50x50 mm; found 1 voxels"):
        prepare(item, IngestPolicy(spacing_mm=50.0))


def test_channels_share_one_grid(tmp_path):
    for c in range(2):
        save_nifti(tmp_path / "images" / f"a_000{c}.nii.gz", phantom(seed=c))
    item = discover(tmp_path).items[0]
    np.testing.assert_array_equal(read_item(item, ReadPolicy()).array_CDHW, [phantom(seed=0), phantom(seed=1)])
    save_nifti(tmp_path / "images" / "a_0001.nii.gz", phantom((10, 12, 13)))
    with pytest.raises(RefusedInput, match="a_0001"):
        read_item(item, ReadPolicy())


def test_read_any_takes_one_volume(tmp_path):
    folder(tmp_path, 2, labelled=False)
    with pytest.raises(ConfigError, match="found 2"):
        read_any(str(tmp_path))
    with pytest.raises(ConfigError, match="no such file"):
        read_any(str(tmp_path / "none.nii.gz"))


def test_the_formats_folder_reads_as_its_readme_says():
    data = os.environ.get("TOMOSCALE_DATASETS")
    root = Path(data or "") / "formats"
    if not data or not root.is_dir():
        pytest.skip("set TOMOSCALE_DATASETS to the folder that holds formats")
    assert "sheared" in refusal(root / "nifti_refuse" / "shear.nii.gz").found
    assert "series of 10" in refusal(root / "nifti_refuse" / "pcasl.nii.gz").found
    nrrd = discover(root / "nrrd_pyradiomics")
    assert sorted(o.source for o in nrrd.orphans) == ["lung1_label.nrrd", "lung2_label.nrrd"]
    for item in nrrd.items:
        ready = prepare(item, IngestPolicy())
        assert ready.label_DHW is not None
        assert ready.label_DHW.any()
    assert prepare(discover(root / "mha_lung_ct").items[0], IngestPolicy()).modality == "CT"
