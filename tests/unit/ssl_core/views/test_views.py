import numpy as np
import pytest
import torch

from ssl_core.methods.parts import points as physical_points
from ssl_core.views.augment import spatial
from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import RoleSpec, ViewSpec, centre_of
from storage.errors import ConfigError
from tests.kit.crops import AS_STORED, batch_of, coordinates, noise, part
from tests.kit.view_specs import EVERYTHING, PAIR, TILTED, TURNED

AT_ONCE = RoleSpec(
    "at once", 2, (12, 18, 14), (0.8, 1.3), True, (0.5, 0.5, 0.5), rotate_degrees=40, elastic_vox=1.0, min_overlap=0.1
)


def _make(batch, spec, dtype=torch.float32, policy=AS_STORED, seed=0):
    return make_views(batch, spec, seed=seed, policy=policy, dtype=dtype)


def _centres(view):
    """Edge coordinates of all voxel centres, (B, D*H*W, 3)."""
    axes = [torch.arange(n, dtype=torch.float64) + 0.5 for n in view.size_DHW]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3)
    return points.expand(len(view.to_volume_B34), -1, -1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_every_voxel_shows_the_place_that_the_geometry_says(dtype, tolerance):
    spec = ViewSpec(tuple(RoleSpec(**{**vars(r), "intensity": "none"}) for r in (*EVERYTHING.roles, AT_ONCE, TILTED)))
    batch = coordinates(spec, 10, spacing=(3.0, 1.2, 0.9))
    low = torch.from_numpy(batch.start_B3)[:, None] + 0.5
    high = low + torch.tensor(host_size(spec)) - 1
    views = _make(batch, spec, dtype)
    for view in (v for role in views.roles.values() for v in role):
        seen = view.image_BCDHW.flatten(2).transpose(1, 2).double()
        meant = physical_points.to_volume(view, _centres(view))
        within = ((meant >= low) & (meant <= high)).all(-1)  # half a voxel at the crop's border is repeated
        assert within.float().mean() > 0.5
        assert (seen - meant)[within].abs().max() < tolerance
        assert torch.allclose(physical_points.to_view(view, meant), _centres(view), atol=1e-5)
        real = ((meant >= 0) & (meant < views.shape_B3[:, None])).all(-1)
        assert torch.equal(view.valid_B1DHW.flatten(1).bool(), real)
        middle = physical_points.to_volume(view, torch.tensor(view.size_DHW)[None, None] / 2)[:, 0]
        if view.elastic is None:
            assert torch.allclose(view.position_B3 * views.shape_B3, middle)
            assert torch.allclose(centre_of(view.to_volume_B34, view.size_DHW), middle)


def test_padding_is_marked_where_the_volume_is_smaller_than_the_view():
    spec = ViewSpec((PAIR, RoleSpec(**{**vars(TURNED), "scale": (1.0, 1.4)})))
    shape = (10, 13, 17)
    batch = coordinates(spec, 8, shape_DHW=shape)
    batch.start_B3 = np.tile((np.array(shape) - host_size(spec)) // 2, (8, 1))
    views = _make(batch, spec)
    for view in (v for role in views.roles.values() for v in role):
        place = physical_points.to_volume(view, _centres(view))
        real = ((place >= 0) & (place < torch.tensor(shape))).all(-1)
        assert torch.equal(view.valid_B1DHW.flatten(1).bool(), real)
        beyond = torch.stack([(place < 0).any(1), (place >= torch.tensor(shape)).any(1)])
        assert beyond.any(1).all(), "no view reached beyond the volume: a weaker test than meant"


def test_maps_show_the_voxel_that_holds_the_place():
    batch = noise(EVERYTHING, 6)
    views = _make(batch, EVERYTHING)
    for view in (v for role in views.roles.values() for v in role):
        places = physical_points.to_volume(view, _centres(view)).numpy() - batch.start_B3[:, None]
        index = np.clip(np.floor(places), 0, np.array(host_size(EVERYTHING)) - 1).astype(int)
        for b in range(6):
            expected = batch.label_BDHW[b][tuple(index[b].T)]
            assert view.maps["label"].dtype == torch.int64
            assert np.array_equal(view.maps["label"][b].flatten().numpy(), expected)


def test_views_that_share_their_transform_share_their_deformation():
    apart = RoleSpec("apart", 2, (14, 18, 16), elastic_vox=1.5, intensity="none")
    together = RoleSpec("together", 2, (14, 18, 16), elastic_vox=1.5, share_spatial=True, offset_vox=(1, 3))
    spec = ViewSpec((apart, together))
    made = _make(noise(spec, 3), spec)
    a, b = (view.elastic.control_B3abc for view in made.roles["together"])
    assert torch.equal(a, b)
    a, b = (view.elastic.control_B3abc for view in made.roles["apart"])
    assert not torch.equal(a, b)


def test_large_ids_survive():
    spec = ViewSpec((PAIR,), maps=("regions",))
    batch = noise(spec, 2)
    ids = np.random.default_rng(0).integers(2**24, 2**31 - 1, batch.label_BDHW.shape).astype(np.int32)
    batch.maps_BDHW = {"regions": ids}
    views = _make(batch, spec)
    assert set(views.roles["pair"][0].maps["regions"].unique().tolist()) <= set(ids.ravel().tolist())


def test_an_unscaled_view_is_a_flipped_slice():
    role = RoleSpec("a", 2, (9, 12, 7), flip=(0.5, 0.5, 0.5), intensity="none")
    spec = ViewSpec((role,), maps=("label",))
    batch = noise(spec, 8, channels=2)
    for view in _make(batch, spec, torch.float64).roles["a"]:
        for b, affine in enumerate(view.to_volume_B34.numpy()):
            sign = np.diagonal(affine[:, :3])
            low = (np.where(sign > 0, affine[:, 3], affine[:, 3] - role.size_DHW) - batch.start_B3[b]).astype(int)
            cut = tuple(slice(o, o + n) for o, n in zip(low, role.size_DHW, strict=True))
            flipped = [i for i in range(3) if sign[i] < 0]
            expected = np.flip(batch.image_BCDHW[b][:, *cut], [i + 1 for i in flipped])
            assert np.array_equal(view.image_BCDHW[b].numpy(), expected)
            assert np.array_equal(view.maps["label"][b].numpy(), np.flip(batch.label_BDHW[b][cut], flipped))


@pytest.mark.parametrize("turned", [False, True])
def test_views_that_are_slices_agree_with_the_gather_and_stand_beside_views_that_are_not(turned):
    rng = np.random.default_rng(0)
    host = torch.from_numpy(rng.normal(size=(4, 2, 12, 14, 16)))
    affine = np.tile(np.concatenate([np.eye(3), [[2.0], [3.0], [4.0]]], axis=1), (2, 4, 1, 1))
    affine[0, 1, 2] = [0, 0, -1, 13]  # flipped along W
    affine[0, 2, 0, 3] += 0.5  # between voxels
    affine[1, 0, 1, 1] = 1.25  # scaled
    affine[1, 1, 0, 3] = -1.0  # beyond the crop
    start = np.array([[0, 0, 0]] * 4)
    position = spatial.positions(affine, start, (6, 7, 8), torch.device("cpu"))
    gathered = spatial.linear(host, position, (6, 7, 8))
    mixed = spatial.image(host, affine, start, position, (6, 7, 8), turned=turned)
    assert torch.allclose(mixed, gathered, atol=1e-12)
    own = gathered if turned else spatial.separable(host, position)
    for v, b in ((0, 2), (1, 0), (1, 1)):
        assert torch.equal(mixed[v, b], own[v, b])  # these are no slices
    assert torch.equal(mixed[0, 1], host[1, :, 2:8, 3:10, 5:13].flip(3))
    for b in range(4):
        one = spatial.positions(affine[:, b : b + 1], start[b : b + 1], (6, 7, 8), torch.device("cpu"))
        row = slice(b, b + 1)
        alone = spatial.image(host[row], affine[:, row], start[row], one, (6, 7, 8), turned=turned)
        assert torch.equal(alone[:, 0], mixed[:, b])


@pytest.mark.parametrize("host_DHW", [(12, 14, 16), (1, 9, 11)])
def test_products_along_each_axis_are_the_gather(host_DHW):
    """Scaled, flipped, shifted views, some of them beyond the crop, in float64 and float32."""
    rng = np.random.default_rng(1)
    size = (1 if host_DHW[0] == 1 else 6, 7, 8)
    host = torch.from_numpy(rng.normal(size=(5, 2, *host_DHW)))
    factor = rng.uniform(0.5, 2.0, (3, 5, 3)) * rng.choice([-1, 1], (3, 5, 3))
    centre = np.array(host_DHW) / 2 + rng.uniform(-3, 3, (3, 5, 3))
    affine = np.concatenate([factor[..., None] * np.eye(3), (centre - factor * np.array(size) / 2)[..., None]], axis=3)
    position = spatial.positions(affine, np.zeros((5, 3), np.int64), size, torch.device("cpu"))
    gathered = spatial.linear(host, position, size)
    assert torch.allclose(spatial.separable(host, position), gathered, atol=1e-12)
    assert torch.allclose(spatial.separable(host.float(), position).double(), gathered, atol=1e-5)
    assert (gathered - spatial.separable(host, [p + 0.01 for p in position])).abs().max() > 1e-3


@pytest.mark.parametrize("preset", ["light", "strong", "genesis", "pcrlv2", "pcrlv2_local"])
def test_a_sample_looks_alike_in_any_batch(preset):
    roles = tuple(RoleSpec(**{**vars(r), "intensity": preset}) for r in EVERYTHING.roles)
    spec = ViewSpec(roles, maps=("label",))
    batch = noise(spec, 5, channels=2)
    whole = _make(batch, spec, torch.float64, seed=3)
    for rows in ([2], [4, 0, 3]):
        some = _make(part(batch, rows), spec, torch.float64, seed=3)
        for name, views in some.roles.items():
            for view, full in zip(views, whole.roles[name], strict=True):
                assert torch.equal(view.to_volume_B34, full.to_volume_B34[rows])
                assert torch.equal(view.maps["label"], full.maps["label"][rows])
                assert torch.allclose(view.image_BCDHW, full.image_BCDHW[rows], rtol=0, atol=1e-12)
    again = _make(batch, spec, torch.float64, seed=3)
    other = _make(batch, spec, torch.float64, seed=4)
    for name, views in whole.roles.items():
        assert torch.equal(views[0].image_BCDHW, again.roles[name][0].image_BCDHW)
        assert not torch.equal(views[0].image_BCDHW, other.roles[name][0].image_BCDHW)


def test_clean_is_kept_untouched_and_only_on_request():
    batch = noise(EVERYTHING, 4)
    views = _make(batch, EVERYTHING)
    quiet = ViewSpec(tuple(RoleSpec(**{**vars(r), "intensity": "none"}) for r in EVERYTHING.roles), maps=("label",))
    plain = _make(batch, quiet)
    for view, expected in zip(views.roles["pair"], plain.roles["pair"], strict=True):
        assert torch.equal(view.clean_BCDHW, expected.image_BCDHW)
        assert not torch.equal(view.clean_BCDHW, view.image_BCDHW)
    assert views.roles["turned"][0].clean_BCDHW is None


def test_identity_of_the_batch_and_dtype():
    batch = noise(EVERYTHING, 3, first=2**40)
    views = _make(batch, EVERYTHING, torch.bfloat16, IntensityPolicy())
    assert len(views) == 3
    assert views.sample_B.tolist() == [2**40, 2**40 + 1, 2**40 + 2]
    assert views.volume_B.tolist() == [0, 1, 2]
    assert views.spacing_B3.dtype == views.shape_B3.dtype == torch.float64
    view = views.roles["pair"][0]
    assert view.image_BCDHW.dtype == view.clean_BCDHW.dtype == view.valid_B1DHW.dtype == torch.bfloat16
    assert view.to_volume_B34.dtype == view.position_B3.dtype == torch.float64


@pytest.mark.parametrize("value", [0, 7])
def test_constant_crops_stay_finite(value):
    for preset in ("light", "strong", "genesis", "pcrlv2"):
        spec = ViewSpec((RoleSpec("a", 2, (8, 9, 10), scale=(0.8, 1.2), intensity=preset),))
        image = np.full((8, 1, *host_size(spec)), value, np.int16)
        batch = batch_of(image, np.zeros((8, 3)), (20, 20, 20))
        batch.stats_BCS = np.tile(np.array([value] * 3 + [0] + [value] * 2, np.float32), (8, 1, 1))
        for view in _make(batch, spec, policy=IntensityPolicy()).roles["a"]:
            assert torch.isfinite(view.image_BCDHW).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float16, np.float32])
