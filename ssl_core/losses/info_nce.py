"""Contrast of each anchor's positive against all other keys."""

import torch
from torch import Tensor
from torch.nn import functional

from ssl_core.losses.cosine import product, unit, wide


def nt_xent(
    anchor_NE: Tensor, key_KE: Tensor, positive_N: Tensor, itself_N: Tensor | None, temperature: float
) -> Tensor:
    """Mean over anchors of -log(exp(s_p / t) / sum over keys but the anchor itself of exp(s / t)), s the cosine.

    SimCLR (2002.05709), eq. 1, when anchors are this rank's views and keys all ranks' views.

    Args:
        anchor_NE: Embeddings, normalised here.
        key_KE: Embeddings, normalised here.
        positive_N: Index of each anchor's positive among the keys.
        itself_N: Index of each anchor among the keys, left out of the sum; `None` when anchors are no keys.
        temperature: t.
    """
    logits_NK = product(unit(anchor_NE, 1), unit(key_KE, 1).t()) / temperature
    positive = logits_NK.gather(1, positive_N[:, None])[:, 0]
    out_N2 = torch.stack([positive_N, positive_N if itself_N is None else itself_N], dim=1)
    return _of_negatives(logits_NK.scatter(1, out_N2, float("-inf")), positive)


def queue_nce(
    query_BE: Tensor, key_BE: Tensor, queue_KE: Tensor, temperature: float, keep_BK: Tensor | None = None
) -> Tensor:
    """Mean of -log(exp(q k / t) / (exp(q k / t) + sum over the queue of exp(q n / t))); MoCo (1911.05722), eq. 1.

    Args:
        query_BE: Embeddings, normalised here.
        key_BE: Positives, normalised here.
        queue_KE: Unit negatives.
        temperature: t.
        keep_BK: Which negatives count for which query; all when `None`.
    """
    query, key = unit(query_BE, 1), unit(key_BE, 1)
    negative = product(query, wide(queue_KE).to(query.dtype).t())
    if keep_BK is not None:
        negative = negative.masked_fill(~keep_BK, float("-inf"))
    return _of_negatives(negative / temperature, (query * key).sum(1) / temperature)


def _of_negatives(negative_NK: Tensor, positive_N: Tensor) -> Tensor:
    """Mean of log(1 + sum exp(s_n) / exp(s_p)), which keeps the digits of a loss near 0 that a difference loses."""
    return functional.softplus(torch.logsumexp(negative_NK, dim=1) - positive_N).mean()
