"""`preprocess.json`: from the values of a canonical volume to what the network was trained on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import RefusedInput
from .grid import resample, spacing_dhw
from .inference.settings import PLAIN, Inference
from .inference.slabs import Slabs, Source
from .intensity_stats import STATS_ORDER, channel_foreground
from .training_data import MOST_VOXELS, TrainingData

AXES = "DHW, D inferior to superior, H posterior to anterior, W left to right"
LEAST_SPREAD = 1e-30
"""Of a channel that is not constant; in the middle of what float32 holds. An ADC map in m^2/s has one of 1e-9."""


@dataclass(frozen=True)
class Preprocess:
    """What happens between a file and the network.

    Attributes:
        channels: Input channels.
        spacing_mm: (D, H, W) that volumes are resampled to; None keeps each volume's own where training had such.
        interpolation: How they are resampled, `linear` or `bspline`.
        intensity: `kind` and the constants of the policy; see `constants`.
        patch_DHW: Sliding window, voxels.
        labels: (value in the mask, name) of each class; class 0 is the background.
        training: What the network learned from; None in a bundle that does not say it.
        inference: What is done to the network's output; nothing in bundles of before.
    """

    channels: int
    spacing_mm: tuple[float, float, float] | None
    interpolation: Literal["linear", "bspline"]
    intensity: dict[str, Any]
    patch_DHW: tuple[int, int, int]
    labels: tuple[tuple[int, str], ...]
    training: TrainingData | None = None
    inference: Inference = PLAIN

    @classmethod
    def parse(cls, name: str, data: dict[str, Any]) -> "Preprocess":
        """Read the JSON object of `preprocess.json`.

        Raises:
            RefusedInput: another axis convention, an unknown policy or a missing key.
        """
        try:
            if data["axes"] != AXES:
                raise ValueError(f"axes {data['axes']!r}")
            spacing, patch, training = data["spacing_mm"], data["patch_DHW"], data.get("training")
            result = cls(
                channels=int(data["channels"]),
                spacing_mm=None if spacing is None else (float(spacing[0]), float(spacing[1]), float(spacing[2])),
                interpolation="bspline" if data["interpolation"] == "bspline" else "linear",
                intensity=dict(data["intensity"]),
                patch_DHW=(int(patch[0]), int(patch[1]), int(patch[2])),
                labels=tuple((int(entry["value"]), str(entry["name"])) for entry in data["labels"]),
                training=None if training is None else TrainingData.parse(training),
                inference=Inference.parse(data.get("inference", {})),
            )
            constants(result.intensity, dict.fromkeys(STATS_ORDER, 0.0))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RefusedInput(
                name,
                expected="a preprocessing that this version knows",
                found=str(error),
                remedy="pull the bundle again",
            ) from error
        return result

    def dump(self) -> dict[str, Any]:
        """The JSON object of `preprocess.json`."""
        return {
            "axes": AXES,
            "channels": self.channels,
            "spacing_mm": None if self.spacing_mm is None else list(self.spacing_mm),
            "interpolation": self.interpolation,
            "intensity": self.intensity,
            "patch_DHW": list(self.patch_DHW),
            "labels": [{"value": value, "name": name} for value, name in self.labels],
            "training": None if self.training is None else self.training.dump(),
            **({"inference": chain} if (chain := self.inference.dump()) else {}),
        }

    def target_spacing(self, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float] | None:
        """The spacing that a volume of this one is brought to before the network; None leaves it as it is.

        That which ingest resampled the training volumes to, or else the nearest that they had.
        """
        if self.spacing_mm is not None or self.training is None:
            return self.spacing_mm
        return self.training.nearest_spacing(spacing_mm)


def constants(policy: Mapping[str, Any], stats: Mapping[str, float]) -> tuple[float, float, float, float]:
    """`(low, high, centre, spread)` of y = (clip(x, low, high) - centre) / spread for one channel.

    Training and prediction both take them from here. `spread` is never 0.

    Args:
        policy: Fields of `ssl_core.views.intensity.IntensityPolicy`.
        stats: The channel's foreground statistics.

    Raises:
        ValueError: an unknown policy.
    """
    inf, kind = math.inf, policy["kind"]
    if kind == "none":
        return -inf, inf, 0.0, 1.0
    if kind == "ct":
        return float(policy["low"]), float(policy["high"]), float(policy["mean"]), float(policy["std"])
    if kind == "unit":
        low, high, centre, spread = stats["p0_5"], stats["p99_5"], stats["p0_5"], stats["p99_5"] - stats["p0_5"]
    elif kind == "percentile":
        low, high, centre, spread = stats["p0_5"], stats["p99_5"], stats["mean"], stats["std"]
    elif kind == "zscore":
        low, high, centre, spread = -inf, inf, stats["mean"], stats["std"]
    else:
        raise ValueError(f"intensity policy {kind!r}")
    # A constant channel becomes 0 everywhere instead of rounding noise divided by nothing.
    return low, high, centre, spread if spread > max(1e-7 * abs(centre), LEAST_SPREAD) else 1.0


def apply(values: NDArray[Any], table: tuple[float, float, float, float]) -> NDArray[np.float32]:
    """The formula of `constants`, in float32."""
    low, high, centre, spread = (np.float32(c) for c in table)
    return np.asarray((values.astype(np.float32).clip(low, high) - centre) / spread, np.float32)


@dataclass(frozen=True)
class Prepared:
    """A volume on the network's grid, normalised slab by slab as it is read.

    Attributes:
        slabs: Its intensities.
        tables: `constants` of each channel.
        air_C: The network's input where there is air, with which volumes are padded.
    """

    slabs: Slabs
    tables: tuple[tuple[float, float, float, float], ...]
    air_C: NDArray[np.float32]

    @property
    def shape_DHW(self) -> tuple[int, int, int]:
        """Voxels on the network's grid."""
        _, d, h, w = self.slabs.shape_CDHW
        return d, h, w

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """The network's input from one place along D to another, (C, stop - start, H, W)."""
        values_CDHW = self.slabs.read(start, stop)
        image = np.empty(values_CDHW.shape, np.float32)
        for c, table in enumerate(self.tables):
            image[c] = apply(values_CDHW[c], table)
        return image

    def whole(self) -> NDArray[np.float32]:
        """The network's input of the whole volume, (C, D, H, W)."""
        return self.read(0, self.shape_DHW[0])

    def spread_C(self) -> list[float]:
        """Difference of the highest and the lowest input of each channel; the formula of `apply` keeps their order."""
        bounds = [apply(np.array([r.low, r.high]), t) for r, t in zip(self.slabs.ranges, self.tables, strict=True)]
        return [float(high - low) for low, high in bounds]


