"""One volume from its files to what is stored: canonical, resampled, measured, quantised."""

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage import geometry
from storage.errors import RefusedInput
from storage.format.records import ChannelStats
from storage.ingest.items import IngestItem
from storage.ingest.label_like import check_no_label_map
from storage.ingest.policy import IngestPolicy
from storage.ingest.readers.raw import RawVolume
from storage.ingest.readers.read import read_item, read_label
from storage.ingest.readers.registry import format_of
from storage.ingest.signature import SMALLEST, signature, signature_note
from storage.intensity_stats import channel_foreground, foreground_box

Array = npt.NDArray[Any]
Triple = tuple[int, int, int]

ROBUST_RANGES = 12.0
"""Scaled int16 spans at most so many robust ranges (p99.5 - p0.5), which keeps half a step below 1e-4 of one."""

LEAST_HU_RANGE = 100.0
"""CT whose robust range (p99.5 - p0.5) is below it, such as one scaled to 0 to 1, is not rounded to whole numbers."""

_AT_ONCE = 1 << 16
"""Values that are worked on by one call, which costs microseconds whatever their number."""

LIBRARY_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What the format libraries raise on headers that nobody foresaw. Errors of their own kinds are met by the readers."""


@dataclass(slots=True)
class Prepared:
    """A volume ready to be written; the fields are those of `VolumeRecord`."""

    stored_CDHW: Array
    affine: geometry.Affine
    spacing_mm: tuple[float, float, float]
    orientation: str
    modality: str
    scale: float
    offset: float
    stats: ChannelStats
    foreground: tuple[Triple, Triple]
    label_DHW: Array | None
    reader: str
    notes: list[str]


def prepare(item: IngestItem, policy: IngestPolicy, modality: str = "") -> Prepared:
    """Read, canonicalise, resample, measure and quantise one volume and its label.

    Args:
        modality: What the data set as a whole says, for formats that say nothing.

    Raises:
        RefusedInput: names the file and the reason.
    """
    try:
        raw = read_item(item, policy.read)
        label = read_label(item, policy.read, raw)
    except LIBRARY_FAULTS as error:
        raise unreadable(item, error) from error
    notes = raw.notes
    orientation = geometry.orientation(raw.affine)
    image, affine = geometry.canonicalise(raw.array_CDHW, raw.affine)
    check_no_label_map(item.source, image, policy, notes)
    label_DHW = None if label is None else _matched_label(item, label, raw, image, affine, policy, notes)
    whole = image.dtype.kind in "iu"
    kind = policy.modality or raw.modality or modality or _looks_like_ct(image, notes)
    native = geometry.spacing_dhw(affine)
    target = policy.target_spacing(native)
    check_resampled(item.source, image.shape, native, target, policy)
    resized, new_affine = geometry.resample(image, affine, target, policy.image_interpolation)
    if resized is not image:
        if resized.min() == resized.max():
            raise RefusedInput(
                item.source,
                expected=f"an image with contrast at {_mm(target)} mm",
                found=f"{resized[0].size:,} voxels, all {float(resized.min()):g}",
                remedy="choose a smaller spacing_mm",
            )
        notes.append(f"resampled from {_mm(native)} to {_mm(target)} mm (D, H, W), {policy.image_interpolation}")
        if label_DHW is not None:
            before = label_DHW
            label_DHW = geometry.resample(label_DHW[None], affine, target, policy.label_interpolation)[0][0]
            lost = np.setdiff1d(before[before > 0], label_DHW[label_DHW > 0]).tolist()
            if lost:
                notes.append(f"label values too small to be left after resampling: {', '.join(map(str, lost[:20]))}")
        image, affine, whole = resized, new_affine, False
    mask, stats = channel_foreground(image)
    for number, (channel, own) in enumerate(zip(image, stats, strict=True)):
        if len(stats) > 1 and own["min"] == own["max"] and (channel == own["min"]).all():
            notes.append(f"channel {number} (counted from 0) is {own['min']:g} everywhere")
    if policy.dtype == "float32":
        stored, scale, offset = image.astype(np.float32), 1.0, 0.0
    else:
        stored, scale, offset = quantise(image, stats, kind, whole, notes)
    notes.extend(f"{key}={value}" for key, value in raw.facts.items())
    if image[0].size >= SMALLEST and (shape := signature(image[0], stats[0]["min"], stats[0]["p99_5"])).any():
        notes.append(signature_note(shape))
    box = foreground_box(mask)
    spacing = geometry.spacing_dhw(affine)
    return Prepared(stored, affine, spacing, orientation, kind, scale, offset, stats, box, label_DHW, raw.reader, notes)


def unreadable(item: IngestItem, error: BaseException) -> RefusedInput:
    """The refusal of an item on which a format library failed with one of `LIBRARY_FAULTS`."""
    # a library's message may quote a header, and a DICOM header may not be quoted
    text = "" if format_of(item.kind).hides_identity else f": {' '.join(str(error).split())[:200]}"
    return RefusedInput(
        item.source,
        expected="a file that its library can read",
        found=f"{type(error).__name__}{text}",
        remedy="the header is damaged or unusual; open it in another tool and export it again",
    )


def check_resampled(
    thing: str, shape: tuple[int, ...], native: tuple[float, ...], target: tuple[float, ...], policy: IngestPolicy
) -> tuple[int, ...]:
    """The shape (D, H, W) at the target spacing.

    Args:
        shape: (C, D, H, W), of which each voxel is `native` mm large.

    Raises:
        RefusedInput: it would not fit the memory of a task.
    """
    size = tuple(max(1, round(n * was / new)) for n, was, new in zip(shape[1:], native, target, strict=True))
    if math.prod(size) * shape[0] > policy.read.max_voxels:
        raise RefusedInput(
            thing,
            expected=f"at most {policy.read.max_voxels:,} voxels at {_mm((target[0], target[1], target[2]))} mm",
            found=f"shape {(shape[0], *size)}, {math.prod(size) * shape[0]:,} voxels",
            remedy="choose a larger spacing_mm, or raise read.max_voxels where a task may use about 26 bytes a voxel",
        )
    return size


def quantise(
    values_CDHW: Array, stats: ChannelStats, modality: str, whole: bool, notes: list[str]
) -> tuple[Array, float, float]:
    """Values as int16 with value = stored * scale + offset, or as float32 where int16 would be too coarse.

    Whole numbers that span at most 65,535 are stored exactly (offset 0 where int16 holds them as they are). CT that is
    no longer whole is rounded to 1 HU where int16 holds it. Everything else is spread over the int16 range where half
    a step stays below 1e-4 of the robust range p99.5 - p0.5, that is up to 12 such ranges from the lowest to the
    highest value. Beyond, as with a hot lesion in PET, the volume is kept as float32, with a note. No value is clipped.
    Channels share one scale, which has to do for each of them.

    Args:
        stats: Foreground statistics of each channel.
    """
    low, high = float(values_CDHW.min()), float(values_CDHW.max())
    whole = whole or (high - low <= 65535 and _whole(values_CDHW))
    ct = modality == "CT" and not whole and len(values_CDHW) == 1
    if ct and stats[0]["p99_5"] - stats[0]["p0_5"] < LEAST_HU_RANGE:
        notes.append(f"CT, but from {low:g} to {high:g}: no Hounsfield units, and not rounded to whole numbers")
        ct = False
    if whole and high - low <= 65535:
        offset = 0.0 if low >= -32768 and high <= 32767 else low + 32768
        if offset == 0:
            return values_CDHW.astype(np.int16), 1.0, 0.0
        return (values_CDHW.astype(np.int64) - int(offset)).astype(np.int16), 1.0, offset
    if ct and low >= -32768 and high <= 32767:
        return np.rint(values_CDHW).astype(np.int16), 1.0, 0.0
    robust = [r for own in stats if (r := own["p99_5"] - own["p0_5"]) > 0]
    finest = min(robust, default=0.0)
    if high - low > ROBUST_RANGES * finest:
        reason = f"values from {low:g} to {high:g} are too far apart for the steps of int16"
        if len(values_CDHW) > 1:
            reason = "the scale of int16 would be too coarse for one of the channels"
        notes.append(f"kept as float32: {reason}")
        return values_CDHW.astype(np.float32), 1.0, 0.0
    scale = (high - low) / 65534
    offset = low + 32767 * scale
    stored = np.empty(values_CDHW.shape, np.int16)
    for part in _parts(values_CDHW):  # for float64 without its memory
        planes = values_CDHW[part].astype(np.float64)
        planes -= offset
        planes /= scale
        stored[part] = np.rint(planes, out=planes)
    return stored, scale, offset


def _matched_label(
    item: IngestItem,
    label: RawVolume,
    raw: RawVolume,
    image: Array,
    affine: geometry.Affine,
    policy: IngestPolicy,
    notes: list[str],
) -> Array:
    """The label in canonical axes, after checking that it lies on its image's grid.

    Args:
        raw: The image as it was read; `image` and `affine` are the same in canonical axes.
    """
    thing = f"label of {item.source}"
    array, own = label.array_CDHW, label.affine
    if policy.read.shear == "correct" and geometry.shear(own) > 1e-3:
        array, own = geometry.straighten(array, own, labels=True)
    shape = (image.shape[1], image.shape[2], image.shape[3])
    axes = label_axes(thing, array.shape[1:], own, raw.affine, (shape, affine), policy, notes)
    turned, _ = geometry.canonicalise(array, axes)
    notes.extend(f"label: {note}" for note in label.notes)
    if not turned.any():
        notes.append("label holds background only")
    matched: Array = turned[0]
    return matched


def label_axes(
    thing: str,
    shape_DHW: tuple[int, ...],
    own: geometry.Affine,
    raw: geometry.Affine,
    image: tuple[Triple, geometry.Affine],
    policy: IngestPolicy,
    notes: list[str],
) -> geometry.Affine:
    """The affine whose axes a label map is turned by: its own, or its image's where its own says nothing.

    Args:
        shape_DHW: Of the map in the axes of its file.
        own: Affine of the map.
        raw: Affine of the image, as read.
        image: Shape (D, H, W) and affine of the image in canonical axes.

    Raises:
        RefusedInput: the map does not lie on its image's grid, and the policy does not ignore that.
    """
    shape, affine = image
    turned, turned_affine = geometry.canonical_grid(shape_DHW, own)
    spacing = geometry.spacing_dhw(affine)
    apart = geometry.corner_distance(turned_affine, affine, shape) if turned == shape else math.inf
    ignored = policy.label_affine == "ignore" and apart > 0.1 * min(spacing)
    axes = own
    if ignored and apart > 0.1 * min(n * s for n, s in zip(shape, spacing, strict=True)):
        # So far off, the header says nothing of the axes either: voxels lie as the image's do. By less, it only errs.
        axes = raw
        turned, _ = geometry.canonical_grid(shape_DHW, raw)
    if turned != shape:
        raise RefusedInput(
            thing,
            expected=f"the image's shape {shape} (D, H, W)",
            found=str(turned),
            remedy="was it drawn on another image? resample it onto this one, or remove it",
        )
    if ignored:
        off = "other axes than the image's" if math.isinf(apart) else f"corners {apart:.3g} mm from the image's"
        notes.append(f"label affine ignored: {off}")
    elif apart > 0.1 * min(spacing):
        raise RefusedInput(
            thing,
            expected="the image's affine",
            found=f"corners {apart:.3g} mm apart",
            remedy="set label_affine to ignore if only the header is wrong",
        )
    return axes


def _looks_like_ct(image: Array, notes: list[str]) -> str:
    """CT by its values, where nothing names the modality: whole numbers with air at -1000 HU and bone below +4000."""
    low, high = float(image.min()), float(image.max())
    if -3100 <= low <= -900 and 100 <= high <= 32767 and (image.dtype.kind in "iu" or _whole(image)):
        notes.append("taken as CT by its values: the format does not name the modality")
        return "CT"
    return ""


def _whole(values_CDHW: Array) -> bool:
    # In parts: most volumes with fractions show one in the first.
    return all(bool((values_CDHW[part] == np.rint(values_CDHW[part])).all()) for part in _parts(values_CDHW))


def _parts(values_CDHW: Array) -> Iterator[tuple[int, slice]]:
    """A plane at a time, or as many small ones as make up for the cost of a call."""
    channels, planes, *plane = values_CDHW.shape
    step = max(1, _AT_ONCE // max(1, math.prod(plane)))
    return ((c, slice(d, d + step)) for c in range(channels) for d in range(0, planes, step))


def _mm(spacing: tuple[float, float, float]) -> str:
    return "x".join(f"{s:.4g}" for s in spacing)
