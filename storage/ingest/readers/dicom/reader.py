"""DICOM series: slices ordered by where they lie, in Hounsfield units or stored values, never stacked blindly.

Each image (or frame of a multi-frame object) says where its first pixel lies and how its rows and columns run. From
that, and not from instance numbers or file names, follow the order, the gaps and the tilt:

- a Siemens mosaic: split into its slices, a series of mosaics is one in time;
- slices of other size or direction than most: refused; a localiser does not belong to a volume;
- slices of several acquisitions, which another echo time, kernel or frame of reference tells: refused;
- the same slice twice: one is dropped with a note; different images at each position are told apart by their headers
  and taken by the policy `four_d`, or refused where the headers do not tell;
- uneven gaps or missing slices: refused, or interpolated onto even gaps (`gaps`, never beyond `max_gap_mm`);
- positions that drift sideways, as with a tilted gantry: resampled onto a straight grid, or refused (`tilt`).

All of this is decided by headers. Pixels are read once, after it. Positions: DICOM PS3.3 C.7.6.2.1.1 (Image Plane);
frames: C.7.6.16 (Multi-frame Functional Groups).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import BytesLengthException

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.deidentify import allowed_facts
from storage.ingest.readers.dicom.dimensions import attributes
from storage.ingest.readers.dicom.file import (
    DAMAGED,
    SECONDARY_CAPTURES,
    Slice,
    is_mosaic,
    read_header,
    read_values,
    values_of,
)
from storage.ingest.readers.dicom.grid import at_positions, decimals, on_grid
from storage.ingest.readers.dicom.mosaic import split
from storage.ingest.readers.dicom.seg import read_segmentation
from storage.ingest.readers.dicom.series import discover_dicom
from storage.ingest.readers.raw import Array, RawVolume, ReadPolicy, VolumeHeader, check_size
from storage.ingest.readers.reader import Grouping

READER = f"pydicom/{pydicom.__version__}"
MODALITIES = ("CT", "MR", "PT", "US", "NM")
_MOST_KINDS = 20
_WHOLE = 0.02
"""How far the gap may be off a multiple of the one that the header says."""


class DicomReader:
    """See `Reader`. One volume a series, told by its files' content; segmentations are its label maps."""

    def group(self, files: list[Path], top: Path) -> Grouping:
        """See `discover_dicom`."""
        return discover_dicom(files, top)

    def parts(self, path: str) -> list[str]:
        """A slice is whole."""
        return []

    def labels_inside(self, path: str) -> list[str]:
        """A series holds none."""
        return []

    def read(self, files: Sequence[str], policy: ReadPolicy, thing: str) -> RawVolume:
        """See `read_series`."""
        return read_series(files, policy, thing)

    def header(self, files: Sequence[str], policy: ReadPolicy, thing: str) -> VolumeHeader:
        """See `read_series`: every file's header is read, and its pixels only where copies have to be told apart."""
        raw = read_series(files, policy, thing, pixels=False)
        return VolumeHeader(raw.shape_CDHW, raw.affine, raw.modality, tuple(raw.notes))

    def read_label(self, path: str, policy: ReadPolicy, image: RawVolume) -> RawVolume:
        """See `read_segmentation`."""
        return read_segmentation(path, image)


def read_series(files: Sequence[str], policy: ReadPolicy, thing: str, *, pixels: bool = True) -> RawVolume:
    """Read the files of one series as a volume.

    Args:
        pixels: Whether its values are wanted; without, all are 0.

    Raises:
        RefusedInput: names the series by `thing` and says what is wrong and which series it is; quotes no header text.
    """
    headers: list[Any] = []
    try:
        return _read_series(files, policy, thing, headers, pixels)
    except BytesLengthException as error:  # no relative of any other error; others are caught where they say more
        raise RefusedInput(
            thing,
            expected="headers whose values have their type's length",
            found="one that has not",
            remedy=f"a file of the series is damaged: export it again{_which(headers, len(files))}",
        ) from error
    except RefusedInput as error:
        raise RefusedInput(
            thing,
            expected=error.expected,
            found=error.found,
            remedy=f"{error.remedy}{_which(headers, len(files))}",
        ) from error


def _which(headers: Sequence[Any], files: int) -> str:
    """By what the owner of the data finds a refused series: numbers and codes that name nobody."""
    if not headers:
        return ""
    header = headers[0]
    parts = []
    try:
        number, modality = header.get("SeriesNumber"), str(header.get("Modality") or "")
        if number is not None and 0 <= int(number) < 100_000:  # longer ones may be dates or accession numbers
            parts.append(f"number {int(number)}")
        parts += [modality] if modality in (*MODALITIES, "CR", "DX", "MG", "XA", "RF", "OT", "SC") else []
        parts.append(f"{int(header.Rows)}x{int(header.Columns)} pixels")
        parts.append(f"of {'x'.join(f'{float(mm):.2f}' for mm in header.PixelSpacing)} mm")
    except (*DAMAGED, BytesLengthException):
        pass  # what a damaged header still says is enough
    return f"; series: {' '.join([*parts, f'in {files} files'])}"


