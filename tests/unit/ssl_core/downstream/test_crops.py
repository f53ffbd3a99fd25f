"""The crops of fine-tuning: nnU-Net's geometry by its distribution, and small structures that stay in the view."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ssl_core.config import digest
from ssl_core.downstream.finetune import FinetuneConfig
from ssl_core.methods.parts import points as physical_points
from ssl_core.portable.inference.settings import sided
from ssl_core.views import placement
from ssl_core.views.box_forms import angles_of
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import RoleSpec, View, ViewSpec
from storage.errors import ConfigError
from tests.kit.crops import AS_STORED, batch_of, noise, part

PATCH = (16, 16, 16)
NNUNET = FinetuneConfig(patch_DHW=PATCH, geometry="nnunet", flip=(0, 0, 0)).views("label")


def _linear(count: int, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """Linear parts (count, 3, 3) in millimetres, and how far views' centres are from the voxels drawn."""
    host = host_size(NNUNET)
    start = np.full((count, 3), 50)
    centre = start + np.array(host) // 2
    maps = placement.draw(
        NNUNET,
        seed=0,
        sample_B=np.arange(count),
        start_B3=start,
        host_DHW=host,
        shape_B3=np.full((count, 3), 400.0),
        spacing_B3=np.tile(spacing, (count, 1)),
        centre_B3=centre,
    )["patch"][0]
    mm = np.asarray(spacing)
    middles = maps[..., :3] @ (np.array(PATCH) / 2) + maps[..., 3]
    return maps[..., :3] * mm[:, None] / mm[None], middles - (centre + 0.5)


def test_geometry_of_nnunet_is_drawn_as_nnunet_draws_it() -> None:
    count = 6000
    linear, off = _linear(count)
    scale = np.linalg.norm(linear, axis=1)
    assert np.allclose(scale, scale[:, :1]), "one zoom for all three axes"
    scale = scale[:, 0]
    scaled = np.abs(scale - 1) > 1e-9
    angles = np.degrees(angles_of(linear / scale[:, None, None]))
    turned = np.abs(angles).max(1) > 1e-9
    assert scaled.mean() == pytest.approx(0.2, abs=0.02)
    assert turned.mean() == pytest.approx(0.2, abs=0.02)
    assert (scaled & turned).mean() == pytest.approx(0.04, abs=0.01)
    assert 0.7 <= scale.min() < 0.72
    assert 1.38 < scale.max() <= 1.4
    assert scale[scaled].mean() == pytest.approx(1.05, abs=0.02)
    assert (np.abs(angles[turned]).max(0) <= 30).all()
    assert (np.abs(angles[turned]).max(0) > 29).all(), "about each of the three axes"
    assert np.abs(angles[turned]).mean(0) == pytest.approx(np.full(3, 15.0), abs=1.0)
    assert np.abs(np.corrcoef(angles[turned].T) - np.eye(3)).max() < 0.1
    assert np.abs(off).max() <= 0.5, "about the drawn voxel, to whole voxels where nothing is interpolated"


def test_thick_slices_give_up_tilts_that_do_not_fit_and_keep_the_turn_about_d() -> None:
    linear, off = _linear(1500, (5.0, 1.0, 1.0))
    scale = np.linalg.norm(linear, axis=1)[:, 0]
    angles = np.degrees(angles_of(linear / scale[:, None, None]))
    turned = np.abs(angles).max(1) > 1e-9
    tilted = np.abs(angles[turned][:, 1:]).max(1) > 1e-9
    assert 0.1 < tilted.mean() < 0.8
    assert np.abs(angles[turned][~tilted][:, 0]).max() > 25
    assert np.abs(off).max() <= 0.5


def _views(batch: Any, spec: ViewSpec = NNUNET, seed: int = 0) -> View:
    return make_views(batch, spec, seed=seed, policy=AS_STORED).roles["patch"][0]


def _batch(count: int) -> Any:
    batch = noise(NNUNET, count)
    batch.centre_B3 = np.clip(batch.start_B3 + np.array(host_size(NNUNET)) // 2, 0, 79)
    return batch


def test_labels_move_with_the_voxels_and_a_sample_is_the_same_in_any_batch() -> None:
    batch = _batch(24)
    view = _views(batch)
    axes = [torch.arange(n, dtype=torch.float64) + 0.5 for n in PATCH]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3).expand(24, -1, -1)
    places = physical_points.to_volume(view, grid).numpy() - batch.start_B3[:, None]
    index = np.clip(np.floor(places), 0, np.array(host_size(NNUNET)) - 1).astype(int)
    for b in range(24):
        assert np.array_equal(view.maps["label"][b].flatten().numpy(), batch.label_BDHW[b][tuple(index[b].T)])
    turned = (view.to_volume_B34[:, 0, 1] != 0).sum()
    assert 0 < turned < 24
    few = _views(part(batch, [3, 17]))
    assert torch.equal(few.image_BCDHW, view.image_BCDHW[[3, 17]])
    assert torch.equal(few.to_volume_B34, view.to_volume_B34[[3, 17]])
    assert not torch.equal(_views(batch, seed=1).image_BCDHW, view.image_BCDHW)


