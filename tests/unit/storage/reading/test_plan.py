"""The read plan: exactly the chunks that are needed, in ranges that hold exactly them and small gaps."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.format.shard_index import curve_order
from storage.format.zarr_metadata import ArrayMeta, default_meta
from storage.reading.plan import Box, Need, merge, needs, numbers, overlap, plan


@st.composite
def metas(draw: st.DrawFn) -> ArrayMeta:
    ndim = draw(st.integers(1, 4))
    chunk = tuple(draw(st.integers(1, 5)) for _ in range(ndim))
    shard = tuple(c * draw(st.integers(1, 3)) for c in chunk)
    shape = tuple(draw(st.integers(1, 14)) for _ in range(ndim))
    return default_meta(shape, shard, chunk, np.dtype("i2"))


@st.composite
def boxes_in(draw: st.DrawFn, meta: ArrayMeta) -> list[Box]:
    out = []
    for _ in range(draw(st.integers(1, 3))):
        start = tuple(draw(st.integers(-4, n + 4)) for n in meta.shape)
        out.append(Box(start, tuple(a + draw(st.integers(1, 9)) for a in start)))
    return out


@settings(deadline=None)
@given(st.data())
def test_needs_are_exactly_the_chunks_with_a_wanted_voxel(data: st.DataObject) -> None:
    meta = data.draw(metas())
    boxes = data.draw(boxes_in(meta))
    expected: dict[tuple[int, ...], dict[int, set[int]]] = {}
    for voxel in product(*(range(n) for n in meta.shape)):
        for b, box in enumerate(boxes):
            if all(lo <= x < hi for lo, x, hi in zip(box.start, voxel, box.stop, strict=True)):
                shard = tuple(x // s for x, s in zip(voxel, meta.shard, strict=True))
                inner = tuple(x % s // c for x, s, c in zip(voxel, meta.shard, meta.chunk, strict=True))
                number = int(np.ravel_multi_index(inner, meta.grid))
                expected.setdefault(shard, {}).setdefault(number, set()).add(b)
    found = {
        shard: {number: {b for b, _, _ in need.parts} for number, need in inside.items()}
        for shard, inside in needs(meta, boxes).items()
    }
    assert found == expected
    bare = {shard: {n: need.number for n, need in inside.items()} for shard, inside in numbers(meta, boxes).items()}
    assert bare == {shard: {n: n for n in inside} for shard, inside in expected.items()}


@settings(deadline=None)
@given(st.data())
def test_chunks_fill_a_box_exactly_once(data: st.DataObject) -> None:
    meta = data.draw(metas())
    box = data.draw(boxes_in(meta))[0]
    array = np.arange(math.prod(meta.shape)).reshape(meta.shape)
    out = np.full([b - a for a, b in zip(box.start, box.stop, strict=True)], -1)
    for shard, inside in needs(meta, [box]).items():
        for need in inside.values():
            ((_, into, out_of),) = need.parts
            inner = np.unravel_index(need.number, meta.grid)
            origin = [(s * g + int(i)) * c for s, g, i, c in zip(shard, meta.grid, inner, meta.chunk, strict=True)]
            assert (into, out_of) == overlap(box, origin, meta.chunk, meta.shape)
            piece = np.full(meta.chunk, -7)
            part = array[tuple(slice(o, o + c) for o, c in zip(origin, meta.chunk, strict=True))]
            piece[tuple(slice(0, n) for n in part.shape)] = part
            assert (out[into] == -1).all(), "no voxel twice"
            out[into] = piece[out_of]
    for place in np.ndindex(*out.shape):
        voxel = tuple(a + p for a, p in zip(box.start, place, strict=True))
        inside_array = all(0 <= v < n for v, n in zip(voxel, meta.shape, strict=True))
        assert out[place] == (array[voxel] if inside_array else -1)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    seed=st.integers(0, 2**32 - 1),
    gap=st.integers(0, 60),
    most=st.integers(1, 200),
)
def test_ranges_cover_exactly_the_wanted_chunks(lengths: list[int], seed: int, gap: int, most: int) -> None:
    generator = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1] + np.cumsum(generator.integers(0, 3, len(lengths)))
    index = np.stack([offsets, lengths], axis=1)[generator.permutation(len(lengths))]
    wanted = [Need(int(n)) for n in np.flatnonzero(generator.random(len(lengths)) < 0.5)]
    ranges = merge(wanted, index, gap=gap, most=most)

    assert sorted(need.number for r in ranges for need, _, _ in r.chunks) == [need.number for need in wanted]
    needed = set()
    for need in wanted:
        needed |= set(range(index[need.number, 0], index[need.number].sum()))
    fetched: list[int] = []
    for r in ranges:
        fetched += range(r.start, r.stop)
        assert r.start == r.chunks[0][1]
        assert r.stop == r.chunks[-1][2]
        assert r.stop - r.start <= most or len(r.chunks) == 1
        for need, start, stop in r.chunks:
            assert (start, stop - start) == tuple(index[need.number])
            assert r.start <= start < stop <= r.stop
        for (_, _, before), (_, after, _) in zip(r.chunks, r.chunks[1:], strict=False):
            assert 0 <= after - before <= gap
    assert len(fetched) == len(set(fetched)), "no byte twice"
    assert needed <= set(fetched)
    if gap == 0:
        assert needed == set(fetched)


def test_merging_stops_at_the_gap_and_at_the_size() -> None:
    index = np.array([[0, 10], [10, 10], [25, 10], [35, 10]])
    wanted = [Need(n) for n in (3, 0, 1, 2)]

    def bounds(gap: int, most: int) -> list[tuple[int, int]]:
        return [(r.start, r.stop) for r in merge(wanted, index, gap=gap, most=most)]

    assert bounds(4, 100) == [(0, 20), (25, 45)]
    assert bounds(5, 100) == [(0, 45)]
    assert bounds(5, 20) == [(0, 20), (25, 45)]
    assert bounds(5, 1) == [(0, 10), (10, 20), (25, 35), (35, 45)]


def test_crops_take_few_ranges_along_the_curve() -> None:
    meta = default_meta((1, 256, 256, 256), (1, 256, 256, 256), (1, 32, 32, 32), np.dtype("i2"))
    index = np.empty((512, 2), np.int64)
    index[curve_order(meta.grid), 0], index[:, 1] = np.arange(512) * 20_000, 20_000
    generator = np.random.default_rng(0)
    counts = []
    for _ in range(50):
        start = (0, *(int(n) for n in generator.integers(0, 161, 3)))
        box = Box(start, (1, *(n + 96 for n in start[1:])))
        counts.append(len(plan(meta, [box], {(0, 0, 0, 0): index}, gap=0)[0, 0, 0, 0]))
    assert np.mean(counts) < 15


@pytest.mark.parametrize("grid", [(1, 4, 4, 4), (8, 8, 8), (2, 3, 5), (1, 1, 1), (1, 1, 1, 7), (3, 10, 10, 8), (2, 5)])
def test_the_curve_is_a_permutation(grid: tuple[int, ...]) -> None:
    assert sorted(curve_order(grid)) == list(range(math.prod(grid)))


@pytest.mark.parametrize("edge", [2, 4, 8])
def test_the_curve_steps_to_neighbours_in_a_cube(edge: int) -> None:
    points = np.stack(np.unravel_index(curve_order((edge,) * 3), (edge,) * 3), axis=1)
    assert (np.abs(np.diff(points, axis=0)).sum(axis=1) == 1).all()


def test_channels_of_a_place_adjoin() -> None:
    order = curve_order((3, 2, 2, 2))
    assert ((order[0::3] + 8 == order[1::3]) & (order[1::3] + 8 == order[2::3])).all()
