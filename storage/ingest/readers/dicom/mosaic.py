"""Siemens mosaics: the slices of a volume as tiles of one image, row by row from its upper left.

The image has as many tiles along rows as along columns, and the last ones are empty. How many slices there are is in
private elements: NumberOfImagesInMosaic of the block SIEMENS MR HEADER (0019,xx0A), and of the CSA header (0029,xx10).
ImagePositionPatient is the first pixel of an image of the mosaic's size whose middle is that of the first slice. So the
first pixel of the first slice lies half the difference of the two sizes further along rows and columns. Slices follow
each other along SliceNormalVector of the CSA header. A test compares place and voxels with nibabel's reader of mosaics.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from storage.errors import RefusedInput
from storage.ingest.readers.dicom.file import DAMAGED, Slice, drop_private, read_planes, values_of
from storage.ingest.readers.raw import Affine

_CONVERT = "convert the series to NIfTI with dcm2niix, or export it with its private elements"


@dataclass(frozen=True, slots=True)
class _Private:
    """What the private elements of a mosaic say; None where they do not.

    Args:
        count: Slices in it.
        normal: The direction in which they follow, LPS.
        gap_mm: Between their middles.
    """

    count: int | None = None
    normal: Affine | None = None
    gap_mm: float | None = None


def split(thing: str, image: Slice, notes: list[str]) -> list[Slice]:
    """The slices of a mosaic, each at its own place. Private elements of its header are dropped.

    Args:
        image: The mosaic as if it were one plane.
        notes: What could not be read from the header, and was concluded, is added.

    Raises:
        RefusedInput: the number of its slices, their direction or their distance cannot be known, or is contradictory.
    """
    private = _private(thing, image)
    drop_private(image.header)
    count = private.count
    if count is None:
        count = _count_by_empty_tiles(thing, image)
        notes.append(f"the header does not say how many slices a mosaic has: {count}, by the empty tiles at its end")
    edge = math.ceil(math.sqrt(count))
    if image.rows % edge or image.columns % edge:
        raise RefusedInput(
            thing,
            expected=f"a mosaic of {edge} x {edge} tiles for {count} slices",
            found=f"{image.rows} x {image.columns} pixels, which cannot be divided so",
            remedy=_CONVERT,
        )
    rows, columns = image.rows // edge, image.columns // edge
    between_rows, between_columns = image.spacing
    origin = (
        image.origin
        + image.row * (between_columns * (image.columns - columns) / 2)
        + image.column * (between_rows * (image.rows - rows) / 2)
    )
    step = _normal(thing, image, private, notes) * _gap(thing, image, private)
    notes.append(f"each Siemens mosaic was split into its {count} slices")
    return [
        replace(
            image,
            origin=origin + k * step,
            rows=rows,
            columns=columns,
            corner=(k // edge * rows, k % edge * columns),
        )
        for k in range(count)
    ]


def _private(thing: str, image: Slice) -> _Private:
    try:
        csa = _csa_header(image.header)
        counts = {int(value) for value in (csa.get("NumberOfImagesInMosaic"), _element(image.header)) if value}
        if len(counts) > 1:
            raise ValueError("two counts")
        normal, gap = csa.get("SliceNormalVector"), csa.get("SpacingBetweenSlices")
        facts = _Private(
            min(counts, default=None),
            None if normal is None else np.array(normal, np.float64).reshape(3),
            None if gap is None else float(gap),
        )
        if facts.count is not None and not 0 < facts.count <= image.rows * image.columns:
            raise ValueError("no count of tiles")
    except DAMAGED as error:
        raise RefusedInput(
            thing,
            expected="a Siemens mosaic whose private elements say how many slices it has and how they follow",
            found=f"damaged or contradictory ones in file {image.number + 1} of the series",
            remedy="export the series again, or convert it to NIfTI with dcm2niix",
        ) from error
    return facts


def _csa_header(header: Any) -> Mapping[str, Any]:
    """Values of the CSA header by name, one item as itself; none where the file has no such header.

    Raises:
        ValueError, OSError and the like: it is damaged.
    """
    from nibabel.nicom import csareader  # late: few files need it

    untyped: Any = csareader
    value = _in_block(header, 0x0029, "SIEMENS CSA HEADER", 0x10)
    if value is None or not bytes(value).strip(b"\0 "):
        return {}
    try:
        tags = untyped.read(bytes(value))["tags"]
    except (csareader.CSAError, AssertionError) as error:
        raise ValueError("damaged") from error
    listed = {name: [item for item in tag["items"] if item != ""] for name, tag in tags.items()}
    return {name: items if len(items) > 1 else items[0] for name, items in listed.items() if items}


def _element(header: Any) -> Any:
    return _in_block(header, 0x0019, "SIEMENS MR HEADER", 0x0A)


def _in_block(header: Any, group: int, creator: str, offset: int) -> Any:
    """The value of a private element; None where the file does not have it."""
    try:
        return header.private_block(group, creator)[offset].value
    except KeyError:
        return None


def _normal(thing: str, image: Slice, private: _Private, notes: list[str]) -> Affine:
    """The direction of the slices: perpendicular to the plane, its sign as the header says."""
    across: Affine = np.cross(image.row, image.column)
    if private.normal is None:
        notes.append("the header does not say on which side of a mosaic's first slice the others lie: taken as usual")
        return across
    along = float(across @ private.normal)
    if not abs(abs(along) - 1) < 1e-3:
        raise RefusedInput(
            thing,
            expected="slices of a mosaic that follow each other across their plane",
            found="another direction in the CSA header",
            remedy=_CONVERT,
        )
    return math.copysign(1.0, along) * across


def _gap(thing: str, image: Slice, private: _Private) -> float:
    try:
        gap = image.header.get("SpacingBetweenSlices")
        value = private.gap_mm if gap is None else float(gap)
    except DAMAGED:
        value = private.gap_mm
    if value is None or not 0 < value < math.inf:
        raise RefusedInput(
            thing,
            expected="SpacingBetweenSlices, for a mosaic has one position for all its slices",
            found="none above 0 in the header",
            remedy=_CONVERT,
        )
    return value


def _count_by_empty_tiles(thing: str, image: Slice) -> int:
    """Slices of a mosaic that does not say it: the tile's size is AcquisitionMatrix, and empty tiles confirm it.

    Images that were interpolated after their acquisition have larger tiles than the matrix. Then quarters of a slice
    would be taken for slices, but empty ones would not all lie at the end.
    """
    try:
        sizes = [int(size) for size in image.header.get("AcquisitionMatrix") or [] if int(size) > 0]
    except DAMAGED:
        sizes = []
    size = max(sizes, default=0)
    edges = {pixels // size for pixels in (image.rows, image.columns) if size and pixels % size == 0}
    fitting = [edge for edge in edges if edge > 1 and image.rows % edge == 0 and image.columns % edge == 0]
    if len(fitting) == 1:
        edge = fitting[0]
        read_planes(thing, [image])
        pixels = values_of(image)
        tiles = pixels.reshape(edge, image.rows // edge, edge, image.columns // edge).swapaxes(1, 2)
        full = (tiles != pixels.dtype.type(image.intercept)).any(axis=(2, 3)).ravel()
        image.values = None
        count = int(full.sum())
        if full[:count].all() and (edge - 1) ** 2 < count < edge**2:
            return count
    raise RefusedInput(
        thing,
        expected="a Siemens mosaic that says how many slices it has (NumberOfImagesInMosaic)",
        found="none of its private elements, and no empty tiles that would tell it",
        remedy=_CONVERT,
    )
