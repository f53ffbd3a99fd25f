"""NRRD, MHA and MHD through SimpleITK; MGZ and MGH through nibabel."""

from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK

from storage import geometry
from storage.errors import RefusedInput
from storage.readers.raw import Affine, Array, RawVolume, ReadPolicy, check_size

_itk: Any = SimpleITK  # untyped
_mgh: Any = nib.freesurfer
READER = f"simpleitk/{_itk.Version.VersionString()}"
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_itk(path: str, policy: ReadPolicy) -> RawVolume:
    """Read one NRRD, NHDR, MHA or MHD file.

    Raises:
        RefusedInput: names the file and what is wrong with it.
    """
    reader = _itk.ImageFileReader()
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
        size = tuple(int(n) for n in reader.GetSize())
        check_size(path, (*size, int(reader.GetNumberOfComponents())), policy)
        image = reader.Execute()
    except RuntimeError as error:
        raise RefusedInput(
            path,
            expected="a readable NRRD or MetaImage volume",
            found=_reason(error),
            remedy="the file is truncated, damaged or another format",
        ) from error
    notes: list[str] = []
    if len(size) < 3:
        raise RefusedInput(path, expected="three axes", found=f"size {size}", remedy="a slice is no volume")
    array: Array = _itk.GetArrayFromImage(image)
    channels = image.GetNumberOfComponentsPerPixel()
    array = np.moveaxis(array, -1, 0) if channels > 1 else array[None]
    if len(size) > 3:
        array = array.reshape(-1, *array.shape[-3:])  # the slowest axis is the series
    if len(array) > 1:
        array = pick_series(path, array, policy, notes)
    affine = _affine(image)
    return RawVolume(array, geometry.check_affine(affine, path), READER, _modality(image), notes)


def read_mgz(path: str, policy: ReadPolicy) -> RawVolume:
    """Read one FreeSurfer volume.

    Raises:
        RefusedInput: names the file and what is wrong with it.
    """
    try:
        image: Any = _mgh.MGHImage.from_filename(path)
        check_size(path, tuple(image.shape), policy)
        array: Array = np.asarray(image.dataobj)
    except (
        OSError,
        ValueError,
        EOFError,
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
    ) as error:
        raise RefusedInput(
            path,
            expected="a readable MGH or MGZ volume",
            found=_reason(error),
            remedy="the file is truncated or damaged",
        ) from error
    if array.ndim < 3:
        raise RefusedInput(path, expected="three axes", found=f"shape {array.shape}")
    notes: list[str] = []
    array = array.T.reshape(-1, *array.shape[2::-1])
    if len(array) > 1:
        array = pick_series(path, array, policy, notes)
    affine = geometry.check_affine(np.asarray(image.affine, np.float64), path)
    return RawVolume(array, affine, f"nibabel/{nib.__version__}", notes=notes)


def pick_series(path: str, array_CDHW: Array, policy: ReadPolicy, notes: list[str]) -> Array:
    """Apply the policy for several volumes in one file."""
    series = len(array_CDHW)
    if policy.four_d == "refuse":
        raise RefusedInput(
            path,
            expected="one volume",
            found=f"a series of {series}, each of shape {array_CDHW.shape[1:]}",
            remedy="set four_d to first (take the first volume) or channels (take all as channels)",
        )
    if policy.four_d == "first":
        notes.append(f"first of {series} volumes")
        return array_CDHW[:1]
    notes.append(f"{series} volumes taken as channels")
    return array_CDHW


def _affine(image: Any) -> Affine:
    dimensions = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(dimensions, dimensions)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    matrix: Affine = _LPS_TO_RAS @ affine
    return matrix


def _modality(image: Any) -> str:
    value = image.GetMetaData("Modality").strip() if image.HasMetaDataKey("Modality") else ""
    known = {"MET_MOD_CT": "CT", "MET_MOD_MR": "MR", "MET_MOD_US": "US", "CT": "CT", "MR": "MR", "PT": "PT"}
    return known.get(value, "")


def _reason(error: BaseException) -> str:
    """The last line of a library's message, without the path of its own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text.rpartition("ERROR: ")[2][:200]
