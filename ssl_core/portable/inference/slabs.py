"""A canonical volume as slabs along D, so that a large one need not lie in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

ROWS = 16
"""Slices that are looked at together where all of a volume is gone through; our choice."""


class Source(Protocol):
    """A canonical volume of intensities that is read in parts."""

    @property
    def shape_CDHW(self) -> tuple[int, int, int, int]:
        """Channels and voxels."""
        ...

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Values after scale and offset from one place along D to another, (C, stop - start, H, W)."""
        ...


@dataclass(frozen=True)
class Range:
    """Values of a channel.

    Attributes:
        low: The lowest; NaN where one of them is.
        high: The highest; NaN likewise.
    """

    low: float
    high: float

    @property
    def finite(self) -> bool:
        """Whether all values are."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


@dataclass(frozen=True)
class Slabs:
    """A volume in parts, wherever it lies.

    Attributes:
        source: An array (C, D, H, W) in memory, or what reads parts.
    """

    source: NDArray[Any] | Source

    @classmethod
    def of(cls, volume: "NDArray[Any] | Source | Slabs") -> "Slabs":
        """Any volume as slabs."""
        return volume if isinstance(volume, Slabs) else cls(volume)

    @property
    def shape_CDHW(self) -> tuple[int, int, int, int]:
        """Channels and voxels."""
        if not isinstance(self.source, np.ndarray):
            return self.source.shape_CDHW
        c, d, h, w = self.source.shape
        return c, d, h, w

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """See `Source.read`; of an array a view."""
        return self.source[:, start:stop] if isinstance(self.source, np.ndarray) else self.source.read(start, stop)

    def parts(self) -> Iterator[tuple[slice, NDArray[Any]]]:
        """All of it in order, each part with its place along D."""
        depth = self.shape_CDHW[1]
        for start in range(0, depth, ROWS):
            stop = min(start + ROWS, depth)
            yield slice(start, stop), self.read(start, stop)

    @cached_property
    def ranges(self) -> tuple[Range, ...]:
        """Lowest and highest value of each channel, in one pass."""
        bounds = [(part.min((1, 2, 3)), part.max((1, 2, 3))) for _, part in self.parts()]
        lows, highs = (np.stack(side) for side in zip(*bounds, strict=True))
        return tuple(Range(float(low), float(high)) for low, high in zip(lows.min(0), highs.max(0), strict=True))

    def whole(self) -> NDArray[Any]:
        """All of it as one array: the one in memory, else a new one, float32."""
        if isinstance(self.source, np.ndarray):
            return self.source
        values_CDHW = np.empty(self.shape_CDHW, np.float32)
        for place, part in self.parts():
            values_CDHW[:, place] = part
        return values_CDHW
