"""Local alignment of two near slices or sub-volumes (SSAL, arXiv 2406.15699, from a review's account of it)."""

import torch
from torch import Tensor

from ssl_core.losses.cosine import product, unit


def local_alignment(
    a_BEM: Tensor, b_BEM: Tensor, valid_a_BM: Tensor | None = None, valid_b_BM: Tensor | None = None
) -> Tensor:
    """Mean over positions p of |1 - max over q of cos(a_p, b_q)|, one value for each sample, (B,).

    Constant features make it 0: never train it alone.

    Args:
        a_BEM: Features at M positions, normalised here.
        b_BEM: Features that a's are matched to.
        valid_a_BM: Positions of a that count; all when `None`.
        valid_b_BM: Positions that they may be matched to; all when `None`. Without any of either the value is 0.
    """
    valid_a, valid_b = (
        torch.ones_like(x[:, 0], dtype=torch.bool) if valid is None else valid
        for x, valid in ((a_BEM, valid_a_BM), (b_BEM, valid_b_BM))
    )
    cosine_BMM = product(unit(a_BEM, 1).transpose(1, 2), unit(b_BEM, 1))
    # Below every cosine: no match that counts is lost to one that does not.
    gap_BM = (1 - cosine_BMM.masked_fill(~valid_b[:, None], -2).amax(2)).abs()
    weight = (valid_a & valid_b.any(1, keepdim=True)).to(gap_BM.dtype)
    return (gap_BM * weight).sum(1) / weight.sum(1).clamp_min(1)


def windowed_alignment(
    a_BEDHW: Tensor,
    b_BEDHW: Tensor,
    window: int,
    valid_a_BDHW: Tensor | None = None,
    valid_b_BDHW: Tensor | None = None,
) -> Tensor:
    """`local_alignment` with matches only inside the same window, cost M w^3 instead of M^2; (B,).

    Windows are cubes of side `window`, clipped to the map, and smaller at its far faces. It is at least the value over
    the whole map, and equal to it when one window covers the map. The mean is over positions that count and whose
    window holds one that they may be matched to.
    """
    size = a_BEDHW.shape[2:]
    sides = [min(window, n) for n in size]
    valid = [
        torch.ones_like(x[:, :1], dtype=torch.bool) if mask is None else mask[:, None]
        for x, mask in ((a_BEDHW, valid_a_BDHW), (b_BEDHW, valid_b_BDHW))
    ]
    total = a_BEDHW.new_zeros(len(a_BEDHW), dtype=unit(a_BEDHW[:1, :1], 1).dtype)
    count = torch.zeros_like(total)
    # Cut at the last whole window of each axis: equal windows go through one batched product.
    splits = [[(0, n - n % s, s), (n - n % s, n, n % s)] for n, s in zip(size, sides, strict=True)]
    for d in splits[0]:
        for h in splits[1]:
            for w in splits[2]:
                if 0 in (d[2], h[2], w[2]):
                    continue
                box = (slice(d[0], d[1]), slice(h[0], h[1]), slice(w[0], w[1]))
                side = (d[2], h[2], w[2])
                a, b = (_windows(x[(..., *box)], side) for x in (a_BEDHW, b_BEDHW))
                seen_a, seen_b = (_windows(x[(..., *box)], side)[:, 0] for x in valid)
                counted = (seen_a.sum(1) * seen_b.any(1)).to(total.dtype)
                gaps = local_alignment(a, b, seen_a, seen_b) * counted
                total = total + gaps.unflatten(0, (len(total), -1)).sum(1)
                count = count + counted.unflatten(0, (len(total), -1)).sum(1)
    return total / count.clamp_min(1)


def _windows(x_BEDHW: Tensor, side: tuple[int, int, int]) -> Tensor:
    """(B n, E, window positions) of the equal windows that tile a map."""
    b, e, d, h, w = x_BEDHW.shape
    i, j, k = side
    cut = x_BEDHW.reshape(b, e, d // i, i, h // j, j, w // k, k)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, e, i * j * k)
