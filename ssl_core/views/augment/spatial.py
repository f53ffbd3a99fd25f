"""Resampling of host crops into views: slices where voxels meet voxels, one product an axis where views are only
scaled and flipped, one gather for all views of a role otherwise.

Without elastic deformation and tilt every coordinate depends on two axes at most, so positions are small float64 arrays
that broadcast. They are made by single products and sums, which are rounded alike on any device; which voxel is nearest
and which is padding is then the same on all of them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ssl_core.to_device import to_device

F64 = NDArray[np.float64]
Size = tuple[int, int, int]


def positions(to_volume_VB34: F64, start_B3: NDArray[np.int64], size_DHW: Size, device: torch.device) -> list[Tensor]:
    """Host-crop edge coordinates of the view's voxel centres along D, H and W.

    Three float64 tensors that broadcast to (V, B, D, H, W).
    """
    centres = [torch.arange(n, dtype=torch.float64, device=device) + 0.5 for n in size_DHW]
    axes = [centres[0][:, None, None], centres[1][:, None], centres[2]]
    shift_VB3 = to_volume_VB34[..., 3] - start_B3
    table = to_device(np.concatenate([to_volume_VB34[..., :3], shift_VB3[..., None]], axis=3), device)
    table = table[..., None, None, None]
    axis_positions = []
    for row in range(3):
        total = table[:, :, row, 3]
        for column, axis in enumerate(axes):
            if to_volume_VB34[:, :, row, column].any():
                total = total + table[:, :, row, column] * axis
        axis_positions.append(total)
    return axis_positions


def deform(position: list[Tensor], to_volume_VB34: Tensor, displacement_VB3DHW: Tensor) -> list[Tensor]:
    """Positions after adding a displacement in view voxels, each (V, B, D, H, W)."""
    moved = torch.einsum("vbij,vbjdhw->vbidhw", to_volume_VB34[..., :3], displacement_VB3DHW)
    return [axis + moved[:, :, row] for row, axis in enumerate(position)]


def linear(host_BCDHW: Tensor, position: list[Tensor], size_DHW: Size) -> Tensor:
    """Trilinear values of every view, (V, B, C, D, H, W); outside the host crop its border is repeated."""
    count = position[0].shape[0]
    batch, channels = host_BCDHW.shape[:2]
    d, h, w = size_DHW
    # `grid_sample` wants (W, H, D), the reverse of the tensor axes, in [-1, 1] over the edges.
    z, y, x = (
        (p * (2 / n) - 1).to(host_BCDHW.dtype).transpose(0, 1)
        for p, n in zip(position, host_BCDHW.shape[2:], strict=True)
    )
    # H and W mostly do not depend on D: fill one slice, repeat it by plain copies, then write D.
    slices = host_BCDHW.new_empty(batch, count, max(x.shape[2], y.shape[2]), h, w, 3)
    slices[..., 0], slices[..., 1] = x, y
    grid = slices.expand(batch, count, d, h, w, 3).contiguous()
    grid[..., 2] = z
    # Views lie side by side along D, so that they share one input, which would otherwise be copied for each of them.
    grid = grid.reshape(batch, count * d, h, w, 3)
    out = functional.grid_sample(host_BCDHW, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out.reshape(batch, channels, count, d, h, w).permute(2, 0, 1, 3, 4, 5).contiguous()


def separable(host_BCDHW: Tensor, position: list[Tensor]) -> Tensor:
    """`linear` for positions whose part along each axis depends on that axis alone: one product for each axis.

    The matrices hold the hat function max(0, 1 - |k - j|) of the fractional index k and the voxel j, which is linear
    interpolation. Sample by sample, so that a view does not depend on its batch in any bit, and because temporaries of
    this size stay in the cache.
    """
    b, c, depth, height, width = host_BCDHW.shape
    along_d, along_h, along_w = (
        _hats(p, n, host_BCDHW.dtype) for p, n in zip(position, (depth, height, width), strict=True)
    )
    v, d, h, w = len(along_d), along_d.shape[2], along_h.shape[2], along_w.shape[2]
    out = host_BCDHW.new_empty(v, b, c, d, h, w)
    for i, host_CDHW in enumerate(host_BCDHW):
        x = along_d[:, i, None] @ host_CDHW.flatten(2)
        x = along_h[:, i, None] @ x.reshape(v, c * d, height, width)
        out[:, i] = (x.reshape(v, c * d * h, width) @ along_w[:, i].transpose(1, 2)).reshape(v, c, d, h, w)
    return out


def _hats(position: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """(V, B, view voxels, host voxels) of one axis; beyond the host crop its border is repeated."""
    k = (position.flatten(2) - 0.5).clamp(0, count - 1)
    voxel = torch.arange(count, dtype=k.dtype, device=k.device)
    return (1 - (k[..., None] - voxel).abs()).clamp_min(0).to(dtype)


def image(
    host_BCDHW: Tensor,
    to_volume_VB34: F64,
    start_B3: NDArray[np.int64],
    position: list[Tensor],
    size_DHW: Size,
    *,
    turned: bool,
) -> Tensor:
    """The values of every view, (V, B, C, D, H, W); views that are only cropped and flipped are exact copies.

    `turned` says whether views may be rotated. It is a fact of the role and not of this batch, because the two ways of
    resampling differ in the last bits, and a view must not depend on the batch that it is in.
    """
    d, h, w = host_BCDHW.shape[2:]
    low_VB3, mirrored_VB3, whole_VB = _slices(to_volume_VB34, start_B3, (d, h, w), size_DHW)
    if whole_VB.all():
        views = host_BCDHW.new_empty((*whole_VB.shape, host_BCDHW.shape[1], *size_DHW))
    else:
        views = linear(host_BCDHW, position, size_DHW) if turned else separable(host_BCDHW, position)
    for v, b in np.argwhere(whole_VB).tolist():
        z, y, x = (slice(n, n + s) for n, s in zip(low_VB3[v, b].tolist(), size_DHW, strict=True))
        flips = [axis + 1 for axis in np.flatnonzero(mirrored_VB3[v, b]).tolist()]
        cut = host_BCDHW[b, :, z, y, x]
        views[v, b] = cut.flip(flips) if flips else cut
    return views


def _slices(
    to_volume_VB34: F64, start_B3: NDArray[np.int64], host_DHW: Size, size_DHW: Size
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """First host voxel (V, B, 3), flipped axes (V, B, 3), and which views are whole slices of the host crop (V, B)."""
    linear_VB33, shift_VB3 = to_volume_VB34[..., :3], to_volume_VB34[..., 3] - start_B3
    sign_VB3 = np.diagonal(linear_VB33, axis1=2, axis2=3)
    mirrored_VB3 = sign_VB3 < 0
    low_VB3 = np.where(mirrored_VB3, shift_VB3 - np.array(size_DHW), shift_VB3)
    whole = (np.abs(linear_VB33) == np.eye(3)).all((2, 3)) & (low_VB3 == np.floor(low_VB3)).all(2)
    inside_VB = ((low_VB3 >= 0) & (low_VB3 + np.array(size_DHW) <= np.array(host_DHW))).all(2)
    return low_VB3.astype(np.int64), mirrored_VB3, whole & inside_VB


def nearest(map_BDHW: Tensor, position: list[Tensor], size_DHW: Size) -> Tensor:
    """The value of the voxel that holds each position, (V, B, D, H, W), exact for any integer dtype."""
    count, batch = position[0].shape[:2]
    strides = (map_BDHW.shape[2] * map_BDHW.shape[3], map_BDHW.shape[3], 1)
    parts = [
        torch.floor(x).to(torch.int64).clamp_(0, n - 1) * stride
        for x, n, stride in zip(position, map_BDHW.shape[1:], strides, strict=True)
    ]
    index = (parts[0] + (parts[1] + parts[2])).expand(count, batch, *size_DHW)
    flat = map_BDHW.reshape(1, batch, -1).expand(count, -1, -1)
    return flat.gather(2, index.reshape(count, batch, -1)).reshape(index.shape)


def inside(position: list[Tensor], start_B3: NDArray[np.int64], shape_B3: F64, size_DHW: Size) -> Tensor:
    """Whether each position lies in the volume, (V, B, D, H, W) bool."""
    bounds = to_device(np.stack([0.0 - start_B3, shape_B3 - start_B3]), position[0].device)
    low, high = bounds[..., None, None, None]
    tests = [(x >= low[:, axis]) & (x < high[:, axis]) for axis, x in enumerate(position)]
    both = tests[0] & (tests[1] & tests[2])
    return both.expand(*both.shape[:2], *size_DHW)
