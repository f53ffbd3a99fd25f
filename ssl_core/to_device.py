"""Getting numbers onto the training device without waiting for the work that is queued there.

A plain `.to("cuda")`, and `torch.tensor(..., device="cuda")` alike, copies from ordinary memory and lets the host wait
until the device has done everything before it. One such copy in a step undoes what launching ahead gains.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A host array on a device, in its own type or in `dtype`.

    From pinned memory the copy is queued like a kernel. The pinned block may be given up at once, since torch uses it
    again only after the copy. Types change on the device: a copy that converts would go through ordinary memory.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)


def filled(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """A short vector made on the device, by filling and not by copying; also where a step is compiled."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
