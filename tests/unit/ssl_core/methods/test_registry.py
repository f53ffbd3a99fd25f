"""What registered methods have in common, and what registration gives them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ssl_core.config import parse, resolved
from ssl_core.methods import base
from ssl_core.methods.base import (
    Crops,
    LossTerms,
    Method,
    MethodConfig,
    StepContext,
    level_for,
    method_class,
    method_names,
    register,
    tiny_settings,
)
from ssl_core.networks import build
from ssl_core.networks.backbone import Backbone
from ssl_core.testing.method import context, tiny_backbone, tiny_config, train, trained
from ssl_core.views.make import make_views
from ssl_core.views.types import ViewBatch, ViewSpec
from storage.errors import ConfigError
from tests.kit import crops
from tests.kit.methods import batch_of


def test_every_promised_method_is_there() -> None:
    wanted = "aligned byol compose ibot lrc mae mocov2 models_genesis pcl pcrlv2 pgl simclr ssal supervised"
    assert set(wanted.split()) <= set(method_names())


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="simclr"):
        method_class("simclr2")
    with pytest.raises(ConfigError, match="a start in tune and finetune"):
        method_class("none")


class Minimal(nn.Module):
    """No more than a method has to say."""

    class Config(MethodConfig):
        TINY = tiny_settings()

        crops: Crops = Crops()

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone

    @classmethod
    def view_spec(cls, config: Config) -> ViewSpec:
        return ViewSpec((config.crops.role("global", 1),))

    def forward(self, views: ViewBatch, ctx: StepContext) -> LossTerms:
        (view,) = views.roles["global"]
        return LossTerms({"size": self.backbone.features(view.image_BCDHW)[-1].square().mean()})


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


@pytest.mark.usefixtures("registered")
def test_registration_gives_a_method_an_empty_after_step_and_its_backbone_as_the_encoder() -> None:
    class Bare(Minimal):
        pass

    assert not isinstance(Bare(Bare.Config.tiny(), tiny_backbone()), Method)
    method = register("bare")(Bare)(Bare.Config.tiny(), tiny_backbone())
    assert isinstance(method, Method)
    assert method.encoder() is method.backbone
    before = {key: value.clone() for key, value in method.state_dict().items()}
    losses = train(method, batch_of(method, [0, 1]), range(2), torch.optim.SGD(trained(method), lr=0.0))
    assert losses[0] == losses[1]
    method.after_step(context(0))
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


@pytest.mark.usefixtures("registered")
def test_registration_keeps_what_a_method_says_itself() -> None:
    class Outspoken(Minimal):
        def after_step(self, ctx: StepContext) -> None:
            self.last = ctx.step

        def encoder(self) -> str:
            return "another"

    method = register("outspoken")(Outspoken)(Outspoken.Config.tiny(), tiny_backbone())
    method.after_step(context(3))
    assert (method.last, method.encoder()) == (3, "another")


@pytest.mark.usefixtures("registered")
def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        register("pgl")(Minimal)


def test_tiny_settings_keep_the_methods_own_defaults_and_must_fit_its_fields() -> None:
    class Own(MethodConfig):
        TINY = tiny_settings(hidden=4)

        crops: Crops = Crops(min_overlap=0.3)
        hidden: int = 512

    tiny = Own.tiny()
    assert (tiny.hidden, tiny.crops) == (4, Crops(size_DHW=(16, 16, 16), min_overlap=0.3))
    assert Own().hidden == 512

    class Misspelt(Own):
        TINY = tiny_settings(hiden=4)

    with pytest.raises(ConfigError, match=r"TINY of .*Misspelt.*hiden"):
        Misspelt.tiny()


def test_the_level_compared_is_the_deepest_with_enough_positions() -> None:
    backbone = build("basic_unet", features=(4, 4, 8, 8, 8, 4))
    sizes = {(96, 96, 96): 4, (16, 96, 96): 4, (64, 64, 64): 3, (32, 32, 32): 2, (16, 16, 16): 1, (4, 4, 4): 0}
    assert {size: level_for(backbone, size, None) for size in sizes} == sizes
    assert level_for(backbone, (96, 96, 96), 1) == 1
    with pytest.raises(ConfigError, match="feature_level"):
        level_for(backbone, (96, 96, 96), 5)


@pytest.mark.parametrize("name", method_names())
def test_it_trains_on_views_made_of_crops(name: str) -> None:
    kind = method_class(name)
    config = tiny_config(name)
    side = {"size_DHW": (32, 32, 32)}
    settings = resolved(config)
    config = parse(kind.Config, settings | {"crops": settings["crops"] | side})
    if "local" in settings:
        config = parse(kind.Config, resolved(config) | {"local": settings["local"] | {"size_DHW": (32, 32, 32)}})
    spec = kind.view_spec(config)
    host = crops.noise(spec, 2, seed=1)
    maps = {
        m: np.arange(host.label_BDHW.size, dtype=np.int32).reshape(host.label_BDHW.shape) // 64 + 1 for m in spec.maps
    }
    views = make_views(replace(host, maps_BDHW=maps), spec, seed=0, policy=crops.AS_STORED)
    torch.manual_seed(0)
    method = kind(config, build("basic_unet", features=(4, 4, 8, 8, 8, 4))).train()
    losses = train(method, views, range(2), torch.optim.SGD(trained(method), lr=1e-3))
    assert np.isfinite(losses).all()
    assert {name: float(v) for name, v in method(views, context(2)).monitors.items()}
