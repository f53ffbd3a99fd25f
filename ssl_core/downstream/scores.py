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

A field of `Scores` is a metric. Files, tables, MLflow and the report go through `METRICS`, so that a new one is a field
and its formula.
"""

import base64
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_core.downstream.records import from_fields
from storage.errors import ConfigError
from storage.intensity_stats import foreground_box

# scipy takes half a second to import, and every job reads this module: functions import it.

Mask = NDArray[np.bool_]
Distances = NDArray[np.float64]


@dataclass(frozen=True)
class MaskPair:
    """What a formula is computed from: the masks of one label on one grid.

    Attributes:
        prediction: (D, H, W).
        truth: (D, H, W).
        spacing_mm: Voxel spacing (D, H, W), mm.
        tolerance_mm: Tolerance of the NSD, mm.
    """

    prediction: Mask
    truth: Mask
    spacing_mm: tuple[float, float, float]
    tolerance_mm: float

    @cached_property
    def voxels(self) -> tuple[int, int]:
        """Voxels of the prediction and of the truth."""
        return int(np.count_nonzero(self.prediction)), int(np.count_nonzero(self.truth))

    @property
    def diagonal_mm(self) -> float:
        """Diagonal of the volume, mm: the worst distance."""
        return math.sqrt(sum((n * s) ** 2 for n, s in zip(self.truth.shape, self.spacing_mm, strict=True)))

    @cached_property
    def distances_mm(self) -> tuple[Distances, Distances]:
        """From each surface voxel of the prediction to the truth's surface, and back; neither mask may be empty."""
        low, high = foreground_box(self.prediction | self.truth)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))  # nothing outside of it can be nearest
        a, b = _surface(self.prediction[box]), _surface(self.truth[box])
        from scipy import ndimage  # see the top of this file

        to_truth = ndimage.distance_transform_edt(~b, sampling=self.spacing_mm)[a]
        to_prediction = ndimage.distance_transform_edt(~a, sampling=self.spacing_mm)[b]
        return to_truth, to_prediction


@dataclass(frozen=True)
class Metric:
    """How a field of `Scores` is computed and shown.

    Attributes:
        name: Name of the field; ends in `_mm` where the unit is mm.
        formula: Its value for two masks.
        title: Column heading; `{tolerance_mm}` becomes the tolerance of the NSD.
        digits: Decimals in a table.
    """

    name: str
    formula: Callable[[MaskPair], float]
    title: str
    digits: int

    @property
    def stem(self) -> str:
        """The name without its unit, as keys of summaries have it: `hd95` in `hd95_mean`."""
        return self.name.removesuffix("_mm")

    def heading(self, tolerance_mm: float) -> str:
        """Column heading at a tolerance of the NSD."""
        return self.title.format(tolerance_mm=f"{tolerance_mm:g}")

    def text(self, value: float) -> str:
        """A value for a table."""
        return f"{value:.{self.digits}f}"


def dice(prediction: Mask, truth: Mask) -> float:
    """Dice of two masks of one shape; 1 when both are empty."""
    total = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 1.0 if total == 0 else 2.0 * np.count_nonzero(prediction & truth) / total


def _dice(masks: MaskPair) -> float:
    return dice(masks.prediction, masks.truth)


def _hd95_mm(masks: MaskPair) -> float:
    if not all(masks.voxels):
        return masks.diagonal_mm if any(masks.voxels) else 0.0
    return float(max(np.percentile(distances, 95) for distances in masks.distances_mm))


def _nsd(masks: MaskPair) -> float:
    if not all(masks.voxels):
        return 0.0 if any(masks.voxels) else 1.0
    # Distances are sums of squares of rounded spacings: 1.2 mm must not fail a tolerance of 1.2 mm.
    reach = masks.tolerance_mm * (1 + 1e-6)
    near = sum(np.count_nonzero(distances <= reach) for distances in masks.distances_mm)
    return float(near / sum(distances.size for distances in masks.distances_mm))


def _metric(formula: Callable[[MaskPair], float], title: str, digits: int = 3) -> Any:
    return field(metadata={"formula": formula, "title": title, "digits": digits})


