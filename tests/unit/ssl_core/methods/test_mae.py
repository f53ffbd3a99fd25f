"""MAE beyond the contract: its loss worked out again, and what it counts."""

import pytest
import torch

from ssl_core.methods.parts.masking import block_mask
from ssl_core.testing.method import context, tiny_method
from storage.errors import ConfigError
from tests.kit.method_formulas import restoration_error, values_of
from tests.kit.methods import assert_gradient_is_the_derivative, batch_of, changed, perturbed


def test_the_loss_is_its_formula() -> None:
    method, batch = perturbed("mae")
    view = batch.roles["global"][0]
    view.valid_B1DHW[1, :, :, 9:] = 0
    hidden = block_mask(7, batch.sample_B, view.size_DHW, 4, 0.75, "mae")
    wanted = restoration_error(method, view, hidden, view.image_BCDHW)
    assert values_of(method, batch) == pytest.approx({"restoration": wanted}, abs=1e-10)


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    assert_gradient_is_the_derivative("mae")


def test_hidden_voxels_alone_count() -> None:
    method = tiny_method("mae")
    batch = batch_of(method, [0, 1])
    view = batch.roles["global"][0]
    method.restore.conv.weight.data.zero_()
    method.restore.conv.bias.data.zero_()
    mask = block_mask(7, batch.sample_B, (16, 16, 16), 4, 0.75, "mae")
    wanted = torch.stack([x[m].square().mean() for x, m in zip(view.image_BCDHW, mask, strict=True)]).mean()
    assert method(batch, context(0)).total.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_view_that_one_block_hides_whole_is_refused() -> None:
    changed("mae", block=15)
    with pytest.raises(ConfigError, match="hidden whole"):
        changed("mae", block=16)
