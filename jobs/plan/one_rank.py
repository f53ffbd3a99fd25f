"""One rank of many, at work without the others: what it reads and computes is what it would in their company."""

from collections.abc import Callable

import torch
from torch import Tensor

from jobs.configs import PretrainConfig
from ssl_core.config import parse, resolved


class OneRank:
    """Rank 0 of a group whose other ranks hold what it holds.

    Shapes, and so time and memory, are those of the whole group. The numbers are not: they are good for measuring only.

    Args:
        world: Ranks of the group.
    """

    rank = 0
    overlaps = False

    def __init__(self, world: int) -> None:
        self.world = world

    def gather(self, x_B: Tensor) -> Tensor:
        """The input once for each rank."""
        return torch.cat([x_B] * self.world)

    def mean(self, x: Tensor) -> Tensor:
        """The input."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The input, as if the others had zeros: initial weights, which rank 0 shares by a sum, stay as they are."""
        return x

    def begin_sum(self, x: Tensor) -> Callable[[], Tensor]:
        """A copy of the input."""
        copy = x.clone()
        return lambda: copy


def with_workers(config: PretrainConfig, workers: int) -> PretrainConfig:
    """The same job with another number of workers, no fewer.

    Raises:
        ConfigError: its batch or its lanes cannot be divided so.
    """
    data = resolved(config)
    data["cluster"] |= {"workers": workers, "min_workers": None}
    return parse(PretrainConfig, data, f"{workers} workers")


def device_of(config: PretrainConfig) -> torch.device:
    """Where a worker of the job would train on this machine: on its GPU where the job asks for one."""
    return torch.device("cuda" if config.cluster.gpu and torch.cuda.is_available() else "cpu")
