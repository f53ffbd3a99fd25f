"""Every backbone is its stock network: same output, same names, and features where its levels say they are."""

from typing import Any

import pytest
import torch
from torch import nn

from ssl_core.networks import Backbone, backbone_names, build
from ssl_core.networks.feature_centres import measure
from ssl_core.networks.pyramid import cumulative
from ssl_core.networks.registry import architecture
from ssl_core.networks.weights import compare, encoder_state
from storage.errors import ConfigError
from tests.kit.networks import SMALL, volume

NARROW = {"features_per_stage": (8,) * 6}


@pytest.fixture(params=sorted(SMALL))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return build(request.param, **SMALL[request.param])


def test_every_registered_backbone_is_tested() -> None:
    assert sorted(SMALL) == backbone_names()


def test_it_meets_the_protocol(backbone: Backbone) -> None:
    assert isinstance(backbone, Backbone)


def test_maps_have_the_shapes_that_the_levels_say(backbone: Backbone) -> None:
    x = volume(backbone)
    features = backbone.features(x)
    for levels, maps in ((backbone.levels, features), (backbone.decoder_levels, backbone.decode(features))):
        assert len(levels) == len(maps)
        for level, m in zip(levels, maps, strict=True):
            assert m.shape[1] == level.channels
            assert tuple(n * s for n, s in zip(m.shape[2:], level.stride_DHW, strict=True)) == tuple(x.shape[2:])


def test_encoding_and_decoding_is_the_stock_networks_own_forward_pass(backbone: Backbone) -> None:
    x = volume(backbone)
    seen = []
    hook = backbone.net.register_forward_hook(lambda module, args, out: seen.append(out))
    logits = backbone.logits(x)
    hook.remove()
    head = {
        "basic_unet": lambda net, m: net.final_conv(m),
        "unet": lambda net, m: net.model[2](torch.cat([features[0], m], 1)),
        "dynunet": lambda net, m: net.output_block(m),
        "segresnet": lambda net, m: net.conv_final(m),
        "plain_unet": lambda net, m: net.decoder.seg_layers[-1](m),
        "resenc": lambda net, m: net.decoder.seg_layers[-1](m),
        "swin_unetr": lambda net, m: net.out(m),
    }[backbone.name]
    features = backbone.features(x)
    assert torch.equal(logits, seen[0])
    assert torch.allclose(head(backbone.net, backbone.decode(features)[-1]), logits, atol=1e-5)


def test_levels_can_be_had_without_the_deeper_ones(backbone: Backbone) -> None:
    x = volume(backbone)
    every = backbone.features(x)
    some = backbone.features(x, 1)
    assert len(some) == 2
    assert torch.equal(some[1], every[1])


def test_level_keys_are_what_the_level_depends_on(backbone: Backbone) -> None:
    x = volume(backbone)
    for i, m in enumerate(backbone.features(x)):
        backbone.net.zero_grad()
        m.square().sum().backward(retain_graph=True)
        keys = set(backbone.level_keys(i))
        reached = {n for n, p in backbone.net.named_parameters() if p.grad is not None}
        named = {n for n, _ in backbone.net.named_parameters()}
        assert reached == keys & named


def test_encoder_decoder_and_output_share_no_names(backbone: Backbone) -> None:
    encoder, decoder = set(backbone.encoder_keys()), set(backbone.decoder_keys())
    rest = set(backbone.net.state_dict()) - encoder - decoder
    assert not encoder & decoder
    assert 0 < len(rest) < len(decoder)
    assert encoder == set().union(*(backbone.level_keys(i) for i in range(len(backbone.levels))))


