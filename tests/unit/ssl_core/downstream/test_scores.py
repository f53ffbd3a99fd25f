"""Dice, HD95 and NSD against pairwise distances written out, closed forms, and MONAI."""

from itertools import product

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

from ssl_core.downstream.scores import Scores, dice, score_case
from storage.errors import ConfigError

SPACING = (7.7, 1.25, 0.8)


def _blob(rng: np.random.Generator, shape: tuple[int, ...] = (8, 9, 10)) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    mask = np.zeros(shape, bool)
    for _ in range(3):
        centre, radius = rng.uniform(0, shape), rng.uniform(1, 4, 3)
        mask |= (((grid - centre) / radius) ** 2).sum(-1) < 1
    return mask


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with a face neighbour that is not in it, one by one."""
    found = []
    for voxel in np.argwhere(mask):
        for axis, step in product(range(3), (-1, 1)):
            other = voxel.copy()
            other[axis] += step
            inside = all(0 <= o < n for o, n in zip(other, mask.shape, strict=True))
            if not inside or not mask[tuple(other)]:
                found.append(voxel)
                break
    return np.array(found)


def _brute(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> Scores:
    """All pairs of surface voxels."""
    p, q = _surface(a) * spacing, _surface(b) * spacing
    gap = np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))
    there, back = gap.min(1), gap.min(0)
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    far = max(np.quantile(there, 0.95), np.quantile(back, 0.95))
    return Scores(2 * (a & b).sum() / (a.sum() + b.sum()), far, near / (len(there) + len(back)))


def _one(a: np.ndarray, b: np.ndarray, spacing: tuple[float, float, float], tolerance: float) -> Scores:
    return score_case(
        a.astype(int) * 3, b.astype(int) * 3, labels={3: "x"}, spacing_mm=spacing, tolerance_mm=tolerance
    )["x"]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING])
def test_scores_are_those_of_all_pairs(seed: int, spacing: tuple[float, float, float]) -> None:
    rng = np.random.default_rng(seed)
    a, b = _blob(rng), _blob(rng)
    if not a.any() or not b.any():
        pytest.fail("the test's own masks are empty")
    found, wanted = _one(a, b, spacing, 1.7), _brute(a, b, spacing, 1.7)
    assert found.dice == pytest.approx(wanted.dice, abs=1e-12)
    assert found.hd95_mm == pytest.approx(wanted.hd95_mm, rel=1e-9)
    assert found.nsd == pytest.approx(wanted.nsd, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_monais(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    a, b = _blob(rng, (10, 20, 24)), _blob(rng, (10, 20, 24))
    found = _one(a, b, SPACING, 2.0)
    x, y = (torch.from_numpy(np.pad(m, 1)[None, None].astype(np.float32)) for m in (a, b))
    far = compute_hausdorff_distance(x, y, include_background=True, percentile=95, spacing=list(SPACING))
    near = compute_surface_dice(x, y, [2.0], include_background=True, spacing=list(SPACING))
    assert found.dice == pytest.approx(compute_dice(x, y, include_background=True).item(), abs=1e-6)
    assert found.hd95_mm == pytest.approx(far.item(), rel=1e-5)
    assert found.nsd == pytest.approx(near.item(), abs=1e-6)


def test_a_shift_is_measured_in_mm_of_its_axis() -> None:
    cube = np.zeros((12, 12, 12), bool)
    cube[4:8, 4:8, 4:8] = True
    for axis, size in enumerate(SPACING):
        moved = np.roll(cube, 1, axis)
        found = _one(moved, cube, SPACING, size)
        assert found.hd95_mm == pytest.approx(size)
        assert found.nsd == 1.0
        assert found.dice == pytest.approx(0.75)
        assert _one(moved, cube, SPACING, 0.99 * size).nsd < 1


def test_perfect_empty_and_swapped() -> None:
    rng = np.random.default_rng(0)
    a, b, none = _blob(rng), _blob(rng), np.zeros((8, 9, 10), bool)
    assert _one(a, a, SPACING, 0.1) == Scores(1.0, 0.0, 1.0)
    assert _one(none, none, SPACING, 1.0) == Scores(1.0, 0.0, 1.0)
    diagonal = np.linalg.norm(np.multiply((8, 9, 10), SPACING))
    for pair in ((a, none), (none, a)):
        worst = _one(*pair, SPACING, 1.0)
        assert (worst.dice, worst.nsd) == (0.0, 0.0)
        assert worst.hd95_mm == pytest.approx(diagonal)
    assert _one(a, b, SPACING, 1.0) == _one(b, a, SPACING, 1.0)
    assert dice(none, none) == 1.0


def test_each_label_has_its_own_scores() -> None:
    truth = np.zeros((6, 6, 6), int)
    truth[1:3], truth[3:5] = 1, 7
    found = score_case(np.where(truth == 1, 1, 0), truth, labels={1: "a", 7: "b", 9: "c"}, spacing_mm=(1, 1, 1))
    assert [found[name].dice for name in "abc"] == [1.0, 0.0, 1.0]
    with pytest.raises(ConfigError, match="shape"):
        score_case(truth[1:], truth, labels={1: "a"}, spacing_mm=(1, 1, 1))
