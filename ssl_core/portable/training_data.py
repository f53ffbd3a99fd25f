"""What a model learned from, as its bundle records it, and what a scan to predict lies outside of.

Every limit here is our choice: a scan that is a little off is noted, one that is far off is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import RefusedInput
from .inference.slabs import Range

SAME = 1e-3
"""Relative difference of two spacings that is rounding of a header."""
COARSE, FINE = 4.0, 10.0
"""Voxels so many times larger, or smaller, than the largest or smallest of training are refused."""
FIELD_NOTED, FIELD_REFUSED = 1.5, 10.0
"""Factor between a field of view and those of training."""
SPREAD_NOTED, SPREAD_REFUSED = 4.0, 10.0
"""Factor between the range of foreground intensities and those of training, where the policy has fixed constants."""
AIR_HU = (-3100.0, -900.0)
"""Lowest value of a CT with air in it, as for ingest."""
MOST_VOXELS = 1 << 31
"""Of a resampled volume, all channels together."""

Triple = tuple[float, float, float]
OVERRIDE = "`--force` (Python: force=True) predicts all the same"


@dataclass(frozen=True)
class TrainingData:
    """The volumes that a model learned from.

    Attributes:
        volumes: How many.
        modalities: Their modalities, sorted; "" where none is known.
        spacing_mm: Smallest and largest voxel size along D, H, W that the network was trained at.
        source_mm: The same of the scans before ingest resampled them; `spacing_mm` where it did not.
        field_mm: Smallest and largest field of view along D, H, W.
        intensities: For each channel and each of the keys of `STATS_ORDER` the lowest and the highest value.
    """

    volumes: int
    modalities: tuple[str, ...]
    spacing_mm: tuple[Triple, Triple]
    source_mm: tuple[Triple, Triple]
    field_mm: tuple[Triple, Triple]
    intensities: tuple[Mapping[str, tuple[float, float]], ...]

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> "TrainingData":
        """Read what `dump` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            volumes=int(data["volumes"]),
            modalities=tuple(str(name) for name in data["modalities"]),
            spacing_mm=_two_triples(data["spacing_mm"]),
            source_mm=_two_triples(data["source_mm"]),
            field_mm=_two_triples(data["field_mm"]),
            intensities=tuple(
                {str(key): (float(low), float(high)) for key, (low, high) in channel.items()}
                for channel in data["intensities"]
            ),
        )

    def dump(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "volumes": self.volumes,
            "modalities": list(self.modalities),
            "spacing_mm": [list(triple) for triple in self.spacing_mm],
            "source_mm": [list(triple) for triple in self.source_mm],
            "field_mm": [list(triple) for triple in self.field_mm],
            "intensities": [{key: list(pair) for key, pair in channel.items()} for channel in self.intensities],
        }

    def nearest_spacing(self, spacing_mm: Triple) -> Triple | None:
        """The spacing of training nearest to this one, axis by axis; None where it is among them already."""
        nearest = [
            s if low * (1 - SAME) <= s <= high * (1 + SAME) else min(max(s, low), high)
            for s, low, high in zip(spacing_mm, *self.spacing_mm, strict=True)
        ]
        target = (nearest[0], nearest[1], nearest[2])
        return None if target == spacing_mm else target

    def check_geometry(self, shape_DHW: Sequence[int], spacing_mm: Triple) -> tuple[list[str], list[str]]:
        """What of a scan's grid lies outside: what is far off, and what is worth a note."""
        refused, noted = [], []
        smallest = [min(pair) for pair in zip(self.spacing_mm[0], self.source_mm[0], strict=True)]
        largest = [max(pair) for pair in zip(self.spacing_mm[1], self.source_mm[1], strict=True)]
        text = f"{_mm(spacing_mm)} mm voxels (D, H, W), where it learned from {_range((smallest, largest))} mm"
        if any(s >= COARSE * high * (1 - SAME) for s, high in zip(spacing_mm, largest, strict=True)):
            refused.append(f"{text}: at least {COARSE:g} times as large")
        elif any(s <= low / FINE * (1 + SAME) for s, low in zip(spacing_mm, smallest, strict=True)):
            refused.append(f"{text}: at least {FINE:g} times as small")
        elif (target := self.nearest_spacing(spacing_mm)) is not None and self.spacing_mm == self.source_mm:
            noted.append(f"{text}: resampled to {_mm(target)} mm, and the mask back onto the grid of the scan")
        field = tuple(n * s for n, s in zip(shape_DHW, spacing_mm, strict=True))
        factor = max(max(low / f, f / high) for f, low, high in zip(field, *self.field_mm, strict=True))
        if factor > FIELD_NOTED:
            line = f"a field of view of {_mm(field)} mm (D, H, W), where it learned from {_range(self.field_mm)} mm"
            (refused if factor >= FIELD_REFUSED else noted).append(line)
        return refused, noted

    def check_intensities(
        self, values: Sequence[Range], stats: Sequence[Mapping[str, float]], modality: str, absolute: bool
    ) -> tuple[list[str], list[str]]:
        """What of a scan's intensities lies outside: what is far off, and what is worth a note.

        Args:
            values: Lowest and highest value of each of its channels.
            stats: Foreground statistics of each of its channels.
            modality: Its modality; "" where nothing says it.
            absolute: Whether the intensity policy has constants of its own, so that units count.
        """
        refused, noted = [], []
        modalities = [name for name in self.modalities if name]
        kind = modality or ("CT" if _like_ct(values) else "")
        learned = f"where it learned from {', '.join(modalities) or 'volumes that do not say their modality'}"
        ct_before = "CT" in modalities or any(channel["min"][0] < AIR_HU[1] / 2 for channel in self.intensities)
        if kind == "CT" and not ct_before:
            refused.append(f"a CT{'' if modality else ' by its values'}, {learned}")
        elif modality and modalities and modality not in modalities and "" not in self.modalities:
            refused.append(f"modality {modality}, {learned}")
        for c, (channel, table) in enumerate(zip(stats, self.intensities, strict=True)):
            where = f" in channel {c}" if len(stats) > 1 else ""
            low, high = table["p0_5"][0], table["p99_5"][1]
            span = channel["p99_5"] - channel["p0_5"]
            text = (
                f"foreground intensities from {channel['p0_5']:.4g} to {channel['p99_5']:.4g}{where},"
                f" where it learned from {low:.4g} to {high:.4g}"
            )
            if modalities in (["CT"], []) and table["p0_5"][1] < -100 and values[c].low >= 0:
                refused.append(f"no value below 0{where}, {learned}, which has air and fat below")
            elif absolute and high > low:
                outside = channel["p99_5"] <= low or channel["p0_5"] >= high
                factor = max((high - low) / max(span, 1e-30), span / (high - low))
                if outside or factor >= SPREAD_REFUSED:
                    refused.append(text)
                elif factor > SPREAD_NOTED or channel["p0_5"] < low - (high - low) or channel["p99_5"] > 2 * high - low:
                    noted.append(text)
            elif not absolute and low >= 0 and channel["p0_5"] < -0.1 * span and kind != "CT":
                noted.append(text)
        return refused, noted


def refuse(name: str, reasons: Sequence[str]) -> RefusedInput:
    """The error for a scan that is far from what the model learned from."""
    return RefusedInput(
        name,
        expected="a scan like those that the model learned from",
        found="; ".join(reasons),
        remedy=f"check the header and the model; {OVERRIDE}",
    )


def _like_ct(values: Sequence[Range]) -> bool:
    """Air at -1000 HU, and bone; fractions count too, since a CT that was resampled before has them."""
    low, high = min(channel.low for channel in values), max(channel.high for channel in values)
    return AIR_HU[0] <= low <= AIR_HU[1] and 100 <= high <= 32767


def _two_triples(data: Any) -> tuple[Triple, Triple]:
    (a, b, c), (x, y, z) = data
    pair = ((float(a), float(b), float(c)), (float(x), float(y), float(z)))
    if not all(math.isfinite(value) and value > 0 for triple in pair for value in triple):
        raise ValueError(f"lengths above 0, not {data}")
    return pair


def _mm(triple: Sequence[float]) -> str:
    return "x".join(f"{value:.4g}" for value in triple)


def _range(pair: tuple[Sequence[float], Sequence[float]]) -> str:
    low, high = map(_mm, pair)
    return low if low == high else f"{low} to {high}"
