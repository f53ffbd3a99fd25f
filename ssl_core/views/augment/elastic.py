"""Elastic deformation as a cubic B-spline over a few control points, so that its geometry stays exact and small.

The displacement is known at every point, not only at voxels: `ssl_core.methods.parts.points` evaluates and inverts it.
Control points are so far apart for their size that the deformation is a contraction with factor one half at most: it
never folds, and its inverse is a short fixed-point iteration.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_core.views.augment.draws import uniforms


def spacing_vox(largest_vox: float) -> float:
    """Distance of control points, view voxels.

    The slopes of a cubic B-spline with coefficients in [-m, m] are at most 1.5 m / spacing along each of three axes:
    9 m keeps their sum below one half. At least 8 voxels (our choice).
    """
    return max(8.0, 9.0 * largest_vox)


def draw(
    largest_vox: float,
    size_DHW: tuple[int, int, int],
    *,
    seed: int,
    sample_B: NDArray[np.int64],
    purpose: tuple[str | int, ...],
) -> NDArray[np.float64]:
    """Control displacements (B, 3, a, b, c) in view voxels, uniform in [-largest, largest]."""
    counts = control_counts(size_DHW, spacing_vox(largest_vox))
    u = uniforms(seed, sample_B, ("elastic", *purpose), 3 * int(np.prod(counts)))
    return largest_vox * (2 * u - 1).reshape(-1, 3, *counts)


def control_counts(size_DHW: tuple[int, int, int], spacing: float) -> tuple[int, int, int]:
    """Control points along each axis: one before the first voxel and two past the last."""
    a, b, c = (int(np.ceil(n / spacing)) + 3 for n in size_DHW)
    return a, b, c


def displacement(control_B3abc: Tensor, points_BM3: Tensor, spacing: float) -> Tensor:
    """Displacement in view voxels at points given in edge coordinates of the view, (B, M, 3)."""
    a, b, c = (_basis(points_BM3[..., i], control_B3abc.shape[2 + i], spacing) for i in range(3))
    return torch.einsum("bma,bmh,bmw,biahw->bmi", a, b, c, control_B3abc)


def dense(control_B3abc: Tensor, size_DHW: tuple[int, int, int], spacing: float) -> Tensor:
    """Displacement in view voxels at every voxel centre, (B, 3, D, H, W)."""
    a, b, c = (
        _basis(torch.arange(n, device=control_B3abc.device, dtype=control_B3abc.dtype) + 0.5, k, spacing)
        for n, k in zip(size_DHW, control_B3abc.shape[2:], strict=True)
    )
    x = torch.einsum("wc,biahc->biahw", c, control_B3abc)
    x = torch.einsum("vh,biahw->biavw", b, x)
    return torch.einsum("da,biavw->bidvw", a, x)


def _basis(x: Tensor, count: int, spacing: float) -> Tensor:
    """Cubic B-spline weights (..., count) of control points at (k - 1) spacing."""
    t = (x[..., None] / spacing - torch.arange(-1, count - 1, device=x.device, dtype=x.dtype)).abs()
    near = 2 / 3 - t**2 * (1 - t / 2)
    far = (2 - t).clamp_min(0) ** 3 / 6
    return torch.where(t < 1, near, far)
