"""Supervised pre-training beyond the contract: its loss worked out again, and its label values."""

import pytest
import torch

from ssl_core.testing.method import context, tiny_method
from storage.errors import ConfigError
from tests.kit.methods import assert_gradient_is_the_derivative, batch_of, changed


def test_it_learns_its_values_and_takes_all_others_for_background() -> None:
    method = tiny_method("supervised", changed("supervised", values=[222, 223])).double()
    batch = batch_of(method, [0, 1], torch.float64)
    (view,) = batch.roles["global"]
    label = view.maps["label"]
    classes = (label == 222) * 1 + (label == 223) * 2
    terms = method(batch, context(0))
    logits = method.classifier(method.backbone.decode(method.backbone.features(view.image_BCDHW))[-1])
    share = logits.softmax(1)
    entropy = -share.gather(1, classes[:, None]).log().mean()
    dice = []
    for b in range(2):
        for value in (1, 2):
            p, y = share[b, value], (classes[b] == value).double()
            dice.append(1 - (2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5))
    wanted = entropy + torch.stack(dice).mean()
    assert terms.terms["segmentation"].item() == pytest.approx(wanted.item(), rel=1e-9)
    assert terms.monitors["accuracy"].item() == pytest.approx((logits.argmax(1) == classes).double().mean().item())
    # Which other values there are means nothing.
    label[label < 222] = 7
    assert method(batch, context(0)).total.item() == pytest.approx(terms.total.item(), rel=1e-12)


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    assert_gradient_is_the_derivative("supervised")


@pytest.mark.parametrize("values", [[], [0, 1], [2, 2]])
def test_values_that_are_no_classes_are_refused(values: list[int]) -> None:
    with pytest.raises(ConfigError, match="values"):
        changed("supervised", values=values)
