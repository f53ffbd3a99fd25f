"""A small signature of a scan, equal for copies of it that were saved in another way.

The foreground's centre and spread along each axis place a grid of `GRID`^3 boxes over the body, so that padding, voxel
sizes and turned axes do not matter. The mean of the values in each box is replaced by its rank, so that a scale, an
offset and a moderate change of contrast do not matter. What is left is projected on cosines of low frequency. The
lowest, which all people share, are left out, and the others weighted by the square of their frequency. A copy turned
round along an axis differs in the sign of odd cosines.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SIGNATURE_NOTE = "signature="
SMALLEST = 4096
"""Voxels; a smaller volume has no signature."""
GRID = 20
"""Boxes along each axis."""
EDGE = 0.15
SPREADS = 2.2
"""Standard deviations of the foreground's coordinates from its centre to the edge of the grid."""
FREQUENCIES = 9
"""Cosines along each axis, the constant one included."""
LOWEST, HIGHEST = 4, 12
"""Least and greatest sum of the three frequencies of a coefficient."""
_ORDERS = np.stack(np.meshgrid(*[np.arange(FREQUENCIES)] * 3, indexing="ij"), -1).reshape(-1, 3)
ORDERS = _ORDERS[(_ORDERS.sum(1) >= LOWEST) & (_ORDERS.sum(1) <= HIGHEST)]
"""Frequencies along D, H, W of each coefficient, (n, 3)."""
_CONTRACTION = ["einsum_path", (0, 3), (0, 2), (0, 1)]
"""One axis after another; looking for this order takes as long as the sums."""
_AT_ONCE = 1 << 19
"""Voxels of planes that are worked on by one call: it costs microseconds whatever their number."""


def signature(channel_DHW: Array, low: float, high: float) -> npt.NDArray[np.int8]:
    """Coefficients of one channel, (n,), of which the largest is 127 or -127; zeros where it has no structure.

    Args:
        channel_DHW: In canonical axes.
        low, high: Range of its foreground. What lies in the lowest `EDGE` of it, and beyond the volume, counts as one
            value, so that noise of the background does not matter.
    """
    edge = low + EDGE * (high - low)
    mask_DHW = channel_DHW > edge
    weights = [_boxes(profile) for profile in _profiles(mask_DHW)]
    values = _means(channel_DHW, edge, weights).reshape(-1)
    values = np.where(values > 1e-6 * values.max(initial=0), values, 0)
    ranks = _ranks(values)
    centred = (ranks - ranks.mean()).reshape(GRID, GRID, GRID)
    places = (np.arange(GRID) + 0.5) / GRID
    cosines = np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * places)
    cosines[0] *= np.sqrt(0.5)
    spectrum = np.einsum("ia,jb,kc,abc->ijk", cosines, cosines, cosines, centred, optimize=_CONTRACTION)
    coefficients = spectrum[tuple(ORDERS.T)] * ORDERS.sum(1) ** 2
    largest = np.abs(coefficients).max()
    if largest <= 1e-6 * ranks.size:
        return np.zeros(len(ORDERS), np.int8)
    rounded: npt.NDArray[np.int8] = np.rint(coefficients * (127 / largest)).astype(np.int8)
    return rounded


def signature_note(coefficients: npt.NDArray[np.int8]) -> str:
    """How the notes of a record hold a signature."""
    return SIGNATURE_NOTE + base64.b85encode(coefficients.tobytes()).decode()


def noted_signature(notes: Sequence[str]) -> npt.NDArray[np.int8] | None:
    """The signature among the notes of a record; None where there is none that can be read."""
    for note in notes:
        if note.startswith(SIGNATURE_NOTE):
            try:
                data = base64.b85decode(note.removeprefix(SIGNATURE_NOTE))
            except ValueError:
                return None
            return np.frombuffer(data, np.int8) if len(data) == len(ORDERS) else None
    return None


def _means(channel_DHW: Array, edge: float, weights: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """What lies above the edge, averaged over each box, (GRID, GRID, GRID).

    Args:
        weights: Share of each box that each plane across D, H and W fills.
    """
    rows, columns = weights[1].astype(np.float32), weights[2].T.astype(np.float32)
    planes = np.zeros((len(channel_DHW), GRID, GRID), np.float32)
    step = max(1, _AT_ONCE // max(1, channel_DHW[0].size))
    for at in range(0, len(channel_DHW), step):
        above = channel_DHW[at : at + step].astype(np.float32)
        above -= np.float32(edge)
        np.maximum(above, np.float32(0), out=above)
        planes[at : at + step] = rows @ above @ columns
    grid = np.zeros((GRID, GRID, GRID))
    for box, share in enumerate(weights[0]):
        inside = np.flatnonzero(share)
        if inside.size:
            grid[box] = (share[inside, None, None] * planes[inside]).sum(0)  # in order of the planes, one by one
    return grid


def _profiles(mask_DHW: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
    """Foreground voxels of each plane across D, H and W."""
    through = np.zeros(mask_DHW.shape[1:], np.int64)
    for at in range(0, len(mask_DHW), 255):  # of so many planes a byte holds the sum
        through += mask_DHW[at : at + 255].view(np.uint8).sum(0, dtype=np.uint8)
    depth = np.array([np.count_nonzero(plane) for plane in mask_DHW], np.int64)
    return [depth, through.sum(1), through.sum(0)]


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """How many values are less, plus how many are not greater: twice the mean rank of equal ones."""
    order = np.argsort(values)
    ordered = values[order]
    first = np.append(True, ordered[1:] != ordered[:-1])
    starts = np.flatnonzero(first)
    sums = starts + np.append(starts[1:], values.size)
    ranks = np.empty(values.size, np.int64)
    ranks[order] = sums[np.cumsum(first) - 1]
    return ranks


def _boxes(profile: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Share of each box that each plane fills, (GRID, planes)."""
    planes = np.arange(len(profile))
    total = max(int(profile.sum()), 1)
    centre = float(profile @ (planes + 0.5)) / total
    # Of voxels as boxes, not as points: 1/12 is the spread within one.
    spread = np.sqrt(float(profile @ (planes + 0.5 - centre) ** 2) / total + 1 / 12)
    edges = centre + spread * SPREADS * np.linspace(-1, 1, GRID + 1)
    upto = np.clip(edges[:, None] - planes, 0, 1)
    shares: npt.NDArray[np.float64] = np.diff(upto, axis=0) / (edges[1] - edges[0])
    return shares
