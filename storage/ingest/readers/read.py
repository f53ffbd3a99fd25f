"""From a path or an item to a `RawVolume`."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from storage import geometry
from storage.errors import ConfigError, RefusedInput
from storage.ingest.discover import discover
from storage.ingest.items import IngestItem
from storage.ingest.readers.labels import label_map
from storage.ingest.readers.raw import Array, RawVolume, ReadPolicy, VolumeHeader
from storage.ingest.readers.registry import format_of, format_of_suffix, split_name

_EXACT = 2**53


def read_any(path: str, policy: ReadPolicy | None = None) -> RawVolume:
    """Read one volume file, Zarr folder, or folder (or file) of one DICOM series.

    Raises:
        ConfigError: no such path, or a folder of several volumes.
        RefusedInput: it is no volume, or one that the policy does not take.
    """
    policy = policy or ReadPolicy()
    suffix = split_name(Path(path).name)[1]
    if suffix and Path(path).exists():
        return _checked(path, format_of_suffix(suffix).reader.read((path,), policy, path), policy)
    items = discover(path).items
    if len(items) > 1:
        names = ", ".join(item.name for item in items[:4])
        raise ConfigError(
            path,
            expected="one volume",
            found=f"{len(items)}: {names}",
            remedy="ingest the folder, or name one file",
        )
    return read_item(items[0], policy)


def read_item(item: IngestItem, policy: ReadPolicy) -> RawVolume:
    """Read the image of an item: its series of files, or a file for each channel, which must share one grid.

    Raises:
        RefusedInput: names the file and what is wrong with it.
    """
    reader = format_of(item.kind).reader
    if not item.channels:
        return _checked(item.source, reader.read(item.images, policy, item.source), policy)
    _check_channels(item)
    volumes = [_checked(path, reader.read((path,), policy, path), policy) for path in item.images]
    first = volumes[0]
    if len(volumes) == 1:
        return first
    for path, other in zip(item.images[1:], volumes[1:], strict=True):
        check_same_grid(path, other, first)
    array = np.concatenate([volume.array_CDHW for volume in volumes])
    notes = list(dict.fromkeys(note for volume in volumes for note in volume.notes))
    return replace(first, array_CDHW=array, notes=notes)


def read_item_header(item: IngestItem, policy: ReadPolicy) -> VolumeHeader:
    """What `read_item` would return, without voxels where the formats allow that.

    Returns:
        The header; a shear that the policy corrects is still in the affine.

    Raises:
        RefusedInput: what `read_item` would refuse the item for, of all that headers tell.
    """
    reader = format_of(item.kind).reader
    if not item.channels:
        header = reader.header(item.images, policy, item.source)
        _check_grid(item.source, header, policy)
        return header
    _check_channels(item)
    headers = [reader.header((path,), policy, path) for path in item.images]
    for path, other in zip(item.images, headers, strict=True):
        _check_grid(path, other, policy)
        check_same_grid(path, other, headers[0])
    first = headers[0]
    return replace(first, shape_CDHW=(sum(h.shape_CDHW[0] for h in headers), *first.shape_CDHW[1:]))


def read_label_header(item: IngestItem, policy: ReadPolicy) -> VolumeHeader | None:
    """What is known of the label map of an item before it is read; None where its format needs the image for that."""
    suffix = "" if item.label is None else split_name(Path(item.label).name)[1]
    if item.label is None or not suffix:
        return None
    all_channels = policy.model_copy(update={"four_d": "channels"})
    return format_of_suffix(suffix).reader.header((item.label,), all_channels, item.label)


def _check_channels(item: IngestItem) -> None:
    expected = tuple(f"{number:04d}" for number in range(len(item.images)))
    if item.channels != expected:
        raise RefusedInput(
            item.source,
            expected=f"channels {', '.join(expected)} in file names",
            found=", ".join(item.channels),
            remedy="a channel is missing, or counted from another number: another channel would stand in its place",
        )


def read_label(item: IngestItem, policy: ReadPolicy, image: RawVolume) -> RawVolume | None:
    """Read the label map of an item, one channel of whole, non-negative numbers; None where it has none.

    A channel a class, and whole numbers saved with a slope, are turned into that with a note (see `label_map`).

    Args:
        image: The item's image, as read. A map that has no suffix of its own is read by the image's reader: a DICOM
            segmentation lists only some planes and is laid out on the image's grid, and a map inside an OME-Zarr image
            shares its place.

    Returns:
        The volume with `array_CDHW` as uint8 where the values allow it, else int32.

    Raises:
        RefusedInput: values that are no labels, or channels that are no classes.
    """
    if item.label is None:
        return None
    path = item.label
    suffix = split_name(Path(path).name)[1]
    form = format_of_suffix(suffix) if suffix else format_of(item.kind)
    # All channels, whatever is done with a series of images: the first of several is no label map.
    raw = form.reader.read_label(path, policy.model_copy(update={"four_d": "channels"}), image)
    return label_map(path, raw, image)


def check_same_grid(
    path: str, other: RawVolume | VolumeHeader, first: RawVolume | VolumeHeader, tolerance: float = 0.1
) -> None:
    """Refuse a channel whose shape or place differs from the first one's."""
    shape = first.shape_CDHW
    if other.shape_CDHW[1:] != shape[1:]:
        raise RefusedInput(
            path, expected=f"the shape of its other channels, {shape[1:]}", found=str(other.shape_CDHW[1:])
        )
    apart = geometry.corner_distance(other.affine, first.affine, (shape[1], shape[2], shape[3]))
    if apart > tolerance * min(geometry.spacing_dhw(first.affine)):
        raise RefusedInput(path, expected="the affine of its other channels", found=f"corners {apart:.3g} mm apart")


