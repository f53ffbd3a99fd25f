"""The networks of two papers as their authors' code has them, to count and to measure; no part of the library."""

from typing import Any

import torch
from torch import Tensor, nn

from ssl_core.networks.pyramid import Architecture, Geometry, Pyramid


def _pair(dims: int, inner: int, middle: int, outer: int, norm: bool = True) -> nn.Sequential:
    conv, batch = (nn.Conv3d, nn.BatchNorm3d) if dims == 3 else (nn.Conv2d, nn.BatchNorm2d)
    layers: list[nn.Module] = []
    for a, b in ((inner, middle), (middle, outer)):
        layers += [conv(a, b, 3, padding=1), *([batch(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers)


class NsUNet(nn.Module):
    """PCRLv2's U-Net without skips: max-pooling down, transposed convolutions up."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        down = ((1, 32, 64), (64, 64, 128), (128, 128, 256), (256, 256, 512))
        self.down = nn.ModuleList(_pair(3, *widths) for widths in down)
        up = ((512, 256), (256, 128), (128, 64))
        self.transposed = nn.ModuleList(nn.ConvTranspose3d(a, a, 2, stride=2) for a, _ in up)
        self.up = nn.ModuleList(_pair(3, a, b, b) for a, b in up)


class PclEncoder(nn.Module):
    """PCL's 2-D encoder of width f; its centre has no norm."""

    def __init__(self, width: int = 32, **_: Any) -> None:
        super().__init__()
        f = [width * 2**i for i in range(4)]
        self.down = nn.ModuleList(_pair(2, a, b, b) for a, b in zip((1, *f[:3]), f, strict=True))
        self.down.append(_pair(2, f[3], 2 * f[3], 2 * f[3], norm=False))


def _encode(net: Any, x: Tensor, upto: int) -> list[Tensor]:
    maps: list[Tensor] = []
    for i, block in enumerate(net.down[: upto + 1]):
        pool = nn.functional.max_pool3d if x.dim() == 5 else nn.functional.max_pool2d
        maps.append(block(pool(maps[-1], 2) if i else x))
    return maps


def _decode(net: Any, features: list[Tensor]) -> list[Tensor]:
    maps = [features[-1]]
    for transposed, block in zip(getattr(net, "transposed", ()), getattr(net, "up", ()), strict=True):
        maps.append(block(transposed(maps[-1])))
    return maps[1:]


def pyramid(kind: type[nn.Module], levels: int, dims: int, **arguments: Any) -> Pyramid:
    """A reference network behind the library's contract; pooling centres features in their cells."""
    geometry = [Geometry((2**i,) * dims, (2**i / 2,) * dims) for i in range(levels)]
    architecture = Architecture(
        make=kind,
        geometry=lambda _: geometry,
        encode=_encode,
        decode=_decode,
        level_prefixes=lambda _, level: [f"down.{i}" for i in range(level + 1)],
        encoder_prefixes=lambda _: ["down"],
        decoder_prefixes=lambda _: ["transposed", "up"],
        slim=lambda given: given,
    )
    torch.manual_seed(0)
    offsets = [g.offset for g in geometry if g.offset is not None]
    return Pyramid(kind.__name__, architecture, {"spatial_dims": dims, **arguments}, offsets)
