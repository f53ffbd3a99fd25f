"""MoCo v2 beyond the contract: its loss worked out again, and its queue."""

import numpy as np
import pytest
import torch
from torch import nn

from ssl_core.methods.mocov2 import _told_apart
from ssl_core.testing.method import context, tiny_method
from ssl_core.testing.views import take
from tests.kit.method_formulas import encoder_maps, outputs, pooled, values_of
from tests.kit.methods import (
    assert_gradient_is_the_derivative,
    assert_targets_follow_by_the_schedule,
    assert_what_the_loss_depends_on_is_trained,
    batch_of,
    changed,
    perturbed,
)
from tests.oracles import losses as slow


@pytest.mark.parametrize("own", [False, True])
def test_the_loss_is_its_formula(own: bool) -> None:
    method, batch = perturbed("mocov2", 3, pool="last", same_volume_negatives=own)
    method.queue_volume_K.copy_(torch.arange(8) % 4)
    method.queue_KE.copy_(nn.functional.normalize(method.queue_KE, dim=1))
    first, second = batch.roles["global"]
    q = outputs(method.projector, pooled(encoder_maps(method.backbone, first)))
    k = outputs(method.target_projector, pooled(encoder_maps(method.target_backbone, second)))
    queue = method.queue_KE.numpy().copy()
    each = []
    for i in range(3):
        kept = [n for n in range(8) if own or n % 4 != i]
        each.append(slow.queue(q[i : i + 1], k[i : i + 1], queue[kept], method.config.temperature))
    assert values_of(method, batch) == pytest.approx({"contrast": float(np.mean(each))}, abs=1e-10)
    # Only then do the keys enter the queue, as unit vectors.
    assert np.array_equal(method.queue_KE.numpy(), queue)
    method.after_step(context(0))
    assert np.allclose(method.queue_KE[:3].numpy(), [slow.unit(row) for row in k], atol=1e-12)
    assert np.array_equal(method.queue_KE[3:].numpy(), queue[3:])


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    assert_gradient_is_the_derivative("mocov2")


def test_targets_follow_by_the_schedule_that_the_page_says() -> None:
    assert_targets_follow_by_the_schedule("mocov2", 0.99)


@pytest.mark.parametrize("pool", ["all", "last"])
def test_what_the_loss_depends_on_is_trained_where_skips_have_layers_of_their_own(pool: str) -> None:
    assert_what_the_loss_depends_on_is_trained("mocov2", pool=pool)


def test_the_queue_holds_the_newest_keys_in_order() -> None:
    method = tiny_method("mocov2")
    keys = []
    for step, samples in enumerate(([0, 1, 2], [3, 4, 5], [6, 7, 8])):
        method(batch_of(method, samples), context(step))
        keys.append(method._fresh[0][0].clone())
        method.after_step(context(step))
    newest = torch.cat(keys)[-8:]
    assert method.queue_next.item() == 1
    assert torch.equal(method.queue_KE.roll(-1, 0), newest)
    assert method.queue_volume_K.roll(-1).tolist() == list(range(1, 9))


def test_crops_of_the_own_volume_are_no_negatives() -> None:
    method = tiny_method("mocov2")
    batch = batch_of(method, [0, 1])
    batch.volume_B.zero_()
    method.queue_volume_K.zero_()
    assert method(batch, context(0)).total.item() == pytest.approx(0.0, abs=1e-6)
    method.queue_volume_K[3:] = 1
    assert method(batch, context(0)).total.item() > 0.1
    kept = tiny_method("mocov2", changed("mocov2", same_volume_negatives=True))
    kept.queue_volume_K.zero_()
    assert kept(batch, context(0)).total.item() > 0.1


def test_a_queue_shorter_than_the_batch_keeps_its_newest_part() -> None:
    method = tiny_method("mocov2", changed("mocov2", queue=2))
    method(batch_of(method, [0, 1, 2]), context(0))
    method.after_step(context(0))
    assert sorted(method.queue_volume_K.tolist()) == [1, 2]


def test_the_queue_is_in_the_order_of_samples_however_ranks_share_them() -> None:
    shared, whole = (tiny_method("mocov2", changed("mocov2", queue=3)).double() for _ in range(2))
    for step, samples in enumerate(([0, 1, 2, 3], [4, 5, 6, 7])):
        batch = batch_of(whole, samples, torch.float64)
        # Lanes of even samples on one rank, of odd ones on another: so their keys are gathered.
        for method, views in ((whole, batch), (shared, take(batch, [0, 2, 1, 3]))):
            method(views, context(step))
            method.after_step(context(step))
        assert torch.equal(shared.queue_volume_K, whole.queue_volume_K)
        torch.testing.assert_close(shared.queue_KE, whole.queue_KE, rtol=0, atol=1e-10)
    assert sorted(whole.queue_volume_K.tolist()) == [5, 6, 7]


def test_cosines_that_are_watched_keep_their_digits_under_autocast() -> None:
    a = nn.functional.normalize(1 + 0.01 * torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    b, queue = a.flip(0), a.roll(1, 0)
    exact = _told_apart(a, b, queue, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert _told_apart(a, b, queue, None) == exact
