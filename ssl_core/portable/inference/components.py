"""The largest connected component of a label.

Voxels that share a face, an edge or a corner are connected. Of components of one size the first in the order of the
array stays. What is taken away becomes background, also where another label was the network's second choice. A label
that is nowhere stays nowhere: no rule makes or empties a mask.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TOUCHING = np.ones((3, 3, 3), bool)


def keep_largest(labels_DHW: NDArray[Any], values: Iterable[int]) -> dict[int, int]:
    """Set to 0, in place, all but the largest component of each value.

    Args:
        labels_DHW: Label values.
        values: Those whose components are counted.

    Returns:
        Voxels that were taken away, by value; values that lost none are left out.
    """
    from scipy import ndimage  # late: half a second, and every job reads this module

    removed: dict[int, int] = {}
    for value in values:
        box = _box(labels_DHW, value)
        if box is None:
            continue
        part = labels_DHW[box]
        components, count = ndimage.label(part == value, _TOUCHING)
        if count < 2:
            continue
        sizes = np.bincount(components.ravel())
        sizes[0] = 0
        lost = (components != sizes.argmax()) & (components != 0)
        part[lost] = 0
        removed[value] = int(np.count_nonzero(lost))
    return removed


def _box(labels_DHW: NDArray[Any], value: int) -> tuple[slice, slice, slice] | None:
    """Smallest box with all voxels of a value, slice by slice, so that no mask of the whole volume is made."""
    depth, height, width = labels_DHW.shape
    hit = [np.zeros(n, bool) for n in (depth, height, width)]
    for d in range(depth):
        plane = labels_DHW[d] == value
        hit[0][d] = plane.any()
        hit[1] |= plane.any(1)
        hit[2] |= plane.any(0)
    if not hit[0].any():
        return None
    bounds = [np.flatnonzero(side) for side in hit]
    a, b, c = (slice(int(places[0]), int(places[-1]) + 1) for places in bounds)
    return a, b, c
