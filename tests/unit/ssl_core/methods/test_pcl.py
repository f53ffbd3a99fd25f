"""PCL beyond the contract: its loss worked out again, and its positives, on slices and on sub-volumes."""

import numpy as np
import pytest
import torch

from ssl_core.methods.base import method_class
from ssl_core.testing.method import context, tiny_config, tiny_method
from ssl_core.testing.views import take
from tests.kit.method_formulas import centres, encoder_maps, near, outputs, pooled
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


@pytest.mark.parametrize("denominator", ["all", "pos_neg"])
@pytest.mark.parametrize("depth", [1, 16])
def test_the_loss_is_its_formula_on_slices_and_sub_volumes(depth: int, denominator: str) -> None:
    crops = tiny_config("pcl").crops.model_dump() | {"size_DHW": (depth, 16, 16)}
    settings = {"crops": crops, "threshold": 0.1, "denominator": denominator}
    method, batch = perturbed("pcl", 5, dims=2 if depth == 1 else 3, **settings)
    views = batch.roles["slice"]
    # At 0.1, 0.2 (exactly a threshold on), 0.833, 0.167 and 0.508 of volumes of several lengths.
    batch.shape_B3[:, 0] = torch.tensor([20, 30, 24, 24, 60])
    middle = torch.tensor([2.0, 6.0, 20.0, 4.0, 30.5], dtype=torch.float64)
    for view in views:
        view.to_volume_B34[:, 0, 3] = middle - depth / 2
        view.position_B3[:, 0] = middle / batch.shape_B3[:, 0]
    z = np.concatenate([outputs(method.projector, pooled(encoder_maps(method.backbone, v))) for v in views])
    positive = near(centres(batch, "slice"), 5, "0.1")
    count = [sum(row) for row in positive]
    assert count == 2 * [4, 4, 2, 6, 2]
    terms = method(batch, context(0))
    assert terms.total.item() == pytest.approx(slow.contrast(z, positive, 0.1, denominator), abs=1e-10)
    assert terms.monitors["positives"].item() == pytest.approx(np.mean(count) - 1)


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    assert_gradient_is_the_derivative("pcl", threshold=0.02)


def test_swapping_the_views_leaves_the_loss() -> None:
    assert_swapping_the_views_leaves_the_loss("pcl", "slice")


def test_with_a_vanishing_threshold_it_is_simclr() -> None:
    method = tiny_method("pcl", changed("pcl", threshold=1e-6))
    batch = batch_of(method, list(range(12)))
    place = batch.roles["slice"][0].position_B3[:, 0].tolist()
    apart = take(batch, [place.index(p) for p in sorted(set(place))[:3]])
    assert method(apart, context(0)).monitors["positives"].item() == 1.0
    wide = tiny_method("pcl", changed("pcl", threshold=2.0))
    assert wide(apart, context(0)).monitors["positives"].item() == 5.0


def test_it_never_flips_along_the_body_by_default_and_shows_one_box_twice() -> None:
    kind = method_class("pcl")
    (role,) = kind.view_spec(kind.Config()).roles
    assert role.flip[0] == 0.0
    assert role.offset_vox == (0, 0)


def test_it_trains_on_single_slices() -> None:
    assert_trains_on_single_slices(*on_slices("pcl"))


def test_two_views_are_of_one_slice() -> None:
    _, views = on_slices("pcl")
    a, b = views.roles["slice"]
    assert torch.equal(a.position_B3, b.position_B3)
    assert not torch.equal(a.image_BCDHW, b.image_BCDHW)
