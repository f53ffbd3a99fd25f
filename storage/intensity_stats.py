"""What "the intensity statistics of a volume" means, defined once for ingest, training and prediction.

Each channel has its own, of its own foreground: those of a channel do not depend on the channels beside it. They are
of the canonical (and, where a policy says so, resampled) volume's values after scale and offset and before they are
quantised for storage. The definition needs no modality and follows any rescaling of a channel's intensities with a
positive factor, so a CT in Hounsfield units and an MR in arbitrary units share it:

- low, high: the 0.5th and 99.5th percentile of all finite values;
- foreground: finite values above `low + 0.05 * (high - low)`; all finite values when nothing is above;
- min, max, mean, std (population), p0_5, p99_5: of the foreground values, accumulated in float64.

A channel of one value everywhere, such as a series that is missing and was filled with 0, is all foreground by this
rule, with std 0; normalisation makes it 0 everywhere. It says nothing of where the body is.

Sums are numpy's own and not BLAS's, whose order follows the number of cores: a scan has the same statistics everywhere.

numpy only: the file is shipped inside model bundles, where nothing else of this project is installed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

STATS_ORDER = ("min", "max", "mean", "std", "p0_5", "p99_5")
"""Columns of every array of statistics, in order."""

FOREGROUND_FRACTION = 0.05
"""Share of the robust intensity range below which a voxel counts as background."""


SHARES = (0.005, 0.995)
HISTOGRAM_RANGE = 1 << 17
"""Whole numbers that span less than this are counted value by value, several times as fast as partial sorting."""
_BLOCK = 1 << 18
_SMALL = 1 << 17
"""Values up to which sorting all of them takes less time than bracketing two percentiles."""

Values = npt.NDArray[np.floating[Any]] | npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]


def foreground_mask(values: Values) -> Mask:
    """Which voxels are foreground; same shape as `values`.

    Raises:
        ValueError: there is no finite value.
    """
    return _mask(values, _percentiles(_finite(values)))


def foreground_stats(values: Values) -> dict[str, float]:
    """Statistics of the foreground of one channel, with the keys of `STATS_ORDER`.

    Args:
        values: Any shape; intensities after scale and offset.

    Raises:
        ValueError: there is no finite value.
    """
    return foreground(values)[1]


def foreground(values: Values) -> tuple[Mask, dict[str, float]]:
    """`foreground_mask` and `foreground_stats` of one channel in one pass over it.

    Raises:
        ValueError: there is no finite value.
    """
    counted = _counts(values)
    if counted is not None:
        lowest, counts = counted
        bounds = _ranks(lowest, counts)
        mask = _mask(values, bounds)
        first = np.flatnonzero(np.arange(lowest, lowest + counts.size) > _threshold(bounds))
        if counts[first].any():
            lowest, counts = lowest + int(first[0]), counts[first]
        return mask, _counted_stats(lowest, counts)
    finite = _finite(values).reshape(-1)
    ordered = finite.copy() if finite.size <= _SMALL else None
    if ordered is not None:
        ordered.sort()
    ranked = _ranked_by(finite, ordered)
    mask = _mask(values, _bounds(finite.size, ranked))
    inside = values[mask]
    below = finite.size - inside.size  # the foreground are the greatest of the finite values
    mean = float(inside.mean(dtype=np.float64))
    apart = np.subtract(inside, mean, dtype=np.float64)
    np.square(apart, out=apart)
    std = float(np.sqrt(apart.sum() / inside.size))
    low, high = _bounds(inside.size, lambda k: ranked(below + k))
    return mask, dict(zip(STATS_ORDER, (float(inside.min()), float(inside.max()), mean, std, low, high), strict=True))


def channel_foreground(values_CDHW: Values) -> tuple[Mask, tuple[dict[str, float], ...]]:
    """Where any channel has foreground, (D, H, W), and `foreground_stats` of each channel.

    Channels of one value everywhere do not count for the mask, unless there are no others.

    Raises:
        ValueError: a channel has no finite value.
    """
    union: Mask | None = None
    stats: list[dict[str, float]] = []
    for channel in values_CDHW:
        mask, channel_stats = foreground(channel)
        stats.append(channel_stats)
        if channel_stats["min"] == channel_stats["max"] and mask.all():
            continue
        union = mask if union is None else np.logical_or(union, mask, out=union)
    return np.ones(values_CDHW.shape[1:], bool) if union is None else union, tuple(stats)


def _finite(values: Values) -> Values:
    finite = np.isfinite(values)
    numbers = values if finite.all() else values[finite]
    if numbers.size == 0:
        raise ValueError("no finite value")
    return numbers


def _threshold(bounds: tuple[float, float]) -> float:
    low, high = bounds
    return low + FOREGROUND_FRACTION * (high - low)


def _mask(values: Values, bounds: tuple[float, float]) -> Mask:
    threshold = _threshold(bounds)
    if values.dtype.kind in "iu":  # compared as whole numbers, without a float copy
        above: Mask = values > np.floor(threshold).astype(values.dtype)
        return above if above.any() else np.ones(values.shape, bool)
    with np.errstate(invalid="ignore"):
        above = values > threshold
        above &= values < np.inf
    return above if above.any() else np.isfinite(values)


def _percentiles(values: Values) -> tuple[float, float]:
    """The 0.5th and 99.5th percentile of finite values, as `numpy.percentile` defines them ("linear")."""
    counted = _counts(values)
    return _bounds(values.size, _ranked_by(values.reshape(-1), None)) if counted is None else _ranks(*counted)


def _bounds(size: int, ranked: Callable[[int], tuple[float, float]]) -> tuple[float, float]:
    """Both percentiles of that many values; `ranked` as of `_blend`."""
    low, high = (_blend(share, size, ranked) for share in SHARES)
    return low, high


def _ranked_by(flat: Values, ordered: Values | None) -> Callable[[int], tuple[float, float]]:
    """A function of k: the k-th and next smallest of finite values; one sample of them serves every k."""
    if ordered is not None:
        return lambda k: (float(ordered[k]), float(ordered[min(k + 1, ordered.size - 1)]))
    sample: Any = np.sort(flat[:: max(1, flat.size // 40_000)])
    return lambda k: _ranked(flat, sample, k)


def _blend(share: float, size: int, ranked: Callable[[int], tuple[float, float]]) -> float:
    """A percentile from the values of the two ranks around it; `ranked(k)` gives those of k and of the one after."""
    place = share * (size - 1)
    below = min(int(place), max(size - 2, 0))
    a, b = ranked(below)
    part = place - below
    return a + (b - a) * part if part < 0.5 else b - (b - a) * (1 - part)


def _ranked(flat: Values, sample: Values, k: int) -> tuple[float, float]:
    """The k-th and next smallest of an array, exactly.

    A sorted sample of it brackets them, and only what lies between is sorted.
    """
    size = flat.size
    share = k / size
    place, margin = share * sample.size, 6 * np.sqrt(sample.size * share * (1 - share)) + 3
    low, high = sample[max(0, int(place - margin))], sample[min(sample.size - 1, int(place + margin) + 1)]
    near = flat[(flat >= low) & (flat <= high)]
    rest = k - int(np.count_nonzero(flat < low))
    if rest < 0 or rest + 1 >= near.size:  # the values lie in an order that the sample missed
        near, rest = flat, k
    last = min(rest + 1, near.size - 1)
    partitioned = np.partition(near, [rest, last])
    return float(partitioned[rest]), float(partitioned[last])


def _counts(values: Values) -> tuple[int, npt.NDArray[np.int64]] | None:
    """The least value and how often it and each whole number after it occurs; None for anything but whole numbers."""
    if values.dtype.kind not in "iu" or values.size == 0:
        return None
    low, high = int(values.min()), int(values.max())
    if high - low >= HISTOGRAM_RANGE:
        return None
    counts = np.zeros(high - low + 1, np.int64)
    flat = values.reshape(-1)
    for at in range(0, flat.size, _BLOCK):  # a block at a time, since counting needs eight bytes a value
        block = flat[at : at + _BLOCK].astype(np.int64)
        block -= low
        counts += np.bincount(block, minlength=counts.size)
    return low, counts


def _ranks(lowest: int, counts: npt.NDArray[np.int64]) -> tuple[float, float]:
    upto = counts.cumsum()
    size = int(upto[-1])

    def ranked(k: int) -> tuple[float, float]:
        a, b = np.searchsorted(upto, [k, min(k + 1, size - 1)], side="right")
        return float(lowest + int(a)), float(lowest + int(b))

    low, high = (_blend(share, size, ranked) for share in SHARES)
    return low, high


def _counted_stats(lowest: int, counts: npt.NDArray[np.int64]) -> dict[str, float]:
    present = np.flatnonzero(counts)
    at, often = present.astype(np.float64) + lowest, counts[present].astype(np.float64)
    mean = float((at * often).sum() / often.sum())
    std = float(np.sqrt(((at - mean) ** 2 * often).sum() / often.sum()))
    low, high = _ranks(lowest, counts)
    return dict(zip(STATS_ORDER, (float(at[0]), float(at[-1]), mean, std, low, high), strict=True))


def foreground_box(mask_DHW: npt.NDArray[np.bool_]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Smallest box of every true voxel, as (first, one past last) along D, H, W; the whole array if none is true."""
    bounds = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        hits = np.flatnonzero(mask_DHW.any(axis=others))
        bounds.append((int(hits[0]), int(hits[-1]) + 1) if hits.size else (0, mask_DHW.shape[axis]))
    (d0, d1), (h0, h1), (w0, w1) = bounds
    return (d0, h0, w0), (d1, h1, w1)