def _read_series(files: Sequence[str], policy: ReadPolicy, thing: str, headers: list[Any], pixels: bool) -> RawVolume:
    slices: list[Slice] = []
    notes: list[str] = []
    for number, path in enumerate(files):
        slices += _slices(path, number, thing, headers, notes)
        if policy.four_d != "first":  # before all are read: what they hold will be in memory
            check_size(thing, (len(slices), slices[0].rows, slices[0].columns), policy)
    first = slices[0].header
    patients = {str(s.header.get("PatientID") or "").strip() for s in slices} - {""}
    if len(patients) > 1:
        raise RefusedInput(
            thing,
            expected="slices of one patient",
            found=f"{len(patients)} patient ids under one series",
            remedy="ids were changed in part, or one series id was given to several patients: anonymise it again",
        )
    notes = list(dict.fromkeys(notes))
    _check_one_direction(thing, slices)
    normal = np.cross(slices[0].row, slices[0].column)
    for s in slices:
        s.along = float(s.origin @ normal)
    slices.sort(key=lambda s: (s.along, s.number, s.frame))
    facts = attributes(slices)
    places = at_positions(thing, slices, facts, policy, notes)
    channels = len(places[0])
    if len(places) < 2:
        raise RefusedInput(thing, expected="at least two slices", found="one", remedy="a slice is no volume")
    shape = (channels, len(places), slices[0].rows, slices[0].columns)
    check_size(thing, shape, policy)
    used = [s for place in places for s in place]
    volume: Array = np.broadcast_to(np.float32(0), shape)
    if pixels:
        read_values(thing, used)
        volume = np.stack([np.stack([values_of(place[c]) for place in places]) for c in range(channels)])
    for s in slices:
        s.values = None  # in the volume now
    volume, affine = on_grid(thing, volume, [place[0] for place in places], normal, policy, notes)
    notes += _thinned(first, geometry.spacing_dhw(affine)[0])
    modality = str(first.get("Modality") or "")
    own = allowed_facts(first)
    own.pop("Modality", None)
    modality = modality if modality in MODALITIES else ""
    if any(str(s.header.get("BurnedInAnnotation") or "") == "YES" for s in used):
        notes.append("the pixels may show identifying text: BurnedInAnnotation is YES")
    if any((s.slope, s.intercept) != (slices[0].slope, slices[0].intercept) for s in used):
        notes.append("rescale slope and intercept differ between slices and were applied slice by slice")
    if not str(first.get("SeriesInstanceUID") or ""):
        notes.append("files without a series id: those of one folder, study and series number taken as one series")
    return RawVolume(volume, geometry.check_affine(affine, thing), READER, modality, notes, own)


def _thinned(header: Any, gap_mm: float) -> list[str]:
    """A note where the header says that slices lie so close that every second one, or more of them, is not there."""
    try:
        stated_mm = abs(float(header.get("SpacingBetweenSlices") or 0))
    except DAMAGED:
        return []
    times = round(gap_mm / stated_mm) if stated_mm > 0 else 0
    if times < 2 or abs(gap_mm / stated_mm - times) > _WHOLE:
        return []
    return [
        f"slices lie {gap_mm:g} mm apart and the header says {stated_mm:g} mm: one of {times} may be all that is left"
    ]


