"""DICOM segmentations (binary), laid out on the grid of the image they belong to.

A segmentation holds one bit plane for each segment and slice, and leaves empty slices out, so it has no grid of its
own. DICOM PS3.3 A.51 and C.8.20.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom

from storage import geometry
from storage.errors import RefusedInput
from storage.ingest.readers.dicom.file import DAMAGED, be_quiet, opened
from storage.ingest.readers.raw import RawVolume

READER = f"pydicom-seg/{pydicom.__version__}"
_IDENTIFIERS = (
    "PatientID", "OtherPatientIDs", "PatientAddress", "IssuerOfPatientID", "AccessionNumber", "StudyID",
    "InstitutionName", "InstitutionAddress", "StationName", "DeviceSerialNumber",
)  # fmt: skip
_NUMBER = re.compile(r"\d{5,}|\d+(?:[./-]\d+){2,}")
"""As dates, record numbers and unique identifiers are."""
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def read_segmentation(path: str, image: RawVolume) -> RawVolume:
    """Read a segmentation as a label map: segment numbers as values, 0 outside.

    Args:
        image: The series it refers to, as read: its axes are the frames' rows and columns.

    Raises:
        RefusedInput: not binary, or its planes do not lie on the image's slices.
    """
    thing = "segmentation"  # a path may name a patient
    try:
        be_quiet()
        with opened(path) as file:
            dataset: Any = pydicom.dcmread(file)
        if str(dataset.SegmentationType) != "BINARY":
            raise RefusedInput(thing, expected="a binary segmentation", found="a fractional or label map one")
        pixels = np.asarray(dataset.pixel_array)
        pixels = pixels.reshape(-1, *pixels.shape[-2:])
        frames = list(dataset.PerFrameFunctionalGroupsSequence)
        shared = dataset.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]
        labels = np.zeros(image.array_CDHW.shape[1:], np.uint8)
        overlap = 0
        for plane, frame in zip(pixels, frames, strict=True):
            segment = frame.get("SegmentIdentificationSequence") or shared[0].SegmentIdentificationSequence
            number = int(segment[0].ReferencedSegmentNumber)  # of one segment alone it is said once
            oriented = frame.get("PlaneOrientationSequence") or shared[0].PlaneOrientationSequence
            direction = np.array([float(x) for x in oriented[0].ImageOrientationPatient])
            origin = np.array([float(x) for x in frame.PlanePositionSequence[0].ImagePositionPatient])
            measures = frame.get("PixelMeasuresSequence") or shared[0].get("PixelMeasuresSequence")
            spacing = [float(x) for x in measures[0].PixelSpacing] if measures else None
            k = _slice_of(thing, image, origin, direction, plane.shape, spacing)
            shared_voxels = (plane > 0) & (labels[k] > 0)
            overlap += int(np.count_nonzero(shared_voxels))
            labels[k][plane > 0] = number
    except DAMAGED as error:
        raise RefusedInput(
            thing, expected="a binary DICOM segmentation", found=f"a damaged or unusual one ({type(error).__name__})"
        ) from error
    notes = [f"{overlap:,} voxels in several segments; the last one listed has them"] if overlap else []
    return RawVolume(labels[None], image.affine, READER, notes=notes)


def segment_labels(path: str, image: str) -> tuple[dict[int, str], list[int]]:
    """Names of the segments of a segmentation, from its header and, for what may identify a person, its image's.

    A label is free text. One that has a word of a name or of another identifier, a date or a long number is left out.

    Args:
        path: Of the segmentation.
        image: Of a file of the series that it refers to.

    Returns:
        Labels by segment number, and the numbers of segments whose label was left out; nothing of a damaged header.
    """
    labels: dict[int, str] = {}
    hidden: list[int] = []
    try:
        be_quiet()
        headers = []
        for name in (path, image):
            with opened(name) as file:
                headers.append(pydicom.dcmread(file, stop_before_pixels=True))
        secrets = {word for header in headers for word in _secrets(header)}
        for segment in headers[0].get("SegmentSequence") or ():
            number, label = int(segment.SegmentNumber), str(segment.get("SegmentLabel") or "")
            words = set(_words(label))
            if _NUMBER.search(label) or any(w in words or (len(w) > 3 and w in label.casefold()) for w in secrets):
                hidden.append(number)
            else:
                labels[number] = label
    except DAMAGED:
        return {}, []
    return labels, hidden


def _secrets(header: Any) -> Iterator[str]:
    for element in header:
        if element.VR == "PN" or element.keyword in _IDENTIFIERS:
            yield from _words(str(element.value))


def _words(text: str) -> Iterator[str]:
    """Words of two characters and more, in small letters."""
    return (word for word in re.split(r"[\W_]+", text.casefold()) if len(word) > 1)


def _slice_of(
    thing: str,
    image: RawVolume,
    origin: geometry.Affine,
    direction: geometry.Affine,
    shape: tuple[int, ...],
    spacing: list[float] | None,
) -> int:
    """The image slice on which a frame lies, after checking that it covers it pixel for pixel."""
    _, depth, rows, columns = image.array_CDHW.shape
    row, column = _LPS_TO_RAS @ direction[:3], _LPS_TO_RAS @ direction[3:]
    index = np.linalg.inv(image.affine) @ np.array([*(_LPS_TO_RAS @ origin), 1.0])
    lengths = np.linalg.norm(image.affine[:3, :3], axis=0)
    axes = image.affine[:3, :3] / lengths
    aligned = float(axes[:, 0] @ row) > 0.999 and float(axes[:, 1] @ column) > 0.999
    aligned = aligned and (spacing is None or np.allclose(spacing, lengths[1::-1], rtol=1e-3))
    k = round(float(index[2]))
    if shape != (rows, columns) or not aligned or np.abs(index[:3] - [0, 0, k]).max() > 0.1 or not 0 <= k < depth:
        raise RefusedInput(
            thing,
            expected="planes that lie on the image's slices, pixel for pixel",
            found=f"a plane of {shape} at slice {float(index[2]):.2f} of {depth}",
            remedy="was the image's tilt or gaps corrected? then its segmentation cannot be used",
        )
    return k
