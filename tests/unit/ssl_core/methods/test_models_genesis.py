"""Models Genesis beyond the contract: its loss worked out again."""

import pytest
import torch

from tests.kit.method_formulas import (
    encoder_maps,
    values_of,
)
from tests.kit.methods import assert_gradient_is_the_derivative, perturbed
from tests.oracles import losses as slow


def test_the_loss_is_its_formula() -> None:
    method, batch = perturbed("models_genesis")
    view = batch.roles["global"][0]
    view.valid_B1DHW[1, :, :, 9:] = 0
    with torch.no_grad():
        output = method.restore(method.backbone.decode(encoder_maps(method.backbone, view))[-1])
    assert view.clean_BCDHW is not None
    wanted = slow.masked_mse(output.numpy(), view.clean_BCDHW.numpy(), view.valid_B1DHW[:, 0].numpy() > 0)
    assert values_of(method, batch) == pytest.approx({"restoration": wanted}, abs=1e-10)


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    assert_gradient_is_the_derivative("models_genesis")