@dataclass(frozen=True, slots=True)
class Scores:
    """One label of one case: `dice` and `nsd` in [0, 1], `hd95_mm` in mm."""

    dice: float = _metric(_dice, "Dice")
    hd95_mm: float = _metric(_hd95_mm, "HD95 (mm)", digits=2)
    nsd: float = _metric(_nsd, "NSD ({tolerance_mm} mm)")

    def of(self, metric: Metric) -> float:
        """The value of a metric."""
        return float(getattr(self, metric.name))


METRICS: tuple[Metric, ...] = tuple(Metric(name=f.name, **f.metadata) for f in fields(Scores))
"""All metrics, in the order of their fields."""


@dataclass(frozen=True, slots=True)
class CaseScore:
    """Scores of one label of one volume.

    Attributes:
        volume_id: The volume.
        subject: Whose it is. Two volumes of a subject are not independent.
        label: Name of the label.
        scores: Its scores.
    """

    volume_id: str
    subject: str
    label: str
    scores: Scores

    def to_json(self) -> dict[str, Any]:
        """One flat object, the scores under the names of their fields."""
        return {"volume_id": self.volume_id, "subject": self.subject, "label": self.label, **asdict(self.scores)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CaseScore":
        """Inverse of `to_json`.

        Raises:
            RefusedInput: a score or a name is missing.
        """
        return from_fields(cls, {**data, "scores": from_fields(Scores, data)})


@dataclass(frozen=True)
class CaseSlice:
    """The axial slice of a case that a report shows: where its truth is largest, so the same for whoever predicts.

    Attributes:
        at: Its place along D.
        classes_HW: Label values that were predicted there.
    """

    at: int
    classes_HW: NDArray[np.int32]

    @classmethod
    def largest(cls, prediction_DHW: NDArray[Any], truth_DHW: NDArray[Any]) -> "CaseSlice":
        """The slice of a prediction where the truth has most labelled voxels, the first of several.

        Args:
            prediction_DHW: Label values.
            truth_DHW: Label values on the same grid.
        """
        at = int(np.count_nonzero(truth_DHW, axis=(1, 2)).argmax())
        return cls(at, prediction_DHW[at].astype(np.int32))

    def to_json(self) -> dict[str, Any]:
        """Place and extent, and the values compressed, as text."""
        packed = base64.b64encode(zlib.compress(self.classes_HW.tobytes())).decode()
        return {"at": self.at, "size_HW": list(self.classes_HW.shape), "classes": packed}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CaseSlice":
        """Inverse of `to_json`."""
        values = np.frombuffer(zlib.decompress(base64.b64decode(data["classes"])), np.int32)
        return cls(int(data["at"]), values.reshape(data["size_HW"]))


def dice_by_volume(cases: Sequence[CaseScore]) -> dict[str, float]:
    """Mean Dice over labels of each volume."""
    values: dict[str, list[float]] = {}
    for case in cases:
        values.setdefault(case.volume_id, []).append(case.scores.dice)
    return {volume: float(np.mean(of_labels)) for volume, of_labels in values.items()}


def mean_scores(cases: Sequence[CaseScore]) -> Scores:
    """Mean of each metric over cases, of which there must be one."""
    return _reduced(cases, np.mean)


def sd_scores(cases: Sequence[CaseScore]) -> Scores:
    """Standard deviation of each metric over cases, divided by their number."""
    return _reduced(cases, np.std)


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
    scores = {}
    for value, name in labels.items():
        masks = MaskPair(prediction_DHW == value, truth_DHW == value, spacing_mm, tolerance_mm)
        scores[name] = Scores(**{metric.name: metric.formula(masks) for metric in METRICS})
    return scores


def _reduced(cases: Sequence[CaseScore], statistic: Callable[[NDArray[np.float64]], np.floating[Any]]) -> Scores:
    return Scores(**{m.name: float(statistic(np.array([c.scores.of(m) for c in cases]))) for m in METRICS})


def _surface(mask: Mask) -> Mask:
    from scipy import ndimage  # see the top of this file

    return mask & ~ndimage.binary_erosion(mask)
