"""Features of a whole volume: the mean over positions of each window, then the mean over windows."""

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..windows import Reader, each_window


def pooled(maps: Sequence[Tensor]) -> Tensor:
    """Means over positions of some levels' maps (B, E_i, D, H, W), joined to (B, sum of E_i).

    Means, not maxima, and levels side by side: our choice, as the features of a linear probe are commonly made.
    """
    return torch.cat([each_BEDHW.mean((2, 3, 4)) for each_BEDHW in maps], 1)


def volume_features(
    features: Callable[[Tensor], Tensor],
    read: Reader,
    shape_DHW: Sequence[int],
    air_C: NDArray[np.float32],
    window_DHW: tuple[int, int, int],
    *,
    device: torch.device,
    batch: int = 4,
) -> Tensor:
    """Features of a volume, (E,) float64 on the CPU: the plain mean over the windows that cover it.

    Windows are those of a segmentation, half a window apart, so that voxels near a face are in fewer. A linear head on
    this mean gives the mean of its outputs over the windows. Our choice.

    Args:
        features: (B, C, *window) to (B, E).
        read: The network's input; each part is read once, in order.
        shape_DHW: Voxels of the volume.
        air_C: Each channel's value of air, with which a volume smaller than a window is padded.
        window_DHW: Window, voxels.
        device: Where windows are computed.
        batch: Windows computed at once.
    """
    total, count = torch.zeros(0), 0
    windows = each_window(read, shape_DHW, air_C, window_DHW)
    while group := list(islice(windows, batch)):
        with torch.inference_mode():
            sums_E = features(torch.from_numpy(np.stack(group)).to(device)).double().sum(0).cpu()
        total = sums_E if count == 0 else total + sums_E
        count += len(group)
    return total / count
