"""Elastic pre-training: as many workers as find room, and of these as many as can share a batch evenly.

Ray Train starts every number between the bounds. Three of four workers could not share a batch of eight, and the job
would end at its first read instead of going on with two.
"""

from typing import Any

from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ScalingPolicy
from ray.train.v2.api import data_parallel_trainer

_ray_makes = data_parallel_trainer.create_scaling_policy


class EvenShares(ElasticScalingPolicy):
    """Ray's elastic policy with the number of workers rounded down to one of `sizes`; runs in the controller."""

    def __init__(self, scaling_config: ScalingConfig, sizes: tuple[int, ...]) -> None:
        super().__init__(scaling_config)
        self._sizes = sizes

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._sizes if size <= room), default=0)


def share_evenly(global_batch: int, lanes: int) -> None:
    """Let elastic runs of this process have only numbers of workers that divide both, from now on.

    Ray Train has no setting for it; the policy that a trainer makes goes to the controller as it is.
    """
    sizes = tuple(n for n in range(1, min(global_batch, lanes) + 1) if global_batch % n == lanes % n == 0)

    def make(scaling_config: ScalingConfig) -> ScalingPolicy:
        elastic = scaling_config.elasticity_enabled
        return EvenShares(scaling_config, sizes) if elastic else _ray_makes(scaling_config)

    data_parallel_trainer.create_scaling_policy = make
