"""Dice, HD95 and NSD against pairwise distances written out, closed forms, and MONAI."""

import json
import math
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

from ssl_core.downstream.scores import METRICS, CaseScore, CaseSlice, Scores, dice, mean_scores, score_case, sd_scores
from storage.errors import ConfigError
from tests.kit.scores import scores

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
    surface = []
    for voxel in np.argwhere(mask):
        for axis, step in product(range(3), (-1, 1)):
            other = voxel.copy()
            other[axis] += step
            inside = all(0 <= o < n for o, n in zip(other, mask.shape, strict=True))
            if not inside or not mask[tuple(other)]:
                surface.append(voxel)
                break
    return np.array(surface)


def _brute(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> tuple[float, float, float]:
    """Dice, HD95 and NSD of all pairs of surface voxels."""
    p, q = _surface(a) * spacing, _surface(b) * spacing
    gap = np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))
    to_b, to_a = gap.min(1), gap.min(0)
    near = (to_b <= tolerance).sum() + (to_a <= tolerance).sum()
    far = max(np.quantile(to_b, 0.95), np.quantile(to_a, 0.95))
    return 2 * (a & b).sum() / (a.sum() + b.sum()), far, near / (len(to_b) + len(to_a))


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
    result, (overlap, far, near) = _one(a, b, spacing, 1.7), _brute(a, b, spacing, 1.7)
    assert result.dice == pytest.approx(overlap, abs=1e-12)
    assert result.hd95_mm == pytest.approx(far, rel=1e-9)
    assert result.nsd == pytest.approx(near, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_monais(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    a, b = _blob(rng, (10, 20, 24)), _blob(rng, (10, 20, 24))
    result = _one(a, b, SPACING, 2.0)
    x, y = (torch.from_numpy(np.pad(m, 1)[None, None].astype(np.float32)) for m in (a, b))
    far = compute_hausdorff_distance(x, y, include_background=True, percentile=95, spacing=list(SPACING))
    near = compute_surface_dice(x, y, [2.0], include_background=True, spacing=list(SPACING))
    assert result.dice == pytest.approx(compute_dice(x, y, include_background=True).item(), abs=1e-6)
    assert result.hd95_mm == pytest.approx(far.item(), rel=1e-5)
    assert result.nsd == pytest.approx(near.item(), abs=1e-6)


def test_a_shift_is_measured_in_mm_of_its_axis() -> None:
    cube = np.zeros((12, 12, 12), bool)
    cube[4:8, 4:8, 4:8] = True
    for axis, size in enumerate(SPACING):
        moved = np.roll(cube, 1, axis)
        result = _one(moved, cube, SPACING, size)
        assert result.hd95_mm == pytest.approx(size)
        assert result.nsd == 1.0
        assert result.dice == pytest.approx(0.75)
        assert _one(moved, cube, SPACING, 0.99 * size).nsd < 1


def test_perfect_empty_and_swapped() -> None:
    rng = np.random.default_rng(0)
    a, b, none = _blob(rng), _blob(rng), np.zeros((8, 9, 10), bool)
    for result in (_one(a, a, SPACING, 0.1), _one(none, none, SPACING, 1.0)):
        assert (result.dice, result.hd95_mm, result.nsd) == (1.0, 0.0, 1.0)
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
    by_label = score_case(np.where(truth == 1, 1, 0), truth, labels={1: "a", 7: "b", 9: "c"}, spacing_mm=(1, 1, 1))
    assert [by_label[name].dice for name in "abc"] == [1.0, 0.0, 1.0]
    with pytest.raises(ConfigError, match="shape"):
        score_case(truth[1:], truth, labels={1: "a"}, spacing_mm=(1, 1, 1))


def test_every_field_is_a_metric_with_a_heading_and_a_mean() -> None:
    assert [metric.name for metric in METRICS] == [field.name for field in fields(Scores)]
    headings = [metric.heading(1.5) for metric in METRICS]
    assert headings[:3] == ["Dice", "HD95 (mm)", "NSD (1.5 mm)"]
    assert len(set(headings)) == len(headings)
    cases = [CaseScore(f"v{d}", "s", "l", scores(dice=d)) for d in (0.2, 0.4)]
    assert mean_scores(cases).dice == pytest.approx(0.3)
    assert sd_scores(cases).dice == pytest.approx(0.1)
    assert sd_scores(cases).nsd == 0.0


def test_empty_masks_leave_every_metric_finite() -> None:
    """Every case stays in every mean."""
    full, none = np.ones((3, 4, 5), bool), np.zeros((3, 4, 5), bool)
    for a, b in product((full, none), repeat=2):
        result = _one(a, b, SPACING, 1.0)
        assert all(math.isfinite(result.of(metric)) for metric in METRICS)


def test_a_case_is_one_flat_object_and_comes_back() -> None:
    case = CaseScore("v", "s", "liver", scores(dice=0.5))
    assert list(case.to_json())[:6] == ["volume_id", "subject", "label", "dice", "hd95_mm", "nsd"]
    assert CaseScore.from_json(case.to_json()) == case


def test_the_slice_of_a_report_is_where_the_truth_is_largest_and_keeps_every_value() -> None:
    truth, prediction = np.zeros((3, 4, 5), np.int32), np.zeros((3, 4, 5), np.int32)
    truth[0, 0, :2], truth[2, :2, :3] = 1, 70_000
    prediction[2, 1, 1:], prediction[0] = 70_000, 1
    kept = CaseSlice.largest(prediction, truth)
    again = CaseSlice.from_json(json.loads(json.dumps(kept.to_json())))
    assert kept.at == again.at == 2
    assert np.array_equal(again.classes_HW, prediction[2])
