"""Axes, affines and resampling of whole volumes.

Arrays are (C, D, H, W); an affine maps voxel-centre indices (i=w, j=h, k=d, 1) to RAS+ mm, so its columns belong to the
array's axes in reverse order. "Canonical" means that D runs inferior to superior, H posterior to anterior and W left
to right, up to the rotation that an oblique scan keeps in its affine: axes are flipped and permuted,
never interpolated.

scipy is imported where it is used: it takes a quarter of an ingest's start, and volumes that keep their grid need none.
"""

from functools import lru_cache
from itertools import permutations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from storage.errors import RefusedInput

Array = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]
Interpolation = Literal["linear", "bspline", "nearest", "onehot"]

MOST_GROWTH = 8
"""Of the voxels of a sheared volume on a straight grid; a gantry tilted by 30 degrees makes it less than twice."""
ROUNDING_VOX = 0.02
"""A drift of the slices along an axis by less, from the first to the last, is taken for rounding of the header."""
LARGEST_CONVERTED_MM = 100.0
"""Voxels above it are no scan's where a larger unit than mm was converted; our choice."""
_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))


def check_affine(affine: Affine, thing: str, unit_mm: float = 1.0) -> Affine:
    """The affine as float64, or a refusal: it must be 4x4, finite, invertible, with (0, 0, 0, 1) below.

    Args:
        affine: In mm.
        thing: What errors call the volume.
        unit_mm: Of the unit that its lengths were converted from. A header whose lengths are mm and whose unit says
            metres gives voxels that no scanner has.

    Raises:
        RefusedInput: names `thing` and what is wrong.
    """
    matrix = np.asarray(affine, np.float64)
    expected, remedy = "an invertible affine with finite entries", "repair the header; the volume has no known geometry"
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not np.array_equal(matrix[3], [0, 0, 0, 1]):
        raise RefusedInput(
            thing, expected=expected, found=np.array2string(matrix, precision=3).replace("\n", ""), remedy=remedy
        )
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    if (lengths < 1e-6).any() or (lengths > 1e4).any():
        raise RefusedInput(
            thing, expected="a spacing between 1e-6 and 1e4 mm", found=f"{lengths.tolist()} mm", remedy=remedy
        )
    if unit_mm > 1 and lengths.max() > LARGEST_CONVERTED_MM:
        raise RefusedInput(
            thing,
            expected=f"a spacing of at most {LARGEST_CONVERTED_MM:g} mm from lengths in a unit of {unit_mm:g} mm",
            found=f"{', '.join(f'{n:.4g}' for n in lengths)} mm",
            remedy="correct the unit in the header (xyzt_units of NIfTI): are its lengths in mm?",
        )
    if abs(np.linalg.det(matrix[:3, :3] / lengths)) < 1e-3:
        raise RefusedInput(thing, expected=expected, found="axes that lie in one plane", remedy=remedy)
    return matrix


def spacing_dhw(affine: Affine) -> tuple[float, float, float]:
    """Voxel sizes along D, H, W in mm: the lengths of the affine's columns, reversed."""
    w, h, d = np.linalg.norm(affine[:3, :3], axis=0)
    return float(d), float(h), float(w)


