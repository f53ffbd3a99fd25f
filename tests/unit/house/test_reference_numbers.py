"""Numbers of the papers' own code that are no loss: sizes of networks, feature centres, a factor, a scale."""

import math

import numpy as np
import pytest
import torch

from ssl_core.config import parse
from ssl_core.losses.contrast import multi_positive_nce
from ssl_core.methods.base import method_class
from ssl_core.networks.pyramid import cumulative
from ssl_core.superpixels.segment import felzenszwalb_nd
from tests.kit.embeddings import not_itself, toy, toy_positive
from tests.oracles.networks import NsUNet, PclEncoder, pyramid


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_pcrlv2_on_its_own_network_has_as_many_parameters_as_the_authors_code() -> None:
    backbone = pyramid(NsUNet, 4, 3)
    kind = method_class("pcrlv2")
    method = kind(kind.Config(), backbone)
    encoder = sum(p.numel() for name, p in backbone.net.named_parameters() if name in set(backbone.encoder_keys()))
    assert encoder == 7_027_776
    # Our heads leave out the bias before a batch norm, which takes it away again: 2c at each level.
    left_out = sum(2 * level.channels for level in backbone.decoder_levels)
    assert left_out == 2 * (256 + 128 + 64)
    assert trainable(method) == 17_111_434 - left_out


def test_pcrlv2_compares_and_restores_at_the_papers_sizes() -> None:
    backbone = pyramid(NsUNet, 4, 3).eval()
    sizes = {}
    with torch.no_grad():
        for size in ((64, 64, 32), (16, 16, 16)):
            maps = backbone.decode(backbone.features(torch.zeros(1, 1, *size)), skips=False)
            sizes[size] = [tuple(m.shape[2:]) for m in maps]
    assert sizes[64, 64, 32] == [(16, 16, 8), (32, 32, 16), (64, 64, 32)]
    assert sizes[16, 16, 16] == [(4, 4, 4), (8, 8, 8), (16, 16, 16)]


@pytest.mark.parametrize(("width", "parameters"), [(32, 5_238_880), (48, 11_586_704)])
def test_pcl_on_its_own_network_has_as_many_parameters_as_the_authors_code(width: int, parameters: int) -> None:
    kind = method_class("pcl")
    config = parse(kind.Config, {"hidden": 16 * width, "out": 512})
    assert trainable(kind(config, pyramid(PclEncoder, 5, 2, width=width))) == parameters


@pytest.mark.parametrize(
    ("threshold", "code"), [(0.01, 8.998211), (0.1, 13.865858), (0.45, 16.882700), (2.0, 15.737058)]
)
def test_pcls_code_differs_from_the_loss_by_its_factor_of_temperatures_alone(threshold: float, code: float) -> None:
    z = toy()
    ours = multi_positive_nce(z, z, toy_positive(threshold), not_itself(len(z)), 0.1)
    assert float(ours) * 0.1 / 0.07 == pytest.approx(code, abs=2e-6)


def test_the_centre_after_three_strided_convolutions_is_not_the_cells() -> None:
    convolved = cumulative([((2,), (0.5,))] * 3)[-1]
    pooled = cumulative([((2,), (1.0,))] * 3)[-1]
    assert convolved.offset is not None
    assert pooled.offset is not None
    assert [4 * level.stride[0] + level.offset[0] for level in (convolved, pooled)] == [32.5, 36.0]


def test_super_pixels_depend_on_the_ratio_of_intensity_and_scale() -> None:
    random = np.random.default_rng(0)
    image = np.indices((24, 28)).sum(0) // 9 % 3 / 3 + 0.03 * random.standard_normal((24, 28))
    ours = felzenszwalb_nd(image, 100.0, 0.5, 20)
    assert np.array_equal(ours, felzenszwalb_nd(1000 * image, 100_000.0, 0.5, 20))
    assert 1 < ours.max() < math.prod(image.shape) // 20
