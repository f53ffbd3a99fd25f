"""SimCLR beyond the contract: its loss worked out again, what it trains, what it is watched by."""

import numpy as np
import pytest
import torch
from torch import nn

from ssl_core.methods.simclr import _similarities
from tests.kit.method_formulas import encoder_maps, outputs, values_of
from tests.kit.methods import (
    assert_gradient_is_the_derivative,
    assert_swapping_the_views_leaves_the_loss,
    assert_what_the_loss_depends_on_is_trained,
    perturbed,
)
from tests.oracles import losses as slow


def test_the_loss_is_its_formula() -> None:
    method, batch = perturbed("simclr", 3)
    z = []
    for view in batch.roles["global"]:
        every = torch.cat([m.flatten(2).mean(2) for m in encoder_maps(method.backbone, view)], 1)
        z.append(outputs(method.projector, every))
    same = [[i % 3 == j % 3 for j in range(6)] for i in range(6)]
    wanted = slow.contrast(np.concatenate(z), same, method.config.temperature)
    assert values_of(method, batch) == pytest.approx({"contrast": wanted}, abs=1e-10)


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    assert_gradient_is_the_derivative("simclr")


def test_swapping_the_views_leaves_the_loss() -> None:
    assert_swapping_the_views_leaves_the_loss("simclr", "global")


def test_what_the_loss_depends_on_is_trained_where_skips_have_layers_of_their_own() -> None:
    assert_what_the_loss_depends_on_is_trained("simclr", pool="last")


def test_cosines_that_are_watched_keep_their_digits_under_autocast() -> None:
    a = nn.functional.normalize(1 + 0.01 * torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    b = a.flip(0)
    exact = _similarities([a, b])
    with torch.autocast("cpu", torch.bfloat16):
        assert _similarities([a, b]) == exact
