"""DICOM series: slices ordered by where they lie, in Hounsfield units or stored values, never stacked blindly.

Each image (or frame of a multi-frame object) says where its first pixel lies and how its rows and columns run. From
that, and not from instance numbers or file names, follow the order, the gaps and the tilt:

- slices of other size or direction than most: refused; a localiser does not belong to a volume;
- the same slice twice: one is dropped with a note; two different images at one place are a series in time (`four_d`);
- uneven gaps or missing slices: refused, or interpolated onto even gaps (`gaps`, never beyond `max_gap_mm`);
- positions that drift sideways, as with a tilted gantry: resampled onto a straight grid, or refused (`tilt`).

Positions: DICOM PS3.3 C.7.6.2.1.1 (Image Plane); frames: C.7.6.16 (Multi-frame Functional Groups).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.errors import BytesLengthException

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.deidentify import allowed_facts
from storage.ingest.readers.dicom_seg import read_segmentation
from storage.ingest.readers.dicom_series import DAMAGED, discover_dicom
from storage.ingest.readers.raw import Affine, Array, RawVolume, ReadPolicy, check_size
from storage.ingest.readers.reader import Grouping

READER = f"pydicom/{pydicom.__version__}"
POSITION_TOLERANCE = 0.01
"""Distances below this share of the slice gap (or of a pixel, sideways) count as none."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(slots=True)
class Slice:
    """One image plane: where it lies (LPS mm) and how to get its pixels."""

    dataset: Any
    frame: int
    origin: Affine
    row: Affine  # direction of growing column index
    column: Affine  # direction of growing row index
    spacing: tuple[float, float]  # between rows, between columns
    slope: float
    intercept: float
    order: tuple[float, float, int, int]
    along: float = 0.0


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

    def read_label(self, path: str, policy: ReadPolicy, image: RawVolume) -> RawVolume:
        """See `read_segmentation`."""
        return read_segmentation(path, image)


def read_series(files: Sequence[str], policy: ReadPolicy, thing: str) -> RawVolume:
    """Read the files of one series as a volume.

    Raises:
        RefusedInput: names the series by `thing` and says what is wrong; quotes no header text.
    """
    try:
        return _read_series(files, policy, thing)
    except BytesLengthException as error:  # no relative of any other error; others are caught where they say more
        raise RefusedInput(
            thing,
            expected="headers whose values have their type's length",
            found="one that has not",
            remedy="a file of the series is damaged: export it again",
        ) from error


def _read_series(files: Sequence[str], policy: ReadPolicy, thing: str) -> RawVolume:
    slices: list[Slice] = []
    for number, path in enumerate(files):
        slices += _slices(path, number, thing)
        # Before all are read: what they hold is in memory.
        check_size(thing, (len(slices), int(slices[0].dataset.Rows), int(slices[0].dataset.Columns)), policy)
    first = slices[0].dataset
    patients = {str(s.dataset.get("PatientID") or "").strip() for s in slices} - {""}
    if len(patients) > 1:
        raise RefusedInput(
            thing,
            expected="slices of one patient",
            found=f"{len(patients)} patient ids under one series",
            remedy="ids were changed in part, or one series id was given to several patients: anonymise it again",
        )
    notes: list[str] = []
    slices = _one_direction(thing, slices)
    normal = np.cross(slices[0].row, slices[0].column)
    for s in slices:
        s.along = float(s.origin @ normal)
    slices.sort(key=lambda s: (s.along, s.order))
    places = _places(thing, slices, policy, notes)
    channels = len(places[0])
    rows, columns = int(first.Rows), int(first.Columns)
    if len(places) < 2:
        raise RefusedInput(thing, expected="at least two slices", found="one", remedy="a slice is no volume")
    check_size(thing, (channels, len(places), rows, columns), policy)
    volume = np.stack([np.stack([_pixels(thing, place[c]) for place in places]) for c in range(channels)])
    planes = [place[0] for place in places]
    differ = any((s.slope, s.intercept) != (slices[0].slope, slices[0].intercept) for s in slices)
    burned = any(str(s.dataset.get("BurnedInAnnotation") or "") == "YES" for s in slices)
    for s in slices:
        s.dataset = None  # its pixels are in the volume now
    volume, affine = _grid(thing, volume, planes, normal, policy, notes)
    modality = str(first.get("Modality") or "")
    facts = allowed_facts(first)
    facts.pop("Modality", None)
    modality = modality if modality in ("CT", "MR", "PT", "US", "NM") else ""
    if burned:
        notes.append("the pixels may show identifying text: BurnedInAnnotation is YES")
    if differ:
        notes.append("rescale slope and intercept differ between slices and were applied slice by slice")
    return RawVolume(volume, geometry.check_affine(affine, thing), READER, modality, notes, facts)


