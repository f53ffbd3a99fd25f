"""Segmentation measures of one case: Dice, HD95 and NSD, each per label, in voxels' true size.

Dice = 2|A and B| / (|A| + |B|). HD95 is the larger of the two directed 95th percentiles of surface distances, mm. NSD
(normalised surface Dice at tolerance t) is the share of both surfaces that lies within t mm of the other surface.
All three come from MONAI.

Where a mask is empty no surface exists; the rules here keep every case in every mean:

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
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray

from storage.errors import ConfigError


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
        raise ConfigError("prediction", expected=f"the truth's shape {truth_DHW.shape}", found=str(prediction_DHW.shape))
    found = {}
    for value, name in labels.items():
        found[name] = _score(prediction_DHW == value, truth_DHW == value, spacing_mm, tolerance_mm)
    return found


def dice(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Dice of two masks of one shape; 1 when both are empty."""
    if not prediction.any() and not truth.any():
        return 1.0
    return float(compute_dice(_one(prediction), _one(truth), include_background=True).item())


def _score(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], spacing_mm: tuple[float, float, float], tolerance_mm: float
) -> Scores:
    if not prediction.any() and not truth.any():
        return Scores(1.0, 0.0, 1.0)
    if not prediction.any() or not truth.any():
        diagonal = math.sqrt(sum((n * s) ** 2 for n, s in zip(truth.shape, spacing_mm, strict=True)))
        return Scores(0.0, diagonal, 0.0)
    a, b = _one(prediction), _one(truth)
    spacing = list(spacing_mm)
    far = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing)
    near = compute_surface_dice(a, b, [tolerance_mm], include_background=True, spacing=spacing)
    return Scores(dice(prediction, truth), float(far.item()), float(near.item()))


def _one(mask: NDArray[np.bool_]) -> torch.Tensor:
    # A voxel at the border of the array has a surface there too; without the margin MONAI would see none.
    return torch.from_numpy(np.pad(mask, 1)[None, None].astype(np.float32))
