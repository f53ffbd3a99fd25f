"""NIfTI-1 and NIfTI-2, single files and .hdr/.img pairs, gzipped or not.

The header is nibabel's to parse; the voxels are taken from the buffer in place, and gzip is undone by ISA-L, several
times as fast as zlib. A gzip member is read to its end, so that its CRC is checked.
"""

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.readers.raw import Affine, Array, RawVolume, ReadPolicy, check_size, read_bytes
from storage.ingest.readers.reader import FileReader

READER = "nifti/1"
PIXEL_SUFFIXES = (".img", ".img.gz")
_EXPECTED = "a NIfTI-1 or NIfTI-2 volume"
_gzip_file: Any = igzip.IGzipFile  # untyped
_gzip_error: Any = isal_zlib.error
_TO_MM = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}


class NiftiReader(FileReader):
    """See `Reader`."""

    def read_file(self, path: str, policy: ReadPolicy) -> RawVolume:
        """See `read_nifti`."""
        return read_nifti(path, policy)

    def parts(self, path: str) -> list[str]:
        """The pixel file beside a header."""
        return [path[:-4] + end for end in PIXEL_SUFFIXES] if path.lower().endswith(".hdr") else []


def read_nifti(path: str, policy: ReadPolicy) -> RawVolume:
    """Read one file, or the pair that `path`.hdr belongs to.

    Raises:
        RefusedInput: names the file and what is wrong with it.
    """
    pixels = path
    if path.lower().endswith(".hdr"):
        pixels = next((p for end in PIXEL_SUFFIXES if Path(p := path[:-4] + end).exists()), "")
        if not pixels:
            raise RefusedInput(path, expected="an .img or .img.gz file beside it", found="none")
    with _Source(path) as source:
        header = _header(path, source.read(540))
        shape = tuple(int(n) for n in header.get_data_shape())
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        notes: list[str] = []
        if len(shape) < 3:
            raise RefusedInput(path, expected="three axes", found=f"shape {shape}", remedy="a slice is no volume")
        check_size(path, shape, policy)
        shape = _four_d(path, shape, policy, notes)
        dtype = _dtype(path, header)
        offset = int(header["vox_offset"])
        if pixels == path and offset < 348:
            raise RefusedInput(path, expected="voxels behind the header", found=f"vox_offset {offset}")
        size = int(np.prod(shape)) * dtype.itemsize
        if pixels == path:
            data = source.take(offset, size)
        else:
            with _Source(pixels) as other:
                data = other.take(offset, size)
    array: Array = np.frombuffer(data, dtype).reshape((1,) * (4 - len(shape)) + shape[::-1])
    array = _scaled(path, array, header, notes)
    return RawVolume(array, _affine(path, header, notes), READER, notes=notes)


class _Source:
    """Bytes of a plain or gzipped file, read no further than asked for."""

    def __init__(self, path: str) -> None:
        self._path = path
        data = read_bytes(path)
        if data[:2] == b"\x1f\x8b":
            self._file: Any = _gzip_file(fileobj=io.BytesIO(data), mode="rb")
        elif path.lower().endswith(".gz"):
            raise RefusedInput(
                path,
                expected="a gzip file",
                found=_glimpse(data),
                remedy="check the download or the export that wrote it",
            )
        else:
            self._file = io.BytesIO(data)
        self._head = b""

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, n: int) -> bytes:
        """The first n bytes, fewer where the file ends before; kept for `take`."""
        self._head = self._more(n)
        return self._head

    def take(self, offset: int, n: int) -> bytearray:
        """Exactly n bytes from `offset`, and the rest of a gzip read to its checksum."""
        skip = max(0, offset - len(self._head))
        if skip:
            self._more(skip)
        head = self._head[offset : offset + n]
        out = bytearray(n)
        out[: len(head)] = head
        have = len(head)
        with memoryview(out) as view:  # filled in place: a large volume is not copied
            while have < n and (got := self._guarded(self._file.readinto, view[have:])):
                have += int(got)
        if have < n:
            raise RefusedInput(
                self._path, expected=f"{n:,} bytes of voxels", found=f"{have:,}", remedy="the file is truncated"
            )
        while self._more(1 << 20):
            pass
        return out

    def _more(self, n: int) -> bytes:
        data: bytes = self._guarded(self._file.read, n)
        return data

    def _guarded(self, read: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return read(argument)
        except (EOFError, OSError, zlib.error, _gzip_error) as error:
            raise RefusedInput(
                self._path,
                expected="a complete gzip file",
                found=" ".join(str(error).split()),
                remedy="the file is truncated or damaged; fetch it again",
            ) from error


def _glimpse(data: bytes) -> str:
    if not data:
        return "an empty file"
    printable = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in data[:256])
    return "a text file" if printable else f"bytes {data[:4].hex(' ')} at its start"


