"""The boxes that views show, and how much two of them overlap."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Boxes:
    """The box of one view of each of B samples.

    Attributes:
        size_DHW: Voxels of the view.
        linear_B33: View voxels to volume voxels, without flips.
        low_B3: Lower corner of the bounding box, volume edge coordinates.
    """

    size_DHW: tuple[int, int, int]
    linear_B33: F64
    low_B3: F64

    @property
    def extent_B3(self) -> F64:
        """Sides of the bounding boxes, volume voxels."""
        return extents(self.linear_B33, self.size_DHW)

    @property
    def centre_B3(self) -> F64:
        """Centres, volume edge coordinates."""
        return self.low_B3 + self.extent_B3 / 2

    def where(self, mask_B: NDArray[np.bool_], other: "Boxes") -> "Boxes":
        """`self` where the mask is set, else `other`."""
        return Boxes(
            self.size_DHW,
            np.where(mask_B[:, None, None], self.linear_B33, other.linear_B33),
            np.where(mask_B[:, None], self.low_B3, other.low_B3),
        )


def iou(a: Boxes, b: Boxes) -> F64:
    """Intersection over union of two boxes of each sample, (B,); exact for boxes rotated about D."""
    low = np.maximum(a.low_B3, b.low_B3)
    high = np.minimum(a.low_B3 + a.extent_B3, b.low_B3 + b.extent_B3)
    side = np.maximum(high - low, 0)
    plane = side[:, 1] * side[:, 2]
    turned = (a.linear_B33[:, 1, 2] != 0) | (b.linear_B33[:, 1, 2] != 0)
    if turned.any():
        plane = np.where(turned, _overlap_area(_footprint(a), _footprint(b)), plane)
    both = side[:, 0] * plane
    volume = [np.abs(np.linalg.det(box.linear_B33)) * np.prod(box.size_DHW) for box in (a, b)]
    return np.asarray(both / (volume[0] + volume[1] - both))


def extents(linear_B33: F64, size_DHW: tuple[int, int, int]) -> F64:
    """Sides (B, 3) of the bounding box of a view of this size under a linear map."""
    return np.asarray(np.abs(linear_B33) @ np.array(size_DHW, np.float64))


def _footprint(box: Boxes) -> F64:
    """Corners in (H, W) in the order that keeps the inside to the left, (B, 4, 2)."""
    signs = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    half = signs * np.array(box.size_DHW[1:]) / 2
    return np.asarray(half @ np.swapaxes(box.linear_B33[:, 1:, 1:], 1, 2) + box.centre_B3[:, None, 1:])


def _overlap_area(subject_B42: F64, window_B42: F64) -> F64:
    """Area that two convex quadrilaterals of each sample share (Sutherland-Hodgman, vectorised), (B,).

    Clipping by one side keeps a corner, adds a crossing, both or neither; where there is nothing to add, the corner
    before is repeated, which leaves the area as it is and the arrays rectangular.
    """
    polygon = subject_B42
    for side in range(4):
        start, stop = window_B42[:, side], window_B42[:, (side + 1) % 4]
        along = (stop - start)[:, None]
        to_corner = polygon - start[:, None]
        height = along[..., 0] * to_corner[..., 1] - along[..., 1] * to_corner[..., 0]
        following, height_after = np.roll(polygon, -1, axis=1), np.roll(height, -1, axis=1)
        inside, crosses = height >= 0, (height >= 0) != (height_after >= 0)
        share = np.where(crosses, height / np.where(crosses, height - height_after, 1.0), 0.0)
        crossing = polygon + share[..., None] * (following - polygon)
        batch, count = inside.shape
        points = np.stack([polygon, crossing], axis=2).reshape(batch, 2 * count, 2)
        kept = np.stack([inside, crosses], axis=2).reshape(batch, 2 * count)
        order = np.maximum.accumulate(np.where(kept, np.arange(2 * count), -1), axis=1)
        order = np.where(order < 0, order[:, -1:], order)  # before the first kept point comes the last
        polygon = np.take_along_axis(points, np.maximum(order, 0)[..., None], axis=1)
    x, y = polygon[..., 0] - polygon[:, :1, 0], polygon[..., 1] - polygon[:, :1, 1]
    return np.asarray(np.abs((x * np.roll(y, -1, axis=1) - np.roll(x, -1, axis=1) * y).sum(1)) / 2)
