"""Cosine comparison of embeddings."""

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6  # smallest norm: a zero vector stays zero and its gradient finite


def unit(x: Tensor, dim: int) -> Tensor:
    """`x` with unit length along `dim`, in at least float32."""
    return functional.normalize(wide(x), dim=dim, eps=EPS)


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32, where logarithms and cosines belong."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in the float type that they have; autocast would take it in 16 bits, which logits over t do not bear."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def distance(a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    """Squared distance of the unit vectors, 2 - 2 cos, in [0, 4], shape without `dim` (BYOL, 2006.07733, eq. 2).

    Written as a squared difference, which is zero for equal vectors to the last bit and keeps small distances exact.
    """
    return (unit(a, dim) - unit(b, dim)).square().sum(dim)


def masked_mean(values_BM: Tensor, mask_BM: Tensor) -> Tensor:
    """Mean over samples of each sample's mean over its set positions.

    A sample without any counts as 0, keeps its place in the denominator and stays in the graph, so that the mean over
    ranks of equal batches is the mean over the joined batch.
    """
    weight = mask_BM.to(values_BM.dtype)
    per_sample = (values_BM * weight).sum(1) / weight.sum(1).clamp_min(1)
    return per_sample.mean()


def siamese(pre_a_BE: Tensor, pro_a_BE: Tensor, pre_b_BE: Tensor, pro_b_BE: Tensor) -> Tensor:
    """Mean of -(cos(pre_a, sg pro_b) + cos(pre_b, sg pro_a)) / 2, in [-1, 1].

    SimSiam's comparison (2011.10566, eq. 2) as PCRLv2 uses it (authors' code).
    """
    forth = (unit(pre_a_BE, 1) * unit(pro_b_BE.detach(), 1)).sum(1)
    back = (unit(pre_b_BE, 1) * unit(pro_a_BE.detach(), 1)).sum(1)
    return -(forth + back).mean() / 2
