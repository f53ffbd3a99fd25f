import numpy as np
import pytest

from ssl_core.views import box_forms
from ssl_core.views.box_forms import concentric
from ssl_core.views.boxes import Boxes, iou, overlap_less
from ssl_core.views.placement import draw
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import RoleSpec, ViewSpec
from storage.errors import ConfigError

N = 300


def _draw(*roles, seed=0, shape=(200, 200, 200), start=None, samples=None, spacing=(1.0, 1.0, 1.0), grow=0):
    spec = ViewSpec(tuple(roles))
    host = tuple(n + grow for n in host_size(spec))
    samples = np.arange(N) if samples is None else samples
    count = len(samples)
    start = np.full((count, 3), 40) if start is None else start
    shape, spacing = np.tile(shape, (count, 1)), np.tile(spacing, (count, 1))
    maps = draw(spec, seed=seed, sample_B=samples, start_B3=start, host_DHW=host, shape_B3=shape, spacing_B3=spacing)
    return maps, start, np.array(host)


def _box(affine, size):
    """Bounding corners of every view, from its eight corners."""
    corners = np.array(np.meshgrid(*[(0, n) for n in size], indexing="ij")).reshape(3, 8)
    points = affine[..., :3] @ corners + affine[..., 3:]
    return points.min(-1), points.max(-1)


def _as_boxes(affine, size):
    return Boxes(size, np.abs(affine[:, :, :3]), _box(affine, size)[0])


PGL = RoleSpec("pair", 2, (16, 24, 24), scale=(0.8, 1.3), flip=(0.5, 0.5, 0.5), min_overlap=0.3)


@pytest.mark.parametrize(
    "roles",
    [
        (PGL,),
        (RoleSpec("free", 3, (8, 12, 10), scale=(0.5, 1.5), scale_depth=True),),
        (RoleSpec("turned", 2, (8, 24, 16), scale=(0.9, 1.1), rotate_degrees=30, min_overlap=0.4),),
        (RoleSpec("near", 4, (5, 20, 20), scale=(0.8, 1.2), flip=(0, 0.5, 0.5), offset_vox=(1, 3)),),
        (PGL, RoleSpec("local", 6, (8, 8, 8), scale=(0.5, 1.5), overlaps="pair", inside_union=True)),
        (PGL, RoleSpec("other", 2, (16, 24, 20), scale=(0.8, 1.3), overlaps="pair", min_overlap=0.5)),
        (RoleSpec("wavy", 2, (8, 24, 24), scale=(0.8, 1.2), rotate_degrees=10, elastic_vox=2.0),),
        (RoleSpec("tilted", 2, (8, 24, 16), scale=(0.9, 1.2), rotate_degrees=30, elastic_vox=1, tilt_degrees=25),),
    ],
)
def test_boxes_lie_in_the_host_crop_and_in_the_volume(roles):
    maps, start, host = _draw(*roles)
    for role in roles:
        assert maps[role.name].shape == (role.count, N, 3, 4)
        low, high = _box(maps[role.name], role.size_DHW)
        margin = box_forms.elastic_margin(role)
        assert (low >= start + margin - 1e-9).all()
        assert (high <= start + host - margin + 1e-9).all()
    # A crop that hangs over the border by less than the room it gives: boxes stay in the volume.
    plain = RoleSpec("a", 2, (10, 10, 10))
    maps, _, host = _draw(plain, start=np.full((N, 3), -4), shape=(60, 60, 60))
    assert (_box(maps["a"], plain.size_DHW)[0] >= 0).all()
    maps, _, host = _draw(plain, start=np.tile(60 - host + 4, (N, 1)), shape=(60, 60, 60))
    assert (_box(maps["a"], plain.size_DHW)[1] <= 60).all()


