"""The same physical points in two views, and in feature maps made of them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ssl_core.methods.parts.points import _gathered, sample_features, shared_points, to_volume
from ssl_core.networks.backbone import Level
from ssl_core.views.augment import elastic
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import RoleSpec, View, ViewSpec
from tests.kit.crops import AS_STORED, coordinates
from tests.oracles import alignment as oracle

LARGE = torch.full((1, 3), 1000.0)  # volumes without a border in reach
IDENTITY = Level(3, (1, 1, 1), (0.5, 0.5, 0.5))


def _view(image_BCDHW, affine_B34):
    affine = torch.as_tensor(np.asarray(affine_B34), dtype=torch.float64)
    size = image_BCDHW.shape[2:]
    return View(image_BCDHW, affine, torch.zeros(len(affine), 3), torch.ones(len(affine), 1, *size))


def _box_view(low, high, flips, size, channels=1):
    """A view of the box [low, high), flipped where asked, from the equations."""
    low, high, size = np.array(low, float), np.array(high, float), np.array(size)
    sign = np.where(flips, -1.0, 1.0)
    affine = np.concatenate([np.diag(sign * (high - low) / size), np.where(flips, high, low)[:, None]], 1)
    return _view(torch.zeros(1, channels, *size), affine[None])


def _random_boxes(rng):
    boxes, flips, sizes = [], [], []
    for _ in range(2):
        low = rng.uniform(0, 8, 3)
        boxes.append((low, low + rng.uniform(5, 14, 3)))
        flips.append(rng.random(3) < 0.5)
        sizes.append(tuple(int(n) for n in rng.integers(4, 9, 3)))
    return boxes, flips, sizes


def test_shared_points_match_the_reference():
    rng = np.random.default_rng(0)
    for _ in range(40):
        boxes, flips, sizes = _random_boxes(rng)
        views = [_box_view(*boxes[i], flips[i], sizes[i]) for i in range(2)]
        expected = oracle.shared_points(boxes, flips, sizes, (2, 3, 4))
        a, b, valid = shared_points(*views, (2, 3, 4), LARGE)
        if expected is None:
            assert not valid.any()
            continue
        assert valid.all()
        assert np.allclose(a[0].numpy(), expected[0], atol=1e-12)
        assert np.allclose(b[0].numpy(), expected[1], atol=1e-12)
        # Seen from the other side the same pairs come out.
        b_again, a_again, _ = shared_points(views[1], views[0], (2, 3, 4), LARGE)
        assert torch.equal(a, a_again)
        assert torch.equal(b, b_again)


def test_sampled_features_match_the_reference():
    rng = np.random.default_rng(1)
    feature = torch.from_numpy(rng.normal(size=(2, 5, 4, 6, 3)))
    level = Level(5, (4, 2, 8), (0.5, 1.0, 4.0))
    points = torch.from_numpy(rng.uniform(-2, 20, (2, 60, 3)))
    values, inside = sample_features(feature, level, points)
    assert values.shape == (2, 60, 5)
    assert inside.any()
    assert not inside.all()
    for b in range(2):
        for m in range(60):
            k = (points[b, m].numpy() - level.offset_DHW) / level.stride_DHW
            expected = oracle.trilinear(feature[b].numpy(), k)
            assert bool(inside[b, m]) == (not np.isnan(expected).any())
            if inside[b, m]:
                assert np.allclose(values[b, m].numpy(), expected, atol=1e-10)


ROLES = [
    RoleSpec("a", 2, (12, 20, 16), scale=(0.7, 1.4), flip=(0.5, 0.5, 0.5), min_overlap=0.1, intensity="none"),
    RoleSpec("a", 2, (12, 20, 16), scale=(0.8, 1.2), flip=(0.5, 0.5, 0.5), scale_depth=True, rotate_degrees=30,
             min_overlap=0.1, intensity="none"),
    RoleSpec("a", 2, (12, 20, 16), scale=(0.8, 1.2), flip=(0.5, 0.5, 0.5), scale_depth=True, rotate_degrees=20,
             min_overlap=0.1, intensity="none", tilt_degrees=12, stretch=0.1),
]  # fmt: skip


@pytest.mark.parametrize("role", ROLES, ids=["boxes", "rotated", "tilted"])
def test_coordinate_volumes_coincide(role):
    """Over 60 random pairs: what the two views show at the shared points is one place."""
    spec = ViewSpec((role,))
    batch = coordinates(spec, 60, spacing=(3.0, 1.1, 0.9))
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
        a, b = make_views(batch, spec, seed=5, policy=AS_STORED, dtype=dtype).roles["a"]
        points_a, points_b, valid = shared_points(a, b, (4, 5, 6), torch.from_numpy(batch.shape_B3))
        seen_a, in_a = sample_features(a.image_BCDHW, IDENTITY, points_a)
        seen_b, in_b = sample_features(b.image_BCDHW, IDENTITY, points_b)
        place = to_volume(a, points_a)
        low = torch.from_numpy(batch.start_B3)[:, None] + 1.5
        high = low + torch.tensor(host_size(spec)) - 3
        keep = valid & in_a & in_b & ((place > low) & (place < high)).all(-1)
        assert keep.any(1).float().mean() > 0.95
        assert keep.float().mean() > 0.3
        assert (seen_a - seen_b)[keep].abs().max() < tolerance
        assert (seen_a - place)[keep].abs().max() < tolerance


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(("taps", "miss"), [(3, 1), (2, 0)])
def test_a_ramp_through_a_strided_skeleton(axis, depth, taps, miss):
    """A plain and a flipped view of one ramp agree with the right offset; the cell's middle misses by 2^J - 1."""
    size = [4, 4, 4]
    size[axis] = 128
    flips = np.arange(3) == axis
    ramp = np.broadcast_to((np.arange(128) + 0.5).reshape([-1 if i == axis else 1 for i in range(3)]), size)[None]
    maps = [oracle.averaging_encoder(x, axis, depth, taps) for x in (ramp, np.flip(ramp, axis + 1))]
    views = [_box_view((0, 0, 0), size, flips & on, size) for on in (False, True)]
    points = shared_points(*views, tuple(128 if i == axis else 2 for i in range(3)), LARGE)
    stride = 2**depth

    def mismatch(offset):
        level = Level(
            1,
            tuple(stride if i == axis else 1 for i in range(3)),
            tuple(offset if i == axis else 0.5 for i in range(3)),
        )
        pairs = zip(maps, points[:2], strict=True)
        values = [sample_features(torch.from_numpy(m[None].copy()), level, p) for m, p in pairs]
        keep = values[0][1] & values[1][1]
        assert keep.sum() > 50
        return (values[0][0] - values[1][0])[keep].abs()

    right, middle = (0.5 if taps == 3 else stride / 2), stride / 2
    assert mismatch(right).max() < 1e-9
    assert mismatch(middle).mean() == pytest.approx(miss * (stride - 1), abs=1e-9)


