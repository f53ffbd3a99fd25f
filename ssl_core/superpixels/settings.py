"""How super-pixels are made: the settings that name the map in a store."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ssl_core.config import Config, digest

VERSION = 1
"""Raised whenever the same settings would give other regions than before."""
NARROWEST = 1e-4
"""Of a window, to its larger end: nearer values are one to float32, and then every voxel is."""


class Superpixels(Config):
    """Felzenszwalb's graph method on the first channel, windowed to [0, 1]. Lengths are voxels as stored."""

    mode: Literal["slices", "volume"] = Field(
        default="slices",
        description="slices: each axial slice by itself, as in LRC; volume: a graph of 26 neighbours, ours, which ends "
        "every 4 million voxels along D",
    )
    scale: float = Field(
        default=100.0, gt=0, description="Larger gives larger regions; our choice, lightly's DetCon example"
    )
    sigma: float = Field(default=0.5, ge=0, description="Gaussian smoothing before, voxels; the same example")
    min_size: int = Field(default=20, ge=1, description="Smaller regions are merged, voxels; the same example")
    window: tuple[float, float] | None = Field(
        default=None,
        description="Values (HU for CT) that become 0 and 1; each volume's foreground percentiles 0.5 and 99.5 when"
        " unset; our choice",
    )
    background: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="A region whose mean in the window is at most this is air and never drawn; our choice",
    )

    @model_validator(mode="after")
    def _window_ascends(self) -> Self:
        if self.window is None:
            return self
        low, high = self.window
        if not high - low > NARROWEST * max(abs(low), abs(high)):
            raise ValueError(f"a window whose first value is the lower one, by more than rounding, not {self.window}")
        return self

    @property
    def name(self) -> str:
        """Of the map in a store; equal settings have equal names."""
        return f"superpixels-{VERSION}-{digest(self)[:8]}"

    def overrides(self) -> tuple[str, ...]:
        """The settings that are not the defaults, as `key=value`."""
        changed = self.model_dump(mode="json", exclude_defaults=True)
        return tuple(f"{key}={str(value).replace(' ', '')}" for key, value in changed.items())
