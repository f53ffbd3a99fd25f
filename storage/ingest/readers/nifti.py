"""NIfTI-1 and NIfTI-2, single files and .hdr/.img pairs, gzipped or not.

`storage.nifti_header` parses the header, as it does for prediction. The voxels are taken from the buffer in place, and
gzip is undone by ISA-L, several times as fast as zlib. A gzip member is read to its end, so that its CRC is checked.
"""

import io
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip, isal_zlib

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.readers.raw import (
    Affine,
    Array,
    RawVolume,
    ReadPolicy,
    VolumeHeader,
    check_size,
    read_bytes,
    series_note,
)
from storage.ingest.readers.reader import FileReader
from storage.nifti_header import MOST_BYTES, NiftiHeader, glimpse, parse_header, scaled

READER = "nifti/1"
PIXEL_SUFFIXES = (".img", ".img.gz")
_HEAD_BYTES = 1 << 16
"""Of a file, which hold its header, gzipped or not."""
_PIECE = 1 << 18
"""Bytes that are decompressed by one call: as many as the processor's cache holds."""
_gzip_file: Any = igzip.IGzipFile  # untyped
_gzip_error: Any = isal_zlib.error


def nifti_reader() -> FileReader:
    """The reader of the format."""
    return FileReader(read_nifti, parts_of=pixel_files, header_of=read_nifti_header)


def pixel_files(path: str) -> list[str]:
    """The pixel file beside a header, under its possible names."""
    return [path[:-4] + end for end in PIXEL_SUFFIXES] if path.lower().endswith(".hdr") else []


def read_nifti(path: str, policy: ReadPolicy) -> RawVolume:
    """Read one file, or the pair that `path`.hdr belongs to.

    Raises:
        RefusedInput: names the file and what is wrong with it.
    """
    pixels = _pixels(path)
    notes: list[str] = []
    with _Source(path) as source:
        header, shape, affine = _parsed(path, source, policy, notes)
        size = math.prod(shape) * header.dtype.itemsize
        if pixels != path:
            with _Source(pixels) as other:
                data = other.take(header.offset, size)
        else:
            data = source.take(header.offset, size)
    array: Array = np.frombuffer(data, header.dtype).reshape((1,) * (4 - len(shape)) + shape[::-1])
    array = scaled(array, header.slope, header.inter)
    if array.dtype.kind == "f" and (header.slope, header.inter) != (1.0, 0.0):
        notes.append(f"scaled by {header.slope:g} with offset {header.inter:g}")
    return RawVolume(
        array,
        affine,
        READER,
        notes=notes,
        series=math.prod(header.shape[3:]),
        scale=header.slope,
        offset=header.inter,
    )


def read_nifti_header(path: str, policy: ReadPolicy) -> VolumeHeader:
    """What `read_nifti` would return, from the first bytes of the file.

    Raises:
        RefusedInput: names the file and what is wrong with its header.
    """
    _pixels(path)
    notes: list[str] = []
    with _Source(path, _HEAD_BYTES) as source:
        _, shape, affine = _parsed(path, source, policy, notes)
    return VolumeHeader((1,) * (4 - len(shape)) + shape[::-1], affine, notes=tuple(notes))


def _pixels(path: str) -> str:
    """The file that holds the voxels: `path`, or the one beside a header.

    Raises:
        RefusedInput: there is none beside the header.
    """
    if not path.lower().endswith(".hdr"):
        return path
    pixels = next((p for p in pixel_files(path) if Path(p).exists()), "")
    if not pixels:
        raise RefusedInput(path, expected="an .img or .img.gz file beside it", found="none")
    return pixels


def _parsed(
    path: str, source: "_Source", policy: ReadPolicy, notes: list[str]
) -> tuple[NiftiHeader, tuple[int, ...], Affine]:
    """The header, the shape (I, J, K) or (I, J, K, T) that the policy takes of it, and its affine."""
    header = parse_header(path, source.read(MOST_BYTES), pair=path.lower().endswith(".hdr"))
    notes += header.notes
    check_size(path, header.shape, policy)
    affine = geometry.check_affine(header.affine, path, header.unit_mm)
    return header, _four_d(path, header.shape, policy, notes), affine


class _Source:
    """Bytes of a plain or gzipped file, read no further than asked for.

    Args:
        most: Bytes of the file that are needed; all of them by default.
    """

    def __init__(self, path: str, most: int | None = None) -> None:
        self._path = path
        data = read_bytes(path, most)
        if data[:2] == b"\x1f\x8b":
            self._file: Any = _gzip_file(fileobj=io.BytesIO(data), mode="rb")
        elif path.lower().endswith(".gz"):
            raise RefusedInput(
                path,
                expected="a gzip file",
                found=glimpse(data),
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
        with memoryview(out) as view:  # by pieces: a gzip file's `readinto` makes a second copy of all that it reads
            while have < n and (piece := self._more(min(n - have, _PIECE))):
                view[have : have + len(piece)] = piece
                have += len(piece)
        if have < n:
            raise RefusedInput(
                self._path, expected=f"{n:,} bytes of voxels", found=f"{have:,}", remedy="the file is truncated"
            )
        while self._more(_PIECE):
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


def _four_d(path: str, shape: tuple[int, ...], policy: ReadPolicy, notes: list[str]) -> tuple[int, ...]:
    if len(shape) == 3:
        return shape
    # NIfTI keeps a vector's components in the fifth axis, behind an empty time axis
    series = math.prod(shape[3:])
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
    notes.append(series_note(series))
    return (*shape[:3], series)
