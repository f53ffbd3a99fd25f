"""MGZ and MGH, FreeSurfer's volumes, through nibabel."""

from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.readers.raw import Array, RawVolume, ReadPolicy, check_size, last_line, pick_series, read_bytes
from storage.ingest.readers.reader import FileReader

_mgh: Any = nib.freesurfer  # untyped
_gunzip: Any = igzip.decompress
_gzip_error: Any = isal_zlib.error
_GZIP = b"\x1f\x8b"


def mgz_reader() -> FileReader:
    """The reader of the format."""
    return FileReader(read_mgz)


def read_mgz(path: str, policy: ReadPolicy) -> RawVolume:
    """Read one FreeSurfer volume.

    Raises:
        RefusedInput: names the file and what is wrong with it.
    """
    try:
        check_size(path, tuple(_mgh.MGHImage.from_filename(path).shape), policy)
        data = read_bytes(path)
        if data[:2] == _GZIP:  # to its end and so to its checksum, before which nibabel stops
            data = _gunzip(data)
        image: Any = _mgh.MGHImage.from_bytes(data)
        array: Array = np.asarray(image.dataobj)
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
    if array.ndim < 3:
        raise RefusedInput(path, expected="three axes", found=f"shape {array.shape}")
    notes: list[str] = []
    if data[28:30] == b"\0\0":  # a flag that nibabel sets where it is not
        notes.append("no valid geometry stored (goodRASFlag 0): 1 mm voxels and FreeSurfer's coronal axes assumed")
    array = array.T.reshape(-1, *array.shape[2::-1])
    series = len(array)
    if len(array) > 1:
        array = pick_series(path, array, policy, notes)
    affine = geometry.check_affine(np.asarray(image.affine, np.float64), path)
    return RawVolume(array, affine, f"nibabel/{nib.__version__}", notes=notes, series=series)