def _check_grid(thing: str, volume: RawVolume | VolumeHeader, policy: ReadPolicy) -> float:
    """Refuse slices, and a shear that the policy does not take; returns the shear in degrees, 0 for rounding."""
    if min(volume.shape_CDHW[1:]) < 2:
        raise RefusedInput(
            thing,
            expected="at least two voxels along each of three axes",
            found=f"shape {volume.shape_CDHW[1:]}",
            remedy="a slice is no volume",
        )
    angle = geometry.shear(volume.affine)
    if angle <= 1e-3:
        return 0.0
    degrees = float(np.degrees(np.arcsin(min(angle, 1.0))))
    if policy.shear == "refuse":
        raise RefusedInput(
            thing,
            expected="perpendicular axes",
            found=f"an affine sheared by {degrees:.1f} degrees",
            remedy="set read.shear to correct to resample it onto a straight grid",
        )
    return degrees


def _checked(thing: str, raw: RawVolume, policy: ReadPolicy) -> RawVolume:
    """Values and axes that later steps can rely on: real, finite, not constant, on a straight grid."""
    degrees = _check_grid(thing, raw, policy)
    array = raw.array_CDHW
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise RefusedInput(thing, expected="integer or real voxels", found=str(array.dtype))
    if array.dtype.kind == "f":
        array = _finite(thing, array, policy, raw.notes)
    low, high = array.min(), array.max()
    if array.dtype.kind != "f" and max(-int(low), int(high)) > _EXACT:
        raise RefusedInput(
            thing, expected="whole numbers below 2^53, which float64 holds exactly", found=f"{low} to {high}"
        )
    if low == high:
        raise RefusedInput(thing, expected="an image with contrast", found=f"every voxel is {float(low):g}")
    raw.array_CDHW = array
    if degrees:
        raw.array_CDHW, raw.affine = geometry.straighten(array, raw.affine)
        raw.notes.append(f"shear of {degrees:.1f} degrees corrected by linear resampling onto a straight grid")
    return raw


def _finite(thing: str, array: Array, policy: ReadPolicy, notes: list[str]) -> Array:
    # what float32 cannot hold would be infinite later on
    finite = np.isfinite(array) if array.dtype.itemsize <= 4 else np.abs(array) <= np.finfo(np.float32).max
    bad = int(array.size - np.count_nonzero(finite))
    if bad == 0:
        return array
    if bad == array.size:
        raise RefusedInput(thing, expected="finite values", found="only NaN or infinity")
    if policy.nonfinite == "refuse":
        raise RefusedInput(
            thing,
            expected="finite values",
            found=f"{bad:,} of {array.size:,} voxels NaN, infinite or beyond float32",
            remedy="set read.nonfinite to lowest if they mark the background",
        )
    notes.append(f"{bad:,} voxels were NaN or infinite and set to the lowest finite value")
    return np.where(finite, array, array[finite].min())
