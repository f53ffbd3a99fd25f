"""Projection and prediction heads: stacks of linear layers on vectors (B, C) or, as 1x1x1 convolutions, on maps."""

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from ssl_core.networks.backbone import Level
from ssl_core.networks.batch_norm import GlobalBatchNorm

Norm = Literal["batch", "group", "none"]


def head(widths: Sequence[int], *, dense: bool = False, norm: Norm = "batch", last_norm: bool = False) -> nn.Sequential:
    """Linear, norm, ReLU and so on; the last layer is bare linear, with a norm without scale when `last_norm`.

    Args:
        widths: Input, hidden and output channels; two for a single layer.
        dense: 1x1x1 convolutions on (B, C, D, H, W) instead of linear layers on (B, C).
        norm: Batch norm over the global batch, group norm in groups of about 8 channels, or none.
        last_norm: Whether the output is normalised too.
    """
    layers: list[nn.Module] = []
    for i, (inner, outer) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        normed = norm != "none" and (not last or last_norm)
        bias = not (normed and norm == "batch")  # batch norm takes it away again
        layers.append(nn.Conv3d(inner, outer, 1, bias=bias) if dense else nn.Linear(inner, outer, bias=bias))
        if normed and norm == "batch":
            layers.append(GlobalBatchNorm(outer, affine=not last))
        elif normed:
            groups = max(g for g in range(1, max(outer // 8, 1) + 1) if outer % g == 0)
            layers.append(nn.GroupNorm(groups, outer))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def head_at(layers: nn.Sequential, map_BCdhw: Tensor, index_BN: Tensor) -> Tensor:
    """What a dense `head` says at a few positions of a map, (B, N, E), without its output at all the others.

    The same as gathering from the whole output: 1x1x1 convolutions see one position, and what a batch norm after the
    first of them has to know of all positions follows from the map itself (`GlobalBatchNorm.forward_linear`). Where a
    norm needs the whole hidden map, that is made.

    Args:
        layers: A head of `dense` kind.
        map_BCdhw: Its input.
        index_BN: Positions, counted over the flattened map.
    """
    norms = [layer for layer in layers if isinstance(layer, GlobalBatchNorm | nn.GroupNorm)]
    first, *rest = layers
    norm = norms[0] if norms else None
    if not isinstance(first, nn.Conv3d) or isinstance(norm, nn.GroupNorm) or norms[1:] or norm not in (None, rest[0]):
        return _picked(layers(map_BCdhw), index_BN)
    out = _picked(map_BCdhw, index_BN)
    if isinstance(norm, GlobalBatchNorm):
        rows = norm.forward_linear(map_BCdhw, first.weight.flatten(1), first.bias, out.flatten(0, 1))
        out = rows.view(*index_BN.shape, -1)
    else:
        out = _linear(first, out)
    for layer in rest:
        if layer is not norm:
            out = _linear(layer, out) if isinstance(layer, nn.Conv3d) else layer(out)
    return out


def _linear(layer: nn.Conv3d, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight.flatten(1), layer.bias)


def _picked(map_BCdhw: Tensor, index_BN: Tensor) -> Tensor:
    flat_BCM = map_BCdhw.flatten(2)
    return flat_BCM.gather(2, index_BN[:, None].expand(-1, flat_BCM.shape[1], -1)).transpose(1, 2)


class PixelHead(nn.Module):
    """A map at any level to an image at the input's resolution: 1x1x1 convolution, then trilinear up-sampling.

    Args:
        level: Of the map.
        channels: Of the image.
    """

    def __init__(self, level: Level, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(level.channels, channels, 1)
        self.stride = tuple(level.stride_DHW)

    def forward(self, feature_BCdhw: Tensor) -> Tensor:
        """(B, channels, D, H, W)."""
        image: Tensor = self.conv(feature_BCdhw)
        if max(self.stride) == 1:
            return image
        size = [n * s for n, s in zip(image.shape[2:], self.stride, strict=True)]
        return functional.interpolate(image, size=size, mode="trilinear", align_corners=False)