def test_random_views_through_a_strided_skeleton_coincide():
    role = ROLES[1]
    spec = ViewSpec((role,))
    batch = coordinates(spec, 20)
    pair = make_views(batch, spec, seed=1, policy=AS_STORED, dtype=torch.float64).roles["a"]
    points_a, points_b, valid = shared_points(*pair, (4, 4, 4), LARGE)
    values = []
    for view, points in zip(pair, (points_a, points_b), strict=True):
        # The exact coordinates, without the repeated border of the crop, so that the map is linear everywhere.
        axes = [torch.arange(n, dtype=torch.float64) + 0.5 for n in view.size_DHW]
        centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3).expand(20, -1, -1)
        image = to_volume(view, centres).transpose(1, 2).reshape(20, 3, *view.size_DHW)
        feature = np.stack([
            oracle.averaging_encoder(oracle.averaging_encoder(oracle.averaging_encoder(x, 0, 2, 3), 1, 2, 3), 2, 2, 3)
            for x in image.numpy()
        ])  # fmt: skip
        values.append(sample_features(torch.from_numpy(feature), Level(3, (4, 4, 4), (0.5, 0.5, 0.5)), points))
    keep = valid & values[0][1] & values[1][1]
    assert keep.sum() > 100
    assert (values[0][0] - values[1][0])[keep].abs().max() < 1e-9