def shear(affine: Affine) -> float:
    """Largest |cosine| between two of the affine's axes: 0 on a straight grid."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(axes.T @ axes - np.eye(3))
    return float(cosines.max())


def nearest_axes(affine: Affine) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """The signed permutation nearest to the affine's rotation.

    Returns:
        (source, flip): RAS axis a comes from index axis source[a] (0=i, 1=j, 2=k), reversed where flip[a].
    """
    return _nearest_axes(np.ascontiguousarray(affine[:3, :3], np.float64).tobytes())


@lru_cache(maxsize=64)
def _nearest_axes(axes: bytes) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """The same of nine float64: asked several times a volume, and often the same for all of a data set."""
    matrix = np.frombuffer(axes, np.float64).reshape(3, 3)
    u, _, vt = np.linalg.svd(matrix / np.linalg.norm(matrix, axis=0))
    rotation = u @ vt
    # of the six permutations the one with the largest trace is nearest in the Frobenius norm; rounding makes ties
    # (a scan at exactly 45 degrees) fall the same way on every machine
    source = max(permutations(range(3)), key=lambda p: (round(sum(abs(rotation[a, p[a]]) for a in range(3)), 9), p))
    flip = tuple(bool(rotation[a, source[a]] < 0) for a in range(3))
    return (source[0], source[1], source[2]), (flip[0], flip[1], flip[2])


def orientation(affine: Affine) -> str:
    """Three letters saying where the index axes i, j, k point, such as "LAS"."""
    source, flip = nearest_axes(affine)
    letters = [""] * 3
    for a in range(3):
        letters[source[a]] = _LETTERS[a][not flip[a]]
    return "".join(letters)


def canonicalise(array_CDHW: Array, affine: Affine) -> tuple[Array, Affine]:
    """Turn an array to canonical axes by exact flips and permutations.

    Args:
        array_CDHW: (C, k, j, i).
        affine: 4x4, index (i, j, k, 1) to RAS+ mm.

    Returns:
        The array (C, D, H, W), C-contiguous, and its affine. Every voxel keeps its value and its place in mm.
    """
    source, flip = nearest_axes(affine)
    moved = array_CDHW.transpose(0, *(3 - source[a] for a in (2, 1, 0)))
    moved = np.flip(moved, tuple(axis for axis, a in ((1, 2), (2, 1), (3, 0)) if flip[a]))
    return np.ascontiguousarray(moved), canonical_grid(array_CDHW.shape[1:], affine)[1]


def canonical_grid(shape_DHW: tuple[int, ...], affine: Affine) -> tuple[tuple[int, int, int], Affine]:
    """Shape and affine of a volume after `canonicalise`.

    Args:
        shape_DHW: (k, j, i).
        affine: 4x4, index (i, j, k, 1) to RAS+ mm.
    """
    source, flip = nearest_axes(affine)
    sizes = shape_DHW[::-1]  # along i, j, k
    step = np.zeros((4, 4))  # new index -> old index
    step[3, 3] = 1
    for a in range(3):
        step[source[a], a] = -1 if flip[a] else 1
        step[source[a], 3] = sizes[source[a]] - 1 if flip[a] else 0
    shape = (sizes[source[2]], sizes[source[1]], sizes[source[0]])
    return shape, np.asarray(affine, np.float64) @ step


def resample(
    array_CDHW: Array, affine: Affine, spacing_mm: tuple[float, float, float], mode: Interpolation
) -> tuple[Array, Affine]:
    """Put a volume on a grid of another spacing, the axes unchanged.

    The new grid shares the centre of the old one, so that resampling commutes with flips; its extent is the old one
    rounded to whole voxels. Positions beyond the outermost voxel centres take the value at the border. Where the new
    voxels are the larger ones, "linear" and "bspline" first average over them (a Gaussian whose width makes up the
    difference of the two boxes), for otherwise fine structure would alias.

    Args:
        array_CDHW: (C, D, H, W).
        affine: 4x4.
        spacing_mm: Wanted voxel size along D, H, W.
        mode: "linear" or "bspline" (cubic) for images, float32 out; "nearest" or "onehot" (linear interpolation of each
            value's indicator, then the largest) for labels, dtype kept.

    Returns:
        The resampled array and its affine.
    """
    old = spacing_dhw(affine)
    ratio = tuple(new / was for new, was in zip(spacing_mm, old, strict=True))
    if all(abs(r - 1) < 1e-6 for r in ratio):
        return array_CDHW, affine
    shape = array_CDHW.shape[1:]
    size = tuple(max(1, round(n / r)) for n, r in zip(shape, ratio, strict=True))
    # voxel i covers [i, i+1): the new grid's voxel centres, in old indices, around the common centre
    places = [(np.arange(m) + 0.5 - m / 2) * r + n / 2 - 0.5 for n, m, r in zip(shape, size, ratio, strict=True)]
    step = np.eye(4)
    for axis, (place, r) in enumerate(zip(places, ratio, strict=True)):
        step[2 - axis, 2 - axis], step[2 - axis, 3] = r, place[0]
    if mode == "nearest":
        out = _nearest(array_CDHW, places)
    elif mode == "onehot":
        out = _onehot(array_CDHW, places)
    else:
        image = array_CDHW.astype(np.float32)
        sigma = [0.0, *(np.sqrt(max(r * r - 1, 0) / 12) for r in ratio)]
        if max(sigma) > 0:
            from scipy import ndimage  # see the top of this file

            image = ndimage.gaussian_filter(image, sigma, mode="nearest", truncate=3)
        out = _linear(image, places) if mode == "linear" else _bspline(image, places)
    return out, affine @ step


def _nearest(array: Array, places: list[Affine]) -> Array:
    # ties go to the voxel nearer the centre of the grid, so that flips still commute
    index: list[Any] = []
    for axis, place in enumerate(places, start=1):
        middle = (array.shape[axis] - 1) / 2
        rounded = np.where(place > middle, np.ceil(place - 0.5 - 1e-9), np.floor(place + 0.5 + 1e-9))
        index.append(np.clip(rounded.astype(np.int64), 0, array.shape[axis] - 1))
    return np.ascontiguousarray(array[(slice(None), *np.ix_(*index))])


def _linear(image: Array, places: list[Affine]) -> Array:
    # separable: the grids are parallel, so three one-dimensional blends give the trilinear value exactly
    for axis in sorted((1, 2, 3), key=lambda a: len(places[a - 1]) / image.shape[a]):
        place = np.clip(places[axis - 1], 0, image.shape[axis] - 1)
        low = np.minimum(np.floor(place).astype(np.int64), max(image.shape[axis] - 2, 0))
        weight = (place - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(4)])
        first = image.take(low, axis)
        second = image.take(np.minimum(low + 1, image.shape[axis] - 1), axis)
        second -= first
        second *= weight
        first += second
        image = first
    return image


def _bspline(image: Array, places: list[Affine]) -> Array:
    from scipy import ndimage  # see the top of this file

    matrix = [place[1] - place[0] if len(place) > 1 else 1.0 for place in places]
    offset = [place[0] for place in places]
    size = tuple(len(place) for place in places)
    out = np.empty((image.shape[0], *size), np.float32)
    for c in range(image.shape[0]):
        ndimage.affine_transform(image[c], matrix, offset, size, output=out[c], order=3, mode="nearest")
    return out


def _onehot(labels: Array, places: list[Affine]) -> Array:
    best: Array | None = None
    out: Array | None = None
    for value in np.unique(labels):  # one indicator at a time bounds the memory
        share = _linear((labels == value).astype(np.float32), places)
        if best is None or out is None:
            best, out = share, np.full(share.shape, value, labels.dtype)
        else:
            better = share > best
            out[better] = value
            np.maximum(best, share, out=best)
    assert out is not None
    return out


def straighten(
    array_CDHW: Array, affine: Affine, *, labels: bool = False, fill: float | None = None
) -> tuple[Array, Affine]:
    """Resample a sheared volume onto a straight grid that contains all of it.

    The new i axis keeps its direction, j is made perpendicular to i, and k to both; spacings are the distances of
    neighbouring voxels along those directions, so that slices stay apart as far as they are.

    Args:
        array_CDHW: (C, k, j, i).
        affine: 4x4 with sheared axes.
        labels: Nearest neighbour, dtype kept; else linear, float32 out.
        fill: Value outside the scanned slab; the lowest value (0 for labels) if None.

    Raises:
        RefusedInput: the grid would be more than `MOST_GROWTH` times as large.
    """
    from scipy import ndimage  # see the top of this file

    axes = affine[:3, :3]
    q, r = np.linalg.qr(axes)
    sign = np.sign(np.diag(r))
    straight = q * sign * np.abs(np.diag(r))  # columns: straight directions times their spacing
    sizes = np.array(array_CDHW.shape[:0:-1], np.float64)
    sheared = np.linalg.solve(straight, axes)  # ones on the diagonal, zeros below it
    # Rounding, of a header or of this, must not count: at -1e-16 a whole slice would lie outside and be lost.
    sheared = np.where(np.abs(sheared - np.eye(3)) * sizes < ROUNDING_VOX, np.eye(3), sheared)
    corners = np.array(np.meshgrid(*((-0.5, n - 0.5) for n in sizes), indexing="ij")).reshape(3, -1)
    reach = sheared @ corners
    low, high = reach.min(axis=1), reach.max(axis=1)
    size = np.maximum(np.ceil(high - low - 1e-6).astype(int), 1)
    if size.prod() > MOST_GROWTH * sizes.prod():
        raise RefusedInput(
            "sheared volume",
            expected=f"a straight grid of at most {MOST_GROWTH} times its voxels",
            found=f"{size.prod() / sizes.prod():.0f} times",
            remedy="the header is damaged, or the axes are nearly parallel",
        )
    first = low + 0.5 + (high - low - size) / 2  # spread the rounding over both ends
    to_old = np.linalg.inv(sheared)  # new index (relative) -> old index
    matrix = to_old[::-1, ::-1]  # scipy counts k, j, i
    offset = (to_old @ first)[::-1]
    if fill is None:
        fill = 0.0 if labels else float(array_CDHW.min())
    image = array_CDHW if labels else array_CDHW.astype(np.float32, copy=False)
    out = np.empty((image.shape[0], *(int(n) for n in size[::-1])), image.dtype)
    for c in range(image.shape[0]):
        ndimage.affine_transform(
            image[c], matrix, offset, out.shape[1:], output=out[c], order=0 if labels else 1, mode="constant", cval=fill
        )
    new = np.eye(4)
    new[:3, :3] = straight
    new[:3, 3] = affine[:3, 3] + straight @ first
    return out, new


def corner_distance(a: Affine, b: Affine, shape_DHW: tuple[int, int, int]) -> float:
    """Largest distance in mm between a grid's corners under two affines: 0 where they agree."""
    d, h, w = shape_DHW
    corners = np.array(np.meshgrid((-0.5, w - 0.5), (-0.5, h - 0.5), (-0.5, d - 0.5), (1.0,), indexing="ij")).reshape(
        4, -1
    )
    return float(np.linalg.norm(((a - b) @ corners)[:3], axis=0).max())
