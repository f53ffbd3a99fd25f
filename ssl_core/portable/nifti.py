"""NIfTI-1 and NIfTI-2 single files (.nii, .nii.gz), read and written without nibabel.

Follows the public header definition (nifti1.h, nifti2.h). Where the standard leaves room, nibabel's reading is
followed, because that is what most tools that made the labels used: sform before qform, and with neither a
left-handed grid centred on the origin.
"""

import gzip
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RefusedInput

_NIFTI1 = np.dtype(
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
_NIFTI2 = np.dtype(
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

_CODES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_CODE_OF = {np.dtype(name): code for code, name in _CODES.items()}
_REFUSED = {1: "1-bit", 32: "complex64", 128: "RGB", 1536: "float128", 1792: "complex128", 2304: "RGBA"}


@dataclass(frozen=True)
class Nifti:
    """A NIfTI file in memory.

    Attributes:
        array: (I, J, K) or (I, J, K, T...) in file order; values after scl_slope and scl_inter (a float type when
            they say something else than "unscaled", the stored dtype in native byte order otherwise).
        affine: (4, 4) float64; voxel-centre indices (i, j, k, 1) to RAS+ mm.
        header: The header record, little-endian; used to write a mask with the same geometry fields.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    header: Any


def read_nifti(path: str | os.PathLike[str]) -> Nifti:
    """Read a `.nii` or `.nii.gz` file.

    Raises:
        RefusedInput: not NIfTI, truncated, of a kind that holds no scalar intensities, or without a valid geometry.
    """
    name = str(path)
    data = _bytes(name)
    header, order = _header(name, data)
    shape = _shape(name, header)
    code = int(header["datatype"])
    if code not in _CODES:
        kind = _REFUSED.get(code, f"datatype code {code}")
        raise RefusedInput(
            name, expected="integer or real voxels", found=kind, remedy="convert the file to a scalar type"
        )
    dtype = np.dtype(order + _CODES[code])
    offset = int(header["vox_offset"])
    start = max(offset, header.dtype.itemsize)
    count = int(np.prod(shape, dtype=np.int64))
    if len(data) < start + count * dtype.itemsize:
        raise RefusedInput(
            name,
            expected=f"{count * dtype.itemsize} bytes of voxels for shape {shape}",
            found=f"{max(0, len(data) - start)}",
            remedy="the file is truncated; copy or convert it again",
        )
    array = (
        np.frombuffer(data, dtype, count, start).reshape(shape, order="F").astype(dtype.newbyteorder("="), copy=False)
    )
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isfinite(slope) and slope != 0 and (slope, inter) != (1.0, 0.0):
        if not np.isfinite(inter):
            raise RefusedInput(name, expected="a finite scl_inter", found=str(inter), remedy="repair the header")
        # as wide as the stored type deserves, like ingest, so that both see the same values
        array = array.astype(np.float32 if array.dtype.itemsize < 4 else np.float64)
        array *= slope
        array += inter
    affine = _affine(name, header, shape)
    little = np.array(header).astype(header.dtype.newbyteorder("<"))
    return Nifti(array, affine, little)


def write_nifti(
    path: str | os.PathLike[str], array: NDArray[Any], affine: NDArray[Any], like: Nifti | None = None
) -> None:
    """Write an (I, J, K) array as NIfTI-1, atomically; gzip when the name ends in `.gz`.

    Args:
        path: `.nii` or `.nii.gz`.
        array: Of a dtype that NIfTI has.
        affine: (4, 4); used unless `like` carries the geometry.
        like: A NIfTI-1 image whose geometry fields (pixdim, qform, sform, units) are kept as they are, to the bit.
            Its free-text fields are dropped: they may name a patient.

    Raises:
        ValueError: a dtype or a shape that NIfTI-1 cannot hold.
    """
    if array.dtype not in _CODE_OF or array.ndim != 3 or max(array.shape) > 32767:
        raise ValueError(f"NIfTI-1 cannot hold {array.dtype} {array.shape}")
    header = np.zeros((), _NIFTI1)
    if like is not None and like.header.dtype == _NIFTI1:
        for field in ("pixdim", "qform_code", "sform_code", "quatern", "qoffset", "srow", "xyzt_units"):
            header[field] = like.header[field]
    else:
        header["pixdim"][1:4] = np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0)
        header["pixdim"][0] = 1
        header["sform_code"], header["srow"], header["xyzt_units"] = 1, np.asarray(affine)[:3], 2
    header["pixdim"][4:] = 1
    header["sizeof_hdr"], header["regular"], header["magic"], header["vox_offset"] = 348, b"r", b"n+1", 352
    header["dim"] = [3, *array.shape, 1, 1, 1, 1]
    header["datatype"], header["bitpix"] = _CODE_OF[array.dtype], array.dtype.itemsize * 8
    header["scl_slope"] = 1
    body = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes(order="F")
    data = header.tobytes() + b"\0\0\0\0" + body
    if str(path).endswith(".gz"):
        data = gzip.compress(data, 6, mtime=0)
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _bytes(name: str) -> bytes:
    try:
        raw = Path(name).read_bytes()
    except OSError as error:
        raise RefusedInput(name, expected="a readable file", found=str(error.strerror)) from error
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RefusedInput(
            name,
            expected="a whole gzip stream",
            found=str(error),
            remedy="the file is truncated or damaged; copy it again",
        ) from error


def _header(name: str, data: bytes) -> tuple[Any, str]:
    """The header record and the byte order of the file."""
    refusal = RefusedInput(
        name,
        expected="a NIfTI-1 or NIfTI-2 single file",
        found="an empty file" if not data else f"a file that starts with {data[:8]!r}",
        remedy="convert it to .nii.gz (pairs of .hdr and .img too)",
    )
    for layout, size, magic in ((_NIFTI1, 348, b"n+1"), (_NIFTI2, 540, b"n+2")):
        for order in ("<", ">"):
            if len(data) >= size and np.frombuffer(data, order + "i4", 1)[0] == size:
                header = np.frombuffer(data, layout.newbyteorder(order), 1)[0]
                if header["magic"][:3] != magic:
                    raise refusal
                return header, order
    raise refusal


def _shape(name: str, header: Any) -> tuple[int, ...]:
    rank = int(header["dim"][0])
    sizes = [int(n) for n in header["dim"][1 : 1 + max(0, min(rank, 7))]]
    if not 1 <= rank <= 7 or min(sizes) < 1:
        raise RefusedInput(
            name, expected="one to seven axes of one voxel or more", found=f"dim {header['dim'].tolist()}"
        )
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    sizes += [1] * (3 - len(sizes))
    return tuple(sizes)


def _affine(name: str, header: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    affine = np.eye(4)
    zooms = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
    if int(header["sform_code"]) > 0:
        affine[:3] = header["srow"]
    elif int(header["qform_code"]) > 0:
        b, c, d = (float(x) for x in header["quatern"])
        rest = 1.0 - (b * b + c * c + d * d)
        if not rest > -1e-5:
            raise RefusedInput(
                name, expected="a unit quaternion in qform", found=f"{(b, c, d)}", remedy="repair the header"
            )
        a = float(np.sqrt(max(rest, 0.0)))
        rotation = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
            ]
        ) / (a * a + b * b + c * c + d * d)  # fmt: skip
        zooms[2] *= -1.0 if float(header["pixdim"][0]) < 0 else 1.0
        affine[:3, :3], affine[:3, 3] = rotation * zooms, header["qoffset"]
    else:
        zooms = np.where(zooms > 0, zooms, 1.0) * (-1, 1, 1)
        affine[:3, :3] = np.diag(zooms)
        affine[:3, 3] = -zooms * (np.array(shape[:3]) - 1) / 2
    affine[:3] *= {1: 1e3, 3: 1e-3}.get(int(header["xyzt_units"]) & 7, 1.0)  # metres and microns
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise RefusedInput(
            name, expected="an invertible affine", found=np.array2string(affine), remedy="repair the header"
        )
    return affine
