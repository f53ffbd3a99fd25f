"""Small scans in every format, made by the tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"


def phantom(shape_DHW: Sequence[int] = (10, 12, 14), seed: int = 0, level: float = 800) -> np.ndarray:
    """An off-centre bright ellipsoid with texture on dark noise: int16, no symmetry."""
    draw = np.random.default_rng(seed)
    z, y, x = (np.linspace(-1, 1, n).reshape([-1 if a == i else 1 for a in range(3)]) for i, n in enumerate(shape_DHW))
    inside = ((z - 0.1) / 0.8) ** 2 + ((y + 0.1) / 0.7) ** 2 + (x / 0.6) ** 2 < 1
    out = np.where(inside, level * (1 + 0.2 * x + 0.1 * y), 20) + draw.normal(0, 5, tuple(shape_DHW))
    return np.clip(out, 0, 32000).astype(np.int16)


def disc(shape_DHW: Sequence[int] = (10, 12, 14)) -> np.ndarray:
    """A label map with values 1 and 2."""
    out = np.zeros(tuple(shape_DHW), np.uint8)
    d, h, w = shape_DHW
    out[d // 4 : d // 2, h // 4 : h // 2, w // 4 : w // 2] = 1
    out[d // 2 : d // 2 + 2, h // 3 : h // 2, w // 3 : w // 2] = 2
    return out


def save_nifti(path: Path, array_DHW: np.ndarray, affine: np.ndarray | None = None, kind: Any = None) -> Path:
    """Write (D, H, W) or (C, D, H, W) as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save((kind or nib.Nifti1Image)(array_DHW.T, np.eye(4) if affine is None else affine), path)
    return path


def folder(root: Path, count: int = 4, labelled: bool = True, shape: Sequence[int] = (10, 12, 14)) -> Path:
    """`images/case_NN.nii.gz` and labels of `count` subjects."""
    for i in range(count):
        save_nifti(root / "images" / f"case_{i:02d}.nii.gz", phantom(shape, i))
        if labelled:
            save_nifti(root / "labels" / f"case_{i:02d}.nii.gz", disc(shape))
    return root


def slices(
    array_DHW: np.ndarray,
    positions_mm: Sequence[float] | None = None,
    *,
    shift_mm: float = 0.0,
    spacing: tuple[float, float] = (1.5, 0.75),
    slope: float = 1,
    intercept: float = -1024,
    modality: str = "CT",
    series: str = "",
    patient: str = "P1",
    **tags: Any,
) -> list[Dataset]:
    """One data set a slice, axial, LPS; `shift_mm` moves each slice along y, as a tilted gantry does."""
    series = series or generate_uid()
    study = generate_uid()
    out = []
    for k, plane in enumerate(array_DHW):
        z = float(k) * 2 if positions_mm is None else float(positions_mm[k])
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CT if modality == "CT" else MR
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.PatientID, ds.Modality = series, study, patient, modality
        ds.InstanceNumber = k + 1
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [-20, -30 + shift_mm * k, z]
        ds.PixelSpacing = list(spacing)
        ds.Rows, ds.Columns = plane.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, 0
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
        ds.PixelData = plane.astype("<u2").tobytes()
        for keyword, value in tags.items():
            setattr(ds, keyword, value)
        out.append(ds)
    return out


def save_dicom(root: Path, datasets: Sequence[Dataset], names: Sequence[str] | None = None) -> Path:
    """Write data sets as files, without extension unless named."""
    root.mkdir(parents=True, exist_ok=True)
    for k, ds in enumerate(datasets):
        pydicom.dcmwrite(root / (names[k] if names else f"IM{k:04d}"), ds, enforce_file_format=True)
    return root


def segmentation(reference: Sequence[Dataset], label_DHW: np.ndarray, names: Sequence[str] = ()) -> Dataset:
    """A binary DICOM segmentation of the slices, empty planes left out, segments and planes in reverse order.

    Args:
        names: Labels of the segments 1 and 2.
    """
    first = reference[0]
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SEG
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.PatientID = generate_uid(), first.StudyInstanceUID, first.PatientID
    ds.Modality, ds.SegmentationType = "SEG", "BINARY"
    referenced = Dataset()
    referenced.SeriesInstanceUID = first.SeriesInstanceUID
    ds.ReferencedSeriesSequence = DicomSequence([referenced])
    ds.SegmentSequence = DicomSequence([Dataset() for _ in names])
    for number, (segment, name) in enumerate(zip(ds.SegmentSequence, names, strict=True), 1):
        segment.SegmentNumber, segment.SegmentLabel = number, name
    orientation, shared = Dataset(), Dataset()
    orientation.ImageOrientationPatient = first.ImageOrientationPatient
    shared.PlaneOrientationSequence = DicomSequence([orientation])
    ds.SharedFunctionalGroupsSequence = DicomSequence([shared])
    planes, frames = [], []
    for value in (2, 1):
        for k in reversed(range(len(label_DHW))):
            plane = label_DHW[k] == value
            if not plane.any():
                continue
            frame, number, position = Dataset(), Dataset(), Dataset()
            number.ReferencedSegmentNumber = value
            position.ImagePositionPatient = reference[k].ImagePositionPatient
            frame.SegmentIdentificationSequence = DicomSequence([number])
            frame.PlanePositionSequence = DicomSequence([position])
            planes.append(plane)
            frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    ds.NumberOfFrames = len(frames)
    ds.Rows, ds.Columns = label_DHW.shape[1:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 1
    ds.HighBit, ds.PixelRepresentation = 0, 0
    bits = np.packbits(np.concatenate([plane.ravel() for plane in planes]), bitorder="little").tobytes()
    ds.PixelData = bits + b"\0" * (len(bits) % 2)
    return ds
