"""PGL beyond the contract: its loss worked out again, what it compares, and its global term."""

import numpy as np
import pytest
import torch
from torch import nn

from ssl_core.methods.base import method_class
from ssl_core.testing.method import assert_targets_follow, context, tiny_method, trained
from ssl_core.views import placement
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import ViewBatch
from tests.kit.method_formulas import (
    aligned_distance,
    encoder_maps,
    hang_over,
    mean_distance,
    outputs,
    pooled,
    values_of,
)
from tests.kit.methods import (
    QUARTER,
    assert_gradient_is_the_derivative,
    assert_padding_is_not_compared,
    assert_swapping_the_views_leaves_the_loss,
    assert_targets_follow_by_the_schedule,
    assert_what_the_loss_depends_on_is_trained,
    batch_of,
    changed,
    perturbed,
)


def test_the_loss_is_its_formula() -> None:
    method, batch = perturbed("pgl", w_global=0.5)
    views = batch.roles["global"]
    hang_over(batch)
    online, target = ([encoder_maps(net, v) for v in views] for net in (method.backbone, method.target_backbone))
    both = nn.Sequential(method.projector, method.predictor)
    said = [outputs(both, m[method.level]) for m in online]
    told = [outputs(method.target_projector, m[method.level]) for m in target]
    local = sum(aligned_distance(said, told, batch, method.backbone.levels[method.level]))
    both = nn.Sequential(method.global_projector, method.global_predictor)
    said = [outputs(both, pooled(m)) for m in online]
    told = [outputs(method.target_global_projector, pooled(m)) for m in target]
    wanted = {"local": local, "global": 0.5 * (mean_distance(said[0], told[1]) + mean_distance(said[1], told[0]))}
    assert values_of(method, batch) == pytest.approx(wanted, abs=1e-10)


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    assert_gradient_is_the_derivative("pgl")


def test_swapping_the_views_leaves_the_loss() -> None:
    assert_swapping_the_views_leaves_the_loss("pgl", "global")


def test_targets_follow_by_the_schedule_that_the_page_says() -> None:
    assert_targets_follow_by_the_schedule("pgl", QUARTER)


def test_padding_is_not_compared() -> None:
    assert_padding_is_not_compared("pgl", "local")


def test_what_the_loss_depends_on_is_trained_where_skips_have_layers_of_their_own() -> None:
    assert_what_the_loss_depends_on_is_trained("pgl", feature_level=2, w_global=1.0)


def test_it_is_zero_for_the_same_view_and_an_online_network_that_equals_its_target() -> None:
    method = tiny_method("pgl", changed("pgl", norm="none")).double()
    method.predictor = nn.Identity()
    batch = batch_of(method, [0, 1], torch.float64)
    first = batch.roles["global"][0]
    same = ViewBatch({"global": (first, first)}, batch.volume_B, batch.sample_B, batch.spacing_B3, batch.shape_B3)
    assert method(same, context(0)).total.item() == pytest.approx(0.0, abs=1e-12)
    assert method(batch, context(0)).total.item() > 1e-3


def test_without_overlap_it_is_zero_with_a_gradient_of_zero() -> None:
    method = tiny_method("pgl")
    batch = batch_of(method, [0, 1])
    batch.roles["global"][1].to_volume_B34[:, :, 3] += 1000.0
    terms = method(batch, context(0))
    terms.total.backward()
    assert terms.total.item() == 0.0
    assert terms.monitors["shared_points"].item() == 0.0
    assert all(not p.grad.any() for p in trained(method))


def test_the_global_term_trains_the_deepest_level() -> None:
    local, both = tiny_method("pgl"), tiny_method("pgl", changed("pgl", w_global=1.0))
    deepest = "bottleneck.conv1.conv.weight"
    flags = [dict(m.backbone.net.named_parameters())[deepest].requires_grad for m in (local, both)]
    assert flags == [False, True]
    terms = both(batch_of(both, [0, 1]), context(0)).terms
    assert set(terms) == {"local", "global"}


def test_the_targets_of_the_global_term_follow_too() -> None:
    method = tiny_method("pgl", changed("pgl", w_global=1.0)).double()
    assert_targets_follow(method, batch_of(method, [0, 1], torch.float64))


def test_views_share_no_sliver() -> None:
    """Ten percent of overlap may lie in a thin slab; the host crop keeps it at a sixth of a view along every axis."""
    kind = method_class("pgl")
    spec = kind.view_spec(kind.Config())
    count, host = 4000, host_size(spec)
    made = placement.draw(
        spec,
        seed=0,
        sample_B=np.arange(count),
        start_B3=np.zeros((count, 3), np.int64),
        host_DHW=host,
        shape_B3=np.tile(np.array(host, np.float64), (count, 1)),
        spacing_B3=np.ones((count, 3)),
    )["global"]
    side = np.abs(np.diagonal(made[..., :3], axis1=2, axis2=3)) * 64
    centre = made[..., :3].sum(3) * 32 + made[..., 3]
    low, high = centre - side / 2, centre + side / 2
    shared = high.min(0) - low.max(0)
    assert (shared / side.min(0)).min() > 1 / 6
