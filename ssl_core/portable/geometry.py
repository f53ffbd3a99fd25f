"""From a file's grid to the canonical frame and back.

File order is (I, J, K); canonical is (D, H, W) with D inferior to superior, H posterior to anterior, W left to right.
The way in is ingest's own; the way back is here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RefusedInput
from .grid import canonicalise, check_affine, nearest_axes, shear, spacing_dhw

_MAX_SHEAR = 1e-3
"""Largest cosine between two voxel axes that still counts as rounding of the header; ingest's value."""


@dataclass(frozen=True)
class Frame:
    """The canonical frame of a volume, and how it lies in its file.

    Attributes:
        affine: (4, 4); canonical voxel-centre indices (w, h, d, 1) to RAS+ mm.
        source: For x, y, z (W, H, D) the file axis that runs along it.
        flip: For x, y, z whether the file axis runs against it.
    """

    affine: NDArray[np.float64]
    source: tuple[int, int, int] = (0, 1, 2)
    flip: tuple[bool, bool, bool] = (False, False, False)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """(D, H, W)."""
        return spacing_dhw(self.affine)

    def to_file(self, array_DHW: NDArray[Any]) -> NDArray[Any]:
        """An array on the canonical grid, (D, H, W), in file order: C-contiguous (I, J, K)."""
        along_xyz = array_DHW.transpose(2, 1, 0)[tuple(slice(None, None, -1 if f else 1) for f in self.flip)]
        return np.ascontiguousarray(along_xyz.transpose(np.argsort(self.source)))


@dataclass(frozen=True, kw_only=True)
class Canonical(Frame):
    """A volume in the canonical frame.

    Attributes:
        values_CDHW: Voxels, C-contiguous.
    """

    values_CDHW: NDArray[Any]


def to_canonical(name: str, array: NDArray[Any], affine: NDArray[Any]) -> Canonical:
    """Turn (I, J, K) or (I, J, K, C) in file order to the canonical frame by flips and permutations alone.

    Raises:
        RefusedInput: the affine is no geometry, or is sheared.
    """
    matrix = check_affine(np.asarray(affine, np.float64), name)
    if shear(matrix) > _MAX_SHEAR:
        raise RefusedInput(
            name,
            expected="voxel axes at right angles",
            found=f"a sheared affine, cosine {shear(matrix):.3f} between two axes",
            remedy="resample the volume to an orthogonal grid",
        )
    channels_last = array if array.ndim == 4 else array[..., None]
    values, canonical = canonicalise(channels_last.transpose(3, 2, 1, 0), matrix)
    return Canonical(canonical, *nearest_axes(matrix), values_CDHW=values)


def back_to_grid(
    labels_DHW: NDArray[Any],
    spacing_mm: tuple[float, float, float],
    shape_DHW: tuple[int, ...],
    original_mm: tuple[float, float, float],
) -> NDArray[Any]:
    """Nearest neighbour from a resampled grid onto the one it came from; both share their centre (see `grid.resample`).

    Args:
        labels_DHW: Labels on the resampled grid.
        spacing_mm: Its spacing (D, H, W).
        shape_DHW: Voxels of the original grid.
        original_mm: Its spacing.
    """
    index = []
    for m, new, n, old in zip(labels_DHW.shape, spacing_mm, shape_DHW, original_mm, strict=True):
        place = (np.arange(n) + 0.5 - n / 2) * (old / new) + m / 2 - 0.5
        index.append(np.clip(np.floor(place + 0.5).astype(np.intp), 0, m - 1))
    return np.ascontiguousarray(labels_DHW[np.ix_(*index)])
