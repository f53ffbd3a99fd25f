"""Super-pixels by Felzenszwalb and Huttenlocher's graph method, slice by slice or in 3-D.

Edges between neighbours, weighted by their difference of intensity, are visited in ascending order; two components are
joined when the edge is no heavier than either's heaviest edge so far plus k over its size; small components are merged
at the end. The result depends on the intensity scale, so images must be in [0, 1] (window CT first).
"""

from itertools import pairwise
from math import ceil
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import felzenszwalb

from ssl_core.superpixels.settings import Superpixels
from storage.errors import RefusedInput
from storage.format.records import VolumeRecord

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
SLAB_VOXELS = 1 << 22
"""Of one graph in 3-D, which takes about 1.3 GB then; our choice."""


def superpixels(
    image_DHW: NDArray[Any],
    mode: Literal["slices", "volume"] = "slices",
    *,
    scale: float = 100.0,
    sigma: float = 0.5,
    min_size: int = 20,
) -> I32:
    """Regions numbered from 1, int32; 0 is left for what is outside of the volume.

    Args:
        image_DHW: Floats in [0, 1].
        mode: Axial slices one by one, as LRC describes, with numbers that never repeat; or the volume with 26
            neighbours.
        scale: Larger gives larger regions; k = scale / 255 as in scikit-image. lightly's DetCon example has 100.
        sigma: Gaussian smoothing, voxels; the same example has 0.5.
        min_size: Smaller regions are merged, voxels; the same example has 20.

    Raises:
        RefusedInput: the image is not three-dimensional, not floating, or leaves [0, 1].
    """
    description = f"{image_DHW.dtype} of shape {image_DHW.shape}"
    if image_DHW.ndim != 3 or image_DHW.dtype.kind != "f":
        # Integers would be rescaled by the range of their type, which gives other regions altogether.
        raise RefusedInput("image for super-pixels", expected="floats with axes D, H, W", found=description)
    low, high = float(image_DHW.min()), float(image_DHW.max())
    if not (low >= 0 and high <= 1):
        raise RefusedInput(
            "image for super-pixels",
            expected="intensities in [0, 1]",
            found=f"{low:.4g} to {high:.4g}",
            remedy="window and rescale it first",
        )
    if mode == "volume":
        return _slabs(image_DHW, scale, sigma, min_size)
    out = np.empty(image_DHW.shape, np.int32)
    used = 1
    for z, plane in enumerate(image_DHW):
        # `channel_axis=None`, or the last axis would be taken for channels.
        ids = felzenszwalb(plane.astype(np.float64), scale=scale, sigma=sigma, min_size=min_size, channel_axis=None)
        out[z] = ids + used
        used += int(ids.max()) + 1
    return out


def of_volume(stored_CDHW: NDArray[Any], record: VolumeRecord, settings: Superpixels) -> I32:
    """Super-pixels of a stored volume, (D, H, W): its first channel in the settings' window; 0 where nothing is.

    Raises:
        RefusedInput: the values are not finite.
    """
    values = stored_CDHW[0].astype(np.float32) * np.float32(record.scale) + np.float32(record.offset)
    if not np.isfinite(values).all():
        raise RefusedInput("image for super-pixels", expected="finite values", found="NaN or infinity")
    low, high = settings.window or (record.stats[0]["p0_5"], record.stats[0]["p99_5"])
    # A constant volume is one value of the window, not rounding noise.
    spread = np.float32(high - low) if high > low else np.float32(1)
    unit = ((values - np.float32(low)) / spread).clip(0, 1)
    ids = superpixels(unit, settings.mode, scale=settings.scale, sigma=settings.sigma, min_size=settings.min_size)
    total = np.bincount(ids.ravel(), weights=unit.ravel())
    air = total <= settings.background * np.bincount(ids.ravel())
    return np.where(air[ids], np.int32(0), ids)


def _slabs(image_DHW: NDArray[Any], scale: float, sigma: float, min_size: int) -> I32:
    """The volume in slabs along D, which bounds memory; regions end where a slab does."""
    depth = image_DHW.shape[0]
    count = ceil(image_DHW.size / SLAB_VOXELS)
    out = np.empty(image_DHW.shape, np.int32)
    used = 1
    for first, last in pairwise(round(i * depth / count) for i in range(count + 1)):
        if last > first:
            ids = felzenszwalb_nd(image_DHW[first:last].astype(np.float64), scale, sigma, min_size)
            out[first:last] = ids + used
            used += int(ids.max()) + 1
    return out


def felzenszwalb_nd(image: F64, scale: float, sigma: float, min_size: int) -> I32:
    """The graph method in 2-D with 8 or in 3-D with 26 neighbours, regions numbered from 0 in order of appearance.

    In 2-D it gives scikit-image's partition up to the order of equal edges. Memory: about 24 bytes an edge, of which
    there are 4 a pixel in 2-D and 13 a voxel in 3-D.
    """
    smooth = ndimage.gaussian_filter(image, sigma)
    steps = _steps(image.ndim)
    # One weight for each voxel and step, so that an edge is known by its place; what leaves the image comes last.
    weight = np.full((len(steps), *image.shape), np.inf)
    for row, step in zip(weight, steps, strict=True):
        source = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(step, image.shape, strict=True))
        target = tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(step, image.shape, strict=True))
        row[source] = np.abs(smooth[source] - smooth[target])
    flat = weight.reshape(-1)
    order = np.argsort(flat, kind="stable")[: int(np.isfinite(flat).sum())]
    strides = np.cumprod([1, *image.shape[:0:-1]])[::-1]
    jump = np.array([int(np.dot(step, strides)) for step in steps], np.int64)
    roots = _join(order, jump, flat, image.size, scale / 255.0, min_size)
    _, first, ids = np.unique(roots, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[ids.ravel()].reshape(image.shape)


def _steps(dims: int) -> list[tuple[int, ...]]:
    """Half of the neighbours; the other half are the same edges."""
    steps = [tuple(int(x) - 1 for x in s) for s in np.ndindex(*(3,) * dims)]
    return [s for s in steps if s > (0,) * dims]


@numba.njit(cache=True, nogil=True)
def _root(parent: NDArray[np.int64], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@numba.njit(cache=True, nogil=True)
def _join(
    order: NDArray[np.int64], jump: NDArray[np.int64], weight: F64, count: int, k: float, min_size: int
) -> NDArray[np.int64]:
    parent = np.arange(count)
    size = np.ones(count, np.int64)
    inner = np.zeros(count, np.float64)
    for sweep in range(2):
        for edge in order:
            start = edge % count
            a, b = _root(parent, start), _root(parent, start + jump[edge // count])
            if a == b:
                continue
            if sweep == 0:
                if weight[edge] > min(inner[a] + k / size[a], inner[b] + k / size[b]):
                    continue
            elif size[a] >= min_size and size[b] >= min_size:
                continue
            if size[a] < size[b]:
                a, b = b, a
            parent[b] = a
            size[a] += size[b]
            inner[a] = weight[edge]  # edges ascend, so the newest is the heaviest
    for i in range(count):
        parent[i] = _root(parent, i)
    return parent