def test_flipping_a_view_and_its_geometry_changes_nothing():
    rng = np.random.default_rng(2)
    boxes, flips, _ = _random_boxes(rng)
    size = (8, 12, 16)
    image = torch.from_numpy(rng.normal(size=(1, 2, *size)))
    plain, other = _box_view(*boxes[0], flips[0], size, 2), _box_view(*boxes[1], flips[1], (6, 6, 6))
    turned = _box_view(*boxes[0], ~flips[0], size, 2)
    level = Level(2, (2, 2, 2), (1.0, 1.0, 1.0))
    results = []
    for view, pixels in ((plain, image), (turned, image.flip(2, 3, 4))):
        points, _, valid = shared_points(view, other, (3, 3, 3), LARGE)
        values, inside = sample_features(functional.avg_pool3d(pixels, 2), level, points)
        results.append((values[valid & inside], (valid & inside).sum()))
    assert results[0][1] > 0
    assert torch.allclose(results[0][0], results[1][0], atol=1e-12)


@pytest.mark.parametrize("flip", [False, True])
def test_padding_is_not_compared(flip):
    """Of two views that hang over both ends of a volume of 6 x 8 x 8, points lie in the volume only, and fill it."""
    shape = torch.tensor([[6.0, 8.0, 8.0]])
    a = _box_view((-3, 0, 0), (5, 8, 8), (flip, False, False), (8, 8, 8))
    b = _box_view((1, 0, 0), (9, 8, 8), (False,) * 3, (8, 8, 8))
    points_a, points_b, valid = shared_points(a, b, (8, 1, 1), shape)
    place = to_volume(a, points_a)[0, :, 0]
    assert valid.all()
    assert np.allclose(place.numpy(), 1 + 4 * (np.arange(8) + 0.5) / 8)
    assert torch.equal(place, to_volume(b, points_b)[0, :, 0])
    low = shared_points(a, _box_view((-4, 0, 0), (4, 8, 8), (False,) * 3, (8, 8, 8)), (4, 1, 1), shape)
    assert np.allclose(to_volume(a, low[0])[0, :, 0].numpy(), np.arange(4) + 0.5)
    beyond = _box_view((6, 0, 0), (9, 8, 8), (False,) * 3, (8, 8, 8))
    assert not shared_points(beyond, beyond, (2, 2, 2), shape)[2].any()


def test_no_shared_region_is_masked_and_finite():
    a, b = (_box_view((z, 0, 0), (z + 4, 4, 4), (False,) * 3, (4, 4, 4)) for z in (0, 9))
    points_a, points_b, valid = shared_points(a, b, (2, 2, 2), LARGE)
    assert not valid.any()
    for points in (points_a, points_b):
        values, _ = sample_features(torch.randn(1, 3, 2, 2, 2), Level(3, (2, 2, 2), (1.0, 1.0, 1.0)), points)
        assert torch.isfinite(values).all()


