"""Moving averages of weights: targets that follow and are never trained."""

import copy
import math
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

M = TypeVar("M")


def target_of(online: M) -> M:
    """A copy that takes no gradient. In training mode its norms use their own batch's statistics, as BYOL's do."""
    target = copy.deepcopy(online)
    cast(nn.Module, target).requires_grad_(False)
    return target


@torch.no_grad()
def follow(target: M, online: M, momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * online, over all parameters.

    Buffers are left alone: the target gathers running statistics from its own passes, which are of its own weights.
    """
    old: list[Tensor] = list(cast(nn.Module, target).parameters())
    new: list[Tensor] = list(cast(nn.Module, online).parameters())
    torch._foreach_mul_(old, momentum)
    torch._foreach_add_(old, new, alpha=1 - momentum)


def momentum_at(step: int, max_steps: int, start: float) -> float:
    """Cosine from `start` at step 0 to 1 at `max_steps`: 1 - (1 - start) (1 + cos(pi k / K)) / 2 (BYOL, 2006.07733)."""
    done = min(step / max(max_steps, 1), 1.0)
    return 1 - (1 - start) * (1 + math.cos(math.pi * done)) / 2


def short_run_momentum(step: int, max_steps: int, start: float) -> float:
    """`momentum_at`, but never above (1 + k) / (10 + k).

    Our choice: a target that averages over more steps than there have been is mostly its random start, and short runs
    would spend themselves on predicting it.
    """
    return min(momentum_at(step, max_steps, start), (1 + step) / (10 + step))
