"""The feature-pyramid contract that every backbone meets.

A backbone wraps one stock network, kept whole as `net`, so that exported weights carry the stock names and load into
the stock class with no renaming.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True)
class Level:
    """One level of a pyramid.

    Attributes:
        channels: Feature channels.
        stride_DHW: Input voxels between neighbouring features.
        offset_DHW: Input edge coordinate of the centre of feature 0 along each axis: feature k sees around
            `stride * k + offset`. Half a stride for pooling, 0.5 for 3x3x3 stride-2 convolutions with padding 1;
            measured, never assumed (see `ssl_core.networks.feature_centres`).
    """

    channels: int
    stride_DHW: tuple[int, int, int]
    offset_DHW: tuple[float, float, float]


@runtime_checkable
class Backbone(Protocol):
    """An `nn.Module` that yields a pyramid.

    Attributes:
        name: Registered name, such as `basic_unet`.
        arguments: Keyword arguments that rebuild it: `build(name, **arguments)`.
        net: The stock network, encoder and decoder.
        levels: Encoder levels, finest first; `features` returns one map each.
        decoder_levels: Decoder levels, coarsest first; `decode` returns one map each.
    """

    name: str
    arguments: dict[str, Any]
    net: nn.Module
    levels: tuple[Level, ...]
    decoder_levels: tuple[Level, ...]

    def features(self, x_BCDHW: Tensor, upto: int | None = None) -> list[Tensor]:
        """Encoder maps, finest first, shapes (B, levels[i].channels, D/stride, H/stride, W/stride).

        Args:
            x_BCDHW: Input; a 2-D network sees every slice along D on its own.
            upto: Deepest level wanted; all when `None`.
        """
        ...

    def decode(self, features: list[Tensor], skips: bool = True) -> list[Tensor]:
        """Decoder maps, coarsest first. Without skips the skip inputs are zeros."""
        ...

    def logits(self, x_BCDHW: Tensor) -> Tensor:
        """The stock network's own forward pass, (B, out_channels, D, H, W)."""
        ...

    def encoder_keys(self) -> list[str]:
        """Names in `net.state_dict()` that belong to the encoder."""
        ...

    def level_keys(self, level: int) -> list[str]:
        """Names in `net.state_dict()` that the map of one encoder level depends on."""
        ...

    def decoder_keys(self) -> list[str]:
        """Names in `net.state_dict()` that `decode` uses, the output layer not among them."""
        ...

    def multiple_DHW(self) -> tuple[int, int, int]:
        """Input sizes must be multiples of this."""
        ...
