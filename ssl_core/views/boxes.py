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

    def rows(self, index_N: NDArray[np.int64]) -> "Boxes":
        """The boxes of these samples."""
        return Boxes(self.size_DHW, self.linear_B33[index_N], self.low_B3[index_N])

    def with_rows(self, index_N: NDArray[np.int64], others: "Boxes") -> "Boxes":
        """The same, with the boxes of these samples replaced."""
        linear_B33, low_B3 = self.linear_B33.copy(), self.low_B3.copy()
        linear_B33[index_N], low_B3[index_N] = others.linear_B33, others.low_B3
        return Boxes(self.size_DHW, linear_B33, low_B3)

    def where(self, mask_B: NDArray[np.bool_], other: "Boxes") -> "Boxes":
        """`self` where the mask is set, else `other`."""
        return Boxes(
            self.size_DHW,
            np.where(mask_B[:, None, None], self.linear_B33, other.linear_B33),
            np.where(mask_B[:, None], self.low_B3, other.low_B3),
        )


def overlap_less(a: Boxes, b: Boxes, least: float) -> NDArray[np.bool_]:
    """Whether `iou` is below `least`, (B,); worked out only where bounding boxes do not already say so."""
    most = np.minimum(_shared_sides(a, b).prod(1), np.minimum(_volume(a), _volume(b)))
    less = most / (_volume(a) + _volume(b) - most) < least - 1e-9
    rest = np.flatnonzero(~less)
    if len(rest):
        less[rest] = iou(a.rows(rest), b.rows(rest)) < least
    return np.asarray(less)


def iou(a: Boxes, b: Boxes) -> F64:
    """Intersection over union of two boxes of each sample, (B,); exact, rotated boxes included."""
    side = _shared_sides(a, b)
    plane = side[:, 1] * side[:, 2]
    turned = (a.linear_B33[:, 1, 2] != 0) | (b.linear_B33[:, 1, 2] != 0)
    if turned.any():
        plane = np.where(turned, _overlap_area(_footprint(a), _footprint(b)), plane)
    both = side[:, 0] * plane
    tilted = _tilted(a) | _tilted(b)
    if tilted.any():
        both = np.where(tilted & (side > 0).all(1), _overlap_volume(a, b), both)
    return np.asarray(both / (_volume(a) + _volume(b) - both))


def extents(linear_B33: F64, size_DHW: tuple[int, int, int]) -> F64:
    """Sides (B, 3) of the bounding box of a view of this size under a linear map."""
    return np.asarray(np.abs(linear_B33) @ np.array(size_DHW, np.float64))


def _shared_sides(a: Boxes, b: Boxes) -> F64:
    """Sides of what the bounding boxes share, (B, 3)."""
    low = np.maximum(a.low_B3, b.low_B3)
    high = np.minimum(a.low_B3 + a.extent_B3, b.low_B3 + b.extent_B3)
    return np.maximum(high - low, 0)


def _volume(box: Boxes) -> F64:
    return np.asarray(np.abs(np.linalg.det(box.linear_B33)) * np.prod(box.size_DHW))


def _footprint(box: Boxes) -> F64:
    """Corners in (H, W) in the order that keeps the inside to the left, (B, 4, 2)."""
    signs = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    half = signs * np.array(box.size_DHW[1:]) / 2
    return np.asarray(half @ np.swapaxes(box.linear_B33[:, 1:, 1:], 1, 2) + box.centre_B3[:, None, 1:])


def _tilted(box: Boxes) -> NDArray[np.bool_]:
    """Whether D is mixed with another axis, (B,)."""
    return np.asarray((box.linear_B33[:, 0, 1:] != 0).any(1) | (box.linear_B33[:, 1:, 0] != 0).any(1))


def _overlap_area(subject_B42: F64, window_B42: F64) -> F64:
    """Area that two convex quadrilaterals of each sample share, (B,)."""
    polygon = subject_B42
    for side in range(4):
        start, stop = window_B42[:, side], window_B42[:, (side + 1) % 4]
        along = (stop - start)[:, None]
        to_corner = polygon - start[:, None]
        polygon = _clip(polygon, along[..., 0] * to_corner[..., 1] - along[..., 1] * to_corner[..., 0])
    x, y = polygon[..., 0] - polygon[:, :1, 0], polygon[..., 1] - polygon[:, :1, 1]
    return np.asarray(np.abs((x * np.roll(y, -1, axis=1) - np.roll(x, -1, axis=1) * y).sum(1)) / 2)


