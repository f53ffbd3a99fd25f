"""Which blocks of a view are hidden."""

import torch
from torch import Tensor

from ssl_core.methods.parts import counter_random


def block_mask(
    seed: int, sample_B: Tensor, size_DHW: tuple[int, int, int], block: int, ratio: float, purpose: str
) -> Tensor:
    """1 where voxels are hidden, (B, 1, D, H, W), bool; the same share of blocks in every sample.

    Blocks are cubes of side `block`, cut off at the view's far faces. At least one block is hidden, and one is seen
    where there are several.
    """
    grid = [-(-n // block) for n in size_DHW]
    count = grid[0] * grid[1] * grid[2]
    hidden = min(max(round(ratio * count), 1), max(count - 1, 1))
    order = counter_random.uniforms(seed, sample_B, purpose, count).argsort(dim=1, stable=True)
    flat = torch.zeros(order.shape, dtype=torch.bool, device=order.device).scatter_(1, order[:, :hidden], True)
    mask = flat.view(-1, 1, *grid)
    for axis, n in enumerate(size_DHW):
        mask = mask.repeat_interleave(block, axis + 2).narrow(axis + 2, 0, n)
    return mask
