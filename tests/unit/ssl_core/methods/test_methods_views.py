"""Every method takes the views that are really made for it, on the network of the demo's size."""

import numpy as np
import pytest
import torch

from ssl_core.config import parse, resolved
from ssl_core.methods.base import method_class, method_names
from ssl_core.networks import build
from ssl_core.testing.method import context, tiny_config, train, trained
from ssl_core.views.make import make_views
from tests.kit import crops


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
    host.maps_BDHW = {
        m: np.arange(host.label_BDHW.size, dtype=np.int32).reshape(host.label_BDHW.shape) // 64 + 1 for m in spec.maps
    }
    views = make_views(host, spec, seed=0, policy=crops.AS_STORED)
    torch.manual_seed(0)
    method = kind(config, build("basic_unet", features=(4, 4, 8, 8, 8, 4))).train()
    losses = train(method, views, range(2), torch.optim.SGD(trained(method), lr=1e-3))
    assert np.isfinite(losses).all()
    assert {name: float(v) for name, v in method(views, context(2)).monitors.items()}
