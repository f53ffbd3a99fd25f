"""Intensity normalisation: stored values to network input, by a policy that is chosen at read time.

Every policy is one formula, y = (clip(x, low, high) - centre) / spread, with constants from the policy or from the
volume's recorded foreground statistics. The constants are those of prediction, `ssl_core.portable.preprocess`. Each
channel has its own statistics and so its own constants; those of a policy (`ct`) hold for every channel.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from ssl_core.config import Config
from ssl_core.portable import preprocess
from ssl_core.to_device import to_device
from storage.errors import ConfigError
from storage.intensity_stats import STATS_ORDER

NARROWEST_WINDOW, WIDEST_WINDOW = 1.0, 1e6
"""HU; a scanner tells no less than one unit apart, and float32 tells single units apart within the widest."""


class IntensityPolicy(Config):
    """How intensities are normalised."""

    kind: Literal["percentile", "unit", "ct", "zscore", "none"] = Field(
        "percentile",
        description="percentile: clip to the foreground percentiles 0.5 and 99.5 of each volume and channel, then "
        "z-score; unit: the same clip, then to [0, 1]; ct: fixed window and constants, for every channel; zscore: no "
        "clip; none: unchanged values",
    )
    low: float = Field(-1024.0, description="ct: lower end of the window, HU (PGL's clip, second-hand)")
    high: float = Field(325.0, description="ct: upper end of the window, HU (PGL's clip, second-hand)")
    mean: float = Field(-158.58, description="ct: subtracted, HU (lung CT fingerprint, second-hand)")
    std: float = Field(324.70, description="ct: divided by, HU (lung CT fingerprint, second-hand)")

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        """A window that is none, or constants far from it, make every voxel the same to the network."""
        width = self.high - self.low
        if self.kind != "ct":
            return self
        if not NARROWEST_WINDOW <= width <= WIDEST_WINDOW:
            raise ValueError(
                f"low ({self.low:g}) below high ({self.high:g}), {NARROWEST_WINDOW:g} to {WIDEST_WINDOW:g} apart"
            )
        if not width * 1e-3 <= self.std <= width * 1e3:
            raise ValueError(f"std ({self.std:g}) from a thousandth of the window of {width:g} to a thousand times it")
        if not self.low - 10 * width <= self.mean <= self.high + 10 * width:
            raise ValueError(f"mean ({self.mean:g}) in or near the window from {self.low:g} to {self.high:g}")
        return self


def normalise(
    image_BCDHW: Tensor,
    scale_B: NDArray[Any],
    offset_B: NDArray[Any],
    stats_BCS: NDArray[Any],
    policy: IntensityPolicy,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalise a batch of stored crops on the device they are on.

    Args:
        image_BCDHW: Stored values, any real dtype.
        scale_B: value = stored * scale + offset.
        offset_B: See `scale_B`.
        stats_BCS: Foreground statistics of each channel of each sample's volume, columns in `STATS_ORDER`.
        policy: What to do.
        dtype: float32 or float64.

    Returns:
        (B, C, D, H, W) of `dtype`.

    Raises:
        ConfigError: statistics of another number of samples or channels, which would broadcast.
    """
    batch, channels = image_BCDHW.shape[:2]
    shape = (batch, channels, len(STATS_ORDER))
    if stats_BCS.shape != shape:
        raise ConfigError("stats_BCS", expected=f"shape {shape}, a row a channel", found=str(stats_BCS.shape))
    settings = policy.model_dump()
    table = np.empty((6, batch, channels))
    table[0], table[1] = np.asarray(scale_B)[:, None], np.asarray(offset_B)[:, None]
    for b, c in np.ndindex(batch, channels):
        table[2:, b, c] = preprocess.constants(
            settings, dict(zip(STATS_ORDER, map(float, stats_BCS[b, c]), strict=True))
        )
    columns = to_device(table, image_BCDHW.device, dtype)[..., None, None, None]
    scale, offset, low, high, centre, spread = columns
    return ((image_BCDHW.to(dtype) * scale + offset).clip(low, high) - centre) / spread


def normalise_array(
    values_C: NDArray[Any], stats: Sequence[Mapping[str, float]], policy: IntensityPolicy
) -> NDArray[np.float32]:
    """The same for one volume of values (after scale and offset) in NumPy, float32.

    Args:
        values_C: (C, ...), whatever the axes behind the channel.
        stats: Foreground statistics of each channel.
        policy: What to do.

    Raises:
        ConfigError: statistics of another number of channels.
    """
    if len(stats) != len(values_C):
        raise ConfigError("statistics", expected=f"{len(values_C)}, one of each channel", found=str(len(stats)))
    settings = policy.model_dump()
    out = np.empty(values_C.shape, np.float32)
    for c, channel in enumerate(stats):
        out[c] = preprocess.apply(values_C[c], preprocess.constants(settings, channel))
    return out
