"""Masks as DICOM segmentations that refer to the images of their series (DICOM PS3.3 A.51), written by highdicom."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from storage.errors import ConfigError, RefusedInput

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_OFF_GRID = 0.1
"""Of a voxel that a slice may lie off the grid of the mask; as much as `storage.ingest` allows of a segmentation."""
_PREDICTED_SERIES = 9000
"""Added to the series' number; our choice."""


def require() -> Any:
    """The package highdicom.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module("highdicom")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "DICOM segmentations",
            expected="the package highdicom",
            found=str(error),
            remedy="pip install 'tomoscale[dicom]', or write NIfTI (an output that ends in .nii.gz; `--nifti`)",
        ) from error


def write_segmentation(
    target: Path,
    mask_KJI: NDArray[Any],
    affine: NDArray[np.float64],
    files: Sequence[str],
    labels: Sequence[tuple[int, str]],
    *,
    model: str,
) -> None:
    """Write a mask as a binary segmentation, a segment a label in the order of the labels, 1 onwards.

    Args:
        target: File to write.
        mask_KJI: Label values on the grid of the series: slices, rows, columns.
        affine: (4, 4) of indices (i, j, k) to RAS+ mm.
        files: Of the series, in any order.
        labels: Values and names, the background left out.
        model: Name of the model, for the equipment of the segmentation.

    Raises:
        ConfigError: highdicom is not installed.
        RefusedInput: the slices of the series are not those of the mask, or lack what a segmentation refers to.
    """
    highdicom = require()
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    images = _in_order(headers, mask_KJI.shape[0], affine)
    segments = np.zeros(mask_KJI.shape, np.uint8)
    for number, (value, _) in enumerate(labels, 1):
        segments[mask_KJI == value] = number
    try:
        dataset = highdicom.seg.Segmentation(
            source_images=images,
            pixel_array=segments,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[_segment(highdicom, i, name, model) for i, (_, name) in enumerate(labels, 1)],
            series_instance_uid=highdicom.UID(),
            series_number=_PREDICTED_SERIES + int(images[0].get("SeriesNumber") or 0),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="tomoscale",
            manufacturer_model_name=model[:64],
            software_versions=version("tomoscale"),
            device_serial_number="none",
            series_description=f"segmentation by {model}"[:64],
            omit_empty_frames=bool(segments.any()),
        )
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        raise RefusedInput(
            "series",
            expected="images that a DICOM segmentation can refer to",
            found=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            remedy="write NIfTI (an output that ends in .nii.gz; `--nifti`)",
        ) from error
    dataset.save_as(target)


def _segment(highdicom: Any, number: int, name: str, model: str) -> Any:
    codes = import_module("pydicom.sr.codedict").codes
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.Tissue,  # what a label is, beyond its name, nobody told us
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=model[:64], version=version("tomoscale"), family=codes.DCM.ArtificialIntelligence
        ),
    )


def _in_order(headers: Sequence[Any], depth: int, affine: NDArray[np.float64]) -> list[Any]:
    """One image for each slice of the mask.

    Raises:
        RefusedInput: a slice has none, or an image lies off the grid.
    """
    slices: dict[int, Any] = {}
    inverse = np.linalg.inv(affine)
    for header in headers:
        if "ImagePositionPatient" not in header or "ImageOrientationPatient" not in header:
            raise _off_grid("an image without a position of its own, such as one of many frames")
        origin = _LPS_TO_RAS @ np.array([float(x) for x in header.ImagePositionPatient])
        row = _LPS_TO_RAS @ np.array([float(x) for x in header.ImageOrientationPatient[:3]])
        index = inverse @ np.array([*origin, 1.0])
        k = round(float(index[2]))
        along = affine[:3, 0] / np.linalg.norm(affine[:3, 0])
        if np.abs(index[:3] - [0, 0, k]).max() > _OFF_GRID or float(along @ row) < 0.999 or not 0 <= k < depth:
            raise _off_grid(f"an image at slice {float(index[2]):.2f} of {depth}")
        slices.setdefault(k, header)
    if missing := [k for k in range(depth) if k not in slices]:
        raise _off_grid(f"none at slice {missing[0]} of {depth}")
    return [slices[k] for k in range(depth)]


def _off_grid(reason: str) -> RefusedInput:
    return RefusedInput(
        "series",
        expected="an image for each slice of the mask",
        found=reason,
        remedy="its tilt or gaps were corrected, or it is of another kind: write NIfTI (an output that ends in .nii.gz;"
        " `--nifti`)",
    )


def names_of(labels: Mapping[int, str]) -> list[tuple[int, str]]:
    """Values and names without the background, by value."""
    return sorted((value, name) for value, name in labels.items() if value != 0)