def _one_voxel(spec: ViewSpec, count: int) -> tuple[Any, np.ndarray]:
    """Crops of a volume of 60 voxels a side, each drawn about a labelled voxel of its own, at the border too."""
    host = np.array(host_size(spec))
    random = np.random.default_rng(0)
    centre = random.integers(0, 60, (count, 3))
    start = np.where(host <= 60, np.clip(centre - host // 2, 0, np.maximum(60 - host, 0)), -((host - 60) // 2))
    label = np.zeros((count, *host), np.uint8)
    for row, place in zip(label, centre - start, strict=True):
        row[tuple(place)] = 1
    batch = batch_of(np.zeros((count, 1, *host), np.int16), start, (60, 60, 60), label_BDHW=label)
    batch.centre_B3 = centre
    return batch, centre


def test_a_single_labelled_voxel_is_in_each_centred_view_and_not_in_each_other() -> None:
    plain = FinetuneConfig(patch_DHW=PATCH, scale=(0.5, 1.5), rotate_degrees=0, intensity="none")
    shares = {}
    for centred in (False, True):
        (role,) = plain.model_copy(update={"centred": centred}).views("label").roles
        spec = ViewSpec((replace(role, scale_depth=True),), maps=("label",))
        batch, centre = _one_voxel(spec, 200)
        affine = _views(batch, spec).to_volume_B34
        side = affine[:, :, :3] @ torch.tensor(PATCH, dtype=torch.float64)  # negative where the view is flipped
        low, extent = torch.minimum(affine[:, :, 3], affine[:, :, 3] + side), side.abs()
        place = torch.from_numpy(centre) + 0.5
        shares[centred] = float(((place > low) & (place < low + extent)).all(1).double().mean())
        assert (low >= 0).all()
        assert (low + extent <= 60).all(), "a centred view stays in the volume"
    assert shares[True] == 1.0
    assert shares[False] < 0.9


def test_what_settings_leave_without_effect_is_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"class_draw": "all", "class_balance": 0.0}, "class_balance above 0"),
        ({"geometry": "nnunet", "scale": (0.8, 1.2)}, "no scale with geometry=nnunet"),
        ({"geometry": "nnunet", "rotate_degrees": 5.0}, "no rotate_degrees with geometry=nnunet"),
    ]
    for settings, words in wrong:
        with pytest.raises(ValueError, match=words):
            FinetuneConfig(**settings)
    with pytest.raises(ConfigError, match="centre_B3"):
        _views(noise(NNUNET, 2))
    for fault in ({"scale_share": 0.5, "scale": (1.1, 1.2)}, {"rotate_share": 1.5}, {"centred": True, "count": 2}):
        with pytest.raises(ConfigError):
            host_size(ViewSpec((RoleSpec(**{"name": "a", "count": 1, "size_DHW": PATCH, **fault}),)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "side"),
    [
        (["spleen", "right kidney", "left kidney"], "right kidney"),
        (["kidney_L"], "kidney_L"),
        (["HippocampusR"], "HippocampusR"),
        (["lh.cortex"], "lh.cortex"),
        (["leftover", "bright", "L3", "liver", "label-1", "anterior"], None),
    ],
)
def test_labels_that_name_a_side_are_never_mirrored_from_left_to_right(names: list[str], side: str | None) -> None:
    assert sided(names) == side
    spec = FinetuneConfig(patch_DHW=PATCH, flip=(0.5, 0.5, 1.0)).views("label", names)
    affine = _views(noise(spec, 8), spec).to_volume_B34
    mirrored = torch.linalg.diagonal(affine[:, :, :3]).sign() < 0
    assert mirrored[:, 2].any() == (side is None)
    assert mirrored[:, 0].any()
    assert mirrored[:, 1].any()


def test_a_training_of_before_goes_on_with_settings_that_it_did_not_know() -> None:
    """Its checkpoint holds this digest of its settings."""
    assert digest(FinetuneConfig(transfer="encoder")) == "e0cfd043f056e2f1"
