"""Headers of NIfTI-1 and NIfTI-2, parsed once for ingest and prediction: shape, voxel type, place, scale, affine.

Follows the public header definitions (nifti1.h, nifti2.h). Where they leave room, nibabel's reading is followed,
because most tools that made the data use it: sform before qform; a code below zero counts as none; with neither form a
left-handed grid centred on the origin, whose voxel sizes are positive. What readers understand differently is refused.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import RefusedInput

Affine = npt.NDArray[np.float64]

NIFTI1 = np.dtype(
    [
        ("sizeof_hdr", "<i4"), ("data_type", "S10"), ("db_name", "S18"), ("extents", "<i4"), ("session_error", "<i2"),
        ("regular", "S1"), ("dim_info", "u1"), ("dim", "<i2", (8,)), ("intent_p", "<f4", (3,)), ("intent_code", "<i2"),
        ("datatype", "<i2"), ("bitpix", "<i2"), ("slice_start", "<i2"), ("pixdim", "<f4", (8,)), ("vox_offset", "<f4"),
        ("scl_slope", "<f4"), ("scl_inter", "<f4"), ("slice_end", "<i2"), ("slice_code", "u1"), ("xyzt_units", "u1"),
        ("cal_max", "<f4"), ("cal_min", "<f4"), ("slice_duration", "<f4"), ("toffset", "<f4"), ("glmax", "<i4"),
        ("glmin", "<i4"), ("descrip", "S80"), ("aux_file", "S24"), ("qform_code", "<i2"), ("sform_code", "<i2"),
        ("quatern", "<f4", (3,)), ("qoffset", "<f4", (3,)), ("srow", "<f4", (3, 4)), ("intent_name", "S16"),
        ("magic", "S4"),
    ]
)  # fmt: skip
NIFTI2 = np.dtype(
    [
        ("sizeof_hdr", "<i4"), ("magic", "S8"), ("datatype", "<i2"), ("bitpix", "<i2"), ("dim", "<i8", (8,)),
        ("intent_p", "<f8", (3,)), ("pixdim", "<f8", (8,)), ("vox_offset", "<i8"), ("scl_slope", "<f8"),
        ("scl_inter", "<f8"), ("cal_max", "<f8"), ("cal_min", "<f8"), ("slice_duration", "<f8"), ("toffset", "<f8"),
        ("slice_start", "<i8"), ("slice_end", "<i8"), ("descrip", "S80"), ("aux_file", "S24"), ("qform_code", "<i4"),
        ("sform_code", "<i4"), ("quatern", "<f8", (3,)), ("qoffset", "<f8", (3,)), ("srow", "<f8", (3, 4)),
        ("slice_code", "<i4"), ("xyzt_units", "<i4"), ("intent_code", "<i4"), ("intent_name", "S16"),
        ("dim_info", "u1"), ("unused", "S15"),
    ]
)  # fmt: skip
_LAYOUTS = tuple(
    (layout.newbyteorder(order), version, order)
    for layout, version in ((NIFTI1, b"1"), (NIFTI2, b"2"))
    for order in ("<", ">")
)
"""Made once: a structured type in another byte order takes longer to make than a header to parse."""
MOST_BYTES = NIFTI2.itemsize
"""No header is longer."""

DATATYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
"""Codes of scalar voxel types."""
_OTHER_TYPES = {1: "1-bit", 32: "complex64", 128: "RGB", 1536: "float128", 1792: "complex128", 2304: "RGBA"}
_UNITS = {0: ("", 1.0), 1: ("metres", 1e3), 2: ("mm", 1.0), 3: ("microns", 1e-3)}
_LAST_CODE = 5
"""Of a form: NIFTI_XFORM_TEMPLATE_OTHER."""
_QUATERNION_ROUNDING = 1e-5
"""A quaternion's squared length beyond 1 that is taken for rounding to single precision."""
_SAME_PLACE_VOX = 0.1
"""A distance between the grids of sform and qform, in voxels, from which on they count as different; our choice."""
_SAME_SIZE = 0.01
"""A relative difference of voxel sizes from which on they count as different; our choice."""


@dataclass(frozen=True, slots=True)
class NiftiHeader:
    """What a header says.

    Args:
        record: All fields, little-endian.
        shape: (I, J, K) or (I, J, K, T...); axes of one voxel at the end are left out.
        dtype: Of the stored voxels, in the file's byte order.
        offset: Where they begin, in bytes, in the file that holds them.
        slope, inter: Value = stored * slope + inter; (1, 0) where the header says "not scaled".
        affine: 4x4, voxel-centre indices (i, j, k, 1) to RAS+ mm; not checked to be a geometry (see `check_affine`).
        unit_mm: Millimetres in the unit that the header measures in.
        notes: What was assumed or chosen.
    """

    record: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    affine: Affine
    unit_mm: float
    notes: tuple[str, ...]