def _overlap_volume(a: Boxes, b: Boxes) -> F64:
    """Volume that two parallelepipeds of each sample share, (B,).

    The surface of the shared solid is what each box's faces leave inside the other box; by the divergence theorem its
    volume is the sum over triangles of that surface of det(v0, v1, v2) / 6. Points are kept in the coordinates of both
    boxes, in which they are the cubes [-1, 1]^3, so that clipping compares one coordinate.
    """
    half_a, half_b = (box.linear_B33 * np.array(box.size_DHW) / 2 for box in (a, b))
    a_to_b = np.linalg.solve(half_b, half_a)
    apart = np.linalg.solve(half_b, (a.centre_B3 - b.centre_B3)[:, :, None])
    batch = len(a_to_b)
    cube = np.broadcast_to(_CUBE_FACES.reshape(24, 3).T, (batch, 3, 24))
    faces_of_a = np.concatenate([cube, a_to_b @ cube + apart], axis=1)
    faces_of_b = np.concatenate([np.linalg.solve(a_to_b, cube - apart), cube], axis=1)
    # Where faces coincide only one of the two may count: the slack keeps a's and drops b's.
    parts = []
    for faces, first, slack in ((faces_of_a, 3, 1e-9), (faces_of_b, 0, -1e-9)):
        polygon = faces.transpose(0, 2, 1).reshape(batch * 6, 4, 6)
        for axis in range(first, first + 3):
            for sign in (-1.0, 1.0):
                polygon = _clip(polygon, 1 + slack - sign * polygon[..., axis])
        points = polygon[..., 3:]
        fan = np.cross(points[:, 1:-1], points[:, 2:])
        parts.append((fan @ points[:, 0, :, None]).reshape(batch, -1).sum(1))
    volume = (parts[0] + parts[1]) / 6 * np.abs(np.linalg.det(half_b))
    return np.asarray(np.maximum(volume, 0.0))


def _cube_faces() -> F64:
    """Corners of the six sides of the cube [-1, 1]^3, counter-clockwise seen from outside, (6, 4, 3)."""
    faces = np.zeros((6, 4, 3))
    ring = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    for axis in range(3):
        for side, sign in enumerate((1.0, -1.0)):
            face = faces[2 * axis + side]
            face[:, axis] = sign
            face[:, [(axis + 1) % 3, (axis + 2) % 3]] = ring if sign > 0 else ring[::-1]
    return faces


_CUBE_FACES = _cube_faces()


def _clip(polygon_PNC: F64, height_PN: F64) -> F64:
    """The part of each convex polygon where the height, linear in the point, is not negative (Sutherland-Hodgman).

    Clipping keeps a corner, adds a crossing, both or neither, and leaves at most one corner more; polygons with fewer
    repeat their last, which changes no area and keeps the arrays rectangular.
    """
    height_after = np.roll(height_PN, -1, axis=1)
    inside, crosses = height_PN >= 0, (height_PN >= 0) != (height_after >= 0)
    share = np.where(crosses, height_PN / np.where(crosses, height_PN - height_after, 1.0), 0.0)
    crossing = polygon_PNC + share[..., None] * (np.roll(polygon_PNC, -1, axis=1) - polygon_PNC)
    polygons, count, coordinates = polygon_PNC.shape
    points = np.stack([polygon_PNC, crossing], axis=2).reshape(polygons, 2 * count, coordinates)
    in_result = np.stack([inside, crosses], axis=2).reshape(polygons, 2 * count)
    order = np.argsort(~in_result, axis=1, kind="stable")
    last = np.maximum(in_result.sum(1, keepdims=True) - 1, 0)
    order = np.take_along_axis(order, np.minimum(np.arange(count + 2), last), axis=1)  # two more, lest rounding add one
    return np.take_along_axis(points, order[..., None], axis=1)
