"""Telling a label map that is about to be published as a scan: few values, in patches, or shares of 0 and 1 mostly.

Names are looked at first (`names.layouts`); this is for maps whose names say nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import RefusedInput
from storage.ingest.policy import IngestPolicy

Array = npt.NDArray[Any]
LABEL_LIKE = "looks like a label map"
_ALWAYS = 8
"""So few values are a map wherever they lie. This number and those below are our choice."""
_PATCHES = ((64, 0.6), (512, 0.85))
"""Up to so many values, and the least share of neighbours outside the background that are equal."""
_MOST = _PATCHES[-1][0]
_SAMPLE = 8192
"""Voxels, evenly apart, that are looked at before all of them are."""
NOISE = 1e-3
"""So near to whole numbers lie labels that went through sums of floats, and no others; our choice."""


def distinct_values(channel_DHW: Array) -> int:
    """How many values there are, up to one more than a label map may have."""
    channel_DHW = _without_noise(channel_DHW)
    if len(np.unique(channel_DHW.reshape(-1)[:: max(1, channel_DHW.size // _SAMPLE)])) > _MOST:
        return _MOST + 1  # a part that has so many is enough: scans end here
    values = np.empty(0, channel_DHW.dtype)
    for plane in channel_DHW:
        values = np.union1d(values, _unique(plane))
        if len(values) > _MOST:
            return _MOST + 1
    return len(values)


def looks_like_label_map(channel_DHW: Array) -> bool:
    """Whether an image, which is not constant, has the values of a label map: few of them, in patches."""
    channel_DHW = _without_noise(channel_DHW)
    count = distinct_values(channel_DHW)
    if count < 2 or count > _MOST:
        return False
    if count <= _ALWAYS:
        return True
    least = next(share for most, share in _PATCHES if count <= most)
    values, counts = np.unique(channel_DHW, return_counts=True)
    background = values[int(counts.argmax())]
    equal = pairs = 0
    for axis in range(3):
        low = np.moveaxis(channel_DHW, axis, 0)[:-1]
        high = np.moveaxis(channel_DHW, axis, 0)[1:]
        inside = (low != background) | (high != background)
        equal += int(np.count_nonzero((low == high) & inside))
        pairs += int(np.count_nonzero(inside))
    return equal >= least * pairs


_TOPS = (1.0, 100.0, 255.0)
"""Largest values of soft maps: shares, percent, and shares in a byte."""
_LEAST_AT_TOP = 0.1
"""Of what is above 0, the least share at the top. A scan that was clipped there has a few hundredths; our choice."""


def looks_like_soft_map(channel_DHW: Array) -> bool:
    """Whether an image has the values of probabilities, or of a mask that was interpolated.

    Most of them are exactly 0 or the top, and the top is a plateau. A scan scaled to 0 and 1 has its background at 0 as
    well, and at 1 one voxel, or those few that its scaling clipped.
    """
    top = float(channel_DHW.max())
    if top not in _TOPS or float(channel_DHW.min()) < 0:
        return False
    full = int(np.count_nonzero(channel_DHW == top))
    above = int(np.count_nonzero(channel_DHW > NOISE * top))
    return full >= _LEAST_AT_TOP * above and channel_DHW.size - above + full > channel_DHW.size / 2


def _without_noise(channel_DHW: Array) -> Array:
    """Whole numbers in place of values that are these but for rounding; the channel itself where one is not."""
    if channel_DHW.dtype.kind != "f" or any(np.abs(plane - np.rint(plane)).max() > NOISE for plane in channel_DHW):
        return channel_DHW
    whole: Array = np.rint(channel_DHW)
    return whole if whole.min() < whole.max() else channel_DHW


def check_no_label_map(thing: str, image_CDHW: Array, policy: IngestPolicy, notes: list[str]) -> None:
    """Refuse an image with a channel that looks like a label map, or note that it does where the policy keeps it.

    Raises:
        RefusedInput: names the image.
    """
    for channel in image_CDHW:
        if looks_like_label_map(channel):
            count = distinct_values(channel)
            notes.append(f"{LABEL_LIKE}: {count} different values")
            check_told(thing, notes, policy)
            return
        if looks_like_soft_map(channel):
            notes.append(f"{LABEL_LIKE}: shares that are 0 or {float(channel.max()):g} mostly")
            check_told(thing, notes, policy)
            return


def check_told(thing: str, notes: Sequence[str], policy: IngestPolicy) -> None:
    """Refuse a volume whose notes say that it looks like a label map, unless the policy keeps such.

    Raises:
        RefusedInput: names the image.
    """
    for note in notes:
        if note.startswith(LABEL_LIKE) and policy.label_maps == "refuse":
            raise RefusedInput(
                thing,
                expected="an image",
                found=f"what {note}",
                remedy="give it the name of its image and _seg, or lay it into labels/; if it is a scan, set "
                "label_maps=keep",
            )


def _unique(plane: Array) -> Array:
    if plane.dtype.kind in "iu" and plane.size:
        low, high = int(plane.min()), int(plane.max())
        if high - low < 1 << 16:
            counts = np.bincount((plane.astype(np.int64) - low).ravel())
            return (np.flatnonzero(counts) + low).astype(plane.dtype)
    return np.unique(plane)
