"""Writing one volume: OME-Zarr 0.5 metadata, sharded arrays, and the record of its facts."""

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import ConfigError, NotFound, RefusedInput
from storage.format.codecs import COMPRESSOR, encode_default
from storage.format.layout import Layout, choose_layout
from storage.format.records import DEFAULT_CODECS, DerivedRecord, LabelRecord, Triple, VolumeRecord
from storage.format.shard_index import build_index, curve_order
from storage.format.volume import UNASSIGNED, UNKNOWN, Membership, Provenance, Volume
from storage.format.zarr_metadata import DTYPES, array_document, group_document, multiscales
from storage.intensity_stats import channel_foreground, foreground_box
from storage.objects import ByteStore
from storage.objects.protocol import check_key

Array = npt.NDArray[Any]
POINTS = 64
LABEL_DTYPES = ("uint8", "int32", "uint16", "int16")


def write_volume(
    store: ByteStore,
    volume_id: str,
    volume: Volume,
    *,
    membership: Membership = UNASSIGNED,
    provenance: Provenance = UNKNOWN,
    layout: Layout | None = None,
    content: str | None = None,
) -> VolumeRecord:
    """Write `volumes/<volume_id>/` and return its record; it exists for readers once a manifest names it.

    Objects are written data first and the group's metadata last. Writing the same volume again writes the same bytes.

    Args:
        layout: Chunks and shards; chosen for 96^3 crops where not given.
        content: `content_sha256` of image and labels, where the caller has it.

    Raises:
        ConfigError: an id with a slash, or statistics of another number of channels.
        RefusedInput: shape, dtype, affine or a label is not what the format holds; nothing is written then.
    """
    thing = f"volume {volume_id}"
    array_CDHW, scale, offset = volume.array_CDHW, float(volume.scale), float(volume.offset)
    check_key(volume_id)
    if "/" in volume_id:
        raise ConfigError(thing, expected="an id without slashes", found=volume_id)
    if array_CDHW.ndim != 4 or 0 in array_CDHW.shape:
        raise RefusedInput(thing, expected="an array (C, D, H, W) with voxels", found=f"shape {array_CDHW.shape}")
    if array_CDHW.dtype.name not in DTYPES:
        raise RefusedInput(thing, expected=f"a type among {', '.join(DTYPES)}", found=array_CDHW.dtype.name)
    affine16 = tuple(float(x) for x in np.asarray(volume.affine, dtype=np.float64).reshape(-1))
    spacing = tuple(float(s) for s in volume.spacing_mm)
    if len(affine16) != 16 or not np.isfinite(affine16).all():
        raise RefusedInput(thing, expected="a finite 4x4 affine", found=str(affine16))
    if len(spacing) != 3 or not all(0 < s < math.inf for s in spacing):
        raise RefusedInput(thing, expected="three positive spacings in mm", found=str(spacing))
    labels = dict(volume.labels)
    channels, *extent = array_CDHW.shape
    shape: Triple = (extent[0], extent[1], extent[2])
    for name, label in labels.items():
        _check_label(f"label {name!r} of {thing}", name, label, shape)
    layout = layout or choose_layout(shape, itemsize=array_CDHW.dtype.itemsize, channels=channels)

    stats, foreground = volume.stats, volume.foreground
    if stats is None or foreground is None:
        values = array_CDHW.astype(np.float32) * np.float32(scale) + np.float32(offset)
        mask, measured = channel_foreground(values)
        stats = measured if stats is None else stats
        foreground = foreground_box(mask) if foreground is None else foreground
    if len(stats) != channels:
        raise ConfigError(f"statistics of {thing}", expected=f"{channels}, one of each channel", found=str(len(stats)))
    content = content_sha256(array_CDHW, labels) if content is None else content
    root = f"volumes/{volume_id}"
    chunk, shard = (1, *layout.chunk_DHW), (channels, *layout.shard_DHW)
    kind = layout.compressor
    _write_array(store, f"{root}/0", array_CDHW, shard, chunk, "czyx", kind)
    for name, label in labels.items():
        _write_label(store, root, name, label, layout, spacing, affine16)
    if labels:
        listing = {"version": "0.5", "labels": sorted(labels)}
        store.put(f"{root}/labels/zarr.json", group_document({"ome": listing}))
    facts = {
        "affine_ras_mm": affine16,
        "spacing_mm": spacing,
        "scale": scale,
        "offset": offset,
        "modality": volume.modality,
        "content_sha256": content,
        "source_sha256": provenance.source_sha256,
        "policy": provenance.policy,
    }
    image = {"version": "0.5", "multiscales": multiscales(volume_id, "czyx", spacing, affine16)}
    store.put(f"{root}/zarr.json", group_document({"ome": image, "tomoscale": facts}))
    return VolumeRecord(
        volume_id=volume_id,
        subject=membership.subject,
        study=membership.study,
        split=membership.split,
        modality=volume.modality,
        shape_DHW=shape,
        channels=channels,
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        affine=affine16,
        orientation=provenance.orientation,
        dtype=array_CDHW.dtype.name,
        scale=scale,
        offset=offset,
        foreground_lo=foreground[0],
        foreground_hi=foreground[1],
        stats=tuple({str(k): float(v) for k, v in channel.items()} for channel in stats),
        labels=tuple(label_record(name, labels[name]) for name in sorted(labels)),
        source=provenance.source,
        source_sha256=provenance.source_sha256,
        content_sha256=content,
        reader=provenance.reader,
        policy=provenance.policy,
        notes=tuple(provenance.notes),
        chunk_DHW=layout.chunk_DHW,
        shard_DHW=layout.shard_DHW,
        codecs=DEFAULT_CODECS,
    )