def _slices(path: str, number: int, thing: str) -> list[Slice]:
    try:
        dataset: Any = pydicom.dcmread(path, force=True)
        framed = int(dataset.get("NumberOfFrames") or 1) > 1 or "PerFrameFunctionalGroupsSequence" in dataset
        planes = _frames(dataset) if framed else [(0, [dataset])]
        if "MOSAIC" in (dataset.get("ImageType") or []):
            raise RefusedInput(
                thing,
                expected="one plane an image",
                found="a Siemens mosaic, whose planes lie side by side in one image",
                remedy="convert the series to NIfTI with dcm2niix",
            )
        meaning = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
        if int(dataset.get("SamplesPerPixel") or 1) != 1 or not meaning.startswith("MONOCHROME"):
            raise RefusedInput(thing, expected="one value a pixel", found="colour images")
        if framed and int(dataset.get("NumberOfFrames") or 1) != len(planes):
            raise RefusedInput(
                thing,
                expected="a position for each frame",
                found=f"{len(planes)} for {dataset.get('NumberOfFrames')} frames",
                remedy="the file is damaged: export it again",
            )
        stored, high = dataset.get("BitsStored"), dataset.get("HighBit")
        if stored is not None and high is not None and int(high) != int(stored) - 1:
            raise RefusedInput(
                thing,
                expected="values in the lowest bits",
                found=f"{int(stored)} bits of which the highest is number {int(high)}",
                remedy="convert the series with a tool that reads such files",
            )
        if "ModalityLUTSequence" in dataset:
            raise RefusedInput(
                thing,
                expected="values rescaled by slope and intercept",
                found="a modality look-up table",
                remedy="apply it in another tool and export the series again",
            )
        out = []
        for frame, groups in planes:
            direction = np.array([float(x) for x in _find(groups, "ImageOrientationPatient")])
            spacing = [float(x) for x in _find(groups, "PixelSpacing")]
            slope, intercept = float(_find(groups, "RescaleSlope", 1.0)), float(_find(groups, "RescaleIntercept", 0.0))
            origin = np.array([float(x) for x in _find(groups, "ImagePositionPatient")])
            time = float(dataset.get("AcquisitionNumber") or 0)
            numbers = [*origin, *direction, *spacing, slope, intercept, int(dataset.Rows), int(dataset.Columns)]
            if not np.isfinite(numbers).all() or min(spacing) <= 0 or slope == 0:
                raise ValueError("no place or no values")  # later on, comparisons with NaN would find nothing wrong
            out.append(
                Slice(
                    dataset,
                    frame,
                    origin,
                    direction[:3] / np.linalg.norm(direction[:3]),
                    direction[3:] / np.linalg.norm(direction[3:]),
                    (spacing[0], spacing[1]),
                    slope,
                    intercept,
                    (time, float(dataset.get("InstanceNumber") or 0), number, frame),
                )
            )
    except DAMAGED as error:
        raise RefusedInput(
            thing,
            expected="images with position, orientation and pixel spacing",
            found=f"file {number + 1} of the series without one of them, or damaged ({type(error).__name__})",
            remedy="export the series again, as image slices of one scan",
        ) from error
    return out


def _frames(dataset: Any) -> list[tuple[int, list[Any]]]:
    """Per frame, where its attributes may be found: own group, shared group, the object itself."""
    shared = dataset.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
    frames = dataset.get("PerFrameFunctionalGroupsSequence")
    if not frames:
        raise KeyError("PerFrameFunctionalGroupsSequence")
    return [(i, [frame, shared[0], dataset]) for i, frame in enumerate(frames)]


def _find(groups: Sequence[Any], keyword: str, default: Any = None) -> Any:
    for group in groups:
        if (value := group.get(keyword)) is not None:
            return value
        for element in group:
            inner: Any = element.value if element.VR == "SQ" else []
            if len(inner) == 1 and (value := inner[0].get(keyword)) is not None:
                return value
    if default is None:
        raise KeyError(keyword)
    return default


