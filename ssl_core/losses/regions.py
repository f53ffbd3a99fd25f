"""Contrast between the regions of one image. LRC's own formula could not be read; both forms are ours to that idea."""

import torch
from torch import Tensor

from ssl_core.losses.contrast import per_anchor
from ssl_core.losses.cosine import product, unit


def pixel_contrast(z_BNE: Tensor, region_BN: Tensor, valid_BN: Tensor, temperature: float) -> Tensor:
    """Form A: pixels of a region attract each other and repel the image's other regions.

    L = 1/N sum over n of -1/|P(n)| sum over p in P(n) of log( exp(z_n . z_p / t) / sum over a != n of
    exp(z_n . z_a / t) ), P(n) the other pixels of n's region; supervised contrast (2004.11362) over sampled pixels of
    one image. Even perfect features leave about log(K - 1) for K pixels a region.

    Args:
        z_BNE: Embeddings of sampled pixels, normalised here.
        region_BN: Region of each; numbers mean something within an image only.
        valid_BN: Whether the pixel takes part.
        temperature: t.

    Returns:
        Mean over images; one with fewer than two regions counts as 0 and stays in the graph.
    """
    z = unit(z_BNE, 2)
    logits_BNN = product(z, z.transpose(1, 2)) / temperature
    same = region_BN[:, :, None] == region_BN[:, None, :]
    both = valid_BN[:, :, None] & valid_BN[:, None, :]
    other = both & ~torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    losses_BN, has_BN = per_anchor(logits_BNN, same & other, other)
    mean_B = losses_BN.sum(1) / has_BN.sum(1).clamp_min(1)
    several_B = (both & ~same).flatten(1).any(1)
    return (mean_B * several_B).mean()


def prototype_contrast(v_BRE: Tensor, w_BRE: Tensor, valid_BR: Tensor, temperature: float) -> Tensor:
    """Form B: a region's mean embedding in one view finds the same region in the other view among the image's regions.

    L = -1/R sum over r of log( exp(v_r . w_r / t) / sum over s of exp(v_r . w_s / t) ), averaged with the views
    swapped; after DetCon (2103.10957).

    Args:
        v_BRE: Mean embeddings of the regions in view 1, normalised here.
        w_BRE: In view 2, in the same order.
        valid_BR: Whether a region is seen in both views.
        temperature: t.

    Returns:
        Mean over images; one with fewer than two regions counts as 0 and stays in the graph.
    """
    logits_BRR = product(unit(v_BRE, 2), unit(w_BRE, 2).transpose(1, 2)) / temperature
    both = valid_BR[:, :, None] & valid_BR[:, None, :]
    same = torch.eye(valid_BR.shape[1], dtype=torch.bool, device=valid_BR.device) & both
    forth, _ = per_anchor(logits_BRR, same, both)
    back, _ = per_anchor(logits_BRR.transpose(1, 2), same, both)
    count_B = valid_BR.sum(1)
    mean_B = ((forth + back) / 2).sum(1) / count_B.clamp_min(1)
    return (mean_B * (count_B >= 2)).mean()


def region_means(z_BEM: Tensor, region_BM: Tensor, wanted_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Mean embedding of each wanted region, (B, R, E), and whether it has any position, (B, R)."""
    member = (region_BM[:, None, :] == wanted_BR[:, :, None]).to(z_BEM.dtype)
    count_BR = member.sum(2)
    means = product(member, z_BEM.transpose(1, 2)) / count_BR.clamp_min(1)[:, :, None]
    return means, count_BR > 0