def parse_header(name: str, head: bytes, *, pair: bool = False) -> NiftiHeader:
    """Parse the first bytes of a file, of which `MOST_BYTES` are enough.

    Args:
        name: What errors call the file.
        head: From its beginning, decompressed.
        pair: Whether the voxels lie in another file, at `offset` of that one.

    Raises:
        RefusedInput: not a NIfTI header, or one whose voxels or place readers would take differently.
    """
    record, order = _record(name, head, pair)
    shape = _shape(name, record)
    code = int(record["datatype"])
    if code not in DATATYPES:
        raise RefusedInput(
            name,
            expected="integer or real voxels",
            found=_OTHER_TYPES.get(code, f"datatype code {code}"),
            remedy="convert the file to one scalar channel",
        )
    slope, inter = float(record["scl_slope"]), float(record["scl_inter"])
    if not math.isfinite(slope) or slope == 0:  # the standard: not scaled
        slope, inter = 1.0, 0.0
    if not math.isfinite(inter):
        raise RefusedInput(name, expected="a finite scl_inter", found=str(inter), remedy="repair the header")
    notes: list[str] = []
    affine = _affine(name, record, shape, notes)
    unit = int(record["xyzt_units"]) & 7
    if unit not in _UNITS:
        notes.append("the unit of length is none of the standard's: mm assumed")
    unit_name, unit_mm = _UNITS.get(unit, ("", 1.0))
    if unit_mm != 1:
        affine[:3] *= unit_mm
        notes.append(f"lengths converted from {unit_name} to mm")
    little = np.array(record) if order == "<" else np.array(record).astype(record.dtype.newbyteorder("<"))
    dtype = np.dtype(order + DATATYPES[code])
    offset = _offset(name, record, pair)
    return NiftiHeader(little, shape, dtype, offset, slope, inter, affine, unit_mm, tuple(notes))


def scaled(array: npt.NDArray[Any], slope: float, inter: float) -> npt.NDArray[Any]:
    """Stored voxels times slope plus inter: as they are for (1, 0), int32 where that is exact, else a float type.

    The float type is float32 for stored types of one or two bytes, else float64.
    """
    if (slope, inter) == (1.0, 0.0):
        return array
    small = array.dtype.kind in "iu" and array.dtype.itemsize <= 2
    if slope == 1 and inter == round(inter) and small and abs(inter) < 2**24:
        return array.astype(np.int32) + np.int32(inter)
    out: npt.NDArray[Any] = array.astype(np.float32 if array.dtype.itemsize < 4 else np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # what is infinite then is for the caller to refuse
        out *= slope
        out += inter
    return out


def glimpse(data: bytes) -> str:
    """What the first bytes of a file of no known format look like, for messages."""
    if not data:
        return "an empty file"
    printable = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in data[:256])
    return "a text file" if printable else f"bytes {data[:4].hex(' ')} at its start"


def _record(name: str, head: bytes, pair: bool) -> tuple[Any, str]:
    """The header record and the byte order of the file."""
    for layout, version, order in _LAYOUTS:
        if len(head) < layout.itemsize or np.frombuffer(head, order + "i4", 1)[0] != layout.itemsize:
            continue
        record = np.frombuffer(head, layout, 1)[0]
        magic = bytes(record["magic"])[:3]
        if magic == (b"ni" if pair else b"n+") + version:
            return record, order
        if magic in (b"n+" + version, b"ni" + version):
            raise RefusedInput(
                name,
                expected=f"the header of {'a pair' if pair else 'a single file'}",
                found=f"one that says that its voxels are in {'this file' if pair else 'an .img file'}",
                remedy="name a single file .nii, and the header and voxels of a pair .hdr and .img",
            )
        if version == b"1":
            raise RefusedInput(
                name,
                expected="a NIfTI-1 or NIfTI-2 volume",
                found="an Analyze 7.5 header, which does not say left from right",
                remedy="convert it to NIfTI with a tool that knows its orientation",
            )
    raise RefusedInput(
        name,
        expected="a NIfTI-1 or NIfTI-2 volume",
        found=glimpse(head),
        remedy="is this another format under this name? convert it to .nii.gz",
    )


def _shape(name: str, record: Any) -> tuple[int, ...]:
    rank = int(record["dim"][0])
    sizes = [int(n) for n in record["dim"][1 : 1 + max(0, min(rank, 7))]]
    if not 1 <= rank <= 7 or min(sizes) < 1:
        shape = f"shape {tuple(sizes)}" if 1 <= rank <= 7 else f"{rank} axes"
        raise RefusedInput(name, expected="one to seven axes of one voxel or more", found=shape)
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) < 3:
        raise RefusedInput(name, expected="three axes", found=f"shape {tuple(sizes)}", remedy="a slice is no volume")
    return tuple(sizes)