def _one_direction(thing: str, slices: list[Slice]) -> list[Slice]:
    """Refuse a series whose planes differ in size, direction or pixel spacing by more than rounding."""
    kinds: list[tuple[npt.NDArray[np.float64], int]] = []  # of each its first slice, and how many
    limit = np.array([0, 0, *[1e-3] * 6, 1e-4, 1e-4])
    for s in slices:
        size = (int(s.dataset.Rows), int(s.dataset.Columns))
        facts = np.array([*size, *s.row, *s.column, *s.spacing])
        at = next((i for i, (kind, _) in enumerate(kinds) if (np.abs(facts - kind) <= limit).all()), len(kinds))
        if at == len(kinds):
            kinds.append((facts, 0))
        kinds[at] = (kinds[at][0], kinds[at][1] + 1)
    if len(kinds) > 1:
        most = max(count for _, count in kinds)
        raise RefusedInput(
            thing,
            expected="slices of one size, direction and pixel spacing",
            found=f"{len(kinds)} kinds, {len(slices) - most} of {len(slices)} slices unlike most",
            remedy="a localiser or reformat is mixed in: separate the series",
        )
    if abs(float(slices[0].row @ slices[0].column)) > 1e-3:
        raise RefusedInput(thing, expected="rows perpendicular to columns", found="a sheared image plane")
    return slices


def _places(thing: str, slices: list[Slice], policy: ReadPolicy, notes: list[str]) -> list[list[Slice]]:
    """Slices grouped by position along the normal, after the policy for several images at one place."""
    gaps = np.diff([s.along for s in slices])
    typical = float(np.median(gaps[gaps > 1e-3])) if (gaps > 1e-3).any() else 1.0
    groups: list[list[Slice]] = [[slices[0]]]
    for s in slices[1:]:
        if s.along - groups[-1][0].along < POSITION_TOLERANCE * typical:
            groups[-1].append(s)
        else:
            groups.append([s])
    dropped = 0
    for i, group in enumerate(groups):
        unique: list[Slice] = []
        for s in sorted(group, key=lambda s: s.order):
            if len(group) > 1 and any(np.array_equal(_pixels(thing, s), _pixels(thing, k)) for k in unique):
                dropped += 1
            else:
                unique.append(s)
        groups[i] = unique
    if dropped:
        notes.append(f"{dropped} slices were there twice; one of each kept")
    counts = Counter(len(group) for group in groups)
    if set(counts) == {1}:
        return groups
    if policy.four_d == "refuse" or (policy.four_d == "channels" and len(counts) > 1):
        raise RefusedInput(
            thing,
            expected="one image at each position",
            found=f"up to {max(counts)} different images at one position: several acquisitions, echoes or times",
            remedy="separate them, or set read.four_d to first or (where all positions have as many) channels",
        )
    if policy.four_d == "first":
        notes.append(f"first of up to {max(counts)} images at each position")
        return [group[:1] for group in groups]
    beside = max(_sideways(s.origin - group[0].origin, s) for group in groups for s in group)
    if beside > 0.1 * min(slices[0].spacing):
        raise RefusedInput(
            thing,
            expected="images at one position that cover each other",
            found=f"some that lie {beside:.2f} mm beside the others",
            remedy="they are stacks of their own: separate the series",
        )
    notes.append(f"{max(counts)} images at each position taken as channels")
    return groups


def _sideways(way: Affine, s: Slice) -> float:
    """How far a way leads within the plane of a slice, in mm."""
    return float(np.hypot(way @ s.row, way @ s.column))


def _pixels(thing: str, s: Slice) -> Array:
    """Rescaled values of one plane: int16 or int32 where slope and intercept are whole, else float32."""
    try:
        array: Array = s.dataset.pixel_array
    except DAMAGED as error:
        syntax = getattr(getattr(s.dataset, "file_meta", None), "TransferSyntaxUID", None)
        raise RefusedInput(
            thing,
            expected="decodable pixels",
            found=f"{type(error).__name__} with transfer syntax {syntax.name if syntax else 'unknown'}",
            remedy="the file is truncated, or its compression needs a pydicom plugin (pylibjpeg, python-gdcm)",
        ) from error
    plane = array[s.frame] if array.ndim == 3 else array
    exact = plane.dtype.kind in "iub" and s.slope == round(s.slope) and s.intercept == round(s.intercept)
    if exact and abs(s.slope) < 2**15 and abs(s.intercept) < 2**31:
        whole = plane.astype(np.int64) * int(s.slope) + int(s.intercept)
        low, high = whole.min(), whole.max()
        if low >= -(2**31) and high < 2**31:
            return whole.astype(np.int16 if low >= -32768 and high <= 32767 else np.int32)
    return (plane * np.float64(s.slope) + s.intercept).astype(np.float32)


