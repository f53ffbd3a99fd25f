"""Intensity operations on a batch of views, as pure functions of the views and of one parameter a view.

`x_NCDHW` is a batch of N views; parameters are NumPy arrays with one row a view, drawn on the host, so that views with
different parameters are still one batched operation. "Range" is the lowest to the highest value of a view's channel.
What is given is left as it is; temporaries are written over, as fresh memory costs more than the arithmetic on a CPU.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_core.to_device import to_device

F64 = NDArray[np.float64]


def add_noise(x_NCDHW: Tensor, std_N: F64, generators: list[torch.Generator], of_range: bool = False) -> Tensor:
    """Add Gaussian noise of the given standard deviation, in units of the values or of the range."""
    noise = torch.empty_like(x_NCDHW)
    for row, generator in zip(noise, generators, strict=True):
        row.normal_(generator=generator)
    std = column(std_N, x_NCDHW)
    if of_range:
        low, high = extremes(x_NCDHW)
        std = std * (high - low)
    return noise.mul_(std).add_(x_NCDHW)


def blur(x_NCDHW: Tensor, sigma_N: F64) -> Tensor:
    """Gaussian blur with `sigma_N` voxels along each axis, cut at 4 sigma; at the border the kernel is rescaled.

    Each axis is one product with a banded matrix: kernels that differ between views then need no grouped convolution,
    which is slow on CPU and GPU alike.
    """
    along_d, along_h, along_w = (_gaussian(k, sigma_N, x_NCDHW) for k in x_NCDHW.shape[2:])
    return _along_axes(x_NCDHW, along_d, along_h, along_w)


def coarsen(x_NCDHW: Tensor, scale_N: F64) -> Tensor:
    """Show each view as a scan of lower resolution would: sides times `scale_N`, and back.

    Voxels are dropped down to the nearest whole number of them, and interpolated trilinearly on the way back, as
    nnU-Net does; both as one product with a matrix for each axis, so that views may differ in scale.
    """
    along_d, along_h, along_w = (
        to_device(np.stack([_coarse(k, scale) for scale in scale_N.tolist()]), x_NCDHW.device, x_NCDHW.dtype)
        for k in x_NCDHW.shape[2:]
    )
    return _along_axes(x_NCDHW, along_d, along_h, along_w)


def multiply(x_NCDHW: Tensor, factor_N: F64) -> Tensor:
    """Multiply, and clip back to the former range."""
    low, high = extremes(x_NCDHW)
    return (x_NCDHW * column(factor_N, x_NCDHW)).clamp_(low, high)


def contrast(x_NCDHW: Tensor, factor_N: F64) -> Tensor:
    """Multiply the distance from the channel's mean, and clip back to the former range."""
    low, high = extremes(x_NCDHW)
    mean = x_NCDHW.mean(dim=(2, 3, 4), keepdim=True)
    return (x_NCDHW - mean).mul_(column(factor_N, x_NCDHW)).add_(mean).clamp_(low, high)


def gamma(x_NCDHW: Tensor, exponent_N: F64) -> Tensor:
    """Raise to a power on the range rescaled to [0, 1], and rescale back."""
    unit, low, span = to_unit(x_NCDHW)
    return unit.pow_(column(exponent_N, x_NCDHW)).mul_(span).add_(low)


def gamma_restored(x_NCDHW: Tensor, exponent_N: F64) -> Tensor:
    """`gamma`, then each channel's former mean and standard deviation, as nnU-Net does."""
    std, mean = torch.std_mean(x_NCDHW, dim=(2, 3, 4), keepdim=True, correction=0)
    bent = gamma(x_NCDHW, exponent_N)
    bent_std, bent_mean = torch.std_mean(bent, dim=(2, 3, 4), keepdim=True, correction=0)
    return bent.sub_(bent_mean).mul_(std / bent_std.clamp_min(1e-7)).add_(mean)


