import numpy as np
import pytest
import torch
from scipy import ndimage

from ssl_core.views.augment import intensity, paint, presets
from storage.errors import ConfigError

SAMPLES = np.arange(100, 104)


def _views(n=3, c=2, size=(11, 12, 13), seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(2, 3, (n, c, *size)))


def _generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def test_blur_is_a_gaussian_filter_away_from_the_border():
    x = _views(size=(30, 31, 32))
    sigma = np.array([0.5, 1.0, 1.7])
    out = intensity.blur(x, sigma).numpy()
    inner = slice(8, -8)
    for n in range(3):
        for c in range(2):
            # SciPy rounds the radius to whole voxels: give it the same one.
            expected = ndimage.gaussian_filter(x[n, c].numpy(), sigma[n], radius=int(4 * sigma[n]))
            assert np.allclose(out[n, c][inner, inner, inner], expected[inner, inner, inner], atol=1e-9)
    flat = torch.full((1, 1, 6, 7, 8), 3.5, dtype=torch.float64)
    assert torch.allclose(intensity.blur(flat, np.array([1.5])), flat)
    assert torch.allclose(intensity.blur(x, np.zeros(3)), x)


def test_pointwise_operations_against_their_formula():
    x = _views()
    factor = np.array([0.6, 1.0, 1.4])
    for n in range(3):
        for c in range(2):
            v = x[n, c].numpy()
            low, high = v.min(), v.max()
            expected = {
                "multiply": np.clip(v * factor[n], low, high),
                "contrast": np.clip((v - v.mean()) * factor[n] + v.mean(), low, high),
                "gamma": ((v - low) / (high - low)) ** factor[n] * (high - low) + low,
            }
            for name, want in expected.items():
                assert np.allclose(getattr(intensity, name)(x, factor)[n, c].numpy(), want, atol=1e-9), name
    standard = intensity.standardise(x)
    assert standard.mean(dim=(2, 3, 4)).abs().max() < 1e-9
    assert torch.allclose(standard.std(dim=(2, 3, 4), correction=0), torch.ones(3, 2, dtype=torch.float64))


def test_low_resolution_is_nearest_voxels_and_back_trilinearly():
    x = _views(size=(11, 12, 20))
    scale = np.array([0.5, 0.77, 1.0])
    for n, ours in enumerate(intensity.coarsen(x, scale)):
        fewer = [round(k * scale[n]) for k in x.shape[2:]]
        coarse = torch.nn.functional.interpolate(x[n : n + 1], fewer, mode="nearest-exact")
        expected = torch.nn.functional.interpolate(coarse, x.shape[2:], mode="trilinear")
        assert torch.allclose(ours, expected[0], atol=1e-9)
    assert torch.allclose(intensity.coarsen(x, scale)[2], x[2])


def test_restored_gamma_keeps_mean_and_standard_deviation():
    x = _views()
    out = intensity.gamma_restored(x, np.array([0.7, 1.0, 1.5]))
    for kept in (torch.mean, torch.std):
        assert torch.allclose(kept(out, dim=(2, 3, 4)), kept(x, dim=(2, 3, 4)), atol=1e-9)
    assert torch.allclose(out[1], x[1], atol=1e-9)
    bent = intensity.gamma(x, np.array([0.7, 1.0, 1.5]))
    assert np.corrcoef(out[2, 0].flatten(), bent[2, 0].flatten())[0, 1] == pytest.approx(1, abs=1e-9)
    assert torch.isfinite(intensity.gamma_restored(torch.ones(1, 1, 2, 2, 2), np.array([0.7]))).all()


