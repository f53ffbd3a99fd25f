"""Elastic pre-training: as many workers as find room, and of these as many as can share a batch evenly.

Ray Train starts every number between the bounds. Three of four workers could not share a batch of eight, and the job
would end at its first read instead of going on with two.
"""

from typing import Any

from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.config import ScalingConfig


class EvenShares(ElasticScalingPolicy):
    """Ray's elastic policy with the number of workers rounded down to one of `sizes`; runs in the controller.

    Says so, once for each number that it rounds. `jobs.on_ray.patches.patch_ray_to_share_evenly` puts it in the place
    of Ray's.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: tuple[int, ...]) -> None:
        super().__init__(scaling_config)
        self._sizes = sizes
        self._rounded: set[int] = set()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        size = max((size for size in self._sizes if size <= room), default=0)
        if size < room and room not in self._rounded:
            self._rounded.add(room)
            print(f"room for {room} workers, of which {size} can share the batch and the lanes evenly", flush=True)
        return size