def curve(x_NCDHW: Tensor, table_NK: F64) -> Tensor:
    """Map the range rescaled to [0, 1] through a table of K equally spaced values, linearly in between."""
    unit, low, span = to_unit(x_NCDHW)
    last = table_NK.shape[1] - 1
    table = to_device(table_NK, unit.device, unit.dtype)
    place = unit.mul_(last).flatten(1)
    index = place.to(torch.int64).clamp_(max=last - 1)
    left, right = table.gather(1, index), table.gather(1, index + 1)
    return left.lerp_(right, place - index).reshape(x_NCDHW.shape).mul_(span).add_(low)


def bezier(control_N4: F64, falling_N: NDArray[np.bool_], count: int = 256) -> F64:
    """Monotone cubic Bezier curves from (0, 0) to (1, 1), or from (0, 1) to (1, 0), as tables (N, count).

    The inner control points are (x1, y1, x2, y2) in the unit square. Sorting both coordinates makes the curve
    monotone, as Models Genesis does.
    """
    t = np.linspace(0, 1, 4 * count)
    inner = np.stack([3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t)])
    x, y = (np.sort(control_N4[:, [i, i + 2]] @ inner + t**3, axis=1) for i in (0, 1))
    at = np.linspace(0, 1, count)
    rising = np.stack([np.interp(at, row_x, row_y) for row_x, row_y in zip(x, y, strict=True)])
    return np.where(falling_N[:, None], 1 - rising, rising)


def standardise(x_NCDHW: Tensor) -> Tensor:
    """Zero mean and unit standard deviation of every view and channel; a constant channel becomes zero."""
    std, mean = torch.std_mean(x_NCDHW, dim=(2, 3, 4), keepdim=True, correction=0)
    return (x_NCDHW - mean).div_(std.clamp_min(1e-6))


def column(values_N: F64, like: Tensor) -> Tensor:
    """Parameters (N,) as (N, 1, 1, 1, 1), on the device and in the dtype of `like`."""
    return to_device(values_N, like.device, like.dtype).reshape(-1, 1, 1, 1, 1)


def extremes(x_NCDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of every view and channel, (N, C, 1, 1, 1)."""
    shape = (*x_NCDHW.shape[:2], 1, 1, 1)
    flat = x_NCDHW.flatten(2)
    return flat.amin(2).reshape(shape), flat.amax(2).reshape(shape)


def to_unit(x_NCDHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The range rescaled to [0, 1], its lower end and its width; a constant channel becomes 0."""
    low, high = extremes(x_NCDHW)
    span = high - low
    return (x_NCDHW - low).div_(span.clamp_min(1e-12)).clamp_(0, 1), low, span


def _along_axes(x_NCDHW: Tensor, along_d: Tensor, along_h: Tensor, along_w: Tensor) -> Tensor:
    """Products with a matrix (N, size, size) for each axis."""
    n, c, d, h, w = x_NCDHW.shape
    x = x_NCDHW.reshape(n, c * d * h, w) @ along_w.transpose(1, 2)
    x = along_h[:, None] @ x.reshape(n, c * d, h, w)
    x = along_d[:, None] @ x.reshape(n, c, d, h * w)
    return x.reshape(x_NCDHW.shape)


def _coarse(size: int, scale: float) -> F64:
    """Nearest voxels of a coarser axis and linear interpolation back, (size, size)."""
    count = max(round(size * scale), 1)
    nearest = np.floor((np.arange(count) + 0.5) * (size / count)).astype(np.int64).clip(max=size - 1)
    place = ((np.arange(size) + 0.5) * (count / size) - 0.5).clip(0, count - 1)
    left = np.floor(place).astype(np.int64)
    right, share = np.minimum(left + 1, count - 1), place - left
    matrix = np.zeros((size, size))
    rows = np.arange(size)
    np.add.at(matrix, (rows, nearest[left]), 1 - share)
    np.add.at(matrix, (rows, nearest[right]), share)
    return matrix


def _gaussian(size: int, sigma_N: F64, like: Tensor) -> Tensor:
    distance = np.abs(np.arange(size)[:, None] - np.arange(size)[None, :])
    scaled = distance / np.maximum(sigma_N, 1e-3)[:, None, None]
    weight = np.where(scaled <= 4, np.exp(-0.5 * scaled**2), 0.0)
    return to_device(weight / weight.sum(2, keepdims=True), like.device, like.dtype)