def _offset(name: str, record: Any, pair: bool) -> int:
    offset = float(record["vox_offset"])
    least = 0 if pair else record.dtype.itemsize + 4
    if not (least <= offset < 2**53 and offset == int(offset)):  # false for NaN
        raise RefusedInput(
            name,
            expected=f"voxels from a whole byte on, {least} or later",
            found=f"vox_offset {offset:g}",
            remedy="repair the header, or write the file again",
        )
    return int(record["vox_offset"])


def _affine(name: str, record: Any, shape: tuple[int, ...], notes: list[str]) -> Affine:
    """In the header's unit of length."""
    sform, qform = (_code(name, record, field, notes) > 0 for field in ("sform_code", "qform_code"))
    stored = np.asarray(record["pixdim"][1:4], np.float64)
    affine = np.eye(4)
    if sform:
        affine[:3] = np.asarray(record["srow"], np.float64)
        _compare(affine, record, shape, qform, notes)
        return affine
    if not np.isfinite(stored).all():
        raise RefusedInput(
            name, expected="finite voxel sizes", found=f"pixdim {stored.tolist()}", remedy="repair the header"
        )
    if (stored < 0).any():
        notes.append("negative voxel sizes in pixdim: taken without their sign, which says nothing of the axes")
    if qform:
        return _from_qform(name, record)
    notes.append("no qform or sform: orientation taken from the voxel sizes alone")
    sizes = np.abs(stored)
    if (sizes == 0).any():
        notes.append("voxel sizes of 0 in pixdim: taken as 1")
        sizes = np.where(sizes > 0, sizes, 1.0)
    sizes = sizes * (-1.0, 1.0, 1.0)
    affine[:3, :3] = np.diag(sizes)
    affine[:3, 3] = -sizes * (np.array(shape[:3]) - 1) / 2
    return affine


def _code(name: str, record: Any, field: str, notes: list[str]) -> int:
    """Code of a form: 0 where it says nothing."""
    code = int(record[field])
    if code > _LAST_CODE:
        raise RefusedInput(
            name,
            expected=f"a {field} of 0 to {_LAST_CODE}",
            found=str(code),
            remedy="repair the header: some programs would use this form, others would not",
        )
    if code < 0:
        notes.append(f"a negative {field} is none of the standard's: taken as 0")
    return max(code, 0)


def _from_qform(name: str, record: Any) -> Affine:
    """Rotation by the quaternion, voxel sizes by pixdim, the third axis turned round by qfac (nifti1.h, method 2)."""
    b, c, d = (float(x) for x in record["quatern"])
    squared = b * b + c * c + d * d
    qfac = float(record["pixdim"][0])
    if not squared <= 1 + _QUATERNION_ROUNDING:  # also of NaN
        raise RefusedInput(
            name, expected="a unit quaternion in qform", found=f"{(b, c, d)}", remedy="repair the header"
        )
    if qfac not in (-1.0, 0.0, 1.0):
        raise RefusedInput(
            name,
            expected="1 or -1 as qfac (pixdim[0]), or 0 for 1",
            found=f"{qfac:g}",
            remedy="repair the header: programs differ in whether this mirrors the volume",
        )
    a = math.sqrt(max(1.0 - squared, 0.0))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    ) / (a * a + squared)  # fmt: skip
    sizes = np.abs(np.asarray(record["pixdim"][1:4], np.float64))
    sizes[2] *= -1.0 if qfac < 0 else 1.0
    affine = np.eye(4)
    with np.errstate(invalid="ignore"):  # what is not finite then, who checks the affine refuses
        affine[:3, :3] = rotation * sizes
    affine[:3, 3] = np.asarray(record["qoffset"], np.float64)
    return affine


def _compare(sform: Affine, record: Any, shape: tuple[int, ...], qform: bool, notes: list[str]) -> None:
    """Note where programs that prefer qform or pixdim see the voxels elsewhere than sform puts them."""
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(sform[:3, :3], axis=0)
    if not (np.isfinite(sform).all() and np.isfinite(lengths).all() and lengths.min() > 0):
        return  # who checks the affine refuses it
    if qform:
        try:
            other = _from_qform("", record)
        except RefusedInput:
            notes.append("qform is damaged: sform used")
            return
        corners = np.array(np.meshgrid(*((-0.5, n - 0.5) for n in shape[:3]), [1.0], indexing="ij")).reshape(4, -1)
        with np.errstate(over="ignore", invalid="ignore"):
            apart_vox = float(np.linalg.norm(((sform - other) @ corners)[:3], axis=0).max() / lengths.min())
        if not apart_vox <= _SAME_PLACE_VOX:
            notes.append(f"sform and qform place the grid up to {apart_vox:.3g} voxels apart: sform used")
        return
    sizes = np.abs(np.asarray(record["pixdim"][1:4], np.float64))
    if not (np.abs(sizes - lengths) <= _SAME_SIZE * lengths).all():
        text = " x ".join(f"{size:.4g}" for size in sizes)
        notes.append(f"pixdim says voxels of {text}, sform {' x '.join(f'{n:.4g}' for n in lengths)}: sform used")
