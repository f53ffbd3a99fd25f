"""SSAL beyond the contract: its loss worked out again, and its pairs of slices."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from ssl_core.testing.method import context, tiny_method
from ssl_core.testing.views import take
from ssl_core.views.make import make_views
from storage.errors import ConfigError
from tests.kit import crops
from tests.kit.method_formulas import centres, encoder_maps, near, outputs, pooled, values_of
from tests.kit.methods import (
    assert_gradient_is_the_derivative,
    assert_swapping_the_views_leaves_the_loss,
    assert_trains_on_single_slices,
    batch_of,
    changed,
    on_slices,
    perturbed,
)
from tests.oracles import losses as slow

SETTINGS = {"align_out": 8, "window": 2}


@pytest.mark.parametrize(("window", "threshold"), [(0, "0.2"), (2, "0.02")])
def test_the_loss_is_its_formula(window: int, threshold: str) -> None:
    """With the smaller threshold only the two views of a sample, a voxel or more apart, attract."""
    limit = float(threshold)
    method, batch = perturbed("ssal", 3, window=window, feature_level=2, w_position=0.25, threshold=limit)
    views = batch.roles["slice"]
    found = [encoder_maps(method.backbone, v) for v in views]
    a, b = (outputs(method.embed, m[2]) for m in found)
    if not window:  # the lower half of one view is padding, the upper half of the other
        views[0].valid_B1DHW[:, :, :8], views[1].valid_B1DHW[:, :, 8:] = 0, 0
        a, b = a[:, :, 2:], b[:, :, :2]
    each = [slow.local_alignment(x[i], y[i], window or None) for x, y in ((a, b), (b, a)) for i in range(3)]
    z = np.concatenate([outputs(method.projector, pooled(m)) for m in found])
    place = centres(batch, "slice")
    assert all((abs(place[i] - place[i + 3]) < Fraction(threshold)) == (window == 0) for i in range(3))
    position = slow.contrast(z, near(place, 3, threshold), 0.1)
    wanted = {"align": float(np.mean(each)), "position": 0.25 * position}
    assert values_of(method, batch) == pytest.approx(wanted, abs=1e-10)


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    assert_gradient_is_the_derivative("ssal", threshold=0.02)


def test_swapping_the_views_leaves_the_loss() -> None:
    assert_swapping_the_views_leaves_the_loss("ssal", "slice")


def test_it_is_refused_without_what_keeps_it_from_collapsing() -> None:
    with pytest.raises(ConfigError, match="w_position"):
        changed("ssal", w_position=0.0)


def test_pairs_too_far_apart_do_not_align() -> None:
    near = tiny_method("ssal", changed("ssal", gap_mm=1.0))
    batch = batch_of(near, [0, 1])
    assert near(batch, context(0)).terms["align"].item() > 0.0
    far = tiny_method("ssal", changed("ssal", gap_mm=0.5))
    assert far(batch, context(0)).terms["align"].item() == 0.0
    batch.spacing_B3[0, 0] = 1.5  # the next slice of the first sample is now too far as well
    alone = near(take(batch, [1]), context(0)).terms["align"].item()
    assert near(batch, context(0)).terms["align"].item() == pytest.approx(alone / 2, rel=1e-5)


def test_it_trains_on_single_slices() -> None:
    assert_trains_on_single_slices(*on_slices("ssal", **SETTINGS))


def test_two_slices_are_near_and_never_the_same() -> None:
    _, views = on_slices("ssal", **SETTINGS)
    a, b = views.roles["slice"]
    apart = ((a.position_B3 - b.position_B3)[:, 0] * views.shape_B3[:, 0]).abs()
    assert ((apart >= 1 - 1e-9) & (apart <= 3 + 1e-9)).all()
    assert torch.equal((a.position_B3 - b.position_B3)[:, 1:], torch.zeros(4, 2, dtype=torch.float64))


def test_two_slices_are_mirrored_alike() -> None:
    """Or windows would show different places."""
    method, _ = on_slices("ssal", **SETTINGS)
    spec = type(method).view_spec(method.config)
    views = make_views(crops.noise(spec, 12), spec, seed=0, policy=crops.AS_STORED)
    first, second = (view.to_volume_B34[:, :, :3] for view in views.roles["slice"])
    assert torch.equal(first, second)
    assert 0 < (torch.diagonal(first, dim1=1, dim2=2) < 0).any(1).sum() < 12
