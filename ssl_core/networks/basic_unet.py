"""MONAI BasicUNet: five levels, 2x2x2 max-pooling, transposed convolutions up."""

from typing import Any

from monai.networks.nets.basic_unet import BasicUNet
from torch import Tensor

from ssl_core.networks.pyramid import Architecture, Geometry

_LEVELS = 5


def _make(
    in_channels: int = 1, out_channels: int = 2, features: tuple[int, ...] = (16, 16, 32, 64, 128, 16), **rest: Any
) -> BasicUNet:
    return BasicUNet(in_channels=in_channels, out_channels=out_channels, features=tuple(features), **rest)


def _geometry(arguments: dict[str, Any]) -> list[Geometry]:
    dims = arguments.get("spatial_dims", 3)
    # Feature k of a pooled map is centred in the middle of its cell.
    return [Geometry((2**i,) * dims, (2**i / 2,) * dims) for i in range(_LEVELS)]


def _encode(net: BasicUNet, x: Tensor, upto: int) -> list[Tensor]:
    maps = [net.conv_0(x)]
    for down in (net.down_1, net.down_2, net.down_3, net.down_4)[:upto]:
        maps.append(down(maps[-1]))
    return maps


def _decode(net: BasicUNet, features: list[Tensor]) -> list[Tensor]:
    maps = [features[-1]]
    for up, skip in zip((net.upcat_4, net.upcat_3, net.upcat_2, net.upcat_1), features[-2::-1], strict=True):
        maps.append(up(maps[-1], skip))
    return maps[1:]


def _level_prefixes(net: BasicUNet, level: int) -> list[str]:
    return ["conv_0", *(f"down_{i}" for i in range(1, level + 1))]


BASIC_UNET = Architecture(
    make=_make,
    geometry=_geometry,
    encode=_encode,
    decode=_decode,
    level_prefixes=_level_prefixes,
    encoder_prefixes=lambda net: _level_prefixes(net, _LEVELS - 1),
    decoder_prefixes=lambda net: [f"upcat_{i}" for i in range(1, _LEVELS)],
    slim=lambda arguments: arguments | {"features": (8,) * 6},
)
