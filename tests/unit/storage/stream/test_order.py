import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import ConfigError
from storage.stream import order

SIZES = st.integers(1, 200)


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40), n=st.integers(1, 3000))
@settings(deadline=None, max_examples=60)
def test_perm_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    items = np.arange(n)
    found = order.permute(seed, np.full(n, epoch), n, items)
    assert sorted(found.tolist()) == items.tolist()
    at = n // 3
    assert order.perm(seed, epoch, n)(at) == found[at]


def test_perm_refuses_items_outside() -> None:
    with pytest.raises(IndexError):
        order.perm(0, 0, 5)(5)
    with pytest.raises(IndexError):
        order.perm(0, 0, 5)(-1)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_permutations_are_all_equally_likely(n: int) -> None:
    epochs = 6000
    epoch, item = np.repeat(np.arange(epochs), n), np.tile(np.arange(n), epochs)
    counts = Counter(map(tuple, order.permute(11, epoch, n, item).reshape(epochs, n).tolist()))
    expected = epochs / math.factorial(n)
    chi2 = sum((counts[p] - expected) ** 2 / expected for p in itertools.permutations(range(n)))
    dof = math.factorial(n) - 1
    assert chi2 < dof + 5 * math.sqrt(2 * dof), (chi2, dof)  # five standard deviations


