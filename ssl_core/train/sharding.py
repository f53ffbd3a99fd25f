"""Weights, gradients and moments in shards, one a rank, for networks that do not fit: torch's FSDP2.

Each rank keeps a part of every tensor. A layer's weights are gathered before it works and let go afterwards; its
gradient is averaged and cut as soon as it is there (`torch.distributed.fsdp.fully_shard`; Zhao et al., arXiv
2304.11277). What a rank computes is what it computes without shards, so results are those of whole weights.

Checkpoints hold whole tensors, so any number of ranks goes on from them, with shards or without.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_core.distributed import Collectives
from ssl_core.networks.pyramid import Pyramid

# torch.distributed.fsdp takes a second to import, and every job reads this module: functions import it.

UNIT_BYTES = 2**20
"""Least bytes of a layer that is gathered by itself; smaller ones go together. Our choice: a message of less is mostly
latency."""

WORK = ("features", "decode", "logits")
"""What runs a network's layers."""


def shard(method: nn.Module, device: torch.device) -> None:
    """Cut the parameters of a method into shards, in place; a collective call.

    Args:
        method: With equal weights on all ranks. Its parameters are others afterwards.
        device: Where they lie.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for network in [module for module in method.modules() if isinstance(module, Pyramid)]:
        layers = [module for module in network.net.modules() if not any(True for _ in module.children())]
        for layer in layers:
            if sum(p.nbytes for p in layer.parameters()) >= UNIT_BYTES:
                fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
        for name in WORK:
            register_fsdp_forward_method(network, name)
    fully_shard(method, mesh=mesh)


def is_shard(value: Any) -> bool:
    """Whether a tensor is one of `torch.distributed.tensor`, which no other has the placements of."""
    return hasattr(value, "placements")


def wholes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, with all of each tensor that is in shards, as a copy; a collective call for these."""
    return {name: value.full_tensor() if is_shard(value) else value for name, value in values.items()}


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor to one that may be in shards; each rank has the whole one."""
    target.copy_(placed(value, target))


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, in shards on the device of `like` where that is."""
    if not is_shard(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    shard: Any = like
    return distribute_tensor(value.to(like.device), shard.device_mesh, shard.placements, src_data_rank=None)


class ShardedGradients:
    """Gradients that FSDP2 averages in the backward pass, with the interface of `FlatGradients`.

    Only the rank's own part of a gradient is ever there, so a gradient that is not finite is laid to all ranks.

    Args:
        parameters: Trainable parameters by name, in shards.
        collectives: The ranks.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], collectives: Collectives) -> None:
        self._parameters, self._collectives = list(parameters.values()), collectives
        first = self._parameters[0]
        self._votes = torch.zeros(2, dtype=first.dtype, device=first.device)
        self._square: Tensor | None = None

    def zero(self) -> None:
        """Forget the last step."""
        self._square = None
        for parameter in self._parameters:
            parameter.grad = None

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a part's loss, averaged over ranks."""
        loss.backward()
        for parameter in self._parameters:
            if parameter.grad is None:  # counts as one with zeros, whatever the number of ranks
                parameter.grad = torch.zeros_like(parameter)

    def average(self, *, stop: bool, bad: Tensor) -> None:
        """Count the votes, and add up the norm; gradients are averaged already."""
        self._votes[0].fill_(float(stop))
        self._votes[1].copy_(bad)
        total = self._collectives.sum(torch.cat([self._votes, self._local_square()[None]]))
        self._votes, self._square = total[:2] / self._collectives.world, total[2]

    def norm(self) -> Tensor:
        """Euclidean norm over all parameters; before `average`, over this rank's part of them."""
        return torch.sqrt(self._local_square() if self._square is None else self._square)

    def clip(self, norm: Tensor, largest: float) -> None:
        """Scale by min(1, largest / norm), without waiting for the device."""
        scale = torch.clamp(largest / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(self._parts(), scale)

    def summary(self, norm: Tensor, loss: Tensor) -> Tensor:
        """(4,) float64: norm, votes to stop, votes that a loss was not finite, this rank's loss; copies."""
        return torch.cat([norm[None], self._votes, loss[None]]).double()

    def _parts(self) -> list[Tensor]:
        return [_local(p.grad) for p in self._parameters if p.grad is not None]

    def _local_square(self) -> Tensor:
        norms = torch._foreach_norm(self._parts())
        return torch.stack(norms).square().sum()


def _local(tensor: Any) -> Tensor:
    part: Tensor = tensor.to_local() if is_shard(tensor) else tensor
    return part