def test_stored_dtypes(dtype):
    spec = ViewSpec((RoleSpec("a", 1, (8, 9, 10), intensity="none"),))
    image = np.random.default_rng(0).integers(0, 200, (2, 1, 8, 9, 10)).astype(dtype)
    batch = batch_of(image, np.zeros((2, 3)), (8, 9, 10))
    batch.scale_B[:], batch.offset_B[:] = 0.5, -3
    expected = image.astype(np.float32) * 0.5 - 3
    assert np.allclose(_make(batch, spec).roles["a"][0].image_BCDHW.numpy(), expected, atol=1e-3)


def test_wrong_requests_are_named():
    batch = noise(EVERYTHING, 1)
    batch.label_BDHW = None
    with pytest.raises(ConfigError, match="label"):
        _make(batch, EVERYTHING)
    with pytest.raises(ConfigError, match="sharp"):
        _make(batch, ViewSpec((RoleSpec("a", 1, (4, 4, 4), intensity="sharp"),)))


@pytest.mark.parametrize("preset", ["light", "strong", "genesis", "pcrlv2"])
def test_single_slices_are_views_too(preset):
    role = RoleSpec("slice", 2, (1, 24, 20), (0.8, 1.2), False, (0.0, 0.5, 0.5), offset_vox=(1, 3), intensity=preset)
    spec = ViewSpec((role,), maps=("label",))
    a, b = _make(noise(spec, 6), spec).roles["slice"]
    assert a.image_BCDHW.shape == (6, 1, 1, 24, 20)
    assert torch.isfinite(a.image_BCDHW).all()
    step = b.to_volume_B34[:, :, 3] - a.to_volume_B34[:, :, 3]
    assert set(step[:, 0].abs().tolist()) <= {1.0, 2.0, 3.0}
