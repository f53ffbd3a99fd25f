"""MONAI SwinUNETR: windowed attention down, convolutions up. Needs the extra `swin`."""

from typing import Any

from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor

from ssl_core.networks.pyramid import Architecture, Geometry

_LEVELS = 6


def _make(in_channels: int = 1, out_channels: int = 2, **rest: Any) -> SwinUNETR:
    return SwinUNETR(in_channels=in_channels, out_channels=out_channels, **rest)


def _geometry(arguments: dict[str, Any]) -> list[Geometry]:
    dims, patch = arguments.get("spatial_dims", 3), int(arguments.get("patch_size", 2))
    # Patch embedding and merging cut the input into cells: kernel equals stride. Merging always halves.
    strides = [1, *(patch * 2**i for i in range(_LEVELS - 1))]
    return [Geometry((s,) * dims, (s / 2,) * dims) for s in strides]


def _encode(net: SwinUNETR, x: Tensor, upto: int) -> list[Tensor]:
    maps = [net.encoder1(x)]
    if upto == 0:
        return maps
    hidden = net.swinViT(x, net.normalize)
    after = (net.encoder2, net.encoder3, net.encoder4, None, net.encoder10)
    for block, state in list(zip(after, hidden, strict=True))[:upto]:
        maps.append(state if block is None else block(state))
    return maps


def _decode(net: SwinUNETR, features: list[Tensor]) -> list[Tensor]:
    maps = [features[-1]]
    ups = (net.decoder5, net.decoder4, net.decoder3, net.decoder2, net.decoder1)
    for up, skip in zip(ups, features[-2::-1], strict=True):
        maps.append(up(maps[-1], skip))
    return maps[1:]


def _level_prefixes(net: SwinUNETR, level: int) -> list[str]:
    if level == 0:
        return ["encoder1"]
    # Level i sees patch embedding and the stages up to i - 1; its own convolution block comes after them.
    stages = [f"swinViT.layers{i}{c}" for i in range(1, level) for c in ("", "c")]
    own = {1: ["encoder2"], 2: ["encoder3"], 3: ["encoder4"], 4: [], 5: ["encoder10"]}[level]
    return ["swinViT.patch_embed", *stages, *own]


SWIN_UNETR = Architecture(
    make=_make,
    geometry=_geometry,
    encode=_encode,
    decode=_decode,
    level_prefixes=_level_prefixes,
    encoder_prefixes=lambda net: ["swinViT", "encoder1", "encoder2", "encoder3", "encoder4", "encoder10"],
    decoder_prefixes=lambda net: [f"decoder{i}" for i in range(1, _LEVELS)],
    slim=lambda arguments: arguments | {"feature_size": 12, "depths": (2, 2, 2, 2), "num_heads": (3, 3, 3, 3)},
)