def test_the_preset_nnunet_draws_as_nnunet_does(monkeypatch):
    """Which views take an operation, and how strongly: counted over 6000 views of one voxel."""
    drawn = {}

    def note(kind):
        def operation(x, value, u, make):
            drawn[kind] = value
            return x

        return operation

    monkeypatch.setattr(presets, "KINDS", {kind: note(kind) for kind in presets.KINDS})
    count = 6000
    presets.augment(torch.zeros(1, count, 1, 1, 1, 1), "nnunet", seed=1, sample_B=np.arange(count), role="a")
    expected = {
        "noise_variance": (0.1, 0.0, 0.1, 0.05),
        "blur": (0.1, 0.5, 1.0, 0.75),
        "brightness": (0.15, 0.75, 1.25, 1.0),
        "contrast": (0.15, 0.75, 1.25, 1.0),
        "coarsen": (0.125, 0.5, 1.0, 0.75),
        "gamma_inverted": (0.1, 0.7, 1.5, 1.05),
        "gamma_restored": (0.3, 0.7, 1.5, 1.05),
    }
    assert list(drawn) == list(expected)
    for kind, (share, low, high, mean) in expected.items():
        assert len(drawn[kind]) / count == pytest.approx(share, abs=0.015), kind
        assert low <= drawn[kind].min() < drawn[kind].max() <= high, kind
        assert drawn[kind].mean() == pytest.approx(mean, abs=(high - low) / 12), kind
    bent = drawn["gamma_restored"]
    assert (bent < 1).mean() == pytest.approx(0.5, abs=0.04), "half below one, though the range reaches further above"


def test_noise_has_its_standard_deviation():
    x = torch.zeros(2, 1, 30, 30, 30)
    x[1] = torch.linspace(0, 4, 30)
    out = intensity.add_noise(x, np.array([0.3, 0.1]), _generators(2)) - x
    assert out.std(dim=(1, 2, 3, 4)).tolist() == pytest.approx([0.3, 0.1], rel=0.02)
    of_range = intensity.add_noise(x, np.array([0.3, 0.1]), _generators(2), of_range=True) - x
    assert of_range.std(dim=(1, 2, 3, 4)).tolist() == pytest.approx([0.0, 0.4], rel=0.02)


def test_curves_are_monotone_and_keep_the_range():
    control = np.random.default_rng(0).random((20, 4))
    falling = np.arange(20) % 2 == 1
    table = intensity.bezier(control, falling)
    step = np.diff(table, axis=1)
    assert (step[~falling] >= 0).all()
    assert (step[falling] <= 0).all()
    assert np.allclose(table[~falling][:, [0, -1]], [0, 1])
    assert np.allclose(table[falling][:, [0, -1]], [1, 0])
    straight = intensity.bezier(np.array([[1 / 3, 1 / 3, 2 / 3, 2 / 3]]), np.array([False]))
    x = _views(1)
    assert torch.allclose(intensity.curve(x, straight), x)
    assert torch.allclose(intensity.curve(x, 1 - straight), x.amin((2, 3, 4), True) + x.amax((2, 3, 4), True) - x)


def test_shuffling_permutes_inside_small_blocks():
    size = (40, 41, 42)
    place = torch.from_numpy(np.arange(np.prod(size)).reshape(1, 1, *size)).double()
    x = torch.cat([place, -place], dim=1).repeat(3, 1, 1, 1, 1)
    u = np.random.default_rng(1).random((3, 6))
    out = paint.shuffle(x, u, _generators(3))
    for n in range(3):
        assert torch.equal(out[n, 0].flatten().sort().values, place.flatten())
        assert torch.equal(out[n, 0], -out[n, 1]), "channels were permuted apart"
        was = np.stack(np.unravel_index(out[n, 0].long().numpy(), size))
        now = np.stack(np.unravel_index(place[0, 0].long().numpy(), size))
        moved = np.abs(was - now).reshape(3, -1).max(1)
        block = 1 + np.floor(u[n, :3] * 4).astype(int)
        assert (moved < block).all()
        assert (block == 1).all() or moved.max() > 0


