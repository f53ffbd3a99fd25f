"""Self-distillation: a student predicts a teacher's distribution over prototypes (DINO, 2104.14294; iBOT, 2111.07832).

R rows, one for each token or pooled view, and K prototypes. Logits are cosines with the prototypes, before any
temperature.
"""

import torch
from torch import Tensor

from ssl_core.losses.cosine import product, unit, wide


def prototype_logits(z_RE: Tensor, weight_KE: Tensor) -> Tensor:
    """Cosines of embeddings with prototypes, (R, K), in [-1, 1], at least float32."""
    return product(unit(z_RE, 1), unit(weight_KE, 1).t())


def teacher_distribution(logits_RK: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
    """softmax((logits - centre) / t). Centring keeps one prototype from taking all, a low t it from being flat."""
    return torch.softmax((wide(logits_RK) - centre_K.to(wide(logits_RK).dtype)) / temperature, dim=-1)


def cross_entropy(student_logits_RK: Tensor, teacher_RK: Tensor, temperature: float) -> Tensor:
    """-sum over k of P_teacher log softmax(student / t), (R,); the teacher's distribution takes no gradient."""
    return -(teacher_RK.detach() * torch.log_softmax(wide(student_logits_RK) / temperature, dim=-1)).sum(-1)


def entropy(p_RK: Tensor) -> Tensor:
    """-sum over k of p log p, nats, (R,); between 0 and log K."""
    return torch.special.entr(p_RK).sum(-1)