def test_half_precision_features_are_sampled_in_float32_and_give_gradients():
    feature = torch.randn(1, 4, 8, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    points = torch.rand(1, 30, 3, dtype=torch.float64) * 16
    level = Level(4, (2, 2, 2), (1.0, 1.0, 1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, _ = sample_features(feature, level, points)
    assert values.dtype == torch.float32
    assert torch.equal(values, sample_features(feature.float(), level, points)[0])
    values.sum().backward()
    assert feature.grad is not None
    assert feature.grad.abs().sum() > 0


def test_the_deterministic_path_is_the_same_function():
    feature = torch.randn(2, 3, 4, 5, 1, dtype=torch.float64, requires_grad=True)
    level = Level(3, (2, 2, 2), (1.0, 0.5, 1.0))
    points = torch.rand(2, 50, 3, dtype=torch.float64) * 12 - 1
    values, _ = sample_features(feature, level, points)
    k = (points - torch.tensor(level.offset_DHW, dtype=torch.float64)) / 2
    gathered = _gathered(feature, k)
    weight = torch.randn_like(values)
    assert torch.allclose(gathered, values, atol=1e-12)
    grads = [torch.autograd.grad((v * weight).sum(), feature)[0] for v in (values, gathered)]
    assert torch.allclose(*grads, atol=1e-12)


def test_elastic_views_share_points():
    role = RoleSpec("a", 2, (14, 18, 16), flip=(0.5, 0.5, 0.5), elastic_vox=1.5, min_overlap=0.3, intensity="none")
    spec = ViewSpec((role,))
    a, b = make_views(coordinates(spec, 10), spec, seed=0, policy=AS_STORED, dtype=torch.float64).roles["a"]
    points_a, points_b, valid = shared_points(a, b, (4, 4, 4), LARGE)
    assert valid.float().mean() > 0.5
    gap = (to_volume(a, points_a) - to_volume(b, points_b)).abs()
    assert gap[valid].max() < 1e-6


@pytest.mark.parametrize("largest", [0.3, 1.5, 6.0])
def test_no_deformation_folds(largest):
    """Also not one whose control points are as far apart as they may be: slopes add up to one half at most."""
    spacing = elastic.spacing_vox(largest)
    control = torch.from_numpy(np.random.default_rng(0).choice([-largest, largest], (64, 3, 6, 6, 6)))
    points = torch.rand(64, 200, 3, dtype=torch.float64) * 3 * spacing
    here = elastic.displacement(control, points, spacing)
    slopes = []
    for axis in range(3):
        step = 1e-4 * spacing * torch.eye(3, dtype=torch.float64)[axis]
        slopes.append((elastic.displacement(control, points + step, spacing) - here) / (1e-4 * spacing))
    assert 0.1 * largest / spacing < torch.stack(slopes).abs().sum(0).max() <= 0.5


def ramp_view(size: int, flip: bool, start: float) -> View:
    """A view along W whose intensities are the volume's own W coordinate."""
    centre = torch.arange(size, dtype=torch.float64) + 0.5
    position = start + (size - centre if flip else centre)
    to_volume = torch.eye(3, 4, dtype=torch.float64)[None].clone()
    if flip:
        to_volume[0, 2, 2] = -1.0
    to_volume[0, 2, 3] = start + (size if flip else 0.0)
    image = position.expand(1, 1, 8, 8, size)
    return View(image, to_volume, torch.full((1, 3), 0.5).double(), torch.ones_like(image))


def skeleton(image: torch.Tensor, halvings: int, kernel: int, padding: int) -> torch.Tensor:
    """Averaging kernels along W, the ramp continued linearly beyond the borders."""
    x = image
    for _ in range(halvings):
        if padding:
            x = torch.cat([2 * x[..., :1] - x[..., 1:2], x, 2 * x[..., -1:] - x[..., -2:-1]], dim=-1)
        x = nn.functional.avg_pool3d(x, (1, 1, kernel), (1, 1, 2))
    return x


@pytest.mark.parametrize(("kernel", "padding", "shift"), [(3, 1, [1, 3, 7, 15]), (2, 0, [0, 0, 0, 0])])
@pytest.mark.parametrize("halvings", [1, 2, 3, 4])
def test_flipped_views_register_with_the_measured_centre_and_not_without(
    kernel: int, padding: int, shift: list[int], halvings: int
) -> None:
    stride = 2**halvings
    views = ramp_view(128, False, 0.0), ramp_view(128, True, 8.0)
    maps = [skeleton(v.image_BCDHW, halvings, kernel, padding) for v in views]
    points_a, points_b, shared = shared_points(*views, (1, 1, 16), torch.full((1, 3), 1000.0))

    def gap(offset: float) -> float:
        level = Level(1, (1, 1, stride), (0.5, 0.5, offset))
        (a, in_a), (b, in_b) = (sample_features(m, level, p) for m, p in zip(maps, (points_a, points_b), strict=True))
        return float((a - b).abs()[..., 0][shared & in_a & in_b].max())

    assert gap(0.5 if padding else stride / 2) < 1e-3
    assert gap(stride / 2) == pytest.approx(shift[halvings - 1], abs=1e-3)