def test_decoding_without_skips_depends_on_the_deepest_map_only(backbone: Backbone) -> None:
    features = backbone.features(volume(backbone))
    changed = [f + 1 for f in features[:-1]] + features[-1:]
    for a, b in zip(backbone.decode(features, skips=False), backbone.decode(changed, skips=False), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(backbone.decode(features)[-1], backbone.decode(changed)[-1])


@pytest.mark.parametrize("name", ["unet", "dynunet", "segresnet"])
def test_derived_centres_are_where_gradients_say_they_are(name: str) -> None:
    kind = architecture(name)
    slim = kind.slim(SMALL[name])
    for geometry, found in zip(kind.geometry(slim), measure(kind, slim, seeds=3), strict=True):
        assert geometry.offset is not None
        for wanted, offset, stride in zip(geometry.offset, found, geometry.stride, strict=True):
            assert abs(offset - wanted) < 0.12 * stride


def test_pooling_centres_features_in_their_cells() -> None:
    kind = architecture("basic_unet")
    arguments = {"spatial_dims": 2, "features": (8,) * 6}
    for geometry, found in zip(kind.geometry(arguments), measure(kind, arguments, seeds=4), strict=True):
        for offset, stride in zip(found, geometry.stride, strict=True):
            assert abs(offset - stride / 2) < 0.2 * stride


def test_mixed_downsampling_is_measured_between_convolution_and_pooling() -> None:
    level = build("resenc", **SMALL["resenc"]).levels[2]
    assert level.stride_DHW == (4, 4, 4)
    assert 0.5 < level.offset_DHW[0] < 2.0
    assert len(set(level.offset_DHW)) == 1


def test_centres_that_are_known_for_the_presets_are_those_that_are_measured() -> None:
    kind = architecture("resenc")
    for preset in ("S", "L"):
        blocks = kind.make(preset=preset, **NARROW).encoder.stages
        known = kind.geometry({"preset": preset})
        assert len(known) == len(blocks)
        start = {"n_blocks_per_stage": tuple(len(stage.blocks) for stage in blocks[:3]), "features_per_stage": (8,) * 3}
        measured = measure(kind, start, seeds=3, axes=[0])
        for geometry, (found,) in zip(known[: len(measured)], measured, strict=True):
            assert geometry.offset is not None
            assert abs(geometry.offset[0] - found) < 0.12 * geometry.stride[0]
    assert [g.offset for g in kind.geometry({"preset": "M"})] == [g.offset for g in kind.geometry({"preset": "L"})][:5]
    assert kind.geometry({"preset": "S", "kernel_sizes": (5, 3, 3, 3, 3, 3)})[1].offset is None


@pytest.mark.parametrize(
    ("preset", "blocks"), [("S", [2, 2, 2, 2, 2, 2]), ("M", [1, 3, 4, 6, 6]), ("L", [1, 3, 4, 6, 6, 6])]
)
def test_presets_of_resenc_export_into_the_class_as_its_own_plans_build_it(preset: str, blocks: list[int]) -> None:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    stages = len(blocks)
    with torch.device("meta"):  # names and shapes, without a gigabyte of weights
        backbone = build("resenc", preset=preset)
        stock = unet.ResidualEncoderUNet(
            input_channels=1,
            n_stages=stages,
            features_per_stage=[32, 64, 128, 256, 320, 320][:stages],
            conv_op=nn.Conv3d,
            kernel_sizes=[[3, 3, 3]] * stages,
            strides=[[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
            n_blocks_per_stage=blocks,
            num_classes=2,
            n_conv_per_stage_decoder=[1] * (stages - 1),
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
        )
    report = compare(stock, encoder_state(backbone), backbone.encoder_keys())
    assert report.complete, str(report)
    assert set(backbone.encoder_keys()) == {k for k in stock.state_dict() if "encoder." in k}
    assert {k: v.shape for k, v in stock.state_dict().items()} == {
        k: v.shape for k, v in backbone.net.state_dict().items()
    }


def test_centres_compose() -> None:
    pooled = cumulative([((2,), (1.0,)), ((2,), (1.0,)), ((2,), (0.5,))])
    assert [(g.stride, g.offset) for g in pooled] == [((2,), (1.0,)), ((4,), (2.0,)), ((8,), (2.0,))]


def test_a_two_dimensional_network_sees_every_slice_on_its_own() -> None:
    backbone = build("basic_unet", spatial_dims=2, features=(4, 4, 8, 8, 8, 4))
    assert backbone.multiple_DHW() == (1, 16, 16)
    assert backbone.levels[2].stride_DHW == (1, 4, 4)
    assert backbone.levels[2].offset_DHW == (0.5, 2.0, 2.0)
    x = torch.randn(2, 1, 3, 32, 32)
    whole = backbone.features(x)
    one = backbone.features(x[:, :, 1:2])
    for a, b in zip(whole, one, strict=True):
        assert torch.allclose(a[:, :, 1:2], b, atol=1e-5)
    assert backbone.logits(x).shape == (2, 2, 3, 32, 32)
    assert torch.allclose(backbone.logits(x)[1, :, 2], backbone.net(x[1:, :, 2])[0], atol=1e-5)


def test_sizes_that_do_not_fit_are_refused() -> None:
    backbone = build("basic_unet", features=(4, 4, 8, 8, 8, 4))
    with pytest.raises(ConfigError, match="multiples of"):
        backbone.features(torch.randn(1, 1, 32, 24, 32))
    with pytest.raises(ConfigError, match="more than one position"):
        backbone.features(torch.randn(1, 1, 16, 16, 16))
    assert len(backbone.features(torch.randn(1, 1, 16, 16, 16), 3)) == 4


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet", {}),
        ("basic_unet", {"feature": (1,)}),
        ("dynunet", {"deep_supervision": True}),
        ("resenc", {"preset": "XL"}),
    ],
)
def test_unknown_names_and_arguments_are_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build(name, **arguments)


def test_batch_norm_is_taken_over_the_global_batch_under_the_stock_names() -> None:
    backbone = build("unet", channels=(4, 8), strides=(2,), norm="batch")
    stock = architecture("unet").make(channels=(4, 8), strides=(2,), norm="batch")
    assert list(backbone.net.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(backbone.net.state_dict())
    x = torch.randn(2, 1, 8, 8, 8)
    assert torch.allclose(stock(x), backbone.logits(x), atol=1e-5)
    assert torch.allclose(stock.eval()(x), backbone.eval().logits(x), atol=1e-5)
