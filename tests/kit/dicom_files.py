"""DICOM as scanners and exports write it: multi-frame objects, compressed series, Siemens mosaics."""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import generate_uid

from storage.errors import RefusedInput
from storage.ingest.readers.raw import RawVolume, ReadPolicy
from storage.ingest.readers.read import read_any
from tests.kit.scans import save_dicom, slices


def read(root: Path, datasets: Sequence[Dataset], policy: ReadPolicy | None = None) -> RawVolume:
    """Write data sets and read them as one series."""
    save_dicom(root, datasets)
    return read_any(str(root), policy)


def refusal(root: Path, datasets: Sequence[Dataset], policy: ReadPolicy | None = None) -> RefusedInput:
    """The error of reading them, which says what was expected and what was found."""
    with pytest.raises(RefusedInput) as refused:
        read(root, datasets, policy)
    assert refused.value.expected
    assert refused.value.found
    return refused.value


def compressed(root: Path, array_DHW: np.ndarray, compressor: str) -> list[Path]:
    """A CT series that GDCM writes, of signed values."""
    root.mkdir(parents=True)
    series = generate_uid()
    paths = []
    for k, plane in enumerate(array_DHW):
        image = SimpleITK.GetImageFromArray(plane[None])
        tags = {"0008|0060": "CT", "0020|000e": series, "0020|000d": "1.2.3", "0010|0020": "P", "0028|1053": "1"}
        tags |= {"0020|0032": f"-10\\-12\\{2 * k}", "0020|0037": "1\\0\\0\\0\\1\\0", "0028|0030": "1.5\\0.75"}
        tags |= {"0008|0018": generate_uid(), "0028|1052": "0"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = SimpleITK.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        paths.append(root / f"{k}.dcm")
        writer.SetFileName(str(paths[-1]))
        writer.Execute(image)
    return paths


def framed(
    datasets: Sequence[Dataset],
    content: Callable[[Dataset], Dataset] = lambda one: Dataset(),
    pointers: Sequence[str] = (),
) -> Dataset:
    """One multi-frame object of these images, each frame's own groups made by `content`.

    Args:
        pointers: What the dimension indices of its frames point to; a private attribute where empty.
    """
    ds = datasets[0]
    frames = []
    for one in datasets:
        frame, position = content(one), Dataset()
        position.ImagePositionPatient = one.ImagePositionPatient
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient, measures.PixelSpacing = ds.ImageOrientationPatient, ds.PixelSpacing
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    if pointers:
        ds.DimensionIndexSequence = []
    for keyword in pointers:
        item = Dataset()
        item.DimensionIndexPointer = Tag(keyword) if keyword else 0x00211001
        ds.DimensionIndexSequence.append(item)
    ds.PixelData = b"".join(one.PixelData for one in datasets)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], frames
    ds.NumberOfFrames = len(frames)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(ds, keyword)
    return ds


def csa_header(values: Mapping[str, tuple[str, Sequence[object]]]) -> bytes:
    """Siemens' CSA header of type 2: of each name its type (such as IS) and values, which are written as text."""
    out = b"SV10" + bytes([4, 3, 2, 1]) + struct.pack("<II", len(values), 77)
    for name, (kind, items) in values.items():
        texts = [f"{item}".encode() + b"\0" for item in items]
        count = max(len(texts), 6)
        out += struct.pack("<64si4siii", name.encode(), len(texts), kind.encode(), 0, count, 77)
        for text in [*texts, *[b""] * (count - len(texts))]:
            out += struct.pack("<4i", len(text), len(text), 77, len(text)) + text + bytes(-len(text) % 4)
    return out


def mosaic(
    array_DHW: np.ndarray,
    *,
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    gap_mm: float = 2.5,
    normal: Sequence[float] | None = None,
    count: bool = True,
    element: bool = False,
    **tags: Any,
) -> Dataset:
    """A volume as Siemens writes echo-planar images: its slices side by side in one image, row by row.

    Args:
        normal: The direction in which slices follow, as the CSA header says it.
        count: Whether the CSA header says how many slices there are.
        element: Whether the private element (0019,100A) says it.
    """
    depth, rows, columns = array_DHW.shape
    edge = math.ceil(math.sqrt(depth))
    tiles = np.zeros((edge * edge, rows, columns), array_DHW.dtype)
    tiles[:depth] = array_DHW
    plane = tiles.reshape(edge, edge, rows, columns).transpose(0, 2, 1, 3).reshape(edge * rows, edge * columns)
    (ds,) = slices(plane[None], [-7.5], modality="MR", intercept=0, slope=1)
    ds.StudyInstanceUID, ds.ImageType = "1.2.3", ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    ds.ImageOrientationPatient, ds.SpacingBetweenSlices, ds.SliceThickness = list(orientation), gap_mm, gap_mm - 0.5
    ds.AcquisitionMatrix = [rows, 0, 0, columns]
    values: dict[str, tuple[str, Sequence[object]]] = {}
    if count:
        values["NumberOfImagesInMosaic"] = ("US", [depth])
    if normal is not None:
        values["SliceNormalVector"] = ("FD", [f"{x:.8f}" for x in normal])
    if values:
        block = ds.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        block.add_new(0x10, "OB", csa_header(values))
    if element:
        ds.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", depth)
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds
