"""MONAI SegResNet: pre-activated residual blocks, strided convolutions down, added skips."""

from typing import Any

from monai.networks.nets.segresnet import SegResNet
from torch import Tensor

from ssl_core.networks.pyramid import Architecture, Geometry, cumulative


def _make(in_channels: int = 1, out_channels: int = 2, **rest: Any) -> SegResNet:
    return SegResNet(in_channels=in_channels, out_channels=out_channels, **rest)


def _geometry(arguments: dict[str, Any]) -> list[Geometry]:
    dims, levels = arguments.get("spatial_dims", 3), len(arguments.get("blocks_down", (1, 2, 2, 4)))
    return cumulative([((1 if i == 0 else 2,) * dims, (0.5,) * dims) for i in range(levels)])


def _encode(net: SegResNet, x: Tensor, upto: int) -> list[Tensor]:
    x = net.convInit(x)
    if net.dropout_prob is not None:
        x = net.dropout(x)
    maps = []
    for down in net.down_layers[: upto + 1]:
        x = down(x)
        maps.append(x)
    return maps


def _decode(net: SegResNet, features: list[Tensor]) -> list[Tensor]:
    maps, skips = [features[-1]], features[-2::-1]
    for sample, layer, skip in zip(net.up_samples, net.up_layers, skips[: len(net.up_layers)], strict=True):
        maps.append(layer(sample(maps[-1]) + skip))
    return maps[1:]


def _level_prefixes(net: SegResNet, level: int) -> list[str]:
    return ["convInit", *(f"down_layers.{i}" for i in range(level + 1))]


SEGRESNET = Architecture(
    make=_make,
    geometry=_geometry,
    encode=_encode,
    decode=_decode,
    level_prefixes=_level_prefixes,
    encoder_prefixes=lambda net: _level_prefixes(net, len(net.down_layers) - 1),
    decoder_prefixes=lambda net: ["up_layers", "up_samples"],
    slim=lambda arguments: arguments | {"init_filters": 8},
)
