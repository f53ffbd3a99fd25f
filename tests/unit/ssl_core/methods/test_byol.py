"""BYOL beyond the contract: its loss worked out again, and how its target follows."""

import pytest
import torch
from torch import nn

from ssl_core.testing.method import context, tiny_method, trained
from tests.kit.method_formulas import encoder_maps, mean_distance, outputs, pooled, values_of
from tests.kit.methods import (
    QUARTER,
    assert_gradient_is_the_derivative,
    assert_swapping_the_views_leaves_the_loss,
    assert_targets_follow_by_the_schedule,
    batch_of,
    perturbed,
)


def test_the_loss_is_its_formula() -> None:
    method, batch = perturbed("byol")
    views = batch.roles["global"]
    said = [
        outputs(nn.Sequential(method.projector, method.predictor), pooled(encoder_maps(method.backbone, v)))
        for v in views
    ]
    told = [outputs(method.target_projector, pooled(encoder_maps(method.target_backbone, v))) for v in views]
    wanted = mean_distance(said[0], told[1]) + mean_distance(said[1], told[0])
    assert values_of(method, batch) == pytest.approx({"prediction": wanted}, abs=1e-10)


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    assert_gradient_is_the_derivative("byol")


def test_swapping_the_views_leaves_the_loss() -> None:
    assert_swapping_the_views_leaves_the_loss("byol", "global")


def test_targets_follow_by_the_schedule_that_the_page_says() -> None:
    assert_targets_follow_by_the_schedule("byol", QUARTER)


def test_a_target_keeps_the_running_statistics_of_its_own_passes() -> None:
    method = tiny_method("byol")
    with torch.no_grad():
        for parameter in trained(method):
            parameter.mul_(1.5)
    method(batch_of(method, [0, 1]), context(0))
    before = {n: b.clone() for n, b in method.target_projector.named_buffers()}
    method.after_step(context(0))
    online = dict(method.projector.named_buffers())
    for name, buffer in method.target_projector.named_buffers():
        assert torch.equal(buffer, before[name])
    assert any(not torch.equal(online[n], b) for n, b in before.items())
