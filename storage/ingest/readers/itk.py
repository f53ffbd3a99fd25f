"""NRRD, MHA and MHD through SimpleITK.

What SimpleITK passes over in silence is looked up here: units of length, lengths that are not stored, checksums, and
whether there are as many files as slices.
"""

import fnmatch
import math
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from isal import isal_zlib

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.readers.raw import (
    Affine,
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

_itk: Any = SimpleITK  # untyped
_inflate: Any = isal_zlib.decompressobj
_gzip_error: Any = isal_zlib.error
READER = f"simpleitk/{_itk.Version.VersionString()}"
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_TO_RAS = {
    "left-posterior-superior": _LPS_TO_RAS,  # to which SimpleITK converts the others of three axes
    "left-posterior-superior-time": _LPS_TO_RAS,
    "right-anterior-superior-time": np.eye(4),
    "left-anterior-superior-time": np.diag([-1.0, 1.0, 1.0, 1.0]),
}
_TO_MM = {"m": 1e3, "cm": 10.0, "mm": 1.0, "um": 1e-3, "nm": 1e-6}
_TO_MM |= {"meter": 1e3, "centimeter": 10.0, "millimeter": 1.0, "micrometer": 1e-3, "micron": 1e-3, "nanometer": 1e-6}
_NAMED_FILE = re.compile(rb"^\s*(?:ElementDataFile\s*=|data ?file\s*:)\s*(.*?)\s*$", re.IGNORECASE | re.MULTILINE)
_HEADER_BYTES = 1 << 16
_AT_ONCE = 1 << 20
_UNITS = re.compile(r"^(space units|units)\s*:(.*)$|^\s*(DistanceUnits)\s*=(.*)$", re.MULTILINE)
_COMPRESSED = re.compile(r"^\s*CompressedData\s*=\s*[Tt1]", re.MULTILINE)
_NRRD_GZIP = re.compile(r"^encoding\s*:\s*gz(?:ip)?\s*$", re.MULTILINE | re.IGNORECASE)
_NRRD_FILE = re.compile(r"^data ?file\s*:(.*)$", re.MULTILINE | re.IGNORECASE)
_GZIP = b"\x1f\x8b"
_BIG_ENDIAN = re.compile(r"^\s*(?:BinaryData|Element)ByteOrderMSB\s*=\s*[Tt1]", re.MULTILINE)
_DATA_FILE = re.compile(rb"^\s*ElementDataFile\s*=[ \t]*(.*?)[ \t\r]*(?:\n|\Z)", re.MULTILINE)
_DIMENSIONS = re.compile(r"NDims[\s=:]*([^\s=:]*)")
_LENGTHS = re.compile(r"^(?:spacings|space directions)\s*:|^\s*Element(?:Spacing|Size)\s*=", re.MULTILINE)

_SPACINGS = re.compile(r"^spacings\s*:(.*)$", re.MULTILINE)
_SLOPE = re.compile(r"^\s*ElementToIntensityFunctionSlope\s*=\s*([-+.\deE]+)\s*$", re.MULTILINE)


def itk_reader() -> FileReader:
    """The reader of the formats."""
    return FileReader(read_itk, parts_of=pixel_files, header_of=read_itk_header)


def pixel_files(path: str) -> list[str]:
    """The pixel files that a detached header names, or implies by its own name."""
    stem, _, suffix = path.rpartition(".")
    if suffix.lower() not in ("mhd", "nhdr"):
        return []
    return [*(f"{stem}.{end}" for end in ("raw", "zraw", "raw.gz", "img")), *_named_files(Path(path))]


def read_itk(path: str, policy: ReadPolicy) -> RawVolume:
    """Read one NRRD, NHDR, MHA or MHD file.

    Raises:
        RefusedInput: names the file and what is wrong with it.
    """
    with _readable(path):
        reader, size, parts = _opened(path, policy)
        image = reader.Execute()
    notes: list[str] = []
    array: Array = _itk.GetArrayFromImage(image)
    if any(Path(part).stat().st_size * len(parts) < array.nbytes for part in parts):
        raise RefusedInput(
            path, expected=f"{len(parts)} files of voxels", found="a shorter one", remedy="a file is truncated"
        )
    header = _header(path)
    if _COMPRESSED.search(header):
        shape, dtype = array.shape, array.dtype
        del array  # as large as what takes its place
        array = _inflated(path, header, shape, dtype)
    elif _NRRD_GZIP.search(header):
        _check_packed(path, header, array.nbytes)
    channels = image.GetNumberOfComponentsPerPixel()
    array = np.moveaxis(array, -1, 0) if channels > 1 else array[None]
    if len(size) > 3:
        array = array.reshape(-1, *array.shape[-3:])  # the slowest axis is the series
    series = len(array)
    array = pick_series(path, array, policy, notes)
    unit_mm = _unit_mm(path, header, notes)
    affine = geometry.check_affine(_affine(header, image, unit_mm, notes), path, unit_mm)
    return RawVolume(array, affine, READER, _modality(image), notes, series=series)


def read_itk_header(path: str, policy: ReadPolicy) -> VolumeHeader:
    """What `read_itk` would return, from the header alone.

    Raises:
        RefusedInput: names the file and what is wrong with its header.
    """
    with _readable(path):
        image, size, _ = _opened(path, policy)
    notes: list[str] = []
    header = _header(path)
    components = int(image.GetNumberOfComponents())
    shape = (components if components > 1 else math.prod(size[3:]), *size[2::-1])
    channels = channels_of_series(path, shape, policy, notes)
    unit_mm = _unit_mm(path, header, notes)
    affine = geometry.check_affine(_affine(header, image, unit_mm, notes), path, unit_mm)
    return VolumeHeader((channels, *shape[1:]), affine, _modality(image), tuple(notes))


def _opened(path: str, policy: ReadPolicy) -> tuple[Any, tuple[int, ...], list[str]]:
    """ITK's reader after it read the header, the size (i, j, k, ...), and the files of voxels that the header lists."""
    _check_dimensions(path)
    reader = _itk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    size = tuple(int(n) for n in reader.GetSize())
    check_size(path, (*size, int(reader.GetNumberOfComponents())), policy)
    if len(size) < 3:
        raise RefusedInput(path, expected="three axes", found=f"size {size}", remedy="a slice is no volume")
    return reader, size, _parts(path, size)


def _check_dimensions(path: str) -> None:
    """Refuse a MetaImage header whose number of dimensions is none: with -1 or 100 its own code ends the process.

    Raises:
        RefusedInput: another number than 1 to 10.
    """
    header = _header(path)
    strange = [text for text in _DIMENSIONS.findall(header) if not re.fullmatch("[1-9]|10", text)]
    if strange and not header.startswith("NRRD"):
        raise RefusedInput(
            path,
            expected="NDims from 1 to 10",
            found=ascii(strange[0])[:40],
            remedy="the header is damaged; write the file again",
        )


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """ITK's faults as refusals that name the file."""
    try:
        yield
    except RuntimeError as error:
        raise RefusedInput(
            path,
            expected="a readable NRRD or MetaImage volume",
            found=last_line(error),
            remedy="the file is truncated, damaged or another format",
        ) from error


def _affine(header: str, image: Any, unit_mm: float, notes: list[str]) -> Affine:
    dimensions = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(dimensions, dimensions)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    affine[:3] *= unit_mm
    if not _LENGTHS.search(header):
        notes.append("no voxel sizes stored: 1 mm assumed")
    elif re.search(r"\bnan\b", " ".join(_SPACINGS.findall(header)), re.IGNORECASE):
        notes.append("no voxel size stored along an axis: 1 mm assumed")
    if any(float(slope) != 1 for slope in _SLOPE.findall(header)):
        notes.append("ElementToIntensityFunctionSlope is not applied: values are as stored")
    space = image.GetMetaData("NRRD_space") if image.HasMetaDataKey("NRRD_space") else ""
    if header.startswith("NRRD") and space not in _TO_RAS:
        notes.append(f"{f'space {space!r}' if space else 'no space'} in the header: axes taken as to left, back and up")
    matrix: Affine = _TO_RAS.get(space, _LPS_TO_RAS) @ affine
    return matrix


def _parts(path: str, size: tuple[int, ...]) -> list[str]:
    """The files that a MetaImage lists, or names by a pattern and numbers; none where its voxels are in one.

    Where there are fewer than it has slices, its own code returns memory that nobody wrote, or ends the process.

    Raises:
        RefusedInput: not as many as the size needs.
    """
    with Path(path).open("rb") as file:
        data = file.read(1 << 20)
    match = None if data.startswith(b"NRRD") else _DATA_FILE.search(data)
    words = match[1].decode("utf-8", "surrogateescape").split() if match else []
    if match is None or not words or (words[0].upper() != "LIST" and "%" not in words[0]):
        return []
    names: list[str] = []
    axes = len(size) - 1  # of a file
    with suppress(ValueError, TypeError):  # then there are none
        if words[0].upper() == "LIST":
            lines = data[match.end() :].decode("utf-8", "surrogateescape").splitlines()
            names = [line.strip() for line in lines if line.strip()]
            axes = int(words[1]) if len(words) > 1 else axes
        else:
            numbers = [int(word) for word in words[1:]] or [1]
            first, last, step = numbers if len(numbers) > 1 else (numbers[0], numbers[0] + size[-1] - 1, 1)
            names = [words[0] % number for number in range(first, last + 1, step)]
    if len(names) != math.prod(size[axes:]):
        raise RefusedInput(
            path,
            expected=f"{math.prod(size[axes:])} files of voxels for the size {size}",
            found=f"{len(names)} by the header",
            remedy="correct the header: LIST and all names, or a pattern with its first number, last number and step",
        )
    return [str(Path(path).parent / name) for name in names]


def _inflated(path: str, header: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The voxels of a compressed MetaImage, whose own code returns anything where a size or a checksum is not right."""
    size = math.prod(shape) * dtype.itemsize
    packed = memoryview(read_bytes(path))
    match = _DATA_FILE.search(packed, len(header.encode("utf-8", "surrogateescape")))
    name = match[1].decode("utf-8", "surrogateescape") if match else ""
    if match is None or name.split(" ")[0].upper() == "LIST" or "%" in name:
        raise RefusedInput(
            path, expected="compressed voxels in one file", found="several", remedy="write it again as one .mha file"
        )
    packed = packed[match.end() :] if name.upper() == "LOCAL" else memoryview(read_bytes(str(Path(path).parent / name)))
    voxels = bytearray()
    for block in _unpacked(path, packed, size):
        voxels += block
    if len(voxels) != size:
        raise RefusedInput(
            path,
            expected=f"{size:,} bytes of voxels behind the compression",
            found=f"{len(voxels):,}",
            remedy="the file is truncated or damaged",
        )
    order = dtype.newbyteorder(">") if _BIG_ENDIAN.search(header) else dtype.newbyteorder("<")
    return np.frombuffer(voxels, order).reshape(shape)


def _check_packed(path: str, header: str, size: int) -> None:
    """Undo the compression of a NRRD again, to its checksum, before which its library may stop."""
    file_match = _NRRD_FILE.search(header)
    files = [file_match[1].strip()] if file_match else []
    if files and (files[0].upper().startswith("LIST") or "%" in files[0]):
        raise RefusedInput(
            path, expected="compressed voxels in one file", found="several", remedy="write it again as one .nrrd file"
        )
    whole = read_bytes(str(Path(path).parent / files[0]) if files else path)
    start = 0 if files else whole.find(_GZIP, len(header.encode("utf-8", "surrogateescape")))
    for _ in _unpacked(path, memoryview(whole)[max(start, 0) :], size + _HEADER_BYTES):
        pass


def _unpacked(path: str, packed: memoryview, most: int) -> Iterator[bytes]:
    """What a zlib or gzip stream of not many more than `most` bytes holds; at its end its checksum was compared."""
    unpacked = 0
    try:
        stream = _inflate(31 if bytes(packed[:2]) == _GZIP else 15)
        for at in range(0, len(packed), _AT_ONCE):
            block: bytes = stream.decompress(packed[at : at + _AT_ONCE])
            unpacked += len(block)
            yield block
            if stream.eof or unpacked > most:
                break
        whole = bool(stream.eof)
    except (zlib.error, _gzip_error):
        whole = False
    if not whole:
        raise RefusedInput(
            path,
            expected=f"{most:,} bytes of voxels behind the compression, and their checksum",
            found=f"{unpacked:,}, or another checksum",
            remedy="the file is truncated or damaged",
        )


def _header(path: str) -> str:
    """The text before the voxels of a NRRD or MetaImage file."""
    with Path(path).open("rb") as file:
        text = file.read(_HEADER_BYTES).decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    return text.partition("\n\n" if text.startswith("NRRD") else "ElementDataFile")[0]


def _unit_mm(path: str, header: str, notes: list[str]) -> float:
    """Millimetres in the unit of the header's lengths; 1 where it names none."""
    units = set()
    for space, space_units, _, distance in _UNITS.findall(header):
        for text in re.findall(r'"([^"]*)"', space_units) if space else [distance]:
            unit = re.sub("[\xb5\u03bc\udcb5]", "u", text.strip().lower()).replace("metre", "meter")
            unit = unit.removesuffix("s") if len(unit) > 3 else unit  # microns, but no ms
            if unit in _TO_MM or (space != "units" and unit not in ("", "?")):  # `units` are of other axes too
                units.add(unit)
    if not units <= {*_TO_MM} or len({_TO_MM[unit] for unit in units}) > 1:
        raise RefusedInput(
            path,
            expected=f"one unit of length among {', '.join(_TO_MM)}",
            found=ascii(", ".join(sorted(units))),
            remedy="correct the header's units",
        )
    scale = _TO_MM[units.pop()] if units else 1.0
    if scale != 1:
        notes.append(f"lengths converted to mm from a unit of {scale:g} mm")
    return scale


def _modality(image: Any) -> str:
    value = image.GetMetaData("Modality").strip() if image.HasMetaDataKey("Modality") else ""
    modalities = {"MET_MOD_CT": "CT", "MET_MOD_MR": "MR", "MET_MOD_US": "US", "CT": "CT", "MR": "MR", "PT": "PT"}
    return modalities.get(value, "")


def _named_files(header: Path) -> list[str]:
    """Files that a MetaImage or NRRD header takes its voxels from, which may be called anything."""
    try:
        text = header.read_bytes()[: 1 << 20]
    except OSError as error:
        raise RefusedInput(str(header), expected="a readable file", found=error.strerror or "none") from error
    match = _NAMED_FILE.search(text)
    if match is None:
        return []
    value = match[1].decode("utf-8", "replace")
    if value.upper().startswith("LIST"):
        names = text[match.end() :].decode("utf-8", "replace").splitlines()
        return [os.path.join(header.parent, name.strip()) for name in names if name.strip()]
    if "%" in value:  # a numbered series, as in `slice%03d.raw 1 20 1`: every file that it could mean
        folder, pattern = os.path.split(os.path.join(header.parent, value.split(" ")[0]))
        if os.path.isdir(folder):
            names = fnmatch.filter(sorted(os.listdir(folder)), re.sub(r"%\d*[a-z]", "*", pattern))
            return [os.path.join(folder, name) for name in names]
    return [os.path.join(header.parent, value)]