def _header(path: str, head: bytes) -> Any:
    size = head[:4]
    kind: Any = None
    if size in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):
        kind = nib.Nifti1Header
    elif size in (b"\x1c\x02\0\0", b"\0\0\x02\x1c"):
        kind = nib.Nifti2Header
    length = 540 if kind is nib.Nifti2Header else 348
    if kind is None or len(head) < length:
        raise RefusedInput(
            path, expected=_EXPECTED, found=_glimpse(head), remedy="is this another format under this name?"
        )
    magic = head[344:348] if kind is nib.Nifti1Header else head[4:8]
    if magic[:3] not in (b"n+1", b"ni1", b"n+2", b"ni2"):
        raise RefusedInput(
            path,
            expected=_EXPECTED,
            found="an Analyze 7.5 header, which does not say left from right",
            remedy="convert it to NIfTI with a tool that knows its orientation",
        )
    try:
        return kind(head[:length], check=False)
    except (ValueError, TypeError, nib.spatialimages.HeaderDataError) as error:
        raise RefusedInput(path, expected=_EXPECTED, found=" ".join(str(error).split())) from error


def _four_d(path: str, shape: tuple[int, ...], policy: ReadPolicy, notes: list[str]) -> tuple[int, ...]:
    if len(shape) == 3:
        return shape
    # NIfTI keeps a vector's components in the fifth axis, behind an empty time axis
    series = int(np.prod(shape[3:]))
    if policy.four_d == "refuse":
        raise RefusedInput(
            path,
            expected="one volume",
            found=f"shape {shape}, a series of {series}",
            remedy="set read.four_d to first (take the first volume) or channels (take all as channels)",
        )
    if policy.four_d == "first":
        notes.append(f"first of {series} volumes")
        return shape[:3]
    notes.append(f"{series} volumes taken as channels")
    return (*shape[:3], series)


def _dtype(path: str, header: Any) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except (KeyError, nib.spatialimages.HeaderDataError) as error:
        raise RefusedInput(path, expected="a known voxel type", found=f"code {int(header['datatype'])}") from error
    if dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise RefusedInput(
            path, expected="integer or real voxels", found=str(dtype), remedy="convert it to one channel"
        )
    return dtype


def _scaled(path: str, array: Array, header: Any, notes: list[str]) -> Array:
    slope, inter = (float(header["scl_slope"]), float(header["scl_inter"]))
    if not np.isfinite(slope) or slope == 0:  # the standard: not scaled
        return array
    if not np.isfinite(inter):
        raise RefusedInput(path, expected="a finite scl_inter", found=str(inter))
    if (slope, inter) == (1.0, 0.0):
        return array
    if (
        slope == 1
        and inter == round(inter)
        and array.dtype.kind in "iu"
        and array.dtype.itemsize <= 2
        and abs(inter) < 2**24
    ):
        return array.astype(np.int32) + np.int32(inter)
    notes.append(f"scaled by {slope:g} with offset {inter:g}")
    scaled: Array = array.astype(np.float32 if array.dtype.itemsize < 4 else np.float64)
    scaled *= slope
    scaled += inter
    return scaled


def _affine(path: str, header: Any, notes: list[str]) -> Affine:
    try:
        affine = np.array(header.get_best_affine(), np.float64)
    except (ValueError, nib.spatialimages.HeaderDataError) as error:
        raise RefusedInput(path, expected="a usable qform or sform", found=" ".join(str(error).split())) from error
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        notes.append("no qform or sform: orientation taken from the voxel sizes alone")
    if int(header["sform_code"]) > 0 and int(header["qform_code"]) > 0 and _disagree(affine, header):
        notes.append("sform and qform tell different axes: sform used")
    unit = header.get_xyzt_units()[0] if int(header["xyzt_units"]) & 7 in (0, 1, 2, 3) else "unknown"
    if _TO_MM[unit] != 1:
        affine[:3] *= _TO_MM[unit]
        notes.append(f"lengths converted from {unit} to mm")
    return geometry.check_affine(affine, path)


def _disagree(sform: Affine, header: Any) -> bool:
    """Whether the axes of the header's other affine run elsewhere, as programs that prefer it see them."""
    try:
        qform = np.array(header.get_qform(), np.float64)
        return geometry.nearest_axes(qform) != geometry.nearest_axes(sform)
    except (ValueError, np.linalg.LinAlgError, nib.spatialimages.HeaderDataError):
        return False
