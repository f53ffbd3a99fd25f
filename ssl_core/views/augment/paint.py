"""Corruptions of regions: painting and shuffling, for restoration methods.

In- and out-painting and local shuffling follow Models Genesis (Zhou et al.; sizes and counts from the authors' code,
MrGiovanni/ModelsGenesis), swapping follows PCRLv2, both in a form that needs no loop over windows.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl_core.to_device import to_device
from ssl_core.views.augment.intensity import extremes

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

WINDOWS = 5
"""Most windows painted in a view; each further one follows with probability 0.95 (Models Genesis)."""
PAINT_DRAWS = 7 * WINDOWS


def windows(u_NK: F64, size_DHW: tuple[int, int, int], outer_N: NDArray[np.bool_]) -> tuple[I64, I64]:
    """Lower and upper corners (N, WINDOWS, 3) of painting windows, from `PAINT_DRAWS` uniforms a view.

    In-painting windows have 1/6 to 1/3 of the view's side, out-painting windows leave out 3/7 to 4/7 of it; both stay
    3 voxels away from the border where the view is large enough. A window that is not drawn is empty.
    """
    u = u_NK.reshape(len(u_NK), WINDOWS, 7)
    size = np.array(size_DHW)
    outer = outer_N[:, None, None]
    least = np.where(outer, size - 4 * size // 7, size // 6)
    most = np.where(outer, size - 3 * size // 7, size // 3)
    side = np.maximum(least + np.floor(u[..., :3] * (most - least + 1)), 1).astype(np.int64)
    border = np.clip((size - side) // 2, 0, 3)
    low = border + np.floor(u[..., 3:6] * (size - side - 2 * border + 1)).astype(np.int64)
    # In-painting may draw none; out-painting always keeps one window.
    follows = u[..., 6] < 0.95
    follows[:, 0] |= outer_N
    drawn = np.cumprod(follows, axis=1).astype(bool)
    return low, np.where(drawn[..., None], low + side, low)


def paint(
    x_NCDHW: Tensor, low_NK3: I64, high_NK3: I64, outer_N: NDArray[np.bool_], generators: list[torch.Generator]
) -> Tensor:
    """Put uniform noise over the range into the windows, or everywhere but into them for out-painting."""
    n, _, *size = x_NCDHW.shape
    axes = []
    for axis, count in enumerate(size):
        at = np.arange(count)
        covered = (at >= low_NK3[:, :, axis, None]) & (at < high_NK3[:, :, axis, None])
        axes.append(to_device(covered, x_NCDHW.device))
    # How many windows hold a voxel, as one product: a loop over windows passes over the whole view for each.
    in_dh = (axes[0][..., :, None] & axes[1][..., None, :]).flatten(2).to(x_NCDHW.dtype)
    covering = in_dh.transpose(1, 2) @ axes[2].to(x_NCDHW.dtype)
    painted = (covering > 0.5).reshape(n, *size) ^ to_device(outer_N, x_NCDHW.device)[:, None, None, None]
    low, high = extremes(x_NCDHW)
    noise = torch.empty_like(x_NCDHW)
    for row, generator in zip(noise, generators, strict=True):
        row.uniform_(generator=generator)
    return torch.where(painted[:, None], noise.mul_(high - low).add_(low), x_NCDHW)


def shuffle(x_NCDHW: Tensor, u_N6: F64, generators: list[torch.Generator]) -> Tensor:
    """Permute the voxels inside every block of a randomly placed grid.

    Block sides are drawn once a view from 1 to a tenth of its side, as Models Genesis draws each of its windows. All
    channels are permuted alike; an incomplete block at the border is left alone.
    """
    out = x_NCDHW.clone()
    sides = np.array(x_NCDHW.shape[2:])
    for row, u, generator in zip(out, u_N6, generators, strict=True):
        block = 1 + np.floor(u[:3] * np.maximum(sides // 10, 1)).astype(int)
        whole = _whole(row, block, np.floor(u[3:] * block).astype(int))
        rows = _blocks(whole, block)
        key = torch.rand(rows.shape[1:], generator=generator, device=row.device)
        order = key.argsort(dim=1).expand_as(rows)
        whole.copy_(_unblocks(rows.gather(2, order), whole, block))
    return out


def swap(
    x_NCDHW: Tensor, u_N3: F64, generators: list[torch.Generator], block_DHW: tuple[int, int, int], pairs: int
) -> Tensor:
    """Exchange up to `pairs` disjoint pairs of blocks of a randomly placed grid, all channels alike."""
    out = x_NCDHW.clone()
    block = np.minimum(block_DHW, x_NCDHW.shape[2:])
    for row, u, generator in zip(out, u_N3, generators, strict=True):
        whole = _whole(row, block, np.floor(u * block).astype(int))
        rows = _blocks(whole, block)
        count = rows.shape[1]
        partners = torch.randperm(count, generator=generator, device=row.device)[: 2 * min(pairs, count // 2)]
        order = torch.arange(count, device=row.device)
        order[partners] = partners.reshape(2, -1).flip(0).reshape(-1)
        whole.copy_(_unblocks(rows[:, order], whole, block))
    return out


def _whole(row_CDHW: Tensor, block: NDArray[np.int_], offset: NDArray[np.int_]) -> Tensor:
    """The part of the view that whole blocks fill, beginning at `offset` where one fits there."""
    sides = np.array(row_CDHW.shape[1:])
    offset = np.where(sides - offset >= block, offset, 0)
    d, h, w = (slice(int(o), int(o + (n - o) // b * b)) for o, n, b in zip(offset, sides, block, strict=True))
    return row_CDHW[:, d, h, w]


def _blocks(whole_CDHW: Tensor, block: NDArray[np.int_]) -> Tensor:
    """(C, blocks, voxels of a block)."""
    c, d, h, w = whole_CDHW.shape
    i, j, k = (int(b) for b in block)
    split = whole_CDHW.reshape(c, d // i, i, h // j, j, w // k, k)
    return split.permute(0, 1, 3, 5, 2, 4, 6).reshape(c, -1, i * j * k)


def _unblocks(rows: Tensor, like_CDHW: Tensor, block: NDArray[np.int_]) -> Tensor:
    c, d, h, w = like_CDHW.shape
    i, j, k = (int(b) for b in block)
    split = rows.reshape(c, d // i, h // j, w // k, i, j, k)
    return split.permute(0, 1, 4, 2, 5, 3, 6).reshape(c, d, h, w)
