"""Bundles of a tiny residual encoder, whose packages take no seconds to import."""

from pathlib import Path

import torch

from ssl_core.bundle import write_bundle
from ssl_core.networks import Backbone, build
from tests.kit.bundles import facts
from tests.kit.networks import SMALL

WINDOW = (16, 16, 16)


def resenc(seed: int = 0, **arguments: object) -> Backbone:
    torch.manual_seed(seed)
    backbone = build("resenc", **{**SMALL["resenc"], "out_channels": 3, **arguments})
    with torch.no_grad():  # a fresh network's masks are of one class
        for parameter in backbone.net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        backbone.net.decoder.seg_layers[-1].bias.zero_()  # type: ignore[union-attr, operator, index]
    return backbone


def segmenter_bundle(path: Path, seed: int = 0, **changes: object) -> Path:
    return write_bundle(path, "segmenter", resenc(seed), facts(patch_DHW=WINDOW, **changes))


def encoder_bundle(path: Path, seed: int = 1, **changes: object) -> Path:
    return write_bundle(path, "encoder", resenc(seed), facts(patch_DHW=WINDOW, labels=(), **changes))
