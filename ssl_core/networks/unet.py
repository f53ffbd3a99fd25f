"""MONAI UNet: strided 3x3x3 convolutions down, transposed convolutions up, optional residual units."""

from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from ssl_core.networks.pyramid import Architecture, Geometry, cumulative


def _make(
    spatial_dims: int = 3,
    in_channels: int = 1,
    out_channels: int = 2,
    channels: tuple[int, ...] = (16, 32, 64, 128),
    strides: tuple[int, ...] = (2, 2, 2),
    **rest: Any,
) -> UNet:
    return UNet(spatial_dims, in_channels, out_channels, tuple(channels), tuple(strides), **rest)


def _strides(arguments: dict[str, Any]) -> list[int]:
    return list(arguments.get("strides", (2, 2, 2)))[: len(arguments.get("channels", (16, 32, 64, 128))) - 1]


def _geometry(arguments: dict[str, Any]) -> list[Geometry]:
    dims = arguments.get("spatial_dims", 3)
    # Odd kernels with "same" padding, shortcuts alike: feature k of a layer is centred on input s k. The bottom block
    # has stride 1.
    return cumulative([((s,) * dims, (0.5,) * dims) for s in [*_strides(arguments), 1]])


@dataclass(frozen=True)
class _Blocks:
    down: list[nn.Module]  # the bottom block last
    up: list[nn.Module]  # coarsest first, the output block last
    down_names: list[str]
    up_names: list[str]


def _blocks(net: UNet) -> _Blocks:
    """The stock network nests its blocks; this lists them with their state dict prefixes."""
    blocks = _Blocks([], [], [], [])
    node: Any = net.model
    name = "model"
    for _ in net.channels[:-1]:
        blocks.down.append(node[0])
        blocks.up.insert(0, node[2])
        blocks.down_names.append(f"{name}.0")
        blocks.up_names.insert(0, f"{name}.2")
        node, name = node[1].submodule, f"{name}.1.submodule"
    blocks.down.append(node)
    blocks.down_names.append(name)
    return blocks


def _encode(net: UNet, x: Tensor, upto: int) -> list[Tensor]:
    maps = []
    for down in _blocks(net).down[: upto + 1]:
        x = down(x)
        maps.append(x)
    return maps


def _decode(net: UNet, features: list[Tensor]) -> list[Tensor]:
    maps = [features[-1]]
    for up, skip in zip(_blocks(net).up[:-1], features[-2:0:-1], strict=True):
        maps.append(up(torch.cat([skip, maps[-1]], dim=1)))
    return maps[1:]


UNET = Architecture(
    make=_make,
    geometry=_geometry,
    encode=_encode,
    decode=_decode,
    level_prefixes=lambda net, level: _blocks(net).down_names[: level + 1],
    encoder_prefixes=lambda net: _blocks(net).down_names,
    decoder_prefixes=lambda net: _blocks(net).up_names[:-1],
    slim=lambda arguments: arguments | {"channels": (8,) * (len(_strides(arguments)) + 1)},
)
