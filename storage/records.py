"""The facts of one volume and of its labels, as the manifest holds them."""

from dataclasses import dataclass

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
            found=", ".join(record.name for record in self.labels) or "no labels",
        )
