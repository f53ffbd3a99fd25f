"""Intensity normalisation: stored values to network input, by a policy that is chosen at read time.

Every policy is one formula, y = (clip(x, low, high) - centre) / spread, with constants from the policy or from the
volume's recorded foreground statistics, so that training and prediction cannot drift apart. The statistics are those of
a volume's first channel and hold for all of them.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ssl_core.config import Config
from storage.intensity_stats import STATS_ORDER


class IntensityPolicy(Config):
    """How intensities are normalised."""

    kind: Literal["percentile", "unit", "ct", "zscore", "none"] = Field(
        "percentile",
        description="percentile: clip to the volume's foreground percentiles 0.5 and 99.5, then z-score; "
        "unit: the same clip, then to [0, 1]; ct: fixed window and constants; zscore: no clip; none: unchanged values",
    )
    low: float = Field(-1024.0, description="ct: lower end of the window, HU (PGL's clip, second-hand)")
    high: float = Field(325.0, description="ct: upper end of the window, HU (PGL's clip, second-hand)")
    mean: float = Field(-158.58, description="ct: subtracted, HU (lung CT fingerprint, second-hand)")
    std: float = Field(324.70, description="ct: divided by, HU (lung CT fingerprint, second-hand)")


def constants(policy: IntensityPolicy, stats: Mapping[str, float]) -> tuple[float, float, float, float]:
    """`(low, high, centre, spread)` of a volume with these foreground statistics; `spread` is never 0."""
    inf = float("inf")
    if policy.kind == "none":
        return -inf, inf, 0.0, 1.0
    if policy.kind == "ct":
        return policy.low, policy.high, policy.mean, policy.std
    if policy.kind == "unit":
        low, high, centre, spread = stats["p0_5"], stats["p99_5"], stats["p0_5"], stats["p99_5"] - stats["p0_5"]
    else:
        low, high, centre, spread = -inf, inf, stats["mean"], stats["std"]
        if policy.kind == "percentile":
            low, high = stats["p0_5"], stats["p99_5"]
    # A constant volume becomes 0 everywhere instead of rounding noise divided by nothing.
    return low, high, centre, spread if spread > 1e-7 * max(1.0, abs(centre)) else 1.0


def apply(values: Any, low: Any, high: Any, centre: Any, spread: Any) -> Any:
    """The formula, on a NumPy array or a tensor of values (after scale and offset)."""
    return (values.clip(low, high) - centre) / spread


def normalise(
    image_BCDHW: Tensor,
    scale_B: NDArray[Any],
    offset_B: NDArray[Any],
    stats_BS: NDArray[Any],
    policy: IntensityPolicy,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalise a batch of stored crops on the device they are on.

    Args:
        image_BCDHW: Stored values, any real dtype.
        scale_B: value = stored * scale + offset.
        offset_B: See `scale_B`.
        stats_BS: Foreground statistics of each sample's volume, columns in `STATS_ORDER`.
        policy: What to do.
        dtype: float32 or float64.

    Returns:
        (B, C, D, H, W) of `dtype`.
    """
    rows = [constants(policy, dict(zip(STATS_ORDER, map(float, row), strict=True))) for row in stats_BS]
    table = np.concatenate([np.stack([scale_B, offset_B], 1).astype(np.float64), np.array(rows, np.float64)], axis=1)
    columns = torch.from_numpy(table).to(image_BCDHW.device, dtype).T.reshape(6, -1, 1, 1, 1, 1)
    scale, offset, low, high, centre, spread = columns
    return apply(image_BCDHW.to(dtype) * scale + offset, low, high, centre, spread)


def normalise_array(values: NDArray[Any], stats: Mapping[str, float], policy: IntensityPolicy) -> NDArray[np.float32]:
    """The same for one volume of values (after scale and offset) in NumPy, float32."""
    result = apply(values.astype(np.float32), *(np.float32(c) for c in constants(policy, stats)))
    return np.asarray(result, np.float32)
