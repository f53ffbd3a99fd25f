"""Where in the input the features of an encoder are centred, measured.

The squared gradient of one feature with respect to a random input says how strongly it sees every voxel; the centroid
of that weight is the feature's centre. Random kernels are lopsided, so every network is measured together with its
twin with all kernels mirrored along the axis, seen on the mirrored input: lopsidedness cancels and what remains is
structure, such as the half voxel of strided convolutions. For that, activations are left out, and norms keep their
statistics fixed, since through them every feature sees a little of the whole input.
"""

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_core.networks.batch_norm import GlobalBatchNorm
from ssl_core.networks.pyramid import Architecture

POSITIONS = 12  # features of the deepest level along the measured axis; the middle ones see no padding
SEEDS = 4
ACROSS = 4  # features of the level that is measured, across the axis
PROBES = 4  # random mixtures of channels for each network


def offsets(name: str, architecture: Architecture, arguments: dict[str, Any]) -> tuple[tuple[float, ...], ...]:
    """Offsets of all levels along the network's axes: known ones from its geometry, the others measured once."""
    exact = [g.offset for g in architecture.geometry(arguments)]
    if all(o is not None for o in exact):
        return tuple(o for o in exact if o is not None)
    slim = json.dumps(architecture.slim(arguments), sort_keys=True)
    measured = _cached(name, architecture, slim)
    return tuple(m if o is None else o for o, m in zip(exact, measured, strict=True))


@functools.lru_cache(maxsize=64)
def _cached(name: str, architecture: Architecture, arguments: str) -> tuple[tuple[float, ...], ...]:
    strides = [g.stride for g in architecture.geometry(json.loads(arguments))]
    if any(len(set(stride)) > 1 for stride in strides):
        return measure(architecture, json.loads(arguments))
    offsets_of_d = measure(architecture, json.loads(arguments), axes=[0])
    return tuple(row * len(strides[0]) for row in offsets_of_d)


def measure(
    architecture: Architecture, arguments: dict[str, Any], seeds: int = SEEDS, axes: Sequence[int] | None = None
) -> tuple[tuple[float, ...], ...]:
    """Measured offset of every level along the network's axes, input voxels, as `Level.offset_DHW` defines it.

    Args:
        architecture: What to measure.
        arguments: Of a network, best a narrow one: width does not move centres.
        seeds: Networks to average over.
        axes: Axes to measure; all when `None`. The result has these only.
    """
    strides = [g.stride for g in architecture.geometry(arguments)]
    measured_axes = list(range(len(strides[0])) if axes is None else axes)
    total = torch.zeros(len(strides), len(measured_axes), dtype=torch.float64)
    for seed in range(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = _local(architecture.make(**arguments).eval())
            for column, axis in enumerate(measured_axes):
                for level in range(len(strides)):
                    total[level, column] += _along(architecture, net, arguments, strides, axis, level)
    return tuple(tuple(float(x) for x in row) for row in total / seeds)


def _along(
    architecture: Architecture,
    net: nn.Module,
    arguments: dict[str, Any],
    strides: list[tuple[int, ...]],
    axis: int,
    level: int,
) -> float:
    # Across the axis a few features do, and no more than one of the deepest level, whose input is by far the largest.
    stride = strides[level]
    size = [
        POSITIONS * s if i == axis else min(ACROSS * s, d)
        for i, (s, d) in enumerate(zip(stride, strides[-1], strict=True))
    ]
    x = torch.randn(1, int(arguments.get("in_channels", 1)), *size)
    mirrored = copy.deepcopy(net)
    for parameter in mirrored.parameters():
        if parameter.dim() == x.dim():
            parameter.data = parameter.data.flip(axis + 2)
    edges = torch.arange(size[axis], dtype=torch.float64) + 0.5
    mixtures: Tensor | None = None
    offset = 0.0
    for twin, start in ((net, x), (mirrored, x.flip(axis + 2))):
        image = start.clone().requires_grad_()
        m = architecture.encode(twin, image, level)[level]
        mixtures = torch.randn(PROBES, m.shape[1]) if mixtures is None else mixtures
        middle = [n // 2 for n in m.shape[2:]]
        weight = torch.zeros_like(start, dtype=torch.float64)
        for mixture in mixtures:
            feature = m[0].permute(*range(1, m.dim() - 1), 0)[tuple(middle)] @ mixture
            weight += torch.autograd.grad(feature, image, retain_graph=True)[0].double().square()
        profile = weight.sum([d for d in range(x.dim()) if d != axis + 2])
        centre = float((profile * edges).sum() / profile.sum())
        offset += (centre - stride[axis] * middle[axis]) / 2
    return offset


class _FixedNorm(nn.Module):
    """Normalises with statistics that carry no gradient."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """`x` less its mean, divided by its deviation."""
        flat = x.detach().reshape(len(x), self.groups or x.shape[1], -1)
        mean, std = flat.mean(2), flat.std(2, correction=0) + 1e-5
        shape = (len(x), -1, *(1,) * (x.dim() - 2))
        repeat = x.shape[1] // mean.shape[1]
        mean, std = mean.repeat_interleave(repeat, 1), std.repeat_interleave(repeat, 1)
        return (x - mean.view(shape)) / std.view(shape)


def _local(module: nn.Module) -> nn.Module:
    for name, part in list(module.named_children()):
        if isinstance(part, nn.modules.instancenorm._InstanceNorm | nn.modules.batchnorm._BatchNorm | GlobalBatchNorm):
            setattr(module, name, _FixedNorm(0))
        elif isinstance(part, nn.GroupNorm):
            setattr(module, name, _FixedNorm(part.num_groups))
        elif isinstance(part, nn.ReLU | nn.LeakyReLU | nn.PReLU):
            setattr(module, name, nn.Identity())
        else:
            _local(part)
    return module
