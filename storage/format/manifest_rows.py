"""A volume as a row of the manifest: the columns, and both directions."""

from dataclasses import asdict
from typing import Any

import pyarrow as pa

from storage.format.records import DerivedRecord, LabelRecord, VolumeRecord, stats_from_items, stats_to_items

_I3, _F = pa.list_(pa.int32()), pa.float64()
_LABEL = pa.struct(
    [
        ("name", pa.string()),
        ("values", pa.list_(pa.int64())),
        ("voxels", pa.list_(pa.int64())),
        ("boxes", pa.list_(pa.list_(pa.int32()))),
        ("points", pa.list_(pa.list_(pa.int32()))),
        ("dtype", pa.string()),
    ]
)
_DERIVED = pa.struct(
    [
        ("name", pa.string()),
        ("made", pa.string()),
        ("regions", pa.int64()),
        ("content_sha256", pa.string()),
        ("dtype", pa.string()),
    ]
)
_TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(("volume_id", "subject", "study", "split", "modality", "orientation", "dtype"), pa.string()),
    **dict.fromkeys(("source", "source_sha256", "content_sha256", "reader", "policy", "codecs"), pa.string()),
    **dict.fromkeys(("shape_DHW", "foreground_lo", "foreground_hi", "chunk_DHW", "shard_DHW"), _I3),
    **dict.fromkeys(("spacing_mm", "affine"), pa.list_(_F)),
    **dict.fromkeys(("scale", "offset"), _F),
    "channels": pa.int32(),
    "stats": pa.list_(pa.struct([("name", pa.string()), ("value", _F)])),
    "labels": pa.list_(_LABEL),
    "notes": pa.list_(pa.string()),
    "derived": pa.list_(_DERIVED),
}
_FIELDS = tuple(VolumeRecord.__dataclass_fields__)
SCHEMA = pa.schema([(name, _TYPES[name]) for name in _FIELDS])
"""Columns of the parquet file."""


def to_row(record: VolumeRecord) -> dict[str, Any]:
    """The row of a volume; fingerprints are made of rows."""
    row = {name: getattr(record, name) for name in _FIELDS}
    row["stats"] = stats_to_items(record.stats)
    row["labels"] = [
        {
            "name": label.name,
            "values": label.values,
            "voxels": label.voxels,
            "boxes": [[*lo, *hi] for lo, hi in label.boxes],
            "points": [[x for point in points for x in point] for points in label.points],
            "dtype": label.dtype,
        }
        for label in record.labels
    ]
    if record.derived:
        row["derived"] = [asdict(derived) for derived in record.derived]
    else:
        del row["derived"]  # so that a data set without any has the fingerprint it had before there could be any
    return row


def from_row(row: dict[str, Any]) -> VolumeRecord:
    """The volume of a row, which is used up.

    Raises:
        CorruptChunk: its statistics are not those of its channels.
    """
    row["stats"] = stats_from_items(row["stats"], row["channels"], f"manifest, volume {row['volume_id']}")
    row["labels"] = tuple(
        LabelRecord(
            name=label["name"],
            values=tuple(label["values"]),
            voxels=tuple(label["voxels"]),
            boxes=tuple((_triple(b[:3]), _triple(b[3:])) for b in label["boxes"]),
            points=tuple(tuple(_triple(p[i : i + 3]) for i in range(0, len(p), 3)) for p in label["points"]),
            dtype=label["dtype"],
        )
        for label in row["labels"]
    )
    row["derived"] = tuple(DerivedRecord(**derived) for derived in row.get("derived") or ())
    for name in (
        "shape_DHW",
        "foreground_lo",
        "foreground_hi",
        "chunk_DHW",
        "shard_DHW",
        "spacing_mm",
        "affine",
        "notes",
    ):
        row[name] = tuple(row[name])
    return VolumeRecord(**row)


def _triple(values: list[Any]) -> Any:
    return tuple(values)
