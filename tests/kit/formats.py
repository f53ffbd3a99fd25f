"""One small volume in every file format that ingest reads."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK
import zarr

from storage.format.volume import Volume
from storage.format.volume_writer import write_volume
from storage.objects import open_store
from tests.kit.dicom_files import mosaic
from tests.kit.scans import disc, save_dicom, save_nifti, segmentation, slices


def save_itk(path: Path, array_DHW: np.ndarray, affine: np.ndarray) -> Path:
    image = SimpleITK.GetImageFromArray(array_DHW)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(path))
    return path


def save_mgz(path: Path, array_DHW: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.freesurfer.MGHImage(array_DHW.T.astype(np.int16), affine), path)
    return path


def save_pair(path: Path, array_DHW: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Pair(array_DHW.T, affine), path)
    return path


def save_nifti2(path: Path, array_DHW: np.ndarray, affine: np.ndarray) -> Path:
    return save_nifti(path, array_DHW, affine, nib.Nifti2Image)


def save_big_endian(path: Path, array_DHW: np.ndarray, affine: np.ndarray) -> Path:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.dtype(">i2"))
    nib.save(nib.Nifti1Image(array_DHW.T, affine, header), path)
    return path


def save_ome_zarr(path: Path, array_DHW: np.ndarray, affine: np.ndarray) -> Path:
    store = open_store(str(path))
    write_volume(store, "v", Volume(array_DHW[None], spacing_mm=(1.25, 2.0, 1.5), affine=affine))
    (path / "volumes" / "v").rename(path.with_suffix(".made"))
    shutil.rmtree(path)
    path.with_suffix(".made").rename(path)
    return path


def save_zarr(path: Path, array_DHW: np.ndarray, affine: np.ndarray) -> Path:
    zarr.create_array(store=str(path), data=array_DHW, chunks=(4, 5, 6))
    return path


def save_series(path: Path, array_DHW: np.ndarray, affine: np.ndarray) -> Path:
    datasets = slices(array_DHW)
    save_dicom(path, datasets)
    save_dicom(path / "seg", [segmentation(datasets, disc(array_DHW.shape))])
    return path


def save_mosaic(path: Path, array_DHW: np.ndarray, affine: np.ndarray) -> Path:
    save_dicom(path, [mosaic(array_DHW, normal=(0, 0, 1), element=True)])
    return path