def write_derived(store: ByteStore, record: VolumeRecord, name: str, map_DHW: Array, recipe: str) -> DerivedRecord:
    """Write a map beside the labels of a published volume and return its facts; the image is not touched.

    It exists for readers once a manifest names it. Writing the same map again writes the same bytes.

    Args:
        record: The volume.
        name: Of the map; not that of a label.
        map_DHW: int32, of the image's shape.
        recipe: What made it, as text.

    Raises:
        ConfigError: the name is a label's, or none that a key may have.
        RefusedInput: type or shape is not what the format holds; nothing is written then.
    """
    thing = f"map {name!r} of volume {record.volume_id}"
    if name in (label.name for label in record.labels):
        raise ConfigError(thing, expected="a name that no label has", found="a label of that name")
    _check_label(thing, name, map_DHW, record.shape_DHW)
    if map_DHW.dtype != np.int32:
        raise RefusedInput(thing, expected="int32", found=map_DHW.dtype.name)
    root = f"volumes/{record.volume_id}"
    layout = Layout(record.chunk_DHW, record.shard_DHW)
    _write_label(store, root, name, map_DHW, layout, record.spacing_mm, record.affine)
    _list_labels(store, f"{root}/labels/zarr.json", {*record.map_names(), name})
    return DerivedRecord(name, recipe, region_count(map_DHW), content_sha256(map_DHW[None]))


def _list_labels(store: ByteStore, key: str, names: set[str]) -> None:
    """Add names to the listing beside the labels; what another map's job lists at the same moment stays."""
    written = False
    while not written:
        document_before: bytes | None = None
        listed = set(names)
        with suppress(NotFound):
            document_before = store.get(key)
        with suppress(ValueError, KeyError, TypeError):
            listed |= set(json.loads(document_before or b"")["attributes"]["ome"]["labels"])
        document = group_document({"ome": {"version": "0.5", "labels": sorted(listed)}})
        written = document == document_before or store.swap(key, document, document_before)


def region_count(map_DHW: Array) -> int:
    """Different values but 0."""
    values = np.unique(map_DHW)
    return int(len(values) - (values == 0).any())


def content_sha256(array_CDHW: Array, labels: Mapping[str, Array] | None = None) -> str:
    """SHA-256 of image and labels: type, shape and little-endian values in C order, labels in order of name."""
    return content_digests(array_CDHW, labels)[1]


def content_digests(array_CDHW: Array, labels: Mapping[str, Array] | None = None) -> tuple[str, str]:
    """`content_sha256` of the image alone, and of it with its labels; the image is hashed once."""
    digest = hashlib.sha256()
    _hash(digest, "", array_CDHW)
    image = digest.hexdigest()
    for name, array in sorted((labels or {}).items()):
        _hash(digest, name, array)
    return image, digest.hexdigest()


def _hash(digest: Any, name: str, array: Array) -> None:
    digest.update(f"{name}|{array.dtype.name}|{array.shape}|".encode())
    for plane in array:  # a plane at a time bounds the copy
        digest.update(np.ascontiguousarray(plane, dtype=array.dtype.newbyteorder("<")).data)


