"""The methods that papers define on slices, on single slices with 2-D networks."""

import numpy as np
import pytest
import torch

from ssl_core.config import parse
from ssl_core.methods.base import method_class
from ssl_core.networks import build
from ssl_core.superpixels.segment import superpixels
from ssl_core.testing.method import context, train, trained
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import ViewBatch
from tests.kit import crops

SLICE = {"size_DHW": [1, 32, 32], "flip": [0.0, 0.5, 0.5]}
SETTINGS = {
    "pcl": {"hidden": 16, "out": 8},
    "ssal": {"hidden": 16, "out": 8, "align_out": 8, "window": 2},
    "lrc": {"base": "simclr", "hidden": 8, "out": 8, "regions": 4, "pixels": 4, "superpixels": {"mode": "slices"}},
}


def made(name: str) -> tuple[torch.nn.Module, ViewBatch]:
    kind = method_class(name)
    config = parse(kind.Config, {"crops": SLICE, **SETTINGS[name]})
    spec = kind.view_spec(config)
    host = crops.noise(spec, 4, seed=1)
    random = np.random.default_rng(0)
    blocks = random.random((4, *host_size(spec))).astype(np.float32)
    host.maps_BDHW = {m: np.stack([superpixels(b, "slices", scale=1e3) for b in blocks]) for m in spec.maps}
    views = make_views(host, spec, seed=0, policy=crops.AS_STORED)
    torch.manual_seed(0)
    return kind(config, build("basic_unet", spatial_dims=2, features=(4, 4, 8, 8, 8, 4))).train(), views


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_they_train_on_single_slices(name: str) -> None:
    method, views = made(name)
    assert {tuple(v.size_DHW) for role in views.roles.values() for v in role} == {(1, 32, 32)}
    method(views, context(0)).total.backward()
    dead = [n for n, p in method.named_parameters() if p.requires_grad and p.dim() > 1 and not p.grad.any()]
    assert dead == []
    losses = train(method, views, range(12), torch.optim.AdamW(trained(method), lr=1e-2))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_two_slices_of_ssal_are_near_and_never_the_same() -> None:
    _, views = made("ssal")
    a, b = views.roles["slice"]
    apart = ((a.position_B3 - b.position_B3)[:, 0] * views.shape_B3[:, 0]).abs()
    assert ((apart >= 1 - 1e-9) & (apart <= 3 + 1e-9)).all()
    assert torch.equal((a.position_B3 - b.position_B3)[:, 1:], torch.zeros(4, 2, dtype=torch.float64))


def test_two_slices_of_ssal_are_mirrored_alike() -> None:
    """Or windows would show different places."""
    method, _ = made("ssal")
    spec = type(method).view_spec(method.config)
    views = make_views(crops.noise(spec, 12), spec, seed=0, policy=crops.AS_STORED)
    first, second = (view.to_volume_B34[:, :, :3] for view in views.roles["slice"])
    assert torch.equal(first, second)
    assert 0 < (torch.diagonal(first, dim1=1, dim2=2) < 0).any(1).sum() < 12


def test_two_views_of_pcl_are_of_one_slice() -> None:
    _, views = made("pcl")
    a, b = views.roles["slice"]
    assert torch.equal(a.position_B3, b.position_B3)
    assert not torch.equal(a.image_BCDHW, b.image_BCDHW)
