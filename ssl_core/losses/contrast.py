"""Contrast with any number of positives for each anchor, and positives defined by position."""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from ssl_core.losses.cosine import product, unit

Denominator = Literal["all", "pos_neg"]
QUANTA = 1024  # positions are compared as integers of 1/1024 voxel


def multi_positive_nce(
    anchor_NE: Tensor,
    key_KE: Tensor,
    positive_NK: Tensor,
    other_NK: Tensor,
    temperature: float,
    denominator: Denominator = "all",
) -> Tensor:
    """Mean over anchors of -1/|P| sum over positives p of log(exp(s_p / t) / D_p), s the cosine.

    D_p sums exp(s_a / t) over all other keys a, other positives included (`all`; supervised contrast, 2004.11362,
    "out"; PCL's code), or over p and the negatives only (`pos_neg`). Both agree with one positive for each anchor, and
    are then InfoNCE. Anchors without a positive are left out of the mean; without any anchor the loss is 0.

    Args:
        anchor_NE: Embeddings, normalised here.
        key_KE: Embeddings, normalised here.
        positive_NK: Whether a key is a positive of an anchor; the anchor itself never is.
        other_NK: Whether a key takes part at all: false for the anchor itself and for padding.
        temperature: t.
        denominator: See above.
    """
    logits_NK = product(unit(anchor_NE, -1), unit(key_KE, -1).transpose(-1, -2)) / temperature
    losses_N, has_N = per_anchor(logits_NK, positive_NK, other_NK, denominator)
    return losses_N.sum() / has_N.sum().clamp_min(1)


def per_anchor(
    logits_NK: Tensor, positive_NK: Tensor, other_NK: Tensor, denominator: Denominator = "all"
) -> tuple[Tensor, Tensor]:
    """The loss of each anchor, 0 for those without a positive, and which have one; leading axes are free."""
    positive_NK = positive_NK & other_NK
    count_N = positive_NK.sum(-1)
    if denominator == "all":
        log_sum_N1 = _log_sum(logits_NK, other_NK)
        gaps_NK = logits_NK - log_sum_N1
    else:
        log_sum_N1 = _log_sum(logits_NK, other_NK & ~positive_NK)
        gaps_NK = logits_NK - torch.logaddexp(logits_NK, log_sum_N1)
    total_N = torch.where(positive_NK, gaps_NK, torch.zeros_like(gaps_NK)).sum(-1)
    return -total_N / count_N.clamp_min(1), count_N > 0


def _log_sum(logits_NK: Tensor, mask_NK: Tensor) -> Tensor:
    # A finite floor instead of minus infinity: a row without any key has no gradient instead of a NaN one.
    floor = torch.finfo(logits_NK.dtype).min / 4
    return torch.logsumexp(logits_NK.masked_fill(~mask_NK, floor), dim=-1, keepdim=True)


def near(
    centre_N: Tensor, length_N: Tensor, other_centre_K: Tensor, other_length_K: Tensor, threshold: float
) -> Tensor:
    """Whether |centre / length - other_centre / other_length| < threshold, strictly and exactly, (N, K).

    In floating point the answer for slices exactly `threshold` apart depends on rounding, so numerators are compared
    as integers: |c n' - c' n| < t n n'.

    Args:
        centre_N: Position, voxels, rounded to 1/1024.
        length_N: Length of the volume it is in, voxels.
        other_centre_K: The same of the keys.
        other_length_K: The same of the keys.
        threshold: t, read as the decimal number that it prints as, or the nearest fraction over at most a million.
    """
    # Longer denominators, as of 1/3 in 16 digits, would overflow the products below.
    limit = Fraction(str(threshold)).limit_denominator(10**6)
    a, b = _quanta(centre_N)[:, None], _quanta(other_centre_K)[None, :]
    n, m = length_N.round().long()[:, None], other_length_K.round().long()[None, :]
    return (a * m - b * n).abs() * limit.denominator < limit.numerator * n * m * QUANTA


def _quanta(x: Tensor) -> Tensor:
    return (x.double() * QUANTA).round().long()