def test_swapping_exchanges_whole_blocks():
    size = (16, 16, 32)
    place = torch.arange(float(np.prod(size)), dtype=torch.float64).reshape(1, 1, *size)
    out = paint.swap(place, np.zeros((1, 3)), _generators(1), (4, 4, 8), 10)
    assert torch.equal(out.flatten().sort().values, place.flatten())
    changed = (out != place)[0, 0].reshape(4, 4, 4, 4, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(64, -1)
    assert changed.all(1).sum() == changed.any(1).sum() == 20
    tiny = paint.swap(place[..., :3, :3, :3], np.full((1, 3), 0.9), _generators(1), (4, 4, 8), 10)
    assert torch.equal(tiny, place[..., :3, :3, :3])


def test_painting_windows_and_what_they_cover():
    size = (36, 42, 48)
    u = np.random.default_rng(0).random((400, paint.PAINT_DRAWS))
    outer = np.arange(400) % 2 == 1
    low, high = paint.windows(u, size, outer)
    side = high - low
    drawn = side.min(2) > 0
    assert (low[drawn] >= 3).all()
    assert (high[drawn] <= np.array(size) - 3).all()
    inner_side, outer_side = side[~outer][drawn[~outer]], side[outer][drawn[outer]]
    assert (inner_side.min(0) == np.array(size) // 6).all()
    assert (inner_side.max(0) == np.array(size) // 3).all()
    assert (outer_side >= np.array(size) - 4 * np.array(size) // 7).all()
    assert (outer_side <= np.array(size) - 3 * np.array(size) // 7).all()
    assert drawn[outer, 0].all()
    assert (~drawn[~outer, 0]).mean() == pytest.approx(0.05, abs=0.04)

    x = _views(4, 1, size).float()
    low, high, outer = low[:4], high[:4], outer[:4]
    out = paint.paint(x, low, high, outer, _generators(4))
    for n in range(4):
        mask = np.zeros(size, bool)
        for a, b in zip(low[n], high[n], strict=True):
            mask[a[0] : b[0], a[1] : b[1], a[2] : b[2]] = True
        painted = torch.from_numpy(mask ^ outer[n])
        assert torch.equal(out[n, 0][~painted], x[n, 0][~painted])
        assert (out[n, 0][painted] != x[n, 0][painted]).float().mean() > 0.999
        span = x[n].max() - x[n].min()
        assert ((out[n, 0][painted].mean() - x[n].min()) / span) == pytest.approx(0.5, abs=0.05)
    for size in ((4, 4, 4), (1, 9, 2)):
        low, high = paint.windows(u, size, np.arange(400) % 2 == 1)
        assert (low >= 0).all()
        assert (high <= np.array(size)).all()


@pytest.mark.parametrize("name", [n for n in presets.PRESETS if n != "none"])
def test_presets_change_views_independently_and_leave_the_input(name):
    clean = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 4, 1, 20, 22, 24)))
    clean[1] = clean[0]
    before = clean.clone()
    out = presets.augment(clean, name, seed=0, sample_B=SAMPLES, role="a")
    assert torch.equal(clean, before)
    assert out.shape == clean.shape
    assert torch.isfinite(out).all()
    assert not torch.equal(out[0], out[1]), "two views got the same parameters"
    assert not torch.equal(out, presets.augment(clean, name, seed=0, sample_B=SAMPLES, role="b"))
    for op in presets.PRESETS[name]:
        assert op.source
        assert op.kind in presets.KINDS


def test_none_is_the_identity_and_unknown_names_are_refused():
    clean = _views()[None]
    assert torch.equal(presets.augment(clean, "none", seed=0, sample_B=np.arange(3), role="a"), clean)
    with pytest.raises(ConfigError, match="light"):
        presets.augment(clean, "sharp", seed=0, sample_B=np.arange(3), role="a")


def test_operations_are_applied_as_often_as_they_say():
    clean = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, 1, 2, 2, 2))).repeat(1, 3000, 1, 1, 1, 1)
    light = presets.PRESETS["light"]
    out = presets.augment(clean, "light", seed=0, sample_B=np.arange(3000), role="a")
    untouched = (out == clean).flatten(2).all(2).double().mean()
    assert float(untouched) == pytest.approx(np.prod([1 - op.p for op in light]), abs=0.03)
