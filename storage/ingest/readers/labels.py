"""What a label map may be: whole numbers that are not negative, one of them a voxel.

Three kinds of files say that otherwise, and are turned into it with a note: a channel a class (one-hot), whole numbers
that a program saved with a slope, and whole numbers but for the rounding of floats.
"""

from dataclasses import replace

import numpy as np

from storage.errors import RefusedInput
from storage.ingest.label_like import NOISE
from storage.ingest.readers.raw import Array, RawVolume, series_note

_COARSEST = 0.25
"""A slope above it moves labels so far that no neighbour of a whole number is told from it; our choice."""
_SINGLE = 2.0**-22
"""Relative error of a value computed from a slope and an offset in single precision, with a reserve of two bits."""


def label_map(path: str, raw: RawVolume, image: RawVolume) -> RawVolume:
    """One channel of labels, uint8 where the values allow it, else int32.

    Args:
        path: What errors call the map.
        raw: As read, all channels.
        image: What it labels, as read.

    Raises:
        RefusedInput: values that are no labels, or channels that are no classes.
    """
    notes = [note for note in raw.notes if note != series_note(len(raw.array_CDHW))]
    array = _whole_numbers(path, raw, notes)
    if len(array) > 1:
        array = _classes(path, array, image.series, notes)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > np.iinfo(np.int32).max:
        raise RefusedInput(path, expected="labels from 0 to 2^31-1", found=f"{low} to {high}")
    return replace(raw, array_CDHW=array.astype(np.uint8 if high <= 255 else np.int32), notes=notes)


def _whole_numbers(path: str, raw: RawVolume, notes: list[str]) -> Array:
    """The values, rounded where what the slope of the file did to whole numbers is all that parts them from these."""
    array = raw.array_CDHW
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind != "f":
        return array
    if not np.isfinite(array).all():
        raise RefusedInput(path, expected="whole numbers as labels", found="NaN or infinity")
    whole: Array = np.rint(array)
    off = np.abs(array - whole)
    most = float(off.max())
    if most == 0:
        return array
    sample = f"{float(array.flat[off.argmax()]):g} among them"
    step = abs(raw.scale)
    if (step, raw.offset) == (1.0, 0.0) and most <= NOISE:
        notes.append(f"labels rounded to whole numbers, off by up to {most:.2g}: sums of floats had moved them")
        return whole
    if (step, raw.offset) == (1.0, 0.0):
        raise RefusedInput(
            path,
            expected="whole numbers as labels",
            found=sample,
            remedy="was this label map resampled with interpolation? export it again with nearest neighbour",
        )
    # Who scaled whole numbers put each on the nearest multiple of the slope, and so on one of its own.
    rounding = step / 2 + _SINGLE * (float(np.abs(array).max()) + 2 * abs(raw.offset))
    if step > _COARSEST or most > rounding or len(np.unique(array)) != len(np.unique(whole)):
        raise RefusedInput(
            path,
            expected="whole numbers as labels",
            found=f"{sample}, scaled by scl_slope {raw.scale:g} with scl_inter {raw.offset:g}",
            remedy="save the map again as whole numbers with scl_slope 1, from before it was scaled or interpolated",
        )
    notes.append(f"labels rounded to whole numbers, off by up to {most:.2g}: a slope had moved them")
    return whole


def _classes(path: str, array_CDHW: Array, series: int, notes: list[str]) -> Array:
    """The class of each voxel, (1, D, H, W), from a channel of 0 and 1 for each class.

    Args:
        path: What errors call the map.
        array_CDHW: Whole numbers.
        series: Volumes in the image's file.
        notes: What was made of the channels is added.
    """
    count = len(array_CDHW)
    remedy = "write one map with a value for each class"
    marked = np.zeros(array_CDHW.shape[1:], np.int32)
    for channel in array_CDHW:
        if not ((channel == 0) | (channel == 1)).all():
            other = channel[(channel != 0) & (channel != 1)].flat[0]
            raise RefusedInput(
                path,
                expected="one label map, or a channel of 0 and 1 for each class",
                found=f"{count} channels, with {other:g} among their values",
                remedy=remedy,
            )
        marked += channel != 0
    overlap = int(np.count_nonzero(marked > 1))
    if overlap:
        raise RefusedInput(
            path,
            expected="one label map, or a channel for each class that marks no voxel of another",
            found=f"{count} channels, of which {overlap:,} voxels are marked in two or more",
            remedy=f"{remedy}, and decide which class such voxels have",
        )
    complete = bool(marked.all())
    if series == count and not complete:
        raise RefusedInput(
            path,
            expected="one label map",
            found=f"{count} channels for an image of {count} volumes: a map for each volume, or one for each class",
            remedy=remedy,
        )
    first = 0 if complete else 1
    classes = np.zeros((1, *marked.shape), np.int32)
    for number, channel in enumerate(array_CDHW, first):
        classes[0][channel != 0] = number
    if complete:
        notes.append(f"{count} channels turned into classes: the first is background (0)")
        sizes = [int(np.count_nonzero(channel)) for channel in array_CDHW]
        if sizes[0] < max(sizes):
            notes.append("the first channel, taken as background, is not the largest: check the order of classes")
    else:
        notes.append(f"{count} channels turned into classes 1 to {count}: what none of them marks is background (0)")
    return classes
