"""One DICOM file: opening it, and the values of its pixels.

Headers are read without pixels, and pixels once, when it is clear that they are needed. Uncompressed and run-length
coded pixels are decoded by pydicom, all others by GDCM, which comes with SimpleITK: a file has the same voxels wherever
it is read.
"""

import gzip
import logging
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from storage.errors import RefusedInput
from storage.ingest.readers.raw import Affine, Array

DAMAGED = (
    OSError,
    InvalidDicomError,
    BytesLengthException,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What pydicom raises on a damaged header, when it is read or, since values are parsed late, when one is asked for."""

SECONDARY_CAPTURES = UID("1.2.840.10008.5.1.4.1.1.7")
"""Storage of pictures that were made of something else, screenshots for one; multi-frame kinds begin so too."""

_PIXEL_TAGS = [
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "PixelData",
]


_GE = "GEMS_PARM_01"
_GE_MARK = 1e6
"""GE adds a multiple of it, 1e9, to some b-values, which are far smaller."""
_B_VALUES = ((0x0019, 0x0C, "SIEMENS MR HEADER"), (0x0043, 0x39, _GE), (0x2001, 0x03, "Philips Imaging DD 001"))
"""Group, element and creator of private b-values, as the vendors' conformance statements list them."""
_COMPONENTS = ((0x0043, 0x2F, _GE), (0x2005, 0x11, "Philips MR Imaging DD 001"))
"""The same of which part of a complex image, or which phase of a Dixon scan, an image shows."""
_GE_COMPONENTS = ("MAGNITUDE", "PHASE", "REAL", "IMAGINARY")


@dataclass(slots=True)
class Slice:
    """One image plane: where it lies (LPS mm), and where its pixels are.

    Args:
        header: The data set of its file, without pixels.
        groups: Where attributes of the plane are looked for, in this order: its functional groups, then `header`.
        decimals: Decimals that its position is written with, along x, y, z.
        rows, columns: Its size in pixels.
        corner: Row and column of its first pixel in the stored image, of which it is a part.
        along: Position along the common normal of the series, in mm.
        values: Rescaled pixels, once they are read.
    """

    path: str
    number: int
    frame: int
    header: Any
    groups: Sequence[Any]
    origin: Affine
    row: Affine  # direction of growing column index
    column: Affine  # direction of growing row index
    spacing: tuple[float, float]  # between rows, between columns
    slope: float
    intercept: float
    decimals: tuple[int, int, int]
    rows: int
    columns: int
    corner: tuple[int, int] = (0, 0)
    along: float = 0.0
    values: Array | None = None


def be_quiet() -> None:
    """Keep pydicom's warnings off the console and out of logs: they quote UIDs and values of headers."""
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
    warnings.filterwarnings("ignore", message="The DICOM readers are highly experimental")  # of nibabel, on import
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """The bytes of a file, unpacked where it is named `.gz`."""
    if str(path).lower().endswith(".gz"):
        with gzip.open(path) as file:
            yield file
    else:
        with Path(path).open("rb") as file:
            yield file


def read_header(path: str) -> Any:
    """The elements of a file without its pixels; private ones, which may be large, of a mosaic only: it needs them."""
    be_quiet()
    with opened(path) as file:
        dataset: Any = pydicom.dcmread(file, stop_before_pixels=True, force=True)
    if dataset.get("DiffusionBValue") is None and (b_value := _private_b_value(dataset)) is not None:
        dataset.DiffusionBValue = b_value
    if not dataset.get("ComplexImageComponent") and (component := _private_component(dataset)):
        dataset.ComplexImageComponent = component
    if not is_mosaic(dataset):
        drop_private(dataset)
    return dataset


def _private_b_value(dataset: Any) -> float | None:
    """The b-value in s/mm2 as Siemens, GE or Philips write it beside the standard; None where they do not."""
    for group, element, creator in _B_VALUES:
        try:
            value = dataset.private_block(group, creator)[element].value
            text = value.decode("ascii") if isinstance(value, bytes) else value
            number = float(text.strip("\0 ").split("\\")[0]) if isinstance(text, str) else float(np.ravel(text)[0])
        except DAMAGED:  # missing, or no number: then it tells nothing
            continue
        if 0 <= number < np.inf:
            return number % _GE_MARK if creator == _GE else number
    return None


def _private_component(dataset: Any) -> str:
    """What GE or Philips call the part of a complex image, or the phase of a Dixon scan; empty where they do not."""
    for group, element, creator in _COMPONENTS:
        try:
            value = dataset.private_block(group, creator)[element].value
            if creator != _GE:
                text = value.decode("ascii") if isinstance(value, bytes) else str(value)
                return text.strip("\0 ")[:16]
            raw = np.frombuffer(value, "<i2") if isinstance(value, bytes) else np.ravel(value)
            number = int(raw[0])
        except DAMAGED:  # missing, or no number: then it tells nothing
            continue
        return _GE_COMPONENTS[number] if 0 <= number < len(_GE_COMPONENTS) else f"KIND {number}"
    return ""


def is_mosaic(header: Any) -> bool:
    """Whether the planes of a volume lie side by side in one image, as Siemens writes them."""
    return "MOSAIC" in (header.get("ImageType") or [])


def drop_private(header: Any) -> None:
    """Delete the private elements of a header."""
    for tag in [tag for tag in tuple(header.keys()) if tag.is_private]:
        del header[tag]


def read_values(thing: str, planes: Sequence[Slice]) -> None:
    """Set the values of planes that have none yet, opening each file once; see `read_planes`."""
    files: dict[str, list[Slice]] = {}
    for s in planes:
        if s.values is None:
            files.setdefault(s.path, []).append(s)
    for own in files.values():
        read_planes(thing, own)


def values_of(s: Slice) -> Array:
    """The values that `read_values` read."""
    if s.values is None:
        raise RuntimeError("values are asked for before they are read")
    return s.values


def read_planes(thing: str, planes: Sequence[Slice]) -> None:
    """Set the values of planes of one file: int16 or int32 where slope and intercept are whole, else float32.

    Raises:
        RefusedInput: the pixels cannot be decoded, or are not as many as the header says.
    """
    first = planes[0]
    syntax: UID | None = None
    try:
        with opened(first.path) as file:
            dataset: Any = pydicom.dcmread(file, specific_tags=_PIXEL_TAGS, force=True)
        syntax = _transfer_syntax(dataset)
        array = _decode(dataset, syntax)
    except DAMAGED as error:
        raise RefusedInput(
            thing,
            expected="decodable pixels",
            found=f"{type(error).__name__} in file {first.number + 1} of the series, "
            f"{_name_of(syntax) if syntax else 'of unknown transfer syntax'}",
            remedy="the file is truncated or damaged, or compressed in a way that GDCM cannot read: export it "
            "uncompressed",
        ) from error
    size = (int(first.header.Rows), int(first.header.Columns))
    array = array[None] if array.ndim == 2 else array
    if array.shape[1:] != size or max(plane.frame for plane in planes) >= len(array):
        raise RefusedInput(
            thing,
            expected=f"pixels of {size[0]} rows and {size[1]} columns in file {first.number + 1} of the series",
            found=f"an array of {array.shape}",
            remedy="the file is damaged: export it again",
        )
    for plane in planes:
        top, left = plane.corner
        part = array[plane.frame][top : top + plane.rows, left : left + plane.columns]
        plane.values = _rescaled(part, plane.slope, plane.intercept)


def _transfer_syntax(dataset: Any) -> UID:
    """What the file's meta header says, or, where it has none, what its elements are written in.

    Raises:
        ValueError: there is no meta header, and the pixels are compressed.
    """
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        implicit, little = dataset.original_encoding
        if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
            raise ValueError("compressed, and nothing says how")
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = syntax
    return UID(syntax)


def _decode(dataset: Any, syntax: UID) -> Array:
    for keyword, value in (
        ("SamplesPerPixel", 1),
        ("PhotometricInterpretation", "MONOCHROME2"),
        ("BitsStored", dataset.get("BitsAllocated")),
    ):  # standard values of elements that some exports leave out; colour images were refused before
        if dataset.get(keyword) in (None, ""):
            setattr(dataset, keyword, value)
    if not syntax.is_encapsulated or syntax == RLELossless:
        array: Array = dataset.pixel_array
        return array
    return _decode_by_gdcm(dataset, syntax)


def _decode_by_gdcm(dataset: Any, syntax: UID) -> Array:
    """Decode a copy of the file that holds its pixels and their layout alone: no rescaling, and no text to leak."""
    import SimpleITK  # late, for it takes long and few files need it

    itk: Any = SimpleITK  # untyped
    bare = pydicom.Dataset()
    for element in dataset:
        bare.add(element)
    bare.PixelRepresentation = int(dataset.PixelRepresentation)  # signed or not: nothing else says it
    bare.HighBit = int(bare.BitsStored) - 1
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = syntax
    bare.SOPInstanceUID = bare.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    framed = int(dataset.get("NumberOfFrames") or 1) > 1
    kind = UID(f"{SECONDARY_CAPTURES}.3") if framed else SECONDARY_CAPTURES  # .3: 16 bits, many frames
    bare.SOPClassUID = bare.file_meta.MediaStorageSOPClassUID = kind
    itk.ProcessObject.SetGlobalWarningDisplay(False)  # its warnings quote the file
    with tempfile.TemporaryDirectory(prefix="tomoscale-") as folder:
        path = str(Path(folder, "pixels.dcm"))
        pydicom.dcmwrite(path, bare, enforce_file_format=True)
        reader = itk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(path)
        array: Array = itk.GetArrayFromImage(reader.Execute())
    return array


def _name_of(syntax: UID) -> str:
    return f"transfer syntax {syntax.name}" if syntax.is_transfer_syntax else "of unknown transfer syntax"


def _rescaled(plane: Array, slope: float, intercept: float) -> Array:
    exact = plane.dtype.kind in "iub" and slope == round(slope) and intercept == round(intercept)
    if exact and abs(slope) < 2**15 and abs(intercept) < 2**31:
        whole = plane.astype(np.int64) * int(slope) + int(intercept)
        low, high = whole.min(), whole.max()
        if low >= -(2**31) and high < 2**31:
            return whole.astype(np.int16 if low >= -32768 and high <= 32767 else np.int32)
    return (plane * np.float64(slope) + intercept).astype(np.float32)