def _slices(path: str, number: int, thing: str, headers: list[Any], notes: list[str]) -> list[Slice]:
    """The planes of one file, whose header is added to `headers`."""
    try:
        header = read_header(path)
        headers.append(header)
        _check_pixels(thing, header)
        framed = _is_framed(header)
        planes = _frames(header) if framed else [(0, [header])]
        if framed and int(header.get("NumberOfFrames") or 1) != len(planes):
            raise RefusedInput(
                thing,
                expected="a position for each frame",
                found=f"{len(planes)} for {header.get('NumberOfFrames')} frames",
                remedy="the file is damaged: export it again",
            )
        out = []
        for frame, groups in planes:
            direction = np.array([float(x) for x in _find(groups, "ImageOrientationPatient")])
            spacing = [float(x) for x in _find(groups, "PixelSpacing")]
            slope, intercept = float(_find(groups, "RescaleSlope", 1.0)), float(_find(groups, "RescaleIntercept", 0.0))
            position = _find(groups, "ImagePositionPatient")
            origin = np.array([float(x) for x in position])
            numbers = [*origin, *direction, *spacing, slope, intercept, int(header.Rows), int(header.Columns)]
            if not np.isfinite(numbers).all() or min(spacing) <= 0 or slope == 0:
                raise ValueError("no place or no values")  # later on, comparisons with NaN would find nothing wrong
            out.append(
                Slice(
                    path,
                    number,
                    frame,
                    header,
                    groups,
                    origin,
                    direction[:3] / np.linalg.norm(direction[:3]),
                    direction[3:] / np.linalg.norm(direction[3:]),
                    (spacing[0], spacing[1]),
                    slope,
                    intercept,
                    (decimals(position[0]), decimals(position[1]), decimals(position[2])),
                    int(header.Rows),
                    int(header.Columns),
                )
            )
    except DAMAGED as error:
        raise RefusedInput(
            thing,
            expected="images with position, orientation and pixel spacing",
            found=f"file {number + 1} of the series without one of them, or damaged ({type(error).__name__})",
            remedy="export the series again, as image slices of one scan",
        ) from error
    return split(thing, out[0], notes) if is_mosaic(header) else out


def _check_pixels(thing: str, header: Any) -> None:
    """Refuse images whose pixels are not intensities of one plane each."""
    if "ImagePositionPatient" not in header and str(header.get("SOPClassUID") or "").startswith(SECONDARY_CAPTURES):
        raise RefusedInput(
            thing,
            expected="image slices of a scan",
            found="secondary captures, such as screenshots, which have no position",
            remedy="leave them out: they are no volume",
        )
    if is_mosaic(header) and _is_framed(header):
        raise RefusedInput(
            thing,
            expected="one plane a frame, or one mosaic an image",
            found="several mosaics in one image",
            remedy="convert the series to NIfTI with dcm2niix",
        )
    meaning = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
    if int(header.get("SamplesPerPixel") or 1) != 1 or not meaning.startswith("MONOCHROME"):
        raise RefusedInput(thing, expected="one value a pixel", found="colour images")
    stored, high = header.get("BitsStored"), header.get("HighBit")
    if stored is not None and high is not None and int(high) != int(stored) - 1:
        raise RefusedInput(
            thing,
            expected="values in the lowest bits",
            found=f"{int(stored)} bits of which the highest is number {int(high)}",
            remedy="convert the series with a tool that reads such files",
        )
    if "ModalityLUTSequence" in header:
        raise RefusedInput(
            thing,
            expected="values rescaled by slope and intercept",
            found="a modality look-up table",
            remedy="apply it in another tool and export the series again",
        )


def _is_framed(header: Any) -> bool:
    return int(header.get("NumberOfFrames") or 1) > 1 or "PerFrameFunctionalGroupsSequence" in header


def _frames(header: Any) -> list[tuple[int, list[Any]]]:
    """Per frame, where its attributes may be found: own group, shared group, the object itself."""
    shared = header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    frames = header.get("PerFrameFunctionalGroupsSequence")
    if not frames:
        raise KeyError("PerFrameFunctionalGroupsSequence")
    return [(i, [frame, shared[0], header]) for i, frame in enumerate(frames)]


def _find(groups: Sequence[Any], keyword: str, default: Any = None) -> Any:
    for group in groups:
        if (value := group.get(keyword)) is not None:
            return value
        if len(groups) == 1:
            break
        for element in group:
            inner: Any = element.value if element.VR == "SQ" else []
            if len(inner) == 1 and (value := inner[0].get(keyword)) is not None:
                return value
    if default is None:
        raise KeyError(keyword)
    return default


def _check_one_direction(thing: str, slices: list[Slice]) -> None:
    """Refuse a series whose planes differ in size, direction or pixel spacing by more than rounding."""
    limit = np.array([0, 0, *[1e-3] * 6, 1e-4, 1e-4])
    rest = np.array([[s.rows, s.columns, *s.row, *s.column, *s.spacing] for s in slices])
    counts: list[int] = []
    while len(rest) and len(counts) < _MOST_KINDS:
        like = (np.abs(rest - rest[0]) <= limit).all(axis=1)
        counts.append(int(like.sum()))
        rest = rest[~like]
    if len(counts) > 1:
        raise RefusedInput(
            thing,
            expected="slices of one size, direction and pixel spacing",
            found=f"{len(counts)} kinds{' or more' if len(rest) else ''}, "
            f"{len(slices) - max(counts)} of {len(slices)} slices unlike most",
            remedy="a localiser or reformat is mixed in: separate the series",
        )
    if abs(float(slices[0].row @ slices[0].column)) > 1e-3:
        raise RefusedInput(thing, expected="rows perpendicular to columns", found="a sheared image plane")
