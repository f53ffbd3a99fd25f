"""The losses of heads, their pooled features, and the order of a linear probe, against plain formulas."""

from itertools import islice, product

import numpy as np
import pytest
import torch

from ssl_core.distributed import Single
from ssl_core.downstream.finetune import FinetuneConfig
from ssl_core.downstream.heads.network import (
    WholeVolume,
    build_head,
    class_weights,
    head_loss,
    probe_batches,
    require_modules,
)
from ssl_core.downstream.heads.targets import Target
from ssl_core.portable.head.pooling import pooled, volume_features
from ssl_core.portable.windows import padded, window_starts
from storage.errors import ConfigError
from tests.kit.networks import SMALL

CLASSES = Target("c", "classification", ("a", "b", "c"), {0: 0.0, 1: 0.0, 2: 0.0, 3: 1.0, 9: 2.0})


def test_weighted_cross_entropy_is_the_formula_and_cuts_of_a_batch_weigh_as_the_whole() -> None:
    weight_K = class_weights(CLASSES, (0, 1, 2, 3), "balanced")
    assert weight_K.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1), 1.0]), "as scikit-learn; none of c to weigh"
    assert class_weights(CLASSES, (0, 1, 2, 3), "none").tolist() == [1.0, 1.0, 1.0]
    outputs = np.random.default_rng(0).normal(0, 2, (4, 3))
    truth = np.array([0, 1, 0, 1])
    shares = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    expected = np.mean([-weight_K[t].item() * np.log(s[t]) for t, s in zip(truth, shares, strict=True)])
    both = torch.from_numpy(outputs), torch.from_numpy(truth).double()
    loss = head_loss(*both, CLASSES, "smooth_l1", weight_K)
    assert loss["ce"].item() == pytest.approx(expected)
    halves = [head_loss(both[0][h], both[1][h], CLASSES, "mse", weight_K)["ce"] for h in (slice(2), slice(2, 4))]
    assert torch.stack(halves).mean().item() == pytest.approx(expected)


def test_regression_losses_are_the_formulas() -> None:
    target = Target("age", "regression", (), {0: 1.0}, 0.0, 1.0)
    outputs, truth = np.array([[0.2], [3.0], [-2.5]]), np.array([0.0, 1.0, -1.0])
    d = np.abs(outputs[:, 0] - truth)
    smooth = np.where(d < 1, d**2 / 2, d - 0.5).mean()
    both = torch.from_numpy(outputs), torch.from_numpy(truth)
    assert head_loss(*both, target, "smooth_l1", torch.ones(0))["smooth_l1"].item() == pytest.approx(smooth)
    assert head_loss(*both, target, "mse", torch.ones(0))["mse"].item() == pytest.approx((d**2).mean())


def test_a_volume_is_the_plain_mean_over_its_windows() -> None:
    random = np.random.default_rng(3)
    image, window, air = random.normal(size=(2, 21, 9, 16)).astype(np.float32), (8, 12, 8), np.float32([-1.0, 2.0])
    larger, _ = padded(image, window, air)
    starts = [window_starts(n, w, 0.5) for n, w in zip(larger.shape[1:], window, strict=True)]
    each = []
    for corner in product(*starts):
        box = larger[(slice(None), *(slice(c, c + w) for c, w in zip(corner, window, strict=True)))].astype(np.float64)
        each.append(np.concatenate([box.mean((1, 2, 3)), np.square(box).mean((1, 2, 3))]))
    assert len(each) > 8
    features = volume_features(
        lambda x: pooled([x.double(), x.double() ** 2]),
        lambda start, stop: image[:, start:stop],
        image.shape[1:],
        air,
        window,
        device=torch.device("cpu"),
        batch=3,
    )
    np.testing.assert_allclose(features.numpy(), np.mean(each, 0), rtol=1e-12)


def test_a_probe_goes_through_all_volumes_each_pass_and_from_any_step_on() -> None:
    config = FinetuneConfig(task="classification", batch=3)
    table = torch.arange(5.0)[:, None]

    def volumes(step: int, count: int) -> list[int]:
        stream = probe_batches(table, (10, 11, 12, 13, 14), config, Single(), seed=7, step=step)
        batches = list(islice(stream, count))
        for batch in batches:
            rows = batch.roles["patch"][0].image_BCDHW.flatten().long() + 10
            assert torch.equal(rows, batch.volume_B)
        return [int(v) for batch in batches for v in batch.volume_B]

    whole = volumes(0, 10)
    assert [sorted(whole[i : i + 5]) for i in range(0, 30, 5)] == [[10, 11, 12, 13, 14]] * 6
    assert whole[:5] != whole[5:10]
    assert volumes(4, 6) == whole[12:]


def test_a_head_trains_its_encoder_and_not_the_decoder_and_a_probe_only_its_layer() -> None:
    network = build_head("resenc", SMALL["resenc"], 2, 3, 0, None)
    assert network.linear.weight.shape == (3, 16)
    config = FinetuneConfig(task="classification", trained={"parts": "decoder_first", "steps": 3})
    objective = WholeVolume(network, config, CLASSES, (0, 3), pretrained=True)
    encoder = {f"stored.backbone.net.{key}" for key in network.backbone.encoder_keys()}
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained - encoder == {"stored.linear.weight", "stored.linear.bias"}
    assert trained & encoder
    assert objective.rates is not None
    assert set(trained) <= set(objective.rates.group_of)
    scales = [objective.rates.at(step)["level-0"] for step in (2, 3)]
    assert scales == [0.0, 1.0]
    frozen = FinetuneConfig(task="classification", head={"frozen": True})
    probe = WholeVolume(network, frozen, CLASSES, (0, 3), pretrained=True)
    assert [name for name, _ in probe.named_parameters()] == ["stored.weight", "stored.bias"]


def test_levels_that_no_module_puts_out_are_refused_with_the_setting() -> None:
    require_modules("m", ["a", "", "b", "c"], 2)
    with pytest.raises(ConfigError, match="finetune.head.levels.*at most 2, which m has.*found 3"):
        require_modules("m", ["a", "", "b", "c"], 3)
