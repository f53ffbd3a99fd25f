"""NIfTI-1 and NIfTI-2 single files (.nii, .nii.gz), read and written without nibabel; headers as ingest reads them."""

import gzip
import math
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RefusedInput
from .grid import check_affine
from .nifti_header import DATATYPES, NIFTI1, parse_header, scaled

_CODE_OF = {np.dtype(name): code for code, name in DATATYPES.items()}


@dataclass(frozen=True)
class Nifti:
    """A NIfTI file in memory.

    Attributes:
        array: (I, J, K) or (I, J, K, T...) in file order; values after scl_slope and scl_inter (see `scaled`), in
            native byte order.
        affine: (4, 4) float64; voxel-centre indices (i, j, k, 1) to RAS+ mm.
        header: The header record, little-endian; used to write a mask with the same geometry fields.
        notes: What was assumed of the header or chosen in it.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    header: Any
    notes: tuple[str, ...] = ()


def read_nifti(path: str | os.PathLike[str]) -> Nifti:
    """Read a `.nii` or `.nii.gz` file.

    Raises:
        RefusedInput: not NIfTI, truncated, of a kind that holds no scalar intensities, or without a valid geometry.
    """
    name = str(path)
    data = _bytes(name)
    header = parse_header(name, data)
    affine = check_affine(header.affine, name, header.unit_mm)
    count = math.prod(header.shape)
    if len(data) < header.offset + count * header.dtype.itemsize:
        raise RefusedInput(
            name,
            expected=f"{count * header.dtype.itemsize} bytes of voxels for shape {header.shape}",
            found=f"{max(0, len(data) - header.offset)}",
            remedy="the file is truncated; copy or convert it again",
        )
    array = np.frombuffer(data, header.dtype, count, header.offset).reshape(header.shape, order="F")
    array = scaled(array.astype(header.dtype.newbyteorder("="), copy=False), header.slope, header.inter)
    return Nifti(array, affine, header.record, header.notes)


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
    header = np.zeros((), NIFTI1)
    if like is not None and like.header.dtype == NIFTI1:
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
            out.flush()
            os.fsync(out.fileno())  # else a power failure may leave an empty file under the name of a whole one
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:  # also of who interrupts it: half a file stays nowhere
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
