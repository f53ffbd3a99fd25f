"""What a stored volume is made of: the image with its place and labels, whose it is, and where it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from storage.format.records import Triple

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """An image, where it lies, what its numbers mean, and its labels.

    Args:
        array_CDHW: Stored values; D inferior to superior, H posterior to anterior, W left to right.
        spacing_mm: Along D, H, W.
        affine: 4x4 (or 16 numbers, row-major), from (w, h, d, 1) voxel centres to RAS+ mm.
        labels: Name to (D, H, W) integer array of the image's shape.
        modality: CT, MR, ...; empty where nobody said.
        scale, offset: value = stored * scale + offset.
        stats: Foreground statistics of the values of each channel; measured where not given.
        foreground: Box of all channels' foreground as (first, one past last); measured where not given.
    """

    array_CDHW: Array
    spacing_mm: Sequence[float]
    affine: Any
    labels: Mapping[str, Array] = field(default_factory=dict)
    modality: str = ""
    scale: float = 1.0
    offset: float = 0.0
    stats: Sequence[Mapping[str, float]] | None = None
    foreground: tuple[Triple, Triple] | None = None


@dataclass(frozen=True, slots=True)
class Membership:
    """Whose volume it is and in which split; the manifest alone says so."""

    subject: str = ""
    study: str = ""
    split: str = ""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a volume came from and what made it so.

    Args:
        source: Path of the source below the ingested folder, or its pseudonym.
        source_sha256: Digest of the source's files.
        orientation: Axis codes of the source, for example "LAS".
        reader: Name and version of the reader.
        policy: Version of the ingest policy.
        notes: What was corrected or chosen on the way.
    """

    source: str = ""
    source_sha256: str = ""
    orientation: str = "RAS"
    reader: str = ""
    policy: str = ""
    notes: Sequence[str] = ()


UNASSIGNED = Membership()
UNKNOWN = Provenance()
