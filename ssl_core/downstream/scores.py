"""Segmentation measures of one case: Dice, HD95 and NSD, each per label, in voxels' true size.

The surface of a mask is the set of its voxels that have a face neighbour outside of it; beyond the array is outside.
Distances run between voxel centres, in mm, so anisotropic spacing counts.

- Dice = 2 |A and B| / (|A| + |B|).
- HD95 is the larger of the two directed 95th percentiles (linear between ranks) of surface distances, mm.
- NSD (normalised surface Dice at tolerance t; Nikolov et al. 2018, counted in surface voxels, not weighted by area) is
  the share of both surfaces that lies within t mm of the other.

Where a mask is empty it has no surface; the rules here keep every case in every mean:

| truth | prediction | Dice | HD95 | NSD |
|---|---|---|---|---|
| empty | empty | 1 | 0 | 1 |
| one of them empty | | 0 | diagonal of the volume | 0 |
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from storage.errors import ConfigError
from storage.intensity_stats import foreground_box

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Scores:
    """One label of one case: `dice` and `nsd` in [0, 1], `hd95_mm` in mm."""

    dice: float
    hd95_mm: float
    nsd: float


def score_case(
    prediction_DHW: NDArray[Any],
    truth_DHW: NDArray[Any],
    *,
    labels: Mapping[int, str],
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float = 1.0,
) -> dict[str, Scores]:
    """Scores of each label.

    Args:
        prediction_DHW: Label values.
        truth_DHW: Label values on the same grid.
        labels: Label value to name; background is not listed.
        spacing_mm: Voxel spacing (D, H, W), mm.
        tolerance_mm: Tolerance of the NSD, mm.

    Raises:
        ConfigError: the grids differ.
    """
    if prediction_DHW.shape != truth_DHW.shape:
        raise ConfigError(
            "prediction", expected=f"the truth's shape {truth_DHW.shape}", found=str(prediction_DHW.shape)
        )
    found = {}
    for value, name in labels.items():
        found[name] = _score(prediction_DHW == value, truth_DHW == value, spacing_mm, tolerance_mm)
    return found


def dice(prediction: Mask, truth: Mask) -> float:
    """Dice of two masks of one shape; 1 when both are empty."""
    total = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 1.0 if total == 0 else 2.0 * np.count_nonzero(prediction & truth) / total


def _score(prediction: Mask, truth: Mask, spacing_mm: tuple[float, float, float], tolerance_mm: float) -> Scores:
    if not prediction.any() and not truth.any():
        return Scores(1.0, 0.0, 1.0)
    if not prediction.any() or not truth.any():
        diagonal = math.sqrt(sum((n * s) ** 2 for n, s in zip(truth.shape, spacing_mm, strict=True)))
        return Scores(0.0, diagonal, 0.0)
    low, high = foreground_box(prediction | truth)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))  # nothing outside of it can be nearest
    a, b = _surface(prediction[box]), _surface(truth[box])
    there = ndimage.distance_transform_edt(~b, sampling=spacing_mm)[a]
    back = ndimage.distance_transform_edt(~a, sampling=spacing_mm)[b]
    far = max(np.percentile(there, 95), np.percentile(back, 95))
    # Distances are sums of squares of rounded spacings: 1.2 mm must not fail a tolerance of 1.2 mm.
    reach = tolerance_mm * (1 + 1e-6)
    near = (np.count_nonzero(there <= reach) + np.count_nonzero(back <= reach)) / (there.size + back.size)
    return Scores(dice(prediction, truth), float(far), float(near))


def _surface(mask: Mask) -> Mask:
    return mask & ~ndimage.binary_erosion(mask)