def _grid(
    thing: str, volume_CDHW: Array, planes: list[Slice], normal: Affine, policy: ReadPolicy, notes: list[str]
) -> tuple[Array, Affine]:
    """The volume and its affine, on even gaps and, where the policy says so, without tilt."""
    first = planes[0]
    along = np.array([s.along for s in planes])
    gaps = np.diff(along)
    gap = float(np.median(gaps))
    origins = np.array([s.origin for s in planes])
    uneven = np.abs(gaps - gap).max() > max(POSITION_TOLERANCE * gap, 2e-3)
    if uneven:
        volume_CDHW, origins = _even_gaps(thing, volume_CDHW, origins, along, gap, policy, notes)
    step = (origins[-1] - origins[0]) / (len(origins) - 1)
    drift = origins - origins[0] - np.arange(len(origins))[:, None] * step
    if np.abs(drift).max() > max(0.1 * min(first.spacing), POSITION_TOLERANCE * gap):
        raise RefusedInput(
            thing,
            expected="slice positions along one line",
            found=f"positions up to {np.abs(drift).max():.2f} mm beside it",
            remedy="the patient or table moved between slices: separate the parts",
        )
    affine = np.eye(4)
    affine[:3, 0] = first.row * first.spacing[1]
    affine[:3, 1] = first.column * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = origins[0]
    affine = _LPS_TO_RAS @ affine
    sideways = step - (step @ normal) * normal
    angle = float(np.degrees(np.arctan2(np.linalg.norm(sideways), step @ normal)))
    if np.linalg.norm(sideways) * (len(origins) - 1) <= 0.1 * min(first.spacing) or angle < 0.05:
        return volume_CDHW, affine
    if policy.tilt == "refuse":
        raise RefusedInput(
            thing,
            expected="slices stacked straight",
            found=f"a gantry tilt of {angle:.1f} degrees",
            remedy="set read.tilt to correct to resample it onto a straight grid",
        )
    notes.append(f"gantry tilt of {angle:.1f} degrees corrected by linear resampling onto a straight grid")
    return geometry.straighten(volume_CDHW, affine)


def _even_gaps(
    thing: str, volume_CDHW: Array, origins: Affine, along: Affine, gap: float, policy: ReadPolicy, notes: list[str]
) -> tuple[Array, Affine]:
    gaps = np.diff(along)
    multiples = gaps / gap
    missing = int(np.rint(multiples).sum() - len(gaps)) if np.abs(multiples - np.rint(multiples)).max() < 0.02 else 0
    what = f"{missing} slices missing" if missing > 0 else f"gaps from {gaps.min():.3g} to {gaps.max():.3g} mm"
    if policy.gaps == "refuse" or gaps.max() > policy.max_gap_mm:
        remedy = "set read.gaps to resample to interpolate onto even gaps"
        if gaps.max() > policy.max_gap_mm:
            more = f"raise read.max_gap_mm above {policy.max_gap_mm:g} if interpolating so far is wanted"
            remedy = more if policy.gaps == "resample" else f"{remedy}, and {more}"
        raise RefusedInput(thing, expected=f"even gaps of {gap:.3g} mm between slices", found=what, remedy=remedy)
    count = max(2, round(float(along[-1] - along[0]) / gap) + 1)
    even = np.linspace(along[0], along[-1], count)
    low = np.clip(np.searchsorted(along, even, side="right") - 1, 0, len(along) - 2)
    weight = (even - along[low]) / (along[low + 1] - along[low])
    out = np.empty((len(volume_CDHW), count, *volume_CDHW.shape[2:]), np.float32)
    for k, (at, w) in enumerate(zip(low, weight, strict=True)):
        out[:, k] = volume_CDHW[:, at] * np.float32(1 - w) + volume_CDHW[:, at + 1] * np.float32(w)
    notes.append(f"{what}: interpolated onto even gaps of {(even[1] - even[0]):.4g} mm")
    return out, origins[low] * (1 - weight)[:, None] + origins[low + 1] * weight[:, None]
