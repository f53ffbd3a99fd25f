"""Bundles of a tiny residual encoder, whose packages take no seconds to import."""

from pathlib import Path

import torch

from ssl_core.bundle import write_bundle
from ssl_core.networks import Backbone, build
from ssl_core.portable.head.settings import Head
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


def head_bundle(path: Path, classes: tuple[str, ...] = ("no", "yes"), seed: int = 2, **changes: object) -> Path:
    """A classifier, or without classes a regressor, with random weights."""
    backbone, random = resenc(seed), torch.Generator().manual_seed(seed)
    width = sum(level.channels for level in backbone.levels[-2:])
    weight_KE, bias_K = (torch.randn(len(classes) or 1, *shape, generator=random) for shape in ((width,), ()))
    head = Head("large" if classes else "age", 2, classes, 0.0 if classes else 60.0, 1.0 if classes else 12.0,
                weight_KE, bias_K)  # fmt: skip
    return write_bundle(path, head.kind, backbone, facts(patch_DHW=WINDOW, labels=(), head=head, **changes))
