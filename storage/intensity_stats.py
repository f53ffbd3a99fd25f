"""What "the intensity statistics of a volume" means, defined once for ingest, training and prediction.

The statistics are those of the foreground of one channel's values: the canonical (and, where a policy says so,
resampled) volume after scale and offset and before it is quantised for storage. The definition needs no modality and
follows any rescaling of the intensities with a positive factor, so a CT in Hounsfield units and an MR in arbitrary
units share it:

- low, high: the 0.5th and 99.5th percentile of all finite values;
- foreground: finite values above `low + 0.05 * (high - low)`; all finite values when nothing is above;
- min, max, mean, std (population), p0_5, p99_5: of the foreground values, accumulated in float64.

numpy only: the file is shipped inside model bundles, where nothing else of this project is installed.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

STATS_ORDER = ("min", "max", "mean", "std", "p0_5", "p99_5")
"""Columns of every array of statistics, in order."""

FOREGROUND_FRACTION = 0.05
"""Share of the robust intensity range below which a voxel counts as background."""


Values = npt.NDArray[np.floating[Any]] | npt.NDArray[np.integer[Any]]


def foreground_mask(values: Values) -> npt.NDArray[np.bool_]:
    """Which voxels are foreground; same shape as `values`.

    Raises:
        ValueError: there is no finite value.
    """
    finite = np.isfinite(values)
    known = values if finite.all() else values[finite]
    if known.size == 0:
        raise ValueError("no finite value")
    low, high = np.percentile(known, [0.5, 99.5])
    with np.errstate(invalid="ignore"):
        above: npt.NDArray[np.bool_] = finite & (values > float(low) + FOREGROUND_FRACTION * (float(high) - float(low)))
    return above if above.any() else finite


def foreground_stats(values: Values) -> dict[str, float]:
    """Statistics of the foreground of one channel, with the keys of `STATS_ORDER`.

    Args:
        values: Any shape; intensities after scale and offset.

    Raises:
        ValueError: there is no finite value.
    """
    kept = values[foreground_mask(values)].astype(np.float64)
    low, high = np.percentile(kept, [0.5, 99.5])
    found = (kept.min(), kept.max(), kept.mean(), kept.std(), low, high)
    return {key: float(value) for key, value in zip(STATS_ORDER, found, strict=True)}


def foreground_box(mask_DHW: npt.NDArray[np.bool_]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Smallest box of every true voxel, as (first, one past last) along D, H, W; the whole array if none is true."""
    bounds = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hits = np.flatnonzero(mask_DHW.any(axis=others))
        bounds.append((int(hits[0]), int(hits[-1]) + 1) if hits.size else (0, mask_DHW.shape[axis]))
    (d0, d1), (h0, h1), (w0, w1) = bounds
    return (d0, h0, w0), (d1, h1, w1)
