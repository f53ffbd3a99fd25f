"""Intensity operations on a batch of views; every one takes its parameters for each view, so it is a pure function.

`x_NCDHW` is a batch of N views. Parameters are NumPy arrays with one row a view, drawn on the host.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

F64 = NDArray[np.float64]


def column(values_N: F64, like: Tensor) -> Tensor:
    """Parameters (N,) as (N, 1, 1, 1, 1) beside `like`."""
    return torch.from_numpy(np.ascontiguousarray(values_N)).to(like.device, like.dtype).reshape(-1, 1, 1, 1, 1)


def extremes(x_NCDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of every view and channel, (N, C, 1, 1, 1)."""
    low, high = torch.aminmax(x_NCDHW.flatten(2), dim=2)
    return low[..., None, None, None], high[..., None, None, None]


def add_noise(x_NCDHW: Tensor, std_N: F64, generators: list[torch.Generator]) -> Tensor:
    """Add Gaussian noise of the given standard deviation."""
    noise = torch.stack([
        torch.randn(x_NCDHW.shape[1:], generator=g, device=x_NCDHW.device, dtype=x_NCDHW.dtype) for g in generators
    ])  # fmt: skip
    return x_NCDHW + noise * column(std_N, x_NCDHW)


def blur(x_NCDHW: Tensor, sigma_N: F64) -> Tensor:
    """Gaussian blur with `sigma_N` voxels along each axis; at the border the kernel is cut and rescaled.

    Each axis is one product with a banded matrix: batched kernels that differ between views need no grouped
    convolution, which is slow on CPU and GPU alike.
    """
    n, c, d, h, w = x_NCDHW.shape
    along_d, along_h, along_w = (_gaussian(k, sigma_N, x_NCDHW) for k in (d, h, w))
    x = x_NCDHW.reshape(n, c * d * h, w) @ along_w.transpose(1, 2)
    x = along_h[:, None] @ x.reshape(n, c * d, h, w)
    x = along_d[:, None] @ x.reshape(n, c, d, h * w)
    return x.reshape(x_NCDHW.shape)


def multiply(x_NCDHW: Tensor, factor_N: F64) -> Tensor:
    """Multiply and clip back to the former range of each view and channel."""
    low, high = extremes(x_NCDHW)
    return torch.minimum(torch.maximum(x_NCDHW * column(factor_N, x_NCDHW), low), high)


def gamma(x_NCDHW: Tensor, exponent_N: F64) -> Tensor:
    """Raise to a power on the range rescaled to [0, 1], and rescale back."""
    low, high = extremes(x_NCDHW)
    span = (high - low).clamp_min(1e-6)
    return ((x_NCDHW - low) / span).clamp_(0, 1).pow(column(exponent_N, x_NCDHW)) * span + low


def _gaussian(size: int, sigma_N: F64, like: Tensor) -> Tensor:
    distance = np.arange(size)[:, None] - np.arange(size)[None, :]
    weight = np.exp(-0.5 * (distance[None] / sigma_N[:, None, None]) ** 2)
    weight[:, np.abs(distance) > 0] *= np.abs(distance[np.abs(distance) > 0]) <= 4 * sigma_N[:, None]
    return torch.from_numpy(weight / weight.sum(2, keepdims=True)).to(like.device, like.dtype)