def test_large_permutation_has_no_visible_structure() -> None:
    n = 100_000
    v = order.permute(5, np.zeros(n, np.int64), n, np.arange(n)).astype(float)
    for a, b in ((v, np.arange(n)), (v[1:], v[:-1]), (v, order.permute(5, np.ones(n, np.int64), n, np.arange(n)))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(n)
    # Positions of each tenth of the volumes spread over all tenths of the epoch.
    table, _, _ = np.histogram2d(v, np.arange(n), bins=10)
    chi2 = ((table - n / 100) ** 2 / (n / 100)).sum()
    assert chi2 < 81 + 5 * math.sqrt(2 * 81)


def test_first_order_of_a_million_volumes_costs_no_more_than_of_a_thousand() -> None:
    best = {1_000: math.inf, 1_000_000: math.inf}
    for seed in range(50):
        for n in best:  # in turns, so that a machine whose speed drifts slows both
            began = time.thread_time()
            order.places(np.arange(64), seed=seed, n=n, lanes=64, crops_per_visit=4)
            best[n] = min(best[n], time.thread_time() - began)
    assert best[1_000_000] < 3 * best[1_000]


@given(seed=st.integers(0, 99), n=SIZES, lanes=st.integers(1, 70), cuts=st.integers(1, 6))
@settings(deadline=None, max_examples=80)
def test_every_volume_is_visited_once_an_epoch(seed: int, n: int, lanes: int, cuts: int) -> None:
    epochs = 3
    # Far enough along every lane to finish the visits of three epochs.
    samples = np.arange(lanes * cuts * (epochs * n // lanes + 2))
    where = order.places(samples, seed=seed, n=n, lanes=lanes, crops_per_visit=cuts)
    visits = {
        (int(e), int(v), int(lane)): int(p)
        for e, v, lane, p in zip(where.epoch, where.visit, where.lane, where.position, strict=True)
    }
    for epoch in range(epochs):
        seen = Counter(p for (e, _, _), p in visits.items() if e == epoch)
        assert seen == Counter(range(n))


@given(seed=st.integers(0, 99), n=SIZES, lanes=st.integers(1, 70), cuts=st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_a_visit_cuts_one_volume_and_numbers_its_cuts(seed: int, n: int, lanes: int, cuts: int) -> None:
    where = order.places(np.arange(lanes * cuts * 5), seed=seed, n=n, lanes=lanes, crops_per_visit=cuts)
    for lane in range(lanes):
        mine = where.lane == lane
        visit, cut, position = where.visit[mine], where.cut[mine], where.position[mine]
        along = visit * cuts + cut
        assert (np.diff(along) == 1).all()
        assert 0 <= along[0] < cuts
        for j in set(visit.tolist()):
            assert len(set(position[visit == j].tolist())) == 1


def test_lanes_are_out_of_step_for_every_rank() -> None:
    for cuts in (2, 3, 4):
        for world in (1, 2, 4, 8):
            for rank in range(world):
                phases = order.phase(np.arange(rank, 256, world), cuts)
                counts = np.bincount(phases, minlength=cuts)
                assert counts.min() >= 256 / world / cuts * 0.4


def _crop_start(sample, *, shape, size, **arguments):  # type: ignore[no-untyped-def]
    centre = order.crop_centre(sample, shape=shape, **arguments)
    return order.crop_start(centre, shape=shape, size=size)


def test_the_order_is_pinned() -> None:
    # A change here makes resumed runs see other samples: it needs a new major version, not a new expectation.
    where = order.places(np.arange(8), seed=7, n=10, lanes=4, crops_per_visit=2)
    assert where.position.tolist() == PINNED_POSITIONS
    assert [
        _crop_start(i, seed=7, shape=(100, 90, 80), size=(16, 16, 100), box=((10, 20, 30), (60, 70, 80)))
        for i in range(3)
    ] == PINNED_STARTS


PINNED_POSITIONS = [9, 0, 1, 3, 9, 6, 8, 3]
PINNED_STARTS = [(43, 13, -10), (42, 23, -10), (7, 42, -10)]


@given(
    lanes=st.integers(1, 8),
    share=st.integers(1, 6),
    world=st.integers(1, 6),
    k=st.integers(0, 1000),
    at=st.integers(0, 99),
)
def test_ranks_share_a_batch_evenly_and_completely(lanes: int, share: int, world: int, k: int, at: int) -> None:
    lanes, batch = lanes * world, share * world
    first = at + k * batch
    parts = [order.owned(first, batch, lanes=lanes, rank=r, world=world) for r in range(world)]
    assert {len(part) for part in parts} == {share}
    assert sorted(np.concatenate(parts).tolist()) == list(range(first, first + batch))
    for rank, part in enumerate(parts):
        assert set((part % lanes % world).tolist()) == {rank}


def test_what_a_rank_does_for_its_share_is_flat_in_the_ranks() -> None:
    world = 10**12  # whose batch no memory holds
    assert order.owned(4 * world, 4 * world, lanes=world, rank=7, world=world).tolist() == [
        4 * world + 7,
        5 * world + 7,
        6 * world + 7,
        7 * world + 7,
    ]
    with pytest.raises(ConfigError, match="lanes"):
        order.owned(0, 6, lanes=4, rank=0, world=3)


@pytest.mark.parametrize(
    ("arguments", "thing", "words"),
    [
        ({"lanes": 64, "world": 3, "global_batch": 12}, "lanes", ["63 or 66", "1, 2, 4 workers"]),
        ({"lanes": 64, "world": 2, "global_batch": 7}, "global_batch", ["6 or 8", "with 1 worker"]),
        ({"lanes": 0}, "lanes", ["at least 1"]),
        ({"crops_per_visit": 0}, "crops_per_visit", ["at least 1"]),
        ({"rank": 1}, "rank", ["0 to 0"]),
        ({"seed": -1}, "seed", ["2**63 - 1"]),
    ],
)
def test_check_proposes_numbers(arguments: dict[str, int], thing: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        order.check(**{"seed": 0, "lanes": 64, "global_batch": 8, "crops_per_visit": 4, **arguments})
    assert caught.value.thing == thing
    for word in words:
        assert word in str(caught.value)


@given(
    sample=st.integers(0, 2**62),
    seed=st.integers(0, 2**63 - 1),
    shape=st.tuples(*[st.integers(1, 50)] * 3),
    size=st.tuples(*[st.integers(1, 50)] * 3),
    foreground=st.floats(0, 1),
    data=st.data(),
)
def test_a_crop_stays_inside_or_holds_the_axis_in_its_middle(sample, seed, shape, size, foreground, data) -> None:  # type: ignore[no-untyped-def]
    lo = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    hi = tuple(data.draw(st.integers(low + 1, n)) for low, n in zip(lo, shape, strict=True))
    start = _crop_start(sample, seed=seed, shape=shape, size=size, box=(lo, hi), foreground=foreground)
    for first, n, s in zip(start, shape, size, strict=True):
        if n >= s:
            assert 0 <= first <= n - s
        else:
            before, after = -first, first + s - n
            assert before >= 0
            assert abs(before - after) <= 1


def _centres(**arguments) -> np.ndarray:  # type: ignore[no-untyped-def]
    # One-voxel crops: the start is the centre.
    whole = {"seed": 3, "shape": (40, 40, 40), "size": (1, 1, 1), "box": ((5, 10, 20), (10, 30, 40))}
    return np.array([_crop_start(i, **{**whole, **arguments}) for i in range(4000)])


def test_foreground_probability_is_kept_and_draws_are_uniform() -> None:
    inside = _centres(foreground=1.0)
    assert (inside >= (5, 10, 20)).all()
    assert (inside < (10, 30, 40)).all()
    assert set(inside[:, 0].tolist()) == set(range(5, 10))
    anywhere = _centres(foreground=0.0)
    assert np.abs(anywhere.mean(0) - 19.5).max() < 1.0
    assert anywhere.min() == 0
    assert anywhere.max() == 39
    share = ((_centres(foreground=0.7) >= (5, 10, 20)) & (_centres(foreground=0.7) < (10, 30, 40))).all(1).mean()
    assert abs(share - (0.7 + 0.3 * 5 * 20 * 20 / 40**3)) < 0.03


def test_class_balance_draws_each_class_as_often() -> None:
    big, small = [(1, 1, i) for i in range(40)], [(2, 2, 2)]
    found = _centres(points=[big, small, []], class_balance=0.5, foreground=1.0)
    on_big, on_small = (found[:, 0] == 1).mean(), (found == (2, 2, 2)).all(1).mean()
    assert abs(on_big - 0.25) < 0.03
    assert abs(on_small - 0.25) < 0.03
    assert len(set(found[found[:, 0] == 1][:, 2].tolist())) == 40
    assert np.array_equal(_centres(points=[[]], class_balance=1.0), _centres())
