"""Gradients averaged over ranks in buckets, while the backward pass goes on where the ranks are far apart.

What a bucket holds follows from the parameters alone, and buckets leave in one order on all ranks. So a sum is rounded
in the same way with and without the overlap, in a resumed run, and where a run is done again on one machine. Only the
moment at which a bucket leaves depends on the backward pass.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from ssl_core.distributed import Collectives
from storage.errors import ConfigError

BUCKET_BYTES = 25 * 2**20
"""Least bytes of a bucket. A ring of 64 ranks takes 126 messages a bucket, about 6 ms at 50 us each; 25 MiB need 40 ms
at 10 Gbit/s. Smaller buckets would wait more for latency, larger ones leave later."""

LAST_BYTES = 2**20
"""Most bytes of the bucket of the first layers. It is whole only when the backward pass is over, and hides behind
nothing."""


class Buckets:
    """Cuts of one flat gradient, those of the last parameters first.

    A bucket leaves in the backward pass when all of its gradients are there and the bucket before it has left. It
    leaves as a copy: the gradient in the buffer stays this rank's own until `average`. A parameter that gets no
    gradient in a step holds its bucket, and those after it, back to the end of the pass.

    A parameter may get its gradient in several portions where a method starts a backward pass within one, as
    checkpoints of the reentrant kind do. The first pass sends nothing early and counts them; where there are several,
    all buckets leave at the end of a pass.

    Args:
        flat: The gradients of all parameters, one after the other.
        parameters: By name, in the same order on all ranks.
        collectives: The ranks, more than one; `overlaps` says whether buckets leave early.
    """

    def __init__(self, flat: Tensor, parameters: Mapping[str, nn.Parameter], collectives: Collectives) -> None:
        self._flat, self._collectives, self._names = flat, collectives, list(parameters)
        groups = _cut([p.nbytes for p in parameters.values()])
        ends = [0, *accumulate(p.numel() for p in parameters.values())]
        self._cuts = [slice(ends[group.start], ends[group.stop]) for group in groups]
        self._sizes = [len(group) for group in groups]
        self._bucket_of = {index: bucket for bucket, group in enumerate(groups) for index in group}
        self._counts = [0] * len(self._names)
        self._missing = list(self._sizes)
        self._sums: list[Callable[[], Tensor]] = []
        self._is_counting = False
        self._is_once: bool | None = None  # not before the first pass is over
        if collectives.overlaps:
            for index, parameter in enumerate(parameters.values()):
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, index))

    @property
    def left(self) -> int:
        """How many buckets have left and are not averaged yet."""
        return len(self._sums)

    def backward(self, loss: Tensor) -> None:
        """The backward pass after which nothing is added to the gradients of this step.

        Raises:
            ConfigError: a parameter got more after its bucket had left, though not so in the first pass.
        """
        self._counts, self._missing = [0] * len(self._names), list(self._sizes)
        self._sums.clear()
        self._is_counting = True
        try:
            loss.backward()
        finally:
            self._is_counting = False
        if self._is_once is None:
            self._is_once = max(self._counts) <= 1

    def average(self, votes: Tensor) -> None:
        """Replace gradients and votes, which the last bucket carries, by their mean over ranks; a collective call."""
        while self.left < len(self._cuts) - 1:
            self._leave()
        self._leave(votes)
        for cut, result in zip(self._cuts, self._sums, strict=True):
            mean = result() / self._collectives.world
            self._flat[cut].copy_(mean[: cut.stop - cut.start])
        votes.copy_(mean[-len(votes) :])
        self._sums.clear()

    def _arrived(self, index: int, _parameter: Tensor) -> None:
        """Note the gradient of a parameter; called by autograd after it has been added to the buffer."""
        if not self._is_counting:
            return
        bucket = self._bucket_of[index]
        if bucket < self.left:
            raise ConfigError(
                "method",
                expected="one gradient a parameter and backward pass, or several in the first pass too",
                found=f"a second one for {self._names[index]}, after the first was on its way to the other ranks",
                remedy="start no backward pass within another: torch.utils.checkpoint with use_reentrant=False",
            )
        self._counts[index] += 1
        self._missing[bucket] -= self._counts[index] == 1
        while self._is_once and self.left < len(self._cuts) - 1 and not self._missing[self.left]:
            self._leave()

    def _leave(self, votes: Tensor | None = None) -> None:
        part = self._flat[self._cuts[self.left]]
        self._sums.append(self._collectives.begin_sum(part if votes is None else torch.cat([part, votes])))


def _cut(sizes: list[int]) -> list[range]:
    """Indices of each bucket's parameters, in the order in which buckets leave; the last one may have none."""
    first, total = 0, 0
    while first < len(sizes) and total + sizes[first] <= LAST_BYTES:
        total += sizes[first]
        first += 1
    groups, stop, total = list[range](), len(sizes), 0
    for index in reversed(range(first, len(sizes))):
        total += sizes[index]
        if total >= BUCKET_BYTES or index == first:
            groups.append(range(index, stop))
            stop, total = index, 0
    return [*groups, range(first)]
