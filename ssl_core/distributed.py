"""Every collective of the project, given to methods and the engine as one small object.

The gather is differentiable: its backward pass sums the gradients that all ranks send to a slice, so that "local
anchors against gathered keys", averaged over ranks, has the gradient of one rank on the joined batch.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Collectives(Protocol):
    """What a method may do across ranks, and the engine.

    Attributes:
        rank: Of this process.
        world: Number of ranks.
        overlaps: Whether sums that were begun go on beside the backward pass; the same on all ranks.
    """

    rank: int
    world: int
    overlaps: bool

    def gather(self, x_B: Tensor) -> Tensor:
        """Concatenate along axis 0 over ranks, in rank order; differentiable; equal local shapes."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """Mean over ranks; differentiable."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks; differentiable."""
        ...

    def begin_sum(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin a sum over ranks, in the same order on all of them; the answer waits for it and gives it.

        Not differentiable. `x` may change meanwhile. Where `overlaps`, order among other collectives does not matter.
        """
        ...


class Single:
    """One rank."""

    rank = 0
    world = 1
    overlaps = False

    def gather(self, x_B: Tensor) -> Tensor:
        """The input."""
        return x_B

    def mean(self, x: Tensor) -> Tensor:
        """The input."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The input."""
        return x

    def begin_sum(self, x: Tensor) -> Callable[[], Tensor]:
        """A copy of the input."""
        copy = x.clone()
        return lambda: copy


class ProcessGroup:
    """The default `torch.distributed` group.

    Args:
        overlap: Give sums that are begun a group of their own. Losses have collectives in their backward pass too, and
            within one group all ranks would have to call both in one order. All ranks make the object together then.
    """

    def __init__(self, *, overlap: bool = False) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.overlaps = overlap and self.world > 1
        self._apart = dist.new_group() if self.overlaps else None

    def __deepcopy__(self, _memo: dict[int, Any]) -> "ProcessGroup":
        """Itself, since a copy of a network has the ranks that the network has."""
        return self

    def gather(self, x_B: Tensor) -> Tensor:
        """Concatenate along axis 0 in rank order."""
        if x_B.dtype.is_floating_point and torch.is_grad_enabled() and x_B.requires_grad:
            gathered: Tensor = _Gather.apply(x_B)
            return gathered
        parts = [torch.empty_like(x_B, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(parts, x_B.contiguous())
        return torch.cat(parts)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over ranks."""
        return self.sum(x) / self.world

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks."""
        if torch.is_grad_enabled() and x.requires_grad:
            summed: Tensor = _Sum.apply(x)
            return summed
        return _summed(x.detach())

    def begin_sum(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin a sum over ranks; see `Collectives.begin_sum`."""
        total, dtype = _wide(x.detach()), x.dtype
        work = dist.all_reduce(total, group=self._apart, async_op=True)

        def result() -> Tensor:
            work.wait()
            return total.to(dtype)

        return result


def _summed(x: Tensor) -> Tensor:
    """The sum over ranks, rounded once."""
    total = _wide(x)
    dist.all_reduce(total)
    return total.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """A copy to add to: halves as float32, or the result would depend on the ranks' order."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    # A clone keeps the strides of a transposed tensor, which NCCL refuses.
    return wide.clone(memory_format=torch.contiguous_format)


class _Gather(torch.autograd.Function):
    """Concatenation over ranks; backward sums what every rank sends to this rank's slice."""

    @staticmethod
    def forward(ctx: Any, x_B: Tensor) -> Tensor:
        parts = [torch.empty_like(x_B, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x_B.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _summed(grads[0]).chunk(dist.get_world_size())[dist.get_rank()]


class _Sum(torch.autograd.Function):
    """Sum over ranks; each rank's loss depends on it, so backward sums the gradients of all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _summed(grads[0])


def current(*, overlap: bool = False) -> Collectives:
    """The process group when one is up, else one rank.

    Args:
        overlap: Whether gradients are averaged while the backward pass goes on, which pays where ranks are on more than
            one machine. The same on all ranks, which make the object together then.
    """
    return ProcessGroup(overlap=overlap) if dist.is_available() and dist.is_initialized() else Single()
