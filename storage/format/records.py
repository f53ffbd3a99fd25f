"""The facts of one volume and of its labels, as the manifest holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from storage.errors import ConfigError, CorruptChunk, NotFound
from storage.intensity_stats import STATS_ORDER

Triple = tuple[int, int, int]
ChannelStats = tuple[dict[str, float], ...]
"""Foreground statistics of each channel."""
DEFAULT_CODECS = "default"
_STATS_NAMES = tuple(sorted(STATS_ORDER))


@dataclass(frozen=True, slots=True)
class LabelRecord:
    """Facts of one label array. Background (0) is not listed.

    Args:
        name: Key below `labels/`.
        values: Label values present, ascending.
        voxels: Voxels of each value.
        boxes: Per value ((first D, H, W), (one past last D, H, W)).
        points: Per value up to 64 voxel positions (D, H, W), drawn by a seed made of the content.
        dtype: Stored dtype; empty where it has to be read from the array.
    """

    name: str
    values: tuple[int, ...] = ()
    voxels: tuple[int, ...] = ()
    boxes: tuple[tuple[Triple, Triple], ...] = ()
    points: tuple[tuple[Triple, ...], ...] = ()
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class DerivedRecord:
    """Facts of one map that was computed from a volume after its ingest, such as its super-pixels.

    It lies beside the labels, but is none: the volume's content digest does not cover it.

    Args:
        name: Key below `labels/`; ends in a digest of what made it, so that another setting is another map.
        made: What made it, as text.
        regions: Different values but 0.
        content_sha256: Digest of its values, as `volume_writer.content_sha256` makes it.
        dtype: Stored dtype.
    """

    name: str
    made: str
    regions: int
    content_sha256: str
    dtype: str = "int32"


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """Facts of one volume; see DESIGN section 3.

    Args:
        spacing_mm: Along D, H, W.
        affine: Row-major 4x4; maps (w, h, d, 1) voxel centres to RAS+ mm.
        orientation: Axis codes found in the source, for example "LAS".
        dtype: Stored dtype; value = stored * scale + offset.
        foreground_lo, foreground_hi: Box of the foreground, D, H, W, one past the last.
        stats: Of each channel, statistics of its own foreground values (after scale and offset); keys of `STATS_ORDER`.
        codecs: `DEFAULT_CODECS` where the arrays are encoded as this project does, so that readers need not ask.
        derived: Maps that were computed from the volume later on.

    Raises:
        ConfigError: not as many mappings in `stats` as channels.
    """

    volume_id: str
    subject: str
    study: str
    split: str
    modality: str
    shape_DHW: Triple
    channels: int
    spacing_mm: tuple[float, float, float]
    affine: tuple[float, ...]
    orientation: str
    dtype: str
    scale: float
    offset: float
    foreground_lo: Triple
    foreground_hi: Triple
    stats: ChannelStats
    labels: tuple[LabelRecord, ...]
    source: str
    source_sha256: str
    content_sha256: str
    reader: str
    policy: str
    notes: tuple[str, ...]
    chunk_DHW: Triple
    shard_DHW: Triple
    codecs: str = ""
    derived: tuple[DerivedRecord, ...] = ()

    def __post_init__(self) -> None:
        """A channel without statistics would be normalised by those of another."""
        if not isinstance(self.stats, tuple) or len(self.stats) != self.channels:
            raise ConfigError(
                f"statistics of volume {self.volume_id}",
                expected=f"a tuple of {self.channels}, one of each channel",
                found=f"{type(self.stats).__name__} of {len(self.stats)}",
            )

    def label(self, name: str) -> LabelRecord:
        """The facts of one label.

        Raises:
            NotFound: the volume has no such label; lists those it has.
        """
        for record in self.labels:
            if record.name == name:
                return record
        raise NotFound(
            f"label {name!r} of volume {self.volume_id}",
            expected="a label of that name",
            found=", ".join(self.map_names()) or "no labels",
        )

    def map_names(self) -> tuple[str, ...]:
        """Labels and derived maps, sorted."""
        return tuple(sorted([*(x.name for x in self.labels), *(x.name for x in self.derived)]))

    def map_facts(self, name: str) -> tuple[str, str]:
        """Stored dtype of a label or derived map, and the digest that covers its values.

        Raises:
            NotFound: the volume has no such map; lists those it has.
        """
        for derived in self.derived:
            if derived.name == name:
                return derived.dtype, derived.content_sha256
        return self.label(name).dtype, self.content_sha256


def stats_to_items(stats: ChannelStats) -> list[dict[str, Any]]:
    """The manifest's form: named values, channel after channel, so that one channel is stored as ever."""
    return [{"name": name, "value": value} for channel in stats for name, value in sorted(channel.items())]


def stats_from_items(items: Sequence[Mapping[str, Any]], channels: int, thing: str) -> ChannelStats:
    """Statistics of each channel from the manifest's form.

    Args:
        thing: What they are of, in errors.

    Raises:
        CorruptChunk: not those of every channel, as in manifests of before there were any but of the first.
    """
    if [item["name"] for item in items] != list(_STATS_NAMES) * channels:
        raise CorruptChunk(
            thing,
            expected=f"foreground statistics of each of its {channels} channels",
            found=f"{len(items)} values where {len(_STATS_NAMES) * channels} would be; an earlier version of this "
            "project kept those of the first channel only",
            remedy="ingest the files again into an empty store",
        )
    size = len(_STATS_NAMES)
    values = [item["value"] for item in items]
    # Keys are the same few strings for all records, of which readers keep thousands.
    return tuple(dict(zip(_STATS_NAMES, values[c * size :][:size], strict=True)) for c in range(channels))


def without_places(record: VolumeRecord, keep: str | None = None) -> VolumeRecord:
    """The record without the boxes and points of its labels, but for those of the label `keep`.

    Readers keep thousands of records; of a hundred classes the points alone take 0.8 MB a volume.
    """
    labels = (label if label.name == keep else replace(label, boxes=(), points=()) for label in record.labels)
    return replace(record, labels=tuple(labels))
