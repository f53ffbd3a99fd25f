"""Windows that the network sees mirrored too, and the mean of what it says of them."""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]


def mirrored(logits: Network, axes: Sequence[int]) -> Network:
    """Mean of the probabilities of all 2**n mirrorings of a window along n axes, each brought back.

    Args:
        logits: (B, C, D, H, W) to (B, K, D, H, W).
        axes: Of 2, 3, 4; with none the network is returned as it is, and gives logits.
    """
    if not axes:
        return logits
    flips = [flip for count in range(len(axes) + 1) for flip in combinations(axes, count)]

    def mean(x_BCDHW: Tensor) -> Tensor:
        total = torch.softmax(logits(x_BCDHW).float(), 1)
        for flip in flips[1:]:
            total = total + torch.softmax(logits(x_BCDHW.flip(flip)).float(), 1).flip(flip)
        return total / len(flips)

    return mean
