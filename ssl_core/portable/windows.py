"""Sliding windows over a whole volume, blended with Gaussian weights.

MONAI, which takes seconds to import, is imported when a volume is computed: jobs that only plan import this too.
"""

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SIGMA = 0.125
"""Standard deviation of the Gaussian, as a share of the window."""


def padded(
    image_CDHW: NDArray[np.float32], least_DHW: tuple[int, ...], air_C: NDArray[np.float32], multiple: int = 1
) -> tuple[NDArray[np.float32], tuple[slice, ...]]:
    """Centre the volume in one of at least `least_DHW` voxels, filled with each channel's value of air.

    Training pads crops that stick out of a volume with air as well; zeros would be tissue to the network.

    Returns:
        The larger volume, and where the old one lies in it, (D, H, W) slices.
    """
    old = image_CDHW.shape[1:]
    new = [-(-max(n, least) // multiple) * multiple for n, least in zip(old, least_DHW, strict=True)]
    start = [(n - o) // 2 for n, o in zip(new, old, strict=True)]
    inside = tuple(slice(s, s + o) for s, o in zip(start, old, strict=True))
    if tuple(new) == old:
        return image_CDHW, inside
    larger = np.empty((image_CDHW.shape[0], *new), np.float32)
    larger[:] = air_C[:, None, None, None]
    larger[(slice(None), *inside)] = image_CDHW
    return larger, inside


def slide(
    network: Callable[[Tensor], Tensor],
    image_CDHW: NDArray[np.float32],
    air_C: NDArray[np.float32],
    window_DHW: tuple[int, int, int],
    *,
    device: torch.device,
    overlap: float = 0.5,
    batch: int = 4,
) -> Tensor:
    """Blended logits of a whole volume, (K, D, H, W) float32 on the CPU.

    Args:
        network: (B, C, *window) to (B, K, *window).
        image_CDHW: The network's input for the whole volume.
        air_C: Each channel's value of air.
        window_DHW: Window, voxels.
        device: Where windows are computed; the blended volume stays on the CPU, whose memory is larger.
        overlap: Share of a window that its neighbour covers again.
        batch: Windows computed at once.
    """
    from monai.inferers.utils import sliding_window_inference

    larger, inside = padded(image_CDHW, window_DHW, air_C)
    with torch.inference_mode():
        logits = sliding_window_inference(
            torch.from_numpy(larger)[None],
            window_DHW,
            batch,
            network,
            overlap=overlap,
            mode="gaussian",
            sigma_scale=_SIGMA,
            sw_device=device,
            device=torch.device("cpu"),
        )
    if not isinstance(logits, Tensor):
        raise TypeError(f"the network returned {type(logits).__name__}, a tensor is needed")
    return logits[0][(slice(None), *inside)].float()


def slide_features(
    features: Callable[[Tensor], Tensor],
    image_CDHW: NDArray[np.float32],
    air_C: NDArray[np.float32],
    window_DHW: tuple[int, int, int],
    *,
    stride_DHW: tuple[int, int, int],
    device: torch.device,
) -> Tensor:
    """Blended features of a whole volume on the feature grid, (E, D/stride, H/stride, W/stride) float32.

    Windows start at multiples of the stride, so that features of neighbouring windows fall on one grid. The volume is
    padded with air at its far faces only: feature k keeps its place k * stride.

    Args:
        features: (B, C, *window) to (B, E, *window / stride).
        image_CDHW: The network's input for the whole volume.
        air_C: Each channel's value of air.
        window_DHW: Window, a multiple of `stride_DHW`.
        stride_DHW: Input voxels between features.
        device: Where windows are computed.
    """
    from monai.data.utils import compute_importance_map

    shape = image_CDHW.shape[1:]
    size = [max(w, -(-n // s) * s) for n, w, s in zip(shape, window_DHW, stride_DHW, strict=True)]
    larger = np.empty((image_CDHW.shape[0], *size), np.float32)
    larger[:] = air_C[:, None, None, None]
    larger[(slice(None), *(slice(0, n) for n in shape))] = image_CDHW
    steps = [w // s for w, s in zip(window_DHW, stride_DHW, strict=True)]
    weight = compute_importance_map(tuple(steps), mode="gaussian", sigma_scale=_SIGMA).float()
    grid = [n // s for n, s in zip(size, stride_DHW, strict=True)]
    total, norm = torch.zeros(0), torch.zeros(grid)
    starts = [list(_starts(n, k)) for n, k in zip(grid, steps, strict=True)]
    with torch.inference_mode():
        for corner in product(*starts):
            box = tuple(slice(c, c + k) for c, k in zip(corner, steps, strict=True))
            voxels = tuple(slice(c * s, c * s + w) for c, s, w in zip(corner, stride_DHW, window_DHW, strict=True))
            maps = features(torch.from_numpy(larger[(slice(None), *voxels)])[None].to(device))[0].float().cpu()
            if total.numel() == 0:
                total = torch.zeros(maps.shape[0], *grid)
            total[(slice(None), *box)] += maps * weight
            norm[box] += weight
    inside = tuple(slice(0, -(-n // s)) for n, s in zip(shape, stride_DHW, strict=True))
    return (total / norm)[(slice(None), *inside)]


def _starts(cells: int, window: int) -> Iterator[int]:
    """Window starts along one axis, about half a window apart, the last one flush with the end."""
    last = cells - window
    count = -(-last // max(1, window // 2)) if last > 0 else 0
    for i in range(count + 1):
        yield round(i * last / count) if count else 0