def label_record(name: str, label_DHW: Array) -> LabelRecord:
    """Values, counts, boxes and up to 64 sample positions of each value but 0; the same for equal content."""
    flat = np.flatnonzero(label_DHW != 0)  # places of true are listed several times as fast as those of numbers
    voxels = label_DHW.reshape(-1)[flat] if label_DHW.flags.c_contiguous else label_DHW.flatten()[flat]
    order = np.argsort(voxels, kind="stable")
    flat, voxels = flat[order], voxels[order]
    starts = np.flatnonzero(np.append(True, voxels[1:] != voxels[:-1])[: voxels.size])
    values, counts = voxels[starts], np.diff(starts, append=voxels.size)
    boxes: list[tuple[Triple, Triple]] = []
    if starts.size:
        columns = np.unravel_index(flat, label_DHW.shape)
        lo = np.stack([np.minimum.reduceat(column, starts) for column in columns], axis=1)
        hi = np.stack([np.maximum.reduceat(column, starts) + 1 for column in columns], axis=1)
        boxes = [(_triple(a), _triple(b)) for a, b in zip(lo, hi, strict=True)]
    points = []
    for value, start, count in zip(values, starts, counts, strict=True):
        places = flat[start : start + count]
        if count > POINTS:
            generator = np.random.Generator(np.random.Philox(key=[int(value) & (2**64 - 1), int(count)]))
            places = places[np.sort(generator.choice(int(count), POINTS, replace=False))]
        points.append(tuple(_triple(p) for p in np.stack(np.unravel_index(places, label_DHW.shape), axis=1).tolist()))
    return LabelRecord(
        name=name,
        values=tuple(int(v) for v in values),
        voxels=tuple(int(c) for c in counts),
        boxes=tuple(boxes),
        points=tuple(points),
        dtype=label_DHW.dtype.name,
    )


def encode_shard(block: Array, chunk: tuple[int, ...], inside: tuple[int, ...], compressor: str = COMPRESSOR) -> bytes:
    """One shard: chunks along a space-filling curve, then the index.

    Args:
        block: The shard's voxels, padded to the whole shard.
        chunk: Extent of a chunk.
        inside: Extent of the part of the block that lies in the array; chunks wholly beyond it are not stored.
    """
    grid = tuple(b // c for b, c in zip(block.shape, chunk, strict=True))
    parts: list[bytes] = []
    entries: dict[int, tuple[int, int]] = {}
    at = 0
    order = np.asarray(curve_order(grid))
    origins = (np.stack(np.unravel_index(order, grid), axis=1) * chunk).tolist()
    for number, origin in zip(order.tolist(), origins, strict=True):
        if any(o >= n for o, n in zip(origin, inside, strict=True)):
            continue
        piece = block[tuple(slice(o, o + c) for o, c in zip(origin, chunk, strict=True))]
        parts.append(encode_default(piece, compressor))
        entries[number] = (at, len(parts[-1]))
        at += len(parts[-1])
    return b"".join(parts) + build_index(entries, math.prod(grid))


def _write_label(
    store: ByteStore,
    root: str,
    name: str,
    label: Array,
    layout: Layout,
    spacing: tuple[float, ...],
    affine: tuple[float, ...],
) -> None:
    kind = layout.compressor
    _write_array(store, f"{root}/labels/{name}/0", label, layout.shard_DHW, layout.chunk_DHW, "zyx", kind)
    entry = {
        "version": "0.5",
        "multiscales": multiscales(name, "zyx", spacing, affine),
        "image-label": {"source": {"image": "../../"}},
    }
    store.put(f"{root}/labels/{name}/zarr.json", group_document({"ome": entry}))


def _write_array(
    store: ByteStore, root: str, array: Array, shard: tuple[int, ...], chunk: tuple[int, ...], axes: str, kind: str
) -> None:
    for at in product(*(range(math.ceil(n / s)) for n, s in zip(array.shape, shard, strict=True))):
        part = array[tuple(slice(a * s, (a + 1) * s) for a, s in zip(at, shard, strict=True))]
        block = part
        if part.shape != shard:
            # Repeating the border compresses better than a constant and is never read.
            block = _padded(part, shard)
        store.put(f"{root}/c/" + "/".join(map(str, at)), encode_shard(block, chunk, part.shape, kind))
    store.put(f"{root}/zarr.json", array_document(array.shape, shard, chunk, array.dtype, axes, kind))


def _padded(part: Array, shape: tuple[int, ...]) -> Array:
    """The array with its last voxels along each axis repeated up to `shape`."""
    block = np.empty(shape, part.dtype)
    block[tuple(slice(n) for n in part.shape)] = part
    for axis, n in enumerate(part.shape):
        if n < shape[axis]:  # of what is filled by now: earlier axes wholly, later ones as far as the part goes
            lead, rest = tuple(slice(s) for s in shape[:axis]), tuple(slice(m) for m in part.shape[axis + 1 :])
            block[(*lead, slice(n, None), *rest)] = block[(*lead, slice(n - 1, n), *rest)]
    return block


def _check_label(thing: str, name: str, label: Array, shape: Triple) -> None:
    check_key(name)
    if "/" in name or name == "zarr.json":
        raise ConfigError(thing, expected="a label name without slashes", found=name)
    if label.dtype.name not in LABEL_DTYPES:
        raise RefusedInput(thing, expected=f"a type among {', '.join(LABEL_DTYPES)}", found=label.dtype.name)
    if label.shape != shape:
        raise RefusedInput(thing, expected=f"the image's shape {shape}", found=str(label.shape))


def _triple(values: Any) -> Triple:
    return int(values[0]), int(values[1]), int(values[2])
