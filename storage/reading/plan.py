"""From crops to byte ranges, as pure functions: which chunks a box meets, and which ranges fetch them.

No I/O and no clock here, so that a plan can be tested, counted and printed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from operator import itemgetter

from storage.format.shard_index import Index
from storage.format.zarr_metadata import ArrayMeta

GAP = 128 << 10
"""Unneeded bytes between two chunks that cost less to fetch than a second request would.

Measured on CT at 96^3 crops: 4.5 requests and 1.94 MB a crop, against 9.1 and 1.60 MB without gaps; a request costs the
store and the client milliseconds, 100 KiB a fraction of one."""
MOST = 4 << 20
"""Longest merged range, so that a large read is fetched and decoded by several threads."""

_PLACE = itemgetter(0, 1)


@dataclass(frozen=True, slots=True)
class Box:
    """Half-open region of one array, in voxels of every axis; may reach beyond the array."""

    start: tuple[int, ...]
    stop: tuple[int, ...]


Part = tuple[int, tuple[slice, ...], tuple[slice, ...]]
"""Number of a box, the voxels of its array that a chunk fills, and the voxels of the chunk that fill them."""


@dataclass(slots=True)
class Need:
    """One chunk that has to be decoded: its place in the shard's index, and what wants a part of it."""

    number: int
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Range:
    """One request: bytes [start, stop) of a shard, and the chunks in it as (need, first byte, one past the last)."""

    start: int
    stop: int
    chunks: tuple[tuple[Need, int, int], ...]


def needs(meta: ArrayMeta, boxes: Sequence[Box]) -> dict[tuple[int, ...], dict[int, Need]]:
    """The chunks that hold any voxel of the boxes: {shard position: {chunk number: Need}}.

    Parts of a box outside the array need nothing; a chunk wanted by several boxes appears once.
    """
    by_shard: dict[tuple[int, ...], dict[int, Need]] = {}
    for b, box in enumerate(boxes):
        # What depends on one axis only is worked out once an axis, not once a chunk.
        axes = [_steps(*step) for step in zip(box.start, box.stop, meta.shape, meta.chunk, meta.grid, strict=True)]
        for steps in product(*axes):
            shard, inner, into, out_of = zip(*steps, strict=True)
            number = 0
            for place, count in zip(inner, meta.grid, strict=True):
                number = number * count + place
            inside = by_shard.setdefault(shard, {})
            need = inside.get(number)
            if need is None:
                need = inside[number] = Need(number)
            need.parts.append((b, into, out_of))
    return by_shard


def numbers(meta: ArrayMeta, boxes: Sequence[Box]) -> dict[tuple[int, ...], dict[int, Need]]:
    """As `needs`, without what the boxes want of each chunk: for who works that out himself."""
    by_shard: dict[tuple[int, ...], dict[int, Need]] = {}
    for box in boxes:
        axes: list[list[tuple[int, list[int]]]] = []
        stride = 1
        steps = list(zip(box.start, box.stop, meta.shape, meta.chunk, meta.grid, strict=True))
        for start, stop, extent, chunk, grid in reversed(steps):
            low, high = max(0, start), min(extent, stop)
            along: dict[int, list[int]] = {}
            for at in range(low // chunk, -(-high // chunk)) if low < high else ():
                along.setdefault(at // grid, []).append(at % grid * stride)
            axes.append(list(along.items()))
            stride *= grid
        for pick in product(*reversed(axes)):
            places = [0]
            for _, along_axis in pick:
                places = [place + step for place in places for step in along_axis]
            inside = by_shard.setdefault(tuple(shard for shard, _ in pick), {})
            inside.update((place, Need(place)) for place in places)
    return by_shard


def _steps(start: int, stop: int, extent: int, chunk: int, grid: int) -> list[tuple[int, int, slice, slice]]:
    """Along one axis the chunks that a box meets: shard, place in the shard, voxels of the box, voxels of the chunk."""
    low, high = max(0, start), min(extent, stop)
    steps = []
    for at in range(low // chunk, -(-high // chunk)) if low < high else ():
        a, b = max(low, at * chunk), min(high, at * chunk + chunk)
        steps.append((at // grid, at % grid, slice(a - start, b - start), slice(a - at * chunk, b - at * chunk)))
    return steps


def shards(meta: ArrayMeta, box: Box) -> list[tuple[int, ...]]:
    """Positions of the shards that hold any voxel of the box."""
    spans = []
    for start, stop, extent, shard in zip(box.start, box.stop, meta.shape, meta.shard, strict=True):
        low, high = max(0, start), min(extent, stop)
        spans.append(range(low // shard, -(-high // shard)) if low < high else range(0))
    return list(product(*spans))


def merge(chunks: Iterable[Need], index: Index, *, gap: int = GAP, most: int = MOST) -> list[Range]:
    """Ranges of one shard that together hold exactly the wanted chunks and gaps of at most `gap` bytes between them.

    Args:
        chunks: Chunks that are present in the index.
        index: (chunks, 2) offsets and lengths.
        gap: Two chunks this close are fetched by one request.
        most: A range is not grown beyond this many bytes.
    """
    needed = list(chunks)
    places = index[[need.number for need in needed]].tolist() if needed else []
    placed = sorted(((offset, length, n) for (offset, length), n in zip(places, needed, strict=True)), key=_PLACE)
    ranges: list[Range] = []
    members: list[tuple[Need, int, int]] = []
    start = stop = 0
    for offset, length, need in placed:
        end = offset + length
        if members and (offset - stop > gap or (end if end > stop else stop) - start > most):
            ranges.append(Range(start, stop, tuple(members)))
            members = []
        if not members:
            start = stop = offset
        members.append((need, offset, end))
        if end > stop:
            stop = end
    if members:
        ranges.append(Range(start, stop, tuple(members)))
    return ranges


def plan(
    meta: ArrayMeta,
    boxes: Sequence[Box],
    indexes: Mapping[tuple[int, ...], Index],
    *,
    gap: int = GAP,
    most: int = MOST,
) -> dict[tuple[int, ...], list[Range]]:
    """The ranges of every shard that the boxes need, given the shards' indexes."""
    return {
        shard: merge(chunks.values(), indexes[shard], gap=gap, most=most)
        for shard, chunks in needs(meta, boxes).items()
    }


def overlap(
    box: Box, origin: Sequence[int], chunk: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a block's voxels go: (slices of the box's array, slices of the block), none beyond the array.

    Args:
        origin, chunk: The block's first voxel and extent.
        shape: Extent of the array.
    """
    into: list[slice] = []
    out_of: list[slice] = []
    for start, stop, o, c, extent in zip(box.start, box.stop, origin, chunk, shape, strict=True):
        low, high = max(start, o), min(stop, o + c, extent)
        into.append(slice(low - start, high - start))
        out_of.append(slice(low - o, high - o))
    return tuple(into), tuple(out_of)
