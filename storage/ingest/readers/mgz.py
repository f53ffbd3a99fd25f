"""MGZ and MGH, FreeSurfer's volumes, through nibabel."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.readers.raw import (
    Array,
    RawVolume,
    ReadPolicy,
    VolumeHeader,
    channels_of_series,
    check_size,
    last_line,
    pick_series,
    read_bytes,
)
from storage.ingest.readers.reader import FileReader

_mgh: Any = nib.freesurfer  # untyped
_gunzip: Any = igzip.decompress
_gzip_error: Any = isal_zlib.error
_GZIP = b"\x1f\x8b"


def mgz_reader() -> FileReader:
    """The reader of the format."""
    return FileReader(read_mgz, header_of=read_mgz_header)


def read_mgz(path: str, policy: ReadPolicy) -> RawVolume:
    """Read one FreeSurfer volume.

    Raises:
        RefusedInput: names the file and what is wrong with it.
    """
    with _readable(path):
        _checked_header(path, policy)
        data = read_bytes(path)
        if data[:2] == _GZIP:  # to its end and so to its checksum, before which nibabel stops
            data = _gunzip(data)
        image: Any = _mgh.MGHImage.from_bytes(data)
        array: Array = np.asarray(image.dataobj)
    notes = _notes(data[28:30])
    array = array.T.reshape(-1, *array.shape[2::-1])
    series = len(array)
    array = pick_series(path, array, policy, notes)
    affine = geometry.check_affine(np.asarray(image.affine, np.float64), path)
    return RawVolume(array, affine, f"nibabel/{nib.__version__}", notes=notes, series=series)


def read_mgz_header(path: str, policy: ReadPolicy) -> VolumeHeader:
    """What `read_mgz` would return, from the header alone.

    Raises:
        RefusedInput: names the file and what is wrong with its header.
    """
    with _readable(path):
        image = _checked_header(path, policy)
        with (igzip.open if read_bytes(path, 2) == _GZIP else open)(path, "rb") as file:
            notes = _notes(file.read(30)[28:])
    shape = (math.prod(image.shape[3:]), *image.shape[2::-1])
    channels = channels_of_series(path, shape, policy, notes)
    affine = geometry.check_affine(np.asarray(image.affine, np.float64), path)
    return VolumeHeader((channels, *shape[1:]), affine, notes=tuple(notes))


def _checked_header(path: str, policy: ReadPolicy) -> Any:
    """nibabel's image of the file, no voxel of which is read."""
    image: Any = _mgh.MGHImage.from_filename(path)
    check_size(path, tuple(image.shape), policy)
    if len(image.shape) < 3:
        raise RefusedInput(path, expected="three axes", found=f"shape {image.shape}")
    return image


def _notes(flag: bytes) -> list[str]:
    if flag == b"\0\0":  # a flag that nibabel sets where it is not
        return ["no valid geometry stored (goodRASFlag 0): 1 mm voxels and FreeSurfer's coronal axes assumed"]
    return []


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Faults of the libraries as refusals that name the file."""
    try:
        yield
    except (
        OSError,
        ValueError,
        EOFError,
        _gzip_error,
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
        _mgh.mghformat.MGHError,  # no relative of any other
    ) as error:
        raise RefusedInput(
            path,
            expected="a readable MGH or MGZ volume",
            found=last_line(error),
            remedy="the file is truncated or damaged",
        ) from error
