"""Registered methods with changed settings and views for them, and what several methods promise alike."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ssl_core.config import parse
from ssl_core.methods.base import StepContext, method_class
from ssl_core.networks import build
from ssl_core.superpixels.segment import superpixels
from ssl_core.testing.method import context, tiny_config, tiny_method, train, trained
from ssl_core.testing.views import synthetic_views
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import ViewBatch
from tests.kit import crops

F64 = torch.float64
SLICE = {"size_DHW": [1, 32, 32], "flip": [0.0, 0.5, 0.5]}


def changed(name: str, **settings: Any) -> Any:
    """The tiny settings of a method with these changes."""
    config = tiny_config(name)
    return parse(type(config), config.model_dump() | settings)


def batch_of(method: Any, samples: list[int], dtype: torch.dtype = torch.float32) -> ViewBatch:
    """Synthetic views of these samples."""
    return synthetic_views(type(method).view_spec(method.config), samples, dtype)


def perturbed(name: str, samples: int = 2, dims: int = 3, **settings: Any) -> tuple[Any, ViewBatch]:
    """A method in float64 whose online weights differ from its targets', and views."""
    method = tiny_method(name, changed(name, **settings), spatial_dims=dims).double()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(method):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random, dtype=F64))
    return method, batch_of(method, list(range(samples)), F64)


def on_slices(name: str, **settings: Any) -> tuple[torch.nn.Module, ViewBatch]:
    """A method on a 2-D network and views of single slices, with super-pixels where it asks for them."""
    kind = method_class(name)
    config = parse(kind.Config, {"crops": SLICE, "hidden": 16, "out": 8, **settings})
    spec = kind.view_spec(config)
    host = crops.noise(spec, 4, seed=1)
    random = np.random.default_rng(0)
    blocks = random.random((4, *host_size(spec))).astype(np.float32)
    maps = {m: np.stack([superpixels(b, "slices", scale=1e3) for b in blocks]) for m in spec.maps}
    views = make_views(replace(host, maps_BDHW=maps), spec, seed=0, policy=crops.AS_STORED)
    torch.manual_seed(0)
    return kind(config, build("basic_unet", spatial_dims=2, features=(4, 4, 8, 8, 8, 4))).train(), views


def swap(batch: ViewBatch, role: str) -> ViewBatch:
    """The views of a role in the other order."""
    views = {**batch.roles, role: batch.roles[role][::-1]}
    return ViewBatch(views, batch.volume_B, batch.sample_B, batch.spacing_B3, batch.shape_B3)


def assert_swapping_the_views_leaves_the_loss(name: str, role: str) -> None:
    """Which of two views comes first means nothing."""
    method = tiny_method(name).double()
    batch = batch_of(method, [0, 1], F64)
    total = method(batch, context(0)).total.item()
    assert method(swap(batch, role), context(0)).total.item() == pytest.approx(total, abs=1e-10)


def assert_padding_is_not_compared(name: str, term: str) -> None:
    """Where all that the views show lies beyond the volume, that term is 0."""
    method = tiny_method(name)
    batch = batch_of(method, [0, 1])
    assert method(batch, context(0)).terms[term].item() > 0
    batch.shape_B3.zero_()
    assert method(batch, context(0)).terms[term].item() == 0.0


def assert_what_the_loss_depends_on_is_trained(name: str, **settings: Any) -> None:
    """On a network whose skips have layers of their own, which the deepest level does not see."""
    pytest.importorskip("einops")
    few = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
    backbone = build("swin_unetr", feature_size=12, **few)
    crops = tiny_config(name).crops.model_dump() | {"size_DHW": (32, 32, 64)}
    method = method_class(name)(changed(name, crops=crops, **settings), backbone).train()
    trains = {n for n, p in backbone.net.named_parameters() if p.requires_grad}
    backbone.net.requires_grad_(True)
    method(batch_of(method, [0]), context(0)).total.backward()
    assert trains == {n for n, p in backbone.net.named_parameters() if p.grad is not None}


QUARTER = 0.99 + 0.01 * (1 - np.cos(np.pi / 4)) / 2
"""A quarter of the way on a cosine from 0.99 to 1."""


def assert_targets_follow_by_the_schedule(name: str, late: float) -> None:
    """Momentum is (1 + k) / (10 + k) at first, and `late` at a quarter of a long run."""
    method, batch = perturbed(name)
    for step, momentum in ((0, 1 / 10), (50, 51 / 60), (5_000, late)):
        ctx = StepContext(step, 20_000, 7)
        before = [p.clone() for p in method.target_backbone.parameters()]
        method(batch, ctx)
        method.after_step(ctx)
        triples = zip(method.target_backbone.parameters(), before, method.backbone.parameters(), strict=True)
        assert all(torch.allclose(t, momentum * old + (1 - momentum) * new, atol=1e-12) for t, old, new in triples)


def assert_gradient_is_the_derivative(name: str, only: tuple[str, ...] = (), **settings: Any) -> None:
    """Keys are gathered with gradient, and nothing is detached but targets; `only` these terms, or all."""
    method, batch = perturbed(name, 3, **settings)
    random = torch.Generator().manual_seed(0)
    weights = trained(method)
    step = [1e-7 * torch.randn(p.shape, generator=random, dtype=F64) for p in weights]

    def loss() -> torch.Tensor:
        terms = method(batch, context(0)).terms
        return torch.stack([term for key, term in terms.items() if not only or key in only]).sum()

    loss().backward()
    slope = sum(float((p.grad * s).sum()) for p, s in zip(weights, step, strict=True) if p.grad is not None)
    values = []
    with torch.no_grad():
        for shift in (1, -2):
            for p, s in zip(weights, step, strict=True):
                p += shift * s
            values.append(loss().item())
    # What rounds, and what has a kink between the two.
    assert (values[0] - values[1]) / 2 == pytest.approx(slope, rel=1e-2, abs=1e-14)


def assert_trains_on_single_slices(method: torch.nn.Module, views: ViewBatch) -> None:
    """Every kernel gets a gradient, and the loss falls."""
    assert {tuple(v.size_DHW) for role in views.roles.values() for v in role} == {(1, 32, 32)}
    method(views, context(0)).total.backward()
    dead = [n for n, p in method.named_parameters() if p.requires_grad and p.dim() > 1 and not p.grad.any()]
    assert dead == []
    losses = train(method, views, range(12), torch.optim.AdamW(trained(method), lr=1e-2))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
