"""File order to the canonical frame and back, and resampling, by index arithmetic alone.

File order is (I, J, K); canonical is (D, H, W) with D inferior to superior, H posterior to anterior, W left to right.
Oblique volumes keep their grid: axes go to the nearest anatomical axis, no voxel is interpolated for it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .errors import RefusedInput

_MAX_SHEAR = 1e-2
"""Largest cosine between two voxel axes that still counts as rounding of the header."""


@dataclass(frozen=True)
class Frame:
    """How a canonical array lies in its file.

    Attributes:
        shape_IJK: Voxels in file order.
        axes: For W, H, D (that is x, y, z) the file axis that runs along it.
        signs: For W, H, D: 1 when the file axis runs towards right, anterior, superior; -1 when against.
        spacing_mm: (D, H, W).
        affine: (4, 4); canonical voxel-centre indices (w, h, d, 1) to RAS+ mm.
    """

    shape_IJK: tuple[int, int, int]
    axes: tuple[int, int, int]
    signs: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: NDArray[np.float64]

    def to_canonical(self, array: NDArray[Any]) -> NDArray[Any]:
        """(I, J, K) to a (D, H, W) view."""
        along_xyz = array.transpose(self.axes)[tuple(slice(None, None, sign) for sign in self.signs)]
        return along_xyz.transpose(2, 1, 0)

    def to_file(self, array_DHW: NDArray[Any]) -> NDArray[Any]:
        """(D, H, W) back to a C-contiguous (I, J, K); the inverse of `to_canonical`."""
        along_xyz = array_DHW.transpose(2, 1, 0)[tuple(slice(None, None, sign) for sign in self.signs)]
        return np.ascontiguousarray(along_xyz.transpose(np.argsort(self.axes)))


def frame_of(name: str, shape_IJK: tuple[int, int, int], affine: NDArray[Any]) -> Frame:
    """The canonical frame of a file grid.

    Axes are assigned to the anatomical axes by the rotation nearest to the affine (its polar factor), strongest match
    first, so that 45 degree cases cannot claim one anatomical axis twice.

    Raises:
        RefusedInput: the affine is singular, not finite, or sheared.
    """
    affine = np.asarray(affine, np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise RefusedInput(
            name, expected="a finite 4x4 affine", found=np.array2string(affine), remedy="repair the header"
        )
    columns = affine[:3, :3]
    zooms = np.linalg.norm(columns, axis=0)
    if not (zooms > 1e-9).all():
        raise RefusedInput(name, expected="voxels with an extent", found=f"spacing {zooms}", remedy="repair the header")
    unit = columns / zooms
    cosines = np.abs(unit.T @ unit - np.eye(3))
    if cosines.max() > _MAX_SHEAR:
        raise RefusedInput(
            name,
            expected="voxel axes at right angles",
            found=f"a sheared affine, cosine {cosines.max():.3f} between two axes",
            remedy="resample the volume to an orthogonal grid",
        )
    left, _, right = np.linalg.svd(unit)
    rotation = left @ right
    weight = np.abs(rotation)  # [anatomical axis, file axis]
    axes, signs = [0, 0, 0], [1, 1, 1]
    for _ in range(3):
        best, match = divmod(int(np.argmax(weight)), 3)
        axes[best], signs[best] = match, 1 if rotation[best, match] > 0 else -1
        weight[best, :], weight[:, match] = -1, -1
    to_file = np.zeros((4, 4))  # canonical (w, h, d, 1) to file (i, j, k, 1)
    to_file[3, 3] = 1
    for world in range(3):
        to_file[axes[world], world] = signs[world]
        to_file[axes[world], 3] = 0 if signs[world] > 0 else shape_IJK[axes[world]] - 1
    x, y, z = (float(zooms[axis]) for axis in axes)
    return Frame(shape_IJK, (axes[0], axes[1], axes[2]), (signs[0], signs[1], signs[2]), (z, y, x), affine @ to_file)


def resampled_shape(
    shape_DHW: tuple[int, ...], spacing_mm: tuple[float, ...], target_mm: tuple[float, ...]
) -> tuple[int, int, int]:
    """Voxels along D, H, W that cover the same extent at another spacing."""
    d, h, w = (max(1, round(n * old / new)) for n, old, new in zip(shape_DHW, spacing_mm, target_mm, strict=True))
    return d, h, w


def resample_linear(values_DHW: NDArray[Any], shape_DHW: tuple[int, int, int]) -> NDArray[np.float32]:
    """Linear interpolation onto another grid of the same extent, edges clamped, with a Gaussian before thinning.

    Both grids share the outer faces of their first and last voxels: centre i of the new grid lies at
    (i + 0.5) * old / new - 0.5 of the old one. Axes that lose voxels are smoothed with sigma = (old / new - 1) / 2
    voxels, so that structures smaller than the new voxels do not alias.
    """
    values = np.asarray(values_DHW, np.float32)
    if values.shape == shape_DHW:
        return values
    ratio = [old / new for old, new in zip(values.shape, shape_DHW, strict=True)]
    if max(ratio) > 1:
        values = ndimage.gaussian_filter(values, [max(0.0, (r - 1) / 2) for r in ratio], mode="nearest")
    for axis, (r, new) in enumerate(zip(ratio, shape_DHW, strict=True)):
        if values.shape[axis] == new:
            continue
        position = np.clip((np.arange(new) + 0.5) * r - 0.5, 0, values.shape[axis] - 1)
        low = np.floor(position).astype(np.intp)
        high = np.minimum(low + 1, values.shape[axis] - 1)
        part = (position - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        values = values.take(low, axis) * (1 - part) + values.take(high, axis) * part
    return values


def resample_nearest(labels_DHW: NDArray[Any], shape_DHW: tuple[int, int, int]) -> NDArray[Any]:
    """Nearest neighbour onto another grid of the same extent."""
    result = labels_DHW
    for axis, new in enumerate(shape_DHW):
        old = result.shape[axis]
        if old != new:
            index = np.floor((np.arange(new) + 0.5) * (old / new)).astype(np.intp)
            result = result.take(np.clip(index, 0, old - 1), axis)
    return result
