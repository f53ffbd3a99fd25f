"""Resampling of host crops into views: one gather for all views of a role."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def grids(
    to_volume_VB34: NDArray[np.float64],
    start_B3: NDArray[np.int64],
    host_DHW: tuple[int, int, int],
    size_DHW: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Sampling positions (V, B, D, H, W, 3) of view voxel centres in the host crop, in [-1, 1] over its edges.

    The last axis is (W, H, D), the reverse of the tensor axes, as `grid_sample` wants it.
    """
    count, batch = to_volume_VB34.shape[:2]
    size, host = np.array(size_DHW, np.float64), np.array(host_DHW, np.float64)
    linear, shift = to_volume_VB34[..., :3], to_volume_VB34[..., 3] - start_B3
    # view edge coordinate u = (g + 1) size / 2 and host coordinate x = (g' + 1) host / 2, so g' = theta g + t
    theta = linear * (size / host[:, None])
    middle = 2 * (linear @ (size / 2) + shift) / host - 1
    flat = np.concatenate([theta[..., ::-1, ::-1], middle[..., ::-1, None]], axis=-1).reshape(count * batch, 3, 4)
    matrix = torch.from_numpy(flat).to(device, dtype)
    grid = functional.affine_grid(matrix, [count * batch, 1, *size_DHW], align_corners=False)
    return grid.reshape(count, batch, *size_DHW, 3)


def linear(host_BCDHW: Tensor, grid_VBDHW3: Tensor) -> Tensor:
    """Trilinear sampling of every view, (V, B, C, D, H, W); outside the host crop its border is repeated."""
    count, batch, d, h, w, _ = grid_VBDHW3.shape
    # Views side by side along D share one input, which would otherwise be copied for each of them.
    joined = grid_VBDHW3.transpose(0, 1).reshape(batch, count * d, h, w, 3)
    out = functional.grid_sample(host_BCDHW, joined, mode="bilinear", padding_mode="border", align_corners=False)
    return out.reshape(batch, -1, count, d, h, w).permute(2, 0, 1, 3, 4, 5).contiguous()


def nearest(map_BDHW: Tensor, grid_VBDHW3: Tensor) -> Tensor:
    """The voxel that holds each position, (V, B, D, H, W) of the map's dtype; exact for any integer."""
    count, batch = grid_VBDHW3.shape[:2]
    sizes = map_BDHW.shape[1:]
    index = torch.zeros(grid_VBDHW3.shape[:-1], dtype=torch.int64, device=map_BDHW.device)
    for axis, n in enumerate(sizes):
        position = torch.floor((grid_VBDHW3[..., 2 - axis] + 1) * (n / 2)).to(torch.int64)
        index = index * n + position.clamp_(0, n - 1)
    flat = map_BDHW.reshape(1, batch, -1).expand(count, -1, -1)
    return flat.gather(2, index.reshape(count, batch, -1)).reshape(index.shape)


def inside(
    grid_VBDHW3: Tensor, start_B3: NDArray[np.int64], host_DHW: tuple[int, int, int], shape_B3: NDArray[np.float64]
) -> Tensor:
    """Whether each position lies in the volume, (V, B, D, H, W) bool."""
    host = np.array(host_DHW, np.float64)
    low = 2 * (0 - np.asarray(start_B3, np.float64)) / host - 1
    high = 2 * (np.asarray(shape_B3, np.float64) - start_B3) / host - 1
    bounds = torch.from_numpy(np.stack([low, high])[..., ::-1].copy()).to(grid_VBDHW3)
    a, b = bounds[:, None, :, None, None, None, :]
    return ((grid_VBDHW3 >= a) & (grid_VBDHW3 < b)).all(dim=-1)
