"""Embeddings that anybody can compute again, and which of them are positives."""

import torch
from torch import Tensor

B, V, C = 4, 2, 8

POSITION = [0.1, 0.15, 0.5, 0.9]


def toy() -> Tensor:
    b, v, c = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (B, V, C)), indexing="ij")
    return torch.sin(1 + 3 * b + 5 * v + 7 * c).transpose(0, 1).reshape(V * B, C)


def toy_positive(threshold: float) -> Tensor:
    p = torch.tensor(POSITION, dtype=torch.float64).repeat(V)
    source = torch.arange(B).repeat(V)
    return ((p[:, None] - p[None]).abs() < threshold) | (source[:, None] == source[None])


def not_itself(n: int) -> Tensor:
    return ~torch.eye(n, dtype=torch.bool)
