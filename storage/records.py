"""The facts of one volume and of its labels, as the manifest holds them."""

from dataclasses import dataclass, replace

from storage.errors import NotFound

Triple = tuple[int, int, int]
DEFAULT_CODECS = "default"


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
        content_sha256: Digest of its values, as `volumewriter.content_sha256` makes it.
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
        stats: Statistics of foreground values (after scale and offset); keys of `STATS_ORDER`.
        codecs: `DEFAULT_CODECS` where the arrays are encoded as this project does, so that readers need not ask.
        derived: Maps that were computed from the volume later on.
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
    stats: dict[str, float]
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


def without_places(record: VolumeRecord, keep: str | None = None) -> VolumeRecord:
    """The record without the boxes and points of its labels, but for those of the label `keep`.

    Readers keep thousands of records; of a hundred classes the points alone take 0.8 MB a volume.
    """
    labels = (label if label.name == keep else replace(label, boxes=(), points=()) for label in record.labels)
    return replace(record, labels=tuple(labels))