def test_a_box_larger_than_the_volume_covers_it():
    role = RoleSpec("a", 2, (40, 56, 40))
    host = np.array(host_size(ViewSpec((role,))))
    shape = np.array([35, 50, 36])
    start = np.tile((shape - host) // 2, (N, 1))
    maps, _, _ = _draw(role, shape=shape, start=start)
    low, high = _box(maps["a"], role.size_DHW)
    assert (low <= 0).all()
    assert (high >= shape).all()
    assert len(np.unique(low.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("overlap", [0.05, 0.1, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize(("turn", "tilt"), [(0.0, 0.0), (20.0, 0.0), (20.0, 15.0)])
def test_overlap_is_met_by_every_pair(overlap, turn, tilt):
    size, scale = (12, 20, 16), (0.7, 1.2)
    role = RoleSpec("a", 3, size, scale, rotate_degrees=turn, min_overlap=overlap, tilt_degrees=tilt, stretch=tilt / 99)
    maps, _, _ = _draw(role, samples=np.arange(60), grow=20)
    boxes = [Boxes(role.size_DHW, m[:, :, :3], _box(m, role.size_DHW)[0]) for m in maps["a"]]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert iou(boxes[i], boxes[j]).min() >= overlap - 1e-9


def test_overlap_with_another_role_is_met_and_the_fallback_is_reached():
    first = RoleSpec("a", 1, (12, 20, 16), scale=(0.7, 1.3))
    second = RoleSpec("b", 2, (12, 20, 18), scale=(0.6, 1.5), overlaps="a", min_overlap=0.85)
    maps, _, _ = _draw(first, second, grow=10)
    anchor = _as_boxes(maps["a"][0], first.size_DHW)
    ious = np.stack([iou(_as_boxes(m, second.size_DHW), anchor) for m in maps["b"]])
    assert ious.min() >= 0.85
    centre = [box.low_B3 + box.extent_B3 / 2 for box in (_as_boxes(maps["b"][0], second.size_DHW), anchor)]
    assert (np.abs(centre[0] - centre[1]).max(1) < 1e-9).any(), (
        "no sample needed the fallback: a weaker test than meant"
    )


@pytest.mark.parametrize("tilt", [0.0, 0.7])
def test_iou_of_rotated_boxes_against_counting(tilt):
    rng = np.random.default_rng(0)
    role = RoleSpec("a", 1, (6, 20, 12), scale=(0.7, 1.4), rotate_degrees=60)
    for _ in range(6):
        spacing = rng.uniform(0.8, 1.3, (1, 3))
        pair = []
        for _ in range(2):
            sides, angles = rng.uniform(0.7, 1.4, (1, 3)), rng.uniform(-1, 1, (1, 3)) * [1, tilt, tilt]
            linear = box_forms.linear_map(sides, angles, spacing)
            pair.append(Boxes(role.size_DHW, linear, rng.uniform(0, 6, (1, 3))))
        low = np.minimum(pair[0].low_B3, pair[1].low_B3)[0]
        high = np.maximum(*(box.low_B3 + box.extent_B3 for box in pair))[0]
        points = rng.uniform(low, high, (200_000, 3))
        hit = []
        for box in pair:
            relative = (points - box.centre_B3) @ np.linalg.inv(box.linear_B33[0]).T
            hit.append((np.abs(relative) <= np.array(role.size_DHW) / 2).all(1))
        counted = (hit[0] & hit[1]).sum() / (hit[0] | hit[1]).sum()
        assert iou(*pair)[0] == pytest.approx(counted, abs=0.01)


@pytest.mark.parametrize("tilt", [0.0, 0.7])
def test_less_overlap_is_seen_without_working_all_out(tilt):
    rng = np.random.default_rng(1)
    pair = []
    for size in ((6, 20, 12), (8, 8, 8)):
        angles = rng.uniform(-1, 1, (400, 3)) * [1, tilt, tilt]
        linear = box_forms.linear_map(rng.uniform(0.7, 1.4, (400, 3)), angles, np.ones((400, 3)))
        pair.append(Boxes(size, linear, rng.uniform(0, 16, (400, 3))))
    exact = iou(*pair)
    assert (exact == 0).any()
    for least in (0.0, 0.05, 0.2, float(np.sort(exact)[-5]), 1.0):  # one of them is met exactly
        assert np.array_equal(overlap_less(*pair, least), exact < least)


def test_a_sample_is_placed_alike_in_any_batch():
    roles = (
        PGL,
        RoleSpec("local", 2, (8, 8, 8), scale=(0.5, 1.0), rotate_degrees=15, overlaps="pair", inside_union=True),
    )
    whole, _, _ = _draw(*roles, samples=np.arange(20))
    for rows in ([3], [0, 19, 7], list(range(10, 20))):
        some, _, _ = _draw(*roles, samples=np.array(rows))
        for name in whole:
            assert np.array_equal(some[name], whole[name][:, rows])
    assert not np.array_equal(whole["pair"], _draw(*roles, samples=np.arange(20), seed=1)[0]["pair"])
    alone, _, _ = _draw(PGL, samples=np.arange(20))
    assert np.array_equal(alone["pair"], whole["pair"]), "a role's draw depends on the other roles"


def test_unscaled_boxes_lie_on_whole_voxels_and_flips_are_kept_apart():
    role = RoleSpec("a", 2, (9, 12, 7), flip=(0.5, 0.0, 1.0))
    maps, _, _ = _draw(role)
    assert np.array_equal(maps["a"], np.round(maps["a"]))
    diagonal = np.diagonal(maps["a"][..., :3], axis1=2, axis2=3)
    assert (diagonal[..., 1] == 1).all()
    assert (diagonal[..., 2] == -1).all()
    assert 0.4 < (diagonal[..., 0] < 0).mean() < 0.6
    assert (diagonal[0, :, 0] != diagonal[1, :, 0]).any()


def test_depth_is_scaled_only_on_request_and_rotation_is_rigid_in_mm():
    spacing = (5.0, 1.5, 0.75)
    role = RoleSpec("a", 1, (6, 20, 20), scale=(0.7, 1.4), rotate_degrees=40)
    linear = _draw(role, spacing=spacing, grow=40)[0]["a"][0, :, :, :3]
    assert (linear[:, 0] == [1, 0, 0]).all()
    metric = np.diag(spacing) @ linear @ np.diag(1 / np.array(spacing))
    gram = np.swapaxes(metric, 1, 2) @ metric
    scale = np.sqrt(np.linalg.det(linear))
    assert (scale >= 0.7 - 1e-9).all()
    assert (scale <= 1.4 + 1e-9).all()
    assert np.allclose(gram[:, 1:, 1:], scale[:, None, None] ** 2 * np.eye(2))
    assert np.abs(linear[:, 1, 2]).max() > 0.1
    deep = _draw(RoleSpec("a", 1, (6, 20, 20), scale=(0.7, 1.4), scale_depth=True))[0]["a"][0]
    assert np.allclose(deep[:, 0, 0], deep[:, 1, 1])


def test_tilt_turns_about_every_axis_rigidly_in_mm():
    spacing = np.array([2.0, 1.25, 0.8])
    role = RoleSpec("a", 1, (12, 20, 20), scale=(0.7, 1.4), scale_depth=True, rotate_degrees=25, tilt_degrees=15)
    linear = _draw(role, spacing=spacing, grow=60)[0]["a"][0, :, :, :3]
    metric = np.diag(spacing) @ linear @ np.diag(1 / spacing)
    scale = np.cbrt(np.linalg.det(metric))
    assert np.allclose(np.swapaxes(metric, 1, 2) @ metric, scale[:, None, None] ** 2 * np.eye(3))
    angles = np.rad2deg(box_forms.angles_of(metric / scale[:, None, None]))
    assert (np.abs(angles).max(0) <= [25, 15, 15]).all()
    assert (angles.max(0) > [22, 13, 13]).all()
    assert (angles.min(0) < [-22, -13, -13]).all()
    # One angle at a time: the axis it is named after stays where it is.
    for axis in range(3):
        turn = box_forms.rotation(np.deg2rad(20.0) * np.eye(3)[axis : axis + 1])[0]
        assert np.array_equal(turn[axis], np.eye(3)[axis])
        assert turn[axis - 2, axis - 2] == pytest.approx(np.cos(np.deg2rad(20)))
    # Slices far apart: what does not fit keeps its rotation about D, and the draws without tilt are as they were.
    flat = RoleSpec("a", 1, (12, 20, 20), rotate_degrees=25)
    both = RoleSpec("a", 1, (12, 20, 20), rotate_degrees=25, tilt_degrees=15)
    need = host_size(ViewSpec((both,)))
    assert need[0] > 12
    assert need[0] < 12 + 2 * 20 * np.sin(np.deg2rad(15)) + 1
    thick, plain = (_draw(r, spacing=(12.0, 1.0, 1.0))[0]["a"][0, :, :, :3] for r in (both, flat))
    given_up = (thick[:, 0, 1:] == 0).all(1)
    assert 0.1 < given_up.mean() < 1
    assert np.array_equal(thick[given_up], plain[given_up])


def test_stretch_changes_each_axis_by_itself():
    role = RoleSpec("a", 1, (12, 20, 20), scale=(0.9, 1.1), scale_depth=True, stretch=0.2)
    sides = np.diagonal(_draw(role)[0]["a"][0, :, :, :3], axis1=1, axis2=2)
    ratio = sides[:, 0] / sides[:, 1]
    assert (sides >= 0.9 * 0.8 - 1e-9).all()
    assert (sides <= 1.1 * 1.2 + 1e-9).all()
    assert ratio.min() < 0.75
    assert ratio.max() > 1.3
    assert (_draw(RoleSpec("a", 1, (12, 20, 20), stretch=0.2))[0]["a"][0, :, 0, 0] == 1).all()


def test_shifted_views_differ_by_a_whole_shift_along_depth():
    role = RoleSpec("a", 3, (5, 20, 20), scale=(0.8, 1.2), offset_vox=(1, 3), share_spatial=True, flip=(0.0, 0.5, 0.5))
    maps, _, _ = _draw(role)
    step = maps["a"][1:, :, :, 3] - maps["a"][0, :, :, 3]
    assert np.array_equal(maps["a"][1, :, :, :3], maps["a"][0, :, :, :3])
    assert (step[..., 1:] == 0).all()
    assert set(np.unique(step[..., 0])) == {-3, -2, -1, 1, 2, 3}


def test_shifted_views_of_thin_slices_stay_in_the_host_crop_when_they_are_tilted():
    role = RoleSpec("a", 2, (8, 24, 24), offset_vox=(4, 4), share_spatial=True, tilt_degrees=25)
    maps, start, host = _draw(role, spacing=(0.5, 1.0, 1.0))
    low, high = _box(maps["a"], role.size_DHW)
    assert (low >= start - 1e-9).all()
    assert (high <= start + host + 1e-9).all()
    tilted = (maps["a"][0, :, 0, 1:3] != 0).any(1)
    assert 0.1 < tilted.mean() < 1, "what does not fit is not tilted, the rest is"


def test_a_box_that_follows_a_turned_one_deforms_within_the_host_crop_at_any_spacing():
    anchor = RoleSpec("a", 1, (8, 24, 24), rotate_degrees=45)
    role = RoleSpec("b", 1, (8, 24, 24), rotate_degrees=45, elastic_vox=3.0, overlaps="a", min_overlap=0.9)
    maps, start, host = _draw(anchor, role, spacing=(1.0, 3.0, 1.0))
    low, high = _box(maps["b"], role.size_DHW)
    reach = role.elastic_vox * np.abs(maps["b"][..., :3]).sum(-1)
    assert (low - reach >= start - 1e-9).all()
    assert (high + reach <= start + host + 1e-9).all()


def test_shared_transform_and_union():
    either = (0.5, 0.5, 0.5)
    shared = RoleSpec("a", 3, (8, 20, 20), (0.7, 1.3), False, either, 20, min_overlap=0.2, share_spatial=True)
    local = RoleSpec("b", 5, (8, 8, 8), scale=(0.5, 1.5), overlaps="a", inside_union=True)
    maps, _, _ = _draw(shared, local)
    assert np.array_equal(maps["a"][1, ..., :3], maps["a"][0, ..., :3])
    assert not np.array_equal(maps["a"][1, ..., 3], maps["a"][0, ..., 3])
    low, high = _box(maps["a"], shared.size_DHW)
    inner_low, inner_high = _box(maps["b"], local.size_DHW)
    assert (inner_low >= low.min(0) - 1e-9).all()
    assert (inner_high <= high.max(0) + 1e-9).all()


def test_host_size_closed_forms():
    def size(*roles):
        return host_size(ViewSpec(roles))

    assert size(RoleSpec("a", 1, (8, 10, 12))) == (8, 10, 12)
    assert size(RoleSpec("a", 1, (8, 10, 12), scale=(0.5, 1.5))) == (8, 15, 18)
    assert size(RoleSpec("a", 2, (8, 10, 12), min_overlap=1.0)) == (8, 10, 12)
    assert size(RoleSpec("a", 2, (8, 10, 12))) == (12, 15, 18)
    assert size(RoleSpec("a", 2, (8, 10, 12), offset_vox=(1, 3))) == (11, 10, 12)
    assert size(RoleSpec("a", 3, (8, 10, 12), offset_vox=(1, 3))) == (14, 10, 12)
    # Two boxes of side s that keep f s along each axis have IoU f^3 / (2 - f^3).
    side = size(RoleSpec("a", 2, (1000, 1000, 1000), min_overlap=0.3))[0]
    kept = 2 - side / 1000
    assert kept**3 / (2 - kept**3) == pytest.approx(0.3, abs=2e-3)


@pytest.mark.parametrize(
    ("roles", "word"),
    [
        ((), "unique"),
        ((PGL, PGL), "unique"),
        ((RoleSpec("a", 0, (8, 8, 8)),), "count"),
        ((RoleSpec("a", 1, (8, 8, 8), scale=(1.2, 1.0)),), "scale"),
        ((RoleSpec("a", 1, (8, 8, 8), min_overlap=1.5),), "min_overlap"),
        ((RoleSpec("a", 1, (8, 8, 8), flip=(0, 2, 0)),), "flip"),
        ((RoleSpec("a", 1, (8, 8, 8), elastic_vox=-1),), "elastic_vox"),
        ((RoleSpec("a", 1, (8, 8, 8), tilt_degrees=120),), "tilt_degrees"),
        ((RoleSpec("a", 1, (8, 8, 8), stretch=1),), "stretch"),
        ((RoleSpec("a", 2, (8, 8, 8), offset_vox=(3, 1)),), "offset_vox"),
        ((RoleSpec("a", 2, (8, 8, 8), offset_vox=(1, 3), min_overlap=0.5),), "offset_vox"),
        ((RoleSpec("a", 2, (8, 8, 8), inside_union=True),), "inside_union"),
        ((RoleSpec("a", 2, (8, 8, 8), overlaps="b"),), "overlaps"),
        ((RoleSpec("a", 1, (8, 8, 8), overlaps="b"), RoleSpec("b", 1, (8, 8, 8), overlaps="a")), "circle"),
        ((PGL, RoleSpec("a", 2, (8, 8, 8), overlaps="pair", min_overlap=0.5)), "at most"),
        ((PGL, RoleSpec("a", 2, (20, 8, 8), overlaps="pair", inside_union=True)), "inside_union"),
    ],
)
def test_contradictions_are_refused(roles, word):
    with pytest.raises(ConfigError, match=word):
        host_size(ViewSpec(roles))


def test_a_small_host_crop_is_refused():
    spec = ViewSpec((PGL,))
    host = tuple(n - 1 for n in host_size(spec))
    one = np.ones((1, 3))
    with pytest.raises(ConfigError, match="host crop"):
        draw(spec, seed=0, sample_B=np.zeros(1, int), start_B3=0 * one.astype(int), host_DHW=host, shape_B3=90 * one,
             spacing_B3=one)  # fmt: skip


def test_concentric_box_matches_an_anchor_of_its_own_shape():
    free, spacing = np.full((1, 3), 100.0), np.array([[2.0, 0.9, 1.1]])
    turned = RoleSpec("a", 1, PGL.size_DHW, scale=(0.8, 1.3), rotate_degrees=30, tilt_degrees=20)
    for role, angles in ((PGL, [[0.0, 0.0, 0.0]]), (turned, [[-0.4, 0.2, -0.3]])):
        linear = box_forms.linear_map(np.array([[1.0, 0.9, 0.9]]), np.array(angles), spacing)
        anchor = Boxes(role.size_DHW, linear, np.array([[3.0, 4.5, 7.25]]))
        assert iou(concentric(role, anchor, -free, free, spacing), anchor)[0] == pytest.approx(1.0, abs=1e-9)