def prepare(
    values_CDHW: NDArray[Any] | Source | Slabs,
    affine: NDArray[np.float64],
    plan: Preprocess,
    stats: Sequence[dict[str, float]] | None = None,
) -> Prepared:
    """Resample a canonical volume, and say how it is normalised.

    What is resampled, or has no statistics, is taken into memory as a whole.

    Args:
        values_CDHW: Intensities after scale and offset, or slabs of them.
        affine: (4, 4) of `values_CDHW`.
        plan: The bundle's preprocessing.
        stats: Foreground statistics of each channel of `values_CDHW`, as ingest records them; None computes them.
            Where the volume is resampled they are measured anew, as ingest does after resampling.

    Raises:
        RefusedInput: `stats` of another number of channels, or more voxels at the target spacing than memory holds.
    """
    slabs = Slabs.of(values_CDHW)
    channels, *shape = slabs.shape_CDHW
    if stats is not None and len(stats) != channels:
        raise RefusedInput("statistics", expected=f"{channels}, one of each channel", found=str(len(stats)))
    target_mm = plan.target_spacing(spacing_dhw(affine))
    if target_mm is not None:
        old_mm = spacing_dhw(affine)
        size = [max(1.0, n * o / t) for n, o, t in zip(shape, old_mm, target_mm, strict=True)]
        if channels * math.prod(size) > MOST_VOXELS:
            raise RefusedInput(
                "resampling",
                expected=f"at most {MOST_VOXELS} voxels at {target_mm} mm (D, H, W)",
                found=f"{channels * math.prod(size):.3g}, of voxels of {old_mm} mm",
                remedy="check the spacing in the header, or cut the scan to the region of interest",
            )
        stored_CDHW = slabs.whole()
        resampled_CDHW, _ = resample(stored_CDHW, affine, target_mm, plan.interpolation)
        if resampled_CDHW is not stored_CDHW:
            # Larger voxels average noise away: statistics of the finer grid are not those that training saw.
            slabs, stats = Slabs(resampled_CDHW), None
        del stored_CDHW, resampled_CDHW  # of a store, the whole volume on its own grid
    channel_stats = channel_foreground(slabs.whole())[1] if stats is None else stats
    tables = tuple(constants(plan.intensity, channel) for channel in channel_stats)
    pairs = zip(channel_stats, tables, strict=True)
    air_C = np.array([apply(np.array(channel["min"]), table) for channel, table in pairs], np.float32)
    return Prepared(slabs, tables, air_C)
